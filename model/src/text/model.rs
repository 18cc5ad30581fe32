//! The text side of a model, from its files.
//!
//! Owns [`TextModel`]: tokenizer and chat template, checked against the configuration. The files may come from a
//! folder or, by name, from a peer; the invariant is that every token the tokenizer gives is one the model has, and
//! that all end-of-text tokens any of the files names are known. It holds no weights.

use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc};

use serde_json::Value;

use crate::text::{
    chat::{ChatError, ChatTemplate, Message},
    tokenizer::{Tokenizer, TokenizerError},
};
use coel_weights::{checkpoint::Checkpoint, config::ModelConfig};

/// Why a model's text files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("{file} is missing; copy it from the model's source")]
    Missing { file: &'static str },
    #[error("{file}: {source}")]
    Io { file: String, source: std::io::Error },
    #[error("generation_config.json cannot be read: {0}")]
    GenerationConfig(serde_json::Error),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Chat(#[from] ChatError),
}

/// Tokenizer and chat template of a model.
#[derive(Clone)]
pub struct TextModel {
    pub tokenizer: Arc<Tokenizer>,
    pub chat: Arc<ChatTemplate>,
}

impl TextModel {
    /// Reads the files of an open checkpoint.
    pub fn open(checkpoint: &Checkpoint) -> Result<Self, TextError> {
        Self::from_paths(checkpoint.config(), checkpoint.files())
    }

    /// Reads the files [`Checkpoint::files`] lists, by name and path.
    pub fn from_paths(config: &ModelConfig, paths: Vec<(String, PathBuf)>) -> Result<Self, TextError> {
        let mut files = BTreeMap::new();
        for (name, path) in paths {
            let bytes = fs::read(&path).map_err(|source| TextError::Io { file: path.display().to_string(), source })?;
            files.insert(name, bytes);
        }
        Self::from_files(config, &files)
    }

    /// From the contents of the files [`Checkpoint::files`] lists, by name.
    pub fn from_files(config: &ModelConfig, files: &BTreeMap<String, Vec<u8>>) -> Result<Self, TextError> {
        let file = |name: &str| files.get(name).map(Vec::as_slice);
        let tokenizer_json = file("tokenizer.json").ok_or(TextError::Missing { file: "tokenizer.json" })?;
        let tokenizer_config = file("tokenizer_config.json");
        let mut ends = config.eos_token_id.clone();
        if let Some(json) = file("generation_config.json") {
            let json: Value = serde_json::from_slice(json).map_err(TextError::GenerationConfig)?;
            let ids = json.get("eos_token_id");
            let many = ids.and_then(Value::as_array).into_iter().flatten();
            let all = ids.into_iter().chain(many).filter_map(Value::as_u64);
            ends.extend(all.filter_map(|id| u32::try_from(id).ok()));
        }
        let tokenizer = Tokenizer::from_bytes(tokenizer_json, tokenizer_config)?.with_eos_tokens(ends);
        tokenizer.fits(config.vocab_size)?;
        let chat = ChatTemplate::from_files(file("chat_template.jinja"), tokenizer_config)?;
        Ok(Self { tokenizer: Arc::new(tokenizer), chat: Arc::new(chat) })
    }

    /// The tokens of a conversation, ending where the assistant's answer begins.
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>, TextError> {
        let text = self.chat.render(messages, true)?;
        Ok(self.tokenizer.encode(&text, false)?)
    }
}
