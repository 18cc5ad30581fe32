//! The class of GPUs: kernels of our own in CubeCL, over weights packed in device memory.
//!
//! Owns [`GpuKernels`], generic over CubeCL's runtime, so that CUDA and Vulkan run the same source (`device`). Tensors are burn's
//! on the same runtime, and always contiguous. A call queues its launches and does not wait: the host waits where it reads (router scores, expert outputs, logits), nowhere else. All experts of a
//! layer are four launches, whatever their number: rows to int8, gates and ups, activation, downs.
//!
//! The invariant is every class's: a row's bits are the same alone and in any batch. A kernel's order of additions is
//! the CPU's, so the sums of matrices have the CPU's bits wherever the device fuses a multiply-add that is asked to be fused.

use std::cell::RefCell;

use burn::tensor::{DType as BurnDType, Tensor, TensorPrimitive};
use burn_cubecl::{CubeBackend, CubeRuntime, tensor::CubeTensor};
use bytemuck::NoUninit;
use cubecl::{
    CubeCount, CubeDim,
    client::ComputeClient,
    cuda::{CudaDevice, CudaRuntime},
    prelude::ArrayArg,
    server::Handle,
    wgpu::WgpuRuntime,
};

use coel_kernels::{
    DynKernels, ExpertWork, Kernels,
    angles::Angles,
    kv::{CacheShape, Span},
};
use coel_weights::slices::{GROUP, Weight};

use crate::{
    THREADS,
    arena::Arena,
    cubes,
    device::{attention, exact, quantize, rows, sliced},
    kv_cache::{self, GpuCache},
    launches::{Job, launches},
    matrix::{self, Form, GpuMatrix, GpuVector},
    vulkan::Opened,
};

/// The backend whose tensors the kernels take.
pub type Backend<R> = CubeBackend<R, f32, i32, u32>;
type DeviceRows<R> = Tensor<Backend<R>, 2>;

/// On CUDA and on Vulkan.
pub type CudaKernels = GpuKernels<CudaRuntime>;
pub type VulkanKernels = GpuKernels<WgpuRuntime>;

/// What was sent to the device last, so that it is not sent again for the next layer.
#[derive(Debug)]
struct Sent<T> {
    what: T,
    handles: Vec<Handle>,
}

/// Rows as matrices read them.
#[derive(Default)]
struct Inputs {
    /// For exact matrices: the floats and how many.
    dense: Option<(Handle, usize)>,
    /// For sliced ones: multiplicands and scales of so many groups.
    quantized: Option<(Handle, Handle, usize)>,
}

/// The GPU kernels on one device.
pub struct GpuKernels<R: CubeRuntime> {
    device: R::Device,
    client: ComputeClient<R>,
    class: String,
    arena: RefCell<Arena<R>>,
    angles: Option<Sent<Vec<f32>>>,
    spans: Option<Sent<Vec<u32>>>,
}

impl CudaKernels {
    /// On the CUDA device of this number, which is there. Every CUDA device rounds alike.
    pub fn at(index: usize) -> Self {
        Self::new(CudaDevice::new(index), "cuda".into())
    }
}

impl VulkanKernels {
    /// On an open Vulkan device. What a driver rounds and fuses is its own, so its name is part of the class.
    pub fn on(opened: Opened) -> Self {
        Self::new(opened.device, format!("vulkan-{}", opened.name))
    }
}

/// The kernels on the CUDA device of this number, which is there. This crate compiles what a device needs, and no other does.
pub fn on_cuda(index: usize) -> Box<dyn DynKernels> {
    Box::new(CudaKernels::at(index))
}

/// The kernels on an open Vulkan device.
pub fn on_vulkan(opened: Opened) -> Box<dyn DynKernels> {
    Box::new(VulkanKernels::on(opened))
}

impl<R: CubeRuntime> GpuKernels<R> {
    /// `class` names what gives equal bits.
    fn new(device: R::Device, class: String) -> Self {
        let client = R::client(&device);
        let arena = RefCell::new(Arena::new(client.clone()));
        Self { device, client, class, arena, angles: None, spans: None }
    }

