//! A device and the thread that owns it, behind a handle.
//!
//! Owns [`Engine`], which is cloneable. All tensors belong to one compute thread (`worker`); jobs reach it through a
//! bounded queue and answers come back through a oneshot, so async callers await and never compute, and sync callers use
//! [`block_on`](super::block_on::block_on). The invariant: the [`Ledger`] is known before anything is allocated. An
//! engine knows only its own experts, and perhaps a source of others.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use coel_weights::{
    checkpoint::Checkpoint,
    config::ModelConfig,
    layout::{self, ExpertId},
    slices::{PartBlobs, Precision},
    tensors::Tensors,
};

pub use super::{
    block_on::block_on, error::EngineError, jobs::Computed, ledger::Ledger, options::EngineOptions, state::Activity,
};
use super::{
    device::Device,
    expert_source::ExpertSource,
    jobs::{Job, JobQueue, Lease, RemoteCall},
    pages::PageTable,
    scheduler::SessionId,
    session::Session,
    state::EngineState,
    worker,
};
use crate::{budget::footprint::Footprint, nn::batch::CHUNK_ROWS, offload::meter::OffloadStats};

/// A handle on a device's compute thread. The thread ends when the last handle and session are gone.
#[derive(Clone, Debug)]
pub struct Engine {
    queue: JobQueue,
    device: Device,
    class: Arc<str>,
    footprint: Arc<Footprint>,
    next_session: Arc<AtomicU64>,
}

impl Engine {
    /// Starts the compute thread of `device` and waits for its first computation (on a GPU this may take seconds).
    /// [`Device::Auto`] falls back to the CPU.
    pub fn start(device: Device, config: Arc<ModelConfig>, options: EngineOptions) -> Result<Self, EngineError> {
        let start = |device| {
            let device_expert_bytes = options.device_expert_bytes.filter(|_| device != Device::Cpu);
            let options = EngineOptions { device_expert_bytes, ..options.clone() };
            let (queue, jobs) = JobQueue::new(Arc::new(EngineState::new(config.clone(), options)));
            let class = worker::start(device, queue.state.clone(), jobs)?;
            tracing::debug!(%device, class, "the compute thread runs");
            Ok(Self::new(queue, device, &class))
        };
        let resolved = device.resolve()?;
        match start(resolved) {
            Err(error) if device == Device::Auto && resolved != Device::Cpu => {
                tracing::warn!(%error, "{resolved} does not start; computing on the CPU");
                start(Device::Cpu)
            }
            started => started,
        }
    }

    pub(crate) fn new(queue: JobQueue, device: Device, class: &str) -> Self {
        let config = &queue.state.config;
        let footprint = Arc::new(Footprint::of(config, config.dtype));
        Self { queue, device, class: class.into(), footprint, next_session: Arc::default() }
    }

    /// The device in use; never [`Device::Auto`].
    pub fn device(&self) -> Device {
        self.device
    }

    /// The kernel class: engines of one class give equal bits.
    pub fn class(&self) -> &str {
        &self.class
    }

    pub fn config(&self) -> &Arc<ModelConfig> {
        &self.queue.state.config
    }

    pub fn footprint(&self) -> &Footprint {
        &self.footprint
    }

    /// Whether the compute thread has ended, which while there are handles it does only by a fault of its own.
    pub fn is_stopped(&self) -> bool {
        self.queue.is_closed()
    }

    /// Why the compute thread has ended, if a fault ended it.
    pub fn fault(&self) -> Option<String> {
        self.queue.state.fault()
    }

    /// The experts held, in memory or on disk, and at which precision.
    pub fn held(&self) -> BTreeMap<ExpertId, Precision> {
        self.queue.state.accounts(|accounts| {
            let held = accounts.in_memory.iter().chain(&accounts.on_disk);
            held.map(|(id, (precision, _))| (*id, *precision)).collect()
        })
    }

    /// Bytes of all experts held, in memory or on disk.
    pub fn held_bytes(&self) -> u64 {
        self.queue.state.accounts(|accounts| {
            accounts.in_memory.values().chain(accounts.on_disk.values()).map(|(_, bytes)| bytes).sum()
        })
    }

    /// What offloading experts to disk and to the CPU has done, and how well experts were predicted.
    pub fn offload_stats(&self) -> OffloadStats {
        let state = &self.queue.state;
        let (on_disk, budget_bytes) = state.accounts(|accounts| (accounts.on_disk.len(), accounts.disk_cache_bytes));
        let mut stats = OffloadStats { on_disk, budget_bytes, ..state.meter.read() };
        stats.device.budget_bytes = state.options.device_expert_bytes.unwrap_or(0);
        stats
    }

