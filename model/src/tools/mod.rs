//! A whole model on one machine: generate, evaluate, measure, survey, synthesise.

pub mod bench;
pub mod eval;
pub mod generate;
pub mod local;
pub mod popularity;
pub mod survey;
pub mod synth;
