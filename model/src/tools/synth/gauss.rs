//! Normally distributed weights that anyone can make again.
//!
//! A weight is one of 65536 equally likely quantiles of the normal distribution, picked by 16 bits of a hash of tensor
//! and position. So any range of any tensor is made without what comes before it, and the bytes depend on the seed
//! alone: the quantiles come from additions, multiplications and divisions, which round alike everywhere.

use half::{bf16, f16};

use coel_weights::matrix::DType;

const QUANTILES: usize = 1 << 16;
/// Quantiles from the end for which one step of the integration is too long.
const TAIL: usize = 64;
const TAIL_STEPS: usize = 16;

/// The packed quantiles of one element type and deviation.
pub(super) struct Gauss {
    dtype: DType,
    /// Little-endian elements, the bytes of the type's size first.
    packed: Vec<[u8; 4]>,
}

impl Gauss {
    pub(super) fn new(dtype: DType, deviation: f64) -> Self {
        let upper = upper_quantiles();
        let all = upper.iter().rev().map(|x| -x).chain(upper.iter().copied());
        let packed = all.map(|x| pack(dtype, (x * deviation) as f32)).collect();
        Self { dtype, packed }
    }

    /// Writes the elements of the tensor `key` from element `first` on.
    pub(super) fn fill(&self, key: u64, first: u64, out: &mut [u8]) {
        match self.dtype {
            DType::BF16 | DType::F16 => self.fill_as::<2>(key, first, out),
            DType::F32 => self.fill_as::<4>(key, first, out),
        }
    }

    fn fill_as<const N: usize>(&self, key: u64, first: u64, out: &mut [u8]) {
        let packed: &[[u8; 4]; QUANTILES] = self.packed.as_slice().try_into().expect("all quantiles");
        let pick = |word: u64, lane: u64| &packed[usize::from((word >> (16 * lane)) as u16)][..N];
        let mut elements = out.as_chunks_mut::<N>().0;
        let mut at = first;
        // Four elements a word, but for the ends.
        while !elements.is_empty() && (!at.is_multiple_of(4) || elements.len() < 4) {
            elements[0].copy_from_slice(pick(word(key, at / 4), at % 4));
            (elements, at) = (&mut elements[1..], at + 1);
        }
        let (fours, rest) = elements.as_chunks_mut::<4>();
        for four in fours {
            let word = word(key, at / 4);
            for (lane, element) in four.iter_mut().enumerate() {
                element.copy_from_slice(pick(word, lane as u64));
            }
            at += 4;
        }
        for element in rest {
            element.copy_from_slice(pick(word(key, at / 4), at % 4));
            at += 1;
        }
    }
}

/// One element, repeated.
pub(super) fn pack(dtype: DType, value: f32) -> [u8; 4] {
    match dtype {
        DType::BF16 => u32::from(bf16::from_f32(value).to_bits()).to_le_bytes(),
        DType::F16 => u32::from(f16::from_f32(value).to_bits()).to_le_bytes(),
        DType::F32 => value.to_le_bytes(),
    }
}

/// The hash of a tensor's name under a seed.
pub(super) fn key(seed: u64, name: &str) -> u64 {
    name.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)))
}

fn word(key: u64, index: u64) -> u64 {
    mix(key.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The quantiles at `1/2 + (i + 1/2) / 65536` of the normal distribution, ascending: with x the quantile of p and g the
/// density at x, x' = 1/g and g' = -x, integrated by Runge and Kutta's method from the middle outwards. Within 2e-7.
fn upper_quantiles() -> Vec<f64> {
    let step = 1.0 / QUANTILES as f64;
    // 1 / sqrt(2 pi)
    let mut state = (0.0, 0.398_942_280_401_432_7);
    let advance = |(x, g): (f64, f64), d: f64| {
        let slope = |x: f64, g: f64| (1.0 / g, -x);
        let (a1, b1) = slope(x, g);
        let (a2, b2) = slope(x + d / 2.0 * a1, g + d / 2.0 * b1);
        let (a3, b3) = slope(x + d / 2.0 * a2, g + d / 2.0 * b2);
        let (a4, b4) = slope(x + d * a3, g + d * b3);
        (x + d / 6.0 * (a1 + 2.0 * a2 + 2.0 * a3 + a4), g + d / 6.0 * (b1 + 2.0 * b2 + 2.0 * b3 + b4))
    };
    state = advance(state, step / 2.0);
    let mut quantiles = vec![state.0];
    for index in 1..QUANTILES / 2 {
        let steps = if QUANTILES / 2 - index < TAIL { TAIL_STEPS } else { 1 };
        for _ in 0..steps {
            state = advance(state, step / steps as f64);
        }
        quantiles.push(state.0);
    }
    quantiles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_normal_distribution() {
        let upper = upper_quantiles();
        // From tables: quantiles of 0.5 + (i + 0.5) / 65536.
        for (index, expected) in [(0, 1.912_406e-5), (16384, 0.674_513_8), (32767, 4.324_919_0)] {
            assert!((upper[index] - expected).abs() < 1e-6, "{index}: {}", upper[index]);
        }
        let variance = upper.iter().map(|x| x * x).sum::<f64>() / upper.len() as f64;
        assert!((variance - 1.0).abs() < 1e-3, "{variance}");
    }

    #[test]
    fn any_range_is_made_alone() {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let gauss = Gauss::new(dtype, 0.02);
            let mut whole = vec![0; 100 * dtype.size()];
            gauss.fill(key(7, "a"), 0, &mut whole);
            for (first, count) in [(0, 1), (3, 2), (1, 9), (6, 90), (99, 1)] {
                let mut part = vec![0; count * dtype.size()];
                gauss.fill(key(7, "a"), first as u64, &mut part);
                assert_eq!(part, whole[first * dtype.size()..][..part.len()]);
            }
            let mut other = vec![0; whole.len()];
            gauss.fill(key(8, "a"), 0, &mut other);
            assert_ne!(whole, other);
        }
    }
}
