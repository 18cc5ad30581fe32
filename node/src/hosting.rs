//! Follows the placement: gets what this node was assigned, loads it, reports it ready; drops what it no longer holds.
//!
//! One pass ([`Hosting::step`]) goes as far as it can towards the current placement and says whether it arrived. It is
//! idempotent: after a restart, a lost peer or a new epoch the next pass starts from what is there.
//!
//! A node that was given more than its memory holds has its experts on disk and in memory by turns ([`paging`]); else they are loaded.
//!
//! Invariants: nothing is held unverified; nothing is reported ready before it is held, nor at another precision than it is
//! held at; what is dropped is dropped, and what is made smaller is made smaller, before anything is loaded in its place, so that
//! both budgets hold at every moment; an expert that is wanted at another precision is served at the old one until the new one
//! is loaded.

mod blobs;
mod disk;
mod experts;
pub mod loading;
mod paging;
mod report;
mod room;
mod slicing;

use std::sync::Arc;
use std::time::Duration;

use coel_model::engine::{Engine, EngineOptions};
use coel_store::{Command, ExpertId, Model, ModelId, Precision, State};
use futures::StreamExt;
use futures::stream;
use tokio::sync::Mutex;
use tracing::{Instrument, info, info_span, warn};

use blobs::Wanted;

use crate::config::Config;
use crate::experts::caller::{Caller, CallerHandles};
use crate::library::{Known, LibraryError, run_blocking};
use crate::shared::{Held, Serving, Shared};
use crate::size::Size;
use crate::weights::fetch::FetchError;

/// Experts fetched and loaded at once: enough to keep a link busy. Each takes memory only once that is free ([`loading`]).
pub const FETCHES: usize = 4;
/// Experts reported in one log entry at most, so that others can use the first while the last are on their way.
const REPORT_BATCH: usize = 32;
/// Pause before what failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// Passes that may fail for want of a source before it is called a problem: peers come and go.
const PATIENCE: u32 = 5;

/// The task's own state.
struct Hosting {
    shared: Arc<Shared>,
    /// Failed passes in a row.
    failures: u32,
    /// Held while a replica is exchanged for one of another precision. Both are in memory then: one such pair at a time.
    exchange: Mutex<()>,
    /// Held by whoever fetches and loads an expert while the disk has little room: what it replaces goes before the next comes.
    disk: Mutex<()>,
    /// Held while a part is sliced.
    slicing: Mutex<()>,
}

/// Why a pass stopped short.
#[derive(Debug, thiserror::Error)]
enum Setback {
    #[error(transparent)]
    Library(#[from] LibraryError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("{what} cannot be loaded: {why}")]
    Load { what: String, why: String },
    #[error(
        "{what} waits for room: with it {total} bytes would be taken of the {budget} that --memory gives; the placement was made \
         for a larger budget, and a new one is on its way while the mesh has a leader"
    )]
    Room { what: String, total: u64, budget: u64 },
    #[error("the log cannot be told what is ready: {0}")]
    Report(String),
}

impl Setback {
    /// Whether waiting is unlikely to mend it.
    fn lasts(&self) -> bool {
        match self {
            Self::Fetch(fetch) | Self::Library(LibraryError::Fetch(fetch)) => fetch.lasts(),
            Self::Load { .. } | Self::Room { .. } | Self::Library(LibraryError::Unusable(_)) => true,
            Self::Report(_) => false,
        }
    }
}

/// Follows the placement until the node stops.
pub async fn run(shared: Arc<Shared>) {
    let mut state = shared.log.state();
    let mut hosting = Hosting {
        shared: shared.clone(),
        failures: 0,
        exchange: Mutex::default(),
        disk: Mutex::default(),
        slicing: Mutex::default(),
    };
    loop {
        let now = state.borrow_and_update().clone();
        let epoch = now.epoch();
        let arrived = hosting.step(&now).instrument(info_span!("epoch", %epoch)).await;
        hosting.note(&arrived);
        let pause = if arrived.is_ok() { Duration::from_secs(30) } else { RETRY };
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(pause) => {}
        }
    }
}

impl Hosting {
    fn note(&mut self, arrived: &Result<(), Setback>) {
        match arrived {
            Ok(()) => {
                self.failures = 0;
                self.shared.progress.send_if_modified(|progress| progress.problem.take().is_some());
            }
            Err(setback) => {
                self.failures += 1;
                warn!(%setback, "trying again");
                if setback.lasts() || self.failures >= PATIENCE {
                    self.shared.progress.send_modify(|progress| progress.problem = Some(setback.to_string()));
                }
            }
        }
    }

