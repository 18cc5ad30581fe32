//! Generation on one machine alone, without any node.
//!
//! Owns the loop that drives a sequence on a [`LocalModel`] to its end. It is synchronous: a command line's business, not
//! a server's. Whoever spreads experts over machines drives the same [`Sequence`] on an engine with a source of its own.

pub use crate::tools::local::{LocalError, LocalModel, LocalOptions};
use crate::{
    nn::batch::Want,
    serve::engine::block_on,
    text::{
        chat::Message,
        sequence::{Emitted, FinishReason, GenerateParams, Sequence, Usage},
    },
};

/// A finished answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    pub text: String,
    /// End-of-text included.
    pub tokens: Vec<u32>,
    pub finish: FinishReason,
    pub usage: Usage,
    /// Kernel classes that took part besides the engine's own: the CPU's, where it computes experts that a GPU does not hold.
    pub other_classes: Vec<String>,
}

impl LocalModel {
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
        let (mut text, mut other_classes) = (String::new(), Vec::new());
        let finish = loop {
            let advanced = block_on(session.advance(sequence.next_input(), Want::Last))?;
            other_classes.extend(advanced.classes);
            let emitted = sequence.accept(&advanced.logits)?;
            show(&emitted);
            text.push_str(&emitted.text);
            if let Some(finish) = emitted.finish {
                break finish;
            }
        };
        other_classes.sort();
        other_classes.dedup();
        let tokens = sequence.completion().to_vec();
        Ok(Generation { text, tokens, finish, usage: sequence.usage(), other_classes })
    }
}
