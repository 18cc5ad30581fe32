//! Kernels over every precision: instruction sets, threads and batches against the portable path on one thread, and
//! that against sums in f64.

use coel_model::{
    bytes::{DType, Matrix, WeightBytes},
    kernels::{
        ExpertWork, Gated, Kernels,
        activations::{Values, quantize},
        download,
        isa::Isa,
        packed::Packed,
    },
    slices::{
        BASE_CELL, GROUP, NIBBLES, Precision, REFINE_CELL, Sliced, Weight, cells,
        constants::{Constants, ZERO_MOST},
    },
};
use half::bf16;
use proptest::prelude::*;
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

pub fn oracle() -> Packed {
    Packed::new(Isa::available()[0], 1)
}

pub fn linear<K: Kernels>(kernels: &mut K, x: &[f32], weight: &Weight) -> Vec<f32> {
    let (matrix, x) = (kernels.matrix(weight.clone()), kernels.upload(x.to_vec(), weight.cols()));
    download(kernels.linear(&x, &matrix, None))
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

#[test]
fn every_instruction_set_gives_the_oracles_bits() {
    let mut rng = rng(1);
    for precision in Precision::ALL {
        for (out, cols) in [(1, 32), (5, 96), (17, 160), (250, 1408), (64, 2048)] {
            let weight = weight(precision, out, cols, &mut rng);
            for n in [1, 2, 3, 5, 8, 15, 17] {
                let x = rows(n, cols, &mut rng);
                let expected = linear(&mut oracle(), &x, &weight);
                check_close(&expected, &reference(&x, &weight), 2e-6);
                for isa in Isa::available() {
                    let found = linear(&mut Packed::new(isa, 1), &x, &weight);
                    assert!(bits(&found) == bits(&expected), "{} {precision} {out} x {cols}, {n} rows", isa.name());
                }
            }
        }
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
    download(kernels.experts(&x, &work)).chunks(d).map(<[f32]>::to_vec).collect()
}

#[test]
fn a_rows_bits_do_not_hang_on_the_batch() {
    let (d, width, most) = (96, 160, 65);
    let mut rng = rng(2);
    let plans = mixed(d, width, &mut rng);
    let x = rows(most, d, &mut rng);
    let row = |index: usize| &x[index * d..][..d];
    let weights: Vec<Weight> = Precision::ALL.map(|precision| weight(precision, 50, d, &mut rng)).into();
    let mut one = oracle();
    let alone: Vec<Vec<Vec<f32>>> = (0..most)
        .map(|index| {
            let work: Vec<_> = (0..plans.len()).map(|expert| (expert, vec![0])).collect();
            experts(&mut one, row(index), &plans, &work)
        })
        .collect();
    for isa in Isa::available() {
        let mut kernels = Packed::new(isa, 2);
        for n in (1..=64).chain([most]) {
            let rows: Vec<u32> = (0..n as u32).collect();
            let work: Vec<_> = (0..plans.len()).map(|expert| (expert, rows.clone())).collect();
            let found = experts(&mut kernels, &x[..n * d], &plans, &work);
            for (slot, found) in found.iter().enumerate() {
                let (expert, index) = (slot / n, slot % n);
                assert!(bits(found) == bits(&alone[index][expert]), "{}: row {index} of {n}, {expert}", isa.name());
            }
            for weight in &weights {
                let all = linear(&mut kernels, &x[..n * d], weight);
                for (index, found) in all.chunks(50).enumerate() {
                    let expected = linear(&mut one, row(index), weight);
                    assert!(bits(found) == bits(&expected), "{}: row {index} of {n}", isa.name());
                }
            }
        }
    }
}

#[test]
fn a_large_batch_is_many_single_rows() {
    let mut rng = rng(3);
    for precision in Precision::ALL {
        let weight = weight(precision, 40, 64, &mut rng);
        let x = rows(257, 64, &mut rng);
        for isa in Isa::available() {
            let all = linear(&mut Packed::new(isa, 3), &x, &weight);
            for (x, found) in x.chunks(64).zip(all.chunks(40)) {
                assert!(bits(&linear(&mut oracle(), x, &weight)) == bits(found), "{} {precision}", isa.name());
            }
        }
    }
}

#[test]
fn experts_take_their_rows_in_the_order_given() {
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
    let work = [(5, vec![8, 0, 3]), (1, vec![]), (3, vec![4, 4]), (0, vec![7, 6, 5, 4, 3, 2]), (5, vec![1])];
    let found = experts(&mut Packed::new(Isa::best(), 2), &x, &plans, &work);
    let mut expected = Vec::new();
    for (expert, rows) in &work {
        for row in rows {
            expected.extend(experts(&mut oracle(), &x, &plans, &[(*expert, vec![*row])]));
        }
    }
    assert_eq!(found.len(), 12);
    assert!(found == expected);
}

#[test]
fn a_feed_forward_block_is_what_its_parts_are() {
    let mut rng = rng(5);
    let (d, width) = (64, 96);
    let x = rows(3, d, &mut rng);
    let plans = mixed(d, width, &mut rng);
    for (index, expert) in plans.iter().enumerate() {
        let found = experts(&mut oracle(), &x, &plans, &[(index, vec![0, 1, 2])]).concat();
        let (gate, up) = (linear(&mut oracle(), &x, &expert.gate), linear(&mut oracle(), &x, &expert.up));
        let hidden: Vec<f32> = gate.iter().zip(&up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
        // The library's exponential differs in last bits, which may move a value to the next int8 step.
        check_close(&found, &reference(&hidden, &expert.down), 2e-3);
    }
}

#[test]
fn what_is_not_a_number_stays_none() {
    let mut rng = rng(7);
    for precision in Precision::ALL {
        let weight = weight(precision, 20, 64, &mut rng);
        for isa in Isa::available() {
            let mut kernels = Packed::new(isa, 1);
            let mut x = rows(3, 64, &mut rng);
            let clean = linear(&mut kernels, &x, &weight);
            for poison in [f32::NAN, -f32::NAN] {
                x[64 + 37] = poison;
                let found = linear(&mut kernels, &x, &weight);
                assert!(found[20..40].iter().all(|value| value.is_nan()), "{} {precision} {poison}", isa.name());
                assert!(bits(&found[..20]) == bits(&clean[..20]) && bits(&found[40..]) == bits(&clean[40..]));
            }
            x[64 + 37] = f32::NEG_INFINITY;
            let found = linear(&mut kernels, &x, &weight);
            assert!(found[20..40].iter().all(|value| !value.is_finite()), "{} {precision}", isa.name());
            // Magnitudes at the ends of what f32 holds are numbers.
            let ends: Vec<f32> = (0..64).map(|index| [1e-45, 1e-38, 0.0, -0.0][index % 4]).collect();
            assert!(linear(&mut kernels, &ends, &weight).iter().all(|value| value.abs() < 1e-30));
            let ends: Vec<f32> = (0..64).map(|index| if index < 32 { 1e35 } else { 1e-45 }).collect();
            assert!(linear(&mut kernels, &ends, &weight).iter().all(|value| value.is_finite()));
        }
    }
}

fn group() -> impl Strategy<Value = [f32; GROUP]> {
    let value = prop_oneof![8 => -5.0f32..5.0, 1 => Just(0.0), 1 => -1e-30f32..1e-30];
    (proptest::array::uniform32(value), -20i32..20).prop_map(|(values, power)| values.map(|v| v * 2f32.powi(power)))
}

proptest! {
    #[test]
    fn int8_values_are_the_nearest(x in group()) {
        let mut first = None;
        for isa in Isa::available() {
            let mut values = Values::default();
            let scale = quantize(isa, &x, &mut values);
            let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            for (x, value) in x.iter().zip(values.0) {
                let error = (f64::from(*x) - f64::from(value) * f64::from(scale.step)).abs();
                prop_assert!(error <= 0.50001 * f64::from(scale.step) + 1e-35, "{x} is {value} of {}", scale.step);
            }
            prop_assert!(most < 1e-35 || values.0.iter().any(|value| value.abs() == 127));
            let sum: i32 = values.0.iter().map(|value| i32::from(*value)).sum();
            prop_assert_eq!(scale.sum.to_bits(), (scale.step * sum as f32).to_bits());
            let found = (values.0, scale.step.to_bits());
            prop_assert_eq!(&found, first.get_or_insert(found), "{}", isa.name());
        }
    }
}
