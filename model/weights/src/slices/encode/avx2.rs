//! The encoder for x86 with AVX2 and F16C: sixteen rows of a group together.
//!
//! It rounds as the portable encoder does, in the same order: subtraction and division are IEEE's, nothing is fused, and
//! clamping before rounding equals clamping after it because both ends are integers. [`search`] finds the constants, with
//! integers except for a few floats of each group.

use std::arch::x86_64::*;

use super::Block;
use crate::matrix::DType;
use crate::slices::{
    BASE_CELL, BLOCK_ROWS, GROUP, NIBBLES, REFINE_CELL,
    constants::{self, Constants},
};

mod search;

use search::Groups;

/// Vectors of a group.
const VECTORS: usize = GROUP / 8;

/// Encodes a block; `false` if a group has no slices.
///
/// # Safety
/// The machine must have AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn encode(block: Block<'_>, base: &mut [[u8; BASE_CELL]], refine: &mut [[u8; REFINE_CELL]]) -> bool {
    let rows = block.rows();
    let mut weights = [[0.0f32; GROUP]; BLOCK_ROWS];
    for (group, (base, refine)) in base.iter_mut().zip(refine).enumerate() {
        widen(block, group, &mut weights);
        let Some((scales, offsets)) = constants(&weights, base) else {
            return false;
        };
        for row in 0..BLOCK_ROWS {
            levels(&weights[row], scales[row], offsets[row], row, base, refine);
        }
        if rows < BLOCK_ROWS {
            clear(rows, base, refine);
        }
    }
    true
}

/// Widens one group of every row; `weights` keeps its values for rows that do not exist.
#[target_feature(enable = "avx2,f16c")]
fn widen(block: Block<'_>, group: usize, weights: &mut [[f32; GROUP]; BLOCK_ROWS]) {
    if block.dtype != DType::F16 {
        return block.widen(group, weights);
    }
    let rows = block.bytes.chunks_exact(2 * block.cols);
    for (row, weights) in rows.zip(weights) {
        let raw = &row[2 * group * GROUP..][..2 * GROUP];
        for index in 0..VECTORS {
            // SAFETY: `index` is below a quarter of the group: eight of its 32 halves, into as many of its 32 floats.
            unsafe {
                let eight = _mm_loadu_si128(raw.as_ptr().add(16 * index).cast());
                _mm256_storeu_ps(weights.as_mut_ptr().add(8 * index), _mm256_cvtph_ps(eight));
            }
        }
    }
}

/// Scales and offsets of sixteen rows, whose constants are written into the cell; `None` if a weight is not finite or a
/// scale does not fit. Rows that do not exist must hold finite weights.
#[target_feature(enable = "avx2,fma,f16c")]
fn constants(
    weights: &[[f32; GROUP]; BLOCK_ROWS],
    base: &mut [u8; BASE_CELL],
) -> Option<([f32; BLOCK_ROWS], [f32; BLOCK_ROWS])> {
    let (mut mins, mut maxs) = ([0.0f32; BLOCK_ROWS], [0.0f32; BLOCK_ROWS]);
    let mut largest = _mm256_setzero_si256(); // of all weights' bits, without the sign
    let zero = _mm256_setzero_ps();
    let magnitude = _mm256_set1_epi32(0x7fff_ffff);
    for (row, weights) in weights.iter().enumerate() {
        let load = |index: usize| {
            // SAFETY: `index` is below four, so eight floats at `8 * index` are inside the 32 of the array.
            unsafe { _mm256_add_ps(_mm256_loadu_ps(weights.as_ptr().add(8 * index)), zero) }
        };
        let v: [__m256; VECTORS] = std::array::from_fn(load);
        for v in v {
            largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
        }
        let min = _mm256_min_ps(_mm256_min_ps(v[0], v[1]), _mm256_min_ps(v[2], v[3]));
        let max = _mm256_max_ps(_mm256_max_ps(v[0], v[1]), _mm256_max_ps(v[2], v[3]));
        (mins[row], maxs[row]) = across(min, max);
    }
    let f32_max = _mm256_set1_epi32(0x7f7f_ffff);
    if _mm256_movemask_epi8(_mm256_cmpgt_epi32(largest, f32_max)) != 0 {
        return None;
    }
    let (mut scales, mut offsets) = ([0.0f32; BLOCK_ROWS], [0.0f32; BLOCK_ROWS]);
    for half in 0..2 {
        let at = 8 * half;
        // SAFETY: `at` is 0 or 8: eight of sixteen elements each, and the cell has sixteen constants of two bytes after its
        // nibbles. This function enables what `of`, `best` and `read` need.
        unsafe {
            let (min, max) = (_mm256_loadu_ps(mins.as_ptr().add(at)), _mm256_loadu_ps(maxs.as_ptr().add(at)));
            let eight = weights[at..at + 8].try_into().expect("half of sixteen");
            let found = Groups::of(eight, min, max)?.best();
            let (scale, offset) = constants::Avx2::read(found, true);
            let packed = _mm_packus_epi32(_mm256_castsi256_si128(found), _mm256_extracti128_si256::<1>(found));
            _mm_storeu_si128(base.as_mut_ptr().add(NIBBLES + 2 * at).cast(), packed);
            _mm256_storeu_ps(scales.as_mut_ptr().add(at), scale);
            _mm256_storeu_ps(offsets.as_mut_ptr().add(at), offset);
        }
    }
    Some((scales, offsets))
}

