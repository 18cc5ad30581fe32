//! Follows the placement: gets what this node was assigned, loads it, reports it ready; drops what it no longer holds.
//!
//! One pass ([`Hosting::step`]) goes as far as it can towards the current placement and says whether it arrived. It is
//! idempotent: after a restart, a lost peer or a new epoch the next pass starts from what is there.
//!
//! Invariants: nothing is loaded unverified; nothing is reported ready before it is loaded; what is dropped is dropped before
//! anything is loaded in its place, so that the budget holds at every moment.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use coel_model::bytes::WeightBytes;
use coel_model::engine::{Engine, EngineOptions};
use coel_store::{BlobEntry, BlobError, BlobId, Command, ExpertId, Model, ModelId, Outcome, State};
use futures::StreamExt;
use futures::stream;
use tracing::{Instrument, info, info_span, warn};

use crate::ids;
use crate::library::{Known, LibraryError, run_blocking};
use crate::mesh::PROPOSE_DEADLINE;
use crate::shared::{Serving, Shared};
use crate::size::Size;
use crate::weights::fetch::FetchError;

/// Blobs fetched and loaded at once: enough to keep a link busy, few enough to stay within the memory slack.
const FETCHES: usize = 4;
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
    /// Blobs that were found damaged here and have not been replaced yet, with what was wrong: the damaged copy is removed to
    /// make room for a good one, and the reason must outlive it.
    damaged: Mutex<BTreeMap<BlobId, String>>,
}

/// Why a pass stopped short.
#[derive(Debug, thiserror::Error)]
enum Setback {
    #[error(transparent)]
    Library(#[from] LibraryError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("{what} on this node's disk is unusable ({fault}) and no peer could replace it: {fetch}")]
    Lost { what: String, fault: String, fetch: FetchError },
    #[error("{what}: {source}")]
    Store { what: String, source: BlobError },
    #[error("{what} cannot be loaded: {why}")]
    Load { what: String, why: String },
    #[error("the log cannot be told what is ready: {0}")]
    Report(String),
}

impl Setback {
    /// Whether waiting is unlikely to mend it.
    fn lasts(&self) -> bool {
        match self {
            Self::Fetch(fetch) | Self::Library(LibraryError::Fetch(fetch)) => fetch.is_corrupt(),
            Self::Lost { .. } | Self::Load { .. } | Self::Library(LibraryError::Unusable(_)) => true,
            Self::Store { .. } | Self::Library(LibraryError::Store { .. }) => true,
            Self::Report(_) => false,
        }
    }
}

/// Follows the placement until the node stops.
pub async fn run(shared: Arc<Shared>) {
    let mut state = shared.log.state();
    let mut hosting = Hosting { shared: shared.clone(), failures: 0, damaged: Mutex::default() };
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
        let running = shared.serving.borrow().clone();
        let serving = match running {
            Some(serving) => serving,
            None => match self.begin(state, model, registered).await? {
                Some(serving) => serving,
                None => return Ok(()),
            },
        };
        let node = shared.log.node_id();
        let Some(placement) = state.placement.as_ref().filter(|placement| placement.model == model) else {
            return Ok(());
        };
        let assigned: BTreeSet<ExpertId> = placement.of(node).map(|(expert, _)| expert).collect();
        self.drop_all_but(&serving, &assigned).await?;
        self.count(&serving.known, &assigned);

        // After a restart the log still claims what was loaded before: taken back first, so that nobody asks in vain. Without a
        // leader that has to wait; loading does not.
        let mut report = self.report().await;
        let held = shared.held.borrow().clone();
        let missing: Vec<_> = assigned.difference(&held).copied().collect();
        let mut loads = stream::iter(missing.into_iter().map(|expert| self.get_expert(state, &serving, expert)))
            .buffer_unordered(FETCHES)
            .ready_chunks(REPORT_BATCH);
        let mut setback = None;
        let mut unreported = 0;
        while let Some(loaded) = loads.next().await {
            unreported += loaded.len();
            setback = loaded.into_iter().find_map(Result::err).or(setback);
            self.count(&serving.known, &assigned);
            // A new epoch may have other plans; what is loaded stays loaded and is sorted out there.
            if shared.log.state().borrow().epoch() != placement.epoch {
                return Ok(());
            }
            if unreported >= REPORT_BATCH {
                report = self.report().await;
                unreported = 0;
            }
        }
        if unreported > 0 {
            report = self.report().await;
        }
        let (shared, known) = (self.shared.clone(), serving.known.clone());
        run_blocking(move || shared.look_for_all_of(&known)).await;
        setback.map_or(report, Err)
    }

