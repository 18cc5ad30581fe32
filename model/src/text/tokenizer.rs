//! Text to tokens and back, as the checkpoint's `tokenizer.json` defines it.
//!
//! Owns the vocabulary: which text each token stands for, which tokens are special (they steer the model and
//! are not shown) and which end a text. Encoding is the `tokenizers` crate's. Decoding is our own: at load
//! every token is turned once into the bytes it stands for, so that a token is decoded alone, in constant
//! time, while the answer is still growing. The invariant: the pieces a [`Detokenizer`] returns, put
//! together, are what [`Tokenizer::decode`] returns for all tokens. That needs decoders that work token by
//! token, as those of every family served here do (byte-level, and SentencePiece with byte fallback); another
//! decoder is refused by name.
//!
//! It deliberately does not know the model: [`Tokenizer::fits`] is told the vocabulary size, and
//! [`Tokenizer::with_eos_tokens`] the end-of-text ids of `config.json`.

mod decoder;
mod detokenizer;

use std::collections::BTreeSet;

use serde::Deserialize;

pub use detokenizer::Detokenizer;

use decoder::TokenDecoder;

/// Ids above this are refused before a table of that length is allocated; the largest vocabularies in use
/// have 2^18.
const TOKEN_ID_MAX: u32 = (1 << 24) - 1;

/// Why a tokenizer cannot be used, or a text not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("tokenizer.json cannot be read: {0}; copy the file again from the model's source")]
    Malformed(String),
    #[error("tokenizer_config.json cannot be read: {0}; copy the file again from the model's source")]
    MalformedConfig(serde_json::Error),
    #[error(
        "the decoder of tokenizer.json is not supported: {0}; supported are byte-level and \
         SentencePiece decoders"
    )]
    UnsupportedDecoder(String),
    #[error("tokenizer.json has the token id {0}, but at most {TOKEN_ID_MAX} is possible; the file is damaged")]
    IdTooLarge(u32),
    #[error("tokenizer_config.json names `{0}` as eos_token, which tokenizer.json does not contain")]
    UnknownEos(String),
    #[error(
        "the tokenizer has {tokenizer} token ids, but the model's vocab_size is {model}: they belong to \
         different models; use the tokenizer.json that came with the weights"
    )]
    VocabularyMismatch { tokenizer: usize, model: usize },
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
}

/// The checkpoint's tokenizer. Immutable, shared between requests behind an `Arc`.
pub struct Tokenizer {
    encoder: tokenizers::Tokenizer,
    /// The bytes of all tokens by id, end to end: a vector per token would cost more than the text itself.
    bytes: Vec<u8>,
    /// Token `id` is `bytes[ends[id - 1]..ends[id]]`; ids the vocabulary skips are empty.
    ends: Vec<u32>,
    special: BTreeSet<u32>,
    eos: BTreeSet<u32>,
    /// How many leading spaces of a text are an artefact of the encoding, to be dropped when decoding.
    leading_spaces: usize,
}

/// What is read here of `tokenizer_config.json`; the chat template in it is read by `chat`.
#[derive(Deserialize)]
struct ConfigFile {
    eos_token: Option<NamedToken>,
}

/// A special token's name, which older files spell as an object with the properties of an added token.
#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum NamedToken {
    Text(String),
    Added { content: String },
}

