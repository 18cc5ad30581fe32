//! Precision slices: a matrix as nested 4-bit layers, in the order the kernels read.
//!
//! Owns the cell layout, [`Sliced`] (a matrix held as its base slice, with or without its refine slice) and [`Weight`]
//! (a matrix in whichever form it is held). Weights are grouped by [`GROUP`] along the input dimension; each group has
//! a scale `s` and a zero point `z` ([`constants`]), and each weight a byte `q`. Q8 reads `s*(q - z)`, Q4 reads
//! `s*(16*(q >> 4) + 7.5 - z)`. The base slice has the high nibbles with `s` and `z` (4.5 bits a weight), the refine slice
//! the low nibbles (4 bits).
//!
//! A slice is a sequence of cells, one per block of [`BLOCK_ROWS`] rows and group, groups running fastest. Within a cell
//! the byte at `64 j + 4 r + t` (`j < 4`, `r < 16`, `t < 4`) belongs to row `r` of the block: its low nibble to column
//! `8 j + t` of the group, its high nibble to column `8 j + 4 + t`. A base cell goes on with the constants of the 16
//! rows. Rows past the matrix's last are zero throughout. So sixteen rows advance together, four columns a lane, which is
//! what the widest integer dot products of CPUs take.
//!
//! The invariant: a [`Sliced`] has exactly the bytes its shape calls for. [`encode`] makes slices of weights, `format`
//! names them in files. Nothing here knows devices. `docs/slices.md` has the format to the bit.

use self::constants::Constants;
pub use self::format::{FORMAT, FORMAT_KEY, PartBlobs, SLICE_KEY, Slice, SliceError, is_sliced};
use crate::{matrix::Matrix, memory::WeightBytes};

pub mod constants;
pub mod encode;
mod format;

/// Weights that share a scale and a zero point, along the input dimension.
pub const GROUP: usize = 32;
/// Rows of a cell.
pub const BLOCK_ROWS: usize = 16;
/// Bytes of the nibbles of a cell, in either slice.
pub const NIBBLES: usize = BLOCK_ROWS * GROUP / 2;
/// Bytes of a cell of the base slice: nibbles, then the constants of 16 rows, little-endian.
pub const BASE_CELL: usize = NIBBLES + 2 * BLOCK_ROWS;
/// Bytes of a cell of the refine slice: nibbles.
pub const REFINE_CELL: usize = NIBBLES;

/// How exactly a weight is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Precision {
    /// The base slice: 4.5 bits a weight.
    Q4,
    /// Base and refine: 8.5 bits a weight.
    Q8,
    /// As in the checkpoint.
    Exact,
}

impl Precision {
    pub const ALL: [Precision; 3] = [Precision::Q4, Precision::Q8, Precision::Exact];

    /// As commands and reports spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Precision::Q4 => "q4",
            Precision::Q8 => "q8",
            Precision::Exact => "exact",
        }
    }
}

/// A word that names no precision.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no precision; write q4, q8 or exact")]
pub struct BadPrecision(String);

impl std::str::FromStr for Precision {
    type Err = BadPrecision;

    fn from_str(text: &str) -> Result<Self, BadPrecision> {
        let found = Self::ALL.into_iter().find(|precision| precision.name() == text);
        found.ok_or_else(|| BadPrecision(text.to_owned()))
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Cells of a `[rows, cols]` matrix; `None` if `cols` is no multiple of [`GROUP`] or the product overflows.
pub fn cells(rows: usize, cols: usize) -> Option<usize> {
    cols.is_multiple_of(GROUP).then(|| rows.div_ceil(BLOCK_ROWS).checked_mul(cols / GROUP))?
}

/// A matrix `[rows (out), cols (in)]` held as slices.
#[derive(Clone, Debug)]
pub struct Sliced {
    rows: usize,
    cols: usize,
    base: WeightBytes,
    refine: Option<WeightBytes>,
}

impl Sliced {
    /// `None` unless the slices have the lengths the shape calls for.
    pub fn new(rows: usize, cols: usize, base: WeightBytes, refine: Option<WeightBytes>) -> Option<Self> {
        let cells = cells(rows, cols)?;
        let fits = Some(base.len()) == cells.checked_mul(BASE_CELL)
            && refine.as_ref().is_none_or(|refine| refine.len() == cells * REFINE_CELL);
        fits.then_some(Self { rows, cols, base, refine })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.cols / GROUP
    }

    /// Blocks of [`BLOCK_ROWS`] rows, the last one perhaps padded.
    pub fn blocks(&self) -> usize {
        self.rows.div_ceil(BLOCK_ROWS)
    }

    /// The base slice: `blocks * groups` cells of [`BASE_CELL`] bytes.
    pub fn base(&self) -> &[u8] {
        self.base.as_slice()
    }

    /// The refine slice, if held: `blocks * groups` cells of [`REFINE_CELL`] bytes.
    pub fn refine(&self) -> Option<&[u8]> {
        self.refine.as_ref().map(WeightBytes::as_slice)
    }

    /// The base and the refine slice.
    pub fn into_slices(self) -> (WeightBytes, Option<WeightBytes>) {
        (self.base, self.refine)
    }

    pub fn precision(&self) -> Precision {
        if self.refine.is_some() { Precision::Q8 } else { Precision::Q4 }
    }

    /// Writes row `row` as f32 into `out` (`cols` values), exactly.
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        let (block, lane) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
        for (group, out) in out.chunks_exact_mut(GROUP).enumerate() {
            let cell = block * self.groups() + group;
            let base = &self.base()[cell * BASE_CELL..][..BASE_CELL];
            let refine = self.refine().map(|refine| &refine[cell * REFINE_CELL..][..REFINE_CELL]);
            let constants = &base[NIBBLES + 2 * lane..][..2];
            let constants = Constants::from_le_bytes([constants[0], constants[1]]);
            let (s, z) = (constants.scale(), constants.zero());
            for (column, out) in out.iter_mut().enumerate() {
                let at = 64 * (column / 8) + 4 * lane + column % 4;
                let nibble = |bytes: &[u8]| if column % 8 < 4 { bytes[at] & 15 } else { bytes[at] >> 4 };
                let level = match refine {
                    Some(refine) => f32::from(16 * nibble(base) + nibble(refine)),
                    None => f32::from(16 * nibble(base)) + 7.5,
                };
                *out = s * (level - z);
            }
        }
    }
}

/// A matrix in whichever form it is held.
#[derive(Clone, Debug)]
pub enum Weight {
    Exact(Matrix),
    Sliced(Sliced),
}

impl Weight {
    pub fn rows(&self) -> usize {
        match self {
            Weight::Exact(matrix) => matrix.rows(),
            Weight::Sliced(sliced) => sliced.rows(),
        }
    }

