//! The GPU's kernels: CubeCL over weights packed in device memory, one source for CUDA and Vulkan.
//!
//! | room | what it owns |
//! |---|---|
//! | [`cuda`], [`vulkan`] | whether a device is there; opening one |
//! | [`kernels`] | [`GpuKernels`](kernels::GpuKernels), the implementation of `coel_kernels::Kernels` |
//! | `device` | the kernels themselves, in CubeCL |
//! | `arena`, `ranges`, `matrix`, `kv_cache` | device memory: slabs, the ranges in them, matrices, keys and values |
//! | `launches` | the tables that many matrices over many rows become |
//!
//! The invariant is every kernel class's: a row's bits are the same alone and in any batch. Nothing here knows layers or
//! sessions.

use cubecl::CubeCount;

mod arena;
#[cfg(target_os = "linux")]
pub mod cuda;
mod device;
pub mod kernels;
mod kv_cache;
mod launches;
pub mod matrix;
mod ranges;
pub mod vulkan;

/// CUDA elsewhere than on Linux.
#[cfg(not(target_os = "linux"))]
pub mod cuda {
    /// Always says that CUDA is used on Linux only.
    pub fn probe(_device: usize) -> Result<(), String> {
        Err("CUDA is used on Linux only".into())
    }
}

/// Cubes along the first axis of a launch that has more.
const CUBES_WIDE: usize = 32768;
/// Threads of a cube of elementwise kernels.
const THREADS: u32 = 256;

/// At least `n` cubes, which their kernel counts in a row.
fn cubes(n: usize) -> CubeCount {
    CubeCount::Static(n.clamp(1, CUBES_WIDE) as u32, n.div_ceil(CUBES_WIDE).max(1) as u32, 1)
}
