//! Precision slices: a matrix as nested 4-bit layers, in the order the kernels read.
//!
//! Weights are grouped by [`GROUP`] along the input dimension. Each group has a scale `s` and a zero point `z`
//! ([`constants`]), and each weight a byte `q`. Q8 reads `s*(q - z)`, Q4 reads `s*(16*(q >> 4) + 7.5 - z)`. The base slice
//! has the high nibbles with `s` and `z` (4.5 bits a weight), the refine slice the low nibbles (4 bits).
//!
//! A slice is a sequence of cells, one per block of [`BLOCK_ROWS`] rows and group, with groups running fastest. Within a
//! cell the byte at `64 j + 4 r + t` (`j < 4`, `r < 16`, `t < 4`) belongs to row `r` of the block: its low nibble to
//! column `8 j + t` of the group, its high nibble to column `8 j + 4 + t`. In a base cell the constants of the 16 rows
//! follow. Rows past the matrix's last are zero throughout. So sixteen rows advance together, four columns a lane, which
//! suits the widest integer dot products of CPUs.
//!
//! | room | what it owns |
//! |---|---|
//! | `precision` | [`Precision`] and its spelling |
//! | `cell` | the sizes of a cell |
//! | [`constants`] | scale and zero point of a group in sixteen bits |
//! | `sliced` | [`Sliced`] and [`Weight`], matrices in memory |
//! | [`encode`] | the encoders: weights to cells |
//! | `format` | how slices are named in files, and which tensors have any |
//!
//! Arrows point upwards in this table. Nothing here knows devices. `docs/slices.md` has the format to the bit.

pub(crate) use self::format::{FORMAT_KEY, SLICE_KEY};
pub use self::{
    cell::{BASE_CELL, BLOCK_ROWS, GROUP, NIBBLES, REFINE_CELL, cells},
    format::{FORMAT, PartBlobs, Slice, SliceError, is_sliced},
    precision::{BadPrecision, Precision},
    sliced::{Sliced, Weight},
};

mod cell;
pub mod constants;
pub mod encode;
mod format;
mod precision;
mod sliced;
