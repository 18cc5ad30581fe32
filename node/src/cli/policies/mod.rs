//! `coel eval --policies`: what each rule of mixing precisions costs at the same bytes.
//!
//! Experts are measured on the built-in text, as an import does, and judged on the texts given: what decides and what
//! judges are never the same.

mod rules;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use coel_model::text::model::TextModel;
use coel_model::tools::eval::{Closeness, TextReport, eval_qa, eval_text, eval_text_against};
use coel_model::tools::generate::LocalModel;
use coel_model::tools::popularity::{CALIBRATION_NAME, CALIBRATION_TEXT};
use coel_model::tools::survey::{SurveySource, survey};
use coel_model::weights::error::LoadError;
use coel_model::weights::folder::ModelFolder;
use coel_model::weights::layout;
use coel_model::weights::layout::ExpertId;
use coel_model::weights::slices::Precision;
use coel_model::weights::tensors::Tensors;
use serde::Serialize;

use super::local::LocalArgs;
use super::print::{self, Progress};
use super::{Failure, Output};
use crate::budget::{ExpertSizes, SizeByPrecision};
use crate::ids;
use crate::import::measurements;
use crate::placement::Popularity;
use rules::{Measured, Policy, bytes_at};

/// What is compared, and on what.
pub struct Comparison<'a> {
    pub texts: &'a [PathBuf],
    pub questions: Option<&'a Path>,
    /// Tokens of a window.
    pub window: usize,
    /// Bits a weight that mixed experts take on average.
    pub bits: f64,
    /// How many lots are drawn for the random rule.
    pub seeds: u32,
}

/// What `coel eval --policies` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// Everything but experts.
    trunk: &'static str,
    /// Of the mixed ones.
    bits: f64,
    /// What popularity and sensitivity were measured on.
    measured_on: &'static str,
    predicted: usize,
    policies: Vec<Row>,
}

#[derive(Debug, Clone, Serialize)]
struct Row {
    policy: &'static str,
    expert_bytes: u64,
    /// Experts at Q8.
    raised: usize,
    perplexity: f64,
    kl_divergence: f64,
    same_top: f64,
    /// Share of the questions, if any were asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    accuracy: Option<f64>,
    /// Of how many runs these are means.
    runs: u32,
}

/// Prints the table.
pub fn run(local: &LocalArgs, compared: &Comparison<'_>, output: Output) -> Result<(), Failure> {
    let mut progress = Progress::new();
    let folder = ModelFolder::open(local.dir())?;
    let measured = measure(&folder, local.threads(), &mut progress)?;
    let mut bench = Bench::new(local, &folder, compared)?;
    let mut rows = vec![bench.exact()?];
    let lots = (0..compared.seeds).map(|seed| Policy::Random { seed: u64::from(seed) });
    let rules: Vec<Policy> =
        [Policy::Uniform, Policy::Popularity, Policy::ExpectedLoss].into_iter().chain(lots).collect();
    let mut step = |done: usize| progress.set("evaluating policies", done as u64 + 1, rules.len() as u64 + 3);
    step(0);
    let q4 = bench.hold_all(Precision::Q4, "q4")?;
    step(1);
    let q8 = bench.hold_all(Precision::Q8, "q8")?;
    let count = bench.held.len().max(1) as u64;
    let choices = SizeByPrecision::new([Some(q4.expert_bytes / count), Some(q8.expert_bytes / count), None]);
    let experts: ExpertSizes = bench.held.keys().map(|&expert| (ids::to_store(expert), choices)).collect();
    let bytes_max = bytes_at(compared.bits, q4.expert_bytes, q8.expert_bytes);
    rows.extend([q8, q4]);
    let mut drawn = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        step(index + 2);
        let mixed = rule.assign(&experts, bytes_max, &measured).expect("at least Q4's bytes");
        let wanted = mixed.into_iter();
        let wanted = wanted.map(|(expert, precision)| (ids::to_model(expert), ids::to_model_precision(precision)));
        let row = bench.hold(&wanted.collect(), rule.name())?;
        match rule {
            Policy::Random { .. } => drawn.push(row),
            _ => rows.push(row),
        }
    }
    rows.extend(mean(&drawn));
    drop(progress);
    let finite = rows.iter().all(|row| row.perplexity.is_finite() && row.kl_divergence.is_finite());
    let report = Report {
        trunk: local.trunk().name(),
        bits: compared.bits,
        measured_on: CALIBRATION_NAME,
        predicted: bench.predicted,
        policies: rows,
    };
    show(&report, output)?;
    if finite { Ok(()) } else { Err(Failure { message: "a figure is not a number".to_owned(), code: 1 }) }
}

fn show(report: &Report, output: Output) -> Result<(), Failure> {
    if output.json {
        return print::json(report);
    }
    let asked = report.policies.iter().any(|row| row.accuracy.is_some());
    let rows = report.policies.iter().map(|row| {
        let mut cells = vec![
            if row.runs > 1 { format!("{}, mean of {}", row.policy, row.runs) } else { row.policy.to_owned() },
            row.expert_bytes.to_string(),
            row.raised.to_string(),
            format!("{:.4}", row.perplexity),
            format!("{:.3e}", row.kl_divergence),
            format!("{:.2} %", 100.0 * row.same_top),
        ];
        cells.extend(row.accuracy.map(|share| format!("{:.2} %", 100.0 * share)));
        cells
    });
    let mut header = vec!["experts", "bytes", "at q8", "perplexity", "KL divergence", "same top"];
    header.extend(asked.then_some("answers right"));
    writeln!(std::io::stdout(), "{}", print::table(&header, 1, rows))?;
    writeln!(
        std::io::stdout(),
        "trunk {}; mixed experts at {} bits a weight; {} tokens predicted; measured on {}",
        report.trunk,
        report.bits,
        report.predicted,
        report.measured_on
    )?;
    Ok(())
}

