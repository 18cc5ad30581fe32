//! Commands that compute locally and need no node: one machine, one model directory.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use coel_model::serve::device::Device;
use coel_model::text::sampling::SamplingParams;
use coel_model::text::sequence::GenerateParams;
use coel_model::tools::eval::{TextReport, WINDOW_TOKENS, eval_qa, eval_reference, eval_text, eval_text_against};
use coel_model::tools::generate::{LocalModel, LocalOptions};
use coel_model::weights::slices::Precision;
use serde::Serialize;

use super::policies::{self, Comparison};
use super::{Failure, Output, print};
use crate::config::Size;

/// A model on this machine.
#[derive(Debug, Args)]
pub struct LocalArgs {
    /// Model directory: a checkpoint, or slices that `coel model slice` made of one.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// `auto`, `cpu`, `cuda:N` or `vulkan:N`.
    #[arg(long, env = "COEL_DEVICE", default_value = "auto")]
    device: String,
    /// How exactly experts are held: `q4`, `q8`, or `exact` as in the checkpoint.
    #[arg(long, value_name = "PRECISION", default_value_t = Precision::Exact)]
    precision: Precision,
    /// The same for everything but experts [default: as --precision].
    #[arg(long, value_name = "PRECISION")]
    trunk: Option<Precision>,
    /// Threads that compute [default: one for each core].
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, value_parser = threads)]
    threads: usize,
    /// Memory to take, hard: experts that do not fit stay on disk and are read when they are needed [default: all of
    /// them in memory].
    #[arg(long, value_name = "SIZE", env = "COEL_MEMORY")]
    memory: Option<Size>,
    /// Memory of the GPU to take, hard: experts that do not fit lie in the machine's memory, which --memory then bounds by
    /// itself, and are computed there or brought up, whichever is sooner [default: all of them on the GPU].
    #[arg(long, value_name = "SIZE", env = "COEL_VRAM")]
    vram: Option<Size>,
    /// Threads that read experts from disk [default: 2].
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, requires = "memory")]
    readers: usize,
}

fn threads(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|threads| *threads <= 1024)
        .ok_or_else(|| "write a number up to 1024; 0: one for each core".to_owned())
}

impl LocalArgs {
    /// How exactly experts are held.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// How exactly the trunk is held.
    pub fn trunk(&self) -> Precision {
        self.trunk.unwrap_or(self.precision)
    }

    /// The model's folder.
    pub fn dir(&self) -> &Path {
        &self.model
    }

    /// Bytes of memory to take, if that is bounded.
    pub fn memory(&self) -> Option<u64> {
        self.memory.map(|size| size.0)
    }

    fn device(&self) -> Result<Device, Failure> {
        self.device.parse().map_err(|error| Failure::usage(format!("--device: {error}")))
    }

    fn open(&self) -> Result<LocalModel, Failure> {
        self.open_with(None, false)
    }

    fn options(&self) -> Result<LocalOptions, Failure> {
        Ok(LocalOptions {
            device: self.device()?,
            trunk: self.trunk(),
            experts: self.precision,
            threads: self.threads,
            memory: self.memory(),
            vram: self.vram.map(|size| size.0),
            readers: self.readers,
            ..LocalOptions::default()
        })
    }

    /// Opens the model with a KV cache of so many tokens, or of one full context; `measure_recall` counts how well experts are
    /// predicted.
    pub fn open_with(&self, kv_tokens: Option<usize>, measure_recall: bool) -> Result<LocalModel, Failure> {
        let options = LocalOptions { kv_tokens, measure_recall, ..self.options()? };
        Ok(LocalModel::open_with(&self.model, &options)?)
    }

    /// Opens it at other precisions than were asked for.
    pub fn open_as(
        &self,
        trunk: Precision,
        experts: Precision,
        kv_tokens: Option<usize>,
    ) -> Result<LocalModel, Failure> {
        let options = LocalOptions { trunk, experts, kv_tokens, ..self.options()? };
        Ok(LocalModel::open_with(&self.model, &options)?)
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
    }
}

