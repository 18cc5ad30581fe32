//! A device and the thread that owns it, behind a handle.
//!
//! Owns [`Engine`] (cloneable) and the accounting that handles and thread share: what is held, which pages are whose, how
//! much is done. All tensors belong to one compute thread (`worker`); jobs reach it through a bounded channel and
//! answers come back through a oneshot, so async callers await and never compute, and sync callers use [`block_on`]. The
//! invariant: the pages of open sessions never exceed the pool, and the [`Ledger`] is known before anything is
//! allocated. An engine knows only its own experts, and perhaps a source of others.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::{mpsc, oneshot};

pub use crate::{block::block_on, duties::Computed, ledger::Ledger};
use crate::{
    checkpoint::Checkpoint,
    config::ModelConfig,
    decoder::{CHUNK_ROWS, DecodeError},
    device::{Device, DeviceError},
    duties::Call,
    footprint::Footprint,
    layout::{self, ExpertId},
    pages::{PAGE_TOKENS, PageTable, Pages, Short},
    scheduler::SessionId,
    session::{Lease, Session},
    slices::{Precision, blob::PartBlobs},
    source::{ExpertSource, SourceError},
    tensors::{LoadError, Tensors},
    tiers::{
        ReadError, TierError,
        meter::{Meter, TierStats},
        predict::Predictor,
    },
    worker::{self, Job},
};

/// Jobs that may wait for the compute thread. Each may hold a chunk of rows, so the number bounds memory too.
pub(crate) const JOBS_MAX: usize = 16;

/// How an engine is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Tokens of KV cache all sessions together may reserve; rounded up to whole pages.
    pub kv_tokens: usize,
    /// Tokens of a page. It changes no result.
    pub page_tokens: usize,
    /// Most rows of one expert call; a larger one is refused.
    pub rows_max: usize,
    /// Threads that compute, where the device is the CPU, or the CPU takes part; 0 means one for each core this process may use.
    pub threads: usize,
    /// Run the compute thread below the priority of everything that answers in time.
    pub low_priority: bool,
    /// Bytes of a device's own memory that experts may take; the others are in host memory beneath, and computed there
    /// unless they are worth moving. Without it all are on the device. A CPU has no memory of its own: there it means nothing.
    pub device_bytes: Option<u64>,
    /// Memory that experts on disk take by turns, bytes; without it none can be kept there. [`Engine::set_tier_bytes`] changes it.
    pub tier_bytes: u64,
    /// Threads that read them.
    pub readers: usize,
    /// How it is known beforehand what a layer will need of them.
    pub predictor: Predictor,
    /// Predict for all rows and count how well, also where nothing is on disk.
    pub foresee: bool,
}

/// Reading threads by default. Disks that are at their best with more are given more by whoever knows them.
const READERS: usize = 2;

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            kv_tokens: 4096,
            page_tokens: PAGE_TOKENS,
            rows_max: CHUNK_ROWS,
            threads: 0,
            low_priority: false,
            device_bytes: None,
            tier_bytes: 0,
            readers: READERS,
            predictor: Predictor::default(),
            foresee: false,
        }
    }
}

/// Why an engine refused or failed a job.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Tier(#[from] TierError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("{0} is not held here")]
    NotHeld(ExpertId),
    #[error("{0} does not exist in this model")]
    NoSuchExpert(ExpertId),
    #[error("the trunk is not loaded")]
    NoTrunk,
    #[error("the trunk is already loaded")]
    TrunkLoaded,
    #[error("{wanted} tokens of cache are wanted and {free} are free now; try again when a request has ended")]
    Busy { wanted: usize, free: usize },
    #[error("{wanted} tokens of cache are wanted, but at most {limit} can be had here (context and KV pool)")]
    TooLong { wanted: usize, limit: usize },
    #[error("a malformed expert call: {0}")]
    Call(String),
    #[error("the compute thread cannot be started: {0}")]
    Start(String),
    #[error("the compute thread has stopped")]
    Stopped,
}

/// What an engine has done, and how full it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Flights begun: batches that went through the layers together.
    pub flights: u64,
    /// Parts of them, each of one session.
    pub parts: u64,
    /// Rows of them.
    pub rows: u64,
    /// Requests of sessions that are in no flight.
    pub waiting: u64,
    pub pages_used: usize,
    pub pages: usize,
}

/// The part of it that the compute thread counts.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    flights: AtomicU64,
    parts: AtomicU64,
    rows: AtomicU64,
    waiting: AtomicU64,
}

impl Counters {
    pub(crate) fn took_off(&self, parts: usize, rows: usize) {
        self.flights.fetch_add(1, Ordering::Relaxed);
        self.parts.fetch_add(parts as u64, Ordering::Relaxed);
        self.rows.fetch_add(rows as u64, Ordering::Relaxed);
    }

