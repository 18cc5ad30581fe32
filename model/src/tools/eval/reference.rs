//! Logits, greedy continuations and routes against those another implementation computed.

use std::path::Path;

use serde::Serialize;

use super::{EvalError, LocalModel};
use crate::{
    nn::batch::Want,
    serve::{engine::block_on, session::Session},
    text::{
        sampling::{Sampler, SamplingParams},
        sequence::SequenceError,
    },
};
use coel_weights::{memory::WeightBytes, tensors::Tensors};

/// Largest accepted error of a logit, relative to the largest reference value.
pub const LOGIT_ERROR_MAX: f64 = 1e-3;

/// Rows whose logits are held at once.
const ROWS_AT_ONCE: usize = 64;

/// How far the model is from the reference.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReferenceReport {
    /// Largest difference over largest reference value, whole tensor.
    pub max_rel_logit_error: f64,
    /// Continued positions with the reference's token; the input's positions do not count.
    pub greedy_equal: usize,
    pub greedy_total: usize,
    /// (row, layer with experts, position) with the same set of experts; 0 of 0 without `routes`.
    pub routes_equal: usize,
    pub routes_total: usize,
    pub passed: bool,
}

/// The tensors of a reference file, checked against each other and the model.
struct Reference {
    rows: usize,
    /// Input tokens of a row.
    input: usize,
    /// Tokens continued.
    follow: usize,
    input_ids: Vec<u32>,
    /// `[rows, input, vocab]`
    logits: Vec<f32>,
    /// `[rows, input + follow]`
    greedy: Vec<u32>,
    /// `[rows, layers with experts, input, k]`
    routes: Option<Vec<i64>>,
}

/// Compares with a reference file: `input_ids` [n, t], `logits` [n, t, vocab], `greedy` [n, t + g] and, optionally,
/// `routes` [n, layers with experts, t, k], sorted. End-of-text is ignored and no special tokens are added.
pub fn eval_reference(model: &LocalModel, file: &Path) -> Result<ReferenceReport, EvalError> {
    let reference = Reference::read(model, file)?;
    let config = model.engine.config().clone();
    let vocab = config.vocab_size;
    let mut errors = LogitErrors::default();
    let (mut greedy_equal, mut routes_equal) = (0, 0);
    let sparse: Vec<usize> = config.sparse_layers().collect();
    let mut session = model.engine.open_session(reference.input + reference.follow)?;
    for row in 0..reference.rows {
        session.truncate(0)?;
        let tokens = &reference.input_ids[row * reference.input..][..reference.input];
        let mut last = Vec::new();
        for (index, chunk) in tokens.chunks(ROWS_AT_ONCE).enumerate() {
            let first = index * ROWS_AT_ONCE;
            let logits = watch(&mut session, chunk, |layer, position, experts| {
                let layer = sparse.partition_point(|sparse| *sparse < layer);
                routes_equal += usize::from(reference.same_route(row, layer, first + position, experts));
            })?;
            let expected = &reference.logits[(row * reference.input + first) * vocab..][..logits.len()];
            errors.add(&logits, expected);
            last = logits[logits.len() - vocab..].to_vec();
        }
        let expected = &reference.greedy[row * (reference.input + reference.follow)..][reference.input..];
        greedy_equal += continue_greedily(&mut session, last, &expected[..reference.follow])?;
    }
    let greedy_total = reference.rows * reference.follow;
    let routes_total = reference.routes.as_ref().map_or(0, |_| reference.rows * sparse.len() * reference.input);
    let max_rel_logit_error = errors.relative();
    let close = max_rel_logit_error <= LOGIT_ERROR_MAX;
    Ok(ReferenceReport {
        max_rel_logit_error,
        greedy_equal,
        greedy_total,
        routes_equal,
        routes_total,
        passed: close && greedy_equal == greedy_total && routes_equal == routes_total,
    })
}

/// Advances to the logits of all `tokens`; `route` sees (layer, position in `tokens`, experts) of every row.
fn watch(
    session: &mut Session,
    tokens: &[u32],
    mut route: impl FnMut(usize, usize, &[u16]),
) -> Result<Vec<f32>, EvalError> {
    let (advanced, routes) = block_on(session.advance_watched(tokens, Want::All))?;
    for (layer, rows) in routes.iter().enumerate() {
        for (position, routes) in rows.iter().enumerate() {
            let experts: Vec<u16> = routes.iter().map(|route| route.expert).collect();
            route(layer, position, &experts);
        }
    }
    Ok(advanced.logits)
}

