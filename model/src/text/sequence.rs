//! The life of one generation between the model's logits and the text a reader sees.
//!
//! Owns the tokens so far, prompt first, the sampler, the detokenizer and the stop strings of one request.
//! Each step takes logits and returns what became of them, as a value. The invariants: text once shown is
//! never taken back; all pieces shown, put together, are the answer, the same however its characters were
//! spread over tokens; nothing follows the piece that carries the finish reason.
//!
//! It deliberately does not know the model that computes the logits, nor the cache, the clock or the
//! connection. Given the same logits it takes the same steps, on any node.

mod params;
mod stop;

use std::sync::Arc;

pub use params::{GenerateParams, LOGPROBS_MAX, STOP_BYTES_MAX, STOP_STRINGS_MAX};

use crate::text::sampling::{Logprobs, ParamError, Sampler, SamplingError};
use crate::text::tokenizer::{Detokenizer, Tokenizer};
use stop::StopFilter;

/// Why a generation cannot begin or go on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SequenceError {
    #[error(transparent)]
    Params(#[from] ParamError),
    #[error("the prompt is empty: send at least one token")]
    EmptyPrompt,
    #[error(
        "the prompt has {prompt_tokens} tokens, but the model's context is {context} and one must be left \
         for the answer: shorten the prompt to at most {} tokens",
        .context.saturating_sub(1)
    )]
    ContextOverflow { prompt_tokens: usize, context: usize },
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    #[error("this generation has already finished")]
    Finished,
}

/// Why a generation ended, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-text token or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
}

impl FinishReason {
    /// The value of `finish_reason` in OpenAI's responses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What one step brought.
#[derive(Debug, Clone, PartialEq)]
pub struct Emitted {
    /// The token chosen, end-of-text included.
    pub token: u32,
    /// Text that may be shown now. Often empty: inside a character, or while it may be the beginning of a
    /// stop string.
    pub text: String,
    /// Where asked for; never for the end-of-text token, which is no part of the answer.
    pub logprobs: Option<Logprobs>,
    /// Present on the last step only.
    pub finish: Option<FinishReason>,
}

/// Token counts for OpenAI's `usage`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: usize,
    /// Tokens chosen, an end-of-text token included: it was computed as any other.
    pub completion_tokens: usize,
}

impl Usage {
    pub fn total_tokens(self) -> usize {
        self.prompt_tokens + self.completion_tokens
    }
}

/// One generation.
pub struct Sequence {
    tokenizer: Arc<Tokenizer>,
    /// The prompt, then what was chosen.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    /// How many of `tokens` the model had been given when it returned the last logits.
    seen: usize,
    /// The length of `tokens` at which the generation ends.
    tokens_max: usize,
    logprobs: Option<usize>,
    ignore_eos: bool,
    sampler: Sampler,
    detokenizer: Detokenizer,
    stop: StopFilter,
    finish: Option<FinishReason>,
}

impl Sequence {
    /// Begins a generation in a context of `context_len` tokens.
    ///
    /// A prompt that leaves no room for a token is refused. `max_tokens` beyond the rest of the context is
    /// cut to it, as OpenAI's servers do, and then ends with [`FinishReason::Length`]: a client that always
    /// asks for 4096 tokens should not have to count its prompt.
    pub fn new(
        prompt_tokens: Vec<u32>,
        params: GenerateParams,
        context_len: usize,
        tokenizer: Arc<Tokenizer>,
    ) -> Result<Self, SequenceError> {
        params.validate()?;
        if prompt_tokens.is_empty() {
            return Err(SequenceError::EmptyPrompt);
        }
        if prompt_tokens.len() >= context_len {
            let prompt_tokens = prompt_tokens.len();
            return Err(SequenceError::ContextOverflow { prompt_tokens, context: context_len });
        }
        let room = context_len - prompt_tokens.len();
        let tokens_max = prompt_tokens.len() + params.max_tokens.map_or(room, |asked| asked.min(room));
        Ok(Self {
            prompt_tokens: prompt_tokens.len(),
            seen: 0,
            tokens_max,
            logprobs: params.logprobs,
            ignore_eos: params.ignore_eos,
            sampler: Sampler::new(params.sampling),
            detokenizer: Detokenizer::continuing(tokenizer.clone()),
            stop: StopFilter::new(params.stop),
            finish: None,
            tokens: prompt_tokens,
            tokenizer,
        })
    }

    /// The prompt's tokens.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_tokens]
    }

    /// The tokens chosen so far, end-of-text included.
    pub fn completion(&self) -> &[u32] {
        &self.tokens[self.prompt_tokens..]
    }

    /// The tokens the model has not been given yet: the whole prompt before the first step, then the last
    /// token chosen. The logits after the last of them go to [`accept`](Self::accept).
    pub fn next_input(&self) -> &[u32] {
        &self.tokens[self.seen..]
    }

    /// The most tokens prompt and answer can come to: what a cache must have room for.
    pub fn tokens_max(&self) -> usize {
        self.tokens_max
    }

    /// The tokenizer, to spell out the tokens of [`Logprobs`].
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Why the generation ended, once it has.
    pub fn finish(&self) -> Option<FinishReason> {
        self.finish
    }

    pub fn usage(&self) -> Usage {
        Usage { prompt_tokens: self.prompt_tokens, completion_tokens: self.completion().len() }
    }

    /// Chooses the next token from `logits` `[vocab]` and says what to show. After an error nothing has
    /// changed.
    pub fn accept(&mut self, logits: &[f32]) -> Result<Emitted, SequenceError> {
        if self.finish.is_some() {
            return Err(SequenceError::Finished);
        }
        let choice = self.sampler.pick(logits, &self.tokens, self.logprobs)?;
        let token = choice.token;
        self.seen = self.tokens.len();
        self.tokens.push(token);

        let ends = self.tokenizer.is_eos(token);
        // An ignored end-of-text token is not shown either, special or not.
        let piece = if ends { String::new() } else { self.detokenizer.push(token) };
        let mut text = self.stop.push(&piece);
        self.finish = if self.stop.found() || (ends && !self.ignore_eos) {
            Some(FinishReason::Stop)
        } else if self.tokens.len() >= self.tokens_max {
            Some(FinishReason::Length)
        } else {
            None
        };
        if self.finish.is_some() && !self.stop.found() {
            text.push_str(&self.stop.push(&self.detokenizer.finish()));
            text.push_str(&self.stop.finish());
            if self.stop.found() {
                self.finish = Some(FinishReason::Stop);
            }
        }
        let logprobs = choice.logprobs.filter(|_| !ends || self.ignore_eos);
        Ok(Emitted { token, text, logprobs, finish: self.finish })
    }
}

#[cfg(test)]
mod tests;
