//! A device and the thread that owns it, behind a handle.
//!
//! Owns [`Engine`] (cloneable) and [`Session`], and the accounting both share: what is held, what is reserved. All
//! tensors belong to one compute thread (`worker`); jobs reach it through a bounded channel and answers come back
//! through a oneshot, so async callers await and never compute, and sync callers use [`block_on`]. The invariant: the
//! tokens reserved by open sessions never exceed the pool, and the [`Ledger`] is known before anything is allocated.
//! An engine knows only its own experts.

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64, atomic::Ordering},
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
};

use tokio::sync::{mpsc, oneshot};

use crate::{
    checkpoint::Checkpoint,
    config::ModelConfig,
    decoder::{CHUNK_ROWS, DecodeError, Step, Want},
    device::{Device, DeviceError},
    experts::{Assembly, AssemblyError, ExpertCall},
    footprint::Footprint,
    layout::{self, ExpertId},
    slices::{Precision, blob::PartBlobs},
    tensors::{LoadError, Tensors},
    worker::{self, Job},
};

/// Jobs that may wait for the compute thread. Each may hold a chunk of rows, so the number bounds memory too.
const JOBS_MAX: usize = 16;

/// How an engine is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Tokens of KV cache all sessions together may reserve.
    pub kv_tokens: usize,
    /// Most rows of one expert call; a larger one is refused.
    pub rows_max: usize,
    /// Threads that compute, where the device is the CPU; 0 means one for each core this process may use.
    pub threads: usize,
    /// Run the compute thread below the priority of everything that answers in time.
    pub low_priority: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { kv_tokens: 4096, rows_max: CHUNK_ROWS, threads: 0, low_priority: false }
    }
}

/// Bytes an engine accounts for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Ledger {
    pub trunk_bytes: u64,
    pub expert_bytes: u64,
    /// The whole pool, in use or not.
    pub kv_bytes_reserved: u64,
    pub buffer_bytes: u64,
}

impl Ledger {
    pub fn total(&self) -> u64 {
        self.trunk_bytes + self.expert_bytes + self.kv_bytes_reserved + self.buffer_bytes
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
    Assembly(#[from] AssemblyError),
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

#[derive(Debug, Default)]
struct Accounts {
    trunk_bytes: u64,
    /// At which precision each expert is held, and its bytes.
    experts: BTreeMap<ExpertId, (Precision, u64)>,
    kv_tokens_used: usize,
}

/// What handles and the compute thread share besides the channel.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Arc<ModelConfig>,
    pub(crate) options: EngineOptions,
    accounts: Mutex<Accounts>,
    /// Sessions that were dropped and still have a cache.
    closed: Mutex<Vec<u64>>,
}

/// Nothing under these locks can panic half-way, so a poisoned one is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn take_closed(&self) -> Vec<u64> {
        std::mem::take(&mut lock(&self.closed))
    }

    pub(crate) fn trunk_loaded(&self, bytes: u64) {
        lock(&self.accounts).trunk_bytes = bytes;
    }

    pub(crate) fn expert_loaded(&self, id: ExpertId, precision: Precision, bytes: u64) {
        lock(&self.accounts).experts.insert(id, (precision, bytes));
    }

