//! Experts that wait on disk until they are needed, as the compute thread sees them.
//!
//! Owns [`DiskOffload`]: the plans of all experts on it, the buffers of those in memory, and the threads that read. It
//! carries out what [`Residency`] decides and reports back. The invariant: a buffer is lent to the readers, or holds an
//! expert that is in the sink tier, or is free. Where experts go when they come is [`CacheSink`]'s business: it makes
//! weights of tensors in memory, in place or by bringing them to a device.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::sync::mpsc;

use super::{
    OffloadError,
    read_plan::ReadPlan,
    readers::{Load, Loaded, Readers},
    residency::{Arrival, ClaimId, Effect, LoadId, Residency},
};
use coel_weights::{
    error::LoadError,
    layout::ExpertId,
    memory::{Buffer, Buffers, ReadError},
    slices::Precision,
    tensors::Tensors,
};

/// Where experts are computed.
pub(crate) trait CacheSink {
    /// An expert has come.
    fn loaded(&mut self, id: ExpertId, precision: Precision, tensors: &Tensors) -> Result<(), LoadError>;
    /// It goes: nothing may keep its tensors.
    fn evicted(&mut self, id: ExpertId);
}

#[derive(Debug)]
struct OnDisk {
    plan: Arc<ReadPlan>,
    precision: Precision,
}

pub(crate) struct DiskOffload {
    residency: Residency,
    on_disk: HashMap<ExpertId, OnDisk>,
    buffers: Buffers,
    /// Of the experts in memory.
    held: HashMap<ExpertId, Arc<Buffer>>,
    loading: HashMap<LoadId, ExpertId>,
    readers: Readers,
    loaded: mpsc::UnboundedReceiver<Loaded>,
    /// One that was seen while waiting.
    seen: Option<Loaded>,
    failures: BTreeMap<ClaimId, OffloadError>,
    claims: u64,
    bytes_read: u64,
}

impl DiskOffload {
    /// With memory for `budget` bytes, and so many threads that read.
    pub(crate) fn new(budget: u64, readers: usize) -> io::Result<Self> {
        let (readers, loaded) = Readers::start(readers)?;
        Ok(Self {
            residency: Residency::new(budget),
            on_disk: HashMap::new(),
            buffers: Buffers::new(budget),
            held: HashMap::new(),
            loading: HashMap::new(),
            readers,
            loaded,
            seen: None,
            failures: BTreeMap::new(),
            claims: 0,
            bytes_read: 0,
        })
    }

    /// Puts an expert on the shelf, in the place of another of this id.
    pub(crate) fn add(
        &mut self,
        id: ExpertId,
        tensors: &Tensors,
        sink: &mut dyn CacheSink,
    ) -> Result<(), OffloadError> {
        let plan = ReadPlan::of(tensors).map_err(|why| OffloadError::Read { id, why })?;
        let (bytes, budget) = (plan.buffer_bytes(), self.residency.budget());
        if bytes > budget {
            return Err(OffloadError::TooSmall { id, bytes, budget });
        }
        self.on_disk.insert(id, OnDisk { plan: Arc::new(plan), precision: tensors.precision() });
        self.residency.add(id, bytes);
        self.carry_out(sink);
        Ok(())
    }

    /// Another budget from now on; less takes effect as experts that are needed now are computed.
    pub(crate) fn set_budget(&mut self, budget: u64, sink: &mut dyn CacheSink) {
        self.residency.set_budget(budget);
        self.buffers.set_budget(budget);
        self.carry_out(sink);
    }

    /// Bytes of memory it takes, in use or not.
    pub(crate) fn bytes(&self) -> u64 {
        self.buffers.bytes()
    }

    /// Whether it was there.
    pub(crate) fn remove(&mut self, id: ExpertId, sink: &mut dyn CacheSink) -> bool {
        self.residency.remove(id);
        self.carry_out(sink);
        self.on_disk.remove(&id).is_some()
    }

    /// Its precision, if it is here.
    pub(crate) fn precision(&self, id: ExpertId) -> Option<Precision> {
        self.on_disk.get(&id).map(|on_disk| on_disk.precision)
    }

    pub(crate) fn residency(&self) -> &Residency {
        &self.residency
    }

    /// Experts in memory.
    pub(crate) fn in_memory(&self) -> usize {
        self.held.len()
    }

    /// Bytes read from disk so far.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// A claim that needs nothing yet.
    pub(crate) fn claim(&mut self) -> ClaimId {
        self.claims += 1;
        ClaimId(self.claims)
    }

    pub(crate) fn tick(&mut self) {
        self.residency.tick();
    }

    pub(crate) fn need(&mut self, claim: ClaimId, ids: &[ExpertId], sink: &mut dyn CacheSink) {
        self.residency.need(claim, ids.iter().copied());
        self.carry_out(sink);
    }

