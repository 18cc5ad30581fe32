//! Weights, rows and the documented results, for tests of any kernel class.

use coel_kernels::{
    ExpertWork, Gated, Kernels,
    cpu::CpuKernels,
    cpu::activations::{Values, quantize},
    cpu::isa::Isa,
};
use coel_weights::{
    matrix::{DType, Matrix},
    memory::WeightBytes,
    slices::{
        BASE_CELL, GROUP, NIBBLES, Precision, REFINE_CELL, Sliced, Weight, cells,
        constants::{Constants, ZERO_MOST},
    },
};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A matrix of random levels, scales and zero points, or of random BF16 values.
pub fn weight(precision: Precision, rows: usize, cols: usize, rng: &mut ChaCha8Rng) -> Weight {
    if precision == Precision::Exact {
        let values = (0..rows * cols).flat_map(|_| bf16::from_f32(rng.random_range(-0.3..0.3)).to_le_bytes());
        return Matrix::new(values.collect::<Vec<u8>>().into(), DType::BF16, rows, cols).unwrap().into();
    }
    let count = cells(rows, cols).expect("whole groups");
    let mut base = vec![0u8; count * BASE_CELL];
    for cell in base.as_chunks_mut::<BASE_CELL>().0 {
        let (nibbles, constants) = cell.split_at_mut(NIBBLES);
        rng.fill(nibbles);
        for constants in constants.as_chunks_mut::<2>().0 {
            let scale = Constants::scale_code(rng.random_range(0.0005..0.002));
            *constants = Constants::new(scale, rng.random_range(0..=ZERO_MOST)).0.to_le_bytes();
        }
    }
    let refine = (precision == Precision::Q8).then(|| {
        let mut refine = vec![0u8; count * REFINE_CELL];
        rng.fill(refine.as_mut_slice());
        WeightBytes::from(refine)
    });
    Weight::Sliced(Sliced::new(rows, cols, base.into(), refine).expect("lengths fit"))
}

pub fn rows(n: usize, cols: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..n * cols).map(|_| rng.random_range(-4.0f32..4.0)).collect()
}

pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

pub fn oracle() -> CpuKernels {
    CpuKernels::new(Isa::available()[0], 1)
}

pub fn linear<K: Kernels>(kernels: &mut K, x: &[f32], weight: &Weight) -> Vec<f32> {
    let (matrix, x) = (kernels.matrix(weight.clone()), kernels.upload(x.to_vec(), weight.cols()));
    let product = kernels.linear(&x, &matrix, None);
    kernels.download(product)
}

/// What a row means to a matrix of `precision`: itself, or its int8 values times their scales.
fn as_read(x: &[f32], precision: Precision) -> Vec<f64> {
    if precision == Precision::Exact {
        return x.iter().map(|x| f64::from(*x)).collect();
    }
    let groups = x.as_chunks::<GROUP>().0.iter().flat_map(|x| {
        let mut values = Values::default();
        let scale = quantize(Isa::best(), x, &mut values);
        values.0.map(|value| f64::from(value) * f64::from(scale.step))
    });
    groups.collect()
}

/// Products in f64, each with the sum of the magnitudes of its terms.
pub fn reference(x: &[f32], weight: &Weight) -> Vec<(f64, f64)> {
    let mut row = vec![0.0; weight.cols()];
    let batch: Vec<Vec<f64>> = x.chunks(weight.cols()).map(|x| as_read(x, weight.precision())).collect();
    let mut products = vec![(0.0, 0.0); batch.len() * weight.rows()];
    for index in 0..weight.rows() {
        weight.widen_row(index, &mut row);
        for (n, x) in batch.iter().enumerate() {
            let product = &mut products[n * weight.rows() + index];
            for (w, x) in row.iter().zip(x) {
                let term = f64::from(*w) * x;
                *product = (product.0 + term, product.1 + term.abs());
            }
        }
    }
    products
}

#[track_caller]
pub fn check_close(found: &[f32], expected: &[(f64, f64)], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (index, (found, (expected, size))) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(error <= tolerance * size, "output {index}: {found}, expected {expected}, terms of {size} in all");
    }
}

/// Three experts of different precisions, their down matrices of another precision than the others.
pub fn mixed(d: usize, width: usize, rng: &mut ChaCha8Rng) -> Vec<Gated<Weight>> {
    let [q4, q8, exact] = Precision::ALL;
    let plans = [[q4; 3], [q8; 3], [exact; 3], [q4, q8, exact], [exact, q4, q8]];
    let experts = plans.map(|[gate, up, down]| Gated {
        gate: weight(gate, width, d, rng),
        up: weight(up, width, d, rng),
        down: weight(down, d, width, rng),
    });
    experts.into()
}

pub fn experts<K: Kernels>(
    kernels: &mut K,
    x: &[f32],
    experts: &[Gated<Weight>],
    work: &[(usize, Vec<u32>)],
) -> Vec<Vec<f32>> {
    let d = experts[0].gate.cols();
    let matrices: Vec<Gated<K::Matrix>> = experts
        .iter()
        .cloned()
        .map(|Gated { gate, up, down }| Gated {
            gate: kernels.matrix(gate),
            up: kernels.matrix(up),
            down: kernels.matrix(down),
        })
        .collect();
    let work: Vec<_> = work.iter().map(|(index, rows)| ExpertWork { expert: &matrices[*index], rows }).collect();
    let x = kernels.upload(x.to_vec(), d);
    let outputs = kernels.experts(&x, &work);
    kernels.download(outputs).chunks(d).map(<[f32]>::to_vec).collect()
}
