//! What a text tells of a model's experts before there is traffic: how often each is chosen, and what its output loses
//! at fewer bits.
//!
//! Owns [`survey`], which takes a whole text through the model layer by layer: every window of it is a batch of its
//! own, all of them await the experts of the same layer, and each expert is asked for once, exactly and sliced,
//! computes its rows and goes. So weights are read once, and memory holds one layer's outputs and one expert: it does
//! not grow with the number of layers. The invariant: the text is continued with exact outputs, so what is measured of
//! one expert does not depend on the others' slices. It draws no conclusion from what it counts.

use std::{collections::BTreeMap, sync::Arc};

use coel_kernels::{
    DeviceExpert, DeviceWork, DynKernels,
    cpu::{CpuKernels, isa::Isa},
};
use coel_weights::{config::ModelConfig, error::LoadError, layout::ExpertId, slices::Precision, tensors::Tensors};

use super::popularity::WINDOW_TOKENS;
use crate::{
    nn::{
        batch::{Batch, CHUNK_ROWS, DecodeError, SequenceChunk, Step, Want},
        expert_call::{ExpertCall, Pair, by_expert},
        forward::{ForwardContext, KvCache},
        outputs::LayerOutputs,
        trunk::{Trunk, expert_weights},
    },
    system::lower_priority,
};

/// What was found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Survey {
    /// Tokens of the text.
    pub tokens: u64,
    /// Routed rows, `[num_hidden_layers][num_experts]`; empty for a layer without experts.
    pub counts: Vec<Vec<u64>>,
    /// In the shape of `counts`. Nothing was measured of an expert that was never chosen, that has no slices, or
    /// where the layer's outputs are beyond numbers.
    pub losses: Vec<Vec<Option<Loss>>>,
}

/// Squared error of an expert's weighted output, mean over its rows, relative to the mean energy of the rows that the
/// layer's output is added to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    pub q4: f32,
    pub q8: f32,
}

/// Why a survey ended early.
#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("given up")]
    Stopped,
}

/// Where a survey gets what it needs.
pub trait SurveySource {
    /// One expert's tensors; `None` where it has no slices.
    fn expert(&mut self, id: ExpertId, precision: Precision) -> Result<Option<Tensors>, LoadError>;

    /// Told after each layer: how many are done, of how many. `false` gives the survey up.
    fn go_on(&mut self, done: usize, total: usize) -> bool;
}

