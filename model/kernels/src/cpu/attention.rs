//! Causal attention over a paged KV cache, on plain slices.
//!
//! Owns the loops, written once over [`Lanes`] and compiled for every instruction set. Work is cut into units: a few
//! consecutive rows of one session against one head of keys and values, with all query heads that share it, so that a
//! key or a value is loaded once for several products. The invariant is the kernels': a row's result is one fixed
//! sequence of operations on its own query and the positions it sees (scores in 16 lanes, exponentials added in lanes by
//! position, values added by position), so neither unit nor page size, batch or instruction set changes a bit.

// Loops over lanes and tiles index several arrays at once and unroll to registers; iterators would hide both.
#![allow(clippy::needless_range_loop)]

use super::{
    isa::{Isa, per_isa},
    kv_cache::{CpuCache, Half},
    lanes::{LANES, Lanes},
    primitives::{load_at, tile},
    threads::{Pool, Shares},
};
use crate::{
    kv::{CacheShape, Span},
    math,
};

/// Query rows of a unit, all heads of a group counted: enough to reuse what is loaded, few enough that their scores
/// stay in the second-level cache over long contexts.
const UNIT_ROWS: usize = 12;

/// One thread's buffers; kept between calls.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// `[rows, head_dim]`
    q: Vec<f32>,
    /// `[rows, seen]`
    scores: Vec<f32>,
    /// Sums of the exponentials, by row.
    sums: Vec<f32>,
    /// `[rows, head_dim]`
    out: Vec<f32>,
}

/// A few consecutive rows of one session against one head of keys and values.
#[derive(Clone, Copy, Debug)]
struct Unit<'a> {
    span: Span<'a>,
    /// First row in the batch, and how many.
    first: usize,
    rows: usize,
    /// Positions the first row sees; each further row sees one more.
    seen: usize,
    kv_head: usize,
}

/// The work of one call, the longest units of each session first.
fn units<'a>(shape: CacheShape, spans: &[Span<'a>]) -> Vec<Unit<'a>> {
    let together = (UNIT_ROWS * shape.kv_heads / shape.heads).max(1);
    let mut units = Vec::new();
    let mut first = 0;
    for span in spans {
        for offset in (0..span.rows).step_by(together).rev() {
            let rows = together.min(span.rows - offset);
            let seen = span.past + offset + 1;
            let unit = |kv_head| Unit { span: *span, first: first + offset, rows, seen, kv_head };
            units.extend((0..shape.kv_heads).map(unit));
        }
        first += span.rows;
    }
    units
}

