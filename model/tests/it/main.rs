//! Tests of the model crate as its users see it, in one binary.

mod beneath;
mod budgets;
mod checkpoints;
mod decoding;
mod engines;
mod families;
mod folders;
mod gpu;
mod part_blobs;
mod slices;
mod survey;
mod synth;
mod tiers;
mod whole;