/// The mean of several runs of one rule.
fn mean(rows: &[Row]) -> Option<Row> {
    let first = rows.first()?;
    let mean = |of: fn(&Row) -> f64| rows.iter().map(of).sum::<f64>() / rows.len() as f64;
    Some(Row {
        perplexity: mean(|row| row.perplexity),
        kl_divergence: mean(|row| row.kl_divergence),
        same_top: mean(|row| row.same_top),
        accuracy: first.accuracy.map(|_| mean(|row| row.accuracy.unwrap_or(f64::NAN))),
        runs: rows.len() as u32,
        ..first.clone()
    })
}

/// The exact model beside one whose experts change.
struct Bench<'a> {
    folder: &'a ModelFolder,
    compared: &'a Comparison<'a>,
    exact: LocalModel,
    mixed: LocalModel,
    /// How each expert of the mixed one is held.
    held: BTreeMap<ExpertId, Precision>,
    predicted: usize,
}

impl<'a> Bench<'a> {
    fn new(local: &LocalArgs, folder: &'a ModelFolder, compared: &'a Comparison<'a>) -> Result<Self, Failure> {
        let kv_tokens = Some(compared.window.min(folder.config().max_position_embeddings));
        // Questions are asked of both, and take what they take.
        let kv_tokens = kv_tokens.filter(|_| compared.questions.is_none());
        let exact = local.open_as(Precision::Exact, Precision::Exact, kv_tokens)?;
        let mixed = local.open_as(local.trunk(), Precision::Q4, kv_tokens)?;
        let held = layout::experts(folder.config()).map(|expert| (expert, Precision::Q4)).collect();
        Ok(Self { folder, compared, exact, mixed, held, predicted: 0 })
    }

    /// The exact model's own figures.
    fn exact(&mut self) -> Result<Row, Failure> {
        let window = self.compared.window;
        let reports = self.compared.texts.iter().map(|text| eval_text(&self.exact, text, window));
        let reports = reports.collect::<Result<Vec<_>, _>>()?;
        let mut text = TextReport::together(&reports).expect("a text was given");
        text.closeness = Some(Closeness { kl_divergence: 0.0, same_top: 1.0 });
        self.predicted = text.predicted;
        self.row("exact", &self.exact, 0, &text)
    }

    fn hold_all(&mut self, precision: Precision, name: &'static str) -> Result<Row, Failure> {
        let all = self.held.keys().map(|&expert| (expert, precision)).collect();
        self.hold(&all, name)
    }

    /// Holds experts as `wanted`, and judges that.
    fn hold(&mut self, wanted: &BTreeMap<ExpertId, Precision>, name: &'static str) -> Result<Row, Failure> {
        for (&expert, &precision) in wanted {
            if self.held.insert(expert, precision) != Some(precision) {
                self.mixed.hold(self.folder, expert, precision)?;
            }
        }
        let window = self.compared.window;
        let against = |text: &PathBuf| eval_text_against(&self.mixed, &self.exact, text, window);
        let reports = self.compared.texts.iter().map(against).collect::<Result<Vec<_>, _>>()?;
        let raised = self.held.values().filter(|precision| **precision == Precision::Q8).count();
        self.row(name, &self.mixed, raised, &TextReport::together(&reports).expect("a text was given"))
    }

    fn row(&self, policy: &'static str, model: &LocalModel, raised: usize, text: &TextReport) -> Result<Row, Failure> {
        let closeness = text.closeness.expect("judged against the exact model");
        let accuracy = self.compared.questions.map(|file| eval_qa(model, file)).transpose()?;
        Ok(Row {
            policy,
            expert_bytes: model.engine.memory().expert_bytes,
            raised,
            perplexity: text.perplexity,
            kl_divergence: closeness.kl_divergence,
            same_top: closeness.same_top,
            accuracy: accuracy.map(|report| report.accuracy),
            runs: 1,
        })
    }
}

/// Popularity and sensitivity on the built-in text, as an import measures them.
fn measure(folder: &ModelFolder, threads: usize, progress: &mut Progress) -> Result<Measured, Failure> {
    let config = folder.config();
    let text = TextModel::from_paths(config, folder.files())?;
    let tokens = text.tokenizer.encode(CALIBRATION_TEXT, true)?;
    let trunk = folder.trunk(Precision::Exact)?;
    let mut experts = Folder { folder, progress };
    let (counts, sensitivity) = measurements(&survey(config, &trunk, &tokens, threads, &mut experts)?);
    Ok(Measured { popularity: Popularity::new(counts), sensitivity })
}

struct Folder<'a> {
    folder: &'a ModelFolder,
    progress: &'a mut Progress,
}

impl SurveySource for Folder<'_> {
    fn expert(&mut self, id: ExpertId, precision: Precision) -> Result<Option<Tensors>, LoadError> {
        self.folder.expert(id, precision).map(Some)
    }

    fn go_on(&mut self, done: usize, total: usize) -> bool {
        self.progress.set("measuring experts, layers", done as u64, total as u64);
        true
    }
}
