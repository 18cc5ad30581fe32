//! What this node keeps of the weights: blobs by content, as files or as references into files that
//! are here anyway.
//!
//! | in the data folder | what |
//! |---|---|
//! | `blobs/ab/abcd...` | a blob's content, named by its hash |
//! | `partial/abcd...` | a blob that is still arriving |
//! | `partial/draft-1` | a blob that is being made |
//! | `index/` | a sled database: which blobs are held, and how; which parts of which checkpoint they are |
//!
//! Invariants: a blob is in the index only after its content is on the disk; its content was hashed
//! as a whole before it got its name; what is given out as verified was hashed chunk by chunk as it
//! was read, because disks flip bits and files that are only referenced can change. Sizes are
//! compared with what the disk really has before memory is taken for them.
//!
//! The store keeps within a budget of bytes where it was given one: what does not fit is refused before it is written, and who
//! wants room has to say what is to go ([`Blobs::discard`]).
//!
//! All calls block on the disk. What a blob means, and from whom it comes, is not known here.

mod draft;
mod partial;
mod quota;
mod segment;

pub use draft::{Draft, NewPart, NewSlices, PartKey};
pub use partial::Partial;
pub use quota::Usage;
pub use segment::Segment;

use crate::cbor::{self, CborError};
use crate::disk::{Batch, Disk, DiskError, OpenError, sync_folder};
use crate::ids::{BlobId, hex};
use crate::manifest::{BlobEntry, CHUNK_BYTES, ManifestError};
use quota::Quota;
use segment::{Keep, Record};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Longest index record: a reference has a handful of segments.
const RECORD_BYTES_MAX: usize = 1 << 20;

/// Why a blob cannot be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The index does not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The index cannot be read or written.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A record of the index is not readable, or cannot be written.
    #[error("the index of the weights: {0}")]
    Index(#[from] CborError),
    /// The system refused.
    #[error("{path}: {error}; check the folder and the room on the disk")]
    Io {
        /// Which file or folder.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// It would be more than may be kept.
    #[error(
        "{wanted_bytes} more bytes of weights do not fit the disk budget of {budget_bytes} bytes, of which {used_bytes} are \
         used; raise --disk"
    )]
    OverBudget {
        /// How many bytes were to be added.
        wanted_bytes: u64,
        /// How many are kept.
        used_bytes: u64,
        /// How many may be.
        budget_bytes: u64,
    },
    /// This node does not hold it.
    #[error("blob {id} is not held here; fetch it from a peer that holds it")]
    Missing {
        /// Which blob.
        id: BlobId,
    },
    /// Bytes are not what the manifest says.
    #[error("blob {id}, chunk {chunk}: the bytes in {place} do not match the manifest's hash; fetch it again")]
    Corrupt {
        /// Which blob.
        id: BlobId,
        /// Which of its 1 MiB chunks.
        chunk: u32,
        /// Where the bytes are from.
        place: String,
    },
    /// All chunks match, but the blob they make has another hash: the manifest contradicts itself.
    #[error("blob {id}: the chunks that the manifest lists make blob {got}; import the model again")]
    OtherContent {
        /// What it should be.
        id: BlobId,
        /// What it is.
        got: BlobId,
    },
    /// What was made here to be a blob is another one.
    #[error(
        "what was made here in place of blob {id} is blob {got}: another version of coel sliced this model; fetch it"
    )]
    MadeOther {
        /// What it should be.
        id: BlobId,
        /// What it is.
        got: BlobId,
    },
    /// A file is shorter than it was.
    #[error("blob {id}: {path} has {found} bytes where {needed} are needed; fetch it again")]
    Truncated {
        /// Which blob.
        id: BlobId,
        /// Which file.
        path: PathBuf,
        /// How many bytes it needs to have.
        needed: u64,
        /// How many it has.
        found: u64,
    },
    /// The checkpoint that it lies in is not what it was when it was imported. It may be again: the blob stays in the index.
    #[error(
        "blob {id} lies in a checkpoint that was imported here and has changed: {what}; put it back as it was, or import it again \
         from where it is now: coel model import DIR"
    )]
    Astray {
        /// Which blob.
        id: BlobId,
        /// What is wrong with which file.
        what: String,
    },
    /// The blob is held with another length than the manifest says.
    #[error("blob {id} has {held} bytes here, but {wanted} in the manifest; remove it and fetch it again")]
    OtherLength {
        /// Which blob.
        id: BlobId,
        /// How long it is here.
        held: u64,
        /// How long it should be.
        wanted: u64,
    },
    /// There is no such chunk.
    #[error("blob {id} has no chunk {chunk}: it has {bytes} bytes")]
    NoSuchChunk {
        /// Which blob.
        id: BlobId,
        /// Which chunk.
        chunk: u32,
        /// The blob's length.
        bytes: u64,
    },
    /// It is complete already.
    #[error("blob {id} is held already")]
    Held {
        /// Which blob.
        id: BlobId,
    },
    /// Somebody else in this process is receiving it.
    #[error("blob {id} is being received already")]
    Busy {
        /// Which blob.
        id: BlobId,
    },
    /// Chunks are missing.
    #[error("blob {id} is not complete: {missing} chunks are missing")]
    Incomplete {
        /// Which blob.
        id: BlobId,
        /// How many.
        missing: usize,
    },
    /// The entry contradicts itself.
    #[error(transparent)]
    Entry(#[from] ManifestError),
    /// The segments of a reference do not make up the blob.
    #[error("blob {id}: {why}")]
    Reference {
        /// Which blob.
        id: BlobId,
        /// What is wrong.
        why: String,
    },
}

