//! Weights into slices, sixteen rows at a time.
//!
//! Owns [`Encoder`]. There are two encoders that share no arithmetic: [`portable`] defines the format, and a fast one uses
//! AVX2. The invariant: both give the same bytes for every input, on every machine. So every node derives the same blobs
//! from a checkpoint, and one hash verifies them all.
//!
//! A group's constants are searched: the [`SCALES`] smallest scales that span the group, each with the zero points that
//! place it nearest to the middle of all levels, and [`ASIDE`] more to either side. Each candidate rounds the 32 weights
//! differently. The one with the smallest error at four and eight bits together wins, computed with the constants as
//! kernels read them. Then `q = clamp(round_ties_even((w + s z) / s), 0, 255)` in f32, product and sum never fused; a scale
//! of 0 gives `q = 0`. The search adds integers, whose sum does not depend on the order. A weight of -0.0 counts as 0.0, so
//! that minimum and maximum are unique. Names of tensors are not known here: an [`EncodeError`] says where in the block,
//! and the caller adds the name.

use std::{ops::Range, sync::OnceLock};

use super::{
    Precision,
    cell::{BASE_CELL, BLOCK_ROWS, GROUP, REFINE_CELL, cells},
    sliced::Sliced,
};
use crate::{
    isa::{Isa, Level},
    matrix::{DType, Matrix},
};

#[cfg(target_arch = "x86_64")]
mod avx2;
mod portable;

/// Steps between a group's least weight and its greatest.
const PLACES: f32 = 65535.0;
/// Scales that are tried: the smallest that spans the group, and the next ones.
const SCALES: i32 = 4;
/// Zero points that are tried on either side of the one that centres the group.
const ASIDE: i32 = 3;
/// Weight of the squared error at eight bits. The one at four bits is 256 times as large and has weight 1.
const EIGHT_WEIGHT: i32 = 96;
/// A group that spans less than this, zero included, counts as zeros: the smallest scale would give it at most four levels.
const LEAST_SPAN: f32 = 1.0 / (1 << 24) as f32;

/// Why a group of weights has no slices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum EncodeErrorKind {
    /// An infinity or a NaN.
    NotFinite,
    /// The group needs a larger scale than the format has.
    Range { min: f32, max: f32 },
}

/// A group of weights that has no slices, and its place in the matrix or block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EncodeError {
    pub row: usize,
    /// The weight's column, or the first of its group.
    pub column: usize,
    pub kind: EncodeErrorKind,
}

/// An encoder this machine can run, named after the instruction set it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoder(Isa);

/// Up to [`BLOCK_ROWS`] rows in the checkpoint's type.
#[derive(Clone, Copy)]
struct Block<'a> {
    dtype: DType,
    bytes: &'a [u8],
    cols: usize,
}

impl Block<'_> {
    fn rows(&self) -> usize {
        self.bytes.len() / (self.cols * self.dtype.size())
    }

    /// Widens one group of every row; `out` keeps its values for rows that do not exist.
    #[inline(always)]
    fn widen(&self, group: usize, out: &mut [[f32; GROUP]; BLOCK_ROWS]) {
        let size = self.dtype.size();
        for (row, out) in self.bytes.chunks_exact(self.cols * size).zip(out) {
            self.dtype.widen(&row[group * GROUP * size..][..GROUP * size], out);
        }
    }
}

impl Encoder {
    /// The fastest this machine can run.
    pub fn best() -> Self {
        static BEST: OnceLock<Encoder> = OnceLock::new();
        *BEST.get_or_init(|| *Self::available().last().expect("portable code is always available"))
    }

    /// Every encoder this machine can run, slowest first. No encoder uses AVX-512.
    pub fn available() -> Vec<Self> {
        let has_encoder = |isa: &Isa| match isa.level() {
            Level::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => false,
        };
        Isa::available().into_iter().filter(has_encoder).map(Self).collect()
    }