/// Attention of `q [n, heads * head_dim]`, the rows of `spans`: the same shape. `scratch` is for each thread.
pub(super) fn attention(
    pool: &mut Pool,
    isa: Isa,
    scratch: &mut Vec<Scratch>,
    q: &[f32],
    cache: &CpuCache,
    layer: usize,
    spans: &[Span<'_>],
) -> Vec<f32> {
    let CacheShape { heads, kv_heads, head_dim, .. } = cache.shape();
    let (width, piece) = (heads * head_dim, heads / kv_heads * head_dim);
    assert_eq!(q.len(), width * spans.iter().map(|span| span.rows).sum::<usize>());
    scratch.resize_with(pool.threads().max(scratch.len()), Scratch::default);
    let units = units(cache.shape(), spans);
    let mut out = vec![0.0; q.len()];
    let (scratch, shares) = (Shares::of(scratch), Shares::of(&mut out));
    pool.each(units.len(), 1, |worker, index| {
        let unit = &units[index];
        // SAFETY: each worker has its own scratch and is in one unit at a time.
        let scratch = unsafe { &mut scratch.part(worker, 1)[0] };
        let column = unit.kv_head * piece;
        scratch.q.clear();
        for row in unit.first..unit.first + unit.rows {
            scratch.q.extend_from_slice(&q[row * width + column..][..piece]);
        }
        scratch.out.resize(scratch.q.len(), 0.0);
        scratch.scores.resize(unit.rows * heads / kv_heads * (unit.seen + unit.rows - 1), 0.0);
        attend(isa, unit, cache, layer, scratch);
        for (row, values) in (unit.first..).zip(scratch.out.chunks_exact(piece)) {
            // SAFETY: no two units have a row and a head in common, so nobody else writes here.
            unsafe { shares.part(row * width + column, piece) }.copy_from_slice(values);
        }
    });
    out
}

per_isa! {
    fn attend(unit: &Unit<'_>, cache: &CpuCache, layer: usize, scratch: &mut Scratch) = attend_body
}

#[inline(always)]
unsafe fn attend_body<V: Lanes, const R: usize, const C: usize>(
    unit: &Unit<'_>,
    cache: &CpuCache,
    layer: usize,
    scratch: &mut Scratch,
) {
    let CacheShape { page_tokens, head_dim: dim, heads, kv_heads, .. } = cache.shape();
    let group = heads / kv_heads;
    let Scratch { q, scores, sums, out } = scratch;
    let stride = unit.seen + unit.rows - 1;
    let page = |index: usize, half| cache.head(unit.span.pages[index], layer, half, unit.kv_head);
    let seen = |row: usize| unit.seen + row / group;
    // SAFETY: the caller enables the instruction set of `V`.
    unsafe {
        for (index, at) in (0..stride).step_by(page_tokens).enumerate() {
            let keys = &page(index, Half::Keys)[..page_tokens.min(stride - at) * dim];
            score::<V, R>(q, keys, dim, &mut scores[at..], stride);
        }
        let scale = 1.0 / (dim as f32).sqrt();
        let rows = unit.rows * group;
        sums.clear();
        for row in 0..rows {
            sums.push(exponentials::<V>(&mut scores[row * stride..][..seen(row)], scale));
        }
        let values = |index| page(index, Half::Values);
        let mut row = 0;
        while row + R <= rows {
            let seen: [usize; R] = std::array::from_fn(|r| seen(row + r));
            mix::<V, R, C>(
                &scores[row * stride..],
                stride,
                seen,
                page_tokens,
                values,
                &mut out[row * dim..][..R * dim],
            );
            row += R;
        }
        while row < rows {
            mix::<V, 1, C>(
                &scores[row * stride..],
                stride,
                [seen(row)],
                page_tokens,
                values,
                &mut out[row * dim..][..dim],
            );
            row += 1;
        }
    }
    for (out, sum) in out.chunks_exact_mut(dim).zip(sums) {
        let scale = 1.0 / *sum;
        out.iter_mut().for_each(|value| *value *= scale);
    }
}

/// `scores[r * stride + p] = q[r] . keys[p]` for all rows of `q` and of `keys`.
#[inline(always)]
unsafe fn score<V: Lanes, const R: usize>(q: &[f32], keys: &[f32], dim: usize, scores: &mut [f32], stride: usize) {
    const WIDE: usize = 4;
    let (rows, positions) = (q.len() / dim, keys.len() / dim);
    // SAFETY: the caller enables the instruction set of `V`.
    unsafe {
        let mut row = 0;
        while row < rows {
            let whole = row + R <= rows;
            let mut at = 0;
            while at < positions {
                let wide = at + WIDE <= positions;
                let key = &keys[at * dim..];
                let to = &mut scores[row * stride + at..];
                match (whole, wide) {
                    (true, true) => {
                        spread(tile::<V, R, WIDE>(&q[row * dim..][..R * dim], &key[..WIDE * dim], dim), to, stride)
                    }
                    (true, false) => spread(tile::<V, R, 1>(&q[row * dim..][..R * dim], &key[..dim], dim), to, stride),
                    (false, true) => {
                        spread(tile::<V, 1, WIDE>(&q[row * dim..][..dim], &key[..WIDE * dim], dim), to, stride)
                    }
                    (false, false) => spread(tile::<V, 1, 1>(&q[row * dim..][..dim], &key[..dim], dim), to, stride),
                }
                at += if wide { WIDE } else { 1 };
            }
            row += if whole { R } else { 1 };
        }
    }
}

#[inline(always)]
fn spread<const R: usize, const C: usize>(tile: [[f32; C]; R], to: &mut [f32], stride: usize) {
    for r in 0..R {
        to[r * stride..][..C].copy_from_slice(&tile[r]);
    }
}

/// Replaces scores by `exp(score * scale - max)` and returns their sum, added in lanes by position.
#[inline(always)]
unsafe fn exponentials<V: Lanes>(scores: &mut [f32], scale: f32) -> f32 {
    let mut highest = [f32::NEG_INFINITY; LANES];
    for scores in scores.chunks_mut(LANES) {
        for (score, highest) in scores.iter_mut().zip(&mut highest) {
            *score *= scale;
            *highest = if *score > *highest { *score } else { *highest };
        }
    }
    let max = highest.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    for score in scores.iter_mut() {
        *score = math::exp(*score - max);
    }
    // SAFETY: the caller enables the instruction set of `V`; `load_at` stays inside the slice, and what is stored is an
    // array of sixteen floats.
    unsafe {
        let mut sum = V::zero();
        let one = V::splat(1.0);
        for at in (0..scores.len()).step_by(LANES) {
            sum = sum.add_product(load_at::<V>(scores, at), one);
        }
        sum.sum()
    }
}

/// `out[r] = sum_p weights[r * stride + p] * values[p]` over the first `seen[r]` positions, added in order; `seen`
/// ascends.
#[inline(always)]
unsafe fn mix<'a, V: Lanes, const R: usize, const C: usize>(
    weights: &[f32],
    stride: usize,
    seen: [usize; R],
    page_tokens: usize,
    values: impl Fn(usize) -> &'a [f32] + Copy,
    out: &mut [f32],
) {
    let dim = out.len() / R;
    // SAFETY: the caller enables the instruction set of `V`.
    unsafe {
        let mut first = 0;
        while first < dim {
            let wide = first + C * LANES <= dim;
            match wide {
                true => columns::<V, R, C>(weights, stride, seen, page_tokens, values, out, first),
                false => columns::<V, R, 1>(weights, stride, seen, page_tokens, values, out, first),
            }
            first += if wide { C * LANES } else { LANES };
        }
    }
}

/// The columns `first..` of [`mix`], `C` times sixteen of them; fewer at the end of a row.
#[inline(always)]
unsafe fn columns<'a, V: Lanes, const R: usize, const C: usize>(
    weights: &[f32],
    stride: usize,
    seen: [usize; R],
    page_tokens: usize,
    values: impl Fn(usize) -> &'a [f32],
    out: &mut [f32],
    first: usize,
) {
    let dim = out.len() / R;
    let width = (dim - first).min(C * LANES);
    // SAFETY: the caller enables the instruction set of `V`; `load_at` stays inside the slice, and what is stored is an
    // array of sixteen floats.
    unsafe {
        let mut sums = [[V::zero(); C]; R];
        let last = seen[R - 1];
        for (index, at) in (0..last).step_by(page_tokens).enumerate() {
            let page = values(index);
            for position in at..last.min(at + page_tokens) {
                let row = &page[(position - at) * dim..][..dim];
                let mut columns = [V::zero(); C];
                for c in 0..C {
                    columns[c] = load_at::<V>(row, first + c * LANES);
                }
                for r in 0..R {
                    // Later positions are not added with weight zero: what lies there may be anything.
                    if position < seen[r] {
                        let weight = V::splat(weights[r * stride + position]);
                        for c in 0..C {
                            sums[r][c] = sums[r][c].add_product(weight, columns[c]);
                        }
                    }
                }
            }
        }
        for r in 0..R {
            let mut row = [0.0; LANES];
            for c in 0..C {
                sums[r][c].store(row.as_mut_ptr());
                let width = width.saturating_sub(c * LANES).min(LANES);
                out[r * dim + first + c * LANES..][..width].copy_from_slice(&row[..width]);
            }
        }
    }
}
