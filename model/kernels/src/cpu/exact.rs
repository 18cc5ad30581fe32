//! Matrices in the checkpoint's own type, times f32 rows.
//!
//! Owns the arithmetic of exact weights. An output is the dot product of a weight row, converted to f32 without loss,
//! with an activation row, added as [`Lanes`] adds: 16 partial sums, then a fixed tree. Weights are converted in
//! registers, so no widened copy exists. The unit of work is that of sliced matrices, a block of [`BLOCK_ROWS`] output
//! rows over some rows of a batch, taken in tiles of `R` rows by `C` outputs that stay in registers over the whole
//! length. No result depends on tiles or batches.

// Loops over lanes and tiles index several arrays at once and unroll to registers; iterators would hide both.
#![allow(clippy::needless_range_loop)]

use super::{
    isa::per_isa,
    lanes::{LANES, Lanes},
    sliced::{Sums, tile_rows},
};
use coel_weights::{
    matrix::{DType, Matrix},
    slices::BLOCK_ROWS,
};

per_isa! {
    /// Output rows `16 * block..` of `matrix` for `rows` of `x [n, cols]`, into `sums`. Outputs past the matrix's last
    /// row are left as they are.
    pub fn block(matrix: &Matrix, block: usize, x: &[f32], rows: &[u32], sums: &mut [Sums]) = block_body
}

/// How far ahead of its use memory is asked for where weight rows are read one after the other: a row is one chain of
/// additions, too long for the processor to look past it (measured on Zen 4).
const BYTES_AHEAD: usize = 512;

/// A packed element type.
trait Element {
    const BYTES: usize;

    /// # Safety
    /// As [`Lanes`]; 16 elements are readable.
    unsafe fn load<V: Lanes>(from: *const u8) -> V;
}

struct BF16;
struct F16;
struct F32;

impl Element for BF16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const u8) -> V {
        // SAFETY: the caller enables the set of `V`, and 16 elements are readable.
        unsafe { V::load_bf16(from) }
    }
}

impl Element for F16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const u8) -> V {
        // SAFETY: the caller enables the set of `V`, and 16 elements are readable.
        unsafe { V::load_f16(from) }
    }
}

impl Element for F32 {
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const u8) -> V {
        // SAFETY: the caller enables the set of `V`, and 16 elements are readable.
        unsafe { V::load_f32(from) }
    }
}

#[inline(always)]
unsafe fn block_body<V: Lanes, const R: usize, const C: usize>(
    matrix: &Matrix,
    block: usize,
    x: &[f32],
    rows: &[u32],
    sums: &mut [Sums],
) {
    let len = matrix.cols();
    assert!(sums.len() == rows.len() && rows.iter().all(|row| x.len() / len > *row as usize));
    let range = block * BLOCK_ROWS..matrix.rows().min((block + 1) * BLOCK_ROWS);
    let weights = matrix.rows_bytes(range);
    // SAFETY: `rows` are rows of `x` by the assertion, `weights` are whole rows of `len` by `rows_bytes`, and the caller
    // enables the instruction set of `V`.
    unsafe {
        match matrix.dtype() {
            DType::BF16 => typed::<V, BF16, R, C>(weights, len, x, rows, sums),
            DType::F16 => typed::<V, F16, R, C>(weights, len, x, rows, sums),
            DType::F32 => typed::<V, F32, R, C>(weights, len, x, rows, sums),
        }
    }
}

#[inline(always)]
unsafe fn typed<V: Lanes, E: Element, const R: usize, const C: usize>(
    weights: &[u8],
    len: usize,
    x: &[f32],
    rows: &[u32],
    sums: &mut [Sums],
) {
    let row_bytes = len * E::BYTES;
    // With one or two rows the loop waits for memory, which is fastest read one weight row after the other.
    let one_by_one = rows.len() <= 2;
    let mut first = 0;
    while first < rows.len() {
        let last = first + tile_rows(rows.len() - first, R);
        let (rows, sums) = (&rows[first..last], &mut sums[first..last]);
        let mut column = 0;
        while column < weights.len() / row_bytes {
            let weights = &weights[column * row_bytes..];
            // SAFETY: the caller's promises hold for any of its rows, and a tile has no more weight rows than are left.
            unsafe {
                if !one_by_one && weights.len() >= C * row_bytes {
                    sized::<V, E, R, C>(weights, len, x, rows, column, sums);
                    column += C;
                } else {
                    sized::<V, E, R, 1>(weights, len, x, rows, column, sums);
                    column += 1;
                }
            }
        }
        first = last;
    }
}

/// Picks the tile of as many rows as there are, at most `R`.
#[inline(always)]
unsafe fn sized<V: Lanes, E: Element, const R: usize, const C: usize>(
    weights: &[u8],
    len: usize,
    x: &[f32],
    rows: &[u32],
    column: usize,
    sums: &mut [Sums],
) {
    macro_rules! by_len {
        ($($len:literal)*) => {
            match rows.len() {
                $($len if $len <= R => {
                    let mut from = [x.as_ptr(); $len];
                    for r in 0..$len {
                        from[r] = from[r].wrapping_add(rows[r] as usize * len);
                    }
                    // SAFETY: `from` points at rows of `x` and `weights` has `C` rows, as the caller promises.
                    let tile = unsafe { tile::<V, E, $len, C>(from, weights.as_ptr(), len) };
                    for (sums, tile) in sums.iter_mut().zip(tile) {
                        sums[column..column + C].copy_from_slice(&tile);
                    }
                })*
                _ => unreachable!("tiles are no larger"),
            }
        };
    }
    by_len!(1 2 3 4 5 6)
}

/// Dot products of the rows at `x` with `C` weight rows that lie one behind the other, all of length `len`.
#[inline(always)]
unsafe fn tile<V: Lanes, E: Element, const R: usize, const C: usize>(
    x: [*const f32; R],
    w: *const u8,
    len: usize,
) -> [[f32; C]; R] {
    let row_bytes = len * E::BYTES;
    // SAFETY: the caller enables the instruction set of `V`. Whole lanes are loaded only where sixteen elements are left of
    // a row of `len`; the rest is copied into an array of sixteen first.
    unsafe {
        let mut sums = [[V::zero(); C]; R];
        let mut at = 0;
        while at + LANES <= len {
            let mut weights = [V::zero(); C];
            for c in 0..C {
                let from = w.add(c * row_bytes + at * E::BYTES);
                weights[c] = E::load(from);
                if C == 1 {
                    V::fetch(from.wrapping_add(BYTES_AHEAD));
                }
            }
            for r in 0..R {
                let row = V::load(x[r].add(at));
                for c in 0..C {
                    sums[r][c] = sums[r][c].add_product(row, weights[c]);
                }
            }
            at += LANES;
        }
        if at < len {
            let mut weights = [V::zero(); C];
            for c in 0..C {
                let mut padded = [0u8; 4 * LANES];
                let from = w.add(c * row_bytes + at * E::BYTES);
                from.copy_to_nonoverlapping(padded.as_mut_ptr(), (len - at) * E::BYTES);
                weights[c] = E::load(padded.as_ptr());
            }
            for r in 0..R {
                let mut padded = [0.0; LANES];
                x[r].add(at).copy_to_nonoverlapping(padded.as_mut_ptr(), len - at);
                let row = V::load(padded.as_ptr());
                for c in 0..C {
                    sums[r][c] = sums[r][c].add_product(row, weights[c]);
                }
            }
        }
        let mut out = [[0.0; C]; R];
        for r in 0..R {
            for c in 0..C {
                out[r][c] = sums[r][c].sum();
            }
        }
        out
    }
}
