//! The CPU kernels, on plain slices.
//!
//! Owns the loops of norm and gated activation and the tile of dot products, each written once over [`Lanes`] and
//! compiled for every instruction set. The invariant is DESIGN's exactness: each output element is one fixed sequence of operations on its
//! own row, so a row's bits are the same in any batch, block or instruction set. Nothing here knows tensors or layers.

// Loops over lanes and tiles index several arrays at once and unroll to registers; iterators would hide both.
#![allow(clippy::needless_range_loop)]

use super::{
    isa::per_isa,
    lanes::{LANES, Lanes},
};
use crate::math;

per_isa! {
    /// `out = weight * x / sqrt(mean(x^2) + eps)`, row by row; `x` and `out` are `[n, weight.len()]`.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = rms_norm_body
}

per_isa! {
    /// `gate = silu(gate) * up`, elementwise.
    pub fn silu_times(gate: &mut [f32], up: &[f32]) = silu_times_body
}

/// Sixteen elements at `at` of a slice, zeros past its end.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(super) unsafe fn load_at<V: Lanes>(from: &[f32], at: usize) -> V {
    if at + LANES <= from.len() {
        // SAFETY: sixteen elements from `at` on are inside the slice; the caller enables the instruction set of `V`.
        unsafe { V::load(from.as_ptr().add(at)) }
    } else {
        let mut padded = [0.0; LANES];
        padded[..from.len() - at].copy_from_slice(&from[at..]);
        // SAFETY: the array has 16 elements; the caller enables the instruction set of `V`.
        unsafe { V::load(padded.as_ptr()) }
    }
}

/// Dot products of `R` rows with `C` rows, all of length `len`, packed one behind the other.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(super) unsafe fn tile<V: Lanes, const R: usize, const C: usize>(x: &[f32], w: &[f32], len: usize) -> [[f32; C]; R] {
    assert!(x.len() == R * len && w.len() == C * len);
    // SAFETY: the caller enables the instruction set of `V`. Whole lanes are loaded only where sixteen elements are left of
    // a row, which is inside by the assertion; `load_at` pads the rest.
    unsafe {
        let mut sums = [[V::zero(); C]; R];
        let mut at = 0;
        while at + LANES <= len {
            let mut weights = [V::zero(); C];
            for c in 0..C {
                weights[c] = V::load(w.as_ptr().add(c * len + at));
            }
            for r in 0..R {
                let row = V::load(x.as_ptr().add(r * len + at));
                for c in 0..C {
                    sums[r][c] = sums[r][c].add_product(row, weights[c]);
                }
            }
            at += LANES;
        }
        if at < len {
            for r in 0..R {
                let row = load_at::<V>(&x[r * len..(r + 1) * len], at);
                for c in 0..C {
                    let weights = load_at::<V>(&w[c * len..(c + 1) * len], at);
                    sums[r][c] = sums[r][c].add_product(row, weights);
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

#[inline(always)]
unsafe fn rms_norm_body<V: Lanes, const R: usize, const C: usize>(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let len = weight.len();
    assert!(x.len() == out.len() && x.len().is_multiple_of(len));
    for (x, out) in x.chunks_exact(len).zip(out.chunks_exact_mut(len)) {
        // SAFETY: the caller enables the instruction set of `V`.
        let squares = unsafe { tile::<V, 1, 1>(x, x, len) }[0][0];
        let scale = 1.0 / (squares / len as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = weight * (x * scale);
        }
    }
}

#[inline(always)]
unsafe fn silu_times_body<V: Lanes, const R: usize, const C: usize>(gate: &mut [f32], up: &[f32]) {
    assert!(gate.len() == up.len());
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = math::silu(*gate) * up;
    }
}
