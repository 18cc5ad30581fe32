//! Tokens, tensors, experts, precision: a Mixture-of-Experts decoder on one machine.
//!
//! A checkpoint folder is opened in place ([`checkpoint`]), or cut into blobs that other machines store ([`parts`]).
//! An [`engine`] owns a device: one compute thread holds the trunk and some experts, serves sessions whose decoder
//! ([`decoder`]) asks for experts as plain values, and computes experts for whoever asks. Arithmetic whose order
//! matters is in [`kernels`], once per kernel class. Text goes in and out through [`tokenizer`], [`chat`],
//! [`sampling`] and [`sequence`]; [`generate`] and [`eval`] drive it all without any node.
//!
//! Deliberately absent: networking, async runtimes, and any knowledge that an expert may be elsewhere.

pub mod bench;
mod beneath;
mod block;
pub mod bytes;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod decoder;
pub mod device;
mod duties;
pub mod embedding;
pub mod engine;
pub mod eval;
pub mod experts;
mod flights;
pub mod folder;
pub mod footprint;
pub mod generate;
pub mod inventory;
pub mod kernels;
pub mod layout;
mod ledger;
pub mod local;
mod machine;
pub mod pages;
pub mod parts;
pub mod popularity;
pub mod rope;
pub mod router;
pub mod sampling;
pub mod scheduler;
pub mod sequence;
pub mod session;
pub mod sliced;
pub mod slices;
pub mod slicing;
pub mod source;
pub mod sums;
pub mod survey;
pub mod synth;
pub mod tensors;
pub mod text;
pub mod tiers;
pub mod tokenizer;
pub mod trunk;
mod worker;
