//! Sixteen f32 lanes: the unit in which every CPU kernel adds.
//!
//! Owns the order of floating-point addition. A sum over a vector is kept in 16 partial sums, lane `l` holding the
//! elements at `16 i + l`, which are then added as a fixed tree (8 + 8, 4 + 4, 2 + 2, 1 + 1). A product is added to its
//! partial sum with one rounding, by a fused multiply-add. So the portable, AVX2 and AVX-512 forms of [`Lanes`] give
//! the same bits, and a result does not depend on how rows are blocked.

// Loops over lanes and tiles index several arrays at once and unroll to registers; iterators would hide both.
#![allow(clippy::needless_range_loop)]

use half::f16;

/// Sixteen f32 values in registers.
///
/// # Safety
/// Implementations may use instructions the machine lacks: call them only below a function that enables the
/// instruction set and was reached through an [`Isa`](super::isa::Isa). Pointers must be readable (or writable) for
/// 16 elements; they need no alignment.
pub(super) trait Lanes: Copy {
    unsafe fn zero() -> Self;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    /// Sixteen packed BF16 values, converted exactly.
    unsafe fn load_bf16(from: *const u8) -> Self;
    /// Sixteen packed F16 values, converted exactly.
    unsafe fn load_f16(from: *const u8) -> Self;
    /// Sixteen packed F32 values.
    #[inline(always)]
    unsafe fn load_f32(from: *const u8) -> Self {
        match cfg!(target_endian = "little") {
            // SAFETY: `from` is readable for 16 elements and needs no alignment, by the trait's contract.
            true => unsafe { Self::load(from.cast()) },
            // SAFETY: as above; the array that is loaded has 16 elements.
            false => unsafe {
                let raw = from.cast::<[[u8; 4]; LANES]>().read_unaligned().map(f32::from_le_bytes);
                Self::load(raw.as_ptr())
            },
        }
    }
    unsafe fn store(self, to: *mut f32);
    /// Asks for the cache line at `at`, which need not be readable.
    fn fetch(at: *const u8);
    /// `self + x * w`, rounded once.
    unsafe fn add_product(self, x: Self, w: Self) -> Self;
    /// The fixed tree.
    unsafe fn sum(self) -> f32;
}

/// Number of lanes.
pub(super) const LANES: usize = 16;

#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