/// The least of `min` and the greatest of `max`.
#[target_feature(enable = "avx2")]
#[inline]
fn across(min: __m256, max: __m256) -> (f32, f32) {
    let min = _mm_min_ps(_mm256_castps256_ps128(min), _mm256_extractf128_ps::<1>(min));
    let max = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps::<1>(max));
    let min = _mm_min_ps(min, _mm_movehl_ps(min, min));
    let max = _mm_max_ps(max, _mm_movehl_ps(max, max));
    let min = _mm_min_ss(min, _mm_shuffle_ps::<1>(min, min));
    let max = _mm_max_ss(max, _mm_shuffle_ps::<1>(max, max));
    (_mm_cvtss_f32(min), _mm_cvtss_f32(max))
}

/// Writes the nibbles of one row.
#[target_feature(enable = "avx2")]
#[inline]
fn levels(
    weights: &[f32; GROUP],
    s: f32,
    m: f32,
    row: usize,
    base: &mut [u8; BASE_CELL],
    refine: &mut [u8; REFINE_CELL],
) {
    let (scale, offset, zero) = (_mm256_set1_ps(s), _mm256_set1_ps(m), _mm256_setzero_ps());
    let some = _mm256_cmp_ps::<_CMP_NEQ_OQ>(scale, zero);
    let level = |index: usize| {
        // SAFETY: `index` is below four, so eight floats at `8 * index` are inside the 32 of the array.
        let w = unsafe { _mm256_loadu_ps(weights.as_ptr().add(8 * index)) };
        // Where the scale is zero this divides by it, and the mask discards what comes of that.
        let q = _mm256_and_ps(_mm256_div_ps(_mm256_sub_ps(w, offset), scale), some);
        _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(q, zero), _mm256_set1_ps(255.0)))
    };
    let q: [__m256i; VECTORS] = std::array::from_fn(level);
    // Packing works within halves of a register; the permutation brings the columns back into order.
    let q = _mm256_packus_epi16(_mm256_packus_epi32(q[0], q[1]), _mm256_packus_epi32(q[2], q[3]));
    let q = _mm256_permutevar8x32_epi32(q, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    // Each 64-bit lane has the columns 8 j .. 8 j + 8; its lower half becomes the cell's four bytes.
    let (low, high) = (_mm256_set1_epi32(0x0f0f_0f0f), _mm256_set1_epi32(0xf0f0_f0f0u32 as i32));
    let upper = _mm256_srli_epi64::<32>(q);
    let coarse = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi64::<4>(q), low), _mm256_and_si256(upper, high));
    let fine = _mm256_or_si256(_mm256_and_si256(q, low), _mm256_and_si256(_mm256_slli_epi64::<4>(upper), high));
    let (mut coarse_bytes, mut fine_bytes) = ([0u8; GROUP], [0u8; GROUP]);
    // SAFETY: the arrays have 32 bytes each, which is what is stored.
    unsafe {
        _mm256_storeu_si256(coarse_bytes.as_mut_ptr().cast(), coarse);
        _mm256_storeu_si256(fine_bytes.as_mut_ptr().cast(), fine);
    }
    for j in 0..VECTORS {
        let at = 64 * j + 4 * row;
        base[at..at + 4].copy_from_slice(&coarse_bytes[8 * j..][..4]);
        refine[at..at + 4].copy_from_slice(&fine_bytes[8 * j..][..4]);
    }
}

/// Zeroes the bytes of rows past the matrix's last.
fn clear(rows: usize, base: &mut [u8; BASE_CELL], refine: &mut [u8; REFINE_CELL]) {
    for j in 0..VECTORS {
        base[64 * j + 4 * rows..64 * (j + 1)].fill(0);
        refine[64 * j + 4 * rows..64 * (j + 1)].fill(0);
    }
    base[NIBBLES + size_of::<Constants>() * rows..].fill(0);
}