/// `coel generate`.
#[derive(Debug, Args)]
pub struct Generate {
    #[command(flatten)]
    local: LocalArgs,
    /// Text to continue.
    prompt: String,
    /// Take the prompt as a user's turn of a chat.
    #[arg(long)]
    chat: bool,
    /// Longest continuation, in tokens [default: to the end of the context].
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// 0 always picks the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Keep the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Keep this many of the likeliest tokens; 0 keeps all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Keep tokens at least this likely, relative to the likeliest.
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    /// Above 1 makes tokens that are there already less likely.
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Same seed, same tokens.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Text that ends the continuation; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    #[command(flatten)]
    output: Output,
}

impl Generate {
    /// Streams the continuation to stdout.
    pub fn run(self) -> Result<(), Failure> {
        let params = GenerateParams {
            max_tokens: self.max_tokens,
            sampling: SamplingParams {
                temperature: self.temperature,
                top_p: self.top_p,
                top_k: self.top_k,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                seed: self.seed,
            },
            stop: self.stop,
            logprobs: None,
            ignore_eos: false,
        };
        params.validate().map_err(Failure::usage)?;
        let model = self.local.open()?;
        let json = self.output.json;
        let mut shown = Ok(());
        let show = |emitted: &coel_model::text::sequence::Emitted| {
            if !json && shown.is_ok() {
                let mut stdout = std::io::stdout();
                shown = write!(stdout, "{}", emitted.text).and_then(|()| stdout.flush());
            }
        };
        let answer = if self.chat {
            model.chat(&self.prompt, params, show)?
        } else {
            let prompt = model.text.tokenizer.encode(&self.prompt, true)?;
            model.generate(prompt, params, show)?
        };
        shown?;
        if json {
            return print::json(&serde_json::json!({
                "text": answer.text,
                "tokens": answer.tokens,
                "finish_reason": answer.finish.as_str(),
                "prompt_tokens": answer.usage.prompt_tokens,
                "completion_tokens": answer.usage.completion_tokens,
                "kernel_class": model.engine.class(),
                "other_classes": answer.other_classes,
                "precision": self.local.precision.name(),
                "trunk": self.local.trunk().name(),
            }));
        }
        writeln!(std::io::stdout())?;
        Ok(())
    }
}

/// `coel eval`: one of the three, or policies compared on texts and, if wanted, questions.
#[derive(Debug, Args)]
pub struct Eval {
    #[command(flatten)]
    local: LocalArgs,
    #[command(flatten)]
    measure: Measure,
    /// Tokens per window of --text.
    #[arg(long, value_name = "N", default_value_t = WINDOW_TOKENS, requires = "text", value_parser = window)]
    window: usize,
    /// The same model exact: with --text, also prints how far predictions are from its own. Held in memory whole; not with --memory.
    #[arg(long, value_name = "DIR", requires = "text", conflicts_with_all = ["reference", "qa"])]
    against: Option<PathBuf>,
    /// Compare rules of giving experts more than 4 bits, at equal bytes: with --text, and --qa if wanted. The model must be
    /// a checkpoint; its trunk is exact unless --trunk says otherwise.
    #[arg(long, requires = "text", conflicts_with_all = ["precision", "against", "reference", "memory", "vram", "recall"])]
    policies: bool,
    /// With --policies: bits a weight that mixed experts take, from 4.5 (all at q4) to 8.5 (all at q8).
    #[arg(long, value_name = "N", default_value_t = 6.0, requires = "policies", value_parser = bits)]
    bits: f64,
    /// With --policies: how many lots are drawn for the random rule.
    #[arg(long, value_name = "N", default_value_t = 3, requires = "policies", value_parser = clap::value_parser!(u32).range(1..))]
    seeds: u32,
    /// Also print how many of the experts a layer chooses were predicted, by as many guesses, layer by layer and on
    /// average: early, as if none of the layer before were in memory (its shared expert is), and, with --memory, late,
    /// by those that were, where some were missing.
    #[arg(long)]
    recall: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
struct Measure {
    /// Safetensors file with input_ids, logits, greedy and, if it has them, routes, made by another implementation.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["text", "qa"])]
    reference: Option<PathBuf>,
    /// Text files; prints the perplexity of all together.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// JSON lines with question, answer and, if it has it, reference.
    #[arg(long, value_name = "FILE")]
    qa: Option<PathBuf>,
}

fn window(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|tokens| *tokens > 1).ok_or_else(|| "write a number of tokens, at least 2".to_owned())
}

