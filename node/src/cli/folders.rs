//! Commands on model directories that compute nothing: inspect, slice, synth.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use coel_model::budget::inventory::{FormBytes, Inventory};
use coel_model::tools::synth::SynthSpec;
use coel_model::weights::folder::ModelFolder;
use coel_model::weights::slices::Precision;
use coel_model::weights::slicing::slice_checkpoint;
use serde::Serialize;

use super::print::{self, Progress};
use super::{Failure, Output};
use crate::budget::{Fit, ModelSizes};
use crate::config::{KV_TOKENS, Size};

/// `coel model inspect`.
#[derive(Debug, Args)]
pub struct Inspect {
    /// The directory: a checkpoint, or slices of one.
    dir: PathBuf,
    /// Memory of a node: also show what fits it, at which precision.
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// KV cache of that node, in tokens.
    #[arg(long, value_name = "N", default_value_t = KV_TOKENS)]
    kv_tokens: usize,
    #[command(flatten)]
    output: Output,
}

/// What `coel model inspect` prints.
#[derive(Debug, Serialize)]
struct Inspection {
    architecture: &'static str,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    sparse_layers: usize,
    num_experts: usize,
    num_experts_per_tok: usize,
    moe_intermediate_size: usize,
    max_position_embeddings: usize,
    dtype: String,
    #[serde(flatten)]
    inventory: Inventory,
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<Budget>,
}

#[derive(Debug, Serialize)]
struct Budget {
    memory_bytes: u64,
    kv_tokens: usize,
    /// One row per precision of the trunk; experts at q4, q8 and exact.
    fits: Vec<Fit>,
}

impl Inspect {
    /// Prints what is there.
    pub fn run(self) -> Result<(), Failure> {
        let folder = ModelFolder::open(&self.dir)?;
        let config = folder.config();
        let inventory = Inventory::of(&folder);
        let kv_tokens = self.kv_tokens;
        let budget = self.memory.map(|Size(memory_bytes)| {
            let fits = ModelSizes::of_folder(&folder).fits(memory_bytes, kv_tokens);
            Budget { memory_bytes, kv_tokens, fits }
        });
        let inspection = Inspection {
            architecture: config.architecture.name(),
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            num_hidden_layers: config.num_hidden_layers,
            sparse_layers: config.sparse_layers().count(),
            num_experts: config.num_experts,
            num_experts_per_tok: config.num_experts_per_tok,
            moe_intermediate_size: config.moe_intermediate_size,
            max_position_embeddings: config.max_position_embeddings,
            dtype: config.dtype.to_string(),
            inventory,
            budget,
        };
        match self.output.json {
            true => print::json(&inspection),
            false => inspection.print(),
        }
    }
}

impl Inspection {
    fn print(&self) -> Result<(), Failure> {
        let mut out = std::io::stdout();
        let inventory = &self.inventory;
        writeln!(out, "architecture  {} ({})", self.architecture, self.dtype)?;
        writeln!(
            out,
            "experts       {} in {} of {} layers, {} per token",
            inventory.experts_total, self.sparse_layers, self.num_hidden_layers, self.num_experts_per_tok
        )?;
        writeln!(
            out,
            "KV cache      {} per token, context {}",
            Size(inventory.kv_bytes_per_token),
            self.max_position_embeddings
        )?;
        let size = |bytes: Option<u64>| bytes.map_or("-".to_owned(), |bytes| Size(bytes).to_string());
        let row = |name: &str, bytes: &FormBytes| {
            let forms = [bytes.base, bytes.refine, bytes.at(Precision::Q8), Some(bytes.exact)];
            std::iter::once(name.to_owned()).chain(forms.map(size)).collect()
        };
        let exact = if inventory.has_exact { "exact" } else { "exact (not here)" };
        let rows =
            [row("trunk", &inventory.trunk), row("experts", &inventory.experts), row("one expert", &inventory.expert)];
        writeln!(out, "{}", print::table(&["bytes", "base (q4)", "refine", "q8", exact], 1, rows))?;
        let Some(budget) = &self.budget else {
            return Ok(());
        };
        writeln!(
            out,
            "In {}, beside a KV cache of {} tokens, so many of the {} experts fit:",
            Size(budget.memory_bytes),
            budget.kv_tokens,
            inventory.experts_total
        )?;
        let count = |experts: &Option<usize>| match experts {
            Some(experts) if *experts == inventory.experts_total => "all".to_owned(),
            Some(experts) => experts.to_string(),
            None => "-".to_owned(),
        };
        let rows = budget.fits.iter().map(|fit| {
            let fixed = format!("{} ({})", fit.trunk, Size(fit.fixed_bytes));
            std::iter::once(fixed).chain(fit.experts.iter().map(count)).collect()
        });
        let header = ["trunk, cache and buffers", "experts at q4", "at q8", "exact"];
        writeln!(out, "{}", print::table(&header, 1, rows))?;
        let least = budget.fits.iter().map(|fit| fit.fixed_bytes).min().filter(|least| *least > budget.memory_bytes);
        if let Some(least) = least {
            writeln!(out, "nothing fits: trunk, cache and buffers alone take at least {}", Size(least))?;
        }
        Ok(())
    }
}

/// `coel model slice`.
#[derive(Debug, Args)]
pub struct Slice {
    /// The checkpoint directory.
    dir: PathBuf,
    /// The directory to write; must not be another model. In one that holds these slices already, damaged ones are replaced.
    out: PathBuf,
}

impl Slice {
    /// Writes the slices, with progress on stderr.
    pub fn run(self) -> Result<(), Failure> {
        let mut progress = Progress::new();
        Ok(slice_checkpoint(&self.dir, &self.out, |done, total| {
            progress.set("slicing, bytes of weights", done, total)
        })?)
    }
}

/// `coel model synth`.
#[derive(Debug, Args)]
pub struct Synth {
    /// The shape: `qwen1.5-moe-a2.7b`, or a directory with a config.json.
    #[arg(long, value_name = "SHAPE")]
    like: String,
    /// Number of layers [default: the shape's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    layers: Option<u16>,
    /// Same seed, same weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write slices instead of a checkpoint.
    #[arg(long)]
    slices: bool,
    /// The directory to write; must not be a model yet.
    out: PathBuf,
}

impl Synth {
    /// Writes the model, with progress on stderr.
    pub fn run(self) -> Result<(), Failure> {
        let spec = SynthSpec::new(&self.like, self.layers.map(usize::from), self.seed)?;
        let mut progress = Progress::new();
        let show = |done, total| progress.set("making weights, bytes", done, total);
        match self.slices {
            true => spec.write_sliced(&self.out, show)?,
            false => spec.write(&self.out, show)?,
        }
        Ok(())
    }
}
