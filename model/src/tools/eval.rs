//! Three ways to check a model: against a reference made elsewhere, by perplexity, and by questions.
//!
//! Owns the exact meaning of each figure; the results are plain values with a verdict, printed by whoever asked. Each
//! runs on a [`LocalModel`]. The invariant: a figure that cannot be computed (a reference of another shape, no text)
//! is an error, never a pass.

mod perplexity;
mod qa;
mod reference;

pub use perplexity::{Closeness, TextReport, WINDOW_TOKENS, eval_text, eval_text_against};
pub use qa::{ANSWER_TOKENS_MAX, QaReport, REFERENCE_SHARE_MIN, eval_qa};
pub use reference::{LOGIT_ERROR_MAX, ReferenceReport, eval_reference};

use crate::{
    serve::engine::EngineError,
    text::{model::TextError, sequence::SequenceError},
    tools::generate::{LocalError, LocalModel},
};
use coel_weights::error::LoadError;

/// Why an evaluation could not be made.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    #[error(transparent)]
    Local(#[from] LocalError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Sequence(#[from] SequenceError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("{file}: {source}")]
    Io { file: String, source: std::io::Error },
    #[error("{file}: {why}")]
    Input { file: String, why: String },
}
