//! Experts in host memory that are not on the GPU, computed by the CPU.
//!
//! Owns [`CpuOffload`], the driver: the weights in host memory of the experts that are not on the GPU, the CPU's
//! kernels, and the measured [costs](costs). It carries out what the [`DeviceCache`] decides. The invariant: an expert
//! that is held in memory for good is on the GPU or has its weights here, so it can be computed at once; and it does
//! not take both memories. Weights in a mapped file stay mapped, and their pages are released while the expert is on
//! the GPU. Weights in memory of this process are freed meanwhile, and read back from the GPU when the expert is
//! demoted. Weights of experts on disk belong to [`DiskOffload`](super::disk). Nothing here knows batches.
//!
//! Arrows: this driver → `device_cache` → [`costs`], [`Cache`](super::cache) → [`Score`](super::score).

use std::{collections::HashMap, time::Instant};

use coel_kernels::{
    DynKernels, ExpertWork, Gated, Kernels,
    cpu::{CpuKernels, isa::Isa},
};
use coel_weights::{
    layout::ExpertId,
    slices::{Precision, Weight},
};

use self::{
    costs::Costs,
    device_cache::{DeviceCache, Move},
};
use super::DeviceExperts;

mod costs;
mod device_cache;

pub(crate) use self::device_cache::{Need, Uses};

/// Where an expert's weights in host memory come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// A mapped file.
    File,
    /// Memory of this process.
    Memory,
    /// A buffer of the disk cache.
    Disk,
}

/// An expert that is held, on the GPU or not.
struct HostExpert {
    origin: Origin,
    precision: Precision,
    /// Nothing while they are not in host memory.
    weights: Option<Gated<Weight>>,
}

pub(crate) struct CpuOffload {
    cache: DeviceCache,
    experts: HashMap<ExpertId, HostExpert>,
    costs: Costs,
    /// Started at the first use.
    kernels: Option<CpuKernels>,
    threads: usize,
    promoted_bytes: u64,
    /// Bytes on the GPU of experts that are on disk.
    on_disk_bytes: u64,
}

impl CpuOffload {
    /// `capacity` bytes for experts on the GPU, and so many threads that compute on the CPU.
    pub(crate) fn new(capacity: u64, threads: usize) -> Self {
        Self {
            cache: DeviceCache::new(capacity),
            experts: HashMap::new(),
            costs: Costs::default(),
            kernels: None,
            threads,
            promoted_bytes: 0,
            on_disk_bytes: 0,
        }
    }

    /// The CPU's kernel class.
    pub(crate) fn class() -> String {
        format!("cpu-{}", Isa::best().name())
    }

    /// Bytes of the GPU's memory that experts may take.
    pub(crate) fn capacity(&self) -> u64 {
        self.cache.capacity()
    }

    /// Bytes of the experts that are on the GPU.
    pub(crate) fn device_bytes(&self) -> u64 {
        self.cache.used()
    }

    pub(crate) fn uses(&self) -> Uses {
        self.cache.uses()
    }

    /// Bytes of weights promoted so far.
    pub(crate) fn promoted_bytes(&self) -> u64 {
        self.promoted_bytes
    }

    /// Bytes on the GPU of experts that are on disk.
    pub(crate) fn on_disk_bytes(&self) -> u64 {
        self.on_disk_bytes
    }

    /// Lets go of the weights of an expert, which is dropped or replaced; whether it was held.
    fn detach(&mut self, id: ExpertId) -> bool {
        let Some(host) = self.experts.remove(&id) else { return false };
        if host.origin == Origin::Disk && self.cache.is_promoted(id) {
            self.on_disk_bytes -= self.cache.bytes(id);
        }
        true
    }

    pub(crate) fn precision(&self, id: ExpertId) -> Option<Precision> {
        self.experts.get(&id).map(|host| host.precision)
    }

    /// Whether any expert is not on the GPU.
    pub(crate) fn holds_any(&self) -> bool {
        self.experts.len() > self.cache.promoted_count()
    }

    /// The expert's weights, if they are in host memory.
    pub(crate) fn weights(&self, id: ExpertId) -> Option<&Gated<Weight>> {
        self.experts.get(&id)?.weights.as_ref()
    }

    /// Holds an expert in memory for good, on the GPU if there is space. It replaces another one of this id, whose copy
    /// on the GPU the caller has removed.
    pub(crate) fn add(
        &mut self,
        id: ExpertId,
        weights: Gated<Weight>,
        precision: Precision,
        kernels: &dyn DynKernels,
        on_device: &mut DeviceExperts,
    ) {
        let origin = if weights.each().into_iter().all(Weight::is_mapped) { Origin::File } else { Origin::Memory };
        self.detach(id);
        self.cache.add(id, kernels.expert_bytes(&weights));
        self.experts.insert(id, HostExpert { origin, precision, weights: Some(weights) });
        if self.cache.promote_if_free(id) {
            self.carry_out(vec![Move::Promote(id)], kernels, on_device);
        }
    }

    /// Promotes experts held for good into space that has become free on the GPU.
    pub(crate) fn fill(&mut self, kernels: &dyn DynKernels, on_device: &mut DeviceExperts) {
        let experts = &self.experts;
        let for_good = |id| experts.get(&id).is_some_and(|host: &HostExpert| host.origin != Origin::Disk);
        let moves = self.cache.fill(for_good);
        self.carry_out(moves, kernels, on_device);
    }

