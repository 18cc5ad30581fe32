//! Follows the placement: gets what this node was assigned, loads it, and drops what it no longer holds. [`claims`] reports what is
//! ready.
//!
//! One pass ([`Hosting::reconcile`]) goes as far as it can towards the present placement and says whether it arrived. It is
//! idempotent: after a restart, a lost peer or a new epoch the next pass starts from what is there.
//!
//! A node that was given more than its memory holds keeps its experts on disk and pages them ([`paging`]); others load them.
//!
//! Invariants: nothing is held unverified; loading never waits for the log.
//! What is to be dropped or made smaller goes before anything is loaded in its place, so that both budgets hold at every moment. An
//! expert that is wanted at another precision is served at the old one until the new one is loaded.

mod blobs;
pub mod claims;
mod discard;
mod disk_room;
mod experts;
mod loaded;
mod paging;
mod progress;
mod reservations;
mod slicing;

use std::sync::Arc;
use std::time::Duration;

use coel_model::serve::device::Device;
use coel_model::serve::engine::{Engine, EngineOptions};
use coel_model::serve::expert_source::ExpertSource;
use coel_store::{Blobs, Command, ExpertId, Model, ModelId, Precision, State};
use futures::StreamExt;
use futures::stream;
use tokio::sync::Mutex;
use tracing::{Instrument, info, info_span, warn};

pub use loaded::{HeldExperts, LoadProgress, Loaded, LoadedModel, WeakLoaded};

use crate::budget::LOADS_MAX;
use crate::config::{Limits, Size};
use crate::import::Imports;
use crate::lifecycle::Lifecycle;
use crate::mesh::{MeshView, OwnOffer, ProposalError};
use crate::metrics::Metrics;
use crate::placement::model_to_serve;
use crate::registry::{ModelMeta, ModelRegistry, RegistryError};
use crate::system::{run_blocking, trim_heap};
use crate::weights::fetch::{FetchError, Fetcher};
use blobs::WantedPart;

/// Pause before another pass after one that failed.
const RETRY: Duration = Duration::from_secs(1);
/// Pause before another pass after one that arrived: blobs may have been damaged or deleted meanwhile.
const RECHECK: Duration = Duration::from_secs(30);
/// Passes in a row that may fail for want of a source before it is called a problem: peers come and go.
const PATIENCE: u32 = 5;

/// What hosting needs of the node.
pub struct HostingHandles {
    /// What the node may take.
    pub limits: Limits,
    /// Where it computes.
    pub device: Device,
    /// The mesh.
    pub view: MeshView,
    /// Models without tensors.
    pub registry: ModelRegistry,
    /// Weights on disk.
    pub blobs: Arc<Blobs>,
    /// Weights from peers.
    pub fetcher: Fetcher,
    /// What this node offers the mesh.
    pub offer: OwnOffer,
    /// What is loaded here; hosting alone changes it.
    pub loaded: Loaded,
    /// Whether blobs of another model are being made.
    pub imports: Imports,
    /// What this node counts.
    pub metrics: Arc<Metrics>,
    /// How the node ends.
    pub lifecycle: Lifecycle,
    /// This node was admitted in this run of its process.
    pub newcomer: bool,
    /// Where the engine gets the outputs of experts that are not held here.
    pub remote_experts: Arc<dyn ExpertSource>,
    /// Most rows of one expert call, from hidden size and experts per token.
    pub rows_max: fn(usize, usize) -> usize,
}

/// The task's own state.
struct Hosting {
    node: HostingHandles,
    /// Failed passes in a row.
    failures: u32,
    /// Held while a replica is exchanged for one of another precision. Both are in memory then: one such pair at a time.
    exchange: Mutex<()>,
    /// Held while an expert is fetched and loaded and the disk has little room: what it replaces goes before the next comes.
    disk: Mutex<()>,
    /// Held while a part is sliced.
    slicing: Mutex<()>,
}

/// Why a pass stopped short.
#[derive(Debug, thiserror::Error)]
enum HostingError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("{what} cannot be loaded: {why}")]
    Load { what: String, why: String },
    #[error(
        "{what} waits for room: with it {total} bytes would be taken of the {budget} that --memory gives. The placement was made \
         for a larger budget; the leader plans a new one"
    )]
    Room { what: String, total: u64, budget: u64 },
    #[error("the log cannot be told that this node leaves: {0}")]
    Leave(#[from] ProposalError),
}

