//! What a request may ask of one generation, and the bounds of it.

use crate::text::sampling::{ParamError, SamplingParams};

/// OpenAI allows four; local servers more. Every one of them is looked for at every character.
pub const STOP_STRINGS_MAX: usize = 16;

/// The longest stop string in bytes: that much text may be held back from the reader.
pub const STOP_BYTES_MAX: usize = 1024;

/// The most alternatives listed per token, as OpenAI's.
pub const LOGPROBS_MAX: usize = 20;

/// How to generate, as a request says it. Fields are named as in OpenAI's requests.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerateParams {
    /// At most this many tokens; as many as the context has room for where `None`.
    pub max_tokens: Option<usize>,
    pub sampling: SamplingParams,
    /// Strings that end the answer and are no part of it.
    pub stop: Vec<String>,
    /// Report log-probabilities, with this many of the likeliest tokens each.
    pub logprobs: Option<usize>,
    /// Go on after an end-of-text token, for measurements and references.
    pub ignore_eos: bool,
}

impl GenerateParams {
    /// Refuses the first field outside its range, by name.
    pub fn validate(&self) -> Result<(), ParamError> {
        self.sampling.validate()?;
        if self.max_tokens == Some(0) {
            return Err(ParamError::new("max_tokens", 0, "at least 1"));
        }
        if let Some(count) = self.logprobs.filter(|count| *count > LOGPROBS_MAX) {
            return Err(ParamError::new("top_logprobs", count, "between 0 and 20"));
        }
        if self.stop.len() > STOP_STRINGS_MAX {
            return Err(ParamError::new("stop", format!("{} strings", self.stop.len()), "at most 16 strings"));
        }
        for stop in &self.stop {
            if stop.is_empty() || stop.len() > STOP_BYTES_MAX {
                let value = format!("a string of {} bytes", stop.len());
                return Err(ParamError::new("stop", value, "strings of 1 to 1024 bytes"));
            }
        }
        Ok(())
    }
}
