//! All tensors of a device, and what is computed with them.
//!
//! Owns [`Executor`]: kernels, trunk, KV cache and experts, with those that are offloaded to the CPU and to disk. The
//! compute thread owns the one executor, so nothing here is locked. It runs a batch through a layer (`layer`) and
//! serves calls of peers (`calls`); both hand it plain state. The invariant: an expert is in memory for good, or on
//! disk, or not held, and every expert that is held is in the ledger. A batch or a call pins the experts on disk that
//! it needs with a claim, and computes them when they have arrived.

use std::{
    collections::HashMap,
    sync::Arc,
    task::{Context, Poll},
};

use coel_kernels::{DynKernels, Gated};
use coel_weights::{
    config::ModelConfig,
    error::LoadError,
    layout::ExpertId,
    slices::{Precision, Weight},
    tensors::Tensors,
};

use super::{error::EngineError, state::EngineState};
use crate::{
    nn::{
        batch::Batch,
        expert_call::by_expert,
        forward::{ForwardContext, KvCache},
        outputs::LayerOutputs,
        trunk::{Trunk, expert_weights},
    },
    offload::{
        DeviceExperts, OffloadError,
        cpu::{CpuOffload, Need},
        disk::{CacheSink, ClaimId, DiskOffload},
    },
};

mod calls;
mod layer;

pub(crate) struct Executor {
    kernels: Box<dyn DynKernels>,
    state: Arc<EngineState>,
    trunk: Option<(Trunk, KvCache)>,
    /// Experts in the device's memory, for good or loaded from disk.
    experts: DeviceExperts,
    /// Set if the device may not hold all experts.
    cpu: Option<CpuOffload>,
    /// Set since the first expert was put on disk.
    disk: Option<DiskOffload>,
    /// The kernels compute, and no account of experts is being changed.
    computing: bool,
}

/// Takes experts that were loaded from disk to the memory that computes them.
struct Sink<'a> {
    kernels: &'a dyn DynKernels,
    config: &'a ModelConfig,
    experts: &'a mut DeviceExperts,
    cpu: Option<&'a mut CpuOffload>,
}

impl CacheSink for Sink<'_> {
    fn loaded(&mut self, id: ExpertId, precision: Precision, tensors: &Tensors) -> Result<(), LoadError> {
        let weights = expert_weights(self.config, id, tensors)?;
        match &mut self.cpu {
            Some(cpu) => cpu.set_weights(id, Some(weights)),
            None => _ = self.experts.insert(id, (self.kernels.expert(weights), precision)),
        }
        Ok(())
    }

    fn evicted(&mut self, id: ExpertId) {
        match &mut self.cpu {
            // A copy on the GPU stays.
            Some(cpu) => cpu.set_weights(id, None),
            None => _ = self.experts.remove(&id),
        }
    }
}

impl Executor {
    pub(crate) fn new(kernels: Box<dyn DynKernels>, state: Arc<EngineState>) -> Self {
        let options = &state.options;
        let cpu = options.device_expert_bytes.map(|budget| CpuOffload::new(budget, options.threads));
        Self { kernels, state, trunk: None, experts: HashMap::new(), cpu, disk: None, computing: false }
    }

    pub(crate) fn state(&self) -> &Arc<EngineState> {
        &self.state
    }

    /// Runs `compute`, which must change no account of experts: a panic in it can be recovered from.
    fn compute<T>(&mut self, compute: impl FnOnce(&mut Self) -> T) -> T {
        self.computing = true;
        let computed = compute(self);
        self.computing = false;
        computed
    }

    /// Whether the kernels computed when it panicked. Asked once.
    pub(crate) fn was_computing(&mut self) -> bool {
        std::mem::take(&mut self.computing)
    }

    /// Releases every claim: nobody needs an expert any more.
    pub(crate) fn release_all(&mut self) {
        if let Some((disk, mut sink)) = self.disk() {
            disk.release_all(&mut sink);
        }
    }

    pub(crate) fn kernels(&mut self) -> &mut dyn DynKernels {
        &mut *self.kernels
    }