    fn floats(&self, n: usize) -> Handle {
        self.client.empty(4 * n.max(1))
    }

    fn send<T: NoUninit>(&self, values: &[T]) -> Handle {
        self.client.create_from_slice(bytemuck::cast_slice(values))
    }

    /// The rows' memory, row-major: every tensor here is made by [`Self::rows`].
    fn handle(&self, rows: &DeviceRows<R>) -> Handle {
        match rows.clone().into_primitive() {
            TensorPrimitive::Float(rows) => rows.handle,
            TensorPrimitive::QFloat(_) => unreachable!("rows are not quantized"),
        }
    }

    fn rows(&self, handle: Handle, n: usize, width: usize) -> DeviceRows<R> {
        let shape = [n, width].into();
        let rows = CubeTensor::new_contiguous(self.client.clone(), self.device.clone(), shape, handle, BurnDType::F32);
        Tensor::from_primitive(TensorPrimitive::Float(rows))
    }

    fn quantize(&self, x: &Handle, values: usize) -> (Handle, Handle, usize) {
        let groups = values / GROUP;
        let (pairs, scales) = (self.floats(groups * quantize::PAIRS), self.floats(2 * groups));
        // SAFETY: the kernel stays within so many groups.
        unsafe {
            quantize::quantize::launch_unchecked::<R>(
                &self.client,
                cubes(groups.div_ceil(quantize::GROUPS)),
                CubeDim::new_1d(quantize::THREADS as u32),
                ArrayArg::from_raw_parts(x.clone(), values),
                ArrayArg::from_raw_parts(pairs.clone(), groups * quantize::PAIRS),
                ArrayArg::from_raw_parts(scales.clone(), 2 * groups),
                groups as u32,
            );
        }
        (pairs, scales, groups)
    }

    /// Every job's outputs into `out`, of `floats` floats.
    fn multiply(&self, inputs: &Inputs, jobs: &[Job<'_>], out: &Handle, floats: usize) {
        for (kind, launch) in launches(jobs) {
            let arena = self.arena.borrow();
            let (slab, biases) = (arena.slab(kind.slab), arena.slab(kind.biases));
            let count = CubeCount::Static(launch.blocks as u32, launch.units as u32, 1);
            let plan = self.send(&launch.plan);
            // SAFETY: units were made of matrices that are in their slabs, of inputs and of `out`.
            unsafe {
                let plan = ArrayArg::from_raw_parts(plan, launch.plan.len());
                let out = ArrayArg::from_raw_parts(out.clone(), floats);
                match kind.form {
                    Form::Sliced { refined } => {
                        let (pairs, scales, groups) = inputs.quantized.clone().expect("rows of sliced matrices");
                        sliced::sliced::launch_unchecked::<R>(
                            &self.client,
                            count,
                            CubeDim::new_1d(sliced::THREADS as u32),
                            slab,
                            biases,
                            plan,
                            ArrayArg::from_raw_parts(pairs, groups * quantize::PAIRS),
                            ArrayArg::from_raw_parts(scales, 2 * groups),
                            out,
                            refined,
                            launch.tile,
                        );
                    }
                    Form::Exact(of) => {
                        let (x, values) = inputs.dense.clone().expect("rows of exact matrices");
                        exact::exact::launch_unchecked::<R>(
                            &self.client,
                            count,
                            CubeDim::new_1d(exact::THREADS as u32),
                            slab,
                            biases,
                            plan,
                            ArrayArg::from_raw_parts(x, values),
                            out,
                            of,
                            launch.tile,
                        );
                    }
                }
            }
        }
    }

    /// Rows `x [n, width]` as `matrices` read them.
    fn inputs<'m>(&self, x: Handle, values: usize, matrices: impl IntoIterator<Item = &'m GpuMatrix>) -> Inputs {
        let sliced = matrices.into_iter().any(GpuMatrix::is_sliced);
        let quantized = sliced.then(|| self.quantize(&x, values));
        Inputs { dense: Some((x, values)), quantized }
    }
}

impl<R: CubeRuntime> Kernels for GpuKernels<R> {
    type Backend = Backend<R>;
    type Matrix = GpuMatrix;
    type Vector = GpuVector;
    type Cache = GpuCache;

