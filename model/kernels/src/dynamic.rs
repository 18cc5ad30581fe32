//! The object-safe form of [`Kernels`].
//!
//! Owns [`DynKernels`], which every [`Kernels`] implements, and the handles it takes and gives: tensors and weights of a
//! device whose type is erased. The invariant: a handle is used only with the kernels that made it; a handle of another
//! device is a bug and panics. An operation costs one virtual call and one allocation more than the typed one, against
//! kernels of microseconds and more.

use std::{any::Any, sync::Arc};

use coel_weights::{
    matrix::{DType, Matrix},
    slices::{BLOCK_ROWS, GROUP, NIBBLES, Sliced, Weight, constants::Constants},
};

use crate::{
    ExpertWork, Gated, Kernels, Rows,
    angles::Angles,
    kv::{CacheShape, Span},
};

const OTHER_DEVICE: &str = "a handle is used only with the kernels that made it";

/// Rows of f32 on a device, `[n, width]`. Cloning copies no values.
#[derive(Clone)]
pub struct DeviceRows {
    dims: [usize; 2],
    tensor: Arc<dyn Any + Send + Sync>,
}

/// A packed weight matrix on a device.
pub struct DeviceMatrix(Box<dyn Any + Send>);

/// A small vector on a device.
pub struct DeviceVector(Box<dyn Any + Send>);

/// The three matrices of a gated block on a device.
pub struct DeviceExpert(Box<dyn Any + Send>);

/// The KV cache on a device.
pub struct DeviceCache(Box<dyn Any + Send>);

/// An expert, and the rows of a batch it is to compute.
#[derive(Clone, Copy)]
pub struct DeviceWork<'a> {
    pub expert: &'a DeviceExpert,
    pub rows: &'a [u32],
}

impl DeviceRows {
    fn of<K: Kernels>(tensor: Rows<K>) -> Self {
        Self { dims: tensor.dims(), tensor: Arc::new(tensor) }
    }

    /// `[n, width]`
    pub fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn as_tensor<K: Kernels>(&self) -> &Rows<K> {
        self.tensor.downcast_ref().expect(OTHER_DEVICE)
    }

    /// The tensor itself where this is its only handle, so that an operation may work in place.
    fn into_tensor<K: Kernels>(self) -> Rows<K> {
        let tensor: Arc<Rows<K>> = self.tensor.downcast().expect(OTHER_DEVICE);
        Arc::unwrap_or_clone(tensor)
    }
}

impl DeviceMatrix {
    fn get<K: Kernels>(&self) -> &K::Matrix {
        self.0.downcast_ref().expect(OTHER_DEVICE)
    }
}

impl DeviceVector {
    fn get<K: Kernels>(&self) -> &K::Vector {
        self.0.downcast_ref().expect(OTHER_DEVICE)
    }
}

impl DeviceExpert {
    fn get<K: Kernels>(&self) -> &Gated<K::Matrix> {
        self.0.downcast_ref().expect(OTHER_DEVICE)
    }
}

impl DeviceCache {
    fn get<K: Kernels>(&self) -> &K::Cache {
        self.0.downcast_ref().expect(OTHER_DEVICE)
    }

    fn get_mut<K: Kernels>(&mut self) -> &mut K::Cache {
        self.0.downcast_mut().expect(OTHER_DEVICE)
    }
}

/// The operations of a decoder layer on some device. Shapes are checked by the caller, who owns the model. See
/// [`Kernels`] for what each operation means.
pub trait DynKernels: Send {
    /// The kernel class as a usage record names it: replicas of one class give equal bits.
    fn class(&self) -> String;

    /// Brings a packed matrix to the device (in place where that is this memory).
    fn matrix(&self, weight: Weight) -> DeviceMatrix;

    /// Brings the matrices of a gated block to the device.
    fn expert(&self, weights: Gated<Weight>) -> DeviceExpert;

    /// The matrices in host memory again, bit for bit what [`expert`](Self::expert) was given.
    fn expert_weights(&self, expert: &DeviceExpert) -> Gated<Weight>;

    /// Bytes that a gated block takes on the device.
    fn expert_bytes(&self, weights: &Gated<Weight>) -> u64;

    /// Reserves so many bytes of the device's memory for matrices to come.
    fn reserve(&self, bytes: u64);