impl HostingError {
    /// A load error of `what`.
    fn load(what: impl Into<String>, why: impl ToString) -> Self {
        Self::Load { what: what.into(), why: why.to_string() }
    }

    /// Whether waiting is unlikely to mend it.
    fn is_lasting(&self) -> bool {
        match self {
            Self::Fetch(fetch) | Self::Registry(RegistryError::Fetch(fetch)) => fetch.is_lasting(),
            Self::Load { .. } | Self::Room { .. } | Self::Registry(RegistryError::Unusable(_)) => true,
            Self::Leave(_) => false,
        }
    }
}

/// Follows the placement until the node stops.
pub async fn run(node: HostingHandles) {
    let mut state = node.view.log().state();
    let mut hosting =
        Hosting { node, failures: 0, exchange: Mutex::default(), disk: Mutex::default(), slicing: Mutex::default() };
    loop {
        let now = state.borrow_and_update().clone();
        let epoch = now.epoch();
        let arrived = hosting.reconcile(&now).instrument(info_span!("epoch", %epoch)).await;
        hosting.note(&arrived);
        let pause = if arrived.is_ok() { RECHECK } else { RETRY };
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(pause) => {}
        }
    }
}

impl Hosting {
    fn note(&mut self, arrived: &Result<(), HostingError>) {
        match arrived {
            Ok(()) => {
                self.failures = 0;
                self.node.loaded.set_problem(None);
            }
            Err(error) => {
                self.failures += 1;
                warn!(%error, "trying again");
                if error.is_lasting() || self.failures >= PATIENCE {
                    self.node.loaded.set_problem(Some(error.to_string()));
                }
            }
        }
    }

    /// One pass towards the placement in `state`.
    async fn reconcile(&self, state: &State) -> Result<(), HostingError> {
        let node = &self.node;
        let Some((id, registered)) = model_to_serve(state) else {
            return Ok(());
        };
        let model = match node.loaded.model() {
            Some(model) => model,
            None => match self.start_engine(state, id, registered).await? {
                Some(model) => model,
                None => return Ok(()),
            },
        };
        if model.meta.id != id {
            let why = "this node has loaded another model; restart it";
            return Err(HostingError::load(format!("the model {id}"), why));
        }
        let Some(placement) = state.placement.as_ref().filter(|placement| placement.model == id) else {
            return Ok(());
        };
        let own = placement.of(node.view.node());
        let assigned: HeldExperts = own.map(|(expert, replica)| (expert, replica.precision)).collect();
        self.drop_all_but(&model, &assigned).await?;
        self.make_disk_room(&model.meta, 0).await;
        self.count(&model.meta, &assigned);

        let paging = self.must_page(&model, &assigned);
        if paging {
            self.drop_missing(&model).await?;
            self.begin_paging(state, &model, &assigned).await?;
        }
        let (held, paged) = (node.loaded.held(), node.loaded.paged());
        let arrived = |expert: &ExpertId, precision: &Precision| {
            held.get(expert) == Some(precision) && paged.contains(expert) == paging
        };
        let (smaller, other): (Vec<_>, Vec<_>) = assigned
            .iter()
            .filter(|(expert, precision)| !arrived(expert, precision))
            .map(|(&expert, &precision)| (expert, precision))
            .partition(|(expert, precision)| held.get(expert).is_some_and(|now| now > precision));
        let mut pass = ReconcilePass { paging, ..ReconcilePass::default() };
        let loads = !(smaller.is_empty() && other.is_empty());
        self.load_all(state, &model, &assigned, smaller, &mut pass).await;
        self.load_all(state, &model, &assigned, other, &mut pass).await;
        if loads {
            run_blocking(trim_heap).await;
        }
        self.end_paging(&model).await?;
        self.take_inventory(&model.meta).await;
        pass.error.map_or(Ok(()), Err)
    }

    /// Looks at the disk for what lies there of the model, and offers it to the mesh.
    async fn take_inventory(&self, meta: &Arc<ModelMeta>) {
        let (fetcher, seen) = (self.node.fetcher.clone(), meta.clone());
        let (complete, holds) = run_blocking(move || fetcher.inventory(seen.id, &seen.manifest)).await;
        self.node.offer.set_inventory(meta.id, complete, holds);
    }

