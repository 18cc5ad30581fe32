//! What an engine's handles and its compute thread share besides the channel.
//!
//! Owns [`EngineState`]: which experts are held, which pages belong to which session, what was counted, and why the
//! thread has ended if it has. The invariants: the pages of open sessions never exceed the pool; no lock is held across
//! an allocation of tensors or a wait. It owns no tensor.

use std::{
    collections::BTreeMap,
    fmt,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use coel_weights::{config::ModelConfig, layout::ExpertId, slices::Precision};
use tokio::sync::Notify;

use super::{
    error::EngineError,
    expert_source::ExpertSource,
    options::EngineOptions,
    pages::{PageTable, Pages, Short},
    scheduler::SessionId,
};
use crate::offload::meter::Meter;

/// What an engine has done, and how full it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Batches begun.
    pub batches: u64,
    /// Chunks of them, each of one session.
    pub chunks: u64,
    /// Rows of them.
    pub rows: u64,
    /// Requests of sessions that are in no batch.
    pub waiting: u64,
    pub pages_used: usize,
    pub pages: usize,
}

/// The part of it that the compute thread counts.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    batches: AtomicU64,
    chunks: AtomicU64,
    rows: AtomicU64,
    waiting: AtomicU64,
}

impl Counters {
    pub(crate) fn batch_begun(&self, chunks: usize, rows: usize) {
        self.batches.fetch_add(1, Ordering::Relaxed);
        self.chunks.fetch_add(chunks as u64, Ordering::Relaxed);
        self.rows.fetch_add(rows as u64, Ordering::Relaxed);
    }

    pub(crate) fn read(&self, pages_used: usize, pages: usize) -> Activity {
        Activity {
            batches: self.batches.load(Ordering::Relaxed),
            chunks: self.chunks.load(Ordering::Relaxed),
            rows: self.rows.load(Ordering::Relaxed),
            waiting: self.waiting.load(Ordering::Relaxed),
            pages_used,
            pages,
        }
    }

    pub(crate) fn set_waiting(&self, requests: usize) {
        self.waiting.store(requests as u64, Ordering::Relaxed);
    }
}

/// An expert that is held: at which precision, and its bytes.
pub(crate) type HeldExpert = (Precision, u64);

/// What is held and reserved.
#[derive(Clone, Debug)]
pub(crate) struct Accounts {
    /// Once the trunk is loaded.
    pub(crate) trunk_bytes: Option<u64>,
    /// Experts that are in memory for good.
    pub(crate) in_memory: BTreeMap<ExpertId, HeldExpert>,
    /// Experts that are on disk and take turns in memory.
    pub(crate) on_disk: BTreeMap<ExpertId, HeldExpert>,
    /// Memory that experts on disk take by turns, bytes.
    pub(crate) disk_cache_bytes: u64,
    /// Pages of the KV pool in all, pages in use, and tokens of a page.
    pub(crate) pages: usize,
    pub(crate) pages_used: usize,
    pub(crate) page_tokens: usize,
}

#[derive(Debug)]
struct Locked {
    accounts: Accounts,
    pages: Pages,
    /// Sessions that were dropped since the compute thread last asked.
    closed: Vec<SessionId>,
    /// The last panic of the compute thread that it survived.
    panicked: Option<String>,
    /// Why the compute thread has ended.
    fault: Option<String>,
}

pub(crate) struct EngineState {
    pub(crate) config: Arc<ModelConfig>,
    pub(crate) options: EngineOptions,
    pub(crate) activity: Counters,
    pub(crate) meter: Meter,
    locked: Mutex<Locked>,
    source: Mutex<Option<Arc<dyn ExpertSource>>>,
    /// Pages of a session are free, or the compute thread has ended.
    freed: Notify,
}

