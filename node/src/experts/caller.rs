//! The home's side: has experts that are not held here computed by peers, and moves on to a replica when a host fails.
//!
//! Owns [`Caller`], the engine's source of experts. It knows flights' calls and hosts, not whose rows they are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use coel_gossip::{Liveness, PeerId, PeerView};
use coel_model::engine::EngineError;
use coel_model::experts::ExpertCall;
use coel_model::source::{ExpertOutputs, ExpertRequest, ExpertSource, Share, SourceError};
use coel_store::{Epoch, ExpertId, NodeId, State};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::runtime::Handle;
use tracing::{debug, warn};

use super::dispatch::{Call, HostLoad, Missing, Pair, Replicas, assign};
use super::hosts::Hosts;
use super::wire::{CallHeader, PROTOCOL, ReplyHeader, VERSION, decode_reply, encode_call};
use crate::hosting::{HeldExperts, Loaded, LoadedModel, WeakLoaded};
use crate::ids;
use crate::mesh::MeshView;
use crate::metrics::Metrics;

/// Times that hosts which failed are asked again when nobody else is left: a connection may have broken, not the host.
const SECOND_CHANCES: u32 = 2;
/// Pause before that.
const SECOND_CHANCE_AFTER: Duration = Duration::from_millis(200);

/// A home's way to experts of other nodes.
pub struct Caller {
    /// Weak: the engine has the caller, and what is loaded has the engine.
    loaded: WeakLoaded,
    view: MeshView,
    metrics: Arc<Metrics>,
    hosts: SharedHosts,
    runtime: Handle,
}

/// One call under way.
struct Calling {
    loaded: Loaded,
    view: MeshView,
    metrics: Arc<Metrics>,
    model: LoadedModel,
    hosts: SharedHosts,
}

/// What this node, as a home, knows of its hosts.
type SharedHosts = Arc<Mutex<Hosts>>;

fn lock(hosts: &SharedHosts) -> MutexGuard<'_, Hosts> {
    hosts.lock().expect("no panic while held")
}

/// One host's part in flight; over when dropped, also when the call is given up.
struct Flight(SharedHosts, NodeId);

impl Flight {
    fn begin(hosts: &SharedHosts, node: NodeId) -> Self {
        lock(hosts).asked(node);
        Self(hosts.clone(), node)
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        lock(&self.0).over(self.1);
    }
}

/// Why a layer could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody is left for some experts.
    #[error("{missing}{}", failures(.failed))]
    Missing { missing: Missing, failed: Vec<(NodeId, String)> },
    /// The engine refused: a fault of this node.
    #[error("this node's engine: {0}")]
    Engine(#[from] EngineError),
}

fn failures(failed: &[(NodeId, String)]) -> String {
    let each: Vec<_> = failed.iter().map(|(node, why)| format!("node {node} {why}")).collect();
    if each.is_empty() { String::new() } else { format!(" ({})", each.join("; ")) }
}

/// The placement and gossip as dispatch sees them, at one moment.
struct View<'a> {
    home: NodeId,
    state: &'a State,
    peers: &'a BTreeMap<PeerId, PeerView>,
    held: &'a HeldExperts,
    hosts: &'a SharedHosts,
    /// What hosts said during this call that they do not hold, whatever the placement says.
    absent: &'a BTreeSet<(NodeId, ExpertId)>,
    now: Instant,
}

impl View<'_> {
    fn peer(&self, node: NodeId) -> Option<PeerId> {
        ids::peer_id(&self.state.members.get(&node)?.peer)
    }
}

impl Replicas for View<'_> {
    fn home(&self) -> NodeId {
        self.home
    }

    fn of(&self, expert: ExpertId) -> Vec<NodeId> {
        let placed = self.state.placement.iter().flat_map(|placement| placement.hosts(expert));
        let others = placed.map(|(node, _)| node).filter(|&node| node != self.home);
        let mut nodes: Vec<_> = others.chain(self.held.contains_key(&expert).then_some(self.home)).collect();
        nodes.retain(|node| !self.absent.contains(&(*node, expert)));
        nodes.sort_unstable();
        nodes
    }

    fn load(&self, node: NodeId) -> Option<HostLoad> {
        let view = self.peers.get(&self.peer(node)?)?;
        let rtt_s = view.rtt.map_or(0.0, |rtt| rtt.smoothed.as_secs_f64());
        let hosts = lock(self.hosts);
        let (in_flight, shunned) = (hosts.in_flight(node), hosts.shunned(node, self.now));
        (view.liveness != Liveness::Down).then_some(HostLoad { rtt_s, in_flight, shunned })
    }
}

