//! Replies in OpenAI's shapes, built from the tokens of one generation: whole, or chunk by chunk.
//!
//! The invariant: the chunks of a stream share one id and add up to the whole reply: the same text, the same
//! log-probabilities, the same finish reason, the same usage. [`Answer`] makes both from the same events, and nothing
//! here depends on the timing of the events.
//!
//! The module is pure, and does not know how a reply is sent.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use coel_model::text::sequence::{Emitted, FinishReason};
use coel_store::Precision;
use serde::Serialize;

use super::logprobs::{ChatToken, Listed, TextTokens, characters, chat_token};
use crate::service::Usage;

/// Gives the bytes of a token of the requested model.
pub(super) type Spell = Arc<dyn Fn(u32) -> Vec<u8> + Send + Sync>;

/// The endpoint that answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Chat,
    Text,
}

impl Shape {
    /// The request field that holds the prompt.
    pub fn prompt_field(self) -> &'static str {
        match self {
            Self::Chat => "messages",
            Self::Text => "prompt",
        }
    }
}

/// The fields that are the same in every part of a reply.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub id: String,
    shape: Shape,
    model: String,
    created: u64,
}

impl Head {
    /// `entropy` makes the id unique; `created` is in Unix seconds.
    pub fn new(shape: Shape, model: &str, entropy: u128, created: u64) -> Self {
        let prefix = match shape {
            Shape::Chat => "chatcmpl",
            Shape::Text => "cmpl",
        };
        Self { id: format!("{prefix}-{entropy:032x}"), shape, model: model.to_owned(), created }
    }

    fn envelope(&self, object: &'static str, choices: Vec<Choice>, usage: UsageField) -> Envelope {
        Envelope {
            id: self.id.clone(),
            object,
            created: self.created,
            model: self.model.clone(),
            system_fingerprint: concat!("coel-", env!("CARGO_PKG_VERSION")),
            choices,
            usage,
        }
    }
}

/// A reply, or a chunk of one, as it is serialised to JSON.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Envelope {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: &'static str,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "UsageField::is_absent")]
    usage: UsageField,
}

/// OpenAI's streams tell three cases apart: no field, `null` until the last chunk, and the counts.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
enum UsageField {
    Absent,
    Null,
    Counts(UsageCounts),
}

impl UsageField {
    fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }
}

#[derive(Debug, Clone, Serialize)]
struct UsageCounts {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    coel: CoelUsage,
}

/// Where an answer was computed, and at which precisions: coel's own addition.
#[derive(Debug, Clone, Serialize)]
struct CoelUsage {
    rows_local: u64,
    rows_remote: u64,
    precisions: BTreeSet<Precision>,
    other_classes: Vec<String>,
}

impl From<Usage> for UsageCounts {
    fn from(usage: Usage) -> Self {
        let Usage { prompt_tokens, completion_tokens, rows_local, rows_remote, precisions, other_classes } = usage;
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            coel: CoelUsage { rows_local, rows_remote, precisions, other_classes },
        }
    }
}

#[derive(Debug, Clone, Serialize)]
struct Choice {
    index: u32,
    #[serde(flatten)]
    said: Said,
    logprobs: Option<Listed>,
    finish_reason: Option<&'static str>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "lowercase")]
enum Said {
    Message { role: &'static str, content: String, refusal: Option<()> },
    Delta(Delta),
    Text(String),
}

#[derive(Debug, Clone, Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// One generation's tokens on their way into a reply.
pub(super) struct Answer {
    head: Head,
    spell: Spell,
    /// The position of the next token: the number of characters whose first byte is in an earlier token.
    offset: usize,
    text: String,
    chat: Vec<ChatToken>,
    listed: TextTokens,
    /// Whether any token since the last part was taken has log-probabilities.
    with_logprobs: bool,
}

impl Answer {
    pub fn new(head: Head, spell: Spell) -> Self {
        Self {
            head,
            spell,
            offset: 0,
            text: String::new(),
            chat: Vec::new(),
            listed: TextTokens::default(),
            with_logprobs: false,
        }
    }

