//! Questions with known answers: does the model say what it should, and what the reference said?

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};

use super::{EvalError, LocalModel};
use crate::text::{sampling::SamplingParams, sequence::GenerateParams};

/// Longest answer, tokens.
pub const ANSWER_TOKENS_MAX: usize = 40;

/// Smallest share of answers equal to the reference's that passes.
pub const REFERENCE_SHARE_MIN: f64 = 0.995;

/// One line of the file.
#[derive(Deserialize)]
struct Question {
    question: String,
    answer: String,
    reference: Option<String>,
}

/// How the questions were answered.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QaReport {
    pub questions: usize,
    /// Share of answers that are the true one.
    pub accuracy: f64,
    /// Share equal to `reference`, of the lines that have one; `null` if none has.
    pub reference_equal: Option<f64>,
    /// Whether that share is large enough, where there are references.
    pub passed: bool,
}

/// Answers each line of a JSONL file greedily, with the chat template and no system turn.
pub fn eval_qa(model: &LocalModel, file: &Path) -> Result<QaReport, EvalError> {
    let name = || file.display().to_string();
    let text = fs::read_to_string(file).map_err(|source| EvalError::Io { file: name(), source })?;
    let params = GenerateParams {
        max_tokens: Some(ANSWER_TOKENS_MAX),
        sampling: SamplingParams::greedy(),
        ..GenerateParams::default()
    };
    let (mut questions, mut right, mut references, mut equal) = (0usize, 0usize, 0usize, 0usize);
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line: Question = serde_json::from_str(line).map_err(|error| {
            let why = format!("line {} is no question with an answer: {error}", index + 1);
            EvalError::Input { file: name(), why }
        })?;
        let said = model.chat(&line.question, params.clone(), |_| {})?.text;
        questions += 1;
        right += usize::from(said.trim() == line.answer.trim());
        if let Some(reference) = line.reference {
            references += 1;
            equal += usize::from(said.trim() == reference.trim());
        }
    }
    if questions == 0 {
        return Err(EvalError::Input { file: name(), why: "it holds no question".into() });
    }
    let reference_equal = (references > 0).then(|| equal as f64 / references as f64);
    Ok(QaReport {
        questions,
        accuracy: right as f64 / questions as f64,
        reference_equal,
        passed: reference_equal.is_none_or(|share| share >= REFERENCE_SHARE_MIN),
    })
}
