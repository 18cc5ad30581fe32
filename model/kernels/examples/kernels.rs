//! What the CPU kernels reach on this machine, beside what its memory gives.
//!
//! `cargo run --release -p coel-kernels --example kernels -- [--threads N] [--rounds N] [--memory-mb N] [--rows N,N,...]
//! [--isa NAME]` multiplies matrices of the shape of one expert of Qwen1.5-MoE-A2.7B, many of them in turn, so that
//! nothing is cached: alone (`linear`), and as the experts of a layer (`decode`: four experts for each row; `layer`: all
//! sixty over four times as many rows as it says, spread evenly). It prints GB/s of packed weights and 10^9
//! multiply-adds per second (GMAC/s). Samples of a few milliseconds of all variants alternate in changing order; of
//! each the median and the ninth decile are printed: on a machine that does other work too, the decile is nearer to what
//! the kernels can do.

use std::{hint::black_box, sync::atomic::AtomicU64, sync::atomic::Ordering, time::Instant};

use coel_kernels::{ExpertWork, Gated, Kernels, cpu::CpuKernels, cpu::isa::Isa, cpu::threads::Pool};
use coel_weights::{
    matrix::{DType, Matrix},
    memory::WeightBytes,
    slices::{BASE_CELL, NIBBLES, Precision, REFINE_CELL, Sliced, Weight, cells, constants::Constants},
};
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

/// Hidden size, expert width, experts of a layer, experts of a token.
const D: usize = 2048;
const WIDTH: usize = 1408;
const EXPERTS: usize = 60;
const TOP: usize = 4;
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

/// Experts over `memory`, of whatever values its bytes mean.
fn experts(memory: &WeightBytes, precision: Precision) -> Vec<Gated<Weight>> {
    let cells = cells(WIDTH, D).expect("whole groups");
    let bytes = match precision {
        Precision::Q4 => cells * BASE_CELL,
        Precision::Q8 => cells * (BASE_CELL + REFINE_CELL),
        Precision::Exact => 2 * WIDTH * D,
    };
    let matrix = |index: usize, rows: usize, cols: usize| {
        let all = memory.slice(index * bytes..(index + 1) * bytes)?;
        let part = |range: std::ops::Range<usize>| all.slice(range).expect("inside");
        match precision {
            Precision::Q4 => Sliced::new(rows, cols, all, None).map(Weight::Sliced),
            Precision::Q8 => {
                let (base, refine) = (part(0..cells * BASE_CELL), part(cells * BASE_CELL..bytes));
                Sliced::new(rows, cols, base, Some(refine)).map(Weight::Sliced)
            }
            Precision::Exact => Matrix::new(all, DType::BF16, rows, cols).map(Weight::Exact),
        }
    };
    let expert = |index: usize| {
        let [gate, up] = [0, 1].map(|which| matrix(3 * index + which, WIDTH, D));
        Some(Gated { gate: gate?, up: up?, down: matrix(3 * index + 2, D, WIDTH)? })
    };
    (0..).map_while(expert).collect()
}

