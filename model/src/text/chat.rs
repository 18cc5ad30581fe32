//! From a conversation to the one text the model was trained to answer: the checkpoint's Jinja chat template.
//!
//! Owns the template and the surroundings it was written for, which are those of Hugging Face transformers:
//! blocks trimmed, Python's string methods, `raise_exception`, JSON without HTML escapes, and the special
//! tokens by name. The invariant: the prompt depends on the template and the messages alone. Templates may
//! therefore not ask for the date (`strftime_now` is undefined, for which they have a fallback), or the same
//! question would get other tokens tomorrow, or on another node.
//!
//! A template is foreign code: it has no access to anything but the messages, and a budget of steps and
//! memory. It deliberately does not know tokens; the special tokens it writes are recognised by `tokenizer`.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, State, Value, context};
use serde::Deserialize;

use crate::text::tokenizer::NamedToken;

/// Steps a rendering may take; output and intermediate values count one step per 64 bytes. Long conversations
/// need some ten thousand, and the limit is reached in about a second.
const FUEL: u64 = 2_000_000;

/// How deep a value that a template writes as JSON may be nested: each level takes stack.
const JSON_DEPTH_MAX: usize = 64;

/// The template's name in errors.
const NAME: &str = "chat_template";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`; what else is possible, and in which order, is the template's to
    /// decide.
    pub role: String,
    pub content: String,
}

impl Message {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }
}

/// Why a conversation cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    #[error(
        "the model has no chat template: add the chat_template.jinja of its instruction-tuned version to the \
         model's folder, or ask for a completion of plain text instead of a chat"
    )]
    NoTemplate,
    #[error(
        "tokenizer_config.json has several chat templates and none is called `default`: {0}; \
         save the one to use as chat_template.jinja"
    )]
    NoDefault(String),
    #[error("{file} cannot be read: {reason}; copy the file again from the model's source")]
    Malformed { file: &'static str, reason: String },
    #[error("the list of messages is empty: send at least one")]
    NoMessages,
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    #[error("the model's chat template fails on these messages: {0}")]
    Failed(String),
}

impl ChatError {
    /// Whether other messages could be rendered: the fault is the request's, not the checkpoint's.
    pub fn is_callers_fault(&self) -> bool {
        matches!(self, Self::NoMessages | Self::Refused(_))
    }
}

/// A checkpoint's chat template, ready to render. A checkpoint without one is a base model and loads too;
/// only rendering is refused.
pub struct ChatTemplate {
    environment: Option<Environment<'static>>,
    /// `bos_token`, `eos_token` and so on, as far as the checkpoint names them.
    special_tokens: BTreeMap<&'static str, String>,
}

/// What is read here of `tokenizer_config.json`.
#[derive(Default, Deserialize)]
struct ConfigFile {
    chat_template: Option<ConfiguredTemplate>,
    bos_token: Option<NamedToken>,
    eos_token: Option<NamedToken>,
    pad_token: Option<NamedToken>,
    unk_token: Option<NamedToken>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ConfiguredTemplate {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl ConfiguredTemplate {
    fn into_default(self) -> Result<String, ChatError> {
        let mut named = match self {
            Self::One(template) => return Ok(template),
            Self::Named(named) => named,
        };
        let chosen = named.iter().position(|template| template.name == "default");
        match chosen {
            Some(index) => Ok(named.swap_remove(index).template),
            None if named.len() == 1 => Ok(named.swap_remove(0).template),
            None => {
                let names: Vec<_> = named.into_iter().map(|template| template.name).collect();
                Err(ChatError::NoDefault(names.join(", ")))
            }
        }
    }
}

impl ChatTemplate {
    /// From the contents of `chat_template.jinja` and `tokenizer_config.json`, as far as the checkpoint has
    /// them. The template of a file of its own wins. A template that does not compile is refused here, not at
    /// the first chat.
    pub fn from_files(jinja: Option<&[u8]>, tokenizer_config: Option<&[u8]>) -> Result<Self, ChatError> {
        let malformed = |file, reason: String| ChatError::Malformed { file, reason };
        let config: ConfigFile = match tokenizer_config {
            Some(json) => {
                serde_json::from_slice(json).map_err(|error| malformed("tokenizer_config.json", error.to_string()))?
            }
            None => ConfigFile::default(),
        };
        let (file, source) = match (jinja, config.chat_template) {
            (Some(jinja), _) => {
                let source =
                    std::str::from_utf8(jinja).map_err(|error| malformed("chat_template.jinja", error.to_string()))?;
                ("chat_template.jinja", Some(source.to_owned()))
            }
            (None, Some(configured)) => ("tokenizer_config.json", Some(configured.into_default()?)),
            (None, None) => ("chat_template.jinja", None),
        };
        let environment = source
            .map(environment)
            .transpose()
            .map_err(|error| malformed(file, format!("its chat template does not compile: {error}")))?;

        let special_tokens = [
            ("bos_token", config.bos_token),
            ("eos_token", config.eos_token),
            ("pad_token", config.pad_token),
            ("unk_token", config.unk_token),
        ];
        let special_tokens =
            special_tokens.into_iter().filter_map(|(name, token)| Some((name, token?.into_text()))).collect();
        Ok(Self { environment, special_tokens })
    }

    /// Whether there is a template: whether the model is one to chat with.
    pub fn is_present(&self) -> bool {
        self.environment.is_some()
    }

    /// The prompt for `messages`. `add_generation_prompt` ends it where the assistant's answer begins.
    ///
    /// Encode the result without the tokenizer's own special tokens: the template has written them.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        let environment = self.environment.as_ref().ok_or(ChatError::NoTemplate)?;
        if messages.is_empty() {
            return Err(ChatError::NoMessages);
        }
        let turn = |message: &Message| {
            context! { role => message.role.as_str(), content => message.content.as_str() }
        };
        let given = context! {
            messages => messages.iter().map(turn).collect::<Vec<_>>(),
            add_generation_prompt => add_generation_prompt,
            // Defined, as templates test them against none.
            tools => (),
            documents => (),
        };
        let special_tokens = Value::from(self.special_tokens.clone());
        let template = environment.get_template(NAME).map_err(failure)?;
        template.render(context! { ..given, ..special_tokens }).map_err(failure)
    }
}

/// The surroundings transformers gives a template, with `source` compiled in them.
fn environment(source: String) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_filter("tojson", python_json);
    environment.set_fuel(Some(FUEL));
    environment.add_template_owned(NAME, source)?;
    Ok(environment)
}

/// What a template said when it refused the messages itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Refusal(message)))
}

/// Tells the template's own refusal from a fault of the template, however deep in it either happened.
fn failure(error: Error) -> ChatError {
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(inner) = cause {
        if let Some(Refusal(message)) = inner.downcast_ref() {
            return ChatError::Refused(message.clone());
        }
        cause = inner.source();
    }
    ChatError::Failed(error.to_string())
}

/// `tojson` as Python's `json.dumps(value, ensure_ascii=False)` writes it: spaces after separators, and no
/// escapes for HTML, which models have not seen.
fn python_json(state: &State, value: &Value) -> Result<String, Error> {
    write_json(state, value, JSON_DEPTH_MAX)
}

fn write_json(state: &State, value: &Value, depth_left: usize) -> Result<String, Error> {
    // A few small lists, each twice in the next, make a value of any size.
    state.consume_fuel(1 + value.as_str().map_or(0, str::len) as u64 / 64)?;
    let depth_left = depth_left
        .checked_sub(1)
        .ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "the value is nested too deeply for JSON"))?;
    let list = |items: Vec<String>, open, close| format!("{open}{}{close}", items.join(", "));
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(if value.is_true() { "true" } else { "false" }.into()),
        ValueKind::Number => Ok(value.to_string()),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| write_json(state, &item, depth_left));
            Ok(list(items.collect::<Result<_, _>>()?, '[', ']'))
        }
        ValueKind::Map => {
            let items = value.try_iter()?.map(|key| {
                let item = write_json(state, &value.get_item(&key)?, depth_left)?;
                Ok(format!("{}: {item}", json_string(&key.to_string())?))
            });
            Ok(list(items.collect::<Result<_, Error>>()?, '{', '}'))
        }
        _ => json_string(&value.to_string()),
    }
}

fn json_string(text: &str) -> Result<String, Error> {
    serde_json::to_string(text).map_err(|error| Error::new(ErrorKind::BadSerialization, "not JSON").with_source(error))
}

#[cfg(test)]
mod tests;
