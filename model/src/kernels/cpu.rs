//! The CPU kernels, on plain slices.
//!
//! Owns the loops of attention, norm and gated activation, each written once over [`Lanes`] and compiled for every
//! instruction set. The invariant is DESIGN's exactness: each output element is one fixed sequence of operations on its
//! own row, so a row's bits are the same in any batch, block or instruction set. Nothing here knows tensors or layers.

// Loops over lanes and tiles index several arrays at once and unroll to registers; iterators would hide both.
#![allow(clippy::needless_range_loop)]

use super::{
    isa::per_isa,
    lanes::{LANES, Lanes},
    math,
};

per_isa! {
    /// `out = weight * x / sqrt(mean(x^2) + eps)`, row by row; `x` and `out` are `[n, weight.len()]`.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = rms_norm_body
}

per_isa! {
    /// `gate = silu(gate) * up`, elementwise.
    pub fn silu_times(gate: &mut [f32], up: &[f32]) = silu_times_body
}

per_isa! {
    /// Causal attention of the rows `q [n, heads, head_dim]`, which are the positions `past..past + n`, over the
    /// cached `keys` and `values`. `scores` is scratch.
    pub fn attention(q: &[f32], cache: &CachedLayer<'_>, past: usize, out: &mut [f32], scores: &mut Vec<f32>) = attention_body
}

/// One layer of a KV cache: `[kv_heads, capacity, head_dim]` each, with the positions in use filled.
#[derive(Clone, Copy, Debug)]
pub struct CachedLayer<'a> {
    pub keys: &'a [f32],
    pub values: &'a [f32],
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub capacity: usize,
}

/// Sixteen elements at `at` of a slice, zeros past its end.
#[inline(always)]
unsafe fn load_at<V: Lanes>(from: &[f32], at: usize) -> V {
    if at + LANES <= from.len() {
        // SAFETY: in bounds.
        unsafe { V::load(from.as_ptr().add(at)) }
    } else {
        let mut padded = [0.0; LANES];
        padded[..from.len() - at].copy_from_slice(&from[at..]);
        // SAFETY: the array has 16 elements.
        unsafe { V::load(padded.as_ptr()) }
    }
}

/// Dot products of `R` rows with `C` rows, all of length `len`, packed one behind the other.
#[inline(always)]
unsafe fn tile<V: Lanes, const R: usize, const C: usize>(x: &[f32], w: &[f32], len: usize) -> [[f32; C]; R] {
    assert!(x.len() == R * len && w.len() == C * len);
    // SAFETY: loads of whole lanes stay inside by the assertion; the rest is padded.
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
        // SAFETY: passed on from the caller.
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

#[inline(always)]
unsafe fn attention_body<V: Lanes, const R: usize, const C: usize>(
    q: &[f32],
    cache: &CachedLayer<'_>,
    past: usize,
    out: &mut [f32],
    scores: &mut Vec<f32>,
) {
    let (dim, row_len) = (cache.head_dim, cache.heads * cache.head_dim);
    assert!(q.len() == out.len() && q.len().is_multiple_of(row_len));
    let group = cache.heads / cache.kv_heads;
    let scale = 1.0 / (dim as f32).sqrt();
    for (index, (q, out)) in q.chunks_exact(row_len).zip(out.chunks_exact_mut(row_len)).enumerate() {
        let seen = past + index + 1;
        assert!(seen <= cache.capacity);
        scores.resize(seen, 0.0);
        for (head, (q, out)) in q.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).enumerate() {
            let start = head / group * cache.capacity * dim;
            let keys = &cache.keys[start..start + seen * dim];
            let values = &cache.values[start..start + seen * dim];
            // SAFETY: passed on from the caller.
            unsafe {
                score::<V>(q, keys, scale, scores);
                let sum = exponentials::<V>(scores);
                mix::<V>(scores, values, 1.0 / sum, out);
            }
        }
    }
}

/// `scores[p] = q . keys[p] * scale`.
#[inline(always)]
unsafe fn score<V: Lanes>(q: &[f32], keys: &[f32], scale: f32, scores: &mut [f32]) {
    const WIDE: usize = 4;
    let dim = q.len();
    let whole = scores.len() - scores.len() % WIDE;
    for first in (0..whole).step_by(WIDE) {
        // SAFETY: passed on from the caller.
        let sums = unsafe { tile::<V, 1, WIDE>(q, &keys[first * dim..(first + WIDE) * dim], dim) };
        for (score, sum) in scores[first..first + WIDE].iter_mut().zip(sums[0]) {
            *score = sum * scale;
        }
    }
    for (score, key) in scores[whole..].iter_mut().zip(keys[whole * dim..].chunks_exact(dim)) {
        // SAFETY: passed on from the caller.
        *score = unsafe { tile::<V, 1, 1>(q, key, dim) }[0][0] * scale;
    }
}

/// Replaces scores by `exp(score - max)` and returns their sum, added in lanes by position.
#[inline(always)]
unsafe fn exponentials<V: Lanes>(scores: &mut [f32]) -> f32 {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    for score in scores.iter_mut() {
        *score = math::exp(*score - max);
    }
    // SAFETY: passed on from the caller; `load_at` pads.
    unsafe {
        let mut sum = V::zero();
        let one = V::splat(1.0);
        for at in (0..scores.len()).step_by(LANES) {
            sum = sum.add_product(load_at::<V>(scores, at), one);
        }
        sum.sum()
    }
}

/// `out = scale * sum_p weights[p] * values[p]`, positions added in order.
#[inline(always)]
unsafe fn mix<V: Lanes>(weights: &[f32], values: &[f32], scale: f32, out: &mut [f32]) {
    let dim = out.len();
    let whole = dim - dim % LANES;
    for first in (0..whole).step_by(LANES) {
        // SAFETY: `first + 16 <= dim`, and `values` has one row of `dim` per weight.
        unsafe {
            assert!(values.len() == weights.len() * dim);
            let mut sum = V::zero();
            for (position, weight) in weights.iter().enumerate() {
                let value = V::load(values.as_ptr().add(position * dim + first));
                sum = sum.add_product(V::splat(*weight), value);
            }
            sum.store(out.as_mut_ptr().add(first));
        }
    }
    for lane in whole..dim {
        let mut sum = 0.0;
        for (weight, value) in weights.iter().zip(values.chunks_exact(dim)) {
            sum += weight * value[lane];
        }
        out[lane] = sum;
    }
    for value in out {
        *value *= scale;
    }
}