impl NamedToken {
    pub(crate) fn into_text(self) -> String {
        match self {
            Self::Text(text) | Self::Added { content: text } => text,
        }
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where the checkpoint has it, `tokenizer_config.json`, which names the
    /// end-of-text token.
    pub fn from_bytes(tokenizer_json: &[u8], tokenizer_config: Option<&[u8]>) -> Result<Self, TokenizerError> {
        let decoder = TokenDecoder::from_tokenizer_json(tokenizer_json)?;
        let mut encoder = tokenizers::Tokenizer::from_bytes(tokenizer_json)
            .map_err(|error| TokenizerError::Malformed(error.to_string()))?;
        // Left in the file by training: here a prompt too long is refused, never silently cut, and none is
        // padded.
        encoder.with_padding(None);
        encoder.with_truncation(None).map_err(|error| TokenizerError::Malformed(error.to_string()))?;

        let (bytes, ends) = token_table(&encoder, &decoder)?;
        let added = encoder.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let eos = named_eos(&encoder, tokenizer_config)?.into_iter().collect();
        Ok(Self { encoder, bytes, ends, special, eos, leading_spaces: decoder.leading_spaces() })
    }

    /// Adds the end-of-text ids which `config.json` or `generation_config.json` give to the one of the
    /// tokenizer.
    pub fn with_eos_tokens(mut self, tokens: impl IntoIterator<Item = u32>) -> Self {
        self.eos.extend(tokens);
        self
    }

    /// The tokens of `text`. Special tokens written out in it, as a chat template writes them, become those
    /// tokens.
    ///
    /// `add_special` adds what the tokenizer puts around a text (often a begin-of-text token): true for a
    /// plain text, false for one that a chat template rendered.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding =
            self.encoder.encode_fast(text, add_special).map_err(|error| TokenizerError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `tokens`, without special tokens. Bytes that are not UTF-8 become U+FFFD, and ids outside
    /// the vocabulary (a model may emit them where its vocabulary is padded) nothing.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let mut stream = detokenizer::ByteStream::start_of_text(self);
        let mut text: String = tokens.iter().map(|token| stream.push(self, *token)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// The number of token ids: one more than the largest, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.ends.len()
    }

    /// The tokens that end a text, ascending. Empty where neither the tokenizer nor the model named one.
    pub fn eos_tokens(&self) -> impl Iterator<Item = u32> + '_ {
        self.eos.iter().copied()
    }

    /// Whether `token` ends a text.
    pub fn is_eos(&self, token: u32) -> bool {
        self.eos.contains(&token)
    }

    /// Whether `token` steers the model and is not shown.
    pub fn is_special(&self, token: u32) -> bool {
        self.special.contains(&token)
    }

    /// The bytes `token` stands for: possibly a part of a character, empty for an id outside the vocabulary.
    /// Special tokens give their name.
    pub fn token_bytes(&self, token: u32) -> &[u8] {
        let token = token as usize;
        let Some(&end) = self.ends.get(token) else {
            return &[];
        };
        let start = if token == 0 { 0 } else { self.ends[token - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// [`token_bytes`](Self::token_bytes) as text, with U+FFFD for parts of characters.
    pub fn token_text(&self, token: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(token)).into_owned()
    }

    /// Refuses a tokenizer with ids the model has no embedding for. Fewer ids are fine: vocabularies are
    /// padded to round sizes.
    pub fn fits(&self, vocab_size: usize) -> Result<(), TokenizerError> {
        if self.vocab_size() <= vocab_size {
            return Ok(());
        }
        Err(TokenizerError::VocabularyMismatch { tokenizer: self.vocab_size(), model: vocab_size })
    }
}

/// The bytes of every token, end to end by id, and where each ends.
fn token_table(encoder: &tokenizers::Tokenizer, decoder: &TokenDecoder) -> Result<(Vec<u8>, Vec<u32>), TokenizerError> {
    let mut ids: Vec<_> = encoder.get_vocab(true).into_values().collect();
    ids.sort_unstable();
    ids.dedup();
    let largest = ids.last().copied().ok_or_else(|| TokenizerError::Malformed("it has no tokens".into()))?;
    if largest > TOKEN_ID_MAX {
        return Err(TokenizerError::IdTooLarge(largest));
    }
    let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(largest as usize + 1));
    for id in ids {
        // A skipped id ends where the one before it does.
        ends.resize(id as usize, bytes.len() as u32);
        bytes.extend(decoder.bytes(&encoder.id_to_token(id).unwrap_or_default()));
        ends.push(
            u32::try_from(bytes.len()).map_err(|_| TokenizerError::Malformed("its tokens have over 4 GiB".into()))?,
        );
    }
    Ok((bytes, ends))
}

fn named_eos(encoder: &tokenizers::Tokenizer, config: Option<&[u8]>) -> Result<Option<u32>, TokenizerError> {
    let Some(config) = config else { return Ok(None) };
    let config: ConfigFile = serde_json::from_slice(config).map_err(TokenizerError::MalformedConfig)?;
    let Some(name) = config.eos_token.map(NamedToken::into_text) else {
        return Ok(None);
    };
    let id = encoder.token_to_id(&name);
    id.map(Some).ok_or(TokenizerError::UnknownEos(name))
}

#[cfg(test)]
pub(crate) mod tests;
