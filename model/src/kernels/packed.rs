//! The CPU class: `Flex` tensors in and out, packed weights in place, our own loops between.
//!
//! Owns [`Packed`] and its cache layout (`[kv_heads, capacity, head_dim]` per layer, so that the keys of a head lie in
//! a row). The invariant is `cpu`'s and `product`'s; this file only unwraps tensors.

use burn::{
    backend::flex::{Flex, FlexDevice, FlexTensor},
    tensor::{Tensor, TensorData},
};

use super::{
    CacheShape, ExpertWork, Kernels,
    activations::Quantized,
    cpu::{self, CachedLayer},
    download,
    feed_forward::{self, experts},
    isa::Isa,
    product::linears,
    threads::Pool,
};
use crate::{rope::Angles, slices::Weight};

/// The CPU kernels at one instruction set, on some threads.
#[derive(Debug)]
pub struct Packed {
    isa: Isa,
    pool: Pool,
    /// Rows as sliced matrices read them; kept between calls.
    quantized: Quantized,
    /// What lies between the halves of experts; kept between calls.
    hidden: feed_forward::Scratch,
    /// Attention scores of one head; kept between calls.
    scores: Vec<f32>,
}

impl Packed {
    /// On `threads` threads, the caller's included; 0 means one for each core this process may use.
    pub fn new(isa: Isa, threads: usize) -> Self {
        let pool = Pool::new(threads);
        Self { isa, pool, quantized: Quantized::default(), hidden: Default::default(), scores: Vec::new() }
    }

    /// Threads in use, the caller's included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }
}

/// The machine's best instruction set, on the caller's thread alone.
impl Default for Packed {
    fn default() -> Self {
        Self::new(Isa::best(), 1)
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
    type Matrix = Weight;
    type Vector = Vec<f32>;
    type Cache = PackedCache;

    fn class(&self) -> String {
        format!("cpu-{}", self.isa.name())
    }

    fn matrix(&self, weight: Weight) -> Weight {
        weight
    }

    fn vector(&self, values: Vec<f32>) -> Vec<f32> {
        values
    }

    fn upload(&self, values: Vec<f32>, width: usize) -> FlexRows {
        tensor(values, width)
    }

    fn linears(&mut self, x: &FlexRows, matrices: &[(&Weight, Option<&Vec<f32>>)]) -> Vec<FlexRows> {
        let work: Vec<_> = matrices.iter().map(|(weight, bias)| (*weight, bias.map(Vec::as_slice))).collect();
        let outputs = linears(&mut self.pool, self.isa, &mut self.quantized, storage(x).storage(), &work);
        outputs.into_iter().zip(matrices).map(|(output, (weight, _))| tensor(output, weight.rows())).collect()
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

    fn experts(&mut self, x: &FlexRows, work: &[ExpertWork<'_, Weight>]) -> FlexRows {
        let output = experts(&mut self.pool, self.isa, &mut self.hidden, storage(x).storage(), work);
        tensor(output, x.dims()[1])
    }
}
