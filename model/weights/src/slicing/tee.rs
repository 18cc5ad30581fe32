//! The exact blob of a part, hashed while the part is read for something else.
//!
//! Owns [`TeeHasher`], a source of bytes that hands on what another source gives and hashes it on the way. The invariant:
//! the digest sees exactly the part's exact blob (its header, then its tensors in order), each byte once, in whichever
//! order the reader asks: what comes in another order is read again at the end. Which hash it is, the caller says.

use std::{cell::RefCell, convert::Infallible, io};

use super::{
    part_slices::check_finite,
    source::{ReadAt, SourceError},
};
use crate::{parts::Part, slices::SliceError};

/// Bytes read at once of a part that is only hashed.
const READ_BYTES: usize = 1 << 20;

/// A hash of bytes that come one piece after the other.
pub trait Digest {
    /// What identifies the bytes.
    type Output;

    fn update(&mut self, bytes: &[u8]);

    fn finish(self) -> Self::Output;
}

/// No hash at all: for sinks that need none.
impl Digest for Infallible {
    type Output = Infallible;

    fn update(&mut self, _: &[u8]) {
        match *self {}
    }

    fn finish(self) -> Infallible {
        self
    }
}

/// Hashes the exact blob of a part while its tensors are read from `source`.
pub(super) struct TeeHasher<'a, S: ?Sized, D> {
    source: &'a S,
    part: &'a Part,
    progress: RefCell<Progress<D>>,
}

/// How much of the exact blob is hashed.
struct Progress<D> {
    digest: Option<D>,
    /// The next tensor, and how many of its bytes are hashed.
    tensor: usize,
    bytes: u64,
}

impl<'a, S: ReadAt + ?Sized, D: Digest> TeeHasher<'a, S, D> {
    /// Without a `digest` it hands on what is read and no more.
    pub(super) fn new(source: &'a S, part: &'a Part, mut digest: Option<D>) -> Self {
        if let Some(digest) = &mut digest {
            digest.update(&part.header());
        }
        Self { source, part, progress: RefCell::new(Progress { digest, tensor: 0, bytes: 0 }) }
    }

    /// The digest of the whole exact blob. Reads what was not read in order; with `check`, refuses weights there that are
    /// not finite.
    pub(super) fn finish(self, check: bool) -> Result<Option<D::Output>, SliceError> {
        let mut progress = self.progress.into_inner();
        let Some(digest) = &mut progress.digest else { return Ok(None) };
        let mut buffer = vec![0; READ_BYTES];
        for tensor in &self.part.tensors[progress.tensor..] {
            let mut done = std::mem::take(&mut progress.bytes);
            while done < tensor.bytes {
                let piece = &mut buffer[..(tensor.bytes - done).min(READ_BYTES as u64) as usize];
                let read = self.source.read_at(tensor.file, tensor.offset + done, piece);
                read.map_err(|source| SliceError::Read { tensor: tensor.name.clone(), source })?;
                if check {
                    check_finite(tensor, done, piece)?;
                }
                digest.update(piece);
                done += piece.len() as u64;
            }
        }
        Ok(progress.digest.map(D::finish))
    }
}

impl<S: ReadAt + ?Sized, D: Digest> ReadAt for TeeHasher<'_, S, D> {
    fn read_at(&self, file: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.source.read_at(file, offset, into)?;
        let Progress { digest, tensor: index, bytes } = &mut *self.progress.borrow_mut();
        if let Some(digest) = digest
            && let Some(tensor) = self.part.tensors.get(*index)
            && (tensor.file, tensor.offset + *bytes) == (file, offset)
            && *bytes + into.len() as u64 <= tensor.bytes
        {
            digest.update(into);
            *bytes += into.len() as u64;
            if *bytes == tensor.bytes {
                (*index, *bytes) = (*index + 1, 0);
            }
        }
        Ok(())
    }

    fn check_unchanged(&self, file: usize) -> Result<(), SourceError> {
        self.source.check_unchanged(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        matrix::DType,
        memory::WeightBytes,
        parts::{PartKind, TensorRange},
    };

    impl Digest for Vec<u8> {
        type Output = Vec<u8>;

        fn update(&mut self, bytes: &[u8]) {
            self.extend_from_slice(bytes);
        }

        fn finish(self) -> Vec<u8> {
            self
        }
    }

    /// Two tensors of four and of two weights in one file, the second one first.
    fn part() -> (Part, [WeightBytes; 1]) {
        let tensor = |name: &str, offset, bytes| TensorRange {
            name: name.into(),
            dtype: DType::BF16,
            shape: vec![bytes as usize / 2],
            file: 0,
            offset,
            bytes,
        };
        let tensors = vec![tensor("a", 4, 8), tensor("b", 0, 4)];
        let part = Part { kind: PartKind::Trunk { name: "head".into() }, tensors };
        (part, [(1..13).collect::<Vec<u8>>().into()])
    }

    #[test]
    fn every_byte_is_hashed_once_in_whichever_order_it_is_read() {
        let (part, files) = part();
        let expected = [&part.header()[..], &[5, 6, 7, 8, 9, 10, 11, 12, 1, 2, 3, 4]].concat();
        let orders: [&[(u64, usize)]; 5] = [
            &[],
            &[(4, 8), (0, 4)],
            &[(0, 4), (4, 2), (6, 6)],
            &[(4, 4), (4, 4), (6, 6)], // part of it twice, and across the next read's start
            &[(4, 12 - 4), (2, 2)],
        ];
        for order in orders {
            let tee = TeeHasher::new(&files[..], &part, Some(Vec::new()));
            for &(offset, bytes) in order {
                let mut read = vec![0; bytes];
                tee.read_at(0, offset, &mut read).unwrap();
                assert_eq!(read[0], offset as u8 + 1);
            }
            assert_eq!(tee.finish(true).unwrap().unwrap(), expected, "{order:?}");
        }
    }

    #[test]
    fn the_rest_is_checked_when_asked() {
        let (part, _) = part();
        let mut bytes = vec![0; 12];
        bytes[2..4].copy_from_slice(&[0x80, 0x7f]);
        let files = [WeightBytes::from(bytes)];
        let tee = |check| TeeHasher::new(&files[..], &part, Some(Vec::new())).finish(check);
        let error = tee(true).unwrap_err();
        assert!(matches!(&error, SliceError::NotFinite { tensor, row: 0, column: 1 } if tensor == "b"), "{error}");
        assert!(tee(false).is_ok());
    }
}
