//! Experts in host memory that a GPU does not hold, computed by the CPU.
//!
//! Owns [`CpuOffload`]: the weights in host memory of the experts that are not on the GPU, the CPU's kernels, and the
//! measured costs. It carries out what [`DeviceRoom`] decides. The invariant: an expert that is held for good is on the
//! GPU or has its weights here, so it can be computed at once; and not both take memory. Weights in a mapped file stay
//! mapped, and their pages are released while the expert is on the GPU; other weights are given up meanwhile, and read
//! back from the GPU when the expert is demoted; those of experts on disk belong to [`DiskOffload`](super::disk). Nothing
//! here knows batches.

use std::{collections::HashMap, time::Instant};

use coel_kernels::{
    DynKernels, ExpertWork, Gated, Kernels,
    cpu::{CpuKernels, isa::Isa},
    download,
};
use coel_weights::{
    layout::ExpertId,
    slices::{Precision, Weight},
};

use super::{
    DeviceExperts,
    costs::Costs,
    device::{DeviceRoom, Move, Need, Uses},
};

/// Where weights in host memory come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// A mapped file.
    File,
    /// Memory of this process's own.
    Memory,
    /// Disk, by way of the disk cache's buffers.
    Disk,
}

struct HostExpert {
    origin: Origin,
    precision: Precision,
    /// If they are in host memory.
    weights: Option<Gated<Weight>>,
}

pub(crate) struct CpuOffload {
    room: DeviceRoom,
    hosts: HashMap<ExpertId, HostExpert>,
    costs: Costs,
    /// Started when they are first needed.
    kernels: Option<CpuKernels>,
    threads: usize,
    promoted_bytes: u64,
    /// On the device, of experts that are on the shelf.
    on_disk_bytes: u64,
}

impl CpuOffload {
    /// With `budget` bytes for experts on the device, and so many threads that compute beneath.
    pub(crate) fn new(budget: u64, threads: usize) -> Self {
        Self {
            room: DeviceRoom::new(budget),
            hosts: HashMap::new(),
            costs: Costs::default(),
            kernels: None,
            threads,
            promoted_bytes: 0,
            on_disk_bytes: 0,
        }
    }

    /// The kernel class that computes here.
    pub(crate) fn class() -> String {
        format!("cpu-{}", Isa::best().name())
    }

    /// Bytes of the GPU's memory that experts may take.
    pub(crate) fn capacity(&self) -> u64 {
        self.room.budget()
    }

    /// Bytes of the experts that are on the GPU.
    pub(crate) fn device_bytes(&self) -> u64 {
        self.room.used()
    }

    pub(crate) fn uses(&self) -> Uses {
        self.room.uses()
    }

    /// Bytes brought to the device so far.
    pub(crate) fn promoted_bytes(&self) -> u64 {
        self.promoted_bytes
    }

    /// Bytes on the device of experts that are on the shelf.
    pub(crate) fn on_disk_bytes(&self) -> u64 {
        self.on_disk_bytes
    }

    /// Whatever is held of the expert goes, or comes to be held otherwise.
    fn detach(&mut self, id: ExpertId) -> bool {
        let Some(host) = self.hosts.remove(&id) else { return false };
        if host.origin == Origin::Disk && self.room.is_up(id) {
            self.on_disk_bytes -= self.room.bytes(id);
        }
        true
    }

    pub(crate) fn precision(&self, id: ExpertId) -> Option<Precision> {
        self.hosts.get(&id).map(|host| host.precision)
    }

    /// Whether an expert is here and not on the device.
    pub(crate) fn holds_any(&self) -> bool {
        self.hosts.len() > self.room.up_count()
    }

    /// Its weights, if they are in host memory.
    pub(crate) fn weights(&self, id: ExpertId) -> Option<&Gated<Weight>> {
        self.hosts.get(&id)?.weights.as_ref()
    }

    /// Holds an expert for good, on the device if there is a free place; one of this id is gone from there.
    pub(crate) fn hold(
        &mut self,
        id: ExpertId,
        weights: Gated<Weight>,
        precision: Precision,
        kernels: &dyn DynKernels,
        experts: &mut DeviceExperts,
    ) {
        let origin = if weights.each().into_iter().all(Weight::is_mapped) { Origin::File } else { Origin::Memory };
        self.detach(id);
        self.room.add(id, kernels.expert_bytes(&weights));
        self.hosts.insert(id, HostExpert { origin, precision, weights: Some(weights) });
        if self.room.settle(id) {
            self.carry_out(vec![Move::Promote(id)], kernels, experts);
        }
    }

