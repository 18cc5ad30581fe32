//! The operations of a decoder layer, on which exactness and speed depend: one implementation per kernel class.
//!
//! [`Kernels`] lists the operations on tensors of a burn [`Backend`]: packed matrix times rows, norm, rotary embedding,
//! cached attention, gated feed-forward. [`cpu::CpuKernels`] implements them on `Flex` in plain
//! Rust; `coel-gpu` implements them in CubeCL for CUDA and Vulkan. [`DynKernels`] is the object-safe form: code that drives
//! a device is compiled once, not once per device.
//!
//! The invariant for every class: a row's result has the same bits alone and in any batch. Tensors are burn's; burn's own
//! operations on them are not used, since those of three backends took four fifths of the time to build the kernels.
//! Names of layers and sessions are not known here.

use burn::tensor::{Tensor, backend::Backend};
use coel_weights::slices::Weight;

pub use self::dynamic::{DeviceCache, DeviceExpert, DeviceMatrix, DeviceRows, DeviceVector, DeviceWork, DynKernels};
use self::{
    angles::Angles,
    kv::{CacheShape, Span},
};

pub mod angles;
pub mod cpu;
mod dynamic;
pub mod kv;
pub mod math;

/// Rows of f32, `[n, width]`, on a class's backend.
pub type Rows<K> = Tensor<<K as Kernels>::Backend, 2>;

/// The three matrices of a gated feed-forward block: `down(silu(gate(x)) * up(x))`.
#[derive(Clone, Debug)]
pub struct Gated<M> {
    pub gate: M,
    pub up: M,
    pub down: M,
}

impl<M> Gated<M> {
    pub fn each(&self) -> [&M; 3] {
        [&self.gate, &self.up, &self.down]
    }

    pub fn map<N>(&self, to: impl Fn(&M) -> N) -> Gated<N> {
        Gated { gate: to(&self.gate), up: to(&self.up), down: to(&self.down) }
    }
}

/// An expert, and the rows of a batch that it computes.
#[derive(Debug)]
pub struct ExpertWork<'a, M> {
    pub expert: &'a Gated<M>,
    pub rows: &'a [u32],
}

impl<M> Clone for ExpertWork<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for ExpertWork<'_, M> {}

/// The operations of a decoder layer on one device. Shapes are checked by the caller, who owns the model.
pub trait Kernels: Send + 'static {
    type Backend: Backend;
    /// A packed weight matrix of any precision, where this class computes with it.
    type Matrix: Send + 'static;
    /// A small f32 vector (norm weight, bias).
    type Vector: Send + 'static;
    /// Keys and values of all sessions, all layers, on pages.
    type Cache: Send + 'static;

    /// The kernel class as a usage record names it: replicas of one class give equal bits.
    fn class(&self) -> String;

    /// Brings a packed matrix to the device (in place where that is this memory).
    fn matrix(&self, weight: Weight) -> Self::Matrix;

    /// The matrix in host memory again, bit for bit what [`matrix`](Self::matrix) was given.
    fn weight(&self, matrix: &Self::Matrix) -> Weight;

    /// Bytes that a matrix takes on the device.
    fn bytes(&self, weight: &Weight) -> u64 {
        weight.bytes() as u64
    }

    /// Reserves so many bytes of the device's memory for matrices to come, so that they take no more than that.
    fn reserve(&self, _bytes: u64) {}

    /// Returns when the device has done all queued work.
    fn wait(&self) {}

    fn vector(&self, values: Vec<f32>) -> Self::Vector;

    /// `values` as `[values.len() / width, width]`.
    fn upload(&self, values: Vec<f32>, width: usize) -> Rows<Self>
    where
        Self: Sized;

    /// The values of `rows`, row-major; waits for the device.
    fn download(&self, rows: Rows<Self>) -> Vec<f32>
    where
        Self: Sized;

    /// `a + b`, elementwise.
    fn add(&self, a: Rows<Self>, b: Rows<Self>) -> Rows<Self>
    where
        Self: Sized;

    /// Every value into `-limit..=limit`.
    fn clamp(&self, rows: Rows<Self>, limit: f32) -> Rows<Self>
    where
        Self: Sized;

    /// The row ranges `(first, count)` of `rows`, concatenated; at least one.
    fn select(&self, rows: &Rows<Self>, ranges: &[(usize, usize)]) -> Rows<Self>
    where
        Self: Sized;

    /// For each matrix, with its bias, `x [n, in] -> [n, out]`.
    fn linears(&mut self, x: &Rows<Self>, matrices: &[(&Self::Matrix, Option<&Self::Vector>)]) -> Vec<Rows<Self>>
    where
        Self: Sized;

    /// `x [n, in] -> [n, out]`.
    fn linear(&mut self, x: &Rows<Self>, matrix: &Self::Matrix, bias: Option<&Self::Vector>) -> Rows<Self>
    where
        Self: Sized,
    {
        self.linears(x, &[(matrix, bias)]).pop().expect("one output for each matrix")
    }

    /// Norm of each run of `width` values of a row, `width` being the weight's: `x [n, d] -> [n, d]`.
    fn rms_norm(&mut self, x: &Rows<Self>, weight: &Self::Vector, eps: f32) -> Rows<Self>
    where
        Self: Sized;

    /// Rotary embedding of `x [n, heads * head_dim]`; `angles` has one position per row.
    fn rotate(&mut self, x: Rows<Self>, angles: &Angles) -> Rows<Self>
    where
        Self: Sized;

    /// An empty cache, all of its memory reserved.
    fn cache(&self, shape: CacheShape) -> Self::Cache;

    /// Stores `k`, `v` `[n, kv_heads * head_dim]`, the rows of `spans`.
    fn append(&mut self, cache: &mut Self::Cache, layer: usize, spans: &[Span<'_>], k: Rows<Self>, v: Rows<Self>)
    where
        Self: Sized;

    /// Causal attention of `q [n, heads * head_dim]`, the rows of `spans`, each over the stored positions of its own
    /// session up to itself.
    fn attention(&mut self, q: Rows<Self>, cache: &Self::Cache, layer: usize, spans: &[Span<'_>]) -> Rows<Self>
    where
        Self: Sized;

    /// Each expert over its rows of `x [n, d]`: `[sum of rows, d]`, in order of work, then rows. There is at least one
    /// row in all, and each is one of `x`.
    fn experts(&mut self, x: &Rows<Self>, work: &[ExpertWork<'_, Self::Matrix>]) -> Rows<Self>
    where
        Self: Sized;
}
