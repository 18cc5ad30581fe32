//! Generation on one machine alone, without any node.
//!
//! Owns [`LocalModel`]: a model folder, its text side and an engine that holds all of it, and the loop that drives
//! a sequence to its end. It is synchronous: a command line's business, not a server's. Whoever spreads experts over
//! machines drives the same [`Sequence`] on an engine with a source of its own.

use std::path::Path;

use crate::{
    chat::Message,
    decoder::Want,
    device::Device,
    engine::{Engine, EngineError, EngineOptions, block_on},
    folder::ModelFolder,
    layout::{self, ExpertId},
    sequence::{Emitted, FinishReason, GenerateParams, Sequence, SequenceError, Usage},
    slices::Precision,
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

/// How a local model is opened.
#[derive(Clone, Debug)]
pub struct LocalOptions {
    pub device: Device,
    pub trunk: Precision,
    pub experts: Precision,
    /// Threads that compute; 0 takes all cores.
    pub threads: usize,
    /// Tokens of KV cache; one full context if not given.
    pub kv_tokens: Option<usize>,
}

impl Default for LocalOptions {
    fn default() -> Self {
        let exact = Precision::Exact;
        Self { device: Device::Auto, trunk: exact, experts: exact, threads: 0, kv_tokens: None }
    }
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
    /// Opens a checkpoint folder and loads all of it as it is, with all cores. See [`open_with`](Self::open_with).
    pub fn open(dir: &Path, device: Device) -> Result<Self, LocalError> {
        Self::open_with(dir, &LocalOptions { device, ..LocalOptions::default() })
    }

    /// Opens a model folder and loads all of it. Weights are used in place where the device computes in this memory and
    /// the folder has them in that form; those of a checkpoint are sliced on the way.
    pub fn open_with(dir: &Path, options: &LocalOptions) -> Result<Self, LocalError> {
        let folder = ModelFolder::open(dir)?;
        let config = folder.config().clone();
        let text = TextModel::from_paths(&config, folder.files())?;
        let engine_options = EngineOptions {
            kv_tokens: options.kv_tokens.unwrap_or(config.max_position_embeddings),
            threads: options.threads,
            ..EngineOptions::default()
        };
        let engine = Engine::start(options.device, config.clone(), engine_options)?;
        block_on(engine.load_trunk_tensors(folder.trunk(options.trunk)?))?;
        for id in layout::experts(&config) {
            block_on(engine.load_expert_tensors(id, folder.expert(id, options.experts)?))?;
        }
        Ok(Self { engine, text })
    }

    /// Holds one expert at another precision from now on, as `folder` has it.
    pub fn hold(&self, folder: &ModelFolder, id: ExpertId, precision: Precision) -> Result<(), LocalError> {
        Ok(block_on(self.engine.load_expert_tensors(id, folder.expert(id, precision)?))?)
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
        let mut session = self.engine.open_session(sequence.tokens_max())?;
        let mut text = String::new();
        let finish = loop {
            let logits = block_on(session.advance(sequence.next_input(), Want::Last))?.logits;
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
