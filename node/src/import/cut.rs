//! Cuts a checkpoint into blobs: the exact ones in place, the slices as files of their own.
//!
//! Owns [`Cut`]. A part is read once, in pieces, and hashed and sliced as it goes by, so memory grows neither with the parts nor
//! with their number; a trunk part whose tensors lie in another order than its slices have them is read a second time. Parts
//! are kept in batches, each with a note: an import that was interrupted finds them again and goes on. The invariant: what is
//! noted was on the disk before the note, and notes hold for the very files they were made from (paths, lengths, times).

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use coel_model::weights::checkpoint::Checkpoint;
use coel_model::weights::parts::{Part, PartKind, parts};
use coel_model::weights::slices::encode::first_not_finite;
use coel_model::weights::slices::{FORMAT, SliceError};
use coel_model::weights::slicing::part_slices::{PartBytes, part_bytes, write_part};
use coel_model::weights::slicing::source::ReadAt;
use coel_store::{
    BlobEntry, BlobError, BlobHasher, Blobs, CHUNK_BYTES, Manifest, NewPart, NewSlices, PartKey, Segment, Slices,
};
use tracing::warn;

use super::Progress;
use crate::config::Size;
use crate::ids;
use crate::system::free_disk_bytes;

/// Slices written before they are kept: what an interruption may cost, against a sync of the disk for each part.
const BATCH_BYTES: u64 = 64 << 20;
/// Parts of a batch at most: each has two files open.
const BATCH_PARTS: usize = 32;
/// Bytes read at once where a part is only hashed.
const READ_BYTES: usize = 1 << 20;
/// Room beyond the slices that the disk must have: for the index of the blobs.
const INDEX_BYTES: u64 = 4 << 20;

/// Why a checkpoint was not cut, or not to the end.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// The weights cannot be what they should be.
    #[error("{part}: {source}")]
    Slice { part: PartKind, source: SliceError },
    /// A weight file cannot be read.
    #[error("{}: {source}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    /// The blobs cannot be kept.
    #[error(transparent)]
    Keep(#[from] BlobError),
    /// There is no room for the slices.
    #[error(
        "the slices of this model need {} more in {}, where {} are free: {missing_bytes} bytes are missing. Make room there, or \
         give the node a data folder on a larger disk, and import again: it goes on where it stopped ({done} of {total} parts \
         are done)",
        Size(*.needed_bytes), .folder.display(), Size(*.free_bytes)
    )]
    Full { folder: PathBuf, needed_bytes: u64, free_bytes: u64, missing_bytes: u64, done: usize, total: usize },
    /// The node may not keep the slices.
    #[error(
        "the slices of this model need {} more, and the disk budget (--disk) is {} with {} used: {missing_bytes} bytes are missing. \
         Raise --disk and import again: it goes on where it stopped ({done} of {total} parts are done)",
        Size(*.needed_bytes), Size(*.budget_bytes), Size(*.used_bytes)
    )]
    OverBudget { needed_bytes: u64, budget_bytes: u64, used_bytes: u64, missing_bytes: u64, done: usize, total: usize },
    /// The node is stopping.
    #[error("the node is stopping; import again once it is up: it goes on where it stopped")]
    Stopped,
}

/// What is known of a part beforehand.
enum Known {
    /// An earlier import kept all of it.
    Whole(Slices),
    /// These slices are here; whether they are of this part its exact weights will tell.
    Slices(Slices),
    Nothing,
}

/// The slices of a part in a manifest.
fn slices_in<'a>(manifest: &'a Manifest, part: &PartKind) -> Option<&'a Slices> {
    match part {
        PartKind::Trunk { name } => manifest.trunk.iter().find(|part| part.name == *name).map(|part| &part.slices),
        PartKind::Expert(expert) => manifest.experts.get(&ids::to_store(*expert)),
    }
}

/// A checkpoint on its way into blobs.
pub struct Cut<'a> {
    checkpoint: &'a Checkpoint,
    files: Vec<File>,
    parts: Vec<Part>,
    /// What the slices of each part take; `None` where weights are held exactly only.
    sizes: Vec<Option<PartBytes>>,
    keys: Vec<PartKey>,
    blobs: &'a Blobs,
    /// Where the blobs are, for messages and for the room there.
    folder: &'a Path,
}

