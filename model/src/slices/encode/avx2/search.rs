//! Scales and offsets of eight groups at once, one group a 32-bit lane.
//!
//! A lane holds two neighbouring weights as 16-bit places between the group's least and greatest: a place times the
//! span, its upper half, is a position in 256ths of an 8-bit step, and what is left of it below a step is the distance
//! to a level. Whole numbers may be added in any order, so only the few constants of a candidate must be computed as the
//! portable encoder does.

use std::arch::x86_64::*;

use super::VECTORS;
use crate::slices::{
    GROUP,
    encode::{EIGHT_WEIGHT, HIGHS, LOWS, NEAR, PLACES},
};

/// Pairs of weights of a group.
const PAIRS: usize = GROUP / 2;

/// One group of each of eight rows.
pub(super) struct Groups {
    /// Two places a lane.
    places: [__m256i; PAIRS],
    min: __m256,
    range: __m256,
    /// What stands where nothing is better, f16.
    first: (__m128i, __m128i),
}

impl Groups {
    /// `None` if the first scale or offset of a group exceeds f16.
    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn of(weights: &[[f32; GROUP]; 8], min: __m256, max: __m256) -> Option<Self> {
        let range = _mm256_sub_ps(max, min);
        let s = _mm256_div_ps(range, _mm256_set1_ps(247.0));
        let m = _mm256_sub_ps(min, _mm256_mul_ps(_mm256_set1_ps(4.0), s));
        let first = (half(s), half(m));
        let sizes = _mm_max_epi16(first.0, _mm_and_si128(first.1, _mm_set1_epi16(0x7fff)));
        if _mm_movemask_epi8(_mm_cmpgt_epi16(sizes, _mm_set1_epi16(0x7bff))) != 0 {
            return None;
        }
        // A range of zero makes places of no meaning, and a group without candidates: its first scale stands.
        let (mut mins, mut factors) = ([0.0f32; 8], [0.0f32; 8]);
        let mut pairs = [[0u32; 8]; PAIRS];
        // SAFETY: eight elements each.
        unsafe {
            _mm256_storeu_ps(mins.as_mut_ptr(), min);
            _mm256_storeu_ps(factors.as_mut_ptr(), _mm256_div_ps(_mm256_set1_ps(PLACES), range));
        }
        for (row, weights) in weights.iter().enumerate() {
            let (min, factor) = (_mm256_set1_ps(mins[row]), _mm256_set1_ps(factors[row]));
            let place = |index: usize| {
                // SAFETY: inside the array.
                let w = unsafe { _mm256_loadu_ps(weights.as_ptr().add(8 * index)) };
                _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(w, min), factor))
            };
            let v: [__m256i; VECTORS] = std::array::from_fn(place);
            // In which order pairs lie does not matter: they are only added.
            for (half, packed) in
                [_mm256_packus_epi32(v[0], v[1]), _mm256_packus_epi32(v[2], v[3])].into_iter().enumerate()
            {
                let mut eight = [0u32; 8];
                // SAFETY: 32 bytes.
                unsafe { _mm256_storeu_si256(eight.as_mut_ptr().cast(), packed) };
                for (into, pair) in pairs[8 * half..].iter_mut().zip(eight) {
                    into[row] = pair;
                }
            }
        }
        // SAFETY: 32 bytes each.
        let places = std::array::from_fn(|pair| unsafe { _mm256_loadu_si256(pairs[pair].as_ptr().cast()) });
        Some(Self { places, min, range, first })
    }

    /// Scales and offsets, f16.
    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn best(&self) -> (__m128i, __m128i) {
        let ends = self.coarse();
        self.fine(ends)
    }

    #[target_feature(enable = "avx2,f16c")]
    fn coarse(&self) -> (__m256, __m256) {
        let mut least = _mm256_set1_ps(f32::INFINITY);
        let mut best = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for low in LOWS {
            for high in HIGHS {
                let span = high - low;
                let four =
                    self.four(_mm256_set1_epi16((256 * span) as i16), _mm256_set1_epi16((256 * low + 128) as i16));
                let cost = _mm256_div_ps(_mm256_cvtepi32_ps(four), _mm256_set1_ps((span * span) as f32));
                let better = _mm256_cmp_ps::<_CMP_LT_OQ>(cost, least);
                least = _mm256_blendv_ps(least, cost, better);
                best.0 = _mm256_blendv_ps(best.0, _mm256_set1_ps(low as f32), better);
                best.1 = _mm256_blendv_ps(best.1, _mm256_set1_ps(high as f32), better);
            }
        }
        best
    }

    #[target_feature(enable = "avx2,f16c")]
    fn fine(&self, ends: (__m256, __m256)) -> (__m128i, __m128i) {
        let (mut s, mut m) = (_mm256_cvtph_ps(self.first.0), _mm256_cvtph_ps(self.first.1));
        let mut least = self.cost(s, m);
        for lower in NEAR {
            let low = _mm256_add_ps(ends.0, _mm256_set1_ps(lower));
            for upper in NEAR {
                let high = _mm256_add_ps(ends.1, _mm256_set1_ps(upper));
                let scale = _mm256_div_ps(self.range, _mm256_sub_ps(high, low));
                let offset = _mm256_sub_ps(self.min, _mm256_mul_ps(low, scale));
                let (scale, offset) = (_mm256_cvtph_ps(half(scale)), _mm256_cvtph_ps(half(offset)));
                let cost = self.cost(scale, offset);
                let better = _mm256_cmp_ps::<_CMP_LT_OQ>(cost, least);
                least = _mm256_blendv_ps(least, cost, better);
                s = _mm256_blendv_ps(s, scale, better);
                m = _mm256_blendv_ps(m, offset, better);
            }
        }
        // A first scale of zero stands: whatever else there is would be a guess.
        let zero = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_EQ_OQ>(_mm256_cvtph_ps(self.first.0), _mm256_setzero_ps()));
        let zero = _mm_packs_epi32(_mm256_castsi256_si128(zero), _mm256_extracti128_si256::<1>(zero));
        (_mm_andnot_si128(zero, half(s)), _mm_blendv_epi8(half(m), self.first.1, zero))
    }

    /// What four and eight bits together lose with these scales and offsets; infinite where there is no such thing.
    #[target_feature(enable = "avx2,f16c")]
    fn cost(&self, s: __m256, m: __m256) -> __m256 {
        let (zero, infinity) = (_mm256_setzero_ps(), _mm256_set1_ps(f32::INFINITY));
        let step = _mm256_set1_ps(256.0);
        let at = _mm256_mul_ps(_mm256_div_ps(_mm256_sub_ps(self.min, m), s), step);
        let span = _mm256_mul_ps(_mm256_div_ps(self.range, s), step);
        let below = _mm256_max_ps(_mm256_sub_ps(_mm256_set1_ps(-128.0), at), zero);
        let above = _mm256_max_ps(_mm256_sub_ps(_mm256_add_ps(at, span), _mm256_set1_ps(65408.0)), zero);
        let rounded = |value: __m256, least: f32, most: f32| {
            let clamped = _mm256_min_ps(_mm256_max_ps(value, _mm256_set1_ps(least)), _mm256_set1_ps(most));
            _mm256_cvtps_epi32(clamped)
        };
        let place = _mm256_add_epi32(rounded(at, -30000.0, 30000.0), _mm256_set1_epi32(128));
        let inside = self.both(twice(rounded(span, 0.0, 65535.0)), twice(place));
        let cost = _mm256_add_ps(_mm256_add_ps(_mm256_cvtepi32_ps(inside), outside(below)), outside(above));
        let cost = _mm256_mul_ps(cost, _mm256_mul_ps(s, s));
        let is = |s: __m256| _mm256_cmp_ps::<_CMP_LT_OQ>(s, infinity);
        let magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0), m);
        let some = _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(s, zero), _mm256_and_ps(is(s), is(magnitude)));
        _mm256_blendv_ps(infinity, cost, some)
    }

    /// Squared distances to 4-bit levels, where the minimum is at `at` (less half a step) and the maximum `span` further.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn four(&self, span: __m256i, at: __m256i) -> __m256i {
        let (low, middle) = (_mm256_set1_epi16(4095), _mm256_set1_epi16(2048));
        let mut sum = _mm256_setzero_si256();
        for places in self.places {
            let at = _mm256_add_epi16(_mm256_mulhi_epu16(places, span), at);
            let coarse = _mm256_sub_epi16(_mm256_and_si256(at, low), middle);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(coarse, coarse));
        }
        sum
    }

    /// The same, and [`EIGHT_WEIGHT`] times the squared distances to 8-bit levels.
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

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn half(values: __m256) -> __m128i {
    _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values)
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
    let each = _mm256_mul_ps(_mm256_set1_ps(32.0), _mm256_add_ps(beyond, _mm256_set1_ps(768.0)));
    _mm256_mul_ps(beyond, each)
}