    pub(crate) fn expert_dropped(&self, id: ExpertId) {
        lock(&self.accounts).experts.remove(&id);
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
        let footprint = Arc::new(Footprint::of(&config, config.dtype));
        let shared = Arc::new(Shared { config, options, accounts: Mutex::default(), closed: Mutex::default() });
        let (jobs, queue) = mpsc::channel(JOBS_MAX);
        let resolved = device.resolve()?;
        let started = match worker::start(resolved, shared.clone(), queue) {
            Err(error) if device == Device::Auto && resolved != Device::Cpu => {
                tracing::warn!(%error, "{resolved} does not start; computing on the CPU");
                let (jobs, queue) = mpsc::channel(JOBS_MAX);
                (worker::start(Device::Cpu, shared.clone(), queue)?, jobs, Device::Cpu)
            }
            class => (class?, jobs, resolved),
        };
        let (class, jobs, device) = started;
        tracing::debug!(%device, class, "the compute thread runs");
        Ok(Self { shared, jobs, device, class: class.into(), footprint, next_session: Arc::default() })
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

    /// The experts held, and at which precision.
    pub fn held(&self) -> BTreeMap<ExpertId, Precision> {
        lock(&self.shared.accounts).experts.iter().map(|(id, (precision, _))| (*id, *precision)).collect()
    }

    /// Bytes accounted for now.
    pub fn memory(&self) -> Ledger {
        let accounts = lock(&self.shared.accounts);
        let options = &self.shared.options;
        Ledger {
            trunk_bytes: accounts.trunk_bytes,
            expert_bytes: accounts.experts.values().map(|(_, bytes)| bytes).sum(),
            kv_bytes_reserved: self.footprint.kv_bytes_per_token * options.kv_tokens as u64,
            buffer_bytes: self.footprint.buffer_bytes(options.rows_max.max(CHUNK_ROWS)),
        }
    }

    /// Tokens of KV cache that are free now.
    pub fn kv_tokens_free(&self) -> usize {
        self.shared.options.kv_tokens - lock(&self.shared.accounts).kv_tokens_used
    }

    /// Loads the trunk from the blobs of its parts: exact, base, or base and refine. Bytes are used in place on the CPU.
    pub async fn load_trunk(&self, parts: Vec<impl Into<PartBlobs>>) -> Result<(), EngineError> {
        let parts = parts.into_iter().enumerate();
        let parts = parts.map(|(index, blobs)| Tensors::parse_part(blobs.into(), &format!("trunk part {index}")));
        self.load_trunk_tensors(Tensors::merge(parts.collect::<Result<Vec<_>, _>>()?)?).await
    }

    /// Loads the trunk from tensors that lie somewhere already, such as a mapped checkpoint.
    pub async fn load_trunk_tensors(&self, tensors: Tensors) -> Result<(), EngineError> {
        self.ask(|reply| Job::LoadTrunk { tensors, reply }).await
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
    pub async fn open_session(&self, capacity_tokens: usize) -> Result<Session, EngineError> {
        let limit = self.shared.options.kv_tokens.min(self.config().max_position_embeddings);
        if capacity_tokens > limit {
            return Err(EngineError::TooLong { wanted: capacity_tokens, limit });
        }
        {
            let mut accounts = lock(&self.shared.accounts);
            let free = self.shared.options.kv_tokens - accounts.kv_tokens_used;
            if capacity_tokens > free {
                return Err(EngineError::Busy { wanted: capacity_tokens, free });
            }
            accounts.kv_tokens_used += capacity_tokens;
        }
        // From here on dropping the session gives the tokens back, also if opening it fails.
        let id = self.next_session.fetch_add(1, Ordering::Relaxed);
        let session = Session { engine: self.clone(), id, capacity: capacity_tokens };
        self.ask(|reply| Job::OpenSession { id, capacity: capacity_tokens, reply }).await?;
        Ok(session)
    }

    /// Runs experts of one layer: for each `(expert, row indices)` one f32 row of `hidden_size` per index, in call
    /// order. `rows` is `[n, hidden_size]`. Everything is checked: these bytes may be a peer's.
    pub async fn run_experts(
        &self,
        layer: u16,
        rows: Vec<f32>,
        calls: Vec<(u16, Vec<u32>)>,
    ) -> Result<Vec<f32>, EngineError> {
        self.check_call(layer, &rows, &calls)?;
        self.ask(|reply| Job::RunExperts { layer, rows, calls, reply }).await
    }

    /// Serves a decoder's whole call from experts held here, ready for [`Session::resume`].
    pub async fn serve(&self, call: &ExpertCall) -> Result<Vec<f32>, EngineError> {
        let calls: Vec<_> = call.by_expert().into_iter().collect();
        let outputs = self.run_experts(call.layer, call.rows.clone(), calls.clone()).await?;
        let mut outputs = outputs.as_slice();
        let mut assembly = Assembly::new(call);
        for (expert, rows) in &calls {
            let (mine, rest) = outputs.split_at(rows.len() * call.hidden);
            assembly.put(*expert, rows, mine)?;
            outputs = rest;
        }
        Ok(assembly.finish()?)
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

    pub(crate) async fn ask<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T, EngineError>>) -> Job,
    ) -> Result<T, EngineError> {
        let (reply, answer) = oneshot::channel();
        self.jobs.send(job(reply)).await.map_err(|_| EngineError::Stopped)?;
        answer.await.map_err(|_| EngineError::Stopped)?
    }
}

/// One sequence on an engine. Dropping it frees its cache.
#[derive(Debug)]
pub struct Session {
    engine: Engine,
    id: u64,
    capacity: usize,
}

impl Session {
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Tokens reserved.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Appends tokens and computes until experts are needed. See [`Decoder`](crate::decoder::Decoder).
    pub async fn advance(&mut self, tokens: &[u32], want: Want) -> Result<Step, EngineError> {
        let (session, tokens) = (self.id, tokens.to_vec());
        self.engine.ask(|reply| Job::Advance { session, tokens, want, reply }).await
    }

    /// Takes the awaited expert outputs, `[slots, hidden_size]` in route order, and computes on.
    pub async fn resume(&mut self, outputs: Vec<f32>) -> Result<Step, EngineError> {
        let session = self.id;
        self.engine.ask(|reply| Job::Resume { session, outputs, reply }).await
    }

    /// Appends tokens and computes to the logits with experts held here, without leaving the compute thread.
    ///
    /// The bits are those of [`advance`](Self::advance) and [`resume`](Self::resume). After an error the session is
    /// as before.
    pub async fn complete(&mut self, tokens: &[u32], want: Want) -> Result<Vec<f32>, EngineError> {
        let (session, tokens) = (self.id, tokens.to_vec());
        self.engine.ask(|reply| Job::Complete { session, tokens, want, reply }).await
    }

    /// Forgets all but the first `used` tokens, and any awaited experts.
    pub async fn truncate(&mut self, used: usize) -> Result<(), EngineError> {
        let session = self.id;
        self.engine.ask(|reply| Job::Truncate { session, used, reply }).await
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        lock(&self.engine.shared.closed).push(self.id);
        lock(&self.engine.shared.accounts).kv_tokens_used -= self.capacity;
        // A full queue needs no nudge: the thread sweeps before every job.
        let _ = self.engine.jobs.try_send(Job::Sweep);
    }
}

/// Runs a future to its end on this thread. For sync callers of an engine; not inside an async task.
pub fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}
