//! Kernels over every precision: instruction sets, threads and batches against the portable path on one thread, and
//! that against sums in f64.

use coel_kernels::{
    Gated,
    cpu::CpuKernels,
    cpu::activations::{Values, quantize},
    cpu::isa::Isa,
};
use coel_weights::slices::{GROUP, Precision, Weight};
use proptest::prelude::*;

use crate::support::{bits, check_close, experts, linear, mixed, oracle, reference, rng, rows, weight};

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
                    let found = linear(&mut CpuKernels::new(isa, 1), &x, &weight);
                    assert!(bits(&found) == bits(&expected), "{} {precision} {out} x {cols}, {n} rows", isa.name());
                }
            }
        }
    }
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
        let mut kernels = CpuKernels::new(isa, 2);
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
            let all = linear(&mut CpuKernels::new(isa, 3), &x, &weight);
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
    let found = experts(&mut CpuKernels::new(Isa::best(), 2), &x, &plans, &work);
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
            let mut kernels = CpuKernels::new(isa, 1);
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
