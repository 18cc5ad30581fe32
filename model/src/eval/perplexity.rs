//! Perplexity of a text: how surprised the model is by each next token.

use std::{fs, path::Path};

use serde::Serialize;

use super::{EvalError, LocalModel};
use crate::{decoder::Want, engine::block_on, text::TextError};

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
    /// Whether the perplexity is a finite number.
    pub passed: bool,
}

/// Cuts the tokens of a whole file into consecutive windows without overlap. The first token of each window is not
/// predicted; a last window of one token contributes nothing.
pub fn eval_text(model: &LocalModel, file: &Path, window: usize) -> Result<TextReport, EvalError> {
    let name = || file.display().to_string();
    let text = fs::read_to_string(file).map_err(|source| EvalError::Io { file: name(), source })?;
    let tokens = model.text.tokenizer.encode(&text, false).map_err(TextError::from)?;
    if window < 2 || tokens.len() < 2 {
        let why = format!("{} tokens in windows of {window}: nothing to predict", tokens.len());
        return Err(EvalError::Input { file: name(), why });
    }
    let mut session = model.engine.open_session(window.min(tokens.len()))?;
    let (mut surprise, mut predicted) = (0.0f64, 0usize);
    for window in tokens.chunks(window).filter(|window| window.len() > 1) {
        session.truncate(0)?;
        let inputs = &window[..window.len() - 1];
        let mut targets = window[1..].iter();
        for inputs in inputs.chunks(ROWS_AT_ONCE) {
            let logits = block_on(session.advance(inputs, Want::All))?.logits;
            let rows = logits.chunks_exact(logits.len() / inputs.len());
            for (row, target) in rows.zip(&mut targets) {
                surprise -= log_probability(row, *target);
            }
        }
        predicted += inputs.len();
    }
    let perplexity = (surprise / predicted as f64).exp();
    Ok(TextReport { tokens: tokens.len(), predicted, window, perplexity, passed: perplexity.is_finite() })
}

/// Natural logarithm of the probability `logits` `[vocab]` give to `token`.
fn log_probability(logits: &[f32], token: u32) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - max).exp()).sum();
    f64::from(logits[token as usize]) - max - sum.ln()
}
