//! Blobs that are made here, and the parts of a model that they belong to.
//!
//! Owns [`Draft`], a file that gets its name once its content is complete and hashed, and the notes of an import: which
//! part of which checkpoint became which blobs, so that an interrupted import does not start over. Invariant: a note is
//! written only after every blob it names is on the disk, in the same write as their index records. The module does not
//! know what a part is, or what its key is made of.

use super::error::{BlobError, io};
use super::segment::{self, Keep, Record, Segment};
use super::store::{Blobs, DRAFT_PREFIX, RECORD_BYTES_MAX, index_key, put_record};
use crate::cbor;
use crate::disk::{Renames, WriteBatch};
use crate::ids::BlobId;
use crate::manifest::{BlobEntry, BlobHasher, Slices};
use crate::sync::lock;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes gathered before they are hashed and written.
const BUFFER_BYTES: usize = 1 << 18;
/// Longest note: a part of 256 GB has 8 MB of hashes in each of its slices.
const NOTE_BYTES_MAX: usize = 32 << 20;

/// A blob in the making: what is written to it becomes its content. Dropping it deletes it.
pub struct Draft {
    file: BufWriter<Hashed>,
    path: PathBuf,
}

/// A file that is hashed and counted as it is written.
struct Hashed {
    blobs: Blobs,
    file: File,
    hasher: Box<BlobHasher>,
    /// The draft is given up: what is still buffered is not written.
    closed: bool,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.closed {
            return Ok(bytes.len());
        }
        let quota = &self.blobs.0.quota;
        let wanted = bytes.len() as u64;
        let full = |full| std::io::Error::new(std::io::ErrorKind::StorageFull, BlobError::Full(full));
        self.blobs.0.room.check(wanted).map_err(full)?;
        quota.resize(0, wanted).map_err(|over| std::io::Error::new(std::io::ErrorKind::QuotaExceeded, over))?;
        let written = self.file.write(bytes).inspect_err(|_| quota.give_back(wanted))?;
        quota.give_back(wanted - written as u64);
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Write for Draft {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Draft {
    /// The entry of its content; returns once all of it is on the disk.
    fn finish(&mut self) -> Result<BlobEntry, BlobError> {
        self.file.flush().map_err(io(&self.path))?;
        self.file.get_ref().file.sync_all().map_err(io(&self.path))?;
        Ok(std::mem::take(&mut self.file.get_mut().hasher).finish())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        self.file.get_mut().closed = true;
        // The file is gone already if the draft was kept. What a crash leaves behind goes when the store is opened.
        let _ = self.file.get_ref().blobs.delete(&self.path);
    }
}

/// What identifies a part of a checkpoint to [`Blobs::noted`].
pub type PartKey = [u8; 32];

/// A part of a model, ready to be kept.
pub struct NewPart {
    /// The key under which it can be found again.
    pub key: PartKey,
    /// Its exact blob, and where that lies.
    pub exact: (BlobEntry, Vec<Segment>),
    /// Its base and its refine slice, if it has any.
    pub slices: NewSlices,
}

/// The base and the refine slice of a part.
pub enum NewSlices {
    /// It has none.
    None,
    /// They were made just now.
    Made([Draft; 2]),
    /// They are held already.
    Held([BlobEntry; 2]),
}

fn note_key(key: &PartKey) -> Vec<u8> {
    [b"N".as_slice(), key].concat()
}

impl Blobs {
    /// A new blob with nothing in it yet.
    pub fn draft(&self) -> Result<Draft, BlobError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = self.0.partial.join(format!("{DRAFT_PREFIX}{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let file = File::options().write(true).create(true).truncate(true).open(&path).map_err(io(&path))?;
        let hashed = Hashed { blobs: self.clone(), file, hasher: Box::default(), closed: false };
        Ok(Draft { file: BufWriter::with_capacity(BUFFER_BYTES, hashed), path })
    }

    /// Keeps parts, all with one write to the index; returns the entries of their blobs in the same order.
    pub fn keep(&self, parts: Vec<NewPart>) -> Result<Vec<Slices>, BlobError> {
        let mut batch = WriteBatch::default();
        let mut renames = Renames::default();
        let (mut kept, mut replaced) = (Vec::with_capacity(parts.len()), Vec::new());
        for part in parts {
            let (exact, segments) = part.exact;
            let segments = segments.into_iter().map(Segment::absolute).collect::<Result<Vec<_>, _>>()?;
            exact.check()?;
            segment::check(&exact.id, exact.bytes, &segments)?;
            // A good copy that was fetched before stays, because readers that have it open know it by that name.
            if !self.has_file(&exact) {
                index(&mut batch, &exact, Keep::Reference(segments))?;
                replaced.push(exact.id);
            }
            let mut slices = Slices::exact_only(exact);
            match part.slices {
                NewSlices::None => {}
                NewSlices::Made(mut drafts) => {
                    let [base, refine] = [drafts[0].finish()?, drafts[1].finish()?];
                    for (draft, entry) in drafts.iter().zip([&base, &refine]) {
                        self.name(draft, entry, &mut batch, &mut renames)?;
                    }
                    (slices.base, slices.refine) = (Some(base), Some(refine));
                }
                NewSlices::Held([base, refine]) => {
                    self.lies_in(&base)?;
                    self.lies_in(&refine)?;
                    (slices.base, slices.refine) = (Some(base), Some(refine));
                }
            }
            put_record(&mut batch, &note_key(&part.key), &slices, NOTE_BYTES_MAX)?;
            kept.push(slices);
        }
        self.sync(renames)?;
        self.0.index.write_blocking(batch)?;
        for id in replaced {
            // A damaged file, or an incomplete one: neither is read any more, and both take room.
            self.delete(&self.path(&id))?;
            self.delete_partial(&id)?;
        }
        for slice in kept.iter().flat_map(|slices: &Slices| slices.base.iter().chain(&slices.refine)) {
            self.delete_partial(&slice.id)?;
        }
        Ok(kept)
    }

    /// Whether the blob is held as a file of its own, and its content is right.
    fn has_file(&self, entry: &BlobEntry) -> bool {
        self.record_of(entry).is_ok_and(|record| matches!(record.keep, Keep::File)) && self.verify(entry).is_ok()
    }

    /// Deletes what has arrived of a blob, unless it is being received.
    fn delete_partial(&self, id: &BlobId) -> Result<(), BlobError> {
        let receiving = lock(&self.0.receiving);
        if receiving.contains(id) { Ok(()) } else { self.delete(&self.partial_path(id)).map(drop) }
    }

    /// Keeps a draft as the blob `wanted`.
    ///
    /// # Errors
    /// [`BlobError::MadeOther`] where it has become another one.
    pub fn keep_as(&self, mut draft: Draft, wanted: &BlobEntry) -> Result<(), BlobError> {
        let (mut batch, mut renames) = (WriteBatch::default(), Renames::default());
        let made = draft.finish()?;
        if made != *wanted {
            return Err(BlobError::MadeOther { id: wanted.id, got: made.id });
        }
        self.name(&draft, &made, &mut batch, &mut renames)?;
        self.sync(renames)?;
        self.0.index.write_blocking(batch)?;
        self.delete_partial(&made.id)
    }

    /// Gives a finished draft the name of its content.
    fn name(
        &self,
        draft: &Draft,
        entry: &BlobEntry,
        batch: &mut WriteBatch,
        renames: &mut Renames,
    ) -> Result<(), BlobError> {
        self.rename(renames, &draft.path, &self.path(&entry.id))?;
        index(batch, entry, Keep::File)
    }

    /// The blobs of a part that an earlier import kept, if all of them are still here, by a look at the files.
    pub fn noted(&self, key: &PartKey) -> Result<Option<Slices>, BlobError> {
        let Some(bytes) = self.0.index.get(&note_key(key))? else {
            return Ok(None);
        };
        let slices: Slices = cbor::from_slice(&bytes, NOTE_BYTES_MAX)?;
        let whole =
            slices.blobs().all(|blob| self.has(&blob.id) && self.bytes(&blob.id).is_ok_and(|n| n == blob.bytes));
        Ok(whole.then_some(slices))
    }
}

fn index(batch: &mut WriteBatch, entry: &BlobEntry, keep: Keep) -> Result<(), BlobError> {
    put_record(batch, &index_key(&entry.id), &Record { bytes: entry.bytes, keep }, RECORD_BYTES_MAX)
}
