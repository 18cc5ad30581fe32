//! Sliced matrices by AVX-512 VNNI: a vector of 64 bytes is four columns of sixteen rows, so one `vpdpbusd` with four
//! broadcast activations advances all sixteen, without shuffles.

// Tiles index several arrays at once and unroll to registers; iterators would hide both.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{Cells, Sums, View, fetch_ahead, tile_rows};
use coel_weights::slices::{BASE_CELL, NIBBLES, REFINE_CELL, constants};

/// Rows of the largest tile: as many accumulators as leave room for the eight vectors of a cell.
const TILE: usize = 16;
/// The smallest tile that asks for cells ahead, at Q4 and at Q8; smaller ones lose by it (measured on Zen 4).
const TILES_AHEAD: [usize; 2] = [3, 6];

/// # Safety
/// The machine has the instruction set; `rows` are rows of `x`; slices and `x` have the groups `cells` says.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
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

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
unsafe fn sized<const REFINED: bool>(cells: Cells<'_>, x: View<'_>, rows: &[u32], sums: &mut [Sums]) {
    macro_rules! by_len {
        ($($len:literal)*) => {
            match rows.len() {
                // SAFETY: `rows` and `sums` have the length of the tile; the rest is the caller's promise.
                $($len => unsafe { tile::<$len, REFINED>(cells, x, rows, sums) },)*
                _ => unreachable!("tiles are no larger"),
            }
        };
    }
    by_len!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
unsafe fn tile<const R: usize, const REFINED: bool>(cells: Cells<'_>, x: View<'_>, rows: &[u32], sums: &mut [Sums]) {
    // SAFETY: there are `R` rows and sums; `group` is below `cells.groups`, so every read is inside a cell of the block or
    // a group of a row of `x`, as the caller promises.
    unsafe {
        let stride = x.rows();
        let (values, scales) = x.as_ptrs();
        let rows: [usize; R] = std::array::from_fn(|r| *rows.get_unchecked(r) as usize);
        let mut acc = [_mm512_setzero_ps(); R];
        let high = _mm512_set1_epi8(0xF0u8 as i8);
        for group in 0..cells.groups {
            let base = cells.base.as_ptr().add(group * BASE_CELL);
            let ahead = R >= TILES_AHEAD[usize::from(REFINED)];
            if ahead {
                fetch_ahead::<BASE_CELL>(base);
            }
            let mut levels = [_mm512_setzero_si512(); 8];
            if REFINED {
                let refine = cells.refine.unwrap_unchecked().as_ptr().add(group * REFINE_CELL);
                if ahead {
                    fetch_ahead::<REFINE_CELL>(refine);
                }
                for pair in 0..4 {
                    let upper = _mm512_loadu_si512(base.add(64 * pair).cast());
                    let lower = _mm512_loadu_si512(refine.add(64 * pair).cast());
                    // mask ? a : b, bit by bit
                    levels[2 * pair] = _mm512_ternarylogic_epi32::<0xCA>(high, _mm512_slli_epi16::<4>(upper), lower);
                    levels[2 * pair + 1] =
                        _mm512_ternarylogic_epi32::<0xCA>(high, upper, _mm512_srli_epi16::<4>(lower));
                }
            } else {
                for pair in 0..4 {
                    let upper = _mm512_loadu_si512(base.add(64 * pair).cast());
                    levels[2 * pair] = _mm512_and_si512(high, _mm512_slli_epi16::<4>(upper));
                    levels[2 * pair + 1] = _mm512_and_si512(high, upper);
                }
            }
            let constants = _mm512_cvtepu16_epi32(_mm256_loadu_si256(base.add(NIBBLES).cast()));
            let (scale, offset) = constants::Avx512::read(constants, REFINED);
            for r in 0..R {
                let at = group * stride + rows[r];
                let x = values.add(at).cast::<i32>();
                let mut dot = _mm512_setzero_si512();
                for quad in 0..8 {
                    dot = _mm512_dpbusd_epi32(dot, levels[quad], _mm512_set1_epi32(x.add(quad).read_unaligned()));
                }
                let activation = scales.add(at);
                let step = _mm512_mul_ps(scale, _mm512_set1_ps((*activation).step));
                acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), step, acc[r]);
                acc[r] = _mm512_fmadd_ps(offset, _mm512_set1_ps((*activation).sum), acc[r]);
            }
        }
        for r in 0..R {
            _mm512_storeu_ps(sums.get_unchecked_mut(r).as_mut_ptr(), acc[r]);
        }
    }
}