    pub fn name(self) -> &'static str {
        self.0.name()
    }

    /// Encodes one block. `bytes` holds 1 to [`BLOCK_ROWS`] whole rows of `cols` weights, `cols` being a multiple of
    /// [`GROUP`]; `base` and `refine` take one cell per group.
    ///
    /// # Errors
    /// [`EncodeError`], with rows counted from the block's first. The cells are then of no use.
    ///
    /// # Panics
    /// If the lengths do not match.
    pub fn block(
        self,
        dtype: DType,
        bytes: &[u8],
        cols: usize,
        base: &mut [u8],
        refine: &mut [u8],
    ) -> Result<(), EncodeError> {
        let groups = cols / GROUP;
        let row_bytes = cols * dtype.size();
        let fits = cols.is_multiple_of(GROUP)
            && !bytes.is_empty()
            && bytes.len().is_multiple_of(row_bytes)
            && bytes.len() / row_bytes <= BLOCK_ROWS
            && base.len() == groups * BASE_CELL
            && refine.len() == groups * REFINE_CELL;
        assert!(fits, "a block of at most {BLOCK_ROWS} rows and its cells");
        let block = Block { dtype, bytes, cols };
        let (base, refine) = (base.as_chunks_mut().0, refine.as_chunks_mut().0);
        match self.0.level() {
            Level::Portable => portable::encode(block, base, refine),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` exists only for a set this machine has, and both sets include AVX2, FMA and F16C.
            Level::Avx2 | Level::Avx512 => match unsafe { avx2::encode(block, base, refine) } {
                true => Ok(()),
                // The fast encoder only notices a fault; the portable one says what is wrong, and where.
                false => Err(portable::encode(block, base, refine).expect_err("both refuse the same weights")),
            },
        }
    }
}

/// Slices a whole matrix in memory, at [`Precision::Q4`] without the refine slice.
///
/// `None` if its columns are not a multiple of [`GROUP`].
pub fn slice_matrix(matrix: &Matrix, precision: Precision) -> Option<Result<Sliced, EncodeError>> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let cells = cells(rows, cols)?;
    let groups = cols / GROUP;
    let refined = precision != Precision::Q4;
    let mut base = vec![0; cells * BASE_CELL];
    let mut refine = vec![0; if refined { cells } else { groups } * REFINE_CELL];
    let mut refined_blocks = refine.chunks_exact_mut(groups * REFINE_CELL);
    let mut spare = refined_blocks.next();
    for (block, base) in base.chunks_exact_mut(groups * BASE_CELL).enumerate() {
        let first = block * BLOCK_ROWS;
        let range: Range<usize> = first..rows.min(first + BLOCK_ROWS);
        let into = spare.as_deref_mut().expect("one per block, or one for all");
        let bytes = matrix.rows_bytes(range);
        if let Err(error) = Encoder::best().block(matrix.dtype(), bytes, cols, base, into) {
            return Some(Err(EncodeError { row: first + error.row, ..error }));
        }
        if refined {
            spare = refined_blocks.next();
        }
    }
    let refine = refined.then(|| refine.into());
    Some(Ok(Sliced::new(rows, cols, base.into(), refine).expect("sized by its shape")))
}

/// Index of the first weight in `bytes` (a whole number of elements) that is not a finite number.
pub fn first_not_finite(dtype: DType, bytes: &[u8]) -> Option<usize> {
    fn find<const N: usize>(bytes: &[u8], finite: impl Fn([u8; N]) -> bool + Copy) -> Option<usize> {
        // Runs are tested without branches, at the speed of memory; only a run with a bad weight is searched.
        const RUN: usize = 4096;
        let elements = bytes.as_chunks::<N>().0;
        let bad = elements.chunks(RUN).position(|run| !run.iter().fold(true, |all, raw| all & finite(*raw)))?;
        let within = elements[bad * RUN..].iter().position(|raw| !finite(*raw))?;
        Some(bad * RUN + within)
    }
    match dtype {
        DType::BF16 => find(bytes, |raw| u16::from_le_bytes(raw) & 0x7f80 != 0x7f80),
        DType::F16 => find(bytes, |raw| u16::from_le_bytes(raw) & 0x7c00 != 0x7c00),
        DType::F32 => find(bytes, |raw| u32::from_le_bytes(raw) & 0x7f80_0000 != 0x7f80_0000),
    }
}