    pub(crate) fn waiting(&self, requests: usize) {
        self.waiting.store(requests as u64, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Accounts {
    /// Once the trunk is loaded.
    trunk_bytes: Option<u64>,
    /// At which precision each expert is held, and its bytes.
    experts: BTreeMap<ExpertId, (Precision, u64)>,
    /// The same of those on disk.
    shelved: BTreeMap<ExpertId, (Precision, u64)>,
    pages: Pages,
    /// Budget of memory of those on disk.
    tier_bytes: u64,
}

/// What handles and the compute thread share besides the channel.
pub(crate) struct Shared {
    pub(crate) config: Arc<ModelConfig>,
    pub(crate) options: EngineOptions,
    pub(crate) activity: Counters,
    pub(crate) meter: Meter,
    accounts: Mutex<Accounts>,
    /// Sessions that were dropped.
    closed: Mutex<Vec<SessionId>>,
    source: Mutex<Option<Arc<dyn ExpertSource>>>,
}

/// Nothing under these locks can panic half-way, so a poisoned one is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(config: Arc<ModelConfig>, options: EngineOptions) -> Self {
        let pages = Pages::for_tokens(options.kv_tokens, options.page_tokens);
        let tier_bytes = options.tier_bytes;
        let accounts = Mutex::new(Accounts {
            trunk_bytes: None,
            experts: BTreeMap::new(),
            shelved: BTreeMap::new(),
            pages,
            tier_bytes,
        });
        let (activity, meter) = (Counters::default(), Meter::default());
        Self { config, options, activity, meter, accounts, closed: Mutex::default(), source: Mutex::default() }
    }

    pub(crate) fn take_closed(&self) -> Vec<SessionId> {
        std::mem::take(&mut lock(&self.closed))
    }

    pub(crate) fn trunk_loaded(&self, bytes: u64) {
        lock(&self.accounts).trunk_bytes = Some(bytes);
    }

    pub(crate) fn expert_loaded(&self, id: ExpertId, precision: Precision, bytes: u64) {
        let accounts = &mut *lock(&self.accounts);
        accounts.shelved.remove(&id);
        accounts.experts.insert(id, (precision, bytes));
    }

    pub(crate) fn expert_shelved(&self, id: ExpertId, precision: Precision, bytes: u64) {
        let accounts = &mut *lock(&self.accounts);
        accounts.experts.remove(&id);
        accounts.shelved.insert(id, (precision, bytes));
    }

    pub(crate) fn tier_bytes(&self) -> u64 {
        lock(&self.accounts).tier_bytes
    }

    pub(crate) fn set_tier_bytes(&self, bytes: u64) {
        lock(&self.accounts).tier_bytes = bytes;
    }

    pub(crate) fn expert_dropped(&self, id: ExpertId) {
        let accounts = &mut *lock(&self.accounts);
        accounts.experts.remove(&id);
        accounts.shelved.remove(&id);
    }

    /// Pages, and tokens of each.
    pub(crate) fn pool_size(&self) -> (usize, usize) {
        let pages = &lock(&self.accounts).pages;
        (pages.total(), pages.page_tokens())
    }

    pub(crate) fn pages_back(&self, table: PageTable) {
        lock(&self.accounts).pages.give_back(table);
    }

    pub(crate) fn source(&self) -> Option<Arc<dyn ExpertSource>> {
        lock(&self.source).clone()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("options", &self.options).finish_non_exhaustive()
    }
}

/// A handle on a device's compute thread. The thread ends when the last handle and session are gone.
#[derive(Clone, Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Job>,
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
            let device_bytes = options.device_bytes.filter(|_| device != Device::Cpu);
            let shared = Arc::new(Shared::new(config.clone(), EngineOptions { device_bytes, ..options.clone() }));
            let (jobs, queue) = mpsc::channel(JOBS_MAX);
            let class = worker::start(device, shared.clone(), queue)?;
            tracing::debug!(%device, class, "the compute thread runs");
            Ok(Self::new(shared, jobs, device, &class))
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

    pub(crate) fn new(shared: Arc<Shared>, jobs: mpsc::Sender<Job>, device: Device, class: &str) -> Self {
        let footprint = Arc::new(Footprint::of(&shared.config, shared.config.dtype));
        Self { shared, jobs, device, class: class.into(), footprint, next_session: Arc::default() }
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
        &self.shared.config
    }

    pub fn footprint(&self) -> &Footprint {
        &self.footprint
    }

    /// Whether the compute thread has ended, which while there are handles it does only by a fault of its own.
    pub fn is_stopped(&self) -> bool {
        self.jobs.is_closed()
    }

    /// The experts held, in memory or on disk, and at which precision.
    pub fn held(&self) -> BTreeMap<ExpertId, Precision> {
        let accounts = lock(&self.shared.accounts);
        accounts.experts.iter().chain(&accounts.shelved).map(|(id, (precision, _))| (*id, *precision)).collect()
    }