    fn class(&self) -> String {
        self.class.clone()
    }

    fn matrix(&self, weight: Weight) -> GpuMatrix {
        GpuMatrix::new(&mut self.arena.borrow_mut(), &weight)
    }

    fn weight(&self, matrix: &GpuMatrix) -> Weight {
        matrix.weight(&self.arena.borrow())
    }

    fn bytes(&self, weight: &Weight) -> u64 {
        self.arena.borrow().share(matrix::bytes(weight))
    }

    fn reserve(&self, bytes: u64) {
        self.arena.borrow_mut().reserve(bytes);
    }

    fn wait(&self) {
        self.arena.borrow_mut().wait();
    }

    fn vector(&self, values: Vec<f32>) -> GpuVector {
        GpuVector::new(&mut self.arena.borrow_mut(), &values)
    }

    fn upload(&self, values: Vec<f32>, width: usize) -> DeviceRows<R> {
        self.rows(self.send(&values), values.len() / width, width)
    }

    fn download(&self, rows: DeviceRows<R>) -> Vec<f32> {
        let bytes = self.client.read_one(self.handle(&rows)).expect("a device that computes can be read");
        bytemuck::pod_collect_to_vec(&bytes)
    }

    fn add(&self, a: DeviceRows<R>, b: DeviceRows<R>) -> DeviceRows<R> {
        let [n, width] = a.dims();
        assert_eq!(a.dims(), b.dims());
        let values = n * width;
        let out = self.floats(values);
        // SAFETY: the three are of so many values.
        unsafe {
            rows::add::launch_unchecked::<R>(
                &self.client,
                cubes(values.div_ceil(THREADS as usize)),
                CubeDim::new_1d(THREADS),
                ArrayArg::from_raw_parts(self.handle(&a), values),
                ArrayArg::from_raw_parts(self.handle(&b), values),
                ArrayArg::from_raw_parts(out.clone(), values),
                values as u32,
            );
        }
        self.rows(out, n, width)
    }

    fn clamp(&self, rows: DeviceRows<R>, limit: f32) -> DeviceRows<R> {
        let [n, width] = rows.dims();
        let values = n * width;
        let out = self.floats(values);
        // SAFETY: both are of so many values.
        unsafe {
            rows::clamped::launch_unchecked::<R>(
                &self.client,
                cubes(values.div_ceil(THREADS as usize)),
                CubeDim::new_1d(THREADS),
                ArrayArg::from_raw_parts(self.handle(&rows), values),
                ArrayArg::from_raw_parts(out.clone(), values),
                values as u32,
                limit,
            );
        }
        self.rows(out, n, width)
    }

    fn select(&self, rows: &DeviceRows<R>, ranges: &[(usize, usize)]) -> DeviceRows<R> {
        let [n, width] = rows.dims();
        let selected: Vec<u32> =
            ranges.iter().flat_map(|(first, count)| *first as u32..(first + count) as u32).collect();
        assert!(selected.iter().all(|row| (*row as usize) < n));
        let (values, out) = (selected.len() * width, self.floats(selected.len() * width));
        // SAFETY: every row selected is one of `rows`.
        unsafe {
            rows::select::launch_unchecked::<R>(
                &self.client,
                cubes(values.div_ceil(THREADS as usize)),
                CubeDim::new_1d(THREADS),
                ArrayArg::from_raw_parts(self.handle(rows), n * width),
                ArrayArg::from_raw_parts(self.send(&selected), selected.len()),
                ArrayArg::from_raw_parts(out.clone(), values),
                values as u32,
                width as u32,
            );
        }
        self.rows(out, selected.len(), width)
    }

