//! Generation on one machine alone, without any node.
//!
//! Owns [`LocalModel`]: a checkpoint folder, its text side and an engine that holds all of it, and the loop that drives
//! a sequence to its end. It is synchronous: a command line's business, not a server's. Whoever spreads experts over
//! machines drives the same [`Sequence`] with its own answers to the decoder's calls.

use std::path::Path;

use crate::{
    chat::Message,
    checkpoint::Checkpoint,
    decoder::Want,
    device::Device,
    engine::{Engine, EngineError, EngineOptions, block_on},
    sequence::{Emitted, FinishReason, GenerateParams, Sequence, SequenceError, Usage},
    tensors::LoadError,
    text::{TextError, TextModel},
};

/// Why a local model cannot be opened or cannot answer.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Sequence(#[from] SequenceError),
}

/// A whole model on this machine.
#[derive(Clone)]
pub struct LocalModel {
    pub engine: Engine,
    pub text: TextModel,
}

/// A finished answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    pub text: String,
    /// End-of-text included.
    pub tokens: Vec<u32>,
    pub finish: FinishReason,
    pub usage: Usage,
}

impl LocalModel {
    /// Opens a checkpoint folder and loads all of it, in place where the device computes in this memory. The KV pool
    /// has room for one full context.
    pub fn open(dir: &Path, device: Device) -> Result<Self, LocalError> {
        let checkpoint = Checkpoint::open(dir)?;
        let text = TextModel::open(&checkpoint)?;
        let config = checkpoint.config().clone();
        let options = EngineOptions { kv_tokens: config.max_position_embeddings, ..EngineOptions::default() };
        let engine = Engine::start(device, config, options)?;
        block_on(engine.load_checkpoint(&checkpoint))?;
        Ok(Self { engine, text })
    }

    /// Answers one user turn; `show` sees every step as it happens.
    pub fn chat(
        &self,
        prompt: &str,
        params: GenerateParams,
        show: impl FnMut(&Emitted),
    ) -> Result<Generation, LocalError> {
        let prompt = self.text.chat_prompt(&[Message::user(prompt)])?;
        self.generate(prompt, params, show)
    }

    /// Continues `prompt`; `show` sees every step as it happens.
    pub fn generate(
        &self,
        prompt: Vec<u32>,
        params: GenerateParams,
        mut show: impl FnMut(&Emitted),
    ) -> Result<Generation, LocalError> {
        let context = self.engine.config().max_position_embeddings;
        let mut sequence = Sequence::new(prompt, params, context, self.text.tokenizer.clone())?;
        let mut session = block_on(self.engine.open_session(sequence.tokens_max()))?;
        let mut text = String::new();
        let finish = loop {
            let logits = block_on(session.complete(sequence.next_input(), Want::Last))?;
            let emitted = sequence.accept(&logits)?;
            show(&emitted);
            text.push_str(&emitted.text);
            if let Some(finish) = emitted.finish {
                break finish;
            }
        };
        Ok(Generation { text, tokens: sequence.completion().to_vec(), finish, usage: sequence.usage() })
    }
}
