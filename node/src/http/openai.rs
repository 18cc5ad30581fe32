//! Reads and checks requests in OpenAI's format: bytes in, a [`GenerateRequest`] or a refusal out.
//!
//! The invariant: everything that a request asks for is either done or refused by name. Fields fall into three groups:
//! those that shape the answer are checked against their ranges; those that this API knows but does not support (tools,
//! penalties, several choices) are refused unless their value asks for nothing; and those that only label a request are
//! accepted unread.
//!
//! The module is pure: the seed for a request without one is an argument. It does not know the model, so the service
//! checks whether a prompt fits the context and a token id the vocabulary.

use coel_model::text::chat::Message;
use coel_model::text::sampling::SamplingParams;
use coel_model::text::sequence::GenerateParams;
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, missing, mistyped, outside, quote};
use crate::service::{GenerateRequest, Prompt};

/// OpenAI's own limits.
const STOPS_MAX: usize = 4;
const CHAT_TOP_LOGPROBS_MAX: i64 = 20;
const TEXT_LOGPROBS_MAX: i64 = 5;
/// The limit of `/v1/completions` if `max_tokens` is absent, the same as OpenAI's. A chat runs to the end of the
/// context.
const TEXT_MAX_TOKENS: usize = 16;
/// The answer is searched for stop strings after every token, and a stop string longer than a line has no known use.
const STOP_BYTES_MAX: usize = 1024;
/// Only bounds the arithmetic: the service ends an answer at the end of the context.
const MAX_TOKENS_MAX: i64 = u32::MAX as i64;

/// Fields that label a request, or that ask for what happens anyway.
const HARMLESS: &[&str] = &[
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
];

/// A parsed request.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The request to the service.
    pub generate: GenerateRequest,
    /// Whether tokens are sent as they come.
    pub stream: bool,
    /// Whether a stream ends with a chunk that holds the usage.
    pub include_usage: bool,
}

/// Reads the body of `POST /v1/chat/completions`.
///
/// # Errors
/// 400, naming the field at fault.
pub fn chat(body: &[u8], seed: u64) -> Result<Asked, ApiError> {
    let mut fields = Fields::parse(body)?;
    let model = model(&mut fields)?;
    let messages = messages(&mut fields)?;
    let mut params = common(&mut fields, seed)?;
    let budget = fields.integer("max_completion_tokens", 1, MAX_TOKENS_MAX)?;
    params.max_tokens = match (budget, params.max_tokens) {
        (Some(new), Some(old)) if new as usize != old => {
            let message = format!(
                "`max_completion_tokens` is {new} and `max_tokens`, its older name, is {old}: give one of them"
            );
            return Err(ApiError::field("max_completion_tokens", message));
        }
        (Some(new), _) => Some(new as usize),
        (None, old) => old,
    };

    let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0, CHAT_TOP_LOGPROBS_MAX)?;
    params.logprobs = match (logprobs, top) {
        (false, Some(top)) if top > 0 => {
            let message =
                format!("`top_logprobs` is {top}, but `logprobs` is not true: set `logprobs` to true as well");
            return Err(ApiError::field("top_logprobs", message));
        }
        (false, _) => None,
        (true, top) => Some(top.unwrap_or(0) as usize),
    };

    for name in ["tools", "functions"] {
        fields.unsupported(name, is_empty)?;
    }
    for name in ["tool_choice", "function_call"] {
        fields.unsupported(name, |value| value == "none" || value == "auto")?;
    }
    fields.unsupported("response_format", |value| value["type"] == "text")?;
    fields.unsupported("modalities", |value| *value == serde_json::json!(["text"]))?;
    for name in ["audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"] {
        fields.unsupported(name, |_| false)?;
    }
    let (stream, include_usage) = streaming(&mut fields)?;
    fields.finish()?;
    let generate = GenerateRequest { model, prompt: Prompt::Chat(messages), params };
    Ok(Asked { generate, stream, include_usage })
}