    /// Adds the output of one step.
    pub fn push(&mut self, emitted: &Emitted) {
        self.text.push_str(&emitted.text);
        let Some(logprobs) = &emitted.logprobs else { return };
        self.with_logprobs = true;
        let spell = &*self.spell;
        match self.head.shape {
            Shape::Chat => self.chat.push(chat_token(emitted.token, logprobs, spell)),
            Shape::Text => {
                self.listed.push(emitted.token, logprobs, self.offset, spell);
                self.offset += characters(&spell(emitted.token));
            }
        }
    }

    /// The whole reply. `logprobs` says whether log-probabilities were requested: if so, the list is there even without
    /// tokens.
    pub fn whole(mut self, reason: FinishReason, usage: Usage, logprobs: bool) -> Envelope {
        self.with_logprobs |= logprobs;
        let (text, listed) = self.take();
        let (object, said) = match self.head.shape {
            Shape::Chat => ("chat.completion", Said::Message { role: "assistant", content: text, refusal: None }),
            Shape::Text => ("text_completion", Said::Text(text)),
        };
        let choice = Choice { index: 0, said, logprobs: listed, finish_reason: Some(reason.as_str()) };
        self.head.envelope(object, vec![choice], UsageField::Counts(usage.into()))
    }

    fn take(&mut self) -> (String, Option<Listed>) {
        let text = std::mem::take(&mut self.text);
        let content = std::mem::take(&mut self.chat);
        let tokens = std::mem::take(&mut self.listed);
        let listed = std::mem::take(&mut self.with_logprobs).then_some(match self.head.shape {
            Shape::Chat => Listed::Chat { content, refusal: None },
            Shape::Text => Listed::Text(tokens),
        });
        (text, listed)
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").field("head", &self.head).field("text", &self.text).finish_non_exhaustive()
    }
}

/// One generation's tokens on their way into chunks.
#[derive(Debug)]
pub(super) struct Chunks {
    answer: Answer,
    include_usage: bool,
}

impl Chunks {
    pub fn new(answer: Answer, include_usage: bool) -> Self {
        Self { answer, include_usage }
    }

    /// The chunk before the first token: in a chat, it names the role.
    pub fn opening(&self) -> Option<Envelope> {
        let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
        match self.answer.head.shape {
            Shape::Chat => Some(self.chunk(Said::Delta(delta), None, None)),
            Shape::Text => None,
        }
    }

    /// The chunk for one step, if there is anything to show.
    pub fn token(&mut self, emitted: &Emitted) -> Option<Envelope> {
        self.answer.push(emitted);
        let (text, listed) = self.answer.take();
        if text.is_empty() && listed.is_none() {
            return None;
        }
        let said = match self.answer.head.shape {
            Shape::Chat => Said::Delta(Delta { role: None, content: Some(text) }),
            Shape::Text => Said::Text(text),
        };
        Some(self.chunk(said, listed, None))
    }

    /// The chunks after the last token.
    pub fn closing(&self, reason: FinishReason, usage: Usage) -> Vec<Envelope> {
        let said = match self.answer.head.shape {
            Shape::Chat => Said::Delta(Delta::default()),
            Shape::Text => Said::Text(String::new()),
        };
        let mut last = vec![self.chunk(said, None, Some(reason))];
        if self.include_usage {
            last.push(self.answer.head.envelope(self.object(), Vec::new(), UsageField::Counts(usage.into())));
        }
        last
    }

    fn chunk(&self, said: Said, logprobs: Option<Listed>, reason: Option<FinishReason>) -> Envelope {
        let choice = Choice { index: 0, said, logprobs, finish_reason: reason.map(FinishReason::as_str) };
        let usage = if self.include_usage { UsageField::Null } else { UsageField::Absent };
        self.answer.head.envelope(self.object(), vec![choice], usage)
    }

    fn object(&self) -> &'static str {
        match self.answer.head.shape {
            Shape::Chat => "chat.completion.chunk",
            Shape::Text => "text_completion",
        }
    }
}