/// Each change under these locks is one assignment or one call that is atomic by itself, so a poisoned lock guards a
/// whole value.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EngineState {
    pub(crate) fn new(config: Arc<ModelConfig>, options: EngineOptions) -> Self {
        let pages = Pages::for_tokens(options.kv_tokens, options.page_tokens);
        let accounts = Accounts {
            trunk_bytes: None,
            in_memory: BTreeMap::new(),
            on_disk: BTreeMap::new(),
            disk_cache_bytes: options.disk_cache_bytes,
            pages: pages.total(),
            pages_used: 0,
            page_tokens: pages.page_tokens(),
        };
        let locked = Locked { accounts, pages, closed: Vec::new(), panicked: None, fault: None };
        let (activity, meter) = (Counters::default(), Meter::default());
        Self {
            config,
            options,
            activity,
            meter,
            locked: Mutex::new(locked),
            source: Mutex::default(),
            freed: Notify::new(),
        }
    }

    /// What is held and reserved at this moment.
    pub(crate) fn accounts<T>(&self, read: impl FnOnce(&Accounts) -> T) -> T {
        let locked = &mut *lock(&self.locked);
        locked.accounts.pages_used = locked.pages.used();
        read(&locked.accounts)
    }

    pub(crate) fn trunk_loaded(&self, bytes: u64) {
        lock(&self.locked).accounts.trunk_bytes = Some(bytes);
    }

    pub(crate) fn expert_loaded(&self, id: ExpertId, precision: Precision, bytes: u64) {
        let accounts = &mut lock(&self.locked).accounts;
        accounts.on_disk.remove(&id);
        accounts.in_memory.insert(id, (precision, bytes));
    }

    pub(crate) fn expert_on_disk(&self, id: ExpertId, precision: Precision, bytes: u64) {
        let accounts = &mut lock(&self.locked).accounts;
        accounts.in_memory.remove(&id);
        accounts.on_disk.insert(id, (precision, bytes));
    }

    pub(crate) fn expert_dropped(&self, id: ExpertId) {
        let accounts = &mut lock(&self.locked).accounts;
        accounts.in_memory.remove(&id);
        accounts.on_disk.remove(&id);
    }

    pub(crate) fn set_disk_cache_bytes(&self, bytes: u64) {
        lock(&self.locked).accounts.disk_cache_bytes = bytes;
    }

    /// Reserves pages for `tokens` tokens of one session.
    pub(crate) fn take_pages(&self, tokens: usize) -> Result<PageTable, EngineError> {
        let (wanted, context) = (tokens, self.config.max_position_embeddings);
        let locked = &mut *lock(&self.locked);
        if locked.accounts.trunk_bytes.is_none() {
            return Err(EngineError::NoTrunk);
        }
        if wanted > context {
            let pool = locked.pages.total() * locked.pages.page_tokens();
            return Err(EngineError::TooLong { wanted, limit: pool.min(context) });
        }
        locked.pages.take(wanted).map_err(|short| match short {
            Short::Ever { tokens } => EngineError::TooLong { wanted, limit: tokens.min(context) },
            Short::Now { tokens } => EngineError::Busy { wanted, free: tokens },
        })
    }

    pub(crate) fn give_pages_back(&self, table: PageTable) {
        lock(&self.locked).pages.give_back(table);
        self.freed.notify_waiters();
    }

    /// Like [`Self::take_pages`], but waits while sessions that will end hold them.
    pub(crate) async fn take_pages_when_free(&self, tokens: usize) -> Result<PageTable, EngineError> {
        loop {
            let mut freed = pin!(self.freed.notified());
            // Listens from now on: pages may come free while the pool is found full.
            freed.as_mut().enable();
            match self.take_pages(tokens) {
                Err(EngineError::Busy { .. }) if self.fault().is_none() => freed.await,
                Err(EngineError::Busy { .. }) => return Err(self.stopped()),
                taken => return taken,
            }
        }
    }

    pub(crate) fn session_closed(&self, session: SessionId) {
        lock(&self.locked).closed.push(session);
    }

    pub(crate) fn take_closed(&self) -> Vec<SessionId> {
        std::mem::take(&mut lock(&self.locked).closed)
    }

    pub(crate) fn set_source(&self, source: Arc<dyn ExpertSource>) {
        *lock(&self.source) = Some(source);
    }

    pub(crate) fn source(&self) -> Option<Arc<dyn ExpertSource>> {
        lock(&self.source).clone()
    }

    /// The compute thread survived a panic.
    pub(crate) fn set_panicked(&self, why: &str) {
        lock(&self.locked).panicked = Some(why.to_owned());
    }

    /// The compute thread ends for this reason.
    pub(crate) fn set_fault(&self, why: String) {
        lock(&self.locked).fault = Some(why);
        self.freed.notify_waiters();
    }

    pub(crate) fn fault(&self) -> Option<String> {
        lock(&self.locked).fault.clone()
    }

    /// Why a job could not be handed over.
    pub(crate) fn stopped(&self) -> EngineError {
        self.fault().map_or(EngineError::Stopped, EngineError::Failed)
    }

    /// Why a job that was handed over got no answer. A thread drops a reply only when it panics; the asker may hear of that
    /// before the thread has noted why.
    pub(crate) fn unanswered(&self) -> EngineError {
        let locked = lock(&self.locked);
        match (&locked.fault, &locked.panicked) {
            (Some(why), _) => EngineError::Failed(why.clone()),
            (None, Some(why)) => EngineError::Panicked(why.clone()),
            (None, None) => EngineError::Panicked("see the log".to_owned()),
        }
    }
}

impl fmt::Debug for EngineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineState").field("options", &self.options).finish_non_exhaustive()
    }
}
