//! The GPU kernels on a Vulkan device, software or not, against the CPU's.
//!
//! Where no Vulkan driver is installed these tests say so and pass; with `COEL_REQUIRE_VULKAN=1`, as in CI, they fail.
//! Matrices and norms must have the bits of the documented order of operations: the portable kernels' where the device
//! fuses multiply-adds, which is asked of it first, and those of the same operations rounded twice where it does not.

use std::io::{Write, stderr};

use coel_gpu::kernels::VulkanKernels;
use coel_kernels::{
    Gated, Kernels,
    angles::Angles,
    cpu::CpuKernels,
    cpu::activations::{Values, quantize},
    cpu::isa::Isa,
    kv::CacheShape,
    kv::Span,
};
use coel_weights::{
    matrix::{DType, Matrix},
    slices::{BASE_CELL, GROUP, NIBBLES, Precision, REFINE_CELL, Sliced, Weight, constants::Constants},
};
use half::f16;
use rand::Rng;

use crate::{
    support::{bits, check_close, experts, linear, mixed, oracle, reference, rng, rows, weight},
    vulkan_device::vulkan,
};

fn exact(values: &[f32], dtype: DType, rows: usize) -> Weight {
    let bytes = |value: &f32| match dtype {
        DType::BF16 => value.to_le_bytes()[2..].to_vec(),
        DType::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
        DType::F32 => value.to_le_bytes().to_vec(),
    };
    let bytes: Vec<u8> = values.iter().flat_map(bytes).collect();
    Matrix::new(bytes.into(), dtype, rows, values.len() / rows).unwrap().into()
}

/// Whether the device rounds a multiply-add once.
fn fuses(kernels: &mut VulkanKernels) -> bool {
    let e = 1.0 + f32::EPSILON;
    let (mut w, mut x) = ([0.0; 17], [0.0; 17]);
    // The same partial sum: first -(e * e), rounded, then e * e.
    (w[0], x[0], w[16], x[16]) = (-(e * e), 1.0, e, e);
    linear(kernels, &x, &exact(&w, DType::F32, 1)) != [0.0]
}

/// The documented operations, with multiply-adds that are fused or not.
#[derive(Clone, Copy)]
struct Order {
    fused: bool,
}

impl Order {
    fn of(kernels: &mut VulkanKernels) -> Self {
        Self { fused: fuses(kernels) }
    }

    fn add_product(self, a: f32, b: f32, sum: f32) -> f32 {
        if self.fused { a.mul_add(b, sum) } else { a * b + sum }
    }

    /// 16 partial sums, then a fixed tree.
    fn dot(self, x: &[f32], w: &[f32]) -> f32 {
        let mut lanes = [0.0f32; 16];
        for (index, (x, w)) in x.iter().zip(w).enumerate() {
            lanes[index % 16] = self.add_product(*x, *w, lanes[index % 16]);
        }
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    }

    fn sliced(self, x: &[f32], sliced: &Sliced, output: usize) -> f32 {
        let (block, lane) = (output / 16, output % 16);
        let mut sum = 0.0;
        for (group, x) in x.as_chunks::<GROUP>().0.iter().enumerate() {
            let mut values = Values::default();
            let scale = quantize(Isa::available()[0], x, &mut values);
            let cell = block * sliced.groups() + group;
            let base = &sliced.base()[cell * BASE_CELL..][..BASE_CELL];
            let refine = sliced.refine().map(|refine| &refine[cell * REFINE_CELL..][..REFINE_CELL]);
            let constants = &base[NIBBLES + 2 * lane..][..2];
            let constants = Constants::from_le_bytes([constants[0], constants[1]]);
            let (s, offset) = match refine {
                Some(_) => (constants.scale(), constants.offset()),
                None => (constants.scale(), constants.middle_offset()),
            };
            let level = |column: usize| {
                let at = 64 * (column / 8) + 4 * lane + column % 4;
                let nibble = |cell: &[u8]| i32::from(cell[at] >> (column % 8 / 4 * 4) & 15);
                16 * nibble(base) + refine.map_or(0, nibble)
            };
            let whole: i32 = values.0.iter().enumerate().map(|(column, x)| level(column) * i32::from(*x)).sum();
            sum = self.add_product(whole as f32, s * scale.step, sum);
            sum = self.add_product(offset, scale.sum, sum);
        }
        sum
    }