/// How many of the tokens chosen greedily after `logits` are those expected, each at its place.
fn continue_greedily(session: &mut Session, mut logits: Vec<f32>, expected: &[u32]) -> Result<usize, EvalError> {
    let mut sampler = Sampler::new(SamplingParams::greedy());
    let mut equal = 0;
    for (index, expected_token) in expected.iter().enumerate() {
        let token = sampler.pick(&logits, &[], None).map_err(SequenceError::from)?.token;
        equal += usize::from(token == *expected_token);
        if index + 1 < expected.len() {
            logits = block_on(session.advance(&[token], Want::Last))?.logits;
        }
    }
    Ok(equal)
}

#[derive(Default)]
struct LogitErrors {
    difference: f32,
    reference: f32,
}

impl LogitErrors {
    fn add(&mut self, found: &[f32], expected: &[f32]) {
        for (found, expected) in found.iter().zip(expected) {
            let difference = (found - expected).abs();
            // max() would overlook a NaN.
            self.difference = if difference.is_nan() { f32::INFINITY } else { self.difference.max(difference) };
            self.reference = self.reference.max(expected.abs());
        }
    }

    fn relative(&self) -> f64 {
        match self.difference {
            0.0 => 0.0,
            difference => f64::from(difference) / f64::from(self.reference),
        }
    }
}

impl Reference {
    fn read(model: &LocalModel, file: &Path) -> Result<Self, EvalError> {
        let name = file.display().to_string();
        let bytes = WeightBytes::map(file).map_err(|source| EvalError::Io { file: name.clone(), source })?;
        let tensors = Tensors::parse(bytes, &name)?;
        let config = model.engine.config();
        let wrong = |tensor: &str, found: &[usize], expected: String| {
            let why = format!("tensor {tensor} has shape {found:?}, expected {expected}");
            EvalError::Input { file: name.clone(), why }
        };
        let (ids_shape, ids) = tensors.integers("input_ids")?;
        let [rows, input] = ids_shape[..] else {
            return Err(wrong("input_ids", &ids_shape, "[n, t]".into()));
        };
        let (logits_shape, logits) = tensors.floats("logits")?;
        if logits_shape != [rows, input, config.vocab_size] {
            return Err(wrong("logits", &logits_shape, format!("[{rows}, {input}, {}]", config.vocab_size)));
        }
        let (greedy_shape, greedy) = tensors.integers("greedy")?;
        let follow = match greedy_shape[..] {
            [greedy_rows, length] if greedy_rows == rows && length >= input => length - input,
            _ => return Err(wrong("greedy", &greedy_shape, format!("[{rows}, {input} + g]"))),
        };
        let routes = match tensors.get("routes") {
            None => None,
            Some(_) => {
                let (shape, routes) = tensors.integers("routes")?;
                let expected = [rows, config.sparse_layers().count(), input, config.num_experts_per_tok];
                if shape != expected {
                    return Err(wrong("routes", &shape, format!("{expected:?}")));
                }
                Some(routes)
            }
        };
        if rows == 0 || input == 0 {
            return Err(wrong("input_ids", &ids_shape, "at least one row of at least one token".into()));
        }
        let token = |id: &i64| {
            let token = u32::try_from(*id).ok().filter(|token| (*token as usize) < config.vocab_size);
            token.ok_or_else(|| {
                let why = format!("token {id} is outside the vocabulary of {}", config.vocab_size);
                EvalError::Input { file: name.clone(), why }
            })
        };
        let input_ids = ids.iter().map(token).collect::<Result<_, _>>()?;
        let greedy = greedy.iter().map(token).collect::<Result<_, _>>()?;
        Ok(Self { rows, input, follow, input_ids, logits, greedy, routes })
    }

    /// Whether `experts` (ascending) is what the reference chose in the `layer`th layer with experts; false without
    /// `routes`.
    fn same_route(&self, row: usize, layer: usize, position: usize, experts: &[u16]) -> bool {
        let Some(routes) = &self.routes else { return false };
        let k = experts.len();
        let layers = routes.len() / (self.rows * self.input * k);
        let start = ((row * layers + layer) * self.input + position) * k;
        let mut expected = routes[start..start + k].to_vec();
        expected.sort_unstable();
        expected.iter().zip(experts).all(|(expected, found)| *expected == i64::from(*found))
    }
}
