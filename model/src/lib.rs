//! Tokens, tensors, experts, precision: a Mixture-of-Experts decoder on one machine.
//!
//! | room | what it owns |
//! |---|---|
//! | [`weights`] (a crate) | what a model is on disk and in memory: configuration, tensors, precision slices |
//! | [`kernels`] (a crate) | the arithmetic of a layer on the CPU, and the boundary that every device implements |
//! | [`gpu`] (a crate) | the same arithmetic in CubeCL, for CUDA and Vulkan |
//! | [`nn`] | the network: trunk, router, and the way of a batch through the layers |
//! | [`offload`] | experts that do not fit where they are computed: on the CPU beside a GPU, and on disk |
//! | [`serve`] | an engine: the compute thread, sessions, batches, and experts for peers |
//! | [`budget`] | what a model takes, and what fits a memory budget |
//! | [`text`] | tokenizer, chat template, sampling, and a sequence's text |
//! | [`system`] | system calls: priority, memory of the machine and of this process |
//! | [`tools`] | a whole model on one machine: generate, evaluate, measure, survey, synthesise |
//!
//! Arrows: `tools` → `serve` → `offload` → `nn` → `gpu` → `kernels` → `weights`; `text` needs `weights` alone, and
//! `budget` also the size of a batch.
//!
//! Deliberately absent: networking, async runtimes, and any knowledge that an expert may be elsewhere.

pub use coel_gpu as gpu;
pub use coel_kernels as kernels;
pub use coel_weights as weights;

pub mod budget;
pub mod nn;
pub mod offload;
pub mod serve;
pub mod system;
pub mod text;
pub mod tools;
