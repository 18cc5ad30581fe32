//! Weights of any precision times a batch.
//!
//! Owns the one unit of work all matrices have in common, a block of sixteen output rows over some rows of a batch, and
//! [`linears`]: several matrices over the same rows as one region of the pool. A block is one worker's, whichever that
//! is, so results do not depend on threads.

use super::{
    activations::{Quantized, View},
    exact,
    isa::Isa,
    sliced::{self, Sums},
    threads::{Pool, Shares},
};
use coel_weights::slices::{BLOCK_ROWS, Weight};

/// Rows whose sums are held at a time: whole tiles of every instruction set.
pub(super) const ROWS_HELD: usize = 48;
/// The same for small batches, whose sums would take longer to clear than to compute.
pub(super) const ROWS_HELD_FEW: usize = 4;

/// Rows as matrices read them: f32 for exact ones, int8 for sliced ones.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batch<'a> {
    /// `[n, cols]`
    pub(super) x: &'a [f32],
    /// The same; empty if no sliced matrix reads it.
    pub(super) quantized: View<'a>,
}

/// Blocks of a matrix.
pub(super) fn blocks(weight: &Weight) -> usize {
    weight.rows().div_ceil(BLOCK_ROWS)
}

/// Whether `weight` reads int8 rows.
pub(super) fn is_sliced(weight: &Weight) -> bool {
    matches!(weight, Weight::Sliced(_))
}

/// Output rows `16 * block..` of `weight` for `rows` of the batch, into `sums`; past the matrix's last row they mean
/// nothing.
pub(super) fn block(isa: Isa, weight: &Weight, block: usize, batch: Batch<'_>, rows: &[u32], sums: &mut [Sums]) {
    match weight {
        Weight::Exact(matrix) => exact::block(isa, matrix, block, batch.x, rows, sums),
        Weight::Sliced(sliced) => sliced::block(isa, sliced, block, batch.quantized, rows, sums),
    }
}

/// A matrix and what is added to its outputs.
pub(super) type Linear<'a> = (&'a Weight, Option<&'a [f32]>);

/// For each matrix `x [n, cols] -> [n, rows]`. `quantized` is scratch.
pub(super) fn linears(
    pool: &mut Pool,
    isa: Isa,
    quantized: &mut Quantized,
    x: &[f32],
    matrices: &[Linear<'_>],
) -> Vec<Vec<f32>> {
    let cols = matrices.first().map_or(1, |(weight, _)| weight.cols());
    let n = x.len() / cols;
    assert!(x.len() == n * cols);
    for (weight, bias) in matrices {
        assert!(weight.cols() == cols && bias.is_none_or(|bias| bias.len() == weight.rows()));
    }
    match matrices.iter().any(|(weight, _)| is_sliced(weight)) {
        true => quantized.fill(pool, isa, x, cols),
        false => quantized.reset(0, 0),
    }
    let batch = Batch { x, quantized: quantized.view() };
    let rows: Vec<u32> = (0..n as u32).collect();
    let mut outputs: Vec<Vec<f32>> = matrices.iter().map(|(weight, _)| vec![0.0; n * weight.rows()]).collect();
    let shares: Vec<Shares<'_, f32>> = outputs.iter_mut().map(|output| Shares::of(output)).collect();
    pool.each(matrices.iter().map(|(weight, _)| blocks(weight)).sum(), 1, |_, piece| {
        let (mut index, mut block) = (0, piece);
        while block >= blocks(matrices[index].0) {
            block -= blocks(matrices[index].0);
            index += 1;
        }
        // SAFETY: no two pieces are the same block of the same matrix, so nobody else touches these columns.
        unsafe {
            match n {
                ..=ROWS_HELD_FEW => columns::<ROWS_HELD_FEW>(isa, matrices[index], block, batch, &rows, shares[index]),
                _ => columns::<ROWS_HELD>(isa, matrices[index], block, batch, &rows, shares[index]),
            }
        }
    });
    outputs
}

/// Computes the columns of one block in all rows of `output [rows.len(), weight.rows()]`.
///
/// # Safety
/// Nobody else reads or writes these columns meanwhile.
pub(super) unsafe fn columns<const HELD: usize>(
    isa: Isa,
    (weight, bias): Linear<'_>,
    index: usize,
    batch: Batch<'_>,
    rows: &[u32],
    output: Shares<'_, f32>,
) {
    let first = index * BLOCK_ROWS;
    let width = BLOCK_ROWS.min(weight.rows() - first);
    let mut sums = [[0.0; BLOCK_ROWS]; HELD];
    for (part, rows) in rows.chunks(HELD).enumerate() {
        let sums = &mut sums[..rows.len()];
        block(isa, weight, index, batch, rows, sums);
        for (row, sums) in sums.iter_mut().enumerate() {
            if let Some(bias) = bias {
                for (sum, bias) in sums.iter_mut().zip(&bias[first..]) {
                    *sum += bias;
                }
            }
            // SAFETY: nobody else reads or writes these columns meanwhile, as the caller promises.
            let to = unsafe { output.part((part * HELD + row) * weight.rows() + first, width) };
            to.copy_from_slice(&sums[..width]);
        }
    }
}
