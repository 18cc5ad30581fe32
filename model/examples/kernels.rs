//! What the CPU kernels reach on this machine, beside what its memory gives.
//!
//! `cargo run --release -p coel-model --example kernels -- [--threads N] [--rounds N] [--memory-mb N] [--rows N,N,...]
//! [--isa NAME]` multiplies matrices of the shape of one expert of Qwen1.5-MoE-A2.7B, many of them in turn, so that
//! nothing is cached, and prints GB/s of packed weights and 10^9 multiply-adds per second (GMAC/s). Samples of a few
//! milliseconds of all variants alternate in changing order; of each the median and the ninth decile are printed: on a
//! machine that does other work too, the decile is nearer to what the kernels can do.

use std::{hint::black_box, sync::atomic::AtomicU64, sync::atomic::Ordering, time::Instant};

use coel_model::{
    bytes::{DType, Matrix, WeightBytes},
    kernels::{Kernels, download, isa::Isa, packed::Packed, threads::Pool},
    slices::{BASE_CELL, Precision, REFINE_CELL, Sliced, Weight, cells},
};
use half::f16;
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

const OUT: usize = 1408;
const COLS: usize = 2048;
/// Bytes one sample of a memory-bound variant reads.
const SAMPLE_BYTES: usize = 48 << 20;
/// Multiply-adds after which a sample ends, if it has not read as many bytes.
const SAMPLE_MACS: usize = 400_000_000;

struct Options {
    threads: usize,
    rounds: usize,
    memory_mb: usize,
    rows: Vec<usize>,
    isa: Option<String>,
}

impl Options {
    fn parse() -> Result<Self, String> {
        let mut options =
            Self { threads: 0, rounds: 40, memory_mb: 1024, rows: vec![1, 2, 4, 8, 16, 64, 256], isa: None };
        let mut arguments = std::env::args().skip(1);
        while let Some(flag) = arguments.next() {
            let value = arguments.next().ok_or_else(|| format!("{flag} needs a value"))?;
            let number = |value: &str| value.parse::<usize>().map_err(|error| format!("{flag} {value}: {error}"));
            match flag.as_str() {
                "--threads" => options.threads = number(&value)?,
                "--rounds" => options.rounds = number(&value)?.max(1),
                "--memory-mb" => options.memory_mb = number(&value)?,
                "--rows" => options.rows = value.split(',').map(number).collect::<Result<_, _>>()?,
                "--isa" => options.isa = Some(value),
                _ => return Err(format!("{flag} is unknown; see the head of this example")),
            }
        }
        Ok(options)
    }
}

/// Matrices over `memory`, of whatever values its bytes mean.
fn matrices(memory: &WeightBytes, precision: Precision) -> Vec<Weight> {
    let cells = cells(OUT, COLS).expect("whole groups");
    let (base, refine) = (cells * BASE_CELL, cells * REFINE_CELL);
    let slice = |start: usize, len: usize| memory.slice(start..start + len);
    let matrix = |index: usize| match precision {
        Precision::Q4 => Sliced::new(OUT, COLS, slice(index * base, base)?, None).map(Weight::Sliced),
        Precision::Q8 => {
            let start = index * (base + refine);
            Sliced::new(OUT, COLS, slice(start, base)?, Some(slice(start + base, refine)?)).map(Weight::Sliced)
        }
        Precision::Exact => {
            let len = OUT * COLS * 2;
            Matrix::new(slice(index * len, len)?, DType::BF16, OUT, COLS).map(Weight::Exact)
        }
    };
    (0..).map_while(matrix).collect()
}

/// Random cells, whose bytes are finite numbers as BF16 too.
fn memory(bytes: usize, rng: &mut ChaCha8Rng) -> WeightBytes {
    let mut memory = vec![0u8; bytes / BASE_CELL * BASE_CELL];
    rng.fill(memory.as_mut_slice());
    for pair in memory.as_chunks_mut::<2>().0 {
        pair[1] &= 0xBF; // an exponent below that of 2
    }
    let [scale, offset] = [0.01, -1.2].map(|value| f16::from_f32(value).to_le_bytes());
    for cell in memory.as_chunks_mut::<BASE_CELL>().0 {
        for (index, constant) in cell[BASE_CELL - 64..].as_chunks_mut::<2>().0.iter_mut().enumerate() {
            *constant = if index < 16 { scale } else { offset };
        }
    }
    memory.into()
}