    fn linear(self, x: &[f32], weight: &Weight) -> Vec<f32> {
        let mut row = vec![0.0; weight.cols()];
        let mut product = |x: &[f32], output: usize| match weight {
            Weight::Sliced(sliced) => self.sliced(x, sliced, output),
            Weight::Exact(matrix) => {
                matrix.widen_row(output, &mut row);
                self.dot(x, &row)
            }
        };
        x.chunks(weight.cols())
            .flat_map(|x| (0..weight.rows()).map(|row| product(x, row)).collect::<Vec<_>>())
            .collect()
    }
}

#[track_caller]
fn check(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(found.to_bits() == expected.to_bits(), "{what}: output {index} is {found:e}, not {expected:e}");
    }
}

#[test]
fn the_order_is_the_portable_kernels() {
    let (order, mut rng) = (Order { fused: true }, rng(9));
    for precision in Precision::ALL {
        let weight = weight(precision, 19, 544, &mut rng);
        let x = rows(2, 544, &mut rng);
        check(&order.linear(&x, &weight), &linear(&mut oracle(), &x, &weight), &precision.to_string());
    }
}

#[test]
fn a_vulkan_device_works() {
    let Some(mut kernels) = vulkan() else { return };
    assert!(coel_kernels::DynKernels::works(&mut kernels));
    assert!(kernels.class().starts_with("vulkan-"));
    writeln!(stderr(), "{}: multiply-adds are fused: {}", kernels.class(), fuses(&mut kernels)).unwrap();
}

#[test]
fn matrices_have_the_oracles_bits() {
    let Some(mut kernels) = vulkan() else { return };
    let (order, mut rng) = (Order::of(&mut kernels), rng(1));
    for (out, cols) in [(1, 32), (5, 96), (16, 512), (17, 544), (250, 1408)] {
        let mut weights: Vec<Weight> = Precision::ALL.map(|precision| weight(precision, out, cols, &mut rng)).into();
        let values: Vec<f32> = (0..out * (cols - 1)).map(|_| rng.random_range(-0.3f32..0.3)).collect();
        let odd = [DType::BF16, DType::F16, DType::F32].map(|dtype| exact(&values, dtype, out));
        weights.extend(odd);
        for weight in &weights {
            for n in [1, 2, 7, 8, 9, 17] {
                let x = rows(n, weight.cols(), &mut rng);
                let found = linear(&mut kernels, &x, weight);
                check_close(&found, &reference(&x, weight), 3e-6);
                check(
                    &found,
                    &order.linear(&x, weight),
                    &format!("{} {out} x {}, {n} rows", weight.precision(), weight.cols()),
                );
            }
        }
    }
}

#[test]
fn several_matrices_and_biases_at_once() {
    let Some(mut kernels) = vulkan() else { return };
    let (order, mut rng) = (Order::of(&mut kernels), rng(2));
    let weights: Vec<Weight> =
        Precision::ALL.into_iter().chain(Precision::ALL).map(|precision| weight(precision, 37, 96, &mut rng)).collect();
    let biases: Vec<Vec<f32>> = weights.iter().map(|_| rows(1, 37, &mut rng)).collect();
    let matrices: Vec<_> = weights.iter().map(|weight| kernels.matrix(weight.clone())).collect();
    let vectors: Vec<_> = biases.iter().map(|bias| kernels.vector(bias.clone())).collect();
    for n in [1, 3, 11] {
        let x = rows(n, 96, &mut rng);
        let work: Vec<_> = matrices.iter().zip(&vectors).map(|(matrix, vector)| (matrix, Some(vector))).collect();
        let outputs = kernels.upload(x.clone(), 96);
        let outputs = kernels.linears(&outputs, &work);
        for ((output, weight), bias) in outputs.into_iter().zip(&weights).zip(&biases) {
            let mut expected = order.linear(&x, weight);
            expected.chunks_mut(37).for_each(|row| row.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias));
            check(&kernels.download(output), &expected, &format!("{}, {n} rows", weight.precision()));
        }
    }
}

