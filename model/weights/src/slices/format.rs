//! The names and rules of slice files.
//!
//! Owns the format's version and metadata keys, [`Slice`], the rule for which tensors are sliced ([`is_sliced`]),
//! [`PartBlobs`] (the blobs of one part as a store hands them back) and [`SliceError`]. It reads and writes nothing.

use std::io;

use super::{
    cell::{BASE_CELL, BLOCK_ROWS, GROUP, REFINE_CELL},
    encode::{EncodeError, EncodeErrorKind},
};
use crate::memory::WeightBytes;

/// Version of the format, as in the metadata of blobs. It fixes which bytes a checkpoint becomes.
pub const FORMAT: &str = "3";
/// Metadata key of the version.
pub(crate) const FORMAT_KEY: &str = "coel.format";
/// Metadata key of the slice.
pub(crate) const SLICE_KEY: &str = "coel.slice";

/// One of the two slices of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slice {
    Base,
    Refine,
}

impl Slice {
    pub const ALL: [Slice; 2] = [Slice::Base, Slice::Refine];

    /// The spelling in metadata and file names.
    pub const fn name(self) -> &'static str {
        match self {
            Slice::Base => "base",
            Slice::Refine => "refine",
        }
    }

    /// Bytes of a cell.
    pub const fn cell(self) -> usize {
        match self {
            Slice::Base => BASE_CELL,
            Slice::Refine => REFINE_CELL,
        }
    }

    /// Shape of the cells of a matrix `[rows, cols]`, whose `cols` must be a multiple of [`GROUP`].
    pub fn shape(self, rows: usize, cols: usize) -> [usize; 3] {
        [rows.div_ceil(BLOCK_ROWS), cols / GROUP, self.cell()]
    }
}

/// Why a part has no slices. Every message names the tensor.
#[derive(Debug, thiserror::Error)]
pub enum SliceError {
    #[error(
        "tensor {tensor}, row {row}, column {column}: not a finite number; the checkpoint is damaged, fetch it again"
    )]
    NotFinite { tensor: String, row: usize, column: usize },
    #[error(
        "tensor {tensor}, row {row}, columns {column} to {last}: weights from {min:e} to {max:e} are beyond what a \
         slice's scale can express; hold it exactly: a mesh does so by itself (coel model import), and \
         `--precision exact` says so elsewhere"
    )]
    Range { tensor: String, row: usize, column: usize, last: usize, min: f32, max: f32 },
    #[error(
        "tensor {tensor} has {cols} columns, and slices need a multiple of 32; hold it exactly: a mesh does so by itself (coel \
         model import), and `--precision exact` says so elsewhere"
    )]
    Columns { tensor: String, cols: usize },
    #[error("tensor {tensor} cannot be read: {source}")]
    Read { tensor: String, source: io::Error },
    #[error("the {slice} slice cannot be written: {source}", slice = slice.name())]
    Write { slice: Slice, source: io::Error },
}

impl SliceError {
    /// An encoder's error in `tensor`, in the block that begins at row `first`.
    pub(crate) fn at(tensor: &str, first: usize, error: EncodeError) -> Self {
        let (tensor, row, column) = (tensor.to_owned(), first + error.row, error.column);
        match error.kind {
            EncodeErrorKind::NotFinite => Self::NotFinite { tensor, row, column },
            EncodeErrorKind::Range { min, max } => {
                Self::Range { tensor, row, column, last: column + GROUP - 1, min, max }
            }
        }
    }
}

/// Whether a tensor is sliced: every matrix except the gates that choose or weigh experts, which are small and decide
/// routes.
pub fn is_sliced(name: &str, shape: &[usize]) -> bool {
    shape.len() == 2 && !name.ends_with("gate.weight")
}

/// The blobs of a part that a store has: the exact blob, the base blob, or base and refine.
#[derive(Clone, Debug)]
pub struct PartBlobs {
    /// The exact or the base blob; its metadata says which.
    pub main: WeightBytes,
    /// The refine blob that belongs to a base blob.
    pub refine: Option<WeightBytes>,
}

impl From<WeightBytes> for PartBlobs {
    fn from(main: WeightBytes) -> Self {
        Self { main, refine: None }
    }
}
