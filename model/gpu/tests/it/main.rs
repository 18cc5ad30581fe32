//! Tests of the GPU kernels, in one binary.

mod kernels;
#[path = "../../../kernels/tests/it/support.rs"]
mod support;
mod vulkan_device;
