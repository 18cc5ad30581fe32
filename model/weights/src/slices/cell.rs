//! The sizes of a cell, the unit that slices are made of.
//!
//! Owns the constants of the layout that the parent module describes. It holds no bytes.

/// Consecutive weights of a row that share a scale and a zero point.
pub const GROUP: usize = 32;
/// Rows of a cell.
pub const BLOCK_ROWS: usize = 16;
/// Bytes of nibbles in a cell of either slice.
pub const NIBBLES: usize = BLOCK_ROWS * GROUP / 2;
/// Bytes of a cell of the base slice: nibbles, then the constants of 16 rows, little-endian.
pub const BASE_CELL: usize = NIBBLES + 2 * BLOCK_ROWS;
/// Bytes of a cell of the refine slice: nibbles.
pub const REFINE_CELL: usize = NIBBLES;

/// Number of cells of a `[rows, cols]` matrix; `None` if `cols` is not a multiple of [`GROUP`] or the product overflows.
pub fn cells(rows: usize, cols: usize) -> Option<usize> {
    cols.is_multiple_of(GROUP).then(|| rows.div_ceil(BLOCK_ROWS).checked_mul(cols / GROUP))?
}
