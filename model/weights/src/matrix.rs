//! A matrix in the checkpoint's own element type.
//!
//! Owns [`DType`] (the three element types a checkpoint may use) and [`Matrix`]. The invariant: a `Matrix` has exactly
//! `rows * cols` elements. What a weight is used for is not known here.

use std::{fmt, ops::Range};

use half::f16;
use serde::{Deserialize, Serialize};

use crate::memory::{FileRange, WeightBytes};

/// Element type of a stored weight. Stored little-endian, as safetensors does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum DType {
    BF16,
    F16,
    F32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::BF16 | DType::F16 => 2,
            DType::F32 => 4,
        }
    }

    /// The name safetensors headers use.
    pub const fn name(self) -> &'static str {
        match self {
            DType::BF16 => "BF16",
            DType::F16 => "F16",
            DType::F32 => "F32",
        }
    }

    /// Converts `bytes` (a whole number of elements) to f32, exactly. `out` holds one value per element.
    // Always inlined, so that a kernel compiled for a wider instruction set widens with it.
    #[inline(always)]
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        debug_assert_eq!(bytes.len(), out.len() * self.size());
        match self {
            DType::BF16 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f32::from_bits((u16::from_le_bytes(*raw) as u32) << 16);
                }
            }
            DType::F16 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f16::from_le_bytes(*raw).to_f32();
                }
            }
            DType::F32 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*raw);
                }
            }
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A packed matrix `[rows (out), cols (in)]`, row-major, in the checkpoint's own type.
#[derive(Clone, Debug)]
pub struct Matrix {
    bytes: WeightBytes,
    dtype: DType,
    rows: usize,
    cols: usize,
}

impl Matrix {
    /// `None` unless `bytes` holds exactly `rows * cols` elements.
    pub fn new(bytes: WeightBytes, dtype: DType, rows: usize, cols: usize) -> Option<Self> {
        let expected = rows.checked_mul(cols)?.checked_mul(dtype.size())?;
        (bytes.len() == expected).then_some(Self { bytes, dtype, rows, cols })
    }

    #[inline]
    pub fn rows(&self) -> usize {
        self.rows
    }

    #[inline]
    pub fn cols(&self) -> usize {
        self.cols
    }

    #[inline]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    #[inline]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// Its place in a mapped file.
    pub fn place(&self) -> Option<FileRange<'_>> {
        self.bytes.place()
    }

    /// The memory of the matrix.
    pub fn memory(&self) -> &WeightBytes {
        &self.bytes
    }

    /// The packed bytes of rows `range`.
    #[inline]
    pub fn rows_bytes(&self, range: Range<usize>) -> &[u8] {
        let row_bytes = self.cols * self.dtype.size();
        &self.bytes.as_slice()[range.start * row_bytes..range.end * row_bytes]
    }

    /// Writes row `row` as f32 into `out` (`cols` values).
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        self.dtype.widen(self.rows_bytes(row..row + 1), out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact() {
        let mut out = [0.0; 2];
        let raw: Vec<u8> = [1.5f32, -0.0].iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        DType::BF16.widen(&raw, &mut out);
        assert_eq!(out.map(f32::to_bits), [1.5f32, -0.0].map(f32::to_bits));
        let raw: Vec<u8> = [0.25f32, 65504.0].iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        DType::F16.widen(&raw, &mut out);
        assert_eq!(out, [0.25, 65504.0]);
    }

    #[test]
    fn a_matrix_has_all_its_elements() {
        assert!(Matrix::new(vec![0; 12].into(), DType::BF16, 2, 3).is_some());
        assert!(Matrix::new(vec![0; 11].into(), DType::BF16, 2, 3).is_none());
        assert!(Matrix::new(Vec::new().into(), DType::F32, usize::MAX, 2).is_none());
    }
}