    /// Returns when the device has done all queued work.
    fn wait(&self);

    fn vector(&self, values: Vec<f32>) -> DeviceVector;

    /// `values` as `[values.len() / width, width]`.
    fn upload(&self, values: Vec<f32>, width: usize) -> DeviceRows;

    /// The values of `rows`, row-major; waits for the device.
    fn download(&self, rows: DeviceRows) -> Vec<f32>;

    /// `a + b`, elementwise.
    fn add(&self, a: DeviceRows, b: DeviceRows) -> DeviceRows;

    /// Every value into `-limit..=limit`.
    fn clamp(&self, rows: DeviceRows, limit: f32) -> DeviceRows;

    /// The row ranges `(first, count)` of `rows`, concatenated; at least one.
    fn select(&self, rows: &DeviceRows, ranges: &[(usize, usize)]) -> DeviceRows;

    /// For each matrix, with its bias, `x [n, in] -> [n, out]`.
    fn linears(&mut self, x: &DeviceRows, matrices: &[(&DeviceMatrix, Option<&DeviceVector>)]) -> Vec<DeviceRows>;

    /// `x [n, in] -> [n, out]`.
    fn linear(&mut self, x: &DeviceRows, matrix: &DeviceMatrix, bias: Option<&DeviceVector>) -> DeviceRows {
        self.linears(x, &[(matrix, bias)]).pop().expect("one output for each matrix")
    }

    /// Norm of each run of `width` values of a row, `width` being the weight's: `x [n, d] -> [n, d]`.
    fn rms_norm(&mut self, x: &DeviceRows, weight: &DeviceVector, eps: f32) -> DeviceRows;

    /// Rotary embedding of `x [n, heads * head_dim]`; `angles` has one position per row.
    fn rotate(&mut self, x: DeviceRows, angles: &Angles) -> DeviceRows;

    /// An empty cache, all of its memory reserved.
    fn cache(&self, shape: CacheShape) -> DeviceCache;

