//! Perplexity of a text: how surprised the model is by each next token, and how far its predictions are from those of
//! the same model held exactly.

use std::{fs, path::Path};

use serde::Serialize;

use super::{EvalError, LocalModel};
use crate::{nn::batch::Want, serve::engine::block_on, text::model::TextError};

/// Tokens of a window unless another number is asked for.
pub const WINDOW_TOKENS: usize = 512;

/// Rows whose logits are held at once.
const ROWS_AT_ONCE: usize = 64;

/// Perplexity and what it was measured on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TextReport {
    /// Tokens of the whole file.
    pub tokens: usize,
    /// Tokens whose probability was counted.
    pub predicted: usize,
    pub window: usize,
    /// exp of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Beside the exact model, if there was one.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub closeness: Option<Closeness>,
    /// Whether every figure is a finite number.
    pub passed: bool,
}

/// How close predictions are to the exact model's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Closeness {
    /// Mean Kullback-Leibler divergence from the exact model's distribution to this one's, in nats.
    pub kl_divergence: f64,
    /// Share of positions with the same likeliest token.
    pub same_top: f64,
}

impl TextReport {
    /// The figures of several texts as of one: means over all that was predicted. `None` of none.
    pub fn together(reports: &[TextReport]) -> Option<TextReport> {
        let window = reports.first()?.window;
        let sum = |of: fn(&TextReport) -> usize| reports.iter().map(of).sum::<usize>();
        let predicted = sum(|report| report.predicted);
        let mean = |of: &dyn Fn(&TextReport) -> f64| {
            reports.iter().map(|report| report.predicted as f64 * of(report)).sum::<f64>() / predicted as f64
        };
        let of = |each: fn(&Closeness) -> f64| mean(&|report| report.closeness.as_ref().map_or(0.0, each));
        let closeness = reports.iter().all(|report| report.closeness.is_some()).then(|| Closeness {
            kl_divergence: of(|closeness| closeness.kl_divergence),
            same_top: of(|closeness| closeness.same_top),
        });
        Some(TextReport {
            tokens: sum(|report| report.tokens),
            predicted,
            window,
            perplexity: mean(&|report| report.perplexity.ln()).exp(),
            closeness,
            passed: reports.iter().all(|report| report.passed),
        })
    }
}

/// Cuts the tokens of a whole file into consecutive windows without overlap. The first token of each window is not
/// predicted; a last window of one token contributes nothing.
pub fn eval_text(model: &LocalModel, file: &Path, window: usize) -> Result<TextReport, EvalError> {
    measure(model, None, file, window)
}

/// The same, and how close each prediction is to that of `exact`: the same model, held otherwise.
pub fn eval_text_against(
    model: &LocalModel,
    exact: &LocalModel,
    file: &Path,
    window: usize,
) -> Result<TextReport, EvalError> {
    let shapes = [model, exact].map(|model| {
        let config = model.engine.config();
        [config.vocab_size, config.num_hidden_layers, config.hidden_size, config.num_experts]
    });
    let what = ["tokens in their vocabularies", "layers", "dimensions", "experts a layer"];
    if let Some(at) = (0..what.len()).find(|at| shapes[0][*at] != shapes[1][*at]) {
        let (one, other, what) = (shapes[0][at], shapes[1][at], what[at]);
        let why = format!("the models have {one} and {other} {what}: they are not the same model");
        return Err(EvalError::Input { file: file.display().to_string(), why });
    }
    measure(model, Some(exact), file, window)
}

