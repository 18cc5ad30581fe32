//! Activations as int8: the input of sliced matrices.
//!
//! Owns [`Quantized`] and its arithmetic. A row's values are grouped by [`GROUP`] columns. With `a` the largest
//! magnitude of a group, the scale is `d = a / 127` and a value becomes `x * (127 / a)`, rounded to the nearest integer
//! (ties to even), which is within +-127; beside the values stand `d` and `d * (their sum)`. A group whose largest
//! magnitude is below [`TINY`] is zero. A group with a NaN or an infinity has `d = NaN`, which every output that reads
//! it becomes. Each step is one IEEE operation or exact, so every instruction set gives the same bits.
//!
//! The layout is `[groups, n, 32]`: groups are outermost, then rows. So the rows of one tile of a batch are neighbours at
//! every group, and the rows of a batch do not compete for the same cache sets. The invariant: a quantized group depends
//! on its own 32 values alone.

use super::{
    isa::{Isa, Level},
    threads::{Pool, Shares},
};
use coel_weights::slices::GROUP;

/// Below this largest magnitude a group counts as zero: 127 / a would leave f32's range.
const TINY: f32 = 1e-35;

/// Rows a worker quantizes at once: fewer are not worth a second thread.
const ROWS_AT_ONCE: usize = 8;

/// Rows of a batch, quantized.
#[derive(Debug, Default)]
pub struct Quantized {
    rows: usize,
    groups: usize,
    /// `[groups, rows]`
    values: Vec<Values>,
    /// `[groups, rows]`
    scales: Vec<Scale>,
}

/// The 32 values of a group of a row.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(32))]
pub struct Values(pub [i8; GROUP]);

/// The scale of a group of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Scale {
    /// `d`
    pub step: f32,
    /// `d * (sum of the values)`
    pub sum: f32,
}

/// A read-only view of [`Quantized`] rows.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    rows: usize,
    groups: usize,
    values: &'a [Values],
    scales: &'a [Scale],
}

impl Quantized {
    /// Resizes to `rows` rows of `cols` values, a multiple of [`GROUP`]. The content is then unspecified.
    pub fn reset(&mut self, rows: usize, cols: usize) {
        assert!(cols.is_multiple_of(GROUP));
        (self.rows, self.groups) = (rows, cols / GROUP);
        self.values.resize(self.groups * rows, Values::default());
        self.scales.resize(self.groups * rows, Scale::default());
    }

    /// Quantizes `x [n, cols]`.
    pub fn fill(&mut self, pool: &mut Pool, isa: Isa, x: &[f32], cols: usize) {
        assert!(cols > 0 && x.len().is_multiple_of(cols));
        self.reset(x.len() / cols, cols);
        let slots = self.slots();
        pool.each(slots.rows, ROWS_AT_ONCE, |_, row| {
            for (group, x) in x[row * cols..][..cols].as_chunks::<GROUP>().0.iter().enumerate() {
                // SAFETY: a row is given to one worker only, and nobody reads before all are done.
                unsafe { slots.put(isa, group, row, x) };
            }
        });
    }

    /// For workers that fill different groups or rows.
    pub(super) fn slots(&mut self) -> Slots<'_> {
        Slots { rows: self.rows, values: Shares::of(&mut self.values), scales: Shares::of(&mut self.scales) }
    }

    pub fn view(&self) -> View<'_> {
        View { rows: self.rows, groups: self.groups, values: &self.values, scales: &self.scales }
    }
}

/// Where workers store groups.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slots<'a> {
    rows: usize,
    values: Shares<'a, Values>,
    scales: Shares<'a, Scale>,
}

