//! Sliced matrices by AVX2: half a block at a time, nibbles apart, since `vpmaddubsw` saturates for wider levels.
//! Eight of its sums stay within 8 * 2 * 15 * 127 = 30480, so the whole group is added in 16 bits.

// Tiles index several arrays at once and unroll to registers; iterators would hide both.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{Cells, Sums, View, fetch_ahead, tile_rows};
use coel_weights::slices::{BASE_CELL, NIBBLES, REFINE_CELL, constants};

/// Rows of the largest tile.
const TILE: usize = 4;
/// The smallest tile that asks for cells ahead.
const TILES_AHEAD: usize = 3;

/// # Safety
/// The machine has the instruction set; `rows` are rows of `x`; slices and `x` have the groups `cells` says.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn block(cells: Cells<'_>, x: View<'_>, rows: &[u32], sums: &mut [Sums]) {
    let mut first = 0;
    while first < rows.len() {
        let last = first + tile_rows(rows.len() - first, TILE);
        let (rows, sums) = (&rows[first..last], &mut sums[first..last]);
        // SAFETY: the caller's promises hold for any of its rows; this function enables the instruction set.
        unsafe {
            match cells.refine {
                Some(_) => sized::<true>(cells, x, rows, sums),
                None => sized::<false>(cells, x, rows, sums),
            }
        }
        first = last;
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn sized<const REFINED: bool>(cells: Cells<'_>, x: View<'_>, rows: &[u32], sums: &mut [Sums]) {
    // SAFETY: `rows` and `sums` have the length of the tile; the rest is the caller's promise.
    unsafe {
        match rows.len() {
            1 => tile::<1, REFINED>(cells, x, rows, sums),
            2 => tile::<2, REFINED>(cells, x, rows, sums),
            3 => tile::<3, REFINED>(cells, x, rows, sums),
            4 => tile::<4, REFINED>(cells, x, rows, sums),
            _ => unreachable!("tiles are no larger"),
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const R: usize, const REFINED: bool>(cells: Cells<'_>, x: View<'_>, rows: &[u32], sums: &mut [Sums]) {
    // SAFETY: there are `R` rows and sums; `group` is below `cells.groups`, so every read is inside a cell of the block or
    // a group of a row of `x`, as the caller promises.
    unsafe {
        let stride = x.rows();
        let (values, scales) = x.as_ptrs();
        let rows: [usize; R] = std::array::from_fn(|r| *rows.get_unchecked(r) as usize);
        let mut acc = [[_mm256_setzero_ps(); 2]; R];
        let mask = _mm256_set1_epi8(15);
        for group in 0..cells.groups {
            let base = cells.base.as_ptr().add(group * BASE_CELL);
            let refine = cells.refine.map_or(base, |refine| refine.as_ptr().add(group * REFINE_CELL));
            if R >= TILES_AHEAD {
                fetch_ahead::<BASE_CELL>(base);
                if REFINED {
                    fetch_ahead::<REFINE_CELL>(refine);
                }
            }
            for half in 0..2 {
                let mut upper = [_mm256_setzero_si256(); R];
                let mut lower = [_mm256_setzero_si256(); R];
                for pair in 0..4 {
                    let at = 64 * pair + 32 * half;
                    let packed = _mm256_loadu_si256(base.add(at).cast());
                    let first = _mm256_and_si256(mask, packed);
                    let second = _mm256_and_si256(mask, _mm256_srli_epi16::<4>(packed));
                    let packed = _mm256_loadu_si256(refine.add(at).cast());
                    let first_low = _mm256_and_si256(mask, packed);
                    let second_low = _mm256_and_si256(mask, _mm256_srli_epi16::<4>(packed));
                    for r in 0..R {
                        let x = values.add(group * stride + rows[r]).cast::<i32>().add(2 * pair);
                        let first_x = _mm256_set1_epi32(x.read_unaligned());
                        let second_x = _mm256_set1_epi32(x.add(1).read_unaligned());
                        upper[r] = _mm256_add_epi16(upper[r], _mm256_maddubs_epi16(first, first_x));
                        upper[r] = _mm256_add_epi16(upper[r], _mm256_maddubs_epi16(second, second_x));
                        if REFINED {
                            lower[r] = _mm256_add_epi16(lower[r], _mm256_maddubs_epi16(first_low, first_x));
                            lower[r] = _mm256_add_epi16(lower[r], _mm256_maddubs_epi16(second_low, second_x));
                        }
                    }
                }
                let constants = base.add(NIBBLES + 16 * half);
                let constants = _mm256_cvtepu16_epi32(_mm_loadu_si128(constants.cast()));
                let (scale, offset) = constants::Avx2::read(constants, REFINED);
                for r in 0..R {
                    let mut dot = _mm256_madd_epi16(upper[r], _mm256_set1_epi16(16));
                    if REFINED {
                        dot = _mm256_add_epi32(dot, _mm256_madd_epi16(lower[r], _mm256_set1_epi16(1)));
                    }
                    let activation = scales.add(group * stride + rows[r]);
                    let step = _mm256_mul_ps(scale, _mm256_set1_ps((*activation).step));
                    let sum = &mut acc[r][half];
                    *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), step, *sum);
                    *sum = _mm256_fmadd_ps(offset, _mm256_set1_ps((*activation).sum), *sum);
                }
            }
        }
        for r in 0..R {
            let to = sums.get_unchecked_mut(r).as_mut_ptr();
            _mm256_storeu_ps(to, acc[r][0]);
            _mm256_storeu_ps(to.add(8), acc[r][1]);
        }
    }
}