    /// Bytes of all experts held, in memory or on disk.
    pub fn held_bytes(&self) -> u64 {
        let accounts = lock(&self.shared.accounts);
        accounts.experts.values().chain(accounts.shelved.values()).map(|(_, bytes)| bytes).sum()
    }

    /// What came of keeping experts on disk, and of predicting them.
    pub fn tiers(&self) -> TierStats {
        let (shelved, budget_bytes) = {
            let accounts = lock(&self.shared.accounts);
            (accounts.shelved.len(), accounts.tier_bytes)
        };
        let mut stats = TierStats { shelved, budget_bytes, ..self.shared.meter.read() };
        stats.device.budget_bytes = self.shared.options.device_bytes.unwrap_or(0);
        stats
    }

    /// Bytes accounted for now.
    pub fn memory(&self) -> Ledger {
        let accounts = lock(&self.shared.accounts);
        let options = &self.shared.options;
        let tier_bytes: u64 = if accounts.shelved.is_empty() { 0 } else { accounts.tier_bytes };
        let kv_tokens = accounts.pages.total() * accounts.pages.page_tokens();
        let stats = self.shared.meter.read();
        let expert_bytes: u64 = accounts.experts.values().map(|(_, bytes)| bytes).sum();
        let tier_bytes_reserved = tier_bytes.max(stats.bytes_in_memory);
        let raised_bytes = stats.device.bytes - stats.device.shelved_bytes;
        let beneath_bytes = expert_bytes.saturating_sub(raised_bytes) + tier_bytes_reserved;
        Ledger {
            trunk_bytes: accounts.trunk_bytes.unwrap_or(0),
            expert_bytes,
            tier_bytes_reserved,
            tier_bytes_raised: stats.device.shelved_bytes,
            beneath_bytes: if options.device_bytes.is_some() { beneath_bytes } else { 0 },
            kv_bytes_reserved: self.footprint.kv_bytes_per_token * kv_tokens as u64,
            buffer_bytes: self.footprint.buffer_bytes(options.rows_max.max(CHUNK_ROWS)),
        }
    }

    /// Tokens of KV cache that are free now.
    pub fn kv_tokens_free(&self) -> usize {
        let pages = &lock(&self.shared.accounts).pages;
        pages.free() * pages.page_tokens()
    }

    /// What was done so far, and how full the pool is.
    pub fn activity(&self) -> Activity {
        let counted = &self.shared.activity;
        let pages = &lock(&self.shared.accounts).pages;
        Activity {
            flights: counted.flights.load(Ordering::Relaxed),
            parts: counted.parts.load(Ordering::Relaxed),
            rows: counted.rows.load(Ordering::Relaxed),
            waiting: counted.waiting.load(Ordering::Relaxed),
            pages_used: pages.used(),
            pages: pages.total(),
        }
    }

    /// Where to turn for experts that are not held here, from now on. Without a source they are [`EngineError::NotHeld`].
    pub fn set_source(&self, source: Arc<dyn ExpertSource>) {
        *lock(&self.shared.source) = Some(source);
    }

    /// Loads the trunk from the blobs of its parts: exact, base, or base and refine. Bytes are used in place on the CPU.
    pub async fn load_trunk(&self, parts: Vec<impl Into<PartBlobs>>) -> Result<(), EngineError> {
        let parts = parts.into_iter().enumerate();
        let parts = parts.map(|(index, blobs)| Tensors::parse_part(blobs.into(), &format!("trunk part {index}")));
        self.load_trunk_tensors(Tensors::merge(parts.collect::<Result<Vec<_>, _>>()?)?).await
    }

    /// Loads the trunk from tensors that lie somewhere already, such as a mapped checkpoint.
    pub async fn load_trunk_tensors(&self, tensors: Tensors) -> Result<(), EngineError> {
        self.ask(|reply| Job::LoadTrunk { tensors, embedding_on_disk: false, reply }).await
    }

    /// The same, but the embedding table stays in its files and is read row by row, unless it is the output head too.
    pub async fn load_trunk_without_embedding(&self, tensors: Tensors) -> Result<(), EngineError> {
        self.ask(|reply| Job::LoadTrunk { tensors, embedding_on_disk: true, reply }).await
    }

    /// Loads expert `id` from its exact blob, its base blob, or base and refine; one already held is replaced.
    pub async fn load_expert(&self, id: ExpertId, blobs: impl Into<PartBlobs>) -> Result<(), EngineError> {
        let tensors = Tensors::parse_part(blobs.into(), &id.to_string())?;
        self.load_expert_tensors(id, tensors).await
    }

