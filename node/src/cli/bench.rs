//! `coel bench`: this machine's figures for a model, beside llama.cpp's where its programs are given.
//!
//! Every round runs each engine once, so that a machine with other work slows both alike; medians are printed.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clap::Args;
use coel_model::offload::meter::{DeviceStats, LayerRecall, OffloadStats};
use coel_model::tools::bench::{Bench, read_gb_s};
use coel_model::tools::generate::LocalModel;
use serde::Serialize;
use serde_json::Value;

use super::local::LocalArgs;
use super::{Failure, Output, print};
use crate::config::Size;

/// Bytes read to find what memory gives: far beyond any cache.
const READ_BYTES: usize = 1 << 30;
const READ_ROUNDS: usize = 5;

/// `coel bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    local: LocalArgs,
    /// Tokens of the prompt.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = tokens)]
    prompt: usize,
    /// Tokens decoded one after another.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = tokens)]
    r#gen: usize,
    /// Also decode this many sequences at once, each after a prompt of 64 tokens; at most 1024.
    #[arg(long, value_name = "N", value_parser = concurrent)]
    concurrent: Option<usize>,
    /// Rounds; medians are printed.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// llama.cpp's `llama-bench`, run in every round beside coel with the same threads.
    #[arg(long, value_name = "FILE", requires = "gguf")]
    llama_bench: Option<PathBuf>,
    /// llama.cpp's `llama-batched-bench`, for --concurrent.
    #[arg(long, value_name = "FILE", requires = "gguf")]
    llama_batched_bench: Option<PathBuf>,
    /// The model file for llama.cpp: the same shape at the same bits.
    #[arg(long, value_name = "FILE")]
    gguf: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Prompt of each of the concurrent sequences.
const CONCURRENT_PROMPT: usize = 64;