    pub fn cols(&self) -> usize {
        match self {
            Weight::Exact(matrix) => matrix.cols(),
            Weight::Sliced(sliced) => sliced.cols(),
        }
    }

    pub fn precision(&self) -> Precision {
        match self {
            Weight::Exact(_) => Precision::Exact,
            Weight::Sliced(sliced) => sliced.precision(),
        }
    }

    /// Bytes it takes, wherever they lie.
    pub fn bytes(&self) -> usize {
        match self {
            Weight::Exact(matrix) => matrix.bytes().len(),
            Weight::Sliced(sliced) => sliced.base().len() + sliced.refine().map_or(0, <[u8]>::len),
        }
    }

    /// The memory it lies in.
    fn memory(&self) -> impl Iterator<Item = &WeightBytes> {
        let (first, second) = match self {
            Weight::Exact(matrix) => (matrix.memory(), None),
            Weight::Sliced(sliced) => (&sliced.base, sliced.refine.as_ref()),
        };
        std::iter::once(first).chain(second)
    }

    /// Whether all of it lies in mapped files.
    pub fn is_mapped(&self) -> bool {
        self.memory().all(WeightBytes::is_mapped)
    }

    /// Tells the system that this process will not soon read it again: see [`WeightBytes::release`].
    pub fn release(&self) {
        self.memory().for_each(WeightBytes::release);
    }

    /// Writes row `row` as f32 into `out` (`cols` values).
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        match self {
            Weight::Exact(matrix) => matrix.widen_row(row, out),
            Weight::Sliced(sliced) => sliced.widen_row(row, out),
        }
    }
}

impl From<Matrix> for Weight {
    fn from(matrix: Matrix) -> Self {
        Weight::Exact(matrix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_read_by_its_layout() {
        // One cell: row 3 has s = 2, z = 11; its columns 9 and 13 share a byte.
        let mut base = vec![0u8; BASE_CELL];
        base[NIBBLES + 6..][..2].copy_from_slice(&Constants::new(27 << 4, 12).0.to_le_bytes());
        base[64 + 12 + 1] = 0xA3;
        let mut refine = vec![0u8; REFINE_CELL];
        refine[64 + 12 + 1] = 0x5C;
        let mut row = [0.0; GROUP];
        Sliced::new(16, 32, base.clone().into(), None).unwrap().widen_row(3, &mut row);
        assert_eq!((row[9], row[13], row[0]), (2.0 * (55.5 - 11.0), 2.0 * (167.5 - 11.0), 2.0 * (7.5 - 11.0)));
        let sliced = Sliced::new(16, 32, base.into(), Some(refine.into())).unwrap();
        sliced.widen_row(3, &mut row);
        assert_eq!((row[9], row[13], row[0]), (2.0 * (60.0 - 11.0), 2.0 * (165.0 - 11.0), -22.0));
        sliced.widen_row(2, &mut row);
        assert_eq!(row, [0.0; GROUP]);
    }

    #[test]
    fn lengths_must_fit_the_shape() {
        let bytes = |n: usize| WeightBytes::from(vec![0u8; n]);
        assert!(Sliced::new(17, 32, bytes(2 * BASE_CELL), Some(bytes(2 * REFINE_CELL))).is_some());
        assert!(Sliced::new(17, 32, bytes(BASE_CELL), None).is_none());
        assert!(Sliced::new(16, 33, bytes(BASE_CELL), None).is_none());
        assert!(Sliced::new(16, 32, bytes(BASE_CELL), Some(bytes(1))).is_none());
    }
}