    fn linears(&mut self, x: &DeviceRows<R>, matrices: &[(&GpuMatrix, Option<&GpuVector>)]) -> Vec<DeviceRows<R>> {
        let [n, width] = x.dims();
        let inputs = self.inputs(self.handle(x), n * width, matrices.iter().map(|(matrix, _)| *matrix));
        // Each output begins where a binding may.
        let aligned = (self.client.properties().memory.alignment as usize / 4).max(1);
        let mut floats = 0;
        let mut jobs = Vec::with_capacity(matrices.len());
        for (matrix, bias) in matrices {
            assert!(matrix.cols == width);
            let places = (0..n).map(|row| (row * matrix.unit_of_input()) as u32).collect();
            jobs.push(Job { matrix, bias: *bias, places, out: floats });
            floats = (floats + n * matrix.rows).next_multiple_of(aligned);
        }
        let out = self.floats(floats);
        self.multiply(&inputs, &jobs, &out, floats);
        let output = |job: &Job<'_>| {
            let end = job.out + n * job.matrix.rows;
            let handle = out.clone().offset_start(4 * job.out as u64).offset_end(4 * (floats - end) as u64);
            self.rows(handle, n, job.matrix.rows)
        };
        jobs.iter().map(output).collect()
    }

    fn rms_norm(&mut self, x: &DeviceRows<R>, weight: &GpuVector, eps: f32) -> DeviceRows<R> {
        let [n, d] = x.dims();
        let (x, out, width) = (self.handle(x), self.floats(n * d), weight.len);
        assert!(d.is_multiple_of(width));
        let runs = n * d / width;
        // SAFETY: runs are of the weight's width, which lies in its slab.
        unsafe {
            rows::rms_norm::launch_unchecked::<R>(
                &self.client,
                cubes(runs),
                CubeDim::new_1d(rows::THREADS as u32),
                ArrayArg::from_raw_parts(x, n * d),
                self.arena.borrow().slab(weight.place.slab()),
                ArrayArg::from_raw_parts(out.clone(), n * d),
                weight.place.at(),
                runs as u32,
                width as u32,
                eps,
            );
        }
        self.rows(out, n, d)
    }

    fn rotate(&mut self, x: DeviceRows<R>, angles: &Angles) -> DeviceRows<R> {
        let [n, width] = x.dims();
        let half = angles.half();
        if self.angles.as_ref().is_none_or(|sent| sent.what != angles.cos()) {
            let handles = vec![self.send(angles.cos()), self.send(angles.sin())];
            self.angles = Some(Sent { what: angles.cos().to_vec(), handles });
        }
        let sent = self.angles.as_ref().expect("sent just now");
        let (x, out) = (self.handle(&x), self.floats(n * width));
        // SAFETY: there are angles for each row.
        unsafe {
            rows::rotate::launch_unchecked::<R>(
                &self.client,
                cubes((n * width / 2).div_ceil(THREADS as usize)),
                CubeDim::new_1d(THREADS),
                ArrayArg::from_raw_parts(x, n * width),
                ArrayArg::from_raw_parts(sent.handles[0].clone(), n * half),
                ArrayArg::from_raw_parts(sent.handles[1].clone(), n * half),
                ArrayArg::from_raw_parts(out.clone(), n * width),
                n as u32,
                (width / (2 * half)) as u32,
                half as u32,
            );
        }
        self.rows(out, n, width)
    }

    fn cache(&self, shape: CacheShape) -> GpuCache {
        GpuCache::new(&self.client, shape)
    }

    fn append(&mut self, cache: &mut GpuCache, layer: usize, spans: &[Span<'_>], k: DeviceRows<R>, v: DeviceRows<R>) {
        let n = k.dims()[0];
        let (k, v) = (self.handle(&k), self.handle(&v));
        let (spans, words) = self.spans(spans);
        cache.append(&self.client, layer, (k, v), n, (spans, words));
    }

    fn attention(&mut self, q: DeviceRows<R>, cache: &GpuCache, layer: usize, spans: &[Span<'_>]) -> DeviceRows<R> {
        let [n, width] = q.dims();
        let most = spans.iter().map(|span| span.past + span.rows).max().unwrap_or(0);
        let (q, out) = (self.handle(&q), self.floats(n * width));
        let (spans, words) = self.spans(spans);
        cache.attend(&self.client, layer, (q, out.clone()), n, most.div_ceil(attention::RUN), (spans, words));
        self.rows(out, n, width)
    }

    fn experts(&mut self, x: &DeviceRows<R>, work: &[ExpertWork<'_, GpuMatrix>]) -> DeviceRows<R> {
        let [n, d] = x.dims();
        let matrices = work.iter().flat_map(|work| [&work.expert.gate, &work.expert.up]);
        let inputs = self.inputs(self.handle(x), n * d, matrices);
        let (mut floats, mut out, mut firsts) = (0, 0, Vec::with_capacity(work.len()));
        for ExpertWork { expert, rows } in work {
            assert!(expert.gate.cols == d && expert.up.cols == d && expert.down.rows == d);
            assert!(expert.up.rows == expert.gate.rows && expert.down.cols == expert.gate.rows);
            firsts.push((floats, out));
            // Groups of one expert's rows are no other's.
            floats = (floats + rows.len() * expert.gate.rows).next_multiple_of(GROUP);
            out += rows.len() * d;
        }
        let gates_ups = self.floats(2 * floats);
        let mut jobs = Vec::with_capacity(2 * work.len());
        for (ExpertWork { expert, rows }, (first, _)) in work.iter().zip(&firsts) {
            for (matrix, out) in [(&expert.gate, *first), (&expert.up, floats + *first)] {
                let places = rows.iter().map(|row| row * matrix.unit_of_input() as u32).collect();
                jobs.push(Job { matrix, bias: None, places, out });
            }
        }
        self.multiply(&inputs, &jobs, &gates_ups, 2 * floats);

        let hidden = self.activate(&gates_ups, floats, work.iter().map(|work| &work.expert.down));
        let jobs = work.iter().zip(&firsts).map(|(ExpertWork { expert, rows }, (first, out))| {
            let down = &expert.down;
            let first = if down.is_sliced() { first / GROUP } else { *first };
            let places = (0..rows.len()).map(|row| (first + row * down.unit_of_input()) as u32).collect();
            Job { matrix: down, bias: None, places, out: *out }
        });
        let (jobs, outputs) = (jobs.collect::<Vec<_>>(), self.floats(out));
        self.multiply(&hidden, &jobs, &outputs, out);
        self.rows(outputs, out / d, d)
    }
}

impl<R: CubeRuntime> GpuKernels<R> {
    /// `silu(gate) * up` of `floats` gates and as many ups, as `downs` read them.
    fn activate<'m>(
        &self,
        gates_ups: &Handle,
        floats: usize,
        downs: impl Iterator<Item = &'m GpuMatrix> + Clone,
    ) -> Inputs {
        let sliced = downs.clone().any(GpuMatrix::is_sliced);
        let exact = downs.clone().any(|down| !down.is_sliced());
        let groups = floats / GROUP;
        // A kernel's unused outputs are there, but small.
        let [values, pairs, scales] =
            [exact.then_some(floats), sliced.then_some(groups * quantize::PAIRS), sliced.then_some(2 * groups)]
                .map(|wanted| wanted.unwrap_or(1))
                .map(|n| (self.floats(n), n));
        // SAFETY: the kernel stays within so many groups, and writes what is wanted only.
        unsafe {
            let array = |(handle, n): &(Handle, usize)| ArrayArg::from_raw_parts(handle.clone(), *n);
            quantize::activate::launch_unchecked::<R>(
                &self.client,
                cubes(groups.div_ceil(quantize::GROUPS)),
                CubeDim::new_1d(quantize::THREADS as u32),
                ArrayArg::from_raw_parts(gates_ups.clone(), 2 * floats),
                array(&values),
                array(&pairs),
                array(&scales),
                groups as u32,
                exact,
                sliced,
            );
        }
        Inputs { dense: exact.then_some(values), quantized: sliced.then_some((pairs.0, scales.0, groups)) }
    }

    /// The table of `spans`, as `device::attention` reads it, and its words.
    fn spans(&mut self, spans: &[Span<'_>]) -> (Handle, usize) {
        let table = kv_cache::table(spans);
        if self.spans.as_ref().is_none_or(|sent| sent.what != table) {
            let handles = vec![self.send(&table)];
            self.spans = Some(Sent { what: table, handles });
        }
        let sent = self.spans.as_ref().expect("sent just now");
        (sent.handles[0].clone(), sent.what.len())
    }
}