impl BlobError {
    /// Whether the bytes would have been more than may be kept.
    pub fn is_over_budget(&self) -> bool {
        matches!(self, Self::OverBudget { .. })
    }

    /// Whether there was no room left on the disk.
    pub fn is_full_disk(&self) -> bool {
        matches!(self, Self::Io { error, .. } if error.kind() == std::io::ErrorKind::StorageFull)
    }

    /// Whether the blob here is no use and a fresh copy would be.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Corrupt { .. }
            | Self::Truncated { .. }
            | Self::Astray { .. }
            | Self::OtherLength { .. }
            | Self::Missing { .. } => true,
            Self::Io { error, .. } => error.kind() == std::io::ErrorKind::NotFound,
            _ => false,
        }
    }

    /// Whether that may mend itself: what is wrong is not this store's own file.
    pub fn is_astray(&self) -> bool {
        matches!(self, Self::Astray { .. })
    }
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> BlobError + '_ {
    // What the store itself refused comes back through writers that only know errors of the system.
    move |error| error.downcast().unwrap_or_else(|error| BlobError::Io { path: path.into(), error })
}

/// The blobs of one node; cloning the handle is cheap, and all calls may run at once.
#[derive(Clone)]
pub struct Blobs(Arc<Inner>);

struct Inner {
    index: Disk,
    files: PathBuf,
    partial: PathBuf,
    receiving: Mutex<BTreeSet<BlobId>>,
    quota: Quota,
}

impl Inner {
    /// Names and lengths of all files, of whole blobs and of others.
    fn all_files(&self) -> Result<Vec<(String, u64)>, BlobError> {
        let mut all = quota::files(&self.partial)?;
        for folder in fs::read_dir(&self.files).map_err(io(&self.files))? {
            all.extend(quota::files(&folder.map_err(io(&self.files))?.path())?);
        }
        Ok(all)
    }
}

fn index_key(id: &BlobId) -> Vec<u8> {
    [b"B".as_slice(), &id.0].concat()
}

fn put_record(batch: &mut Batch, key: &[u8], value: &impl Serialize, limit: usize) -> Result<(), BlobError> {
    let bytes = cbor::to_vec(value)?;
    if bytes.len() > limit {
        return Err(CborError::TooLong { bytes: bytes.len(), limit }.into());
    }
    batch.put(key, &bytes);
    Ok(())
}

/// Creates a folder so that it survives a power cut.
fn make_folder(path: &Path) -> Result<(), BlobError> {
    if !path.is_dir() {
        fs::create_dir_all(path).map_err(io(path))?;
        if let Some(parent) = path.parent() {
            sync_folder(parent).map_err(io(parent))?;
        }
    }
    Ok(())
}