impl Slots<'_> {
    /// Quantizes group `group` of row `row`.
    ///
    /// # Safety
    /// Nobody else reads or fills this group of this row meanwhile.
    pub(super) unsafe fn put(&self, isa: Isa, group: usize, row: usize, x: &[f32; GROUP]) {
        let at = group * self.rows + row;
        // SAFETY: nobody else reads or fills this group of this row meanwhile, as the caller promises.
        let (values, scale) = unsafe { (self.values.part(at, 1), self.scales.part(at, 1)) };
        scale[0] = quantize(isa, x, &mut values[0]);
    }
}

impl<'a> View<'a> {
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn groups(&self) -> usize {
        self.groups
    }

    /// Values and scale of a group of a row.
    pub fn group(&self, group: usize, row: usize) -> (&'a [i8; GROUP], Scale) {
        assert!(row < self.rows);
        let at = group * self.rows + row;
        (&self.values[at].0, self.scales[at])
    }

    pub(super) fn as_ptrs(&self) -> (*const Values, *const Scale) {
        (self.values.as_ptr(), self.scales.as_ptr())
    }
}

/// Quantizes one group.
pub fn quantize(isa: Isa, x: &[f32; GROUP], values: &mut Values) -> Scale {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn avx2(x: &[f32; GROUP], values: &mut Values) -> Scale {
        quantize_body(x, values)
    }
    match isa.level() {
        Level::Portable => quantize_body(x, values),
        // SAFETY: an `Isa` exists only for a set this machine has.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2(x, values) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { quantize_avx512(x, values) },
    }
}

/// [`quantize_body`] in two vectors; the conversion to integers rounds ties to even.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantize_avx512(x: &[f32; GROUP], values: &mut Values) -> Scale {
    use std::arch::x86_64::*;
    let mask = _mm512_set1_epi32(MAGNITUDE as i32);
    // SAFETY: the array has 32 floats: two loads of sixteen.
    let halves = unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))] };
    let [low, high] = halves.map(|half| _mm512_and_si512(_mm512_castps_si512(half), mask));
    let Some((step, scale)) = scales(_mm512_reduce_max_epi32(_mm512_max_epi32(low, high)) as u32) else {
        return quantize_body(x, values);
    };
    let scale = _mm512_set1_ps(scale);
    let [low, high] = halves.map(|half| _mm512_cvtps_epi32(_mm512_mul_ps(half, scale)));
    let packed = _mm256_set_m128i(_mm512_cvtsepi32_epi8(high), _mm512_cvtsepi32_epi8(low));
    // SAFETY: `values` has 32 bytes, which is what is stored.
    unsafe { _mm256_storeu_si256(values.0.as_mut_ptr().cast(), packed) };
    Scale { step, sum: step * _mm512_reduce_add_epi32(_mm512_add_epi32(low, high)) as f32 }
}

/// The bits of a magnitude.
const MAGNITUDE: u32 = 0x7FFF_FFFF;

/// `d` and `127 / a` for a group whose largest magnitude has these bits; `None` if its values are not to be divided.
#[inline(always)]
fn scales(most: u32) -> Option<(f32, f32)> {
    let most = f32::from_bits(most);
    (TINY..f32::INFINITY).contains(&most).then(|| (most / 127.0, 127.0 / most))
}

#[inline(always)]
fn quantize_body(x: &[f32; GROUP], values: &mut Values) -> Scale {
    // Magnitudes compare like their bits, infinity and NaN above everything else.
    let most = x.iter().fold(0, |most, x| most.max(x.to_bits() & MAGNITUDE));
    let Some((step, scale)) = scales(most) else {
        *values = Values::default();
        let step = if f32::from_bits(most).is_finite() { 0.0 } else { f32::NAN };
        return Scale { step, sum: step };
    };
    // Adding 1.5 * 2^23 rounds to an integer, ties to even, which is then found in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let mut sum = 0;
    for (value, x) in values.0.iter_mut().zip(x) {
        // At most 127: the division and the product each round by half a unit in the last place.
        let whole = (x * scale + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
        sum += whole;
        *value = whole as i8;
    }
    Scale { step, sum: step * sum as f32 }
}