    async fn step(&self, state: &State) -> Result<(), Setback> {
        let shared = &self.shared;
        let Some((model, registered)) = shared.model_to_place(state) else {
            return Ok(());
        };
        // After a restart the log still claims what was loaded before: taken back first, so that nobody asks in vain. Without a
        // leader that has to wait; loading does not.
        let retracted = self.retract().await;
        let running = shared.serving.borrow().clone();
        let serving = match running {
            Some(serving) => serving,
            None => match self.begin(state, model, registered).await? {
                Some(serving) => serving,
                None => return Ok(()),
            },
        };
        if serving.known.id != model {
            let why = "this node has loaded another model; restart it".into();
            return Err(Setback::Load { what: format!("the model {model}"), why });
        }
        let Some(placement) = state.placement.as_ref().filter(|placement| placement.model == model) else {
            return Ok(());
        };
        let node = shared.log.node_id();
        let assigned: Held = placement.of(node).map(|(expert, replica)| (expert, replica.precision)).collect();
        self.drop_all_but(&serving, &assigned).await?;
        self.make_disk_room(&serving.known, 0).await;
        self.count(&serving.known, &assigned);

        let paging = self.must_page(&serving, &assigned);
        if paging {
            self.drop_what_is_gone(&serving).await?;
            self.begin_shelf(state, &serving, &assigned).await?;
        }
        let held = shared.held.borrow().clone();
        let is_so = |expert: &ExpertId, precision: &Precision| {
            held.get(expert) == Some(precision) && self.is_shelved(*expert) == paging
        };
        let (smaller, other): (Vec<_>, Vec<_>) = assigned
            .iter()
            .filter(|(expert, precision)| !is_so(expert, precision))
            .map(|(&expert, &precision)| (expert, precision))
            .partition(|(expert, precision)| held.get(expert).is_some_and(|now| now > precision));
        let mut pass = Pass { paging, ..Pass::default() };
        let loads = !(smaller.is_empty() && other.is_empty());
        self.load_all(state, &serving, &assigned, smaller, &mut pass).await;
        self.load_all(state, &serving, &assigned, other, &mut pass).await;
        if loads {
            run_blocking(trim_heap).await;
        }
        self.end_shelf(&serving).await?;
        // Also what an earlier pass could not say, because the mesh was at another epoch by then.
        pass.claimed = self.claim().await;
        let (shared, known) = (self.shared.clone(), serving.known.clone());
        run_blocking(move || shared.look_for_all_of(&known)).await;
        pass.setback.map_or(retracted.and(pass.claimed), Err)
    }

    /// Gets and loads experts, and tells the log of them batch by batch.
    async fn load_all(
        &self,
        state: &State,
        serving: &Serving,
        assigned: &Held,
        experts: Vec<(ExpertId, Precision)>,
        pass: &mut Pass,
    ) {
        let each = experts
            .into_iter()
            .map(|(expert, precision)| self.get_expert(state, serving, expert, precision, pass.paging));
        let mut loads = stream::iter(each).buffer_unordered(FETCHES).ready_chunks(REPORT_BATCH);
        while let Some(loaded) = loads.next().await {
            pass.unclaimed += loaded.len();
            pass.setback = loaded.into_iter().find_map(Result::err).or(pass.setback.take());
            self.count(&serving.known, assigned);
            if pass.unclaimed >= REPORT_BATCH {
                pass.claimed = self.claim().await;
                pass.unclaimed = 0;
            }
        }
    }

