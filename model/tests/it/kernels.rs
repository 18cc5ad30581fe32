//! CPU kernels on shapes that do not divide nicely, against plain sums in the documented order.

use coel_model::{
    bytes::{DType, Matrix},
    kernels::{
        Kernels,
        cpu::{self, CachedLayer},
        download,
        isa::Isa,
        math,
        packed::Packed,
    },
};
use half::{bf16, f16};
use proptest::{collection::vec, prelude::*};

/// The documented order: 16 partial sums, then a fixed tree.
fn dot(x: &[f32], w: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for (index, (x, w)) in x.iter().zip(w).enumerate() {
        lanes[index % 16] = x.mul_add(*w, lanes[index % 16]);
    }
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0]
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Packs values; what they become in `dtype` is what the matrix holds.
fn pack(values: &[f32], dtype: DType, rows: usize) -> (Matrix, Vec<f32>) {
    let bytes: Vec<u8> = match dtype {
        DType::BF16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        DType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    };
    let matrix = Matrix::new(bytes.into(), dtype, rows, values.len() / rows).unwrap();
    let mut held = vec![0.0; values.len()];
    dtype.widen(matrix.bytes(), &mut held);
    (matrix, held)
}

fn dtype() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::BF16), Just(DType::F16), Just(DType::F32)]
}

fn values(count: usize) -> impl Strategy<Value = Vec<f32>> {
    vec(-4.0f32..4.0, count)
}

fn linear_case() -> impl Strategy<Value = (usize, usize, DType, Vec<f32>, Vec<f32>, Vec<f32>)> {
    (1usize..70, 1usize..50, 1usize..40, dtype()).prop_flat_map(|(n, len, out, dtype)| {
        (Just(len), Just(out), Just(dtype), values(n * len), values(out * len), values(out))
    })
}

/// q, keys and values of one layer, with heads, groups, head size, past and rows.
fn attention_case() -> impl Strategy<Value = ([usize; 5], Vec<f32>, Vec<f32>, Vec<f32>)> {
    (1usize..3, 1usize..3, 1usize..25, 0usize..40, 1usize..6).prop_flat_map(|(kv_heads, group, dim, past, n)| {
        let cached = kv_heads * (past + n) * dim;
        let q = values(n * kv_heads * group * dim);
        (Just([kv_heads, group, dim, past, n]), q, values(cached), values(cached))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn linear_adds_in_the_documented_order((len, out, dtype, x, w, bias) in linear_case()) {
        let (matrix, held) = pack(&w, dtype, out);
        let expected: Vec<f32> = x
            .chunks(len)
            .flat_map(|x| held.chunks(len).zip(&bias).map(|(w, bias)| dot(x, w) + bias).collect::<Vec<_>>())
            .collect();
        for isa in Isa::available() {
            let mut kernels = Packed::new(isa, 2);
            let weight = kernels.matrix(matrix.clone().into());
            let rows = kernels.upload(x.clone(), len);
            let found = download(kernels.linear(&rows, &weight, Some(&bias)));
            prop_assert_eq!(bits(&found), bits(&expected), "{}", isa.name());
            // The first row alone: the decode path.
            let row = kernels.upload(x[..len].to_vec(), len);
            let alone = download(kernels.linear(&row, &weight, Some(&bias)));
            prop_assert_eq!(bits(&alone), bits(&expected[..out]), "{} alone", isa.name());
        }
    }

    #[test]
    fn norm_scales_to_unit_mean_square(x in (1usize..60).prop_flat_map(values), eps in 1e-7f32..1e-4) {
        let weight = vec![2.0; x.len()];
        let scale = 1.0 / (dot(&x, &x) / x.len() as f32 + eps).sqrt();
        let expected: Vec<f32> = x.iter().map(|x| 2.0 * (x * scale)).collect();
        for isa in Isa::available() {
            let mut found = vec![f32::NAN; x.len()];
            cpu::rms_norm(isa, &x, &weight, eps, &mut found);
            prop_assert_eq!(bits(&found), bits(&expected), "{}", isa.name());
        }
    }

    #[test]
    fn gates_do_not_hang_on_their_place(gate in (1usize..60).prop_flat_map(values)) {
        let up = vec![3.0; gate.len()];
        let expected: Vec<f32> = gate.iter().map(|gate| math::silu(*gate) * 3.0).collect();
        for isa in Isa::available() {
            let mut found = gate.clone();
            cpu::silu_times(isa, &mut found, &up);
            prop_assert_eq!(bits(&found), bits(&expected), "{}", isa.name());
        }
    }

    #[test]
    fn attention_is_a_weighted_mean((shape, q, keys, values) in attention_case()) {
        let [kv_heads, group, dim, past, n] = shape;
        let capacity = past + n;
        let heads = kv_heads * group;
        let cache =
            CachedLayer { keys: &keys, values: &values, heads, kv_heads, head_dim: dim, capacity };
        let mut reference = vec![0.0f64; q.len()];
        for row in 0..n {
            for head in 0..heads {
                let q = &q[(row * heads + head) * dim..][..dim];
                let start = head / group * capacity;
                let at = |position: usize| (start + position) * dim..(start + position + 1) * dim;
                let score = |position| {
                    let products = q.iter().zip(&keys[at(position)]).map(|(q, k)| f64::from(*q) * f64::from(*k));
                    products.sum::<f64>() / (dim as f64).sqrt()
                };
                let scores: Vec<f64> = (0..=past + row).map(score).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                for (position, score) in scores.iter().enumerate() {
                    let weight = (score - max).exp() / sum;
                    let out = &mut reference[(row * heads + head) * dim..][..dim];
                    for (out, value) in out.iter_mut().zip(&values[at(position)]) {
                        *out += weight * f64::from(*value);
                    }
                }
            }
        }
        let mut first = None;
        for isa in Isa::available() {
            let mut found = vec![f32::NAN; q.len()];
            cpu::attention(isa, &q, &cache, past, &mut found, &mut Vec::new());
            for (found, expected) in found.iter().zip(&reference) {
                prop_assert!((f64::from(*found) - expected).abs() < 2e-5, "{found} {expected}");
            }
            prop_assert_eq!(&bits(&found), first.get_or_insert(bits(&found)), "{}", isa.name());
            // The last row alone, with the others in the past.
            let width = heads * dim;
            let mut alone = vec![f32::NAN; width];
            cpu::attention(isa, &q[(n - 1) * width..], &cache, past + n - 1, &mut alone, &mut Vec::new());
            prop_assert_eq!(bits(&alone), bits(&found[(n - 1) * width..]), "{} alone", isa.name());
        }
    }
}
