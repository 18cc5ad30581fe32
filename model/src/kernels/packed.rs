//! The CPU class: `Flex` tensors in and out, packed weights in place, our own loops between.
//!
//! Owns [`Packed`] and its cache layout (`[kv_heads, capacity, head_dim]` per layer, so that the keys of a head lie in
//! a row). The invariant is `cpu`'s; this file only unwraps tensors and allocates outputs.

use burn::{
    backend::flex::{Flex, FlexDevice, FlexTensor},
    tensor::{Tensor, TensorData},
};

use super::{
    CacheShape, Gated, Kernels,
    cpu::{self, CachedLayer},
    download,
    isa::Isa,
};
use crate::{bytes::Matrix, rope::Angles};

/// The CPU kernels at one instruction set.
#[derive(Debug)]
pub struct Packed {
    isa: Isa,
    /// Widened weight rows; kept between calls.
    widened: Vec<f32>,
    /// Attention scores of one head; kept between calls.
    scores: Vec<f32>,
}

impl Packed {
    pub fn new(isa: Isa) -> Self {
        Self { isa, widened: Vec::new(), scores: Vec::new() }
    }

    fn linear_into(&mut self, x: &[f32], matrix: &Matrix, bias: Option<&[f32]>) -> Vec<f32> {
        let mut out = vec![0.0; x.len() / matrix.cols() * matrix.rows()];
        cpu::linear(self.isa, x, matrix, bias, &mut out, &mut self.widened);
        out
    }
}

impl Default for Packed {
    fn default() -> Self {
        Self::new(Isa::best())
    }
}

/// Keys and values of one session: for each layer, keys then values.
#[derive(Debug)]
pub struct PackedCache {
    shape: CacheShape,
    values: Vec<f32>,
}

impl PackedCache {
    fn half(&self) -> usize {
        self.shape.kv_heads * self.shape.capacity * self.shape.head_dim
    }

    fn store(&mut self, layer: usize, which: usize, past: usize, rows: &[f32]) {
        let (half, shape) = (self.half(), self.shape);
        let CacheShape { capacity, kv_heads, head_dim, .. } = shape;
        let area = &mut self.values[(2 * layer + which) * half..][..half];
        for (row, values) in rows.chunks_exact(kv_heads * head_dim).enumerate() {
            for (head, values) in values.chunks_exact(head_dim).enumerate() {
                let at = (head * capacity + past + row) * head_dim;
                area[at..at + head_dim].copy_from_slice(values);
            }
        }
    }
}

type FlexRows = Tensor<Flex, 2>;

/// The tensor's memory, row-major.
fn storage(rows: &FlexRows) -> FlexTensor {
    rows.clone().into_primitive().tensor().to_contiguous()
}

fn tensor(values: Vec<f32>, width: usize) -> FlexRows {
    let rows = values.len() / width;
    Tensor::from_data(TensorData::new(values, [rows, width]), &FlexDevice)
}

impl Kernels for Packed {
    type Backend = Flex;
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Cache = PackedCache;

    fn class(&self) -> String {
        format!("cpu-{}", self.isa.name())
    }

    fn matrix(&self, matrix: Matrix) -> Matrix {
        matrix
    }

    fn vector(&self, values: Vec<f32>) -> Vec<f32> {
        values
    }

    fn upload(&self, values: Vec<f32>, width: usize) -> FlexRows {
        tensor(values, width)
    }

    fn linear(&mut self, x: &FlexRows, matrix: &Matrix, bias: Option<&Vec<f32>>) -> FlexRows {
        let out = self.linear_into(storage(x).storage(), matrix, bias.map(Vec::as_slice));
        tensor(out, matrix.rows())
    }

    fn rms_norm(&mut self, x: &FlexRows, weight: &Vec<f32>, eps: f32) -> FlexRows {
        let x = storage(x);
        let x: &[f32] = x.storage();
        let mut out = vec![0.0; x.len()];
        cpu::rms_norm(self.isa, x, weight, eps, &mut out);
        tensor(out, weight.len())
    }

    fn rotate(&mut self, x: FlexRows, angles: &Angles) -> FlexRows {
        let width = x.dims()[1];
        let mut values = download(x);
        for (row, values) in values.chunks_exact_mut(width).enumerate() {
            let (cos, sin) = angles.row(row);
            for head in values.chunks_exact_mut(2 * cos.len()) {
                let (first, second) = head.split_at_mut(cos.len());
                for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
        tensor(values, width)
    }

    fn cache(&self, shape: CacheShape) -> PackedCache {
        let values = vec![0.0; 2 * shape.layers * shape.kv_heads * shape.capacity * shape.head_dim];
        PackedCache { shape, values }
    }

    fn append(&mut self, cache: &mut PackedCache, layer: usize, past: usize, k: FlexRows, v: FlexRows) {
        for (which, rows) in [k, v].iter().enumerate() {
            cache.store(layer, which, past, storage(rows).storage());
        }
    }

    fn attention(&mut self, q: FlexRows, cache: &PackedCache, layer: usize, past: usize) -> FlexRows {
        let (shape, half) = (cache.shape, cache.half());
        let (keys, values) = cache.values[2 * layer * half..][..2 * half].split_at(half);
        let cached = CachedLayer {
            keys,
            values,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            capacity: shape.capacity,
        };
        let q = storage(&q);
        let q: &[f32] = q.storage();
        let mut out = vec![0.0; q.len()];
        cpu::attention(self.isa, q, &cached, past, &mut out, &mut self.scores);
        tensor(out, shape.heads * shape.head_dim)
    }

    fn swiglu(&mut self, x: &FlexRows, expert: &Gated<Matrix>) -> FlexRows {
        let x = storage(x);
        let mut gate = self.linear_into(x.storage(), &expert.gate, None);
        let up = self.linear_into(x.storage(), &expert.up, None);
        cpu::silu_times(self.isa, &mut gate, &up);
        let out = self.linear_into(&gate, &expert.down, None);
        tensor(out, expert.down.rows())
    }
}
