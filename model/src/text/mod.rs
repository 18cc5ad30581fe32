//! Text in and out of a model: tokenizer, chat template, sampling, and the text of one sequence.
//!
//! Nothing here knows tensors or engines; logits come in as plain values.

pub mod chat;
pub mod model;
pub mod sampling;
pub mod sequence;
pub mod tokenizer;
