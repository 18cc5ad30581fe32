//! Sliced matrices times int8 rows.
//!
//! Owns the arithmetic of Q4 and Q8, in one place for all instruction sets. An output is one f32 accumulator that
//! starts at zero and runs over the groups of a row, ascending. With `s` and `z` the group's constants, `d` and
//! `d * sum` the activations' (see `activations`), and `D` the exact integer dot product of levels and values, a group
//! does
//!
//! ```text
//! acc = fma(D, s * d, acc)
//! acc = fma(o, d * sum, acc)
//! ```
//!
//! where the levels are `q` and `o = -s z` at Q8, `16 * (q >> 4)` and `o = s (7.5 - z)` at Q4, both exact. `D` stays below
//! 2^24, so its conversion to f32 is exact. Nothing else is rounded, and no result depends on tiles or batches: the invariant
//! that [`portable`] states and the other sets are tested against.
//!
//! The unit of work is a block of [`BLOCK_ROWS`] output rows over some rows of a batch. Rows are taken in tiles, a
//! tile's accumulators staying in registers over all groups, so that the cells of a block come from memory once, and
//! from the first-level cache for the tiles after the first.

use super::{
    activations::View,
    isa::{Isa, Level},
};
use coel_weights::slices::{BASE_CELL, BLOCK_ROWS, REFINE_CELL, Sliced};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

/// Cells between the one in use and the one asked for from memory, by tiles that compute so long on a cell that the
/// hardware's own prefetching falls behind.
#[cfg(target_arch = "x86_64")]
const CELLS_AHEAD: usize = 6;

/// The outputs of a block for one row of a batch.
pub type Sums = [f32; BLOCK_ROWS];

/// The cells of one block of rows.
#[derive(Clone, Copy, Debug)]
struct Cells<'a> {
    base: &'a [u8],
    refine: Option<&'a [u8]>,
    groups: usize,
}

impl<'a> Cells<'a> {
    fn of(matrix: &'a Sliced, block: usize) -> Self {
        let groups = matrix.groups();
        let range = |cell: usize| block * groups * cell..(block + 1) * groups * cell;
        let refine = matrix.refine().map(|refine| &refine[range(REFINE_CELL)]);
        Self { base: &matrix.base()[range(BASE_CELL)], refine, groups }
    }
}

/// Output rows `16 * block..` of `matrix` for `rows` of `x`, into `sums`. Outputs past the matrix's last row are zero
/// (or NaN, where `x` is).
pub fn block(isa: Isa, matrix: &Sliced, block: usize, x: View<'_>, rows: &[u32], sums: &mut [Sums]) {
    let cells = Cells::of(matrix, block);
    assert!(x.groups() == cells.groups && sums.len() == rows.len());
    assert!(rows.iter().all(|row| (*row as usize) < x.rows()));
    match isa.level() {
        Level::Portable => portable::block(cells, x, rows, sums),
        // SAFETY: an `Isa` exists only for a set this machine has; shapes and rows agree by the assertions.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::block(cells, x, rows, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::block(cells, x, rows, sums) },
    }
}

/// How many of `left` rows the next tile takes: tiles are of nearly equal size and none is above `most`.
#[inline(always)]
pub(super) fn tile_rows(left: usize, most: usize) -> usize {
    left.div_ceil(left.div_ceil(most))
}

/// Asks for the cell of `CELL` bytes that is used [`CELLS_AHEAD`] after `cell`; it may be past the end of everything.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fetch_ahead<const CELL: usize>(cell: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for line in 0..CELL / 64 {
        // SAFETY: a prefetch is a hint, which reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(cell.wrapping_add(CELLS_AHEAD * CELL + 64 * line).cast()) };
    }
}