#[test]
fn a_rows_bits_do_not_hang_on_the_batch() {
    let Some(mut kernels) = vulkan() else { return };
    let (d, width, most) = (96, 160, 64);
    let mut rng = rng(3);
    let plans = mixed(d, width, &mut rng);
    let x = rows(most, d, &mut rng);
    let row = |index: usize| &x[index * d..][..d];
    let alone: Vec<Vec<Vec<f32>>> = (0..most)
        .map(|index| {
            let work: Vec<_> = (0..plans.len()).map(|expert| (expert, vec![0])).collect();
            experts(&mut kernels, row(index), &plans, &work)
        })
        .collect();
    for n in 1..=most {
        let rows: Vec<u32> = (0..n as u32).collect();
        let work: Vec<_> = (0..plans.len()).map(|expert| (expert, rows.clone())).collect();
        let found = experts(&mut kernels, &x[..n * d], &plans, &work);
        for (slot, found) in found.iter().enumerate() {
            let (expert, index) = (slot / n, slot % n);
            assert!(bits(found) == bits(&alone[index][expert]), "row {index} of {n}, expert {expert}");
        }
    }
}

/// Largest difference, relative to the largest expected value.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    let size = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    found.iter().zip(expected).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs())) / size
}

#[test]
fn experts_are_the_cpus() {
    let Some(mut kernels) = vulkan() else { return };
    let mut rng = rng(4);
    // A width that is no multiple of a group, which only exact matrices may have.
    let odd = Gated {
        gate: weight(Precision::Exact, 50, 64, &mut rng),
        up: weight(Precision::Q4, 50, 64, &mut rng),
        down: weight(Precision::Exact, 64, 50, &mut rng),
    };
    let mut plans = mixed(64, 96, &mut rng);
    plans.push(odd);
    let x = rows(9, 64, &mut rng);
    let work =
        [(5, vec![8, 0, 3]), (1, vec![]), (3, vec![4, 4]), (0, vec![7, 6, 5, 4, 3, 2]), (2, vec![1]), (1, vec![0])];
    let found = experts(&mut kernels, &x, &plans, &work);
    let expected = experts(&mut oracle(), &x, &plans, &work);
    assert_eq!(found.len(), expected.len());
    for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
        // A last bit of the activation may move a value to the next int8 step.
        assert!(distance(found, expected) < 2e-3, "output {index}: off by {}", distance(found, expected));
    }
}

#[test]
fn norms_and_rotations_are_the_cpus() {
    let Some(mut kernels) = vulkan() else { return };
    let (order, mut rng) = (Order::of(&mut kernels), rng(5));
    for (n, width) in [(1, 32), (3, 52), (7, 256), (2, 4099)] {
        let (x, weight) = (rows(n, width, &mut rng), rows(1, width, &mut rng));
        let (vector, input) = (kernels.vector(weight.clone()), kernels.upload(x.clone(), width));
        let found = kernels.rms_norm(&input, &vector, 1e-6);
        let found = kernels.download(found);
        let expected = x.chunks(width).flat_map(|x| {
            let scale = 1.0 / (order.dot(x, x) / width as f32 + 1e-6).sqrt();
            x.iter().zip(&weight).map(move |(x, weight)| weight * (x * scale))
        });
        check(&found, &expected.collect::<Vec<_>>(), &format!("norm of {n} x {width}"));
    }
    let (n, half, heads) = (5, 16, 3);
    let width = heads * 2 * half;
    let turns = [0.0, 1.0, 7.0, 1000.0, 3.0].iter().flat_map(|position| {
        (0..half).map(move |pair| (position * 10_000f64.powf(-(pair as f64) / half as f64)).sin_cos())
    });
    let (sin, cos): (Vec<f64>, Vec<f64>) = turns.unzip();
    let [cos, sin] = [cos, sin].map(|values| values.into_iter().map(|value| value as f32).collect());
    let (x, angles) = (rows(n, width, &mut rng), Angles::new(half, cos, sin));
    let input = kernels.upload(x.clone(), width);
    let found = kernels.rotate(input, &angles);
    let found = kernels.download(found);
    let mut cpu = oracle();
    let input = cpu.upload(x, width);
    let expected = cpu.rotate(input, &angles);
    assert!(distance(&found, &cpu.download(expected)) < 1e-6);
}