    pub(crate) fn prefetch(&mut self, claim: ClaimId, ids: &[ExpertId], sink: &mut dyn CacheSink) {
        self.residency.prefetch(claim, ids.iter().copied());
        self.carry_out(sink);
    }

    /// What `claim` needs and has in memory, or why it will not have all.
    pub(crate) fn ready(&mut self, claim: ClaimId) -> Result<Vec<ExpertId>, OffloadError> {
        match self.failures.remove(&claim) {
            Some(failure) => Err(failure),
            None => Ok(self.residency.ready(claim)),
        }
    }

    /// Whether [`ready`](Self::ready) has anything to say.
    pub(crate) fn is_ready(&self, claim: ClaimId) -> bool {
        self.failures.contains_key(&claim) || !self.residency.ready(claim).is_empty()
    }

    /// `claim` has computed experts, each with the share of its rows that it was for.
    pub(crate) fn computed(&mut self, claim: ClaimId, ids: &[(ExpertId, f64)], sink: &mut dyn CacheSink) {
        for (id, share) in ids {
            self.residency.computed(claim, *id, *share);
        }
        self.carry_out(sink);
    }

    pub(crate) fn release(&mut self, claim: ClaimId, sink: &mut dyn CacheSink) {
        self.residency.release(claim);
        self.failures.remove(&claim);
        self.carry_out(sink);
    }

    /// Ready when a load has come back, for [`settle`](Self::settle) to see to.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.seen.is_none() {
            match self.loaded.poll_recv(context) {
                Poll::Ready(loaded) => self.seen = loaded,
                Poll::Pending => return Poll::Pending,
            }
        }
        // The readers live as long as this does, so there is always one to wait for.
        if self.seen.is_some() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Sees to all loads that have come back.
    pub(crate) fn settle(&mut self, sink: &mut dyn CacheSink) {
        while let Some(loaded) = self.seen.take().or_else(|| self.loaded.try_recv().ok()) {
            self.came_back(loaded, sink);
            self.carry_out(sink);
        }
    }

    fn came_back(&mut self, loaded: Loaded, sink: &mut dyn CacheSink) {
        let Loaded { id: load, buffer, result } = loaded;
        let Some(id) = self.loading.remove(&load) else { return };
        let failure = match result {
            Ok(bytes) => {
                self.bytes_read += bytes;
                match self.residency.arrived(load) {
                    Arrival::Kept(id) => return self.keep(id, buffer, sink),
                    Arrival::Discarded => return self.buffers.take_back(buffer),
                }
            }
            Err(ReadError::Abandoned) => None,
            Err(why) => Some(OffloadError::Read { id, why }),
        };
        self.buffers.take_back(buffer);
        let losers = self.residency.came_back(load, failure.is_some());
        if let Some(failure) = failure {
            tracing::warn!("{failure}");
            self.failures.extend(losers.into_iter().map(|claim| (claim, failure.clone())));
        }
    }

    /// Hands an expert that is in memory to whoever computes with it.
    fn keep(&mut self, id: ExpertId, buffer: Buffer, sink: &mut dyn CacheSink) {
        let on_disk = &self.on_disk[&id];
        let buffer = Arc::new(buffer);
        let tensors = on_disk.plan.tensors(&buffer);
        self.held.insert(id, buffer);
        if let Err(error) = sink.loaded(id, on_disk.precision, &tensors) {
            // They were checked when they were put on the shelf: shapes do not change with the bytes.
            tracing::error!("{id}: {error}");
        }
    }

    fn carry_out(&mut self, sink: &mut dyn CacheSink) {
        loop {
            let effects = self.residency.effects();
            if effects.is_empty() {
                return;
            }
            for effect in effects {
                match effect {
                    Effect::Evict(id) => {
                        sink.evicted(id);
                        if let Some(buffer) = self.held.remove(&id).and_then(Arc::into_inner) {
                            self.buffers.take_back(buffer);
                        }
                    }
                    Effect::Read { id, load, urgent } => self.read(id, load, urgent),
                    Effect::Hurry(load) => self.readers.hurry(load),
                    Effect::Abandon(load) => {
                        if let Some(Load { id, buffer, .. }) = self.readers.abandon(load) {
                            self.loading.remove(&id);
                            self.buffers.take_back(buffer);
                            self.residency.came_back(id, false);
                        }
                    }
                }
            }
        }
    }

    fn read(&mut self, id: ExpertId, load: LoadId, urgent: bool) {
        let plan = self.on_disk[&id].plan.clone();
        match self.buffers.lend(plan.buffer_bytes()) {
            Ok(buffer) => {
                self.loading.insert(load, id);
                self.readers.read(Load { id: load, plan, buffer }, urgent);
            }
            Err(error) => {
                let failure = OffloadError::Memory { id, why: error.to_string() };
                let losers = self.residency.came_back(load, true);
                self.failures.extend(losers.into_iter().map(|claim| (claim, failure.clone())));
            }
        }
    }
}
