//! What each token stands for: the `decoder` section of `tokenizer.json`, applied to one token at a time.
//!
//! Hugging Face describes decoding as steps over a list of strings. The steps read here either rewrite each
//! string by itself or cut spaces off the start of the whole text, so they can be applied to every token of
//! the vocabulary once, at load. Whatever looks at a token's neighbours (WordPiece, CTC) is refused by name
//! instead of being decoded almost right.
//!
//! It deliberately yields bytes and not text: a character may be spread over several tokens.

use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::Value;

use super::TokenizerError;

/// From a token's name in the vocabulary to the bytes it stands for.
#[derive(Debug)]
pub(super) struct TokenDecoder {
    steps: Vec<Step>,
    leading_spaces: usize,
}

/// A rewriting of one token by itself.
#[derive(Debug, PartialEq)]
enum Step {
    Replace {
        from: String,
        to: String,
    },
    /// `<0x0A>` stands for that byte.
    ByteFallback,
    /// Every character stands for one byte.
    ByteLevel,
}

/// The step of `tokenizer.json`, as far as it is understood.
#[derive(Deserialize)]
#[serde(tag = "type")]
enum Described {
    Sequence { decoders: Vec<Described> },
    Replace { pattern: Pattern, content: String },
    ByteFallback,
    ByteLevel,
    Metaspace { replacement: char, prepend_scheme: Option<String>, add_prefix_space: Option<bool> },
    Fuse,
    Strip { content: char, start: usize, stop: usize },
}

#[derive(Deserialize)]
enum Pattern {
    String(String),
    // Not applied; named so that the error can say what was found.
    Regex(String),
}

#[derive(Deserialize)]
struct File {
    decoder: Option<Value>,
}

impl TokenDecoder {
    pub(super) fn from_tokenizer_json(json: &[u8]) -> Result<Self, TokenizerError> {
        let file: File = serde_json::from_slice(json).map_err(|error| TokenizerError::Malformed(error.to_string()))?;
        let description = file.decoder.filter(|decoder| !decoder.is_null());
        let description = description.ok_or_else(|| TokenizerError::UnsupportedDecoder("there is none".into()))?;
        let described = Described::deserialize(&description)
            .map_err(|error| TokenizerError::UnsupportedDecoder(error.to_string()))?;
        let mut decoder = Self { steps: Vec::new(), leading_spaces: 0 };
        decoder.add(described)?;
        Ok(decoder)
    }

    fn add(&mut self, described: Described) -> Result<(), TokenizerError> {
        match described {
            Described::Sequence { decoders } => decoders.into_iter().try_for_each(|inner| self.add(inner))?,
            Described::Replace { pattern: Pattern::String(from), content: to } => {
                self.steps.push(Step::Replace { from, to });
            }
            Described::Replace { pattern: Pattern::Regex(regex), .. } => {
                let found = format!("it replaces the regular expression `{regex}`");
                return Err(TokenizerError::UnsupportedDecoder(found));
            }
            Described::ByteFallback => self.steps.push(Step::ByteFallback),
            Described::ByteLevel => self.steps.push(Step::ByteLevel),
            Described::Metaspace { replacement, prepend_scheme, add_prefix_space } => {
                self.steps.push(Step::Replace { from: replacement.into(), to: " ".into() });
                if prepend_scheme.as_deref() != Some("never") && add_prefix_space != Some(false) {
                    self.leading_spaces += 1;
                }
            }
            // Joins the strings, which is how bytes are put together anyway.
            Described::Fuse => {}
            Described::Strip { content: ' ', start, stop: 0 } => self.leading_spaces += start,
            Described::Strip { content, start, stop } => {
                let found = format!("it strips {start} and {stop} of {content:?} around the text");
                return Err(TokenizerError::UnsupportedDecoder(found));
            }
        }
        Ok(())
    }

    /// How many spaces at the start of a text were put there by the encoder.
    pub(super) fn leading_spaces(&self) -> usize {
        self.leading_spaces
    }

    /// The bytes that the token of this name stands for.
    pub(super) fn bytes(&self, name: &str) -> Vec<u8> {
        let mut text = name.to_owned();
        for step in &self.steps {
            match step {
                Step::Replace { from, to } => text = text.replace(from, to),
                Step::ByteFallback => {
                    if let Some(byte) = fallback_byte(&text) {
                        return vec![byte];
                    }
                }
                Step::ByteLevel => {
                    // A name with any character outside the alphabet is an added token, written as it is.
                    let bytes: Option<Vec<u8>> = text.chars().map(level_byte).collect();
                    return bytes.unwrap_or_else(|| text.into_bytes());
                }
            }
        }
        text.into_bytes()
    }
}

/// The byte of a name such as `<0x0A>`.
fn fallback_byte(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// GPT-2's alphabet gives every byte a visible character: printable ones (without the space) stand for
/// themselves, and the others, in order, for the characters from U+0100 on. This is the other way: the byte
/// of a character.
fn level_byte(character: char) -> Option<u8> {
    static SHIFTED: LazyLock<Vec<u8>> =
        LazyLock::new(|| (0..=u8::MAX).filter(|byte| !stands_for_itself(*byte)).collect());
    match u32::from(character) {
        code @ 0..=0xFF => u8::try_from(code).ok().filter(|byte| stands_for_itself(*byte)),
        code => SHIFTED.get((code - 0x100) as usize).copied(),
    }
}

fn stands_for_itself(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}