#[test]
fn sums_bounds_selections_and_norms_of_heads_are_the_cpus() {
    fn outputs<K: Kernels>(kernels: &mut K, [a, b]: &[Vec<f32>; 2], weight: &[f32], width: usize) -> [Vec<f32>; 4] {
        let rows = |values: &Vec<f32>| kernels.upload(values.clone(), width);
        let (sum, bounded) = (kernels.add(rows(a), rows(b)), kernels.clamp(rows(a), 1.5));
        let selected = kernels.select(&rows(a), &[(3, 2), (0, 1), (3, 1)]);
        let (input, weight) = (rows(b), kernels.vector(weight.to_vec()));
        let normed = kernels.rms_norm(&input, &weight, 1e-6);
        assert_eq!((selected.dims(), normed.dims()), ([4, width], input.dims()));
        [sum, bounded, selected, normed].map(|rows| kernels.download(rows))
    }
    let Some(mut kernels) = vulkan() else { return };
    let mut rng = rng(6);
    let (n, width) = (5, 96);
    let inputs = [0, 1].map(|_| rows(n, width, &mut rng));
    let weight = rows(1, 32, &mut rng);
    let found = outputs(&mut kernels, &inputs, &weight, width);
    let expected = outputs(&mut oracle(), &inputs, &weight, width);
    for index in 0..3 {
        assert_eq!(bits(&found[index]), bits(&expected[index]), "output {index}");
    }
    assert!(distance(&found[3], &expected[3]) < 1e-6);
}

/// Attention of the last rows of sessions `(past, rows)` on pages of this size, all in one batch.
fn attend<K: Kernels>(
    kernels: &mut K,
    shape: CacheShape,
    sessions: &[(usize, usize)],
    values: &[[Vec<f32>; 3]],
) -> Vec<f32> {
    let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let mut cache = kernels.cache(shape);
    let mut free = (0..shape.pages as u32).rev();
    let (mut q, mut tables) = (Vec::new(), Vec::new());
    for ((past, n), [queries, keys, values]) in sessions.iter().zip(values) {
        let pages: Vec<u32> = free.by_ref().take((past + n).div_ceil(shape.page_tokens)).collect();
        let stored = Span { rows: past + n, past: 0, pages: &pages };
        let (keys, values) = (kernels.upload(keys.clone(), kv_width), kernels.upload(values.clone(), kv_width));
        kernels.append(&mut cache, 1, &[stored], keys, values);
        q.extend_from_slice(queries);
        tables.push(pages);
    }
    let spans = sessions.iter().zip(&tables).map(|((past, n), pages)| Span { rows: *n, past: *past, pages });
    let q = kernels.upload(q, width);
    let out = kernels.attention(q, &cache, 1, &spans.collect::<Vec<_>>());
    kernels.download(out)
}

#[test]
fn attention_is_the_cpus() {
    let Some(mut kernels) = vulkan() else { return };
    let mut rng = rng(6);
    for (kv_heads, group, dim) in [(2, 1, 32), (1, 4, 19), (3, 2, 128)] {
        let heads = kv_heads * group;
        let sessions = [(0, 1), (5, 3), (255, 1), (250, 9), (700, 2), (0, 20)];
        let values: Vec<[Vec<f32>; 3]> = sessions
            .iter()
            .map(|(past, n)| {
                let cached = (past + n) * kv_heads;
                [rows(n * heads, dim, &mut rng), rows(cached, dim, &mut rng), rows(cached, dim, &mut rng)]
            })
            .collect();
        let shape = |page_tokens| CacheShape { layers: 2, pages: 2000, page_tokens, heads, kv_heads, head_dim: dim };
        let together = attend(&mut kernels, shape(32), &sessions, &values);
        assert!(bits(&together) == bits(&attend(&mut kernels, shape(1), &sessions, &values)), "pages of 1");
        let mut alone = Vec::new();
        for (session, values) in sessions.iter().zip(&values) {
            alone.extend(attend(&mut kernels, shape(7), &[*session], std::slice::from_ref(values)));
        }
        assert!(bits(&together) == bits(&alone), "alone, on pages of 7");
        let expected = attend(&mut CpuKernels::new(Isa::best(), 1), shape(32), &sessions, &values);
        assert!(distance(&together, &expected) < 2e-6, "off by {}", distance(&together, &expected));
    }
}