    /// Bytes accounted for now.
    pub fn memory(&self) -> Ledger {
        let state = &self.queue.state;
        let (stats, options) = (state.meter.read(), &state.options);
        state.accounts(|accounts| {
            let disk_cache_bytes = if accounts.on_disk.is_empty() { 0 } else { accounts.disk_cache_bytes };
            let expert_bytes: u64 = accounts.in_memory.values().map(|(_, bytes)| bytes).sum();
            let disk_cache_bytes_reserved = disk_cache_bytes.max(stats.bytes_in_memory);
            let promoted_bytes = stats.device.bytes - stats.device.on_disk_bytes;
            let cpu_offload_bytes = expert_bytes.saturating_sub(promoted_bytes) + disk_cache_bytes_reserved;
            let kv_tokens = accounts.pages * accounts.page_tokens;
            Ledger {
                trunk_bytes: accounts.trunk_bytes.unwrap_or(0),
                expert_bytes,
                disk_cache_bytes_reserved,
                disk_cache_bytes_promoted: stats.device.on_disk_bytes,
                cpu_offload_bytes: if options.device_expert_bytes.is_some() { cpu_offload_bytes } else { 0 },
                kv_bytes_reserved: self.footprint.kv_bytes_per_token * kv_tokens as u64,
                buffer_bytes: self.footprint.buffer_bytes(options.rows_max.max(CHUNK_ROWS)),
            }
        })
    }

    /// Tokens of KV cache that are free now.
    pub fn kv_tokens_free(&self) -> usize {
        self.queue.state.accounts(|accounts| (accounts.pages - accounts.pages_used) * accounts.page_tokens)
    }

    /// What was done so far, and how full the pool is.
    pub fn activity(&self) -> Activity {
        let state = &self.queue.state;
        state.accounts(|accounts| state.activity.read(accounts.pages_used, accounts.pages))
    }

    /// Where to turn for experts that are not held here, from now on. Without a source they are [`EngineError::NotHeld`].
    pub fn set_source(&self, source: Arc<dyn ExpertSource>) {
        self.queue.state.set_source(source);
    }

    /// Loads the trunk from the blobs of its parts: exact, base, or base and refine. Bytes are used in place on the CPU.
    pub async fn load_trunk(&self, parts: Vec<impl Into<PartBlobs>>) -> Result<(), EngineError> {
        let parts = parts.into_iter().enumerate();
        let parts = parts.map(|(index, blobs)| Tensors::parse_part(blobs.into(), &format!("trunk part {index}")));
        self.load_trunk_tensors(Tensors::merge(parts.collect::<Result<Vec<_>, _>>()?)?).await
    }

    /// Loads the trunk from tensors that lie somewhere already, such as a mapped checkpoint.
    pub async fn load_trunk_tensors(&self, tensors: Tensors) -> Result<(), EngineError> {
        self.queue.ask(|reply| Job::LoadTrunk { tensors, embedding_on_disk: false, reply }).await
    }

    /// The same, but the embedding table stays in its files and is read row by row, unless it is the output head too.
    pub async fn load_trunk_without_embedding(&self, tensors: Tensors) -> Result<(), EngineError> {
        self.queue.ask(|reply| Job::LoadTrunk { tensors, embedding_on_disk: true, reply }).await
    }

    /// Loads expert `id` from its exact blob, its base blob, or base and refine; one already held is replaced.
    pub async fn load_expert(&self, id: ExpertId, blobs: impl Into<PartBlobs>) -> Result<(), EngineError> {
        let tensors = Tensors::parse_part(blobs.into(), &id.to_string())?;
        self.load_expert_tensors(id, tensors).await
    }

    /// Loads expert `id` from tensors that lie somewhere already.
    pub async fn load_expert_tensors(&self, id: ExpertId, tensors: Tensors) -> Result<(), EngineError> {
        self.check_expert(id)?;
        self.queue.ask(|reply| Job::LoadExpert { id, tensors, reply }).await
    }

    /// Holds expert `id` on disk: it comes to memory when it is needed, in turn with others ([`EngineOptions::disk_cache_bytes`]).
    /// The blobs must be whole files, [mapped sparsely](coel_weights::memory::WeightBytes::map_sparsely); they are not kept mapped.
    /// One held already, in whichever way, is replaced.
    pub async fn load_expert_on_disk(&self, id: ExpertId, blobs: impl Into<PartBlobs>) -> Result<(), EngineError> {
        let tensors = Tensors::parse_part(blobs.into(), &id.to_string())?;
        self.load_expert_tensors_on_disk(id, tensors).await
    }