/// Reads the body of `POST /v1/completions`.
///
/// # Errors
/// 400, naming the field at fault.
pub fn completion(body: &[u8], seed: u64) -> Result<Asked, ApiError> {
    let mut fields = Fields::parse(body)?;
    let model = model(&mut fields)?;
    let prompt = prompt(&mut fields)?;
    let mut params = common(&mut fields, seed)?;
    params.max_tokens.get_or_insert(TEXT_MAX_TOKENS);
    params.logprobs = fields.integer("logprobs", 0, TEXT_LOGPROBS_MAX)?.map(|count| count as usize);
    fields.unsupported("echo", |value| *value == false)?;
    fields.unsupported("best_of", |value| *value == 1)?;
    fields.unsupported("suffix", |value| value == "")?;
    let (stream, include_usage) = streaming(&mut fields)?;
    fields.finish()?;
    Ok(Asked { generate: GenerateRequest { model, prompt, params }, stream, include_usage })
}

fn model(fields: &mut Fields) -> Result<String, ApiError> {
    fields
        .string("model")?
        .filter(|name| !name.is_empty())
        .ok_or_else(|| missing("model", "name a model that GET /v1/models lists"))
}

/// Reads the fields that both endpoints share. `max_tokens` stays absent if the request has none.
fn common(fields: &mut Fields, seed: u64) -> Result<GenerateParams, ApiError> {
    let defaults = SamplingParams::default();
    let unit = |value| (0.0..=1.0).contains(&value);
    let sampling = SamplingParams {
        temperature: fields
            .number("temperature", "from 0 to 2", |value| (0.0..=2.0).contains(&value))?
            .unwrap_or(defaults.temperature),
        top_p: fields.number("top_p", "from 0 to 1", unit)?.unwrap_or(defaults.top_p),
        // vLLM's clients send -1 for "all"; the others send 0.
        top_k: fields.integer("top_k", -1, i64::from(u32::MAX))?.map_or(defaults.top_k, |k| k.max(0) as usize),
        min_p: fields.number("min_p", "from 0 to 1", unit)?.unwrap_or(defaults.min_p),
        repetition_penalty: fields
            .number("repetition_penalty", "above 0 and at most 10", |value| {
                value > f64::from(f32::MIN_POSITIVE) && value <= 10.0
            })?
            .unwrap_or(defaults.repetition_penalty),
        seed: read_seed(fields)?.unwrap_or(seed),
    };
    for name in ["frequency_penalty", "presence_penalty"] {
        fields.unsupported(name, |value| value.as_f64() == Some(0.0))?;
    }
    fields.unsupported("logit_bias", is_empty)?;
    fields.unsupported("n", |value| *value == 1)?;
    fields.ignore(HARMLESS);
    let max_tokens = fields.integer("max_tokens", 1, MAX_TOKENS_MAX)?.map(|count| count as usize);
    Ok(GenerateParams { sampling, max_tokens, stop: stops(fields)?, ..GenerateParams::default() })
}

/// Any 64-bit integer, signed or unsigned: OpenAI's seeds are signed.
fn read_seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.take("seed") else {
        return Ok(None);
    };
    let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    match seed {
        Some(seed) => Ok(Some(seed)),
        None if value.is_number() => Err(outside("seed", &value, "a whole number of at most 64 bits")),
        None => Err(mistyped("seed", &value, "a whole number")),
    }
}

fn stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let given = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) if items.len() > STOPS_MAX => {
            let range = format!("a string, or an array of at most {STOPS_MAX}");
            return Err(outside("stop", format_args!("an array of {}", items.len()), &range));
        }
        Some(Value::Array(items)) => items,
        Some(one) => vec![one],
    };
    let text = |value| match value {
        Value::String(text) if (1..=STOP_BYTES_MAX).contains(&text.len()) => Ok(text),
        Value::String(text) => {
            let range = format!("1 to {STOP_BYTES_MAX} bytes long");
            Err(outside("stop", format_args!("{} bytes long", text.len()), &range))
        }
        other => Err(mistyped("stop", &other, "a string or an array of strings")),
    };
    given.into_iter().map(text).collect()
}

/// `(stream, include_usage)`. A reply that is not streamed always holds the usage.
fn streaming(fields: &mut Fields) -> Result<(bool, bool), ApiError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let include_usage = match fields.take("stream_options") {
        None => false,
        Some(options) => {
            let mut options = Fields::nested(options, "stream_options")?;
            let include_usage = options.boolean("include_usage")?.unwrap_or(false);
            options.ignore(&["include_obfuscation"]);
            options.finish()?;
            include_usage
        }
    };
    Ok((stream, include_usage))
}