#[test]
fn what_is_not_a_number_stays_none() {
    let Some(mut kernels) = vulkan() else { return };
    let mut rng = rng(7);
    for precision in Precision::ALL {
        let weight = weight(precision, 20, 64, &mut rng);
        let mut x = rows(3, 64, &mut rng);
        let clean = linear(&mut kernels, &x, &weight);
        for poison in [f32::NAN, f32::NEG_INFINITY] {
            x[64 + 37] = poison;
            let found = linear(&mut kernels, &x, &weight);
            assert!(found[20..40].iter().all(|value| !value.is_finite()), "{precision} {poison}");
            assert!(bits(&found[..20]) == bits(&clean[..20]) && bits(&found[40..]) == bits(&clean[40..]));
        }
        let ends: Vec<f32> = (0..64).map(|index| [1e-45, 1e-38, 0.0, -0.0][index % 4]).collect();
        assert!(linear(&mut kernels, &ends, &weight).iter().all(|value| value.abs() < 1e-30));
    }
}

#[test]
fn what_was_brought_to_the_device_is_read_back() {
    let Some(kernels) = vulkan() else { return };
    let mut rng = rng(10);
    let values: Vec<f32> = (0..21 * 50).map(|_| rng.random_range(-0.3f32..0.3)).collect();
    let mut weights: Vec<Weight> = Precision::ALL.map(|precision| weight(precision, 37, 96, &mut rng)).into();
    // Rows that are padded there.
    weights.extend([DType::BF16, DType::F16, DType::F32].map(|dtype| exact(&values, dtype, 21)));
    let matrices: Vec<_> = weights.iter().map(|weight| kernels.matrix(weight.clone())).collect();
    for (matrix, expected) in matrices.iter().zip(&weights) {
        match (kernels.weight(matrix), expected) {
            (Weight::Exact(found), Weight::Exact(expected)) => {
                assert_eq!((found.dtype(), found.rows()), (expected.dtype(), expected.rows()));
                assert!(found.bytes() == expected.bytes(), "{}", expected.dtype());
            }
            (Weight::Sliced(found), Weight::Sliced(expected)) => {
                assert_eq!((found.rows(), found.cols()), (expected.rows(), expected.cols()));
                assert!((found.base(), found.refine()) == (expected.base(), expected.refine()));
            }
            _ => panic!("another form"),
        }
    }
}

#[test]
fn what_one_matrix_leaves_the_next_one_takes() {
    let Some(mut kernels) = vulkan() else { return };
    let mut rng = rng(8);
    let x = rows(2, 96, &mut rng);
    let weights: Vec<Weight> = (0..12).map(|index| weight(Precision::ALL[index % 3], 70, 96, &mut rng)).collect();
    let mut held: Vec<_> = weights.iter().map(|weight| Some(kernels.matrix(weight.clone()))).collect();
    for round in 0..3 {
        for index in (round..12).step_by(3) {
            held[index] = None;
        }
        for index in (round..12).step_by(3).rev() {
            held[index] = Some(kernels.matrix(weights[index].clone()));
        }
        for (matrix, weight) in held.iter().zip(&weights) {
            let input = kernels.upload(x.clone(), 96);
            let found = kernels.linear(&input, matrix.as_ref().expect("held again"), None);
            let found = kernels.download(found);
            assert!(bits(&found) == bits(&linear(&mut vulkan().expect("it is open"), &x, weight)));
        }
    }
}