    /// Fills places that have become free.
    pub(crate) fn fill(&mut self, kernels: &dyn DynKernels, experts: &mut DeviceExperts) {
        let hosts = &self.hosts;
        let for_good = |id| hosts.get(&id).is_some_and(|host: &HostExpert| host.origin != Origin::Disk);
        let moves = self.room.fill(for_good);
        self.carry_out(moves, kernels, experts);
    }

    /// An expert with such weights is on the shelf from now on; one of this id is gone from the device.
    pub(crate) fn add_on_disk(
        &mut self,
        id: ExpertId,
        precision: Precision,
        weights: &Gated<Weight>,
        kernels: &dyn DynKernels,
    ) {
        self.detach(id);
        self.room.add(id, kernels.expert_bytes(weights));
        self.hosts.insert(id, HostExpert { origin: Origin::Disk, precision, weights: None });
    }

    /// An expert of the shelf has come to host memory, or has gone.
    pub(crate) fn set_weights(&mut self, id: ExpertId, weights: Option<Gated<Weight>>) {
        if let Some(host) = self.hosts.get_mut(&id).filter(|host| host.origin == Origin::Disk) {
            host.weights = weights;
        }
    }

    /// The expert is not held any more; whether it was.
    pub(crate) fn forget(&mut self, id: ExpertId) -> bool {
        let held = self.detach(id);
        self.room.forget(id);
        held
    }

    pub(crate) fn tick(&mut self) {
        self.room.tick();
    }

    /// A layer needs these, which are on the device or here: brings up what is worth it. Whether anything was.
    pub(crate) fn need(&mut self, needs: &[Need], kernels: &dyn DynKernels, experts: &mut DeviceExperts) -> bool {
        let moves = self.room.need(needs, &self.costs);
        self.carry_out(moves, kernels, experts)
    }

    /// The same of these, as far as they are here, which will be needed next, it seems.
    pub(crate) fn prefetch(&mut self, ids: &[ExpertId], kernels: &dyn DynKernels, experts: &mut DeviceExperts) -> bool {
        let here: Vec<ExpertId> = ids.iter().copied().filter(|id| self.weights(*id).is_some()).collect();
        let moves = self.room.prefetch(&here);
        self.carry_out(moves, kernels, experts)
    }

    fn carry_out(&mut self, moves: Vec<Move>, kernels: &dyn DynKernels, experts: &mut DeviceExperts) -> bool {
        let any = !moves.is_empty();
        for step in moves {
            let (Move::Demote(id) | Move::Promote(id)) = step;
            let Some(host) = self.hosts.get_mut(&id) else { continue };
            match step {
                Move::Demote(_) => {
                    let Some((copy, _)) = experts.remove(&id) else { continue };
                    match host.origin {
                        Origin::File => {}
                        Origin::Memory => host.weights = Some(kernels.expert_weights(&copy)),
                        Origin::Disk => self.on_disk_bytes -= self.room.bytes(id),
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
                    experts.insert(id, (copy, host.precision));
                    self.promoted_bytes += bytes;
                    match host.origin {
                        Origin::File => weights.each().into_iter().for_each(Weight::release),
                        Origin::Memory => host.weights = None,
                        Origin::Disk => self.on_disk_bytes += self.room.bytes(id),
                    }
                }
            }
        }
        any
    }

    /// Experts that are here over `rows [n, hidden]`, each over some of them, in this order.
    pub(crate) fn compute(&mut self, rows: Vec<f32>, hidden: usize, calls: &[(ExpertId, Vec<u32>)]) -> Vec<f32> {
        let Self { hosts, kernels, threads, costs, .. } = self;
        let kernels = kernels.get_or_insert_with(|| CpuKernels::new(Isa::best(), *threads));
        let work = calls.iter().filter_map(|(id, rows)| {
            let expert = hosts.get(id)?.weights.as_ref()?;
            Some(ExpertWork { expert, rows })
        });
        let work: Vec<_> = work.filter(|work| !work.rows.is_empty()).collect();
        if work.is_empty() {
            return Vec::new();
        }
        let since = Instant::now();
        let input = Kernels::upload(kernels, rows, hidden);
        let outputs = download(Kernels::experts(kernels, &input, &work));
        let (mut bytes, mut weighed) = (0, 0);
        for ExpertWork { expert, rows } in &work {
            let each: u64 = expert.each().map(|weight| weight.bytes() as u64).iter().sum();
            (bytes, weighed) = (bytes + each, weighed + each * rows.len() as u64);
        }
        costs.computed(bytes, weighed as f64 / bytes.max(1) as f64, since.elapsed().as_secs_f64());
        outputs
    }
}
