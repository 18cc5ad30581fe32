//! What the GPU kernels reach, beside what the device's memory gives.
//!
//! `cargo run --release -p coel-gpu --example gpu -- --device cuda:0|vulkan:N [--rounds N] [--memory-mb N]
//! [--rows N,N,...]` multiplies the experts of a layer of Qwen1.5-MoE-A2.7B's shape, four for each row, many layers in turn,
//! so that no cache holds them, at Q4, Q8 and BF16. A sample queues calls until enough bytes were read and then waits for
//! the device once; samples of all variants alternate in changing order, and of each the median is printed: GB/s of
//! packed weights, its share of what an elementwise operation on a large tensor reads and writes, and microseconds a call.

use std::time::Instant;

use coel_gpu::{
    cuda,
    kernels::{CudaKernels, VulkanKernels},
    matrix::GpuMatrix,
    vulkan,
};
use coel_kernels::{ExpertWork, Gated, Kernels};
use coel_weights::{
    matrix::{DType, Matrix},
    memory::WeightBytes,
    slices::{BASE_CELL, NIBBLES, Precision, REFINE_CELL, Sliced, Weight, cells, constants::Constants},
};
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

/// Hidden size, expert width, experts of a token.
const D: usize = 2048;
const WIDTH: usize = 1408;
const TOP: usize = 4;
/// Experts of a layer: more rows than reach them all reuse them.
const EXPERTS: usize = 60;
/// Bytes one sample reads.
const SAMPLE_BYTES: usize = 1 << 30;

/// The device to measure.
#[derive(Clone, Copy)]
enum Device {
    Cuda(usize),
    Vulkan(usize),
}

impl Device {
    fn parse(text: &str) -> Result<Self, String> {
        let number = |number: &str| number.parse().map_err(|error| format!("--device {text}: {error}"));
        match text.split_once(':') {
            Some(("cuda", index)) => Ok(Self::Cuda(number(index)?)),
            Some(("vulkan", index)) => Ok(Self::Vulkan(number(index)?)),
            _ => Err(format!("--device {text}: give cuda:N or vulkan:N; the CPU has its own example, kernels")),
        }
    }
}

struct Options {
    device: Option<Device>,
    rounds: usize,
    memory_mb: usize,
    rows: Vec<usize>,
}

impl Options {
    fn parse() -> Result<Self, String> {
        let mut options = Self { device: None, rounds: 20, memory_mb: 4096, rows: vec![1, 8, 32, 128] };
        let mut arguments = std::env::args().skip(1);
        while let Some(flag) = arguments.next() {
            let value = arguments.next().ok_or_else(|| format!("{flag} needs a value"))?;
            let number = |value: &str| value.parse::<usize>().map_err(|error| format!("{flag} {value}: {error}"));
            match flag.as_str() {
                "--device" => options.device = Some(Device::parse(&value)?),
                "--rounds" => options.rounds = number(&value)?.max(1),
                "--memory-mb" => options.memory_mb = number(&value)?,
                "--rows" => options.rows = value.split(',').map(number).collect::<Result<_, _>>()?,
                _ => return Err(format!("{flag} is unknown; see the head of this example")),
            }
        }
        Ok(options)
    }
}

/// A matrix of random bytes that are finite numbers, and its bytes.
fn weight(precision: Precision, rows: usize, cols: usize, rng: &mut ChaCha8Rng) -> Weight {
    let random = |bytes: usize, rng: &mut ChaCha8Rng| {
        let mut values = vec![0u8; bytes];
        rng.fill(values.as_mut_slice());
        values
    };
    if precision == Precision::Exact {
        let mut values = random(2 * rows * cols, rng);
        values.as_chunks_mut::<2>().0.iter_mut().for_each(|pair| pair[1] &= 0xBF); // an exponent below that of 2
        return Matrix::new(values.into(), DType::BF16, rows, cols).expect("whole rows").into();
    }
    let count = cells(rows, cols).expect("whole groups");
    let mut base = random(count * BASE_CELL, rng);
    let constants = Constants::new(Constants::scale_code(0.01), 60).0.to_le_bytes();
    for cell in base.as_chunks_mut::<BASE_CELL>().0 {
        cell[NIBBLES..].as_chunks_mut::<2>().0.fill(constants);
    }
    let refine = (precision == Precision::Q8).then(|| WeightBytes::from(random(count * REFINE_CELL, rng)));
    Weight::Sliced(Sliced::new(rows, cols, base.into(), refine).expect("lengths fit"))
}