    /// Loads the trunk, but for its embedding table if that is to stay on disk.
    pub(crate) fn load_trunk(&mut self, tensors: &Tensors, embedding_on_disk: bool) -> Result<(), EngineError> {
        if self.trunk.is_some() {
            return Err(EngineError::TrunkLoaded);
        }
        let config = self.state.config.clone();
        let mut trunk = Trunk::load(&*self.kernels, config.clone(), tensors)?;
        if embedding_on_disk {
            let on_disk = trunk.embed_from_disk()?;
            self.state.meter.update(|stats| stats.embedding_on_disk = on_disk);
        }
        let (pages, page_tokens) = self.state.accounts(|accounts| (accounts.pages, accounts.page_tokens));
        let cache = KvCache::new(&*self.kernels, &config, pages, page_tokens);
        if let Some(cpu) = &self.cpu {
            self.kernels.reserve(cpu.capacity());
        }
        self.state.trunk_loaded(trunk.bytes());
        self.trunk = Some((trunk, cache));
        Ok(())
    }

    /// Holds an expert in memory for good. It replaces another one of this id.
    pub(crate) fn load_expert(&mut self, id: ExpertId, tensors: &Tensors) -> Result<(), EngineError> {
        let precision = tensors.precision();
        let weights = expert_weights(&self.state.config, id, tensors)?;
        if self.cpu.is_some() {
            self.remove_from_disk(id);
            self.experts.remove(&id);
            if let Some((cpu, kernels, experts)) = self.cpu() {
                cpu.add(id, weights, precision, kernels, experts);
            }
        } else {
            let expert = self.compute(|executor| executor.kernels.expert(weights));
            self.remove_from_disk(id);
            self.experts.insert(id, (expert, precision));
        }
        self.state.expert_loaded(id, precision, tensors.data_bytes());
        self.note_device();
        Ok(())
    }

    /// Holds an expert on disk, from where it is read when it is needed. It replaces another one of this id.
    pub(crate) fn load_expert_on_disk(&mut self, id: ExpertId, tensors: &Tensors) -> Result<(), EngineError> {
        let weights = expert_weights(&self.state.config, id, tensors)?;
        if self.disk.is_none() {
            let budget = self.state.accounts(|accounts| accounts.disk_cache_bytes);
            let disk = DiskOffload::new(budget, self.state.options.readers);
            self.disk = Some(disk.map_err(|error| OffloadError::Start { why: error.to_string() })?);
        }
        let was_on_disk = self.is_on_disk(id);
        let Some((disk, mut sink)) = self.disk() else { return Ok(()) };
        disk.add(id, tensors, &mut sink)?;
        if !was_on_disk || self.cpu.is_some() {
            self.experts.remove(&id); // the expert that is replaced
        }
        if let Some(cpu) = &mut self.cpu {
            cpu.add_on_disk(id, tensors.precision(), &weights, &*self.kernels);
        }
        self.note_device();
        self.state.expert_on_disk(id, tensors.precision(), tensors.data_bytes());
        Ok(())
    }

    /// Sets the bytes of memory in which experts on disk take turns.
    pub(crate) fn set_disk_cache_bytes(&mut self, bytes: u64) {
        self.state.set_disk_cache_bytes(bytes);
        if let Some((disk, mut sink)) = self.disk() {
            disk.set_capacity(bytes, &mut sink);
        }
        self.note_disk();
    }

    /// Whether the experts on disk take no more memory than they may. They do while a computation needs them. What they take
    /// is in the ledger then.
    pub(crate) fn is_disk_cache_within_budget(&self) -> bool {
        self.note_disk();
        self.disk.as_ref().is_none_or(|disk| disk.bytes() <= disk.capacity())
    }

