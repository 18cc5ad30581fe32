//! The two constants of a group of weights, in sixteen bits.
//!
//! Owns [`Constants`]: a scale, and a zero point, which is the level of a weight of 0. The invariant: both, and the offsets
//! that kernels derive from them, are exact in f32, so results do not depend on the order of operations. Bits of 0 mean a
//! scale of 0: a group of zeros only, or a row past the matrix's last.
//!
//! The upper nine bits are the scale, a float with five bits of exponent and four of mantissa. The lower seven bits count
//! zero points from [`LOWEST_ZERO`] in steps of [`ZERO_STEP`]. A step is a quarter of a level more than two levels, so that
//! a group can be aligned with the levels in four ways. `docs/slices.md` has the format to the bit.

/// Subtracted from the bits of an f32 before its mantissa is cut to four bits, which gives the code of a scale.
const EXPONENT_BIAS: i32 = (127 - 26) << 23;
/// Lower bits of an f32 that a scale does not have.
const CUT: u32 = 19;
/// The largest code of a scale; 0 is a scale of 0.
pub(crate) const SCALE_MOST: i32 = 511;
/// The largest number of a zero point.
pub const ZERO_MOST: i32 = 127;
/// Levels from one zero point to the next.
pub(crate) const ZERO_STEP: f32 = 2.25;
/// The level of zero point number 0.
pub(crate) const LOWEST_ZERO: f32 = -16.0;
/// The middle of the sixteen levels that share a high nibble.
pub(crate) const MIDDLE: f32 = 7.5;

/// Scale and zero point of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Constants(pub u16);

impl Constants {
    /// The scale of code `scale`, at most [`SCALE_MOST`], and zero point number `zero`, at most [`ZERO_MOST`].
    #[inline]
    pub const fn new(scale: i32, zero: i32) -> Self {
        Self((scale << 7 | zero) as u16)
    }

    #[inline]
    pub const fn from_le_bytes(bytes: [u8; 2]) -> Self {
        Self(u16::from_le_bytes(bytes))
    }

    /// The code of the least scale that is at least `value`, which must not be negative; it may be beyond
    /// [`SCALE_MOST`].
    #[inline]
    pub const fn scale_code(value: f32) -> i32 {
        let above = (value.to_bits() as i32 - EXPONENT_BIAS + (1 << CUT) - 1) >> CUT;
        if above < 1 { 1 } else { above }
    }

    #[inline]
    pub const fn scale(self) -> f32 {
        match self.0 >> 7 {
            0 => 0.0,
            code => f32::from_bits((((code as i32) << CUT) + EXPONENT_BIAS) as u32),
        }
    }

    /// The level of a weight of 0.
    #[inline]
    pub const fn zero(self) -> f32 {
        LOWEST_ZERO + ZERO_STEP * (self.0 & 127) as f32
    }

    /// Added to scale times level at Q8.
    #[inline]
    pub const fn offset(self) -> f32 {
        self.scale() * -self.zero()
    }

