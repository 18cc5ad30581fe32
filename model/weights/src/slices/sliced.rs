//! Matrices of weights in memory, as slices or exactly.
//!
//! Owns [`Sliced`] (a matrix held as its base slice, with or without its refine slice) and [`Weight`] (a matrix in
//! whichever form it is held). The invariant: a [`Sliced`] has exactly the bytes its shape calls for. It encodes
//! nothing and knows no files.

use super::{
    Precision,
    cell::{BASE_CELL, BLOCK_ROWS, GROUP, NIBBLES, REFINE_CELL, cells},
    constants::Constants,
};
use crate::{matrix::Matrix, memory::WeightBytes};

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

    #[inline]
    pub fn rows(&self) -> usize {
        self.rows
    }

    #[inline]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Groups of a row.
    #[inline]
    pub fn groups(&self) -> usize {
        self.cols / GROUP
    }

    /// Blocks of [`BLOCK_ROWS`] rows, the last one perhaps padded.
    #[inline]
    pub fn blocks(&self) -> usize {
        self.rows.div_ceil(BLOCK_ROWS)
    }

    /// The base slice: `blocks * groups` cells of [`BASE_CELL`] bytes.
    #[inline]
    pub fn base(&self) -> &[u8] {
        self.base.as_slice()
    }

    /// The refine slice, if held: `blocks * groups` cells of [`REFINE_CELL`] bytes.
    #[inline]
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
    #[inline]
    pub fn rows(&self) -> usize {
        match self {
            Weight::Exact(matrix) => matrix.rows(),
            Weight::Sliced(sliced) => sliced.rows(),
        }
    }

    #[inline]
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

    /// Bytes of the matrix, mapped or owned.
    pub fn bytes(&self) -> usize {
        match self {
            Weight::Exact(matrix) => matrix.bytes().len(),
            Weight::Sliced(sliced) => sliced.base().len() + sliced.refine().map_or(0, <[u8]>::len),
        }
    }

    /// The memory of the matrix.
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

    /// Tells the system that this process will not read the matrix again soon: see [`WeightBytes::release`].
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