    /// Holds expert `id` on disk, where its tensors lie in files.
    pub async fn load_expert_tensors_on_disk(&self, id: ExpertId, tensors: Tensors) -> Result<(), EngineError> {
        self.check_expert(id)?;
        self.queue.ask(|reply| Job::LoadExpertOnDisk { id, tensors, reply }).await
    }

    /// Gives experts on disk another budget of memory, and waits until they keep within it. More serves at once; of less, what is
    /// needed at the moment stays until it was computed: the [ledger](Self::memory) counts it until then. The wait ends early
    /// where yet another budget is set.
    pub async fn set_disk_cache_bytes(&self, bytes: u64) -> Result<(), EngineError> {
        self.queue.ask(|reply| Job::SetDiskCacheBytes { bytes, reply }).await
    }

    /// Loads everything a checkpoint has, in place.
    pub async fn load_checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), EngineError> {
        self.load_trunk_tensors(checkpoint.trunk()).await?;
        for id in layout::experts(checkpoint.config()) {
            self.load_expert_tensors(id, checkpoint.expert(id)).await?;
        }
        Ok(())
    }

    /// Forgets expert `id`; whether it was held.
    pub async fn drop_expert(&self, id: ExpertId) -> Result<bool, EngineError> {
        self.queue.ask(|reply| Job::DropExpert { id, reply }).await
    }

    /// Opens a session with room for `capacity_tokens`, reserved at once.
    ///
    /// [`EngineError::TooLong`] if it can never be had here, [`EngineError::Busy`] if not now.
    pub fn open_session(&self, capacity_tokens: usize) -> Result<Session, EngineError> {
        let table = self.queue.state.take_pages(capacity_tokens)?;
        Ok(self.session(table, capacity_tokens))
    }

    /// Opens a session as soon as others have ended that leave too little room for it.
    ///
    /// # Errors
    /// [`EngineError::TooLong`], or why the compute thread has ended.
    pub async fn open_session_when_free(&self, capacity_tokens: usize) -> Result<Session, EngineError> {
        let table = self.queue.state.take_pages_when_free(capacity_tokens).await?;
        Ok(self.session(table, capacity_tokens))
    }

    fn session(&self, table: PageTable, capacity_tokens: usize) -> Session {
        let id = SessionId(self.next_session.fetch_add(1, Ordering::Relaxed));
        let lease = Lease::new(self.queue.state.clone(), table);
        Session::new(self.queue.clone(), id, lease, capacity_tokens)
    }

    /// Runs experts of one layer: for each `(expert, row indices)` one f32 row of `hidden_size` per index, in call
    /// order. `rows` is `[n, hidden_size]`. Everything is checked: these bytes may be a peer's.
    pub async fn run_experts(
        &self,
        layer: u16,
        rows: Vec<f32>,
        calls: Vec<(u16, Vec<u32>)>,
    ) -> Result<Vec<f32>, EngineError> {
        Ok(self.compute_experts(layer, rows, calls).await?.outputs)
    }

    /// The same, and tells whether the CPU computed experts that the GPU does not hold.
    pub async fn compute_experts(
        &self,
        layer: u16,
        rows: Vec<f32>,
        calls: Vec<(u16, Vec<u32>)>,
    ) -> Result<Computed, EngineError> {
        self.check_call(layer, &rows, &calls)?;
        let call = RemoteCall { layer, rows, experts: calls };
        self.queue.ask(|reply| Job::RunExperts { call, reply }).await
    }

    fn check_expert(&self, id: ExpertId) -> Result<(), EngineError> {
        layout::has_expert(self.config(), id).then_some(()).ok_or(EngineError::NoSuchExpert(id))
    }

    fn check_call(&self, layer: u16, rows: &[f32], calls: &[(u16, Vec<u32>)]) -> Result<(), EngineError> {
        let config = self.config();
        let (hidden, rows_max) = (config.hidden_size, self.queue.state.options.rows_max);
        let malformed = |why: String| Err(EngineError::Call(why));
        if !rows.len().is_multiple_of(hidden) {
            return malformed(format!("{} values are no whole rows of {hidden}", rows.len()));
        }
        let n = rows.len() / hidden;
        if n > rows_max {
            return malformed(format!("{n} rows, at most {rows_max} are served at once"));
        }
        let mut pairs = 0;
        for (index, indices) in calls {
            self.check_expert(ExpertId { layer, index: *index })?;
            if let Some(row) = indices.iter().find(|row| **row as usize >= n) {
                return malformed(format!("row {row} of {n}"));
            }
            pairs += indices.len();
        }
        // Each row is routed to so many experts and no more: this bounds the answer's size.
        let pairs_max = n * config.num_experts_per_tok;
        if pairs > pairs_max {
            return malformed(format!("{pairs} outputs for {n} rows, at most {pairs_max} are routed"));
        }
        Ok(())
    }
}