    /// Loads expert `id` from tensors that lie somewhere already.
    pub async fn load_expert_tensors(&self, id: ExpertId, tensors: Tensors) -> Result<(), EngineError> {
        self.check_expert(id)?;
        self.ask(|reply| Job::LoadExpert { id, tensors, reply }).await
    }

    /// Holds expert `id` on disk: it comes to memory when it is needed, in turn with others ([`EngineOptions::tier_bytes`]).
    /// The blobs must be whole files, [mapped sparsely](crate::bytes::WeightBytes::map_sparsely); they are not kept mapped.
    /// One held already, in whichever way, is replaced.
    pub async fn shelve_expert(&self, id: ExpertId, blobs: impl Into<PartBlobs>) -> Result<(), EngineError> {
        let tensors = Tensors::parse_part(blobs.into(), &id.to_string())?;
        self.shelve_expert_tensors(id, tensors).await
    }

    /// Holds expert `id` on disk, where its tensors lie in files.
    pub async fn shelve_expert_tensors(&self, id: ExpertId, tensors: Tensors) -> Result<(), EngineError> {
        self.check_expert(id)?;
        self.ask(|reply| Job::ShelveExpert { id, tensors, reply }).await
    }

    /// Gives experts on disk another budget of memory. More serves at once; of less, what is needed at the moment stays until it was
    /// computed: the [ledger](Self::memory) counts it until then.
    pub async fn set_tier_bytes(&self, bytes: u64) -> Result<(), EngineError> {
        self.ask(|reply| Job::TierBytes { bytes, reply }).await
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
        self.ask(|reply| Job::DropExpert { id, reply }).await
    }

    /// Opens a session with room for `capacity_tokens`, reserved at once.
    ///
    /// [`EngineError::TooLong`] if it can never be had here, [`EngineError::Busy`] if not now.
    pub fn open_session(&self, capacity_tokens: usize) -> Result<Session, EngineError> {
        let (wanted, context) = (capacity_tokens, self.config().max_position_embeddings);
        let table = {
            let mut accounts = lock(&self.shared.accounts);
            if accounts.trunk_bytes.is_none() {
                return Err(EngineError::NoTrunk);
            }
            let pool = accounts.pages.total() * accounts.pages.page_tokens();
            if wanted > context {
                return Err(EngineError::TooLong { wanted, limit: pool.min(context) });
            }
            accounts.pages.take(wanted).map_err(|short| match short {
                Short::Ever { tokens } => EngineError::TooLong { wanted, limit: tokens.min(context) },
                Short::Now { tokens } => EngineError::Busy { wanted, free: tokens },
            })?
        };
        let id = SessionId(self.next_session.fetch_add(1, Ordering::Relaxed));
        Ok(Session::new(self.clone(), id, Lease::new(self.shared.clone(), table), capacity_tokens))
    }

    /// A session was dropped.
    pub(crate) fn closed(&self, session: SessionId) {
        lock(&self.shared.closed).push(session);
        // A full queue needs no nudge: the thread looks before every turn.
        let _ = self.jobs.try_send(Job::Sweep);
    }

    /// Runs experts of one layer: for each `(expert, row indices)` one f32 row of `hidden_size` per index, in call
    /// order. `rows` is `[n, hidden_size]`. Everything is checked: these bytes may be a peer's.
    pub async fn run_experts(
        &self,
        layer: u16,
        rows: Vec<f32>,
        calls: Vec<(u16, Vec<u32>)>,
    ) -> Result<Vec<f32>, EngineError> {
        Ok(self.run_experts_telling(layer, rows, calls).await?.outputs)
    }

    /// The same, and tells whether the host took part beneath a device.
    pub async fn run_experts_telling(
        &self,
        layer: u16,
        rows: Vec<f32>,
        calls: Vec<(u16, Vec<u32>)>,
    ) -> Result<Computed, EngineError> {
        self.check_call(layer, &rows, &calls)?;
        self.ask(|reply| Job::RunExperts(Call { layer, rows, calls, reply })).await
    }

    fn check_expert(&self, id: ExpertId) -> Result<(), EngineError> {
        layout::has_expert(self.config(), id).then_some(()).ok_or(EngineError::NoSuchExpert(id))
    }

    fn check_call(&self, layer: u16, rows: &[f32], calls: &[(u16, Vec<u32>)]) -> Result<(), EngineError> {
        let config = self.config();
        let (hidden, rows_max) = (config.hidden_size, self.shared.options.rows_max);
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

    pub(crate) async fn send(&self, job: Job) -> Result<(), EngineError> {
        self.jobs.send(job).await.map_err(|_| EngineError::Stopped)
    }

    pub(crate) async fn ask<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T, EngineError>>) -> Job,
    ) -> Result<T, EngineError> {
        let (reply, answer) = oneshot::channel();
        self.send(job(reply)).await?;
        answer.await.map_err(|_| EngineError::Stopped)?
    }
}