/// Random cells, whose bytes are finite numbers as BF16 too.
fn memory(bytes: usize, rng: &mut ChaCha8Rng) -> WeightBytes {
    let mut memory = vec![0u8; bytes / BASE_CELL * BASE_CELL];
    rng.fill(memory.as_mut_slice());
    for pair in memory.as_chunks_mut::<2>().0 {
        pair[1] &= 0xBF; // an exponent below that of 2
    }
    let constants = Constants::new(Constants::scale_code(0.01), 60).0.to_le_bytes();
    for cell in memory.as_chunks_mut::<BASE_CELL>().0 {
        cell[NIBBLES..].as_chunks_mut::<2>().0.fill(constants);
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

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    /// One matrix over this many rows.
    Linear(usize),
    /// The experts of this many rows, a different few for each.
    Decode(usize),
    /// All experts, so many rows each.
    Layer(usize),
}

struct Variant {
    name: String,
    /// Reading alone if there is no kernel.
    kernels: Option<(CpuKernels, Precision, Work)>,
    /// Seconds, bytes and multiply-adds of each sample.
    samples: Vec<(f64, usize, usize)>,
}

impl Work {
    /// Rows of input it takes.
    fn rows(self) -> usize {
        match self {
            Work::Linear(rows) | Work::Decode(rows) => rows,
            Work::Layer(rows) => rows * EXPERTS / TOP,
        }
    }

    /// Does it over `experts` from `first` on, its rows from `input`: bytes read and multiply-adds done.
    fn run(self, kernels: &mut CpuKernels, input: &[f32], experts: &[Gated<Weight>], first: usize) -> (usize, usize) {
        let expert = |index: usize| &experts[(first + index) % experts.len()];
        let n = self.rows();
        let x = kernels.upload(input[..n * D].to_vec(), D);
        let (count, each) = match self {
            Work::Linear(rows) => {
                black_box(kernels.linear(&x, &expert(0).gate, None));
                return (expert(0).gate.bytes(), rows * WIDTH * D);
            }
            Work::Decode(rows) => (TOP * rows, 1),
            Work::Layer(rows) => (EXPERTS, rows),
        };
        let rows: Vec<Vec<u32>> =
            (0..count).map(|index| (0..each).map(|row| ((index * each + row) % n) as u32).collect()).collect();
        let work: Vec<_> =
            rows.iter().enumerate().map(|(index, rows)| ExpertWork { expert: expert(index), rows }).collect();
        black_box(kernels.experts(&x, &work));
        (3 * count * expert(0).gate.bytes(), 3 * count * each * WIDTH * D)
    }
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
    let held = Precision::ALL.map(|precision| experts(&memory, precision));
    let mut pool = Pool::new(options.threads);
    let mut variants = vec![Variant { name: "read".into(), kernels: None, samples: Vec::new() }];
    for precision in Precision::ALL {
        for isa in Isa::available() {
            let linears = options.rows.iter().map(|rows| Work::Linear(*rows));
            for work in linears.chain([1, 8].map(Work::Decode)).chain([17, 34].map(Work::Layer)) {
                // The portable path is there to be right.
                let wanted = match &options.isa {
                    Some(name) => name == isa.name(),
                    None => isa != Isa::available()[0] || work == Work::Linear(1),
                };
                if wanted {
                    let name = format!("{precision} {} {work:?}", isa.name());
                    let kernels = Some((CpuKernels::new(isa, options.threads), precision, work));
                    variants.push(Variant { name, kernels, samples: Vec::new() });
                }
            }
        }
    }
    let rows = variants.iter().filter_map(|variant| Some(variant.kernels.as_ref()?.2.rows())).max().unwrap_or(0);
    let input: Vec<f32> = (0..rows * D).map(|_| rng.random_range(-1.0..1.0)).collect();
    eprintln!("{} threads, {} MB of weights, {} rounds", pool.threads(), memory.len() >> 20, options.rounds);
    for _ in 0..options.rounds {
        variants.shuffle(&mut rng);
        for variant in &mut variants {
            let start = rng.random_range(0..memory.len());
            let Some((kernels, precision, work)) = &mut variant.kernels else {
                let now = Instant::now();
                let bytes = read(&mut pool, memory.as_slice(), start);
                variant.samples.push((now.elapsed().as_secs_f64(), bytes, 0));
                continue;
            };
            let experts = &held[*precision as usize];
            let mut first = start / (memory.len() / experts.len() + 1);
            let (mut bytes, mut macs) = (0, 0);
            let now = Instant::now();
            while bytes < SAMPLE_BYTES && macs < SAMPLE_MACS {
                let (read, done) = work.run(kernels, &input, experts, first);
                (first, bytes, macs) = (first + read.div_ceil(3 * experts[0].gate.bytes()), bytes + read, macs + done);
            }
            variant.samples.push((now.elapsed().as_secs_f64(), bytes, macs));
        }
    }
    variants.sort_by_key(|variant| {
        let order = variant.kernels.as_ref();
        order.map(|(kernels, precision, work)| (*precision, kernels.class(), *work))
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
