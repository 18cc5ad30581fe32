//! The CPU's kernels: plain Rust over packed weights in place, on several threads.
//!
//! Owns [`CpuKernels`], which takes and returns `Flex` tensors and only unwraps them. The loops are in the modules below,
//! each compiled for every instruction set ([`isa`]). The invariant: a row's bits depend neither on its batch nor on the
//! number of threads nor on the instruction set.

use burn::{
    backend::flex::{Flex, FlexDevice, FlexTensor},
    tensor::{Tensor, TensorData, TensorPrimitive},
};
use coel_weights::slices::Weight;

use self::{
    activations::Quantized,
    attention::attention,
    feed_forward::experts,
    isa::Isa,
    kv_cache::{CpuCache, Half},
    product::linears,
    threads::Pool,
};
use crate::{
    ExpertWork, Kernels,
    angles::Angles,
    kv::{CacheShape, Span},
};

pub mod activations;
pub mod attention;
pub mod exact;
mod feed_forward;
pub mod isa;
pub mod kv_cache;
mod lanes;
pub mod primitives;
mod product;
pub mod sliced;
pub mod threads;

/// The CPU kernels at one instruction set, on some threads.
#[derive(Debug)]
pub struct CpuKernels {
    isa: Isa,
    pool: Pool,
    /// Rows as int8, for sliced matrices; kept between calls.
    quantized: Quantized,
    /// The hidden rows of experts; kept between calls.
    hidden: feed_forward::Scratch,
    /// Each thread's buffers for attention; kept between calls.
    attention: Vec<attention::Scratch>,
}

impl CpuKernels {
    /// On `threads` threads, the caller's included; 0 means one for each core this process may use.
    pub fn new(isa: Isa, threads: usize) -> Self {
        let pool = Pool::new(threads);
        Self { isa, pool, quantized: Quantized::default(), hidden: Default::default(), attention: Vec::new() }
    }

    /// Threads in use, the caller's included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }
}

/// The machine's best instruction set, on the caller's thread alone.
impl Default for CpuKernels {
    fn default() -> Self {
        Self::new(Isa::best(), 1)
    }
}

type FlexRows = Tensor<Flex, 2>;

/// The tensor's memory, row-major: every tensor here is made by [`tensor`].
fn storage(rows: &FlexRows) -> FlexTensor {
    primitive(rows.clone())
}

fn primitive(rows: FlexRows) -> FlexTensor {
    match rows.into_primitive() {
        TensorPrimitive::Float(rows) => rows,
        TensorPrimitive::QFloat(_) => unreachable!("rows are not quantized"),
    }
}

/// The values, without a copy where this is the tensor's only handle.
fn values(rows: FlexRows) -> Vec<f32> {
    primitive(rows).into_data().into_vec().expect("rows are f32")
}

fn tensor(values: Vec<f32>, width: usize) -> FlexRows {
    let rows = values.len() / width;
    Tensor::from_data(TensorData::new(values, [rows, width]), &FlexDevice)
}

impl Kernels for CpuKernels {
    type Backend = Flex;
    type Matrix = Weight;
    type Vector = Vec<f32>;
    type Cache = CpuCache;

    fn class(&self) -> String {
        format!("cpu-{}", self.isa.name())
    }

    fn matrix(&self, weight: Weight) -> Weight {
        weight
    }

    fn weight(&self, matrix: &Weight) -> Weight {
        matrix.clone()
    }

    fn vector(&self, values: Vec<f32>) -> Vec<f32> {
        values
    }

    fn upload(&self, values: Vec<f32>, width: usize) -> FlexRows {
        tensor(values, width)
    }

    fn download(&self, rows: FlexRows) -> Vec<f32> {
        values(rows)
    }

    fn add(&self, a: FlexRows, b: FlexRows) -> FlexRows {
        let width = a.dims()[1];
        let (mut sum, b) = (values(a), storage(&b));
        let b: &[f32] = b.storage();
        assert_eq!(sum.len(), b.len());
        sum.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        tensor(sum, width)
    }

    fn clamp(&self, rows: FlexRows, limit: f32) -> FlexRows {
        let width = rows.dims()[1];
        let mut values = values(rows);
        values.iter_mut().for_each(|value| *value = value.clamp(-limit, limit));
        tensor(values, width)
    }

    fn select(&self, rows: &FlexRows, ranges: &[(usize, usize)]) -> FlexRows {
        let width = rows.dims()[1];
        let rows = storage(rows);
        let values: &[f32] = rows.storage();
        let each = ranges.iter().map(|(first, count)| &values[first * width..(first + count) * width]);
        tensor(each.collect::<Vec<_>>().concat(), width)
    }

    fn linears(&mut self, x: &FlexRows, matrices: &[(&Weight, Option<&Vec<f32>>)]) -> Vec<FlexRows> {
        let work: Vec<_> = matrices.iter().map(|(weight, bias)| (*weight, bias.map(Vec::as_slice))).collect();
        let outputs = linears(&mut self.pool, self.isa, &mut self.quantized, storage(x).storage(), &work);
        outputs.into_iter().zip(matrices).map(|(output, (weight, _))| tensor(output, weight.rows())).collect()
    }

    fn rms_norm(&mut self, x: &FlexRows, weight: &Vec<f32>, eps: f32) -> FlexRows {
        let width = x.dims()[1];
        let x = storage(x);
        let x: &[f32] = x.storage();
        let mut out = vec![0.0; x.len()];
        primitives::rms_norm(self.isa, x, weight, eps, &mut out);
        tensor(out, width)
    }

    fn rotate(&mut self, x: FlexRows, angles: &Angles) -> FlexRows {
        let width = x.dims()[1];
        let mut values = values(x);
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

    fn cache(&self, shape: CacheShape) -> CpuCache {
        CpuCache::new(shape)
    }

    fn append(&mut self, cache: &mut CpuCache, layer: usize, spans: &[Span<'_>], k: FlexRows, v: FlexRows) {
        for (half, rows) in [(Half::Keys, k), (Half::Values, v)] {
            cache.store(layer, half, spans, storage(&rows).storage());
        }
    }

    fn attention(&mut self, q: FlexRows, cache: &CpuCache, layer: usize, spans: &[Span<'_>]) -> FlexRows {
        let out = attention(&mut self.pool, self.isa, &mut self.attention, storage(&q).storage(), cache, layer, spans);
        tensor(out, q.dims()[1])
    }

    fn experts(&mut self, x: &FlexRows, work: &[ExpertWork<'_, Weight>]) -> FlexRows {
        let output = experts(&mut self.pool, self.isa, &mut self.hidden, storage(x).storage(), work);
        tensor(output, x.dims()[1])
    }
}