fn bits(text: &str) -> Result<f64, String> {
    let bits = text.parse::<f64>().ok().filter(|bits| (4.5..=8.5).contains(bits));
    bits.ok_or_else(|| "write a number from 4.5 to 8.5".to_owned())
}

impl Eval {
    /// Prints the figures, also when they fail.
    pub fn run(self) -> Result<(), Failure> {
        let texts = &self.measure.text;
        if self.policies {
            let questions = self.measure.qa.as_deref();
            let (window, bits, seeds) = (self.window, self.bits, self.seeds);
            let compared = Comparison { texts, questions, window, bits, seeds };
            return policies::run(&self.local, &compared, self.output);
        }
        if !texts.is_empty() && self.measure.qa.is_some() {
            return Err(Failure::usage("name either --text or --qa, or compare policies on both with --policies"));
        }
        if self.against.is_some() && (self.local.memory.is_some() || self.local.vram.is_some()) {
            return Err(Failure::usage(
                "--against holds a second model, whole and exact, which --memory (COEL_MEMORY) and --vram (COEL_VRAM) do not \
                 bound; leave one of them out",
            ));
        }
        let model = self.local.open_with(None, self.recall)?;
        // References are of the exact model: at fewer bits the figures tell how far it is, and nothing passes or fails.
        let lossy = [self.local.precision, self.local.trunk()] != [Precision::Exact; 2];
        if let Some(file) = &self.measure.reference {
            let report = eval_reference(&model, file)?;
            let passed = (!lossy).then_some(report.passed);
            return self.verdict(&model, &report, passed, "the model differs from the reference");
        }
        if let Some(file) = &self.measure.qa {
            let report = eval_qa(&model, file)?;
            let passed = (!lossy).then_some(report.passed);
            return self.verdict(&model, &report, passed, "too few answers equal the reference");
        }
        let exact = self.against.as_ref().map(|dir| LocalModel::open(dir, self.local.device()?).map_err(Failure::from));
        let exact = exact.transpose()?;
        let context = model.engine.config().max_position_embeddings;
        if self.window > context {
            return Err(Failure::usage(format!("--window {}: the model's context has {context} tokens", self.window)));
        }
        let reports = texts.iter().map(|file| match &exact {
            Some(exact) => eval_text_against(&model, exact, file, self.window),
            None => eval_text(&model, file, self.window),
        });
        let reports = reports.collect::<Result<Vec<_>, _>>()?;
        match TextReport::together(&reports) {
            Some(report) => self.verdict(&model, &report, Some(report.passed), "the perplexity is not a number"),
            None => Err(Failure::usage("name one of --reference, --text, --qa")),
        }
    }

    /// Prints the figures and fails where they did not pass; where there is nothing to pass, that is not said either.
    fn verdict(
        &self,
        model: &LocalModel,
        report: &impl Serialize,
        passed: Option<bool>,
        otherwise: &str,
    ) -> Result<(), Failure> {
        let mut fields = serde_json::to_value(report)?;
        if let (None, Some(fields)) = (passed, fields.as_object_mut()) {
            fields.remove("passed");
        }
        if let (true, Some(fields)) = (self.recall, fields.as_object_mut()) {
            let stats = model.engine.offload_stats();
            let [early, late] = stats.mean_recall();
            fields.insert("recall_early".into(), early.into());
            fields.insert("recall_late".into(), late.into());
            fields.insert("recall_layers".into(), serde_json::to_value(stats.recall)?);
        }
        if self.output.json {
            print::json(&fields)?;
        } else if let serde_json::Value::Object(fields) = fields {
            for (name, value) in fields {
                writeln!(std::io::stdout(), "{name} {value}")?;
            }
        }
        if passed.unwrap_or(true) { Ok(()) } else { Err(Failure { message: otherwise.to_owned(), code: 1 }) }
    }
}