    /// Gets to know the model, checks the budget, starts the engine and loads the trunk.
    async fn begin(&self, state: &State, model: ModelId, registered: &Model) -> Result<Option<Serving>, Setback> {
        let shared = &self.shared;
        let sources = shared.sources(state, model, None);
        let known = shared.library.get(model, registered, &shared.fetcher, &shared.blobs, &sources).await?;
        if let Err(short) = check_budget(&known, shared.config.memory_bytes, shared.config.kv_tokens) {
            if shared.newcomer {
                // It cannot be of any use, so it does not stay on as a member that never comes.
                self.propose(Command::Leave { node: shared.log.node_id() }).await?;
                shared.left.send_replace(true);
            }
            shared.fail(short);
            return Ok(None);
        }
        self.count(&known, &BTreeSet::new());
        let mut trunk = Vec::new();
        for part in &known.manifest.trunk {
            let what = format!("the trunk part {}", part.name);
            trunk.push(self.get(&what, &part.blob, state, model, None).await?);
            self.count(&known, &BTreeSet::new());
        }
        let options = EngineOptions {
            kv_tokens: known.kv_tokens(shared.config.kv_tokens),
            rows_max: known.rows_max(),
            low_priority: true,
        };
        let load = |why: String| Setback::Load { what: "the trunk".into(), why };
        let (device, config) = (shared.config.device, known.config.clone());
        let engine =
            run_blocking(move || Engine::start(device, config, options)).await.map_err(|e| load(e.to_string()))?;
        engine.load_trunk(trunk).await.map_err(|error| load(error.to_string()))?;
        info!(model = registered.name, device = engine.class(), trunk = %Size(known.manifest.trunk_bytes()), "trunk loaded");
        let serving = Serving { known, engine };
        shared.serving.send_replace(Some(serving.clone()));
        Ok(Some(serving))
    }

    async fn get_expert(&self, state: &State, serving: &Serving, expert: ExpertId) -> Result<ExpertId, Setback> {
        let what = format!("expert {expert}");
        let load = |why: String| Setback::Load { what: what.clone(), why };
        let known = &serving.known;
        let blob = known.expert(expert).ok_or_else(|| load("the manifest does not have it".into()))?;
        let bytes = self.get(&what, blob, state, known.id, Some(expert)).await?;
        serving.engine.load_expert(ids::to_model(expert), bytes).await.map_err(|error| load(error.to_string()))?;
        self.shared.held.send_modify(|held| {
            Arc::make_mut(held).insert(expert);
        });
        Ok(expert)
    }

    /// A blob's verified bytes: from this node's disk, or else from peers. A copy that was damaged on disk is replaced.
    async fn get(
        &self,
        what: &str,
        entry: &BlobEntry,
        state: &State,
        model: ModelId,
        expert: Option<ExpertId>,
    ) -> Result<WeightBytes, Setback> {
        let shared = &self.shared;
        if shared.blobs.has(&entry.id) {
            match self.read(entry).await {
                Ok(bytes) => return Ok(bytes),
                Err(fault) if !fault.is_damage() => {
                    return Err(Setback::Store { what: what.into(), source: fault });
                }
                Err(fault) => {
                    warn!(what, %fault, "a stored blob is damaged; fetching it anew");
                    self.damaged().insert(entry.id, fault.to_string());
                    let (blobs, id) = (shared.blobs.clone(), entry.id);
                    let removed = run_blocking(move || blobs.remove(&id)).await;
                    removed.map_err(|source| Setback::Store { what: what.into(), source })?;
                }
            }
        }
        let sources = shared.sources(state, model, expert);
        if let Err(fetch) = shared.fetcher.fetch(what, entry, &sources).await {
            return Err(match self.damaged().get(&entry.id).cloned() {
                Some(fault) => Setback::Lost { what: what.into(), fault, fetch },
                None => Setback::Fetch(fetch),
            });
        }
        self.damaged().remove(&entry.id);
        self.read(entry).await.map_err(|source| Setback::Store { what: what.into(), source })
    }