    /// Adds an expert that is on disk, with weights of the same shape and precision as `weights`. It replaces another
    /// one of this id, whose copy on the GPU the caller has removed.
    pub(crate) fn add_on_disk(
        &mut self,
        id: ExpertId,
        precision: Precision,
        weights: &Gated<Weight>,
        kernels: &dyn DynKernels,
    ) {
        self.detach(id);
        self.cache.add(id, kernels.expert_bytes(weights));
        self.experts.insert(id, HostExpert { origin: Origin::Disk, precision, weights: None });
    }

    /// An expert on disk was loaded into host memory, or evicted from it.
    pub(crate) fn set_weights(&mut self, id: ExpertId, weights: Option<Gated<Weight>>) {
        if let Some(host) = self.experts.get_mut(&id).filter(|host| host.origin == Origin::Disk) {
            host.weights = weights;
        }
    }

    /// Drops an expert, but for its copy on the GPU; whether it was held.
    pub(crate) fn remove(&mut self, id: ExpertId) -> bool {
        let held = self.detach(id);
        self.cache.remove(id);
        held
    }

    /// A batch begins.
    pub(crate) fn tick(&mut self) {
        self.cache.tick();
    }

    /// A layer needs these experts, each of which is on the GPU or in host memory. Promotes those that are worth it;
    /// whether there were any.
    pub(crate) fn need(&mut self, needs: &[Need], kernels: &dyn DynKernels, on_device: &mut DeviceExperts) -> bool {
        let moves = self.cache.need(needs, &self.costs);
        self.carry_out(moves, kernels, on_device)
    }

    /// These experts are predicted to be needed next, the likeliest first. Promotes those in host memory that are worth
    /// it; whether there were any.
    pub(crate) fn prefetch(
        &mut self,
        ids: &[ExpertId],
        kernels: &dyn DynKernels,
        on_device: &mut DeviceExperts,
    ) -> bool {
        let in_memory: Vec<ExpertId> = ids.iter().copied().filter(|id| self.weights(*id).is_some()).collect();
        let moves = self.cache.prefetch(&in_memory);
        self.carry_out(moves, kernels, on_device)
    }

    fn carry_out(&mut self, moves: Vec<Move>, kernels: &dyn DynKernels, on_device: &mut DeviceExperts) -> bool {
        let any = !moves.is_empty();
        for step in moves {
            let (Move::Demote(id) | Move::Promote(id)) = step;
            let Some(host) = self.experts.get_mut(&id) else { continue };
            match step {
                Move::Demote(_) => {
                    let Some((copy, _)) = on_device.remove(&id) else { continue };
                    match host.origin {
                        Origin::File => {}
                        Origin::Memory => host.weights = Some(kernels.expert_weights(&copy)),
                        Origin::Disk => self.on_disk_bytes -= self.cache.bytes(id),
                    }
                }
                Move::Promote(_) => {
                    let Some(weights) = &host.weights else { continue };
                    let bytes = weights.each().map(|weight| weight.bytes() as u64).iter().sum();
                    let since = self.costs.measures().then(|| {
                        kernels.wait();
                        Instant::now()
                    });
                    let copy = kernels.expert(weights.clone());
                    if let Some(since) = since {
                        kernels.wait();
                        self.costs.moved(bytes, since.elapsed().as_secs_f64());
                    }
                    on_device.insert(id, (copy, host.precision));
                    self.promoted_bytes += bytes;
                    match host.origin {
                        Origin::File => weights.each().into_iter().for_each(Weight::release),
                        Origin::Memory => host.weights = None,
                        Origin::Disk => self.on_disk_bytes += self.cache.bytes(id),
                    }
                }
            }
        }
        any
    }

    /// Computes experts in host memory, each for some of `rows [n, hidden]`. Their outputs in the order of `calls`,
    /// `hidden` values a row.
    pub(crate) fn compute(&mut self, rows: Vec<f32>, hidden: usize, calls: &[(ExpertId, Vec<u32>)]) -> Vec<f32> {
        let Self { experts, kernels, threads, costs, .. } = self;
        let kernels = kernels.get_or_insert_with(|| CpuKernels::new(Isa::best(), *threads));
        let work = calls.iter().filter_map(|(id, rows)| {
            let expert = experts.get(id)?.weights.as_ref()?;
            Some(ExpertWork { expert, rows })
        });
        let work: Vec<_> = work.filter(|work| !work.rows.is_empty()).collect();
        if work.is_empty() {
            return Vec::new();
        }
        let since = Instant::now();
        let input = Kernels::upload(kernels, rows, hidden);
        let outputs = Kernels::experts(kernels, &input, &work);
        let outputs = Kernels::download(kernels, outputs);
        let (mut bytes, mut bytes_by_rows) = (0, 0);
        for ExpertWork { expert, rows } in &work {
            let each: u64 = expert.each().map(|weight| weight.bytes() as u64).iter().sum();
            bytes += each;
            bytes_by_rows += each * rows.len() as u64;
        }
        costs.computed(bytes, bytes_by_rows as f64 / bytes.max(1) as f64, since.elapsed().as_secs_f64());
        outputs
    }
}
