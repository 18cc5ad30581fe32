//! The home's driver of expert calls: sends, waits, and tells the state machine what happened.
//!
//! Owns [`Caller`], the engine's source of experts, and the home's [`HostTable`]. Each request of the engine runs as one task
//! around a [`LayerCall`], which decides everything. The invariant: for each attempt that the call launches, the task reports
//! one outcome, unless the call is over first.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coel_gossip::{Frame, Handle, PeerId, RequestError};
use coel_model::serve::engine::{Engine, EngineError};
use coel_model::serve::expert_source::{ExpertRequest, ExpertSource, SourceError};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tracing::{debug, warn};

use super::call::{AttemptId, CallEffect, CallError, CallInput, HostFailure, LayerCall, LocalError};
use super::hosts::HostTable;
use super::watch::ReplicaWatch;
use super::wire::PROTOCOL;
use crate::hosting::{Loaded, LoadedModel, WeakLoaded};
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
    let experts = call.routes.iter().flatten().map(|route| route.expert).collect();
    let mut mesh = ReplicaWatch::new(&handles.view, loaded, layer, experts);
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
                    return reply.answer(outcome.map_err(|error| source_error(layer, &error)));
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

/// What the engine is told of a call that failed.
fn source_error(layer: u16, error: &CallError) -> SourceError {
    let why = error.to_string();
    match error {
        CallError::Missing { .. } => SourceError::Missing(why),
        CallError::Unavailable { missing, .. } => {
            let experts = missing.experts.keys().map(|expert| expert.index).collect();
            SourceError::Unavailable { layer, experts, why }
        }
        CallError::Engine(_) | CallError::Cancelled => SourceError::Failed(why),
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