fn measure(
    model: &LocalModel,
    exact: Option<&LocalModel>,
    file: &Path,
    window: usize,
) -> Result<TextReport, EvalError> {
    let name = || file.display().to_string();
    let text = fs::read_to_string(file).map_err(|source| EvalError::Io { file: name(), source })?;
    let tokens = model.text.tokenizer.encode(&text, false).map_err(TextError::from)?;
    if window < 2 || tokens.len() < 2 {
        let why = format!("{} tokens in windows of {window}: nothing to predict", tokens.len());
        return Err(EvalError::Input { file: name(), why });
    }
    let open = |model: &LocalModel| model.engine.open_session(window.min(tokens.len()));
    let mut session = open(model)?;
    let mut exact = exact.map(open).transpose()?;
    let (mut surprise, mut predicted) = (0.0f64, 0usize);
    let mut closeness = exact.as_ref().map(|_| Closeness::default());
    for window in tokens.chunks(window).filter(|window| window.len() > 1) {
        for session in std::iter::once(&mut session).chain(&mut exact) {
            session.truncate(0)?;
        }
        let inputs = &window[..window.len() - 1];
        let mut targets = window[1..].iter();
        for inputs in inputs.chunks(ROWS_AT_ONCE) {
            let logits = block_on(session.advance(inputs, Want::All))?.logits;
            let vocab = logits.len() / inputs.len();
            for (row, target) in logits.chunks_exact(vocab).zip(&mut targets) {
                surprise -= log_probability(row, *target);
            }
            if let Some((session, closeness)) = exact.as_mut().zip(closeness.as_mut()) {
                let exact = block_on(session.advance(inputs, Want::All))?.logits;
                for (exact, row) in exact.chunks_exact(vocab).zip(logits.chunks_exact(vocab)) {
                    closeness.kl_divergence += divergence(exact, row);
                    closeness.same_top += f64::from(top(exact) == top(row));
                }
            }
        }
        predicted += inputs.len();
    }
    if let Some(closeness) = &mut closeness {
        closeness.kl_divergence /= predicted as f64;
        closeness.same_top /= predicted as f64;
    }
    let perplexity = (surprise / predicted as f64).exp();
    let passed = perplexity.is_finite() && closeness.is_none_or(|closeness| closeness.kl_divergence.is_finite());
    Ok(TextReport { tokens: tokens.len(), predicted, window, perplexity, closeness, passed })
}

/// Natural logarithm of the probability `logits` `[vocab]` give to `token`.
fn log_probability(logits: &[f32], token: u32) -> f64 {
    f64::from(logits[token as usize]) - log_total(logits)
}

/// What to take off a logit `[vocab]` to get the logarithm of its probability.
fn log_total(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - max).exp()).sum();
    max + sum.ln()
}

/// Kullback-Leibler divergence of the distribution `logits` from `exact`, both `[vocab]`.
fn divergence(exact: &[f32], logits: &[f32]) -> f64 {
    let (p_total, q_total) = (log_total(exact), log_total(logits));
    let each = exact.iter().zip(logits).map(|(p, q)| {
        let (p, q) = (f64::from(*p) - p_total, f64::from(*q) - q_total);
        p.exp() * (p - q)
    });
    each.sum()
}

/// The likeliest token, the first of equals.
fn top(logits: &[f32]) -> usize {
    (0..logits.len()).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_that_of_the_distributions() {
        // Probabilities 1/2, 1/4, 1/4 against 1/4, 1/2, 1/4: 1/2 ln 2 - 1/4 ln 2.
        let logits = |p: [f32; 3]| p.map(|p| p.ln() + 5.0);
        let (p, q) = (logits([0.5, 0.25, 0.25]), logits([0.25, 0.5, 0.25]));
        assert!((divergence(&p, &q) - 0.25 * 2f64.ln()).abs() < 1e-6);
        assert_eq!(divergence(&p, &p), 0.0);
        assert_eq!((top(&p), top(&q), top(&[1.0, 3.0, 3.0])), (0, 1, 1));
    }

    #[test]
    fn several_texts_count_by_what_was_predicted_of_each() {
        let report = |predicted, nats: f64, kl_divergence| TextReport {
            tokens: predicted + 1,
            predicted,
            window: 8,
            perplexity: nats.exp(),
            closeness: Some(Closeness { kl_divergence, same_top: 1.0 }),
            passed: true,
        };
        let (one, two) = (report(1, 2.0, 0.5), report(3, 6.0, 0.1));
        let both = TextReport::together(&[one.clone(), two.clone()]).unwrap();
        assert_eq!((both.tokens, both.predicted), (6, 4));
        assert!((both.perplexity.ln() - 5.0).abs() < 1e-12, "{both:?}");
        assert!((both.closeness.unwrap().kl_divergence - 0.2).abs() < 1e-12, "{both:?}");
        let alone = TextReport { closeness: None, passed: false, ..two };
        let mixed = TextReport::together(&[one, alone]).unwrap();
        assert!(mixed.closeness.is_none() && !mixed.passed, "a figure that is not of all is not of the whole");
        assert_eq!(TextReport::together(&[]), None);
    }
}
