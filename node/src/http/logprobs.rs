//! Log-probabilities in OpenAI's two shapes: a list of objects for chats, four parallel lists for completions.
//!
//! The invariants: each token with log-probabilities has one entry, in order; and every number is finite, as JSON has
//! no infinities. A token may hold part of a character, so it is shown as text if it is valid UTF-8, and otherwise as
//! its bytes, escaped as OpenAI escapes them.
//!
//! The module does not know tokenizers: an argument gives the bytes of a token.

use coel_model::text::sampling::Logprobs;
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

/// The log-probability that OpenAI sends for a token that cannot occur.
const LOGPROB_MIN: f32 = -9999.0;

/// The log-probabilities of one part of an answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub(super) enum Listed {
    Chat { content: Vec<ChatToken>, refusal: Option<()> },
    Text(TextTokens),
}

/// A token of a chat, with its most likely alternatives.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct ChatToken {
    #[serde(flatten)]
    chosen: Spelled,
    top_logprobs: Vec<Spelled>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Spelled {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// The tokens of a completion, as lists of equal length.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct TextTokens {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Ranked>,
    /// Characters of the answer before each token.
    text_offset: Vec<usize>,
}

/// A JSON object that keeps the order of the ranking.
#[derive(Debug, Clone, PartialEq)]
struct Ranked(Vec<(String, f32)>);

impl Serialize for Ranked {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

/// A chat's entry for one token.
pub(super) fn chat_token(token: u32, logprobs: &Logprobs, spell: impl Fn(u32) -> Vec<u8>) -> ChatToken {
    let spelled = |token, logprob| {
        let bytes = spell(token);
        Spelled { token: show(&bytes, ""), logprob: finite(logprob), bytes }
    };
    ChatToken {
        chosen: spelled(token, logprobs.chosen),
        top_logprobs: logprobs.top.iter().map(|&(token, logprob)| spelled(token, logprob)).collect(),
    }
}

impl TextTokens {
    /// Adds one token, which begins after `offset` characters of the answer. The chosen token is listed with the most
    /// likely ones even if it is not among them.
    pub fn push(&mut self, token: u32, logprobs: &Logprobs, offset: usize, spell: impl Fn(u32) -> Vec<u8>) {
        let chosen = show(&spell(token), "bytes:");
        let chosen_logprob = finite(logprobs.chosen);
        let mut ranked: Vec<(String, f32)> = Vec::with_capacity(logprobs.top.len() + 1);
        let top = logprobs.top.iter().map(|&(token, logprob)| (show(&spell(token), "bytes:"), finite(logprob)));
        for (name, logprob) in top.chain([(chosen.clone(), chosen_logprob)]) {
            // Two tokens may be spelled alike. An object has each name once, and the more likely token comes first.
            if ranked.iter().all(|(known, _)| *known != name) {
                ranked.push((name, logprob));
            }
        }
        self.tokens.push(chosen);
        self.token_logprobs.push(chosen_logprob);
        self.top_logprobs.push(Ranked(ranked));
        self.text_offset.push(offset);
    }
}

/// The number of characters that begin in these UTF-8 bytes: continuation bytes do not count.
pub(super) fn characters(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte & 0b1100_0000 != 0b1000_0000).count()
}

fn finite(logprob: f32) -> f32 {
    // `max` also turns NaN into the bound.
    logprob.max(LOGPROB_MIN)
}

/// Bytes as text, or escaped after `prefix` if they are not valid UTF-8.
fn show(bytes: &[u8], prefix: &str) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold(prefix.to_owned(), |shown, byte| shown + &format!("\\x{byte:02x}")),
    }
}