impl<'a> Cut<'a> {
    /// Opens the weight files of `checkpoint`, to be cut into `blobs`, which lie in `folder`.
    ///
    /// # Errors
    /// [`CutError::Read`].
    pub fn new(checkpoint: &'a Checkpoint, blobs: &'a Blobs, folder: &'a Path) -> Result<Self, CutError> {
        let mut identity = blake3::Hasher::new();
        identity.update(FORMAT.as_bytes());
        let mut files = Vec::new();
        for path in checkpoint.weight_files() {
            let named = |source| CutError::Read { path: path.clone(), source };
            let file = File::open(path).map_err(named)?;
            let metadata = file.metadata().map_err(named)?;
            let changed = metadata.modified().map_err(named)?.duration_since(UNIX_EPOCH).unwrap_or_default();
            let path = path.canonicalize().map_err(named)?;
            identity.update(format!("\0{}\0{}\0{}", path.display(), metadata.len(), changed.as_nanos()).as_bytes());
            files.push(file);
        }
        let parts = parts(checkpoint);
        let key = |part: &Part| {
            let mut key = identity.clone();
            key.update(format!("\0{}\0", part.kind).as_bytes()).update(&part.header());
            *key.finalize().as_bytes()
        };
        let sizes = parts.iter().map(|part| part_bytes(part).ok()).collect();
        Ok(Self { checkpoint, files, keys: parts.iter().map(key).collect(), sizes, parts, blobs, folder })
    }

