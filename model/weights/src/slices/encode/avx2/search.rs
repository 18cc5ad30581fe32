//! Constants of eight groups at once, one group a 32-bit lane.
//!
//! A lane holds two neighbouring weights as 16-bit places between the group's least and greatest weight. The upper half of
//! a place times the span is a position in 256ths of an 8-bit step, and the part of it below a step is the distance to a
//! level. Integers may be added in any order, so only the few floats of a candidate must be computed as the portable
//! encoder computes them.

use std::arch::x86_64::*;

use super::VECTORS;
use crate::slices::{
    GROUP,
    constants::{self, LOWEST_ZERO, SCALE_MOST, ZERO_MOST, ZERO_STEP},
    encode::{ASIDE, EIGHT_WEIGHT, LEAST_SPAN, PLACES, SCALES},
};

/// Pairs of weights of a group.
const PAIRS: usize = GROUP / 2;

/// One group of each of eight rows.
pub(super) struct Groups {
    /// Two places a lane.
    places: [__m256i; PAIRS],
    min: __m256,
    range: __m256,
    /// Codes of the least scales.
    least: __m256i,
    /// Lanes of groups of zeros only.
    none: __m256,
}

impl Groups {
    /// `None` if a group needs a larger scale than the format has.
    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn of(weights: &[[f32; GROUP]; 8], min: __m256, max: __m256) -> Option<Self> {
        let zero = _mm256_setzero_ps();
        let range = _mm256_sub_ps(max, min);
        let span = _mm256_sub_ps(_mm256_max_ps(max, zero), _mm256_min_ps(min, zero));
        let none = _mm256_cmp_ps::<_CMP_LT_OQ>(span, _mm256_set1_ps(LEAST_SPAN));
        let least = constants::Avx2::scale_code(_mm256_mul_ps(span, _mm256_set1_ps(1.0 / 256.0)));
        if _mm256_movemask_epi8(_mm256_cmpgt_epi32(least, _mm256_set1_epi32(SCALE_MOST))) != 0 {
            return None;
        }
        let (mut mins, mut factors) = ([0.0f32; 8], [0.0f32; 8]);
        let mut pairs = [[0u32; 8]; PAIRS];
        let some = _mm256_cmp_ps::<_CMP_GT_OQ>(range, zero);
        let per_range = _mm256_and_ps(_mm256_div_ps(_mm256_set1_ps(PLACES), range), some);
        // SAFETY: the arrays have eight elements each, which is what is stored.
        unsafe {
            _mm256_storeu_ps(mins.as_mut_ptr(), min);
            _mm256_storeu_ps(factors.as_mut_ptr(), per_range);
        }
        for (row, weights) in weights.iter().enumerate() {
            let (min, factor) = (_mm256_set1_ps(mins[row]), _mm256_set1_ps(factors[row]));
            let place = |index: usize| {
                // SAFETY: `index` is below four, so eight floats at `8 * index` are inside the 32 of the array.
                let w = unsafe { _mm256_loadu_ps(weights.as_ptr().add(8 * index)) };
                _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(w, min), factor))
            };
            let v: [__m256i; VECTORS] = std::array::from_fn(place);
            // The order of pairs does not matter: they are only added.
            for (half, packed) in
                [_mm256_packus_epi32(v[0], v[1]), _mm256_packus_epi32(v[2], v[3])].into_iter().enumerate()
            {
                let mut eight = [0u32; 8];
                // SAFETY: the array has 32 bytes, which is what is stored.
                unsafe { _mm256_storeu_si256(eight.as_mut_ptr().cast(), packed) };
                for (into, pair) in pairs[8 * half..].iter_mut().zip(eight) {
                    into[row] = pair;
                }
            }
        }
        // SAFETY: each of the arrays has 32 bytes, which is what is loaded.
        let places = std::array::from_fn(|pair| unsafe { _mm256_loadu_si256(pairs[pair].as_ptr().cast()) });
        Some(Self { places, min, range, least, none })
    }

    /// The best constants of each group, 32 bits each.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn best(&self) -> __m256i {
        let splat = |value: f32| _mm256_set1_ps(value);
        let (mut lowest, mut best) = (splat(f32::INFINITY), _mm256_setzero_ps());
        for more in 0..SCALES {
            let code = _mm256_add_epi32(self.least, _mm256_set1_epi32(more));
            let beyond = _mm256_castsi256_ps(_mm256_cmpgt_epi32(code, _mm256_set1_epi32(SCALE_MOST)));
            let upper = _mm256_slli_epi32::<7>(code);
            let (s, _) = constants::Avx2::read(upper, true);
            let (low, wide) = (_mm256_div_ps(self.min, s), _mm256_div_ps(self.range, s));
            let aside = _mm256_mul_ps(_mm256_sub_ps(splat(255.0), wide), splat(0.5));
            let middle = _mm256_sub_ps(_mm256_sub_ps(aside, low), splat(LOWEST_ZERO));
            let middle = _mm256_div_ps(middle, splat(ZERO_STEP));
            let middle = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(middle);
            let squared = _mm256_mul_ps(s, s);
            for aside in -ASIDE..=ASIDE {
                let zero = _mm256_add_ps(middle, splat(aside as f32));
                let zero = _mm256_min_ps(_mm256_max_ps(zero, _mm256_setzero_ps()), splat(ZERO_MOST as f32));
                let found = _mm256_or_si256(upper, _mm256_cvtps_epi32(zero));
                let cost = _mm256_mul_ps(self.cost(low, wide, zero), squared);
                let cost = _mm256_or_ps(cost, beyond); // not a number
                let better = _mm256_cmp_ps::<_CMP_LT_OQ>(cost, lowest);
                lowest = _mm256_blendv_ps(lowest, cost, better);
                best = _mm256_blendv_ps(best, _mm256_castsi256_ps(found), better);
            }
        }
        _mm256_castps_si256(_mm256_andnot_ps(self.none, best))
    }

    /// The weighted error at four and eight bits, in squares of 256ths of a scale, where minimum and range are `low` and `wide`
    /// levels and the zero point has this number.
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn cost(&self, low: __m256, wide: __m256, number: __m256) -> __m256 {
        let step = _mm256_set1_ps(256.0);
        let zero = _mm256_add_ps(_mm256_set1_ps(LOWEST_ZERO), _mm256_mul_ps(_mm256_set1_ps(ZERO_STEP), number));
        let at = _mm256_mul_ps(_mm256_add_ps(low, zero), step);
        let span = _mm256_mul_ps(wide, step);
        let nothing = _mm256_setzero_ps();
        let below = _mm256_max_ps(_mm256_sub_ps(_mm256_set1_ps(-128.0), at), nothing);
        let above = _mm256_max_ps(_mm256_sub_ps(_mm256_add_ps(at, span), _mm256_set1_ps(65408.0)), nothing);
        let rounded = |value: __m256, least: f32, most: f32| {
            let clamped = _mm256_min_ps(_mm256_max_ps(value, _mm256_set1_ps(least)), _mm256_set1_ps(most));
            _mm256_cvtps_epi32(clamped)
        };
        let place = _mm256_add_epi32(rounded(at, -30000.0, 90000.0), _mm256_set1_epi32(128));
        let inside = self.both(twice(rounded(span, 0.0, 65535.0)), twice(place));
        _mm256_add_ps(_mm256_add_ps(_mm256_cvtepi32_ps(inside), outside(below)), outside(above))
    }

    /// Squared distances to 4-bit levels and [`EIGHT_WEIGHT`] times those to 8-bit levels, where the minimum is at `at` (less half
    /// a step) and the maximum `span` further.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn both(&self, span: __m256i, at: __m256i) -> __m256i {
        let (low, middle) = (_mm256_set1_epi16(4095), _mm256_set1_epi16(2048));
        let (lowest, center) = (_mm256_set1_epi16(255), _mm256_set1_epi16(128));
        let (mut four, mut eight) = (_mm256_setzero_si256(), _mm256_setzero_si256());
        for places in self.places {
            let at = _mm256_add_epi16(_mm256_mulhi_epu16(places, span), at);
            let coarse = _mm256_sub_epi16(_mm256_and_si256(at, low), middle);
            let fine = _mm256_sub_epi16(_mm256_and_si256(at, lowest), center);
            four = _mm256_add_epi32(four, _mm256_madd_epi16(coarse, coarse));
            eight = _mm256_add_epi32(eight, _mm256_madd_epi16(fine, fine));
        }
        _mm256_add_epi32(four, _mm256_mullo_epi32(eight, _mm256_set1_epi32(EIGHT_WEIGHT)))
    }
}

/// The lower half of each lane, in both halves.
#[target_feature(enable = "avx2")]
#[inline]
fn twice(values: __m256i) -> __m256i {
    let low = _mm256_and_si256(values, _mm256_set1_epi32(0xffff));
    _mm256_or_si256(low, _mm256_slli_epi32::<16>(values))
}

#[target_feature(enable = "avx2")]
#[inline]
fn outside(beyond: __m256) -> __m256 {
    let each = _mm256_mul_ps(_mm256_set1_ps(EIGHT_WEIGHT as f32), _mm256_add_ps(beyond, _mm256_set1_ps(512.0)));
    _mm256_mul_ps(beyond, _mm256_add_ps(each, _mm256_set1_ps(8192.0)))
}
