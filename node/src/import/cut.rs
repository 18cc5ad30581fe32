//! Cuts a checkpoint into blobs: the exact ones in place, the slices as files of their own.
//!
//! Owns [`Cut`], and the sink of slices that is a node's blob store. The loop that reads, hashes and slices parts is
//! [`slice_parts`]. Parts are kept in batches, each with a note, so an interrupted import finds them again and goes on. The
//! invariant: what is noted was on the disk before the note, and notes hold only for the very files they were made from (paths,
//! lengths, times).

use std::io;
use std::path::{Path, PathBuf};

use coel_model::weights::checkpoint::Checkpoint;
use coel_model::weights::parts::{Part, PartKind, parts};
use coel_model::weights::slices::SliceError;
use coel_model::weights::slicing::part_slices::{PartBytes, part_bytes};
use coel_model::weights::slicing::source::{SourceError, SourceFiles};
use coel_model::weights::slicing::writer::{Kept, Made, PartError, SliceSink, slice_parts};
use coel_model::weights::slicing::{Digest, ReadAt};
use coel_store::{
    BlobEntry, BlobError, BlobHasher, Blobs, CHUNK_BYTES, Draft, Manifest, NewPart, NewSlices, PartKey, Segment, Slices,
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
/// Room beyond the slices that the disk must have: for the index of the blobs.
const INDEX_BYTES: u64 = 4 << 20;

/// Why a checkpoint was not cut, or not to the end.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// The weights cannot be what they should be.
    #[error("{part}: {source}")]
    Slice { part: PartKind, source: SliceError },
    /// A weight file, or the folder of the blobs, cannot be read; or a weight file changed.
    #[error(transparent)]
    Source(#[from] SourceError),
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
    /// Its base and its refine slice are here, made of the exact blob `of`. Whether that is this part, its weights will tell.
    Slices {
        of: BlobEntry,
        slices: [BlobEntry; 2],
    },
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
    source: SourceFiles,
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
    /// [`CutError::Source`].
    pub fn new(checkpoint: &'a Checkpoint, blobs: &'a Blobs, folder: &'a Path) -> Result<Self, CutError> {
        let source = SourceFiles::open(checkpoint.weight_files())?;
        let parts = parts(checkpoint);
        let keys = source.part_keys(&parts);
        let sizes = parts.iter().map(|part| part_bytes(part).ok()).collect();
        Ok(Self { checkpoint, source, keys, sizes, parts, blobs, folder })
    }

    /// The parts.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Whether this can be the model of `manifest`: it has the same parts, as long, and those of the trunk begin alike. Looks at a
    /// megabyte of each; two models that differ in experts only look the same from here.
    ///
    /// # Errors
    /// [`CutError::Source`].
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
                let read = self.source.read_at(tensor.file, tensor.offset, &mut first[start..]);
                let path = || self.checkpoint.weight_files()[tensor.file].clone();
                read.map_err(|source| SourceError::Io { path: path(), source })?;
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
        let held = |part: &Part| self.held(slices_in(could_be?, &part.kind)?);
        let known: Vec<_> = noted
            .into_iter()
            .zip(&self.parts)
            .map(|(noted, part)| match noted {
                Some(slices) => Known::Whole(slices),
                None => held(part).unwrap_or(Known::Nothing),
            })
            .collect();
        self.check_room(&known, 0)?;
        let mut sink = BlobSink { cut: self, known, kept: vec![None; self.parts.len()], batch: Batch::default() };
        slice_parts(&self.parts, &self.source, &mut sink, |done, total| {
            progress("cutting weights, bytes", done, total);
            if stopped() && done < total { Err(CutError::Stopped) } else { Ok(()) }
        })?;
        Ok(sink.kept.into_iter().map(|slices| slices.expect("every part was noted or kept")).collect())
    }

    /// The slices of a part, if both lie here whole, as far as a look at the files tells.
    fn held(&self, slices: &Slices) -> Option<Known> {
        let held = |slice: &Option<BlobEntry>| slice.clone().filter(|entry| self.blobs.lies_in(entry).is_ok());
        Some(Known::Slices { of: slices.exact.clone(), slices: [held(&slices.base)?, held(&slices.refine)?] })
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
        let needed_bytes = if needed == 0 { 0 } else { needed + INDEX_BYTES + Blobs::RESERVE_BYTES };
        let free_bytes =
            free_disk_bytes(self.folder).map_err(|source| SourceError::Io { path: self.folder.to_owned(), source })?;
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

/// The blob store, as a sink of slices.
struct BlobSink<'c, 'a> {
    cut: &'c Cut<'a>,
    known: Vec<Known>,
    /// The slices of each part that is kept.
    kept: Vec<Option<Slices>>,
    batch: Batch,
}

/// The entry of an exact blob.
#[derive(Default)]
struct ExactHash(BlobHasher);

impl Digest for ExactHash {
    type Output = BlobEntry;

    fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(self) -> BlobEntry {
        self.0.finish()
    }
}

impl SliceSink for BlobSink<'_, '_> {
    type Writer = Draft;
    type Digest = ExactHash;
    type Error = CutError;

    fn digest(&self) -> Option<ExactHash> {
        Some(ExactHash::default())
    }

    fn kept(&mut self, index: usize) -> Result<Kept, CutError> {
        Ok(match &self.known[index] {
            Known::Whole(slices) => {
                self.kept[index] = Some(slices.clone());
                Kept::Whole
            }
            Known::Slices { .. } => Kept::Slices,
            Known::Nothing => Kept::Nothing,
        })
    }

    fn belongs(&mut self, index: usize, exact: &BlobEntry) -> bool {
        matches!(&self.known[index], Known::Slices { of, .. } if of == exact)
    }

    fn begin(&mut self, index: usize) -> Result<Option<[Draft; 2]>, CutError> {
        match self.cut.sizes[index] {
            Some(_) => Ok(Some([self.cut.blobs.draft()?, self.cut.blobs.draft()?])),
            None => Ok(None),
        }
    }

    /// Weights beyond what slices express are rare and not damaged.
    fn holds_exactly(&mut self, index: usize, why: &SliceError) -> bool {
        let beyond = matches!(why, SliceError::Range { .. });
        if beyond {
            warn!(part = %self.cut.parts[index].kind, %why, "no slices of this part");
        }
        beyond
    }

    fn finish(&mut self, index: usize, made: Made<Draft>, exact: Option<BlobEntry>) -> Result<(), CutError> {
        let slices = match (made, &self.known[index]) {
            (Made::Slices(drafts), _) => {
                self.batch.bytes += self.cut.sizes[index].map_or(0, |sizes| sizes.base + sizes.refine);
                NewSlices::Made(drafts)
            }
            (Made::Kept, Known::Slices { slices, .. }) => NewSlices::Held(slices.clone()),
            (Made::Kept | Made::ExactOnly, _) => NewSlices::None,
        };
        let exact = exact.expect("the sink asks for a digest");
        self.batch.parts.push((index, self.cut.part(index, exact, slices)));
        if self.batch.is_full() { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), CutError> {
        self.batch.keep(self.cut.blobs, &mut self.kept)
    }

    fn fail(&mut self, error: PartError<CutError>) -> CutError {
        let error = match error {
            PartError::Slice { part, source } => CutError::Slice { part, source },
            PartError::Source(error) => error.into(),
            PartError::Sink(error) => error,
        };
        // Finished parts are kept if possible; the others make room for the next try.
        let _ = self.flush();
        self.batch = Batch::default();
        self.cut.explain(error, &self.known, &self.kept)
    }
}

#[cfg(test)]
mod tests;