    fn damaged(&self) -> MutexGuard<'_, BTreeMap<BlobId, String>> {
        self.damaged.lock().expect("no panic while held")
    }

    async fn read(&self, entry: &BlobEntry) -> Result<WeightBytes, BlobError> {
        let (blobs, entry) = (self.shared.blobs.clone(), entry.clone());
        run_blocking(move || blobs.read_verified(&entry)).await.map(WeightBytes::from)
    }

    async fn drop_all_but(&self, serving: &Serving, assigned: &BTreeSet<ExpertId>) -> Result<(), Setback> {
        let held = self.shared.held.borrow().clone();
        for &expert in held.difference(assigned) {
            self.shared.held.send_modify(|held| {
                Arc::make_mut(held).remove(&expert);
            });
            let dropped = serving.engine.drop_expert(ids::to_model(expert)).await;
            dropped.map_err(|error| Setback::Load { what: format!("expert {expert}"), why: error.to_string() })?;
        }
        Ok(())
    }

    fn count(&self, known: &Known, assigned: &BTreeSet<ExpertId>) {
        let (mut all, mut held) = (0, 0);
        for blob in known.blobs_for(assigned.iter().copied()) {
            all += blob.bytes;
            held += if self.shared.blobs.has(&blob.id) { blob.bytes } else { 0 };
        }
        self.shared.progress.send_modify(|progress| (progress.bytes_assigned, progress.bytes_held) = (all, held));
        self.shared.metrics.experts.set(self.shared.held.borrow().len() as i64);
    }

    /// Tells the log what has changed since it was last told: what is held and not claimed, and what is claimed and not held.
    async fn report(&self) -> Result<(), Setback> {
        let (state, node) = (self.shared.state(), self.shared.log.node_id());
        let Some(placement) = &state.placement else { return Ok(()) };
        let held = self.shared.held.borrow().clone();
        let differs: Vec<_> =
            placement.of(node).filter(|(expert, replica)| held.contains(expert) != replica.ready).collect();
        let (dropped, loaded): (Vec<_>, Vec<_>) = differs.into_iter().partition(|(_, replica)| replica.ready);
        let experts = |replicas: Vec<(ExpertId, _)>| replicas.into_iter().map(|(expert, _)| expert).collect::<Vec<_>>();
        if !dropped.is_empty() {
            self.propose(Command::NotReady { node, experts: experts(dropped) }).await?;
        }
        if !loaded.is_empty() || !placement.trunk_ready.contains(&node) {
            let epoch = placement.epoch;
            self.propose(Command::Ready { node, epoch, experts: experts(loaded), trunk: true }).await?;
        }
        Ok(())
    }

    async fn propose(&self, command: Command) -> Result<(), Setback> {
        if self.shared.log.leader().borrow().is_none() {
            return Err(Setback::Report("there is no leader".into()));
        }
        match self.shared.log.propose(command, PROPOSE_DEADLINE).await {
            Ok(Outcome::Refused(refusal)) => Err(Setback::Report(refusal.to_string())),
            Ok(_) => Ok(()),
            Err(error) => Err(Setback::Report(error.to_string())),
        }
    }
}

/// Whether the budget holds the model's fixed part.
///
/// # Errors
/// Both numbers and the remedy, in words.
pub fn check_budget(known: &Known, memory_bytes: u64, kv_tokens: usize) -> Result<(), String> {
    let needed = known.fixed_bytes(kv_tokens);
    if memory_bytes >= needed {
        return Ok(());
    }
    Err(format!(
        "the memory budget of {} ({memory_bytes} bytes) is too small for the trunk of model '{}': trunk, KV cache of {} tokens \
         and buffers need {} ({needed} bytes); raise --memory or lower --kv-tokens",
        Size(memory_bytes),
        known.manifest.name,
        known.kv_tokens(kv_tokens),
        Size(needed),
    ))
}

/// Resident memory of this process, in bytes; 0 where the system does not say.
pub fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    // SAFETY: sysconf has no preconditions.
    pages * unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(0) as u64
}