impl Caller {
    /// The caller of the node, whose calls run on `runtime`.
    pub fn new(loaded: WeakLoaded, view: MeshView, metrics: Arc<Metrics>, runtime: Handle) -> Self {
        Self { loaded, view, metrics, hosts: SharedHosts::default(), runtime }
    }
}

impl ExpertSource for Caller {
    fn ask(&self, request: ExpertRequest) {
        // Where the node is ending the request is dropped, and fails.
        let Some(loaded) = self.loaded.upgrade() else { return };
        let (view, metrics, hosts) = (self.view.clone(), self.metrics.clone(), self.hosts.clone());
        self.runtime.spawn(async move {
            let Some(model) = loaded.model() else { return };
            let calling = Calling { loaded, view, metrics, model, hosts };
            let ExpertRequest { call, mut reply } = request;
            let outputs = tokio::select! {
                outputs = calling.run(&call) => outputs,
                () = reply.given_up() => return,
            };
            reply.answer(outputs.map_err(|error| match error {
                CallError::Missing { .. } => SourceError::Missing(error.to_string()),
                CallError::Engine(_) => SourceError::Failed(error.to_string()),
            }));
        });
    }
}

impl Calling {
    /// Has every (row, expert) pair of the call computed.
    ///
    /// # Errors
    /// [`CallError`]; it names the experts that nobody computed and the hosts that failed.
    async fn run(&self, call: &ExpertCall) -> Result<ExpertOutputs, CallError> {
        let mut rng = SmallRng::from_os_rng();
        let layer = call.layer;
        let mut open = pairs_of(call);
        let mut outputs = vec![0.0; open.len() * call.hidden];
        let mut shares = Vec::new();
        let (mut failed, mut absent) = (BTreeSet::new(), BTreeSet::new());
        let mut reasons = Vec::new();
        let mut chances = SECOND_CHANCES;
        while !open.is_empty() {
            let (state, peers, held) = (self.view.state(), self.view.peers(), self.loaded.held());
            let view = View {
                home: self.view.node(),
                state: &state,
                peers: &peers,
                held: &held,
                hosts: &self.hosts,
                absent: &absent,
                now: Instant::now(),
            };
            let calls = match assign(layer, &open, &view, &failed, &mut rng) {
                Ok(calls) => calls,
                Err(_) if chances > 0 && !(failed.is_empty() && absent.is_empty()) => {
                    chances -= 1;
                    failed.clear();
                    absent.clear();
                    tokio::time::sleep(SECOND_CHANCE_AFTER).await;
                    continue;
                }
                Err(missing) => {
                    return Err(CallError::Missing { missing, failed: reasons });
                }
            };
            let epoch = state.epoch();
            let mut running: FuturesUnordered<_> = calls
                .into_iter()
                .map(|part| {
                    let peer = view.peer(part.host);
                    let spare = part.pairs.iter().all(|pair| {
                        let others = view.of(ExpertId { layer, index: pair.expert });
                        others.iter().any(|node| *node != part.host && view.load(*node).is_some())
                    });
                    let deadline = lock(&self.hosts).deadline(part.host, part.pairs.len(), spare);
                    self.one(part, peer, call, epoch, deadline)
                })
                .collect();
            let (mut left, mut denied) = (Vec::new(), BTreeSet::new());
            while let Some((part, result)) = running.next().await {
                match result {
                    Ok((rows, class)) => {
                        for (pair, row) in part.pairs.iter().zip(rows.chunks_exact(call.hidden)) {
                            let start = pair.slot as usize * call.hidden;
                            outputs[start..start + call.hidden].copy_from_slice(row);
                        }
                        let slots = part.pairs.iter().map(|pair| pair.slot).collect();
                        shares.push(Share { elsewhere: class, slots });
                    }
                    Err(Fault::Engine(error)) => return Err(error.into()),
                    // Its placement is another than ours, for a moment: what else it holds it goes on computing.
                    Err(Fault::Absent(experts)) => {
                        debug!(host = %part.host, layer, ?experts, "an expert is no longer there; asking a replica");
                        note(&mut reasons, part.host, "no longer holds it".into());
                        denied.extend(experts.into_iter().map(|expert| (part.host, expert)));
                        left.extend(part.pairs);
                    }
                    Err(Fault::Host(why)) => {
                        warn!(host = %part.host, layer, why, "an expert call failed; asking a replica");
                        self.metrics.expert_calls_failed.inc();
                        lock(&self.hosts).failed(part.host, Instant::now());
                        failed.insert(part.host);
                        note(&mut reasons, part.host, why);
                        left.extend(part.pairs);
                    }
                }
            }
            drop(running);
            absent.extend(denied);
            open = left;
        }
        Ok(ExpertOutputs { values: outputs, shares })
    }

