//! Tests of the model crate as its users see it, in one binary.

mod budgets;
mod checkpoints;
mod cpu_offload;
mod decoding;
mod disk_offload;
mod engines;
mod families;
mod folders;
mod gpu;
mod part_blobs;
mod slices;
mod survey;
mod synth;
#[path = "../../gpu/tests/it/vulkan_device.rs"]
mod vulkan_device;
mod whole;