    /// Gets and loads experts.
    async fn load_all(
        &self,
        state: &State,
        model: &LoadedModel,
        assigned: &HeldExperts,
        experts: Vec<(ExpertId, Precision)>,
        pass: &mut ReconcilePass,
    ) {
        let each = experts
            .into_iter()
            .map(|(expert, precision)| self.get_expert(state, model, expert, precision, pass.paging));
        let mut loads = stream::iter(each).buffer_unordered(LOADS_MAX).ready_chunks(LOADS_MAX);
        while let Some(loaded) = loads.next().await {
            pass.error = loaded.into_iter().find_map(Result::err).or(pass.error.take());
            self.count(&model.meta, assigned);
        }
    }

    /// Gets to know the model, checks the budgets, starts the engine and loads the trunk. `None` where the node ends instead.
    async fn start_engine(
        &self,
        state: &State,
        id: ModelId,
        registered: &Model,
    ) -> Result<Option<LoadedModel>, HostingError> {
        let (node, limits) = (&self.node, &self.node.limits);
        let sources = node.view.sources(state, id, None);
        let meta = node.registry.obtain(id, registered, &sources).await?;
        // Offered together with the trunk: a node that has everything needs no room to receive it.
        self.take_inventory(&meta).await;
        let disk_bytes = limits.disk_bytes.filter(|_| !node.offer.get().has_all_of(id));
        // Decided once: with other members around another choice may be better, but not worth loading it anew.
        let decide = || meta.sizes.trunk_precision(limits, disk_bytes, state.members.len());
        let precision = node.offer.trunk().unwrap_or_else(decide);
        let name = &registered.name;
        let fits = meta
            .sizes
            .check_memory(name, limits)
            .and_then(|()| meta.sizes.check_offload(limits, precision))
            .and_then(|()| disk_bytes.map_or(Ok(()), |bytes| meta.sizes.check_disk(name, bytes, precision)));
        if let Err(short) = fits {
            let own = node.view.node();
            if node.newcomer && !node.view.log().voters().borrow().contains(&own) {
                // This node cannot be of any use, so it does not stay on as a member that never becomes ready. Once it votes it must not
                // leave like this: its vote could be the quorum's.
                node.lifecycle.set_leaving(true);
                node.view.propose(Command::Leave { node: own }).await?;
                node.lifecycle.set_left();
            }
            node.lifecycle.fail(short.to_string());
            return Ok(None);
        }
        node.offer.set_trunk(precision);
        self.count(&meta, &HeldExperts::new());
        let bytes = meta.sizes.trunk_bytes(precision);
        let reserved = node.loaded.reservations().take_anyway(bytes);
        let mut trunk = Vec::new();
        for part in &meta.manifest.trunk {
            trunk.push(self.get(&WantedPart::trunk(part, precision), state, &meta).await?);
            self.count(&meta, &HeldExperts::new());
        }
        let fixed_bytes = meta.sizes.fixed_bytes(limits.kv_tokens, precision);
        let options = EngineOptions {
            kv_tokens: meta.sizes.kv_tokens(limits.kv_tokens),
            rows_max: (node.rows_max)(meta.config.hidden_size, meta.config.num_experts_per_tok),
            low_priority: true,
            device_expert_bytes: limits.offload_bytes.map(|_| limits.fixed_budget().1.saturating_sub(fixed_bytes)),
            ..EngineOptions::default()
        };
        let failed = |error: coel_model::serve::engine::EngineError| HostingError::load("the trunk", error);
        let (device, config) = (node.device, meta.config.clone());
        let engine = run_blocking(move || Engine::start(device, config, options)).await.map_err(failed)?;
        if let (Some(vram), Device::Cpu) = (limits.vram_bytes, engine.device()) {
            let vram = Size(vram);
            node.lifecycle
                .fail(format!("--vram {vram}: the GPU does not start, see the log; fix that, or start without --vram"));
            return Ok(None);
        }
        engine.load_trunk(trunk).await.map_err(failed)?;
        drop(reserved);
        engine.set_source(node.remote_experts.clone());
        info!(model = name, device = engine.class(), trunk = %Size(bytes), %precision, "trunk loaded");
        node.offer.set_memory(meta.sizes.memory_bytes(limits, precision));
        let model = LoadedModel { meta, engine, trunk: precision };
        node.loaded.set_model(model.clone());
        Ok(Some(model))
    }
}

/// How far a pass has come.
#[derive(Default)]
struct ReconcilePass {
    /// Whether experts are held on disk.
    paging: bool,
    error: Option<HostingError>,
}