    /// Gets to know the model, checks the budget, starts the engine and loads the trunk.
    async fn begin(&self, state: &State, model: ModelId, registered: &Model) -> Result<Option<Serving>, Setback> {
        let shared = &self.shared;
        let sources = shared.sources(state, model, None);
        let known = shared.library.get(model, registered, &shared.fetcher, &shared.blobs, &sources).await?;
        let kv_tokens = shared.config.kv_tokens;
        let memory = (shared.config.fixed_budget().1, shared.config.memory_bytes);
        // Said to others together with the trunk: who has everything needs no room to get it.
        let (looking, seen) = (shared.clone(), known.clone());
        run_blocking(move || looking.look_for_all_of(&seen)).await;
        let disk_bytes = shared.config.disk_bytes.filter(|_| !shared.complete.borrow().contains(&model));
        // Decided once: with other members around another choice may be better, but not worth loading it anew.
        let (accepted, nodes) = (shared.config.trunk, state.members.len());
        let decide = || known.trunk_precision(accepted, memory, disk_bytes, kv_tokens, nodes);
        let precision = shared.trunk.borrow().unwrap_or_else(decide);
        let name = &registered.name;
        let fits = check_budget(&known, name, &shared.config)
            .and_then(|()| room::check_beneath(&known, &shared.config, precision))
            .and_then(|()| {
                disk_bytes.map_or(Ok(()), |disk_bytes| room::check_disk(&known, name, disk_bytes, precision))
            });
        if let Err(short) = fits {
            let node = shared.log.node_id();
            if shared.newcomer && !shared.log.voters().contains(&node) {
                // It cannot be of any use, so it does not stay on as a member that never comes. Once it votes it must not go
                // like this: its vote could be the quorum's.
                self.propose(Command::Leave { node }).await?;
                shared.left.send_replace(true);
            }
            shared.fail(short);
            return Ok(None);
        }
        shared.trunk.send_replace(Some(precision));
        self.count(&known, &Held::new());
        let bytes = known.manifest.trunk_bytes(precision);
        let taken = shared.loading.take_anyway(bytes);
        let mut trunk = Vec::new();
        for part in &known.manifest.trunk {
            trunk.push(self.get(&Wanted::trunk(part, precision), state, model).await?);
            self.count(&known, &Held::new());
        }
        let options = EngineOptions {
            kv_tokens: known.kv_tokens(shared.config.kv_tokens),
            rows_max: known.rows_max(),
            low_priority: true,
            device_bytes: shared
                .config
                .beneath_bytes
                .map(|_| memory.0.saturating_sub(known.fixed_bytes(kv_tokens, precision))),
            ..EngineOptions::default()
        };
        let load = |why: String| Setback::Load { what: "the trunk".into(), why };
        let (device, config) = (shared.config.device, known.config.clone());
        let engine =
            run_blocking(move || Engine::start(device, config, options)).await.map_err(|e| load(e.to_string()))?;
        if let (Some(vram), coel_model::device::Device::Cpu) = (shared.config.vram_bytes, engine.device()) {
            let vram = Size(vram);
            shared.fail(format!(
                "--vram {vram}: the GPU does not start, see the log; mend that, or start without --vram"
            ));
            return Ok(None);
        }
        engine.load_trunk(trunk).await.map_err(|error| load(error.to_string()))?;
        drop(taken);
        engine.set_source(Arc::new(Caller::new(CallerHandles::new(shared))));
        info!(model = registered.name, device = engine.class(), trunk = %Size(bytes), %precision, "trunk loaded");
        let serving = Serving { known, engine, trunk: precision };
        shared.serving.send_replace(Some(serving.clone()));
        Ok(Some(serving))
    }
}

/// How far a pass has come.
struct Pass {
    /// Whether experts are held on disk.
    paging: bool,
    setback: Option<Setback>,
    /// Experts that were loaded and that the log has not been told of.
    unclaimed: usize,
    claimed: Result<(), Setback>,
}

impl Default for Pass {
    fn default() -> Self {
        Self { paging: false, setback: None, unclaimed: 0, claimed: Ok(()) }
    }
}

/// Whether the budget holds the fixed part of the model called `name`, its trunk at the fewest bits that are accepted.
///
/// # Errors
/// Both numbers and the remedy, in words.
pub fn check_budget(known: &Known, name: &str, config: &Config) -> Result<(), String> {
    let ((flag, bytes), kv_tokens) = (config.fixed_budget(), config.kv_tokens);
    let needed = known.fixed_bytes(kv_tokens, config.trunk.lowest());
    if bytes >= needed {
        return Ok(());
    }
    Err(format!(
        "the memory budget of {} ({bytes} bytes) is too small for the trunk of model '{name}': trunk, KV cache of {} tokens \
         and buffers need {} ({needed} bytes); raise {flag} or lower --kv-tokens",
        Size(bytes),
        known.kv_tokens(kv_tokens),
        Size(needed),
    ))
}

/// Gives back to the system what is free on the heap: its arenas, one for each of many threads, keep what work that is done has freed.
pub fn trim_heap() {
    // SAFETY: malloc_trim has no preconditions; it takes the locks it needs.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Resident memory of this process, in bytes; 0 where the system does not say.
pub fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    // SAFETY: sysconf has no preconditions.
    pages * unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(0) as u64
}
