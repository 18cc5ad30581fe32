//! The portable class: burn's own operations on any backend, one row at a time.
//!
//! Owns [`Plain`]. Every operation sees shapes that depend on the model and the position only, never on the batch, so
//! a backend that is deterministic for one shape is exact here. Matrices stay in the checkpoint's type on the device
//! and are widened block by block while they are used; products are summed by reduction, not by a matrix multiply that
//! might round to a shorter type. It is honest and slow: kernels of the device's own replace it operation by operation.

use burn::tensor::{DType as BurnDType, FloatDType, Tensor, TensorData, activation, backend::Backend};

use super::{CacheShape, Gated, Kernels};
use crate::{
    bytes::{DType, Matrix},
    rope::Angles,
};

/// Output rows of a matrix widened at a time: bounds the scratch memory of one product.
const BLOCK_ROWS: usize = 4096;

/// Burn's operations on one device of backend `B`.
#[derive(Debug)]
pub struct Plain<B: Backend> {
    device: B::Device,
}

impl<B: Backend> Plain<B> {
    pub fn new(device: B::Device) -> Self {
        Self { device }
    }

    fn product(&self, x: &Tensor<B, 2>, matrix: &PlainMatrix<B>) -> Tensor<B, 2> {
        let [n, _] = x.dims();
        let [rows_out, _] = matrix.0.dims();
        let mut rows = vec![Vec::new(); n];
        for first in (0..rows_out).step_by(BLOCK_ROWS) {
            let last = (first + BLOCK_ROWS).min(rows_out);
            let block = matrix.0.clone().narrow(0, first, last - first).cast(FloatDType::F32);
            for (row, parts) in rows.iter_mut().enumerate() {
                let x = x.clone().narrow(0, row, 1);
                parts.push((block.clone() * x).sum_dim(1).reshape([1, last - first]));
            }
        }
        Tensor::cat(rows.into_iter().map(|parts| Tensor::cat(parts, 1)).collect(), 0)
    }
}

/// Applies `f` to each row of `x` as a `[1, width]` tensor.
fn each_row<B: Backend>(x: &Tensor<B, 2>, mut f: impl FnMut(usize, Tensor<B, 2>) -> Tensor<B, 2>) -> Tensor<B, 2> {
    let rows = (0..x.dims()[0]).map(|row| f(row, x.clone().narrow(0, row, 1))).collect();
    Tensor::cat(rows, 0)
}

/// A matrix on the device, in the checkpoint's type.
#[derive(Debug)]
pub struct PlainMatrix<B: Backend>(Tensor<B, 2>);

/// Keys and values `[kv_heads, capacity, head_dim]` of each layer. A slot is empty only while it is being written.
#[derive(Debug)]
pub struct PlainCache<B: Backend> {
    shape: CacheShape,
    layers: Vec<[Option<Tensor<B, 3>>; 2]>,
}

impl<B: Backend> PlainCache<B> {
    fn seen(&self, layer: usize, which: usize, seen: usize) -> Tensor<B, 4> {
        let CacheShape { kv_heads, head_dim, .. } = self.shape;
        let all = self.layers[layer][which].as_ref().expect("no write is under way").clone();
        all.slice([0..kv_heads, 0..seen, 0..head_dim]).reshape([kv_heads, 1, seen, head_dim])
    }
}

impl<B: Backend> Kernels for Plain<B> {
    type Backend = B;
    type Matrix = PlainMatrix<B>;
    type Vector = Tensor<B, 2>;
    type Cache = PlainCache<B>;

    fn class(&self) -> String {
        format!("plain-{}", B::name(&self.device))
    }

    fn matrix(&self, matrix: Matrix) -> PlainMatrix<B> {
        let dtype = match matrix.dtype() {
            DType::BF16 => BurnDType::BF16,
            DType::F16 => BurnDType::F16,
            DType::F32 => BurnDType::F32,
        };
        let data = TensorData::from_bytes_vec(matrix.bytes().to_vec(), [matrix.rows(), matrix.cols()], dtype);
        PlainMatrix(Tensor::from_data(data, (&self.device, dtype)))
    }

