//! A JSON object read field by field, so that every refusal names the field, its value and what is accepted.
//!
//! The invariant: after [`Fields::finish`], every field of the object was read, or is known to change nothing. A
//! misspelt or unknown field is refused, since a silently dropped parameter would silently change the answer. `null`
//! counts as absent, as OpenAI's clients intend.
//!
//! The module knows JSON and OpenAI's error shape, and nothing about chats.

use std::fmt::Display;

use serde_json::{Map, Value};

use super::error::ApiError;

/// Messages quote at most this many characters of a client's value.
const QUOTED_CHARS_MAX: usize = 60;

/// The fields of an object that are still to be read.
#[derive(Debug)]
pub(super) struct Fields {
    left: Map<String, Value>,
    /// The prefix of field names in messages: empty, or for example `messages[0].`.
    path: String,
}

impl Fields {
    /// Reads a request's body.
    ///
    /// # Errors
    /// 400: with line and column if the body is not JSON, or with the type of the value if it is not an object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let value = serde_json::from_slice(body)
            .map_err(|error| ApiError::request(format!("the request body is not valid JSON: {error}")))?;
        match value {
            Value::Object(left) => Ok(Self { left, path: String::new() }),
            other => Err(ApiError::request(format!("the request body must be a JSON object, but is {}", kind(&other)))),
        }
    }

    /// Reads an object that is nested in another one, at `path`.
    pub fn nested(value: Value, path: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(left) => Ok(Self { left, path: format!("{path}.") }),
            other => Err(mistyped(path, &other, "an object")),
        }
    }

    /// A field's name with the path to it.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// The field's raw value.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.left.remove(name).filter(|value| !value.is_null())
    }

    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        value.as_bool().map(Some).ok_or_else(|| mistyped(&self.path(name), &value, "true or false"))
    }

    pub fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(mistyped(&self.path(name), &other, "a string")),
        }
    }

    /// A number for which `inside` holds; `range` says the same in words.
    pub fn number(&mut self, name: &str, range: &str, inside: impl Fn(f64) -> bool) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let path = self.path(name);
        let number = value.as_f64().ok_or_else(|| mistyped(&path, &value, "a number"))?;
        if inside(number) { Ok(Some(number as f32)) } else { Err(outside(&path, &value, range)) }
    }

    /// A whole number from `min` to `max`, both included.
    pub fn integer(&mut self, name: &str, min: i64, max: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let path = self.path(name);
        if !value.is_number() {
            return Err(mistyped(&path, &value, "a whole number"));
        }
        let range = if max == i64::MAX {
            format!("a whole number, at least {min}")
        } else {
            format!("a whole number from {min} to {max}")
        };
        let inside = value.as_i64().filter(|number| (min..=max).contains(number));
        inside.map(Some).ok_or_else(|| outside(&path, &value, &range))
    }

    /// A field that this API knows but does not support. Values that ask for nothing (`harmless`) are accepted.
    pub fn unsupported(&mut self, name: &str, harmless: impl Fn(&Value) -> bool) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !harmless(&value) => {
                let path = self.path(name);
                let message = format!("`{path}` is not supported ({} was given): leave it out", quote(&value));
                Err(ApiError::unsupported(path, message))
            }
            _ => Ok(()),
        }
    }

    /// Drops fields that change nothing about the answer.
    pub fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.left.remove(*name);
        }
    }

    /// Refuses fields that were not read.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.left.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((name, _)) => {
                let path = self.path(&shorten(name));
                let message = format!("`{path}` is not a field of this request: check its spelling, or leave it out");
                Err(ApiError::field(path, message).code("unknown_parameter"))
            }
        }
    }
}

/// A field of the wrong JSON type.
pub(super) fn mistyped(path: &str, value: &Value, expected: &str) -> ApiError {
    let message = format!("`{path}` must be {expected}, but {} was given", kind(value));
    ApiError::field(path, message).code("invalid_type")
}

/// A field of the right type but out of its range.
pub(super) fn outside(path: &str, value: impl Display, range: &str) -> ApiError {
    ApiError::field(path, format!("`{path}` is {}, but must be {range}", shorten(&value.to_string())))
        .code("invalid_value")
}

/// A required field that is absent.
pub(super) fn missing(path: &str, what: &str) -> ApiError {
    ApiError::field(path, format!("`{path}` is required: {what}")).code("missing_required_parameter")
}

/// A value as JSON, shortened for a message.
pub(super) fn quote(value: &Value) -> String {
    shorten(&value.to_string())
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(QUOTED_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
