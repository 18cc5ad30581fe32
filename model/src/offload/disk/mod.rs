//! Experts on disk that take turns in memory.
//!
//! Owns [`DiskOffload`], the driver: the read plans of all experts on disk, the buffers of those in memory, and the
//! threads that read. It carries out what the [`DiskCache`] decides and reports how loads ended. The invariant: a
//! buffer is with the readers, or holds an expert that the sink has, or is free. Where loaded experts go is up to the
//! [`CacheSink`], which makes weights of tensors in memory, in place or by a copy to a device. Nothing here knows
//! batches or calls of peers: both come as claims.
//!
//! Arrows: this driver → `disk_cache` → [`Cache`](super::cache) → [`Score`](super::score); this driver → `readers` →
//! `read_plan`.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::sync::mpsc;

use self::{
    disk_cache::{Arrival, Counts, DiskCache, Effect, LoadId},
    read_plan::ReadPlan,
    readers::{Load, Loaded, Readers},
};
use super::OffloadError;
use coel_weights::{
    error::LoadError,
    layout::ExpertId,
    memory::{Buffer, Buffers, ReadError},
    slices::Precision,
    tensors::Tensors,
};

mod disk_cache;
mod read_plan;
mod readers;

pub(crate) use self::disk_cache::ClaimId;

/// Where experts are computed.
pub(crate) trait CacheSink {
    /// An expert was loaded into memory.
    fn loaded(&mut self, id: ExpertId, precision: Precision, tensors: &Tensors) -> Result<(), LoadError>;
    /// An expert is evicted. The sink must not keep its tensors.
    fn evicted(&mut self, id: ExpertId);
}

#[derive(Debug)]
struct OnDisk {
    plan: Arc<ReadPlan>,
    precision: Precision,
}

pub(crate) struct DiskOffload {
    cache: DiskCache,
    on_disk: HashMap<ExpertId, OnDisk>,
    buffers: Buffers,
    /// The buffers of the experts in memory.
    held: HashMap<ExpertId, Arc<Buffer>>,
    loading: HashMap<LoadId, ExpertId>,
    readers: Readers,
    loaded: mpsc::UnboundedReceiver<Loaded>,
    /// A load that came back while [`poll`](Self::poll) waited.
    seen: Option<Loaded>,
    failures: BTreeMap<ClaimId, OffloadError>,
    claims: u64,
    bytes_read: u64,
}

