//! Slices that are made here, of exact weights that this node holds, instead of fetched.
//!
//! Owns [`make`]. Slicing gives the same bytes everywhere, so a node that holds a part exactly can make its slices itself: they are
//! what the manifest says, or they are not kept. Exact weights need no verification beforehand; they are verified when slicing
//! fails, to find the cause. Memory does not grow with the part. When a slice is made, and when it is fetched, is not known here.

use std::cell::RefCell;
use std::convert::Infallible;
use std::io::{self, Write};

use coel_model::weights::error::LoadError;
use coel_model::weights::parts::{Part, PartKind};
use coel_model::weights::slices::SliceError;
use coel_model::weights::slicing::ReadAt;
use coel_model::weights::slicing::source::SourceError;
use coel_model::weights::slicing::writer::{Kept, Made, PartError, SliceSink, slice_parts};
use coel_store::{BlobEntry, BlobError, BlobReader, Blobs, Draft, Slice, Slices};

/// Why slices were not made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Slice(#[from] SliceError),
    #[error(transparent)]
    Source(#[from] SourceError),
}

/// Makes those `wanted` of a part's slices and keeps them. Blocks for as long as it takes to read the part and slice it.
///
/// # Errors
/// [`MakeError`]; then nothing was kept, or some of what was wanted.
pub fn make(blobs: &Blobs, part: PartKind, slices: &Slices, wanted: &[Slice]) -> Result<(), MakeError> {
    let made = try_make(blobs, part, slices, wanted);
    if made.is_err() {
        blobs.verify(&slices.exact)?;
    }
    made
}

fn try_make(blobs: &Blobs, part: PartKind, slices: &Slices, wanted: &[Slice]) -> Result<(), MakeError> {
    let source = Exact(RefCell::new(blobs.reader(&slices.exact)?));
    let part = Part::of_blob(part, slices.exact.bytes, |offset, into| source.read_at(0, offset, into))?;
    slice_parts(&[part], &source, &mut ManifestSink { blobs, slices, wanted }, |_, _| Ok(()))
}

/// An exact blob as slicing reads it.
struct Exact(RefCell<BlobReader>);

impl ReadAt for Exact {
    fn read_at(&self, _: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.0.borrow_mut().read_at(offset, into).map_err(io::Error::other)
    }
}

/// A sink that keeps those `wanted` of one part's slices, if they are what the manifest says.
struct ManifestSink<'a> {
    blobs: &'a Blobs,
    slices: &'a Slices,
    wanted: &'a [Slice],
}

impl SliceSink for ManifestSink<'_> {
    type Writer = Out;
    type Digest = Infallible;
    type Error = MakeError;

    fn digest(&self) -> Option<Infallible> {
        None
    }

    fn kept(&mut self, _: usize) -> Result<Kept, MakeError> {
        Ok(Kept::Nothing)
    }

    fn begin(&mut self, _: usize) -> Result<Option<[Out; 2]>, MakeError> {
        let out = |slice, entry: &Option<BlobEntry>| match entry.clone().filter(|_| self.wanted.contains(&slice)) {
            Some(entry) => self.blobs.draft().map(|draft| Out(Some((draft, entry)))),
            None => Ok(Out(None)),
        };
        Ok(Some([out(Slice::Base, &self.slices.base)?, out(Slice::Refine, &self.slices.refine)?]))
    }

    fn finish(&mut self, _: usize, made: Made<Out>, _: Option<Infallible>) -> Result<(), MakeError> {
        let Made::Slices(written) = made else { return Ok(()) };
        for (draft, entry) in written.into_iter().filter_map(|out| out.0) {
            self.blobs.keep_as(draft, &entry)?;
        }
        Ok(())
    }

    fn fail(&mut self, error: PartError<MakeError>) -> MakeError {
        match error {
            PartError::Slice { source, .. } => source.into(),
            PartError::Source(error) => error.into(),
            PartError::Sink(error) => error,
        }
    }
}

