//! What a model is on disk and in memory: configuration, tensors, precision slices.
//!
//! | room | what it owns |
//! |---|---|
//! | [`isa`] | the instruction sets of this machine |
//! | [`memory`] | weight bytes, mapped or owned; page-aligned buffers |
//! | [`matrix`] | element types and packed matrices |
//! | [`slices`] | the slice format: cells, constants, encoders, [`Weight`](slices::Weight) |
//! | [`config`], [`layout`] | `config.json`, and the tensors it implies |
//! | [`tensors`], [`checkpoint`], [`parts`] | safetensors bytes, checkpoint folders, and how they are cut into blobs |
//! | [`slicing`] | slices as files: written part by part, checked, read back |
//! | [`folder`] | a model folder, whichever form its weights have |
//!
//! Beside them: [`error`], why weights could not be loaded, and [`atomic_file`], files that appear whole or not at all.
//! Arrows point upwards in this table. Deliberately absent: arithmetic on weights, devices, and any knowledge of who
//! asks for weights.

pub mod atomic_file;
pub mod checkpoint;
pub mod config;
pub mod error;
pub mod folder;
pub mod isa;
pub mod layout;
pub mod matrix;
pub mod memory;
pub mod parts;
pub mod slices;
pub mod slicing;
pub mod tensors;