impl DiskOffload {
    /// Starts `readers` threads that read into `capacity` bytes of memory.
    pub(crate) fn new(capacity: u64, readers: usize) -> io::Result<Self> {
        let (readers, loaded) = Readers::start(readers)?;
        Ok(Self {
            cache: DiskCache::new(capacity),
            on_disk: HashMap::new(),
            buffers: Buffers::new(capacity),
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

    /// Adds an expert whose tensors lie in files. It replaces another one of this id.
    pub(crate) fn add(
        &mut self,
        id: ExpertId,
        tensors: &Tensors,
        sink: &mut dyn CacheSink,
    ) -> Result<(), OffloadError> {
        let plan = ReadPlan::of(tensors).map_err(|why| OffloadError::Read { id, why })?;
        let (bytes, budget) = (plan.buffer_bytes(), self.cache.capacity());
        if bytes > budget {
            return Err(OffloadError::TooSmall { id, bytes, budget });
        }
        self.on_disk.insert(id, OnDisk { plan: Arc::new(plan), precision: tensors.precision() });
        self.cache.add(id, bytes);
        self.carry_out(sink);
        Ok(())
    }

    /// Sets the capacity in bytes. A smaller one takes effect as experts that are needed now are computed.
    pub(crate) fn set_capacity(&mut self, capacity: u64, sink: &mut dyn CacheSink) {
        self.cache.set_capacity(capacity);
        self.buffers.set_budget(capacity);
        self.carry_out(sink);
    }

    /// The capacity in bytes.
    pub(crate) fn capacity(&self) -> u64 {
        self.cache.capacity()
    }

    /// Bytes of all buffers, in use or free.
    pub(crate) fn bytes(&self) -> u64 {
        self.buffers.bytes()
    }

    /// Removes an expert; whether it was on disk.
    pub(crate) fn remove(&mut self, id: ExpertId, sink: &mut dyn CacheSink) -> bool {
        self.cache.remove(id);
        self.carry_out(sink);
        self.on_disk.remove(&id).is_some()
    }

    /// The precision of an expert, if it is on disk.
    pub(crate) fn precision(&self, id: ExpertId) -> Option<Precision> {
        self.on_disk.get(&id).map(|on_disk| on_disk.precision)
    }

    pub(crate) fn counts(&self) -> Counts {
        self.cache.counts()
    }

    /// How many experts are in memory.
    pub(crate) fn in_memory(&self) -> usize {
        self.held.len()
    }

    /// Bytes read from disk so far.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Opens a claim that needs nothing yet. It must be [released](Self::release).
    pub(crate) fn claim(&mut self) -> ClaimId {
        self.claims += 1;
        ClaimId(self.claims)
    }

    /// A batch begins.
    pub(crate) fn tick(&mut self) {
        self.cache.tick();
    }

    /// `claim` needs these experts now, in this order: pins them, and reads those that are not in memory.
    pub(crate) fn need(&mut self, claim: ClaimId, ids: &[ExpertId], sink: &mut dyn CacheSink) {
        self.cache.need(claim, ids.iter().copied());
        self.carry_out(sink);
    }

    /// `claim` will probably need these experts next, the likeliest first. They replace its former predictions.
    pub(crate) fn prefetch(&mut self, claim: ClaimId, ids: &[ExpertId], sink: &mut dyn CacheSink) {
        self.cache.prefetch(claim, ids.iter().copied());
        self.carry_out(sink);
    }

    /// The experts that `claim` needs and that are in memory, or the failure to read one of them.
    pub(crate) fn ready(&mut self, claim: ClaimId) -> Result<Vec<ExpertId>, OffloadError> {
        match self.failures.remove(&claim) {
            Some(failure) => Err(failure),
            None => Ok(self.cache.ready(claim)),
        }
    }

    /// Whether [`ready`](Self::ready) has anything to return.
    pub(crate) fn is_ready(&self, claim: ClaimId) -> bool {
        self.failures.contains_key(&claim) || !self.cache.ready(claim).is_empty()
    }

    /// `claim` has computed these experts, each for a share of its rows, and needs them no more.
    pub(crate) fn computed(&mut self, claim: ClaimId, ids: &[(ExpertId, f64)], sink: &mut dyn CacheSink) {
        for (id, share) in ids {
            self.cache.computed(claim, *id, *share);
        }
        self.carry_out(sink);
    }

    /// Ends `claim`.
    pub(crate) fn release(&mut self, claim: ClaimId, sink: &mut dyn CacheSink) {
        self.cache.release(claim);
        self.failures.remove(&claim);
        self.carry_out(sink);
    }

    /// Ends every claim.
    pub(crate) fn release_all(&mut self, sink: &mut dyn CacheSink) {
        for claim in self.cache.claims() {
            self.release(claim, sink);
        }
        self.failures.clear();
    }

    /// Ready when a load has come back, which [`settle`](Self::settle) takes in.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.seen.is_none() {
            match self.loaded.poll_recv(context) {
                Poll::Ready(loaded) => self.seen = loaded,
                Poll::Pending => return Poll::Pending,
            }
        }
        // The readers live as long as this driver, so the channel never closes.
        if self.seen.is_some() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Takes in all loads that have come back.
    pub(crate) fn settle(&mut self, sink: &mut dyn CacheSink) {
        while let Some(loaded) = self.seen.take().or_else(|| self.loaded.try_recv().ok()) {
            self.take_in(loaded, sink);
            self.carry_out(sink);
        }
    }

    fn take_in(&mut self, loaded: Loaded, sink: &mut dyn CacheSink) {
        let Loaded { id: load, buffer, result } = loaded;
        let Some(id) = self.loading.remove(&load) else { return };
        let failure = match result {
            Ok(bytes) => {
                self.bytes_read += bytes;
                match self.cache.arrived(load) {
                    Arrival::Kept(id) => return self.keep(id, buffer, sink),
                    Arrival::Discarded => return self.buffers.take_back(buffer),
                }
            }
            Err(ReadError::Abandoned) => None,
            Err(why) => Some(OffloadError::Read { id, why }),
        };
        self.buffers.take_back(buffer);
        let losers = self.cache.came_back(load, failure.is_some());
        if let Some(failure) = failure {
            tracing::warn!("{failure}");
            self.failures.extend(losers.into_iter().map(|claim| (claim, failure.clone())));
        }
    }

    /// Hands an expert that was loaded to the sink.
    fn keep(&mut self, id: ExpertId, buffer: Buffer, sink: &mut dyn CacheSink) {
        let on_disk = &self.on_disk[&id];
        let buffer = Arc::new(buffer);
        let tensors = on_disk.plan.tensors(&buffer);
        self.held.insert(id, buffer);
        if let Err(error) = sink.loaded(id, on_disk.precision, &tensors) {
            // The tensors were checked when the expert was added, and shapes do not change with the bytes.
            tracing::error!("{id}: {error}");
        }
    }

    fn carry_out(&mut self, sink: &mut dyn CacheSink) {
        loop {
            let effects = self.cache.effects();
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
                            self.cache.came_back(id, false);
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
                let losers = self.cache.came_back(load, true);
                self.failures.extend(losers.into_iter().map(|claim| (claim, failure.clone())));
            }
        }
    }
}