/// A slice's draft, and the blob that it should become; nothing if the slice is not wanted.
struct Out(Option<(Draft, BlobEntry)>);

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.as_mut().map_or(Ok(bytes.len()), |(draft, _)| draft.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.as_mut().map_or(Ok(()), |(draft, _)| draft.flush())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use coel_model::weights::checkpoint::Checkpoint;
    use coel_model::weights::parts::parts;
    use coel_model::weights::slicing::part_slices::write_part;

    use super::*;

    /// The bundled model's last expert, its exact blob held in `blobs`, and what its slices are.
    fn expert(blobs: &Blobs) -> (PartKind, Slices) {
        let checkpoint = Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/fixture")).unwrap();
        let part = parts(&checkpoint).pop().unwrap();
        let file = std::fs::read(&checkpoint.weight_files()[part.tensors[0].file]).unwrap();
        let data = part.tensors.iter().flat_map(|t| &file[t.offset as usize..][..t.bytes as usize]);
        let exact: Vec<u8> = part.header().iter().chain(data).copied().collect();
        let (mut base, mut refine) = (Vec::new(), Vec::new());
        let files = [std::fs::File::open(&checkpoint.weight_files()[0]).unwrap()];
        write_part(&part, &files[..], &mut base, &mut refine).unwrap();
        let slices = Slices {
            exact: blobs.put(&exact).unwrap(),
            base: Some(BlobEntry::of(&base)),
            refine: Some(BlobEntry::of(&refine)),
        };
        (part.kind, slices)
    }

    #[test]
    fn what_is_made_is_what_the_manifest_says() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(dir.path()).unwrap();
        let (kind, slices) = expert(&blobs);
        let (base, refine) = (slices.base.clone().unwrap(), slices.refine.clone().unwrap());
        make(&blobs, kind.clone(), &slices, &[Slice::Refine]).unwrap();
        assert_eq!((blobs.has(&base.id), blobs.verify(&refine).is_ok()), (false, true));
        make(&blobs, kind.clone(), &slices, &[Slice::Base, Slice::Refine]).unwrap();
        blobs.verify(&base).unwrap();
        assert_eq!(blobs.usage().used_bytes, slices.blobs().map(|blob| blob.bytes).sum::<u64>());

        // Slices of another version are not these.
        let other = Slices { base: Some(BlobEntry::of(b"another format's")), ..slices };
        let refused = make(&blobs, kind, &other, &[Slice::Base]).unwrap_err();
        assert!(matches!(refused, MakeError::Blob(BlobError::MadeOther { .. })), "{refused}");
    }

    #[test]
    fn damaged_exact_weights_give_no_slices_and_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(dir.path()).unwrap();
        let (kind, slices) = expert(&blobs);
        let exact = slices.exact.id.to_string();
        let path = dir.path().join("blobs").join(&exact[..2]).join(&exact);
        let whole = std::fs::read(&path).unwrap();
        // In the header, and in the exponent of a weight.
        for at in [20, (whole.len() / 2) | 1] {
            let mut spoilt = whole.clone();
            spoilt[at] ^= 0x40;
            std::fs::write(&path, spoilt).unwrap();
            let refused = make(&blobs, kind.clone(), &slices, &[Slice::Base, Slice::Refine]).unwrap_err();
            assert!(
                matches!(refused, MakeError::Blob(BlobError::Corrupt { id, .. }) if id == slices.exact.id),
                "{refused}"
            );
        }
        assert_eq!(blobs.usage().used_bytes, slices.exact.bytes, "nothing is left of it");
        blobs.remove(&slices.exact.id).unwrap();
        let missing = make(&blobs, kind, &slices, &[Slice::Base]).unwrap_err();
        assert!(matches!(missing, MakeError::Blob(BlobError::Missing { .. })), "{missing}");
    }
}
