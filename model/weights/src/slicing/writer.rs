//! The slices of a model, written part by part, resumably.
//!
//! Owns [`slice_parts`], the loop that every writer of slices shares: in which order parts are made, which are skipped,
//! what counts as progress, and when the source is checked. Where slices go and how finished parts are found again is
//! the business of a [`SliceSink`]: a folder, or a node's blob store. The invariant: a part reaches its sink's
//! [`finish`](SliceSink::finish) only after all of it was read from files that did not change meanwhile; and memory grows
//! neither with the parts nor with their number.

use std::io::Write;

use super::{
    part_slices::write_part,
    source::{ReadAt, SourceError},
    tee::{Digest, TeeHasher},
};
use crate::{
    parts::{Part, PartKind},
    slices::SliceError,
};

/// What a sink has of a part before it is sliced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// All of it: there is nothing to do.
    Whole,
    /// Slices, perhaps of other weights: [`SliceSink::belongs`] decides once the part's exact weights are hashed.
    Slices,
    Nothing,
}

/// What was made of a part.
#[derive(Debug)]
pub enum Made<W> {
    /// Its base and its refine slice, written to the end.
    Slices([W; 2]),
    /// Nothing: its slices were kept before, and belong to it.
    Kept,
    /// No slices: the part is held exactly only.
    ExactOnly,
}

/// Why a part was not made.
#[derive(Debug)]
pub enum PartError<E> {
    /// Its weights have no slices, or a slice could not be read or written.
    Slice { part: PartKind, source: SliceError },
    /// The checkpoint is not what it was.
    Source(SourceError),
    /// The sink's own.
    Sink(E),
}

impl<E> From<SourceError> for PartError<E> {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

/// What identifies the exact blob of a part to a sink.
pub type DigestOf<K> = <<K as SliceSink>::Digest as Digest>::Output;

/// A destination of slices. Parts are named by their index.
pub trait SliceSink {
    /// Takes one slice; dropped before [`finish`](Self::finish) it leaves nothing behind.
    type Writer: Write;
    /// Hashes a part's exact blob as it is read.
    type Digest: Digest;
    type Error;

    /// A hash for the next part's exact blob; `None` if nobody needs it.
    fn digest(&self) -> Option<Self::Digest>;

    /// The part to make before all others.
    fn first(&self) -> Option<usize> {
        None
    }

    /// What is kept of a part. Asked once for each part, right before it would be made.
    fn kept(&mut self, index: usize) -> Result<Kept, Self::Error>;

    /// Whether the slices that are kept belong to the part whose exact blob has this digest.
    fn belongs(&mut self, _index: usize, _exact: &DigestOf<Self>) -> bool {
        false
    }

    /// Opens a part's base and refine slice; `None` if the part is to be held exactly only.
    fn begin(&mut self, index: usize) -> Result<Option<[Self::Writer; 2]>, Self::Error>;

    /// Whether a part that has no slices, for this reason, is held exactly instead. Otherwise it is an error.
    fn holds_exactly(&mut self, _index: usize, _why: &SliceError) -> bool {
        false
    }

    /// Keeps a part. `exact` is there if [`digest`](Self::digest) was.
    fn finish(
        &mut self,
        index: usize,
        made: Made<Self::Writer>,
        exact: Option<DigestOf<Self>>,
    ) -> Result<(), Self::Error>;

    /// Keeps whatever `finish` has put off.
    fn flush(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Puts an error of a part, or of the sink itself, into the sink's words. What is open was dropped.
    fn fail(&mut self, error: PartError<Self::Error>) -> Self::Error;
}

/// Makes the slices of all `parts` whose bytes `source` has, except those that `sink` has already. `progress` gets bytes of
/// weights done, and of how many; its error stops the loop between two parts.
///
/// # Errors
/// The sink's. After one, the same call goes on where it stopped, as far as the sink has kept parts.
pub fn slice_parts<S: ReadAt + ?Sized, K: SliceSink>(
    parts: &[Part],
    source: &S,
    sink: &mut K,
    mut progress: impl FnMut(u64, u64) -> Result<(), K::Error>,
) -> Result<(), K::Error> {
    let (mut done, total) = (0, parts.iter().map(Part::data_bytes).sum());
    let first = sink.first();
    for index in first.into_iter().chain((0..parts.len()).filter(|index| Some(*index) != first)) {
        progress(done, total)?;
        let made = make(parts, index, source, sink);
        made.map_err(|error| sink.fail(error))?;
        done += parts[index].data_bytes();
    }
    sink.flush().map_err(|error| sink.fail(PartError::Sink(error)))?;
    progress(total, total)
}

fn make<S: ReadAt + ?Sized, K: SliceSink>(
    parts: &[Part],
    index: usize,
    source: &S,
    sink: &mut K,
) -> Result<(), PartError<K::Error>> {
    let part = &parts[index];
    let failed = |source| PartError::Slice { part: part.kind.clone(), source };
    let kept = sink.kept(index).map_err(PartError::Sink)?;
    if kept == Kept::Whole {
        return Ok(());
    }
    let tee = |sink: &K| TeeHasher::new(source, part, sink.digest());
    if kept == Kept::Slices {
        let exact = tee(sink).finish(true).map_err(failed)?;
        if exact.as_ref().is_some_and(|exact| sink.belongs(index, exact)) {
            check_unchanged(part, source)?;
            return sink.finish(index, Made::Kept, exact).map_err(PartError::Sink);
        }
    }
    let mut reader = tee(sink);
    let mut made = Made::ExactOnly;
    if let Some([mut base, mut refine]) = sink.begin(index).map_err(PartError::Sink)? {
        match write_part(part, &reader, &mut base, &mut refine) {
            Ok(()) => made = Made::Slices([base, refine]),
            // Slicing stopped somewhere: nobody has looked at the weights after that.
            Err(why) if sink.holds_exactly(index, &why) => reader = tee(sink),
            Err(error) => return Err(failed(error)),
        }
    }
    // Encoding looks at every weight; where nothing was encoded the hash must.
    let exact = reader.finish(matches!(made, Made::ExactOnly)).map_err(failed)?;
    check_unchanged(part, source)?;
    sink.finish(index, made, exact).map_err(PartError::Sink)
}

/// Checks the files that a part was read from.
fn check_unchanged(part: &Part, source: &(impl ReadAt + ?Sized)) -> Result<(), SourceError> {
    let mut checked = None;
    for tensor in part.tensors.iter().filter(|tensor| checked.replace(tensor.file) != Some(tensor.file)) {
        source.check_unchanged(tensor.file)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