    /// Drops an expert; whether it was held.
    pub(crate) fn drop_expert(&mut self, id: ExpertId) -> bool {
        self.state.expert_dropped(id);
        let on_disk = self.remove_from_disk(id);
        let on_cpu = self.cpu.as_mut().is_some_and(|cpu| cpu.remove(id));
        let held = self.experts.remove(&id).is_some() || on_disk || on_cpu;
        if let Some((cpu, kernels, experts)) = self.cpu() {
            cpu.fill(kernels, experts);
        }
        self.note_device();
        held
    }

    fn remove_from_disk(&mut self, id: ExpertId) -> bool {
        self.disk().is_some_and(|(disk, mut sink)| disk.remove(id, &mut sink))
    }

    fn disk(&mut self) -> Option<(&mut DiskOffload, Sink<'_>)> {
        let Self { kernels, state, experts, cpu, disk, .. } = self;
        let sink = Sink { kernels: &**kernels, config: &state.config, experts, cpu: cpu.as_mut() };
        disk.as_mut().map(|disk| (disk, sink))
    }

    fn cpu(&mut self) -> Option<(&mut CpuOffload, &dyn DynKernels, &mut DeviceExperts)> {
        let Self { kernels, experts, cpu, .. } = self;
        cpu.as_mut().map(|cpu| (cpu, &**kernels, experts))
    }

    /// The precision of an expert, if it is held in memory or on disk.
    fn precision(&self, id: ExpertId) -> Option<Precision> {
        let on_cpu = || self.cpu.as_ref().and_then(|cpu| cpu.precision(id));
        let on_disk = || self.disk.as_ref().and_then(|disk| disk.precision(id));
        self.experts.get(&id).map(|(_, precision)| *precision).or_else(on_cpu).or_else(on_disk)
    }

    fn is_on_disk(&self, id: ExpertId) -> bool {
        self.disk.as_ref().is_some_and(|disk| disk.precision(id).is_some())
    }

    /// Whether an expert has to be claimed from disk, even if it is in memory now. A copy on the GPU beside host memory
    /// needs no claim.
    fn comes_from_disk(&self, id: ExpertId) -> bool {
        self.is_on_disk(id) && !(self.cpu.is_some() && self.experts.contains_key(&id))
    }

    /// Whether experts may be in host memory beside a GPU.
    fn has_cpu_offload(&self) -> bool {
        self.cpu.is_some()
    }

    /// Promotes to the GPU those of `needs`, each needed by so many of a layer's `rows`, that are in host memory and
    /// worth it. The others in host memory are returned: the CPU will compute them.
    fn promote(&mut self, needs: &[(ExpertId, usize)], rows: usize) -> Vec<ExpertId> {
        let Some((cpu, kernels, experts)) = self.cpu() else { return Vec::new() };
        let in_memory = |id: &ExpertId| experts.contains_key(id) || cpu.weights(*id).is_some();
        let share = |needed: usize| needed as f64 / rows.max(1) as f64;
        let needs = needs.iter().filter(|(id, _)| in_memory(id));
        let needs: Vec<_> = needs.map(|(id, rows)| Need { id: *id, rows: *rows, share: share(*rows) }).collect();
        let promoted = cpu.need(&needs, kernels, experts);
        let on_cpu = needs.iter().map(|need| need.id).filter(|id| !experts.contains_key(id)).collect();
        if promoted {
            self.note_device();
        }
        self.note_uses();
        on_cpu
    }

    /// Promotes to the GPU those of `ids`, predicted for the next layer, that are worth it. The layer before must not
    /// need any expert on the GPU any more.
    fn promote_predicted(&mut self, ids: &[ExpertId]) {
        let Some((cpu, kernels, experts)) = self.cpu() else { return };
        if cpu.prefetch(ids, kernels, experts) {
            self.note_device();
        }
    }

    /// Whether batches may have to wait for experts from disk.
    pub(crate) fn has_disk_offload(&self) -> bool {
        self.disk.is_some()
    }

    /// Whether the experts of the next layer are predicted.
    fn predicts(&self) -> bool {
        let on_cpu = || self.cpu.as_ref().is_some_and(CpuOffload::holds_any);
        self.disk.is_some() || on_cpu() || self.state.options.measure_recall
    }