    /// One host's part of the call; rows in the order of its pairs, and the class of a peer that computed them.
    async fn one(
        &self,
        part: Call,
        peer: Option<PeerId>,
        call: &ExpertCall,
        epoch: Epoch,
        deadline: Duration,
    ) -> (Call, Result<(Vec<f32>, Option<String>), Fault>) {
        let rows = part.rows();
        let mut data = Vec::with_capacity(rows.len() * call.hidden);
        for &row in &rows {
            let start = usize::from(row) * call.hidden;
            data.extend_from_slice(&call.rows[start..start + call.hidden]);
        }
        let result = if part.host == self.view.node() {
            self.here(&part, call, data).await
        } else {
            let _flight = Flight::begin(&self.hosts, part.host);
            let asked = Instant::now();
            let result = self.there(&part, peer, call, data, epoch, deadline).await;
            if result.is_ok() {
                lock(&self.hosts).answered(part.host, part.pairs.len(), asked.elapsed());
            }
            result
        };
        (part, result)
    }

    async fn here(&self, part: &Call, call: &ExpertCall, rows: Vec<f32>) -> Result<(Vec<f32>, Option<String>), Fault> {
        let work = part.work().into_iter();
        let work = work.map(|work| (work.expert, work.rows.into_iter().map(u32::from).collect::<Vec<_>>())).collect();
        match self.model.engine.run_experts(call.layer, rows, work).await {
            Ok(outputs) => Ok((outputs, None)),
            // Dropped since the view was taken: a replica has it.
            Err(EngineError::NotHeld(expert)) => Err(Fault::Absent(vec![ids::to_store(expert)])),
            Err(error) => Err(Fault::Engine(error)),
        }
    }

    async fn there(
        &self,
        part: &Call,
        peer: Option<PeerId>,
        call: &ExpertCall,
        rows: Vec<f32>,
        epoch: Epoch,
        deadline: Duration,
    ) -> Result<(Vec<f32>, Option<String>), Fault> {
        let header = CallHeader {
            version: VERSION,
            model: self.model.meta.id,
            epoch,
            layer: call.layer,
            hidden_size: call.hidden as u32,
            work: part.work(),
        };
        let peer = peer.ok_or_else(|| Fault::Host("has no valid peer id".into()))?;
        let frame = encode_call(&header, &rows);
        let reply = self.view.gossip().request(peer, PROTOCOL, frame, deadline).await;
        let reply = reply.map_err(|error| Fault::Host(error.to_string()))?;
        let decoded = decode_reply(&reply, part.pairs.len(), call.hidden);
        match decoded.map_err(|error| Fault::Host(error.to_string()))? {
            (ReplyHeader::Done { class }, rows) => {
                debug!(host = %part.host, layer = call.layer, pairs = part.pairs.len(), "computed by a peer");
                Ok((rows, Some(class)))
            }
            (ReplyHeader::NotHeld(experts), _) => {
                // Others than were asked for would be no answer, and the call would never end.
                let asked = |expert: &ExpertId| {
                    expert.layer == call.layer && part.pairs.iter().any(|pair| pair.expert == expert.index)
                };
                let absent: Vec<_> = experts.into_iter().filter(asked).collect();
                match absent.is_empty() {
                    true => Err(Fault::Host("names experts that it was not asked for".into())),
                    false => Err(Fault::Absent(absent)),
                }
            }
            (ReplyHeader::Refused(reason), _) => Err(Fault::Host(format!("refused: {reason}"))),
        }
    }
}

/// Notes why a host failed, once: it may be asked again, and fail alike.
fn note(reasons: &mut Vec<(NodeId, String)>, host: NodeId, why: String) {
    let reason = (host, why);
    if !reasons.contains(&reason) {
        reasons.push(reason);
    }
}

/// Why one part of a call failed.
enum Fault {
    /// Another host may do it.
    Host(String),
    /// The host does not hold these experts of the call; never none.
    Absent(Vec<ExpertId>),
    /// Nobody else would do better.
    Engine(EngineError),
}

/// The call's pairs in route order, which is the order of the decoder's answer.
fn pairs_of(call: &ExpertCall) -> Vec<Pair> {
    let rows = call.routes.iter().zip(0..);
    let pairs = rows.flat_map(|(routes, row)| routes.iter().map(move |route| (row, route.expert)));
    pairs.zip(0..).map(|((row, expert), slot)| Pair { row, expert, slot }).collect()
}
