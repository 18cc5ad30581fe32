//! Commands that compute and need no node: one machine, one model directory.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use coel_model::device::Device;
use coel_model::eval::{WINDOW_TOKENS, eval_qa, eval_reference, eval_text, eval_text_against};
use coel_model::generate::{LocalModel, LocalOptions};
use coel_model::sampling::SamplingParams;
use coel_model::sequence::GenerateParams;
use coel_model::slices::Precision;
use serde::Serialize;

use super::{Failure, Output, print};
use crate::size::Size;

/// A model on this machine.
#[derive(Debug, Args)]
pub struct Local {
    /// Model directory: a checkpoint, or slices that `coel model slice` made of one.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// `auto`, `cpu` or `cuda:N`.
    #[arg(long, env = "COEL_DEVICE", default_value = "auto")]
    device: String,
    /// How exactly experts are held: `q4`, `q8`, or `exact` as in the checkpoint.
    #[arg(long, value_name = "PRECISION", default_value_t = Precision::Exact)]
    precision: Precision,
    /// The same for everything but experts [default: as --precision].
    #[arg(long, value_name = "PRECISION")]
    trunk: Option<Precision>,
    /// Threads that compute [default: one for each core].
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Memory to take, hard: experts that do not fit stay on disk and are read when they are needed [default: all of
    /// them in memory].
    #[arg(long, value_name = "SIZE", env = "COEL_MEMORY")]
    memory: Option<Size>,
    /// Threads that read experts from disk [default: 2].
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, requires = "memory")]
    readers: usize,
}

impl Local {
    /// How exactly experts are held.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// How exactly the trunk is held.
    pub fn trunk(&self) -> Precision {
        self.trunk.unwrap_or(self.precision)
    }

    fn device(&self) -> Result<Device, Failure> {
        self.device.parse().map_err(|error| Failure::usage(format!("--device: {error}")))
    }

    fn open(&self) -> Result<LocalModel, Failure> {
        self.open_with(None, false)
    }

    /// Opens the model with a KV cache of so many tokens, or of one full context; `foresee` counts how well experts are
    /// predicted.
    pub fn open_with(&self, kv_tokens: Option<usize>, foresee: bool) -> Result<LocalModel, Failure> {
        let options = LocalOptions {
            device: self.device()?,
            trunk: self.trunk(),
            experts: self.precision,
            threads: self.threads,
            kv_tokens,
            memory: self.memory.map(|size| size.0),
            readers: self.readers,
            foresee,
        };
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
    local: Local,
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
        let show = |emitted: &coel_model::sequence::Emitted| {
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
                "precision": self.local.precision.name(),
                "trunk": self.local.trunk().name(),
            }));
        }
        writeln!(std::io::stdout())?;
        Ok(())
    }
}

/// `coel eval`: exactly one of the three.
#[derive(Debug, Args)]
pub struct Eval {
    #[command(flatten)]
    local: Local,
    #[command(flatten)]
    measure: Measure,
    /// Tokens per window of --text.
    #[arg(long, value_name = "N", default_value_t = WINDOW_TOKENS, requires = "text")]
    window: usize,
    /// The same model exact: with --text, also prints how far predictions are from its own.
    #[arg(long, value_name = "DIR", requires = "text")]
    against: Option<PathBuf>,
    /// Also print how many of the experts a layer chooses were predicted, layer by layer and on average: early, when the
    /// layer before had its attention, and late, when it was done.
    #[arg(long)]
    recall: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Measure {
    /// Safetensors file with input_ids, logits, greedy and, if it has them, routes, made by another implementation.
    #[arg(long, value_name = "FILE")]
    reference: Option<PathBuf>,
    /// Text file; prints its perplexity.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// JSON lines with question, answer and, if it has it, reference.
    #[arg(long, value_name = "FILE")]
    qa: Option<PathBuf>,
}

impl Eval {
    /// Prints the figures, also when they fail.
    pub fn run(self) -> Result<(), Failure> {
        let model = self.local.open_with(None, self.recall)?;
        match (&self.measure.reference, &self.measure.text, &self.measure.qa) {
            (Some(file), ..) => {
                let report = eval_reference(&model, file)?;
                self.verdict(&model, &report, report.passed, "the model differs from the reference")
            }
            (_, Some(file), _) => {
                let report = match &self.against {
                    Some(exact) => {
                        let exact = LocalModel::open(exact, self.local.device()?)?;
                        eval_text_against(&model, &exact, file, self.window)?
                    }
                    None => eval_text(&model, file, self.window)?,
                };
                self.verdict(&model, &report, report.passed, "the perplexity is not a number")
            }
            (_, _, Some(file)) => {
                let report = eval_qa(&model, file)?;
                self.verdict(&model, &report, report.passed, "too few answers equal the reference")
            }
            _ => Err(Failure::usage("name one of --reference, --text, --qa")),
        }
    }

    fn verdict(
        &self,
        model: &LocalModel,
        report: &impl Serialize,
        passed: bool,
        otherwise: &str,
    ) -> Result<(), Failure> {
        let mut fields = serde_json::to_value(report)?;
        if let (true, Some(fields)) = (self.recall, fields.as_object_mut()) {
            let stats = model.engine.tiers();
            let [early, late] = stats.mean_recall().unwrap_or_default();
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
        if passed { Ok(()) } else { Err(Failure { message: otherwise.to_owned(), code: 1 }) }
    }
}