    /// Added to scale times sixteen times the high nibble at Q4.
    #[inline]
    pub const fn middle_offset(self) -> f32 {
        self.scale() * (MIDDLE - self.zero())
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    /// Constants of eight rows, read by AVX2.
    pub struct Avx2;

    /// Constants of sixteen rows, read by AVX-512.
    pub struct Avx512;

    impl Avx2 {
        /// [`Constants::scale_code`] of eight values.
        #[target_feature(enable = "avx2")]
        #[inline]
        pub(crate) fn scale_code(values: __m256) -> __m256i {
            let up = _mm256_set1_epi32((1 << CUT) - 1 - EXPONENT_BIAS);
            let above = _mm256_srai_epi32::<{ CUT as i32 }>(_mm256_add_epi32(_mm256_castps_si256(values), up));
            _mm256_max_epi32(above, _mm256_set1_epi32(1))
        }

        /// Scales, and offsets at Q8 if `refined`, else at Q4, of eight constants of 32 bits each.
        ///
        /// # Safety
        /// The machine has AVX2 and FMA.
        #[target_feature(enable = "avx2,fma")]
        #[inline]
        pub fn read(constants: __m256i, refined: bool) -> (__m256, __m256) {
            let code = _mm256_and_si256(constants, _mm256_set1_epi32(0xFF80));
            let bits = _mm256_add_epi32(_mm256_slli_epi32::<12>(code), _mm256_set1_epi32(EXPONENT_BIAS));
            let none = _mm256_cmpeq_epi32(code, _mm256_setzero_si256());
            let scale = _mm256_castsi256_ps(_mm256_andnot_si256(none, bits));
            let number = _mm256_cvtepi32_ps(_mm256_and_si256(constants, _mm256_set1_epi32(127)));
            let from = if refined { -LOWEST_ZERO } else { MIDDLE - LOWEST_ZERO };
            let levels = _mm256_fnmadd_ps(number, _mm256_set1_ps(ZERO_STEP), _mm256_set1_ps(from));
            (scale, _mm256_mul_ps(scale, levels))
        }
    }

    impl Avx512 {
        /// [`Avx2::read`] of sixteen constants.
        ///
        /// # Safety
        /// The machine has AVX-512 F and BW.
        #[target_feature(enable = "avx512f,avx512bw")]
        #[inline]
        pub fn read(constants: __m512i, refined: bool) -> (__m512, __m512) {
            let upper = _mm512_set1_epi32(0xFF80);
            let code = _mm512_and_si512(constants, upper);
            let some = _mm512_test_epi32_mask(constants, upper);
            let bits = _mm512_maskz_add_epi32(some, _mm512_slli_epi32::<12>(code), _mm512_set1_epi32(EXPONENT_BIAS));
            let scale = _mm512_castsi512_ps(bits);
            let number = _mm512_cvtepi32_ps(_mm512_and_si512(constants, _mm512_set1_epi32(127)));
            let from = if refined { -LOWEST_ZERO } else { MIDDLE - LOWEST_ZERO };
            let levels = _mm512_fnmadd_ps(number, _mm512_set1_ps(ZERO_STEP), _mm512_set1_ps(from));
            (scale, _mm512_mul_ps(scale, levels))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_scales_there_are() {
        assert_eq!((Constants::default().scale(), Constants(127).scale()), (0.0, 0.0));
        assert_eq!(Constants::new(26 << 4, 0).scale(), 1.0);
        assert_eq!(Constants::new((27 << 4) + 8, 0).scale(), 3.0);
        assert_eq!(Constants::new(SCALE_MOST, 0).scale(), 62.0);
        for code in 1..=SCALE_MOST {
            let scale = Constants::new(code, 0).scale();
            assert_eq!(Constants::scale_code(scale), code);
            assert_eq!(Constants::scale_code(scale.next_up()), code + 1);
            assert_eq!(Constants::scale_code(scale.next_down()), code);
        }
        assert_eq!((Constants::scale_code(0.0), Constants::scale_code(1e-30)), (1, 1));
        assert!(Constants::scale_code(f32::MAX) > SCALE_MOST);
    }

    #[test]
    fn offsets_are_exact() {
        for constants in (0..=u16::MAX).map(Constants) {
            let (scale, zero) = (f64::from(constants.scale()), f64::from(constants.zero()));
            assert_eq!(zero, f64::from(constants.0 & 127) * 2.25 - 16.0);
            assert_eq!(f64::from(constants.offset()), scale * -zero);
            assert_eq!(f64::from(constants.middle_offset()), scale * (7.5 - zero));
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn vectors_read_what_one_reads() {
        use std::arch::x86_64::*;

        use crate::isa::{Isa, Level};

        #[target_feature(enable = "avx2,fma")]
        fn avx2(eight: [i32; 8], refined: bool) -> ([f32; 8], [f32; 8]) {
            let (mut scales, mut offsets) = ([0.0; 8], [0.0; 8]);
            // SAFETY: the arrays have 32 bytes each, and this function enables what `read` needs.
            unsafe {
                let (scale, offset) = Avx2::read(_mm256_loadu_si256(eight.as_ptr().cast()), refined);
                _mm256_storeu_ps(scales.as_mut_ptr(), scale);
                _mm256_storeu_ps(offsets.as_mut_ptr(), offset);
            }
            (scales, offsets)
        }

        #[target_feature(enable = "avx512f,avx512bw")]
        fn avx512(sixteen: [i32; 16], refined: bool) -> ([f32; 16], [f32; 16]) {
            let (mut scales, mut offsets) = ([0.0; 16], [0.0; 16]);
            // SAFETY: the arrays have 64 bytes each, and this function enables what `read` needs.
            unsafe {
                let (scale, offset) = Avx512::read(_mm512_loadu_si512(sixteen.as_ptr().cast()), refined);
                _mm512_storeu_ps(scales.as_mut_ptr(), scale);
                _mm512_storeu_ps(offsets.as_mut_ptr(), offset);
            }
            (scales, offsets)
        }

        let has = |level| Isa::best().level() >= level;
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        for first in (0..=u16::MAX).step_by(16) {
            let sixteen: [u16; 16] = std::array::from_fn(|index| first + index as u16);
            let scales = sixteen.map(|constants| Constants(constants).scale());
            for refined in [false, true] {
                let offsets = sixteen.map(|constants| match refined {
                    true => Constants(constants).offset(),
                    false => Constants(constants).middle_offset(),
                });
                // A scale of 0 may make an offset of -0.0: as a sum's addend it is 0.
                let plain = |values: &[f32]| bits(&values.iter().map(|value| value + 0.0).collect::<Vec<_>>());
                let wide = sixteen.map(i32::from);
                if has(Level::Avx2) {
                    for half in [0, 8] {
                        let eight = wide[half..half + 8].try_into().unwrap();
                        // SAFETY: an `Isa` exists only for a set this machine has, and larger sets include smaller ones.
                        let found = unsafe { avx2(eight, refined) };
                        assert_eq!(bits(&found.0), bits(&scales[half..half + 8]));
                        assert_eq!(plain(&found.1), plain(&offsets[half..half + 8]));
                    }
                }
                if has(Level::Avx512) {
                    // SAFETY: an `Isa` exists only for a set this machine has, and larger sets include smaller ones.
                    let found = unsafe { avx512(wide, refined) };
                    assert_eq!((bits(&found.0), plain(&found.1)), (bits(&scales), plain(&offsets)));
                }
            }
        }
    }
}