    /// The parts.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Whether this can be the model of `manifest`: it has the same parts, as long, and those of the trunk begin alike. Looks at a
    /// megabyte of each; two models that differ in experts only look the same from here.
    ///
    /// # Errors
    /// [`CutError::Read`].
    pub fn could_be(&self, manifest: &Manifest) -> Result<bool, CutError> {
        if self.parts.len() != manifest.trunk.len() + manifest.experts.len() {
            return Ok(false);
        }
        for part in &self.parts {
            let Some(entry) = slices_in(manifest, &part.kind).map(|slices| &slices.exact) else {
                return Ok(false);
            };
            let mut first = part.header();
            if entry.bytes != first.len() as u64 + part.data_bytes() {
                return Ok(false);
            }
            if part.expert().is_some() {
                continue;
            }
            for tensor in &part.tensors {
                let start = first.len();
                let wanted = (CHUNK_BYTES.saturating_sub(start) as u64).min(tensor.bytes) as usize;
                first.resize(start + wanted, 0);
                let read = self.files[tensor.file].read_exact_at(&mut first[start..], tensor.offset);
                let path = || self.checkpoint.weight_files()[tensor.file].clone();
                read.map_err(|source| CutError::Read { path: path(), source })?;
            }
            first.truncate(CHUNK_BYTES);
            if !entry.chunk_matches(0, &first) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Cuts what was not cut before; the slices of every part, in their order. Where this `could_be` a model whose slices are held
    /// here already, they are not made again.
    ///
    /// # Errors
    /// [`CutError`]; what was kept by then is found again.
    pub fn run(
        &self,
        could_be: Option<&Manifest>,
        progress: Progress<'_>,
        stopped: &dyn Fn() -> bool,
    ) -> Result<Vec<Slices>, CutError> {
        let noted = self.keys.iter().map(|key| self.blobs.noted(key)).collect::<Result<Vec<_>, _>>()?;
        let of_manifest = |part: &Part| slices_in(could_be?, &part.kind).filter(|slices| self.holds(slices)).cloned();
        let known: Vec<_> = noted
            .into_iter()
            .zip(&self.parts)
            .map(|(noted, part)| match noted {
                Some(slices) => Known::Whole(slices),
                None => of_manifest(part).map_or(Known::Nothing, Known::Slices),
            })
            .collect();
        let mut cut = Vec::with_capacity(self.parts.len());
        self.check_room(&known, 0)?;
        let total: u64 = self.parts.iter().map(Part::data_bytes).sum();
        let mut done = 0;
        let mut batch = Batch::default();
        for (index, part) in self.parts.iter().enumerate() {
            progress("cutting weights, bytes", done, total);
            if stopped() {
                return Err(CutError::Stopped);
            }
            match &known[index] {
                Known::Whole(slices) => cut.push(Some(slices.clone())),
                before => {
                    let kept = self.cut(index, before).and_then(|part| {
                        if matches!(part.slices, NewSlices::Made(_)) {
                            batch.bytes += self.sizes[index].map_or(0, |sizes| sizes.base + sizes.refine);
                        }
                        batch.parts.push((index, part));
                        cut.push(None);
                        if batch.is_full() { batch.keep(self.blobs, &mut cut) } else { Ok(()) }
                    });
                    if let Err(error) = kept {
                        // What was finished is kept if it can be, and what was not makes room for the next try.
                        let _ = batch.keep(self.blobs, &mut cut);
                        drop(batch);
                        return Err(self.explain(error, &known, &cut));
                    }
                }
            }
            done += part.data_bytes();
        }
        batch.keep(self.blobs, &mut cut).map_err(|error| self.explain(error, &known, &cut))?;
        progress("cutting weights, bytes", total, total);
        Ok(cut.into_iter().map(|slices| slices.expect("every part was noted or kept")).collect())
    }

    /// Whether both slices lie here whole, as far as a look at the files tells.
    fn holds(&self, slices: &Slices) -> bool {
        let held = |slice: &Option<BlobEntry>| slice.as_ref().is_some_and(|entry| self.blobs.lies_in(entry).is_ok());
        held(&slices.base) && held(&slices.refine)
    }

    /// One part, hashed and, unless its slices are here, sliced.
    fn cut(&self, index: usize, before: &Known) -> Result<NewPart, CutError> {
        let part = &self.parts[index];
        let failed = |source| CutError::Slice { part: part.kind.clone(), source };
        if let Known::Slices(Slices { exact, base: Some(base), refine: Some(refine) }) = before {
            let found = ByTheWay::new(&self.files, part).finish(true).map_err(failed)?;
            if found == *exact {
                return Ok(self.part(index, found, NewSlices::Held([base.clone(), refine.clone()])));
            }
        }
        let by_the_way = ByTheWay::new(&self.files, part);
        let mut slices = NewSlices::None;
        if self.sizes[index].is_some() {
            let [mut base, mut refine] = [self.blobs.draft()?, self.blobs.draft()?];
            match write_part(part, &by_the_way, &mut base, &mut refine) {
                Ok(()) => slices = NewSlices::Made([base, refine]),
                // Such weights are rare and not damaged: they are only held exactly. What slicing did not come to was looked
                // through by nobody.
                Err(range @ SliceError::Range { .. }) => {
                    warn!(part = %part.kind, %range, "no slices of this part");
                    let again = ByTheWay::new(&self.files, part);
                    let exact = again.finish(true).map_err(failed)?;
                    return Ok(self.part(index, exact, NewSlices::None));
                }
                Err(error) => return Err(failed(error)),
            }
        }
        let exact = by_the_way.finish(matches!(slices, NewSlices::None)).map_err(failed)?;
        Ok(self.part(index, exact, slices))
    }

    /// A part whose exact blob stays where it is.
    fn part(&self, index: usize, exact: BlobEntry, slices: NewSlices) -> NewPart {
        let part = &self.parts[index];
        let mut segments = vec![Segment::Inline(part.header())];
        segments.extend(part.tensors.iter().map(|tensor| Segment::File {
            path: self.checkpoint.weight_files()[tensor.file].clone(),
            offset: tensor.offset,
            bytes: tensor.bytes,
        }));
        NewPart { key: self.keys[index], exact: (exact, segments), slices }
    }

    /// Whether what is still to be cut has room.
    fn check_room(&self, known: &[Known], done: usize) -> Result<(), CutError> {
        let open = self.sizes.iter().zip(known).skip(done).filter(|(_, known)| matches!(known, Known::Nothing));
        let needed: u64 = open.filter_map(|(sizes, _)| sizes.map(|sizes| sizes.base + sizes.refine)).sum();
        let needed_bytes = if needed == 0 { 0 } else { needed + INDEX_BYTES };
        let free_bytes =
            free_disk_bytes(self.folder).map_err(|source| CutError::Read { path: self.folder.to_owned(), source })?;
        let usage = self.blobs.usage();
        let room = usage.budget_bytes.zip(usage.room_bytes()).filter(|(_, room)| needed > *room);
        let (done, total) =
            (done + known.iter().skip(done).filter(|known| matches!(known, Known::Whole(_))).count(), self.parts.len());
        if let Some((budget_bytes, room)) = room {
            let (needed_bytes, missing_bytes) = (needed, needed - room);
            let used_bytes = usage.used_bytes;
            return Err(CutError::OverBudget { needed_bytes, budget_bytes, used_bytes, missing_bytes, done, total });
        }
        if needed_bytes <= free_bytes {
            return Ok(());
        }
        let missing_bytes = needed_bytes - free_bytes;
        Err(CutError::Full { folder: self.folder.to_owned(), needed_bytes, free_bytes, missing_bytes, done, total })
    }

    /// Says of a full disk what is missing.
    fn explain(&self, error: CutError, known: &[Known], cut: &[Option<Slices>]) -> CutError {
        let full = match &error {
            CutError::Keep(error) => error.is_full_disk() || error.is_over_budget(),
            CutError::Slice { source: SliceError::Write { source, .. }, .. } => is_full(source),
            _ => false,
        };
        if !full {
            return error;
        }
        let kept = cut.iter().take_while(|slices| slices.is_some()).count();
        // Somebody may have made room meanwhile; then the system's own words must do.
        self.check_room(known, kept).err().unwrap_or(error)
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Parts that are finished and not kept yet.
#[derive(Default)]
struct Batch {
    parts: Vec<(usize, NewPart)>,
    bytes: u64,
}

impl Batch {
    fn is_full(&self) -> bool {
        self.bytes >= BATCH_BYTES || self.parts.len() >= BATCH_PARTS
    }

    /// Keeps them all, and says so in `cut`.
    fn keep(&mut self, blobs: &Blobs, cut: &mut [Option<Slices>]) -> Result<(), CutError> {
        self.bytes = 0;
        let (indices, parts): (Vec<_>, Vec<_>) = std::mem::take(&mut self.parts).into_iter().unzip();
        for (index, slices) in indices.into_iter().zip(blobs.keep(parts)?) {
            cut[index] = Some(slices);
        }
        Ok(())
    }
}

/// The weight files, hashed as a part's exact blob while they are read for something else.
struct ByTheWay<'a> {
    files: &'a [File],
    part: &'a Part,
    state: RefCell<Hashed>,
}

/// How far the exact blob is hashed.
struct Hashed {
    hasher: BlobHasher,
    /// The tensor that comes next, and how much of it is hashed.
    tensor: usize,
    bytes: u64,
}

impl<'a> ByTheWay<'a> {
    fn new(files: &'a [File], part: &'a Part) -> Self {
        let mut hasher = BlobHasher::new();
        hasher.update(&part.header());
        Self { files, part, state: RefCell::new(Hashed { hasher, tensor: 0, bytes: 0 }) }
    }

    /// The entry of the exact blob: whatever was not read yet is read now, and looked through for what is no number if
    /// `check` is set.
    fn finish(self, check: bool) -> Result<BlobEntry, SliceError> {
        let mut state = self.state.into_inner();
        let mut buffer = vec![0; READ_BYTES];
        for tensor in &self.part.tensors[state.tensor..] {
            let mut done = std::mem::take(&mut state.bytes);
            while done < tensor.bytes {
                let piece = &mut buffer[..(tensor.bytes - done).min(READ_BYTES as u64) as usize];
                let read = self.files[tensor.file].read_exact_at(piece, tensor.offset + done);
                read.map_err(|source| SliceError::Read { tensor: tensor.name.clone(), source })?;
                if let Some(index) = first_not_finite(tensor.dtype, piece).filter(|_| check) {
                    let index = done as usize / tensor.dtype.size() + index;
                    let columns = tensor.shape.last().copied().unwrap_or(1).max(1);
                    let (row, column) = (index / columns, index % columns);
                    return Err(SliceError::NotFinite { tensor: tensor.name.clone(), row, column });
                }
                state.hasher.update(piece);
                done += piece.len() as u64;
            }
        }
        Ok(state.hasher.finish())
    }
}

impl ReadAt for ByTheWay<'_> {
    fn read_at(&self, file: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let opened = self.files.get(file).ok_or(io::ErrorKind::NotFound)?;
        opened.read_exact_at(into, offset)?;
        let mut state = self.state.borrow_mut();
        if let Some(tensor) = self.part.tensors.get(state.tensor)
            && (tensor.file, tensor.offset + state.bytes) == (file, offset)
            && state.bytes + into.len() as u64 <= tensor.bytes
        {
            state.hasher.update(into);
            state.bytes += into.len() as u64;
            if state.bytes == tensor.bytes {
                (state.tensor, state.bytes) = (state.tensor + 1, 0);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