/// One variant: all rows of a call go to so many experts.
struct Variant {
    precision: Precision,
    rows: usize,
    /// Seconds, bytes and calls of each sample.
    samples: Vec<(f64, usize, usize)>,
}

fn run<K: Kernels<Matrix = GpuMatrix>>(mut kernels: K, options: &Options) -> Result<(), String> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let held = Precision::ALL.map(|precision| {
        let bytes = 3 * weight(precision, WIDTH, D, &mut rng).bytes();
        let count = (options.memory_mb << 20).div_ceil(bytes).max(EXPERTS);
        let expert = |_| {
            let [gate, up] = [0, 1].map(|_| kernels.matrix(weight(precision, WIDTH, D, &mut rng)));
            Gated { gate, up, down: kernels.matrix(weight(precision, D, WIDTH, &mut rng)) }
        };
        ((0..count).map(expert).collect::<Vec<_>>(), bytes)
    });
    let mut variants = Vec::new();
    for precision in Precision::ALL {
        variants.extend(options.rows.iter().map(|rows| Variant { precision, rows: *rows, samples: Vec::new() }));
    }
    let large = kernels.upload(vec![1.0; 64 << 20], 1 << 10);
    let mut copies = Vec::new();
    for round in 0..=options.rounds {
        variants.shuffle(&mut rng);
        let now = Instant::now();
        let sums = (0..4).fold(large.clone(), |sum, _| kernels.add(sum, large.clone()));
        kernels.download(kernels.select(&sums, &[(0, 1)]));
        copies.push(4.0 * 12.0 * f64::from(64 << 20) / now.elapsed().as_secs_f64() / 1e9);
        for variant in &mut variants {
            let (experts, bytes) = &held[variant.precision as usize];
            let used = (TOP * variant.rows).min(EXPERTS);
            let mut lists = vec![Vec::new(); used];
            (0..TOP * variant.rows).for_each(|pair| lists[pair % used].push((pair / TOP) as u32));
            let x = kernels.upload((0..variant.rows * D).map(|index| (index as f32).sin()).collect(), D);
            kernels.download(kernels.select(&x, &[(0, 1)]));
            let (mut first, mut read, mut calls) = (rng.random_range(0..experts.len()), 0, 0);
            let now = Instant::now();
            let last = loop {
                let expert = |index: usize| &experts[(first + index) % experts.len()];
                let work = lists.iter().enumerate().map(|(index, rows)| ExpertWork { expert: expert(index), rows });
                let output = kernels.experts(&x, &work.collect::<Vec<_>>());
                (first, read, calls) = (first + used, read + used * bytes, calls + 1);
                if read >= SAMPLE_BYTES {
                    break output;
                }
            };
            kernels.download(kernels.select(&last, &[(0, 1)]));
            // The first round compiles kernels.
            if round > 0 {
                variant.samples.push((now.elapsed().as_secs_f64(), read, calls));
            }
        }
    }
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let memory = median(copies.split_off(1));
    println!("{}: {memory:.0} GB/s elementwise, {} rounds", kernels.class(), options.rounds);
    println!("| precision | rows | GB/s | share | us a call |\n|---|---|---|---|---|");
    variants.sort_by_key(|variant| (variant.precision, variant.rows));
    for Variant { precision, rows, samples } in &variants {
        let speed = median(samples.iter().map(|(seconds, bytes, _)| *bytes as f64 / seconds / 1e9).collect());
        let call = median(samples.iter().map(|(seconds, _, calls)| seconds / *calls as f64 * 1e6).collect());
        println!("| {precision} | {rows} | {speed:.1} | {:.2} | {call:.0} |", speed / memory);
    }
    Ok(())
}

fn main() -> Result<(), String> {
    let options = Options::parse()?;
    match options.device.ok_or("give a device: --device cuda:N or vulkan:N")? {
        Device::Cuda(index) => {
            cuda::probe(index)?;
            run(CudaKernels::at(index), &options)
        }
        Device::Vulkan(number) => run(VulkanKernels::on(vulkan::open(number)?), &options),
    }
}
