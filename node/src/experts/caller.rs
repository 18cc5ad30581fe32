//! The home's driver of expert calls: sends, waits, and tells the state machine what happened.
//!
//! Owns [`Caller`], the engine's source of experts, and the home's [`HostTable`]. Each request of the engine runs as one task
//! around a [`LayerCall`], which decides everything. The invariant: for each attempt that the call launches, the task reports
//! one outcome, unless the call is over first.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coel_gossip::{Frame, Handle, Liveness, PeerId, Peers, RequestError};
use coel_model::nn::expert_call::ExpertCall;
use coel_model::serve::engine::{Engine, EngineError};
use coel_model::serve::expert_source::{ExpertRequest, ExpertSource, SourceError};
use coel_store::{NodeId, State};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tokio::sync::watch;
use tracing::{debug, warn};

use super::call::{AttemptId, CallEffect, CallError, CallInput, HostFailure, LayerCall, LocalError};
use super::dispatch::LayerReplicas;
use super::hosts::HostTable;
use super::wire::PROTOCOL;
use crate::hosting::{HeldExperts, Loaded, LoadedModel, WeakLoaded};
use crate::ids;
use crate::mesh::MeshView;
use crate::metrics::Metrics;

/// What the caller needs of its node.
pub struct CallerHandles {
    /// The model that is loaded, with its engine. Weak: the engine owns the caller.
    pub loaded: WeakLoaded,
    /// The agreed state, who is there, and the way to the hosts.
    pub view: MeshView,
    /// Counts failed calls.
    pub metrics: Arc<Metrics>,
}

/// A home's way to experts of other nodes.
pub struct Caller {
    handles: Arc<CallerHandles>,
    hosts: Arc<Mutex<HostTable>>,
    runtime: tokio::runtime::Handle,
}

impl Caller {
    /// The caller of the node. Its calls run on the current tokio runtime.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(handles: CallerHandles) -> Self {
        let runtime = tokio::runtime::Handle::current();
        Self { handles: Arc::new(handles), hosts: Arc::default(), runtime }
    }
}

impl ExpertSource for Caller {
    fn ask(&self, request: ExpertRequest) {
        let (handles, hosts) = (self.handles.clone(), self.hosts.clone());
        self.runtime.spawn(async move {
            // A node that is ending drops the request, which fails it.
            let Some(loaded) = handles.loaded.upgrade() else { return };
            let Some(model) = loaded.model() else { return };
            drive(&handles, &loaded, &model, &hosts, request).await;
        });
    }
}

/// A poisoned lock is taken all the same: the table holds estimates, each whole by itself, and one call that panicked must
/// not fail all others.
fn lock(hosts: &Mutex<HostTable>) -> MutexGuard<'_, HostTable> {
    hosts.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A call under way. Its rows do not count as in flight any more once it is dropped, whatever becomes of its task.
struct Running<'a> {
    call: LayerCall,
    hosts: &'a Mutex<HostTable>,
}

impl Running<'_> {
    fn handle(&mut self, input: CallInput) -> Vec<CallEffect> {
        self.call.handle(input, &mut lock(self.hosts), Instant::now(), &mut rand::rng())
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // Without effect if the call has finished.
        self.handle(CallInput::Cancelled);
    }
}

/// Runs one call to its end.
async fn drive(
    handles: &CallerHandles,
    loaded: &Loaded,
    model: &LoadedModel,
    hosts: &Mutex<HostTable>,
    request: ExpertRequest,
) {
    let ExpertRequest { call, mut reply } = request;
    let layer = call.layer;
    let mut mesh = MeshWatch::new(&handles.view, loaded, &call);
    let mut running = Running { call: LayerCall::new(model.meta.id, call, mesh.replicas()), hosts };
    let mut pending = FuturesUnordered::<BoxFuture<'static, CallInput>>::new();
    let mut input = CallInput::Start;
    loop {
        let effects = running.handle(input);
        for effect in effects {
            match effect {
                CallEffect::Send { attempt, host, frame, deadline } => {
                    let (gossip, peer) = (handles.view.gossip().clone(), mesh.peer(host));
                    pending.push(send(gossip, peer, attempt, frame, deadline).boxed());
                }
                CallEffect::Compute { attempt, rows, work } => {
                    pending.push(compute(model.engine.clone(), layer, attempt, rows, work).boxed());
                }
                CallEffect::ArmSecondChance { chance, after } => {
                    let due = tokio::time::sleep(after).map(move |()| CallInput::SecondChanceDue { chance });
                    pending.push(due.boxed());
                }
                CallEffect::Report { host, failure: HostFailure::NotHeld } => {
                    debug!(%host, layer, "a host no longer holds an expert; asking a replica");
                }
                CallEffect::Report { host, failure } => {
                    warn!(%host, layer, %failure, "an expert call failed; asking a replica");
                    handles.metrics.expert_calls_failed.inc();
                }
                CallEffect::Finish(outcome) => {
                    return reply.answer(outcome.map_err(|error| match error {
                        CallError::Missing { .. } => SourceError::Missing(error.to_string()),
                        CallError::Engine(_) | CallError::Cancelled => SourceError::Failed(error.to_string()),
                    }));
                }
            }
        }
        input = tokio::select! {
            biased;
            () = reply.given_up() => CallInput::Cancelled,
            Some(input) = pending.next() => input,
            () = mesh.changed() => CallInput::MeshChanged(mesh.replicas()),
        };
    }
}

