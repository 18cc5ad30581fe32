//! Text out of a growing list of tokens, complete characters only.
//!
//! Owns the bytes of a character that has begun but not ended: never more than three. The invariant: what was
//! returned is never taken back, and all of it together equals the decoding of all tokens at once. It
//! deliberately does not know stop strings or the end of text; that is `sequence`.

use std::sync::Arc;

use super::Tokenizer;

/// Decodes one text token by token, in constant time for each.
#[derive(Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    stream: ByteStream,
}

impl Detokenizer {
    /// For tokens that begin a text: equal to [`Tokenizer::decode`].
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        let stream = ByteStream::start_of_text(&tokenizer);
        Self { tokenizer, stream }
    }

    /// For tokens that continue a prompt: a space that SentencePiece would drop at the start of a text is
    /// kept, so that prompt and answer can be put together.
    pub fn continuing(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, stream: ByteStream::default() }
    }

    /// The text that is certain once `token` is known: empty for a special token, and while a character is
    /// incomplete.
    pub fn push(&mut self, token: u32) -> String {
        self.stream.push(&self.tokenizer, token)
    }

    /// The rest when no token follows: U+FFFD where a character was left incomplete.
    pub fn finish(&mut self) -> String {
        self.stream.finish()
    }
}

/// The decoding itself, without the tokenizer whose tokens it is given.
#[derive(Debug, Clone, Default)]
pub(super) struct ByteStream {
    /// The start of a character, if the last token ended inside one.
    incomplete: Vec<u8>,
    /// Leading spaces still to be dropped; 0 once the text has begun.
    leading_spaces: usize,
}

impl ByteStream {
    pub(super) fn start_of_text(tokenizer: &Tokenizer) -> Self {
        Self { incomplete: Vec::new(), leading_spaces: tokenizer.leading_spaces }
    }

    pub(super) fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> String {
        if tokenizer.is_special(token) {
            return String::new();
        }
        let bytes = self.without_leading_spaces(tokenizer.token_bytes(token));
        self.incomplete.extend_from_slice(bytes);
        self.take_complete()
    }

    pub(super) fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.incomplete);
        String::from_utf8_lossy(&rest).into_owned()
    }

    fn without_leading_spaces<'a>(&mut self, mut bytes: &'a [u8]) -> &'a [u8] {
        while self.leading_spaces > 0 && !bytes.is_empty() {
            match bytes.strip_prefix(b" ") {
                Some(rest) => {
                    self.leading_spaces -= 1;
                    bytes = rest;
                }
                None => self.leading_spaces = 0,
            }
        }
        bytes
    }

    /// Everything up to an incomplete character at the end. Each longest sequence that can become no
    /// character is one U+FFFD, the rule of `String::from_utf8_lossy`, which therefore agrees wherever the
    /// tokens are cut.
    fn take_complete(&mut self) -> String {
        let bytes = std::mem::take(&mut self.incomplete);
        let mut text = String::with_capacity(bytes.len());
        let mut rest = bytes.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    return text;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    match error.error_len() {
                        Some(length) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &after[length..];
                        }
                        None => {
                            self.incomplete = after.to_vec();
                            return text;
                        }
                    }
                }
            }
        }
    }
}