/// Rates of one engine, tokens per second, medians of the rounds.
#[derive(Debug, Serialize)]
struct Rates {
    prefill_tok_s: f64,
    decode_tok_s: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    concurrent_tok_s: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Report {
    precision: String,
    trunk: String,
    threads: usize,
    kernel_class: String,
    rounds: u32,
    #[serde(flatten)]
    coel: Rates,
    /// From the command's start to the first token's logits, milliseconds.
    first_token_ms: f64,
    /// Packed weights one token reads.
    bytes_per_token: u64,
    /// What decoding reads.
    memory_gb_s: f64,
    /// What plain reads get.
    read_gb_s: f64,
    memory_share: f64,
    resident_bytes: u64,
    peak_rss_bytes: u64,
    /// Packed weights and KV cache.
    packed_bytes: u64,
    #[serde(flatten)]
    tiers: Option<DiskOffloadFigures>,
    #[serde(flatten)]
    device: Option<CpuOffloadFigures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    llama_cpp: Option<Rates>,
    #[serde(skip_serializing_if = "Option::is_none")]
    without_llama_cpp: Option<&'static str>,
}

/// What decoding with experts on disk came to, over all rounds.
#[derive(Debug, Default, Serialize)]
struct DiskOffloadFigures {
    /// Experts that take turns in memory, and the share of all that fits.
    #[serde(rename = "shelved")]
    on_disk: usize,
    in_memory: usize,
    #[serde(rename = "tier_bytes")]
    disk_cache_bytes: u64,
    /// Share of needed experts that were in memory.
    hit_rate: f64,
    /// Waiting for the disk with nothing to compute.
    stall_ms_per_token: f64,
    read_bytes_per_token: f64,
    /// Of what was read ahead, the share that was then needed.
    prefetch_used: f64,
    /// Predicted among the chosen experts, on average over layers, where the layer before waited for some.
    recall: Option<f64>,
    recall_layers: Vec<LayerRecall>,
    #[serde(skip)]
    sums: OffloadStats,
    #[serde(skip)]
    tokens: usize,
}

impl DiskOffloadFigures {
    fn add(&mut self, round: &OffloadStats, tokens: usize) {
        self.sums.add(round);
        self.tokens += tokens;
        let (sums, tokens) = (&self.sums, self.tokens.max(1) as f64);
        (self.on_disk, self.in_memory, self.disk_cache_bytes) = (round.on_disk, round.in_memory, round.budget_bytes);
        self.hit_rate = sums.hit_rate();
        self.stall_ms_per_token = sums.stall.as_secs_f64() * 1e3 / tokens;
        self.read_bytes_per_token = sums.bytes_read as f64 / tokens;
        self.prefetch_used = sums.prefetch_used as f64 / sums.prefetched.max(1) as f64;
        [_, self.recall] = sums.mean_recall();
        self.recall_layers = sums.recall.clone();
    }
}

/// What decoding with experts in host memory beside a GPU came to, over all rounds.
#[derive(Debug, Default, Serialize)]
struct CpuOffloadFigures {
    /// Experts on the device now, the bytes they take, and those they may.
    device_experts: usize,
    device_bytes: u64,
    device_budget_bytes: u64,
    /// Share of needed experts that were on the device.
    device_hit_rate: f64,
    /// Experts that the CPU computed, a token.
    host_experts_per_token: f64,
    /// Promoted to the GPU, a token.
    #[serde(rename = "raised_bytes_per_token")]
    promoted_bytes_per_token: f64,
}

impl CpuOffloadFigures {
    /// Nothing where all is in one memory.
    fn of(sums: &DeviceStats, tokens: usize) -> Option<Self> {
        let tokens = tokens.max(1) as f64;
        (sums.hits + sums.promoted + sums.on_cpu > 0).then(|| Self {
            device_experts: sums.experts,
            device_bytes: sums.bytes,
            device_budget_bytes: sums.budget_bytes,
            device_hit_rate: sums.hit_rate(),
            host_experts_per_token: sums.on_cpu as f64 / tokens,
            promoted_bytes_per_token: sums.bytes_promoted as f64 / tokens,
        })
    }
}

/// What the rounds came to.
struct Measured {
    first_token_ms: f64,
    read_gb_s: f64,
    coel: Rates,
    llama_cpp: Option<Rates>,
    tiers: Option<DiskOffloadFigures>,
    device: Option<CpuOffloadFigures>,
}

fn tokens(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|tokens| *tokens > 0).ok_or_else(|| "write a number of tokens, at least 1".to_owned())
}

fn concurrent(text: &str) -> Result<usize, String> {
    let number = text.parse::<usize>().ok().filter(|number| (1..=1024).contains(number));
    number.ok_or_else(|| "write a number from 1 to 1024".to_owned())
}