/// Reads `SAMPLE_BYTES` somewhere in `memory`.
fn read(pool: &mut Pool, memory: &[u8], start: usize) -> usize {
    const PIECE: usize = 1 << 18;
    let start = start % (memory.len() - SAMPLE_BYTES) / 64 * 64;
    let sum = AtomicU64::new(0);
    pool.each(SAMPLE_BYTES / PIECE, 1, |_, piece| {
        let mut lanes = [0u64; 32];
        for words in memory[start + piece * PIECE..][..PIECE].as_chunks::<256>().0 {
            for (lane, word) in lanes.iter_mut().zip(words.as_chunks::<8>().0) {
                *lane ^= u64::from_le_bytes(*word);
            }
        }
        sum.fetch_xor(lanes.iter().fold(0, |all, lane| all ^ lane), Ordering::Relaxed);
    });
    black_box(sum);
    SAMPLE_BYTES
}

/// What is measured: reading alone if there is no kernel.
struct Variant {
    name: String,
    kernels: Option<(Packed, Precision, usize)>,
    /// Seconds, bytes and multiply-adds of each sample.
    samples: Vec<(f64, usize, usize)>,
}

impl Variant {
    /// The median and the ninth decile of `figure`, which grows with speed.
    fn figures(&self, figure: impl Fn(&(f64, usize, usize)) -> f64) -> (f64, f64) {
        let mut sorted: Vec<f64> = self.samples.iter().map(figure).collect();
        sorted.sort_by(f64::total_cmp);
        (sorted[sorted.len() / 2], sorted[sorted.len() * 9 / 10])
    }
}

fn main() -> Result<(), String> {
    let options = Options::parse()?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let memory = memory((options.memory_mb << 20).max(4 * SAMPLE_BYTES), &mut rng);
    let held = Precision::ALL.map(|precision| matrices(&memory, precision));
    let mut pool = Pool::new(options.threads);
    let mut variants = vec![Variant { name: "read".into(), kernels: None, samples: Vec::new() }];
    for precision in Precision::ALL {
        for isa in Isa::available() {
            for rows in &options.rows {
                // The portable path is there to be right.
                let wanted = match &options.isa {
                    Some(name) => name == isa.name(),
                    None => isa != Isa::available()[0] || *rows == 1,
                };
                if wanted {
                    let name = format!("{precision} {} {rows}", isa.name());
                    let kernels = Some((Packed::new(isa, options.threads), precision, *rows));
                    variants.push(Variant { name, kernels, samples: Vec::new() });
                }
            }
        }
    }
    eprintln!("{} threads, {} MB of weights, {} rounds", pool.threads(), memory.len() >> 20, options.rounds);
    for _ in 0..options.rounds {
        variants.shuffle(&mut rng);
        for variant in &mut variants {
            let start = rng.random_range(0..memory.len());
            let Some((kernels, precision, rows)) = &mut variant.kernels else {
                let now = Instant::now();
                let bytes = read(&mut pool, memory.as_slice(), start);
                variant.samples.push((now.elapsed().as_secs_f64(), bytes, 0));
                continue;
            };
            let x: Vec<f32> = (0..*rows * COLS).map(|index| (index as f32).sin()).collect();
            let x = kernels.upload(x, COLS);
            let matrices = &held[*precision as usize];
            let first = start / (memory.len() / matrices.len() + 1);
            let (mut bytes, mut macs) = (0, 0);
            let now = Instant::now();
            for index in first.. {
                let weight = &matrices[index % matrices.len()];
                black_box(download(kernels.linear(&x, weight, None)));
                bytes += weight.bytes();
                macs += *rows * OUT * COLS;
                if bytes >= SAMPLE_BYTES || macs >= SAMPLE_MACS {
                    break;
                }
            }
            variant.samples.push((now.elapsed().as_secs_f64(), bytes, macs));
        }
    }
    variants.sort_by_key(|variant| {
        let order = variant.kernels.as_ref();
        order.map(|(kernels, precision, rows)| (*precision, kernels.class(), *rows))
    });
    println!("| precision, instructions, rows | GB/s median | GB/s p90 | GMAC/s median | GMAC/s p90 |");
    println!("|---|---|---|---|---|");
    for variant in &variants {
        let bytes = variant.figures(|(seconds, bytes, _)| *bytes as f64 / seconds / 1e9);
        let macs = variant.figures(|(seconds, _, macs)| *macs as f64 / seconds / 1e9);
        println!("| {} | {:.1} | {:.1} | {:.1} | {:.1} |", variant.name, bytes.0, bytes.1, macs.0, macs.1);
    }
    Ok(())
}
