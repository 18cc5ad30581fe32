//! CPU kernels on shapes that do not divide nicely, against plain sums in the documented order.

use coel_kernels::{Kernels, cpu::CpuKernels, cpu::isa::Isa, cpu::primitives, kv::CacheShape, kv::Span, math};
use coel_weights::matrix::{DType, Matrix};
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

/// A session's rows in a batch: heads, group, head size; past and rows of each session; and page size.
#[derive(Clone, Debug)]
struct Attended {
    kv_heads: usize,
    group: usize,
    dim: usize,
    page_tokens: usize,
    sessions: Vec<(usize, usize)>,
    /// For each session `[rows, heads * dim]`, then keys and values `[past + rows, kv_heads * dim]`.
    rows: Vec<[Vec<f32>; 3]>,
}

fn attention_case() -> impl Strategy<Value = Attended> {
    let sizes = (1usize..3, prop_oneof![Just(1usize), Just(2), Just(5), Just(9)], 1usize..70, 1usize..20);
    let sessions = vec((0usize..40, 1usize..20), 1..4);
    (sizes, sessions).prop_flat_map(|((kv_heads, group, dim, page_tokens), sessions)| {
        let rows = sessions.iter().map(|(past, n)| {
            let cached = kv_heads * (past + n) * dim;
            [values(n * kv_heads * group * dim), values(cached), values(cached)]
        });
        (rows.collect::<Vec<_>>(), Just(sessions)).prop_map(move |(rows, sessions)| Attended {
            kv_heads,
            group,
            dim,
            page_tokens,
            sessions,
            rows,
        })
    })
}

impl Attended {
    fn shape(&self) -> CacheShape {
        let (kv_heads, heads) = (self.kv_heads, self.kv_heads * self.group);
        CacheShape { layers: 2, pages: 400, page_tokens: self.page_tokens, heads, kv_heads, head_dim: self.dim }
    }

    /// Attention of the last `rows` rows of each of `sessions`, in one batch over a cache of odd contents.
    fn attend(&self, (isa, threads): (Isa, usize), sessions: &[usize], rows: impl Fn(usize) -> usize) -> Vec<Vec<u32>> {
        let shape = self.shape();
        let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let mut kernels = CpuKernels::new(isa, threads);
        let mut cache = kernels.cache(shape);
        let mut append = |kernels: &mut CpuKernels, span, [k, v]: [Vec<f32>; 2]| {
            let (k, v) = (kernels.upload(k, kv_width), kernels.upload(v, kv_width));
            kernels.append(&mut cache, 1, &[span], k, v);
        };
        // What lies behind a session's last position must not matter.
        let every: Vec<u32> = (0..shape.pages as u32).collect();
        let whole = Span { rows: shape.pages * shape.page_tokens, past: 0, pages: &every };
        let junk = vec![f32::NAN; whole.rows * kv_width];
        append(&mut kernels, whole, [junk.clone(), junk]);
        let mut free = every.iter().rev().copied();
        let tables: Vec<Vec<u32>> = self
            .sessions
            .iter()
            .map(|(past, n)| free.by_ref().take((past + n).div_ceil(shape.page_tokens)).collect())
            .collect();
        let (mut q, mut spans) = (Vec::new(), Vec::new());
        for index in sessions {
            let ((past, n), [queries, keys, values]) = (self.sessions[*index], &self.rows[*index]);
            let stored = Span { rows: past + n, past: 0, pages: &tables[*index] };
            append(&mut kernels, stored, [keys.clone(), values.clone()]);
            let rows = rows(n);
            spans.push(Span { rows, past: past + n - rows, pages: &tables[*index] });
            q.extend_from_slice(&queries[(n - rows) * width..]);
        }
        let q = kernels.upload(q, width);
        let out = kernels.attention(q, &cache, 1, &spans);
        let out = kernels.download(out);
        let mut out = out.chunks(width);
        spans.iter().map(|span| out.by_ref().take(span.rows).flat_map(bits).collect()).collect()
    }

    /// In f64, session by session.
    fn reference(&self) -> Vec<Vec<f64>> {
        let (kv_heads, group, dim) = (self.kv_heads, self.group, self.dim);
        let heads = kv_heads * group;
        let session = |((past, n), [q, keys, values]): (&(usize, usize), &[Vec<f32>; 3])| {
            let mut out = vec![0.0f64; q.len()];
            for (row, head) in (0..*n).flat_map(|row| (0..heads).map(move |head| (row, head))) {
                let q = &q[(row * heads + head) * dim..][..dim];
                let at = |position: usize| (position * kv_heads + head / group) * dim..;
                let score = |position| {
                    let products = q.iter().zip(&keys[at(position)]).map(|(q, k)| f64::from(*q) * f64::from(*k));
                    products.sum::<f64>() / (dim as f64).sqrt()
                };
                let scores: Vec<f64> = (0..=past + row).map(score).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                for (position, score) in scores.iter().enumerate() {
                    let out = &mut out[(row * heads + head) * dim..][..dim];
                    for (out, value) in out.iter_mut().zip(&values[at(position)]) {
                        *out += (score - max).exp() / sum * f64::from(*value);
                    }
                }
            }
            out
        };
        self.sessions.iter().zip(&self.rows).map(session).collect()
    }
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
            let mut kernels = CpuKernels::new(isa, 2);
            let weight = kernels.matrix(matrix.clone().into());
            let rows = kernels.upload(x.clone(), len);
            let found = kernels.linear(&rows, &weight, Some(&bias));
            let found = kernels.download(found);
            prop_assert_eq!(bits(&found), bits(&expected), "{}", isa.name());
            // The first row alone: the decode path.
            let row = kernels.upload(x[..len].to_vec(), len);
            let alone = kernels.linear(&row, &weight, Some(&bias));
            let alone = kernels.download(alone);
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
            primitives::rms_norm(isa, &x, &weight, eps, &mut found);
            prop_assert_eq!(bits(&found), bits(&expected), "{}", isa.name());
        }
    }

    #[test]
    fn gates_do_not_hang_on_their_place(gate in (1usize..60).prop_flat_map(values)) {
        let up = vec![3.0; gate.len()];
        let expected: Vec<f32> = gate.iter().map(|gate| math::silu(*gate) * 3.0).collect();
        for isa in Isa::available() {
            let mut found = gate.clone();
            primitives::silu_times(isa, &mut found, &up);
            prop_assert_eq!(bits(&found), bits(&expected), "{}", isa.name());
        }
    }

    #[test]
    fn attention_is_a_weighted_mean(case in attention_case()) {
        let sessions: Vec<usize> = (0..case.sessions.len()).collect();
        let found = case.attend((Isa::best(), 1), &sessions, |n| n);
        for (found, expected) in found.iter().zip(case.reference()) {
            prop_assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(expected) {
                let found = f32::from_bits(*found);
                prop_assert!((f64::from(found) - expected).abs() < 2e-5, "{} {}", found, expected);
            }
        }
        for isa in Isa::available() {
            prop_assert_eq!(&case.attend((isa, 3), &sessions, |n| n), &found, "{}", isa.name());
            // Each session by itself, its last row only.
            for session in &sessions {
                let alone = case.attend((isa, 1), &[*session], |_| 1).remove(0);
                let last = &found[*session][found[*session].len() - alone.len()..];
                prop_assert_eq!(&alone[..], last, "{} alone", isa.name());
            }
        }
        let other_pages = Attended { page_tokens: case.page_tokens + 3, ..case.clone() };
        prop_assert_eq!(other_pages.attend((Isa::best(), 2), &sessions, |n| n), found);
    }
}