impl BenchArgs {
    /// Prints the figures.
    pub fn run(self) -> Result<(), Failure> {
        let threads = self.local.threads();
        // First, while the memory is still free: a budget holds for measuring too.
        let read_bytes = self.local.memory().map_or(READ_BYTES, |budget| READ_BYTES.min(budget as usize / 2));
        let read = read_gb_s(threads, read_bytes, READ_ROUNDS);
        let started = Instant::now();
        let context = CONCURRENT_PROMPT + self.r#gen;
        let kv_tokens = self.prompt.max(self.r#gen).max(self.concurrent.unwrap_or(0) * (context + 32));
        let model = self.local.open_with(Some(kv_tokens), false)?;
        let mut bench = Bench::new(&model, 1);
        bench.decode(1)?;
        let first_token_ms = started.elapsed().as_secs_f64() * 1e3;
        let mut coel: [Vec<f64>; 3] = Default::default();
        let mut llama: [Vec<f64>; 3] = Default::default();
        bench.decode(8)?; // touches what the first token did not
        let mut tiers = DiskOffloadFigures::default();
        for _ in 0..self.rounds {
            coel[0].push(bench.prefill(self.prompt)?);
            let before = model.engine.offload_stats();
            coel[1].push(bench.decode(self.r#gen)?);
            tiers.add(&model.engine.offload_stats().since(&before), self.r#gen);
            if let Some(requests) = self.concurrent {
                coel[2].push(bench.concurrent(requests, CONCURRENT_PROMPT, self.r#gen)?);
            }
            if let (Some(program), Some(gguf)) = (&self.llama_bench, &self.gguf) {
                let [prefill, decode] = self.llama_bench(program, gguf, threads)?;
                llama[0].push(prefill);
                llama[1].push(decode);
            }
            if let (Some(program), Some(gguf), Some(requests)) =
                (&self.llama_batched_bench, &self.gguf, self.concurrent)
            {
                llama[2].push(self.llama_batched_bench(program, gguf, threads, requests)?);
            }
        }
        let measured = Measured {
            first_token_ms,
            read_gb_s: read,
            coel: rates(&coel),
            llama_cpp: self.llama_bench.as_ref().map(|_| rates(&llama)),
            device: CpuOffloadFigures::of(&tiers.sums.device, tiers.tokens),
            tiers: (model.engine.offload_stats().on_disk > 0).then_some(tiers),
        };
        let report = self.report(&model, &bench, measured);
        if self.output.json { print::json(&report) } else { report.print() }
    }

    fn report(&self, model: &LocalModel, bench: &Bench<'_>, measured: Measured) -> Report {
        let Measured { first_token_ms, read_gb_s, coel, llama_cpp, tiers, device } = measured;
        let ledger = model.engine.memory();
        let bytes_per_token = bench.bytes_per_token();
        let memory = bytes_per_token as f64 * coel.decode_tok_s / 1e9;
        let without =
            "not measured: give --llama-bench and --gguf (and --llama-batched-bench) to measure it beside coel";
        Report {
            precision: self.local.precision().to_string(),
            trunk: self.local.trunk().to_string(),
            threads: self.local.threads(),
            kernel_class: model.engine.class().to_owned(),
            rounds: self.rounds,
            coel,
            first_token_ms,
            bytes_per_token,
            memory_gb_s: memory,
            read_gb_s,
            memory_share: memory / read_gb_s,
            resident_bytes: crate::system::resident_bytes(),
            peak_rss_bytes: peak_rss_bytes(),
            packed_bytes: ledger.trunk_bytes
                + ledger.expert_bytes
                + ledger.disk_cache_bytes_reserved
                + ledger.disk_cache_bytes_promoted
                + ledger.kv_bytes_reserved,
            tiers,
            device,
            without_llama_cpp: llama_cpp.is_none().then_some(without),
            llama_cpp,
        }
    }

    /// Prefill and decode of llama.cpp, tokens per second.
    fn llama_bench(&self, program: &Path, gguf: &Path, threads: usize) -> Result<[f64; 2], Failure> {
        let mut command = Command::new(program);
        command.arg("-m").arg(gguf).args(["-r", "1", "-o", "json"]);
        command.args(["-t", &threads.to_string(), "-p", &self.prompt.to_string(), "-n", &self.r#gen.to_string()]);
        let text = output(command, program)?;
        let tests: Vec<Value> = serde_json::from_str(&text).map_err(|error| not_understood(program, &error))?;
        let rate = |field: &str| {
            let test = tests.iter().find(|test| test[field].as_u64().is_some_and(|n| n > 0));
            test.and_then(|test| test["avg_ts"].as_f64()).ok_or_else(|| not_understood(program, &"no avg_ts"))
        };
        Ok([rate("n_prompt")?, rate("n_gen")?])
    }

    /// Concurrent decode of llama.cpp, tokens per second of all together.
    fn llama_batched_bench(
        &self,
        program: &Path,
        gguf: &Path,
        threads: usize,
        requests: usize,
    ) -> Result<f64, Failure> {
        let tokens = (CONCURRENT_PROMPT + self.r#gen) * requests;
        let mut command = Command::new(program);
        command.arg("-m").arg(gguf).args(["--output-format", "jsonl", "-c", &tokens.to_string()]);
        command.args(["-npp", &CONCURRENT_PROMPT.to_string(), "-ntg", &self.r#gen.to_string()]);
        command.args(["-npl", &requests.to_string(), "-t", &threads.to_string()]);
        let text = output(command, program)?;
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let rate = lines.into_iter().find_map(|line| line["speed_tg"].as_f64());
        rate.ok_or_else(|| not_understood(program, &"no speed_tg"))
    }
}

fn output(mut command: Command, program: &Path) -> Result<String, Failure> {
    let failed = |why: &dyn std::fmt::Display| Failure { message: format!("{}: {why}", program.display()), code: 1 };
    let output = command.output().map_err(|error| failed(&error))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(&format!("{}; it said: {}", output.status, said.lines().last().unwrap_or_default())));
    }
    String::from_utf8(output.stdout).map_err(|error| failed(&error))
}

fn not_understood(program: &Path, why: &dyn std::fmt::Display) -> Failure {
    Failure { message: format!("{}: its output is not understood: {why}", program.display()), code: 1 }
}

fn rates([prefill, decode, concurrent]: &[Vec<f64>; 3]) -> Rates {
    Rates {
        prefill_tok_s: median(prefill).unwrap_or(0.0),
        decode_tok_s: median(decode).unwrap_or(0.0),
        concurrent_tok_s: median(concurrent),
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// Most memory this process ever had resident; 0 where the system does not say.
fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

impl Report {
    fn print(&self) -> Result<(), Failure> {
        let mut rows = vec![("prefill", Some(self.coel.prefill_tok_s)), ("decode", Some(self.coel.decode_tok_s))];
        rows.push(("concurrent", self.coel.concurrent_tok_s));
        let others = self
            .llama_cpp
            .as_ref()
            .map(|rates| [Some(rates.prefill_tok_s), Some(rates.decode_tok_s), rates.concurrent_tok_s]);
        let rows = rows.into_iter().enumerate().filter_map(|(index, (name, rate))| {
            let rate = rate?;
            let other = others.and_then(|others| others[index]);
            let of = |value: Option<String>| value.unwrap_or_else(|| "-".into());
            Some(vec![
                name.to_owned(),
                format!("{rate:.1}"),
                of(other.map(|other| format!("{other:.1}"))),
                of(other.map(|other| format!("{:.2}x", rate / other))),
            ])
        });
        let out = &mut std::io::stdout();
        writeln!(
            out,
            "experts {}, trunk {}, {} threads, {}, medians of {} rounds",
            self.precision, self.trunk, self.threads, self.kernel_class, self.rounds
        )?;
        writeln!(out, "{}", print::table(&["tokens/s", "coel", "llama.cpp", "ratio"], 1, rows))?;
        writeln!(
            out,
            "decode reads {} a token: {:.1} GB/s, {:.0} % of the {:.1} GB/s that plain reads get",
            Size(self.bytes_per_token),
            self.memory_gb_s,
            self.memory_share * 100.0,
            self.read_gb_s
        )?;
        writeln!(
            out,
            "first token {:.0} ms after the start; resident {} ({:.2} times packed weights and KV cache), peak {}",
            self.first_token_ms,
            Size(self.resident_bytes),
            self.resident_bytes as f64 / self.packed_bytes as f64,
            Size(self.peak_rss_bytes)
        )?;
        if let Some(tiers) = &self.tiers {
            writeln!(
                out,
                "{} of {} experts in memory: {:.0} % of those needed were there, {} read and {:.1} ms waited a token",
                tiers.in_memory,
                tiers.on_disk,
                tiers.hit_rate * 100.0,
                Size(tiers.read_bytes_per_token as u64),
                tiers.stall_ms_per_token
            )?;
        }
        if let Some(device) = &self.device {
            writeln!(
                out,
                "{} experts on the device, {} of {}: {:.0} % of those needed were there, {:.1} computed by the host and {} brought up a token",
                device.device_experts,
                Size(device.device_bytes),
                Size(device.device_budget_bytes),
                device.device_hit_rate * 100.0,
                device.host_experts_per_token,
                Size(device.promoted_bytes_per_token as u64)
            )?;
        }
        if let Some(why) = self.without_llama_cpp {
            writeln!(out, "llama.cpp {why}")?;
        }
        Ok(())
    }
}