impl Blobs {
    /// Opens or creates the store in the data folder `dir`.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, BlobError> {
        Self::open_within(dir, None)
    }

    /// The same, with a budget for the bytes of its files.
    pub fn open_within(dir: impl AsRef<Path>, budget_bytes: Option<u64>) -> Result<Self, BlobError> {
        let dir = dir.as_ref();
        make_folder(dir)?;
        let index = Disk::open(&dir.join("index"), None)?;
        let (files, partial) = (dir.join("blobs"), dir.join("partial"));
        make_folder(&files)?;
        make_folder(&partial)?;
        draft::sweep(&partial)?;
        let receiving = Mutex::default();
        let mut blobs = Inner { index, files, partial, receiving, quota: Quota::default() };
        let used_bytes = blobs.all_files()?.iter().map(|(_, bytes)| bytes).sum();
        blobs.quota = Quota::new(Usage { used_bytes, budget_bytes });
        Ok(Self(Arc::new(blobs)))
    }

    /// Bytes kept, and how many may be.
    pub fn usage(&self) -> Usage {
        self.0.quota.read()
    }

    /// The blobs that have files of their own, whole or on their way in, with the bytes of these files.
    pub fn files(&self) -> Result<Vec<(BlobId, u64)>, BlobError> {
        let mut files: BTreeMap<BlobId, u64> = BTreeMap::new();
        for (name, bytes) in self.0.all_files()? {
            if let Ok(id) = name.parse() {
                *files.entry(id).or_default() += bytes;
            }
        }
        Ok(files.into_iter().collect())
    }

    fn path(&self, id: &BlobId) -> PathBuf {
        let name = id.to_string();
        self.0.files.join(hex(&id.0[..1])).join(name)
    }

    fn partial_path(&self, id: &BlobId) -> PathBuf {
        self.0.partial.join(id.to_string())
    }

    fn record(&self, id: &BlobId) -> Result<Record, BlobError> {
        let bytes = self.0.index.get(&index_key(id))?.ok_or(BlobError::Missing { id: *id })?;
        Ok(cbor::from_slice(&bytes, RECORD_BYTES_MAX)?)
    }

    /// The record, if the blob is held with the length that `entry` says.
    fn record_of(&self, entry: &BlobEntry) -> Result<Record, BlobError> {
        entry.check()?;
        let record = self.record(&entry.id)?;
        if record.bytes != entry.bytes {
            return Err(BlobError::OtherLength { id: entry.id, held: record.bytes, wanted: entry.bytes });
        }
        Ok(record)
    }

    fn segments(&self, id: &BlobId, record: &Record) -> Vec<Segment> {
        match &record.keep {
            Keep::File => vec![Segment::File { path: self.path(id), offset: 0, bytes: record.bytes }],
            Keep::Reference(segments) => segments.clone(),
        }
    }

    /// Where the bytes of a held blob are, piece by piece.
    pub fn lies_in(&self, entry: &BlobEntry) -> Result<Vec<Segment>, BlobError> {
        let record = self.record_of(entry)?;
        let segments = self.segments(&entry.id, &record);
        segment::check(&entry.id, entry.bytes, &segments).map_err(record.keep.fault())?;
        Ok(segments)
    }

    fn remember(&self, id: &BlobId, record: &Record) -> Result<(), BlobError> {
        let mut batch = Batch::default();
        put_record(&mut batch, &index_key(id), record, RECORD_BYTES_MAX)?;
        Ok(self.0.index.write_blocking(batch)?)
    }

    /// Keeps `content` as a file; returns its entry. Content that is held already is not written
    /// again.
    pub fn put(&self, content: &[u8]) -> Result<BlobEntry, BlobError> {
        let entry = BlobEntry::of(content);
        if self.has(&entry.id) {
            return Ok(entry);
        }
        let mut partial = self.receive(&entry)?;
        for chunk in partial.missing() {
            let start = chunk as usize * CHUNK_BYTES;
            partial.write(chunk, &content[start..content.len().min(start + CHUNK_BYTES)])?;
        }
        partial.finish()?;
        Ok(entry)
    }

    /// Whether a file of this store's own is held, whole as far as a look at it tells.
    fn has_own(&self, id: &BlobId) -> bool {
        self.record(id).is_ok_and(|record| matches!(record.keep, Keep::File)) && self.has(id)
    }

    /// Whether the blob is held, as far as a look at the files tells: indexed, and as long as it
    /// should be. Its content is checked when it is read.
    pub fn has(&self, id: &BlobId) -> bool {
        self.record(id).is_ok_and(|record| segment::check(id, record.bytes, &self.segments(id, &record)).is_ok())
    }

    /// The length of a held blob in bytes.
    pub fn bytes(&self, id: &BlobId) -> Result<u64, BlobError> {
        Ok(self.record(id)?.bytes)
    }

    /// Every blob in the index with its length in bytes, in the order of their ids.
    pub fn list(&self) -> Result<Vec<(BlobId, u64)>, BlobError> {
        let mut held = Vec::new();
        for key in self.0.index.keys(b"B", b"C") {
            let key = key?;
            if let Some(id) = key.strip_prefix(b"B").and_then(|id| id.try_into().ok()).map(BlobId) {
                held.push((id, self.record(&id)?.bytes));
            }
        }
        Ok(held)
    }

    /// Forgets a blob, and deletes its file if it has one of its own. Whether it was held.
    pub fn remove(&self, id: &BlobId) -> Result<bool, BlobError> {
        let held = self.0.index.get(&index_key(id))?.is_some();
        if held {
            let mut batch = Batch::default();
            let key = index_key(id);
            self.0.index.remove_range(&mut batch, &key, &[&key, [0xff; 5].as_slice()].concat())?;
            self.0.index.write_blocking(batch)?;
        }
        Ok(self.delete(&self.path(id))? || held)
    }

    /// Forgets a blob with what has arrived of it, to make room. Refused while it is being received.
    pub fn discard(&self, id: &BlobId) -> Result<(), BlobError> {
        // Held while the files go, so that nobody begins to receive it in between.
        let receiving = self.0.receiving.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if receiving.contains(id) {
            return Err(BlobError::Busy { id: *id });
        }
        self.remove(id)?;
        self.delete(&self.partial_path(id)).map(drop)
    }

    /// Deletes a file; whether it was there.
    fn delete(&self, path: &Path) -> Result<bool, BlobError> {
        let bytes = quota::length(path);
        match fs::remove_file(path) {
            Ok(()) => {
                self.0.quota.give_back(bytes);
                Ok(true)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(io(path)(error)),
        }
    }

    /// Puts a file in the place of another, if there is one.
    fn rename(&self, from: &Path, to: &Path) -> Result<(), BlobError> {
        let replaced = quota::length(to);
        fs::rename(from, to).map_err(io(to))?;
        self.0.quota.give_back(replaced);
        Ok(())
    }

    /// The raw bytes of one chunk, to serve to a peer, who checks them. Only their length is
    /// checked here.
    pub fn read_chunk(&self, id: &BlobId, chunk: u32) -> Result<Vec<u8>, BlobError> {
        let record = self.record(id)?;
        let start = u64::from(chunk) * CHUNK_BYTES as u64;
        if start >= record.bytes {
            return Err(BlobError::NoSuchChunk { id: *id, chunk, bytes: record.bytes });
        }
        let mut bytes = vec![0; (record.bytes - start).min(CHUNK_BYTES as u64) as usize];
        segment::Reader::new(*id, self.segments(id, &record)).read_at(start, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads chunk after chunk, as long as each is right: into `buffer` one behind the other, where it is as long as the blob, or
    /// one over the other, where it is as long as a chunk.
    fn check_chunks(&self, entry: &BlobEntry, segments: Vec<Segment>, buffer: &mut [u8]) -> Result<(), BlobError> {
        let mut reader = segment::Reader::new(entry.id, segments);
        for chunk in 0..entry.chunks.len() as u32 {
            let start = u64::from(chunk) * CHUNK_BYTES as u64;
            let at = (start % buffer.len() as u64) as usize;
            let bytes = &mut buffer[at..at + entry.chunk_bytes(chunk).unwrap_or(0)];
            reader.read_at(start, bytes)?;
            if !entry.chunk_matches(chunk, bytes) {
                let place = reader.place(start, bytes.len());
                return Err(BlobError::Corrupt { id: entry.id, chunk, place });
            }
        }
        Ok(())
    }

    /// The whole content, every chunk of it checked against `entry`.
    pub fn read_verified(&self, entry: &BlobEntry) -> Result<Vec<u8>, BlobError> {
        self.read_verified_into(entry, |bytes| Ok(vec![0; bytes]))
    }

    /// The same in memory that `room` gives for so many bytes.
    pub fn read_verified_into<B: AsMut<[u8]>>(
        &self,
        entry: &BlobEntry,
        room: impl FnOnce(usize) -> std::io::Result<B>,
    ) -> Result<B, BlobError> {
        let keep = self.record_of(entry)?.keep;
        // The files are seen to be this long before anything is allocated for them.
        let segments = self.lies_in(entry)?;
        let mut content = room(entry.bytes as usize).map_err(io(&self.0.files))?;
        self.check_chunks(entry, segments, &mut content.as_mut()[..entry.bytes as usize]).map_err(keep.fault())?;
        Ok(content)
    }

    /// To read a held blob piece by piece. What it gives is as it lies there: whoever needs it verified checks it, or what comes
    /// of it.
    pub fn reader(&self, entry: &BlobEntry) -> Result<BlobReader, BlobError> {
        Ok(BlobReader(segment::Reader::new(entry.id, self.lies_in(entry)?)))
    }

    /// Checks every chunk without keeping the content.
    pub fn verify(&self, entry: &BlobEntry) -> Result<(), BlobError> {
        let keep = self.record_of(entry)?.keep;
        let mut buffer = vec![0; entry.bytes.min(CHUNK_BYTES as u64) as usize];
        self.check_chunks(entry, self.lies_in(entry)?, &mut buffer).map_err(keep.fault())
    }

    /// Begins to receive a blob, or goes on where an earlier attempt ended.
    pub fn receive(&self, entry: &BlobEntry) -> Result<Partial, BlobError> {
        Partial::open(self, entry)
    }
}

/// A held blob, opened by [`Blobs::reader`].
pub struct BlobReader(segment::Reader);

impl BlobReader {
    /// Fills `buffer` with the bytes from `start` on.
    pub fn read_at(&mut self, start: u64, buffer: &mut [u8]) -> Result<(), BlobError> {
        self.0.read_at(start, buffer)
    }
}

#[cfg(test)]
mod tests;
