//! Follows the placement: gets what this node was assigned, loads it, reports it ready; drops what it no longer holds.
//!
//! One pass ([`Hosting::step`]) goes as far as it can towards the current placement and says whether it arrived. It is
//! idempotent: after a restart, a lost peer or a new epoch the next pass starts from what is there.
//!
//! Invariants: nothing is loaded unverified; nothing is reported ready before it is loaded; what is dropped is dropped before
//! anything is loaded in its place, so that the budget holds at every moment.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use coel_model::bytes::WeightBytes;
use coel_model::engine::{Engine, EngineOptions};
use coel_store::{BlobEntry, Command, ExpertId, Model, ModelId, Outcome, State};
use futures::StreamExt;
use futures::stream;
use tracing::{Instrument, info, info_span, warn};

use crate::experts::caller::Caller;
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
    #[error("the log cannot be told what is ready: {0}")]
    Report(String),
}

impl Setback {
    /// Whether waiting is unlikely to mend it.
    fn lasts(&self) -> bool {
        match self {
            Self::Fetch(fetch) | Self::Library(LibraryError::Fetch(fetch)) => fetch.lasts(),
            Self::Load { .. } | Self::Library(LibraryError::Unusable(_)) => true,
            Self::Report(_) => false,
        }
    }
}

/// Follows the placement until the node stops.
pub async fn run(shared: Arc<Shared>) {
    let mut state = shared.log.state();
    let mut hosting = Hosting { shared: shared.clone(), failures: 0 };
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
        let assigned: BTreeSet<ExpertId> = placement.of(shared.log.node_id()).map(|(expert, _)| expert).collect();
        self.drop_all_but(&serving, &assigned).await?;
        self.count(&serving.known, &assigned);

        let held = shared.held.borrow().clone();
        let missing: Vec<_> = assigned.difference(&held).copied().collect();
        let mut loads = stream::iter(missing.into_iter().map(|expert| self.get_expert(state, &serving, expert)))
            .buffer_unordered(FETCHES)
            .ready_chunks(REPORT_BATCH);
        let (mut setback, mut claimed, mut unclaimed) = (None, Ok(()), 0);
        while let Some(loaded) = loads.next().await {
            unclaimed += loaded.len();
            setback = loaded.into_iter().find_map(Result::err).or(setback);
            self.count(&serving.known, &assigned);
            if unclaimed >= REPORT_BATCH {
                claimed = self.claim().await;
                unclaimed = 0;
            }
        }
        if unclaimed > 0 || !placement.trunk_ready.contains(&shared.log.node_id()) {
            claimed = self.claim().await;
        }
        let (shared, known) = (self.shared.clone(), serving.known.clone());
        run_blocking(move || shared.look_for_all_of(&known)).await;
        setback.map_or(retracted.and(claimed), Err)
    }

    /// Gets to know the model, checks the budget, starts the engine and loads the trunk.
    async fn begin(&self, state: &State, model: ModelId, registered: &Model) -> Result<Option<Serving>, Setback> {
        let shared = &self.shared;
        let sources = shared.sources(state, model, None);
        let known = shared.library.get(model, registered, &shared.fetcher, &shared.blobs, &sources).await?;
        if let Err(short) = check_budget(&known, shared.config.memory_bytes, shared.config.kv_tokens) {
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
            ..EngineOptions::default()
        };
        let load = |why: String| Setback::Load { what: "the trunk".into(), why };
        let (device, config) = (shared.config.device, known.config.clone());
        let engine =
            run_blocking(move || Engine::start(device, config, options)).await.map_err(|e| load(e.to_string()))?;
        engine.load_trunk(trunk).await.map_err(|error| load(error.to_string()))?;
        engine.set_source(Arc::new(Caller::new(Arc::downgrade(shared), tokio::runtime::Handle::current())));
        info!(model = registered.name, device = engine.class(), trunk = %Size(known.manifest.trunk_bytes()), "trunk loaded");
        let serving = Serving { known, engine };
        shared.serving.send_replace(Some(serving.clone()));
        Ok(Some(serving))
    }

    /// Loads one expert, unless a newer placement has come since `state`, which may have other plans: what is under way is
    /// finished, the rest is left to the next pass.
    async fn get_expert(&self, state: &State, serving: &Serving, expert: ExpertId) -> Result<(), Setback> {
        if self.shared.state().epoch() != state.epoch() {
            return Ok(());
        }
        let what = format!("expert {expert}");
        let load = |why: String| Setback::Load { what: what.clone(), why };
        let known = &serving.known;
        let blob = known.expert(expert).ok_or_else(|| load("the manifest does not have it".into()))?;
        let bytes = self.get(&what, blob, state, known.id, Some(expert)).await?;
        serving.engine.load_expert(ids::to_model(expert), bytes).await.map_err(|error| load(error.to_string()))?;
        self.shared.held.send_modify(|held| {
            Arc::make_mut(held).insert(expert);
        });
        Ok(())
    }

    async fn get(
        &self,
        what: &str,
        entry: &BlobEntry,
        state: &State,
        model: ModelId,
        expert: Option<ExpertId>,
    ) -> Result<WeightBytes, Setback> {
        let sources = self.shared.sources(state, model, expert);
        Ok(self.shared.fetcher.obtain(what, entry, &sources).await?.into())
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

    /// Notes how far the node is. Experts count once they are loaded; files and trunk, few as they are, once they lie here.
    fn count(&self, known: &Known, assigned: &BTreeSet<ExpertId>) {
        let held = self.shared.held.borrow().clone();
        // The manifest is here, or nothing of this would be known.
        let (mut all, mut here) = (known.manifest_bytes, known.manifest_bytes);
        for blob in known.blobs_for(std::iter::empty()) {
            all += blob.bytes;
            here +=
                if self.shared.serving.borrow().is_some() || self.shared.blobs.has(&blob.id) { blob.bytes } else { 0 };
        }
        for expert in assigned {
            let bytes = known.expert(*expert).map_or(0, |blob| blob.bytes);
            all += bytes;
            here += if held.contains(expert) { bytes } else { 0 };
        }
        self.shared.progress.send_modify(|progress| (progress.bytes_assigned, progress.bytes_held) = (all, here));
        self.shared.metrics.experts.set(held.len() as i64);
    }

    /// Replicas of this node by the log whose readiness is not as `held` says: claimed and not held, or held and not claimed.
    fn unlike(&self, state: &State, ready: bool) -> Vec<ExpertId> {
        let held = self.shared.held.borrow().clone();
        let own = state.placement.iter().flat_map(|placement| placement.of(self.shared.log.node_id()));
        let unlike = own.filter(|(expert, replica)| replica.ready == ready && held.contains(expert) != ready);
        unlike.map(|(expert, _)| expert).collect()
    }

    /// Takes back what the log claims and is not held.
    async fn retract(&self) -> Result<(), Setback> {
        let (state, node) = (self.shared.state(), self.shared.log.node_id());
        let experts = self.unlike(&state, true);
        if experts.is_empty() { Ok(()) } else { self.propose(Command::NotReady { node, experts }).await }
    }

    /// Tells the log what is held and not claimed yet.
    async fn claim(&self) -> Result<(), Setback> {
        let (state, node) = (self.shared.state(), self.shared.log.node_id());
        let experts = self.unlike(&state, false);
        let trunk_claimed = state.placement.as_ref().is_none_or(|placement| placement.trunk_ready.contains(&node));
        if experts.is_empty() && trunk_claimed {
            return Ok(());
        }
        self.propose(Command::Ready { node, epoch: state.epoch(), experts, trunk: true }).await
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