    /// A batch begins.
    fn tick(&mut self) {
        if let Some(disk) = &mut self.disk {
            disk.tick();
        }
        if let Some(cpu) = &mut self.cpu {
            cpu.tick();
        }
    }

    /// Opens a claim on experts on disk. It must be [released](Self::release).
    fn claim(&mut self) -> Option<ClaimId> {
        self.disk.as_mut().map(DiskOffload::claim)
    }

    /// `claim` needs these experts from disk now.
    fn need(&mut self, claim: ClaimId, ids: &[ExpertId]) {
        if let Some((disk, mut sink)) = self.disk() {
            disk.need(claim, ids, &mut sink);
        }
    }

    /// These experts are predicted for `claim`: prefetches those that have to come from disk.
    fn prefetch_from_disk(&mut self, claim: ClaimId, ids: &[ExpertId]) {
        let ids: Vec<ExpertId> = ids.iter().copied().filter(|id| self.comes_from_disk(*id)).collect();
        if let Some((disk, mut sink)) = self.disk() {
            disk.prefetch(claim, &ids, &mut sink);
        }
    }

    /// The experts that `claim` needs and that can be computed now, or the failure to read one of them.
    fn ready(&mut self, claim: ClaimId) -> Result<Vec<ExpertId>, OffloadError> {
        self.disk.as_mut().map_or(Ok(Vec::new()), |disk| disk.ready(claim))
    }

    fn is_ready(&self, claim: ClaimId) -> bool {
        self.disk.as_ref().is_some_and(|disk| disk.is_ready(claim))
    }

    /// `claim` has computed these experts, each for a share of its rows.
    fn computed(&mut self, claim: ClaimId, ids: &[(ExpertId, f64)]) {
        // The GPU computed an expert that has a copy there: this is no reason to keep it in host memory.
        let has_cpu = self.cpu.is_some();
        let share = |id: &ExpertId, share: f64| if has_cpu && self.experts.contains_key(id) { 0.0 } else { share };
        let ids: Vec<_> = ids.iter().map(|(id, of)| (*id, share(id, *of))).collect();
        if let Some((disk, mut sink)) = self.disk() {
            disk.computed(claim, &ids, &mut sink);
        }
    }

    /// Ends `claim`.
    fn release(&mut self, claim: ClaimId) {
        if let Some((disk, mut sink)) = self.disk() {
            disk.release(claim, &mut sink);
        }
    }

    /// Ready when a load from disk has ended, which [`settle`](Self::settle) takes in.
    pub(crate) fn poll_disk(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.disk.as_mut().map_or(Poll::Pending, |disk| disk.poll(context))
    }

    /// Takes in the loads from disk that have ended.
    pub(crate) fn settle(&mut self) {
        let Some((disk, mut sink)) = self.disk() else { return };
        disk.settle(&mut sink);
        self.note_disk();
    }

    fn note_disk(&self) {
        let Some(disk) = &self.disk else { return };
        let bytes_in_memory = disk.bytes();
        let (counts, bytes_read, in_memory) = (disk.counts(), disk.bytes_read(), disk.in_memory());
        self.state.meter.update(|stats| {
            (stats.hits, stats.misses) = (counts.hits, counts.misses);
            (stats.prefetched, stats.prefetch_used) = (counts.prefetched, counts.prefetch_used);
            (stats.bytes_read, stats.in_memory) = (bytes_read, in_memory);
            stats.bytes_in_memory = bytes_in_memory;
        });
    }

    /// Counts what is on the GPU, for the ledger.
    fn note_device(&self) {
        let Some(cpu) = &self.cpu else { return };
        self.state.meter.update(|stats| {
            (stats.device.experts, stats.device.bytes) = (self.experts.len(), cpu.device_bytes());
            stats.device.on_disk_bytes = cpu.on_disk_bytes();
            stats.device.bytes_promoted = cpu.promoted_bytes();
        });
    }