/// Sends one frame; the outcome of the attempt.
async fn send(gossip: Handle, peer: Option<PeerId>, attempt: AttemptId, frame: Frame, deadline: Duration) -> CallInput {
    let Some(peer) = peer else {
        return CallInput::Failed { attempt, reason: "it is no longer a member".into() };
    };
    match gossip.request(peer, PROTOCOL, frame, deadline).await {
        Ok(frame) => CallInput::Reply { attempt, frame },
        Err(RequestError::TimedOut { .. }) => CallInput::DeadlineReached { attempt },
        Err(error) => CallInput::Failed { attempt, reason: error.to_string() },
    }
}

/// Computes experts that this node holds after all; the outcome of the attempt.
async fn compute(
    engine: Engine,
    layer: u16,
    attempt: AttemptId,
    rows: Vec<f32>,
    work: Vec<(u16, Vec<u32>)>,
) -> CallInput {
    let outputs = engine.run_experts(layer, rows, work).await.map_err(|error| match error {
        EngineError::NotHeld(expert) => LocalError::NotHeld(expert.index),
        error => LocalError::Engine(error.to_string()),
    });
    CallInput::Computed { attempt, outputs }
}

/// What a call sees of the mesh, and when it changes.
struct MeshWatch {
    home: NodeId,
    layer: u16,
    experts: Vec<u16>,
    held: watch::Receiver<Arc<HeldExperts>>,
    state: watch::Receiver<Arc<State>>,
    peers: watch::Receiver<Peers>,
}

impl MeshWatch {
    fn new(view: &MeshView, loaded: &Loaded, call: &ExpertCall) -> Self {
        let mut experts: Vec<_> = call.routes.iter().flatten().map(|route| route.expert).collect();
        experts.sort_unstable();
        experts.dedup();
        Self {
            home: view.node(),
            layer: call.layer,
            experts,
            held: loaded.held_changes(),
            state: view.log().state(),
            peers: view.gossip().peers(),
        }
    }

    /// Who could compute the call's experts now.
    fn replicas(&mut self) -> LayerReplicas {
        let held = self.held.borrow_and_update().clone();
        let state = self.state.borrow_and_update().clone();
        let peers = self.peers.borrow_and_update().clone();
        let live = live_hosts(&state, &peers);
        LayerReplicas::new(self.home, self.layer, self.experts.iter().copied(), &state, &held, live)
    }

    /// The peer id of a member.
    fn peer(&self, node: NodeId) -> Option<PeerId> {
        ids::peer_id(&self.state.borrow().members.get(&node)?.peer)
    }

    /// Resolves when [`Self::replicas`] may give something else.
    async fn changed(&mut self) {
        let changed = tokio::select! {
            changed = self.held.changed() => changed,
            changed = self.state.changed() => changed,
            changed = self.peers.changed() => changed,
        };
        if changed.is_err() {
            // The node is ending, and nothing changes any more.
            std::future::pending().await
        }
    }
}

/// The members that gossip does not consider down, and their smoothed round trips.
fn live_hosts(state: &State, peers: &BTreeMap<PeerId, coel_gossip::PeerView>) -> BTreeMap<NodeId, Option<Duration>> {
    let live = state.members.iter().filter_map(|(&node, member)| {
        let view = peers.get(&ids::peer_id(&member.peer)?)?;
        (view.liveness != Liveness::Down).then(|| (node, view.rtt.map(|rtt| rtt.smoothed)))
    });
    live.collect()
}
