//! What runs on the device: the kernels themselves, in CubeCL, one source for CUDA and Vulkan.
//!
//! Nothing here knows tensors, slabs' owners or launches; a kernel sees arrays of words, a table that says where things
//! lie, and numbers fixed when it is compiled. The arithmetic is that of the CPU kernels, operation for operation
//! (`activations`, `sliced`, `exact`, `cpu`, `math`), so where a device rounds as IEEE 754 says and fuses what is to be
//! fused, sums come out with the same bits. The invariant: what is written for a row depends on that row, and the order
//! in which it is added is fixed by the shape of a matrix or by positions, never by the batch or by who else runs.
//!
//! Kernels use 32-bit words only, integers and floats: no 8-bit or 16-bit types, no operations across a plane, no atomics.
//! Every Vulkan device has these.

// The language of kernels has fewer methods and constants than Rust.
#![allow(clippy::approx_constant, clippy::manual_div_ceil, clippy::manual_range_contains)]

pub(crate) mod attention;
pub(crate) mod exact;
pub(crate) mod memory;
pub(crate) mod numbers;
pub(crate) mod quantize;
pub(crate) mod rows;
pub(crate) mod sliced;

/// Words of a unit in the table of a product; see [`sliced`].
pub(crate) const UNIT: usize = 9;
/// In a unit's place for a bias: there is none.
pub(crate) const NO_BIAS: u32 = u32::MAX;
/// Most rows of a unit: those of a wide tile.
pub(crate) const TILE: usize = 8;