fn prompt(fields: &mut Fields) -> Result<Prompt, ApiError> {
    const ACCEPTED: &str = "a string, an array of token ids, or an array with one of either";
    let value =
        fields.take("prompt").ok_or_else(|| missing("prompt", "give the text to continue, or its token ids"))?;
    let items = match value {
        Value::String(text) => return Ok(Prompt::Text(text)),
        Value::Array(items) => items,
        other => return Err(mistyped("prompt", &other, ACCEPTED)),
    };
    match items.first() {
        None => Err(outside("prompt", "an empty array", ACCEPTED)),
        Some(Value::Number(_)) => Ok(Prompt::Tokens(token_ids(&items)?)),
        Some(Value::String(_) | Value::Array(_)) if items.len() > 1 => {
            let message =
                format!("`prompt` holds {} prompts, but a request takes only one: send them one by one", items.len());
            Err(ApiError::unsupported("prompt", message))
        }
        Some(Value::String(text)) => Ok(Prompt::Text(text.clone())),
        Some(Value::Array(ids)) if !ids.is_empty() => Ok(Prompt::Tokens(token_ids(ids)?)),
        Some(other) => Err(outside("prompt[0]", quote(other), ACCEPTED)),
    }
}

fn token_ids(items: &[Value]) -> Result<Vec<u32>, ApiError> {
    let id = |(index, value): (usize, &Value)| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| outside(&format!("prompt[{index}]"), quote(value), "a token id"))
    };
    items.iter().enumerate().map(id).collect()
}

fn messages(fields: &mut Fields) -> Result<Vec<Message>, ApiError> {
    const EXAMPLE: &str = r#"give at least one message, such as {"role": "user", "content": "Hello"}"#;
    let items = match fields.take("messages") {
        None => return Err(missing("messages", EXAMPLE)),
        Some(Value::Array(items)) => items,
        Some(other) => return Err(mistyped("messages", &other, "an array of messages")),
    };
    if items.is_empty() {
        return Err(ApiError::field("messages", format!("`messages` is empty: {EXAMPLE}")).code("empty_array"));
    }
    items.into_iter().enumerate().map(|(index, item)| message(item, &format!("messages[{index}]"))).collect()
}

fn message(item: Value, path: &str) -> Result<Message, ApiError> {
    const ROLES: &str = "one of system, developer, user, assistant, tool";
    let mut fields = Fields::nested(item, path)?;
    let role = fields.string("role")?.ok_or_else(|| missing(&fields.path("role"), ROLES))?;
    let role = match role.as_str() {
        // `developer` is the newer name of the role, and templates do not know it.
        "developer" => "system",
        "system" | "user" | "assistant" | "tool" => role.as_str(),
        other => return Err(outside(&fields.path("role"), format_args!("\"{other}\""), ROLES)),
    };
    fields.unsupported("tool_calls", is_empty)?;
    fields.unsupported("function_call", |_| false)?;
    fields.unsupported("audio", |_| false)?;
    // Labels, such as the call that a tool's answer belongs to, or the name of the speaker.
    fields.ignore(&["name", "tool_call_id", "refusal", "annotations"]);
    let content_path = fields.path("content");
    let content = fields.take("content").ok_or_else(|| missing(&content_path, "give the message's text"))?;
    let content = content_text(content, &content_path)?;
    fields.finish()?;
    Ok(Message::new(role, content))
}

/// A message's text: a string, or text parts joined without a separator.
fn content_text(content: Value, path: &str) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) if !parts.is_empty() => parts,
        Value::Array(_) => {
            return Err(outside(path, "an empty array", "a string or an array of text parts"));
        }
        other => return Err(mistyped(path, &other, "a string or an array of text parts")),
    };
    let mut text = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{index}]");
        let mut part = Fields::nested(part, &path)?;
        let kind = part.string("type")?.ok_or_else(|| missing(&part.path("type"), "text"))?;
        if kind != "text" {
            let path = part.path("type");
            let kind = quote(&Value::String(kind));
            let message = format!("`{path}` is {kind}, but models here read text only: send parts of type text");
            return Err(ApiError::unsupported(path, message));
        }
        let piece = part.string("text")?.ok_or_else(|| missing(&part.path("text"), "give the part's text"))?;
        text.push_str(&piece);
        part.finish()?;
    }
    Ok(text)
}

/// An empty list or object asks for nothing.
fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(serde_json::Map::is_empty)
}