    fn note_uses(&self) {
        let Some(cpu) = &self.cpu else { return };
        let uses = cpu.uses();
        self.state.meter.update(|stats| {
            (stats.device.hits, stats.device.promoted) = (uses.hits, uses.promoted);
            stats.device.on_cpu = uses.on_cpu;
        });
    }

    /// What a batch borrows while it runs.
    fn context(&mut self) -> Result<ForwardContext<'_>, EngineError> {
        let (trunk, cache) = self.trunk.as_mut().ok_or(EngineError::NoTrunk)?;
        Ok(ForwardContext { kernels: &mut *self.kernels, trunk, cache })
    }

    /// The next layer with experts, from `layer` on.
    fn sparse_layer_from(&self, layer: usize) -> Option<usize> {
        self.state.config.sparse_layers().find(|sparse| *sparse >= layer)
    }

    /// Computes the batch's experts that are in memory, and the shared expert.
    fn run_held(&mut self, batch: &Batch) -> Result<LayerOutputs, EngineError> {
        self.run(batch, |_| true, true)
    }

    /// Computes the batch's experts `ids`, all of which must be in memory, into `outputs`.
    fn run_more(&mut self, batch: &Batch, ids: &[ExpertId], outputs: &mut LayerOutputs) -> Result<(), EngineError> {
        if let Some(id) = ids.iter().find(|id| !self.is_in_memory(**id)) {
            return Err(EngineError::NotHeld(*id));
        }
        let more = self.run(batch, |id| ids.contains(&id), false)?;
        outputs.join(more, self.state.config.hidden_size);
        Ok(())
    }

    /// Whether an expert can be computed now.
    fn is_in_memory(&self, id: ExpertId) -> bool {
        self.experts.contains_key(&id) || self.host_weights(id).is_some()
    }

    fn host_weights(&self, id: ExpertId) -> Option<&Gated<Weight>> {
        self.cpu.as_ref().and_then(|cpu| cpu.weights(id))
    }

    /// Computes the batch's experts that are `wanted` and in memory: launches the device's part, computes the CPU's
    /// part meanwhile, then waits for the device.
    fn run(
        &mut self,
        batch: &Batch,
        wanted: impl Fn(ExpertId) -> bool,
        shared: bool,
    ) -> Result<LayerOutputs, EngineError> {
        self.compute(|executor| executor.run_now(batch, wanted, shared))
    }

    fn run_now(
        &mut self,
        batch: &Batch,
        wanted: impl Fn(ExpertId) -> bool,
        shared: bool,
    ) -> Result<LayerOutputs, EngineError> {
        let layer = batch.layer();
        let (mut slots, mut on_cpu) = (Vec::new(), Vec::new());
        if self.cpu.is_some() {
            for (index, pairs) in by_expert(batch.routes()) {
                let id = ExpertId { layer, index };
                if wanted(id) && !self.experts.contains_key(&id) && self.host_weights(id).is_some() {
                    slots.extend(pairs.iter().map(|pair| pair.slot));
                    on_cpu.push((id, pairs.iter().map(|pair| pair.row).collect::<Vec<u32>>()));
                }
            }
        }
        let (trunk, cache) = self.trunk.as_mut().ok_or(EngineError::NoTrunk)?;
        let mut context = ForwardContext { kernels: &mut *self.kernels, trunk, cache };
        // Read before the device is busy: it works in order.
        let rows = (!on_cpu.is_empty()).then(|| context.rows(batch));
        let experts = &self.experts;
        let held = |index| {
            let id = ExpertId { layer, index };
            experts.get(&id).filter(|_| wanted(id)).map(|(expert, _)| expert)
        };
        let pending = context.run_experts(batch, held, shared);
        let hidden = self.state.config.hidden_size;
        let on_cpu = rows.zip(self.cpu.as_mut()).map(|(rows, cpu)| cpu.compute(rows, hidden, &on_cpu));
        let mut outputs = pending.outputs(&*self.kernels);
        if let Some(on_cpu) = on_cpu {
            outputs.add(&slots, &on_cpu);
        }
        Ok(outputs)
    }
}