    fn vector(&self, values: Vec<f32>) -> Tensor<B, 2> {
        let width = values.len();
        self.upload(values, width)
    }

    fn upload(&self, values: Vec<f32>, width: usize) -> Tensor<B, 2> {
        let rows = values.len() / width;
        Tensor::from_data(TensorData::new(values, [rows, width]), (&self.device, BurnDType::F32))
    }

    fn linear(&mut self, x: &Tensor<B, 2>, matrix: &PlainMatrix<B>, bias: Option<&Tensor<B, 2>>) -> Tensor<B, 2> {
        let out = self.product(x, matrix);
        match bias {
            Some(bias) => out + bias.clone(),
            None => out,
        }
    }

    fn rms_norm(&mut self, x: &Tensor<B, 2>, weight: &Tensor<B, 2>, eps: f32) -> Tensor<B, 2> {
        each_row(x, |_, row| {
            let mean = (row.clone() * row.clone()).sum_dim(1) / x.dims()[1] as f32;
            row / (mean + eps).sqrt() * weight.clone()
        })
    }

    fn rotate(&mut self, x: Tensor<B, 2>, angles: &Angles) -> Tensor<B, 2> {
        let [n, width] = x.dims();
        let half = angles.half();
        let heads = width / (2 * half);
        let [cos, sin] =
            [angles.cos(), angles.sin()].map(|table| self.upload(table.to_vec(), half).reshape([n, 1, half]));
        let x = x.reshape([n, heads, 2 * half]);
        let first = x.clone().slice([0..n, 0..heads, 0..half]);
        let second = x.slice([0..n, 0..heads, half..2 * half]);
        let turned = vec![first.clone() * cos.clone() - second.clone() * sin.clone(), second * cos + first * sin];
        Tensor::cat(turned, 2).reshape([n, width])
    }

    fn cache(&self, shape: CacheShape) -> PlainCache<B> {
        let empty = || {
            let dims = [shape.kv_heads, shape.capacity, shape.head_dim];
            Some(Tensor::zeros(dims, (&self.device, BurnDType::F32)))
        };
        PlainCache { shape, layers: (0..shape.layers).map(|_| [empty(), empty()]).collect() }
    }

    fn append(&mut self, cache: &mut PlainCache<B>, layer: usize, past: usize, k: Tensor<B, 2>, v: Tensor<B, 2>) {
        let CacheShape { kv_heads, head_dim, .. } = cache.shape;
        let n = k.dims()[0];
        for (slot, rows) in cache.layers[layer].iter_mut().zip([k, v]) {
            let rows = rows.reshape([n, kv_heads, head_dim]).permute([1, 0, 2]);
            let stored = slot.take().expect("no write is under way");
            *slot = Some(stored.slice_assign([0..kv_heads, past..past + n, 0..head_dim], rows));
        }
    }

    fn attention(&mut self, q: Tensor<B, 2>, cache: &PlainCache<B>, layer: usize, past: usize) -> Tensor<B, 2> {
        let CacheShape { heads, kv_heads, head_dim, .. } = cache.shape;
        let scale = 1.0 / (head_dim as f32).sqrt();
        each_row(&q, |row, q| {
            let seen = past + row + 1;
            let q = q.reshape([kv_heads, heads / kv_heads, 1, head_dim]);
            let scores = (cache.seen(layer, 0, seen) * q).sum_dim(3) * scale;
            let weights = activation::softmax(scores, 2);
            (cache.seen(layer, 1, seen) * weights).sum_dim(2).reshape([1, heads * head_dim])
        })
    }

    fn swiglu(&mut self, x: &Tensor<B, 2>, expert: &Gated<PlainMatrix<B>>) -> Tensor<B, 2> {
        let gate = self.product(x, &expert.gate);
        let gate = each_row(&gate, |_, row| activation::silu(row));
        let up = self.product(x, &expert.up);
        self.product(&(gate * up), &expert.down)
    }
}