    /// Stores `k`, `v` `[n, kv_heads * head_dim]`, the rows of `spans`.
    fn append(&mut self, cache: &mut DeviceCache, layer: usize, spans: &[Span<'_>], k: DeviceRows, v: DeviceRows);

    /// Causal attention of `q [n, heads * head_dim]`, the rows of `spans`, each over the stored positions of its session.
    fn attention(&mut self, q: DeviceRows, cache: &DeviceCache, layer: usize, spans: &[Span<'_>]) -> DeviceRows;

    /// Each expert over its rows of `x [n, d]`: `[sum of rows, d]`, in order of work, then rows; at least one row in all.
    fn experts(&mut self, x: &DeviceRows, work: &[DeviceWork<'_>]) -> DeviceRows;

    /// Whether a small computation with a matrix of either kind gives the right result. A device is checked before it gets a
    /// model, and after it has failed.
    fn works(&mut self) -> bool {
        // Every high nibble is 3, the scale 2, the zero point -0.25: a weight is 2 * (16 * 3 + 7.5 + 0.25).
        let constants = [Constants::new(Constants::scale_code(2.0), 7).0.to_le_bytes(); BLOCK_ROWS];
        let cell = [&[0x33; NIBBLES][..], constants.as_flattened()].concat();
        let sliced = Sliced::new(BLOCK_ROWS, GROUP, cell.into(), None).expect("one cell");
        let ones = f32::to_le_bytes(1.0).repeat(BLOCK_ROWS * GROUP);
        let exact = Matrix::new(ones.into(), DType::F32, BLOCK_ROWS, GROUP).expect("whole rows");
        let matrices = [Weight::Sliced(sliced), Weight::Exact(exact)].map(|weight| self.matrix(weight));
        // int8 holds these values exactly: the largest magnitude is 127.
        let x = self.upload([127.0, -2.0].repeat(GROUP / 2), GROUP);
        let sum = 125.0 * (GROUP / 2) as f32;
        let outputs = self.linears(&x, &[(&matrices[0], None), (&matrices[1], None)]);
        let outputs: Vec<_> = outputs.into_iter().map(|output| self.download(output)).collect();
        outputs.iter().zip([sum * 111.5, sum]).all(|(output, expected)| output[..] == [expected; BLOCK_ROWS])
    }
}

impl<K: Kernels> DynKernels for K {
    fn class(&self) -> String {
        Kernels::class(self)
    }

    fn matrix(&self, weight: Weight) -> DeviceMatrix {
        DeviceMatrix(Box::new(Kernels::matrix(self, weight)))
    }

    fn expert(&self, weights: Gated<Weight>) -> DeviceExpert {
        DeviceExpert(Box::new(weights.map(|weight| Kernels::matrix(self, weight.clone()))))
    }

    fn expert_weights(&self, expert: &DeviceExpert) -> Gated<Weight> {
        expert.get::<K>().map(|matrix| self.weight(matrix))
    }

    fn expert_bytes(&self, weights: &Gated<Weight>) -> u64 {
        weights.each().map(|weight| self.bytes(weight)).iter().sum()
    }

    fn reserve(&self, bytes: u64) {
        Kernels::reserve(self, bytes);
    }

    fn wait(&self) {
        Kernels::wait(self);
    }

    fn vector(&self, values: Vec<f32>) -> DeviceVector {
        DeviceVector(Box::new(Kernels::vector(self, values)))
    }

    fn upload(&self, values: Vec<f32>, width: usize) -> DeviceRows {
        DeviceRows::of::<K>(Kernels::upload(self, values, width))
    }

    fn download(&self, rows: DeviceRows) -> Vec<f32> {
        Kernels::download(self, rows.into_tensor::<K>())
    }

    fn add(&self, a: DeviceRows, b: DeviceRows) -> DeviceRows {
        DeviceRows::of::<K>(Kernels::add(self, a.into_tensor::<K>(), b.into_tensor::<K>()))
    }

    fn clamp(&self, rows: DeviceRows, limit: f32) -> DeviceRows {
        DeviceRows::of::<K>(Kernels::clamp(self, rows.into_tensor::<K>(), limit))
    }

    fn select(&self, rows: &DeviceRows, ranges: &[(usize, usize)]) -> DeviceRows {
        DeviceRows::of::<K>(Kernels::select(self, rows.as_tensor::<K>(), ranges))
    }

    fn linears(&mut self, x: &DeviceRows, matrices: &[(&DeviceMatrix, Option<&DeviceVector>)]) -> Vec<DeviceRows> {
        let matrices: Vec<_> =
            matrices.iter().map(|(matrix, bias)| (matrix.get::<K>(), bias.map(DeviceVector::get::<K>))).collect();
        Kernels::linears(self, x.as_tensor::<K>(), &matrices).into_iter().map(DeviceRows::of::<K>).collect()
    }

    fn rms_norm(&mut self, x: &DeviceRows, weight: &DeviceVector, eps: f32) -> DeviceRows {
        DeviceRows::of::<K>(Kernels::rms_norm(self, x.as_tensor::<K>(), weight.get::<K>(), eps))
    }

    fn rotate(&mut self, x: DeviceRows, angles: &Angles) -> DeviceRows {
        DeviceRows::of::<K>(Kernels::rotate(self, x.into_tensor::<K>(), angles))
    }

    fn cache(&self, shape: CacheShape) -> DeviceCache {
        DeviceCache(Box::new(Kernels::cache(self, shape)))
    }

    fn append(&mut self, cache: &mut DeviceCache, layer: usize, spans: &[Span<'_>], k: DeviceRows, v: DeviceRows) {
        Kernels::append(self, cache.get_mut::<K>(), layer, spans, k.into_tensor::<K>(), v.into_tensor::<K>());
    }

    fn attention(&mut self, q: DeviceRows, cache: &DeviceCache, layer: usize, spans: &[Span<'_>]) -> DeviceRows {
        DeviceRows::of::<K>(Kernels::attention(self, q.into_tensor::<K>(), cache.get::<K>(), layer, spans))
    }

    fn experts(&mut self, x: &DeviceRows, work: &[DeviceWork<'_>]) -> DeviceRows {
        let work: Vec<_> =
            work.iter().map(|work| ExpertWork { expert: work.expert.get::<K>(), rows: work.rows }).collect();
        DeviceRows::of::<K>(Kernels::experts(self, x.as_tensor::<K>(), &work))
    }
}
