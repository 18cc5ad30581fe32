//! The home's side: has one layer's experts computed, here and by peers, and moves on to a replica when a host fails.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use coel_gossip::{Liveness, PeerId, PeerView};
use coel_model::engine::EngineError;
use coel_model::experts::ExpertCall;
use coel_store::{Epoch, ExpertId, NodeId, Precision, State};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tracing::{debug, warn};

use super::dispatch::{Call, HostLoad, Missing, Pair, Replicas, assign};
use super::hosts::Hosts;
use super::wire::{CallHeader, PROTOCOL, ReplyHeader, VERSION, decode_reply, encode_call};
use crate::ids;
use crate::service::Usage;
use crate::shared::{Held, Serving, Shared};

/// Times that hosts which failed are asked again when nobody else is left: a connection may have broken, not the host.
const SECOND_CHANCES: u32 = 2;
/// Pause before that.
const SECOND_CHANCE_AFTER: Duration = Duration::from_millis(200);

/// One generation's way to experts, wherever they are.
pub struct Caller {
    shared: Arc<Shared>,
    serving: Serving,
    hosts: SharedHosts,
    rng: SmallRng,
    /// What this generation has cost so far, and who took part.
    pub usage: Usage,
}

/// What this node, as a home, knows of its hosts; shared by its generations.
pub type SharedHosts = Arc<Mutex<Hosts>>;

fn lock(hosts: &SharedHosts) -> MutexGuard<'_, Hosts> {
    hosts.lock().expect("no panic while held")
}

/// One call in flight; over when dropped, also when its generation is cancelled.
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
    held: &'a Held,
    hosts: &'a SharedHosts,
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
    /// A caller for one generation on `serving`.
    pub fn new(shared: Arc<Shared>, serving: Serving, hosts: SharedHosts) -> Self {
        let trunk = Some(serving.trunk).filter(|trunk| *trunk != Precision::Bf16);
        let other_classes = trunk.map(|trunk| serving.class(&[trunk].into())).into_iter().collect();
        let usage = Usage { other_classes, ..Usage::default() };
        Self { shared, serving, hosts, rng: SmallRng::from_os_rng(), usage }
    }

    /// Has every (row, expert) pair of the call computed. Returns one row of `hidden` floats per pair, in route order.
    ///
    /// # Errors
    /// [`CallError`]; it names the experts that nobody computed and the hosts that failed.
    pub async fn run(&mut self, call: &ExpertCall) -> Result<Vec<f32>, CallError> {
        let layer = call.layer;
        let mut open = pairs_of(call);
        let mut outputs = vec![0.0; open.len() * call.hidden];
        let mut failed = BTreeSet::new();
        let mut reasons = Vec::new();
        let mut chances = SECOND_CHANCES;
        while !open.is_empty() {
            let (state, peers, held) = (self.shared.state(), self.shared.peers(), self.shared.held.borrow().clone());
            let view = View {
                home: self.shared.log.node_id(),
                state: &state,
                peers: &peers,
                held: &held,
                hosts: &self.hosts,
                now: Instant::now(),
            };
            let calls = match assign(layer, &open, &view, &failed, &mut self.rng) {
                Ok(calls) => calls,
                Err(_) if chances > 0 && !failed.is_empty() => {
                    chances -= 1;
                    failed.clear();
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
            let mut left = Vec::new();
            let mut usage = Usage::default();
            while let Some((part, result)) = running.next().await {
                match result {
                    Ok((rows, class)) => {
                        for (pair, row) in part.pairs.iter().zip(rows.chunks_exact(call.hidden)) {
                            let start = pair.slot as usize * call.hidden;
                            outputs[start..start + call.hidden].copy_from_slice(row);
                        }
                        let count = part.pairs.len() as u64;
                        match class {
                            None => {
                                usage.rows_local += count;
                                let experts = part.pairs.iter().map(|pair| ExpertId { layer, index: pair.expert });
                                let precisions = experts.filter_map(|expert| held.get(&expert).copied()).collect();
                                usage.other_classes.push(self.serving.class(&precisions));
                            }
                            Some(class) => {
                                usage.rows_remote += count;
                                usage.other_classes.push(class);
                            }
                        }
                    }
                    Err(Fault::Engine(error)) => return Err(error.into()),
                    Err(Fault::Host(why)) => {
                        warn!(host = %part.host, layer, why, "an expert call failed; asking a replica");
                        self.shared.metrics.expert_calls_failed.inc();
                        lock(&self.hosts).failed(part.host, Instant::now());
                        failed.insert(part.host);
                        reasons.push((part.host, why));
                        left.extend(part.pairs);
                    }
                }
            }
            drop(running);
            self.note(usage);
            open = left;
        }
        Ok(outputs)
    }

    fn note(&mut self, usage: Usage) {
        self.usage.rows_local += usage.rows_local;
        self.usage.rows_remote += usage.rows_remote;
        self.shared.metrics.rows_local.inc_by(usage.rows_local);
        self.shared.metrics.rows_remote.inc_by(usage.rows_remote);
        let own = self.serving.class(&[Precision::Bf16].into());
        for class in usage.other_classes {
            if class != own && !self.usage.other_classes.contains(&class) {
                self.usage.other_classes.push(class);
            }
        }
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
        let result = if part.host == self.shared.log.node_id() {
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
        match self.serving.engine.run_experts(call.layer, rows, work).await {
            Ok(outputs) => Ok((outputs, None)),
            // Dropped since the view was taken: a replica has it.
            Err(EngineError::NotHeld(expert)) => Err(Fault::Host(format!("no longer holds {expert}"))),
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
            model: self.serving.known.id,
            epoch,
            layer: call.layer,
            hidden_size: call.hidden as u32,
            work: part.work(),
        };
        let peer = peer.ok_or_else(|| Fault::Host("has no valid peer id".into()))?;
        let frame = encode_call(&header, &rows);
        let reply = self.shared.gossip.request(peer, PROTOCOL, frame, deadline).await;
        let reply = reply.map_err(|error| Fault::Host(error.to_string()))?;
        let decoded = decode_reply(&reply, part.pairs.len(), call.hidden);
        match decoded.map_err(|error| Fault::Host(error.to_string()))? {
            (ReplyHeader::Done { class }, rows) => {
                debug!(host = %part.host, layer = call.layer, pairs = part.pairs.len(), "computed by a peer");
                Ok((rows, Some(class)))
            }
            (ReplyHeader::NotHeld(experts), _) => {
                let experts: Vec<_> = experts.iter().take(8).map(ToString::to_string).collect();
                Err(Fault::Host(format!("does not hold {}", experts.join(", "))))
            }
            (ReplyHeader::Refused(reason), _) => Err(Fault::Host(format!("refused: {reason}"))),
        }
    }
}

/// Why one part of a call failed.
enum Fault {
    /// Another host may do it.
    Host(String),
    /// Nobody else would do better.
    Engine(EngineError),
}

/// The call's pairs in route order, which is the order of the decoder's answer.
fn pairs_of(call: &ExpertCall) -> Vec<Pair> {
    let rows = call.routes.iter().zip(0..);
    let pairs = rows.flat_map(|(routes, row)| routes.iter().map(move |route| (row, route.expert)));
    pairs.zip(0..).map(|((row, expert), slot)| Pair { row, expert, slot }).collect()
}