/// Takes `tokens` through the model, with its exact trunk, on `threads` threads of this machine's CPU (0: one for each
/// core), below the priority of everything that answers in time.
///
/// # Errors
/// [`SurveyError`]; tokens beyond the vocabulary, tensors that are not the model's.
pub fn survey(
    config: &Arc<ModelConfig>,
    trunk: &Tensors,
    tokens: &[u32],
    threads: usize,
    source: &mut (impl SurveySource + Send),
) -> Result<Survey, SurveyError> {
    // A thread of its own, whose priority and pool end with it.
    std::thread::scope(|scope| {
        let run = || {
            lower_priority();
            run(&mut CpuKernels::new(Isa::best(), threads), config, trunk, tokens, source)
        };
        scope.spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn run(
    kernels: &mut dyn DynKernels,
    config: &Arc<ModelConfig>,
    tensors: &Tensors,
    tokens: &[u32],
    source: &mut impl SurveySource,
) -> Result<Survey, SurveyError> {
    let width = |layer| if config.is_sparse(layer) { config.num_experts } else { 0 };
    let layers = config.num_hidden_layers;
    let mut survey = Survey {
        tokens: tokens.len() as u64,
        counts: (0..layers).map(|layer| vec![0; width(layer)]).collect(),
        losses: (0..layers).map(|layer| vec![None; width(layer)]).collect(),
    };
    let trunk = Trunk::load(kernels, config.clone(), tensors)?;
    let last = (0..layers).rev().find(|layer| config.is_sparse(*layer));
    let window = WINDOW_TOKENS.min(CHUNK_ROWS).min(config.max_position_embeddings);
    let mut batches = Vec::new();
    for tokens in tokens.chunks(window) {
        // A batch attends to its own rows in one layer at a time: a fresh cache for each layer never grows.
        let cache = &mut KvCache::new(kernels, config, 1, window);
        let chunk = SequenceChunk { tokens: tokens.to_vec(), past: 0, pages: vec![0], want: Want::Nothing };
        let (batch, step) = ForwardContext { kernels, trunk: &trunk, cache }.begin(vec![chunk])?;
        if step == Step::NeedExperts {
            batches.push(batch);
        }
    }
    while let Some(layer) = batches.first().map(Batch::layer) {
        let cache = &mut KvCache::new(kernels, config, 1, window);
        let context = &mut ForwardContext { kernels, trunk: &trunk, cache };
        let outputs = measure(context, config, layer, &batches, source, &mut survey)?;
        tensors.release();
        if !source.go_on(usize::from(layer) + 1, layers) {
            return Err(SurveyError::Stopped);
        }
        if Some(usize::from(layer)) == last {
            break;
        }
        for (batch, outputs) in batches.iter_mut().zip(outputs) {
            let cache = &mut KvCache::new(kernels, config, 1, window);
            ForwardContext { kernels, trunk: &trunk, cache }.resume(batch, outputs)?;
        }
    }
    Ok(survey)
}

/// Computes one layer's experts, one after the other, and counts and measures them. The outputs of each batch.
fn measure(
    context: &mut ForwardContext<'_>,
    config: &ModelConfig,
    layer: u16,
    batches: &[Batch],
    source: &mut impl SurveySource,
    survey: &mut Survey,
) -> Result<Vec<LayerOutputs>, SurveyError> {
    let d = config.hidden_size;
    let calls: Vec<ExpertCall> = batches.iter().map(|batch| context.call(batch)).collect();
    let energy = mean_energy(batches.iter().flat_map(|batch| context.residual(batch)), d);
    let mut outputs: Vec<Vec<f32>> = calls.iter().map(|call| vec![0.0; call.slots() * d]).collect();
    let mut places = BTreeMap::<u16, Vec<(usize, Pair)>>::new();
    for (batch, call) in calls.iter().enumerate() {
        for (expert, pairs) in by_expert(&call.routes) {
            places.entry(expert).or_default().extend(pairs.into_iter().map(|pair| (batch, pair)));
        }
    }
    for (index, places) in places {
        let id = ExpertId { layer, index };
        let rows: Vec<f32> = places.iter().flat_map(|(batch, pair)| calls[*batch].row(pair.row)).copied().collect();
        let mut compute = |precision| {
            let Some(tensors) = source.expert(id, precision)? else { return Ok(None) };
            let expert = context.kernels.expert(expert_weights(config, id, &tensors)?);
            let computed = outputs_of(context.kernels, &expert, &rows, d);
            tensors.release();
            Ok::<_, LoadError>(Some(computed))
        };
        let missing = || LoadError::Missing { file: id.to_string(), tensor: "exact weights".into() };
        let exact = compute(Precision::Exact)?.ok_or_else(missing)?;
        let sliced = [compute(Precision::Q4)?, compute(Precision::Q8)?];
        let weights = places.iter().map(|(batch, pair)| weight(&calls[*batch], *pair, index));
        let weights: Vec<f32> = weights.collect();
        survey.counts[usize::from(layer)][usize::from(index)] = places.len() as u64;
        if let [Some(q4), Some(q8)] =
            sliced.map(|sliced| sliced.map(|sliced| error(&exact, &sliced, &weights, d) / energy))
        {
            // Beside weights that overflow nothing can be measured.
            let loss = Loss { q4: q4 as f32, q8: q8 as f32 };
            let is_measured = loss.q4.is_finite() && loss.q8.is_finite();
            survey.losses[usize::from(layer)][usize::from(index)] = is_measured.then_some(loss);
        }
        for ((batch, pair), row) in places.iter().zip(exact.chunks_exact(d)) {
            outputs[*batch][pair.slot as usize * d..][..d].copy_from_slice(row);
        }
    }
    Ok(outputs.into_iter().map(|values| LayerOutputs::whole(values, d)).collect())
}

/// Outputs of an expert, `[n, d]`, a bounded number of rows at a time.
fn outputs_of(kernels: &mut dyn DynKernels, expert: &DeviceExpert, rows: &[f32], d: usize) -> Vec<f32> {
    let mut outputs = Vec::with_capacity(rows.len());
    for rows in rows.chunks(CHUNK_ROWS * d) {
        let all: Vec<u32> = (0..(rows.len() / d) as u32).collect();
        let x = kernels.upload(rows.to_vec(), d);
        let computed = kernels.experts(&x, &[DeviceWork { expert, rows: &all }]);
        outputs.extend(kernels.download(computed));
    }
    outputs
}

/// The weight with which a pair's output is added.
fn weight(call: &ExpertCall, pair: Pair, expert: u16) -> f32 {
    let routes = &call.routes[pair.row as usize];
    routes.iter().find(|route| route.expert == expert).map_or(0.0, |route| route.weight)
}

/// Mean over the rows of their squared length.
fn mean_energy(values: impl Iterator<Item = f32>, d: usize) -> f64 {
    let (mut sum, mut count) = (0.0, 0u64);
    for value in values {
        sum += f64::from(value) * f64::from(value);
        count += 1;
    }
    (sum * d as f64 / count.max(1) as f64).max(f64::MIN_POSITIVE)
}

/// Mean over the rows of the weighted squared difference of two outputs `[n, d]`.
fn error(exact: &[f32], other: &[f32], weights: &[f32], d: usize) -> f64 {
    let rows = exact.chunks_exact(d).zip(other.chunks_exact(d)).zip(weights);
    let each = rows.map(|((exact, other), weight)| {
        let differences = exact.iter().zip(other).map(|(exact, other)| f64::from(exact - other));
        f64::from(*weight).powi(2) * differences.map(|difference| difference * difference).sum::<f64>()
    });
    each.sum::<f64>() / weights.len().max(1) as f64
}