impl Lanes for Portable {
    #[inline(always)]
    unsafe fn zero() -> Self {
        Portable([0.0; LANES])
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Portable([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: readable for 16 elements, by the trait's contract.
        Portable(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self {
        // SAFETY: readable for 16 elements of 2 bytes, by the trait's contract.
        let raw = unsafe { from.cast::<[[u8; 2]; LANES]>().read_unaligned() };
        let mut out = [0.0; LANES];
        for lane in 0..LANES {
            out[lane] = f32::from_bits((u16::from_le_bytes(raw[lane]) as u32) << 16);
        }
        Portable(out)
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        // SAFETY: readable for 16 elements of 2 bytes, by the trait's contract.
        let raw = unsafe { from.cast::<[[u8; 2]; LANES]>().read_unaligned() };
        Portable(raw.map(|raw| f16::from_le_bytes(raw).to_f32()))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: writable for 16 elements, by the trait's contract.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    fn fetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn add_product(self, x: Self, w: Self) -> Self {
        let mut out = self.0;
        for lane in 0..LANES {
            out[lane] = x.0[lane].mul_add(w.0[lane], out[lane]);
        }
        Portable(out)
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let v = self.0;
        let mut half = [0.0; 8];
        for lane in 0..8 {
            half[lane] = v[lane] + v[lane + 8];
        }
        let mut quarter = [0.0; 4];
        for lane in 0..4 {
            quarter[lane] = half[lane] + half[lane + 4];
        }
        (quarter[0] + quarter[2]) + (quarter[1] + quarter[3])
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Lanes;

    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512(__m512);

    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2(__m256, __m256);

    #[inline(always)]
    unsafe fn sum_4(v: __m128) -> f32 {
        // SAFETY: the caller enables AVX or more, which includes SSE.
        unsafe {
            let pairs = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(pairs, _mm_shuffle_ps::<1>(pairs, pairs)))
        }
    }

    #[inline(always)]
    unsafe fn sum_8(v: __m256) -> f32 {
        // SAFETY: the caller enables AVX or more.
        unsafe { sum_4(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v))) }
    }

    impl Lanes for Avx512 {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: AVX-512 is enabled, by the trait's contract.
            unsafe { Avx512(_mm512_setzero_ps()) }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: AVX-512 is enabled, by the trait's contract.
            unsafe { Avx512(_mm512_set1_ps(value)) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: AVX-512 is enabled and `from` is readable for 16 elements, by the trait's contract.
            unsafe { Avx512(_mm512_loadu_ps(from)) }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const u8) -> Self {
            // SAFETY: AVX-512 is enabled and `from` is readable for 16 elements of two bytes, by the trait's contract.
            unsafe {
                let raw = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(raw)))
            }
        }

        #[inline(always)]
        unsafe fn load_f16(from: *const u8) -> Self {
            // SAFETY: AVX-512 is enabled and `from` is readable for 16 elements of two bytes, by the trait's contract.
            unsafe { Avx512(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: AVX-512 is enabled and `to` is writable for 16 elements, by the trait's contract.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        fn fetch(at: *const u8) {
            // SAFETY: a hint, which reads nothing; every x86-64 has it.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }

        #[inline(always)]
        unsafe fn add_product(self, x: Self, w: Self) -> Self {
            // SAFETY: AVX-512 is enabled, by the trait's contract.
            unsafe { Avx512(_mm512_fmadd_ps(x.0, w.0, self.0)) }
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: AVX-512 is enabled, by the trait's contract.
            unsafe {
                let high = _mm512_extractf32x8_ps::<1>(self.0);
                sum_8(_mm256_add_ps(_mm512_castps512_ps256(self.0), high))
            }
        }
    }

    impl Lanes for Avx2 {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: AVX2 is enabled, by the trait's contract.
            unsafe { Avx2(_mm256_setzero_ps(), _mm256_setzero_ps()) }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: AVX2 is enabled, by the trait's contract.
            unsafe { Avx2(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: AVX2 is enabled and `from` is readable for 16 elements, by the trait's contract.
            unsafe { Avx2(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const u8) -> Self {
            // SAFETY: AVX2 is enabled and `from` is readable for 16 elements of two bytes, by the trait's contract.
            unsafe { Avx2(widen_8(from), widen_8(from.add(16))) }
        }

        #[inline(always)]
        unsafe fn load_f16(from: *const u8) -> Self {
            // SAFETY: AVX2 is enabled and `from` is readable for 16 elements of two bytes, by the trait's contract.
            unsafe {
                let (low, high) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(16).cast()));
                Avx2(_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
            }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: AVX2 is enabled and `to` is writable for 16 elements, by the trait's contract.
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }

        #[inline(always)]
        fn fetch(at: *const u8) {
            // SAFETY: a hint, which reads nothing; every x86-64 has it.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }

        #[inline(always)]
        unsafe fn add_product(self, x: Self, w: Self) -> Self {
            // SAFETY: AVX2 is enabled, by the trait's contract.
            unsafe { Avx2(_mm256_fmadd_ps(x.0, w.0, self.0), _mm256_fmadd_ps(x.1, w.1, self.1)) }
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: AVX2 is enabled, by the trait's contract.
            unsafe { sum_8(_mm256_add_ps(self.0, self.1)) }
        }
    }

    #[inline(always)]
    unsafe fn widen_8(from: *const u8) -> __m256 {
        // SAFETY: the caller enables AVX2, and `from` is readable for eight elements of two bytes.
        unsafe {
            let raw = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(raw))
        }
    }
}
