//! Answers: a chain of expert calls whose every output is a hash of its input, so that one wrong or doubled row changes all that follows.
//!
//! The calls are the node's own state machine; hosts compute hashes instead of matrices.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use coel_gossip::Frame;
use coel_gossip::membership::liveness::Liveness;
use coel_model::nn::expert_call::ExpertCall;
use coel_model::nn::router::Route;
use coel_node::experts::call::{AttemptId, CallEffect, CallError, CallInput, LayerCall, LocalError};
use coel_node::experts::dispatch::LayerReplicas;
use coel_node::experts::hosts::HostTable;
use coel_node::experts::wait::{ExpertWait, WaitStep};
use coel_node::experts::wire::{ReplyHeader, decode_call, encode_reply};
use coel_node::ids::peer_id;
use coel_store::simulation::Simulation;
use coel_store::{ExpertId, NodeId};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use futures::{FutureExt, future};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::checker::Checker;
use crate::model::{EXPERTS, Held, LAYERS, MODEL};
use crate::network::{Network, Port};
use crate::node::Node;

const TOKENS: u32 = 3;
const EXPERTS_PER_TOKEN: u16 = 2;
/// How long a host computes.
const COMPUTE: Duration = Duration::from_millis(2);

fn hash(parts: &[u32]) -> u32 {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&part.to_le_bytes());
    }
    u32::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().expect("32 bytes"))
}

/// What an expert gives for a row of one value; small whole numbers, so that sums are exact.
fn output(expert: ExpertId, row: f32) -> f32 {
    (hash(&[expert.layer.into(), expert.index.into(), row.to_bits()]) & 0xffff) as f32
}

/// The experts of a row, ascending.
fn routes(layer: u16, row: f32) -> Vec<u16> {
    let first = (hash(&[layer.into(), row.to_bits()]) % u32::from(EXPERTS)) as u16;
    let mut experts: Vec<u16> = (0..EXPERTS_PER_TOKEN).map(|nth| (first + nth) % EXPERTS).collect();
    experts.sort_unstable();
    experts
}

fn next_row(row: f32, outputs: f32) -> f32 {
    (hash(&[row.to_bits(), outputs.to_bits()]) & 0xffff) as f32
}

/// The answer to a prompt when nothing comes in between.
fn undisturbed(prompt: u32) -> Vec<f32> {
    let mut row = prompt as f32;
    let token = |_| {
        for layer in 0..LAYERS {
            let sum = routes(layer, row).into_iter().map(|index| output(ExpertId::new(layer, index), row)).sum();
            row = next_row(row, sum);
        }
        row
    };
    (0..TOKENS).map(token).collect()
}

/// A home that answers.
pub struct Home {
    pub simulation: Simulation,
    pub network: Network,
    pub checker: Checker,
    pub node: Node,
    /// A fault that tests put in: every reply is added to the outputs, whether its attempt is open or not.
    pub counts_twice: bool,
}

impl Home {
    /// Answers a prompt. Tokens other than the undisturbed ones are a violation; an error is none.
    pub async fn answer(self, prompt: u32) {
        let hosts = Arc::new(Mutex::new(HostTable::default()));
        let (mut row, mut tokens, mut waits) = (prompt as f32, Vec::new(), ExpertWait::default());
        for _ in 0..TOKENS {
            for layer in 0..LAYERS {
                let experts = routes(layer, row);
                let sum = loop {
                    match self.call(layer, row, &experts, &hosts).await {
                        Ok(sum) => break sum,
                        Err(CallError::Unavailable { .. }) => {
                            if !self.wait(layer, &experts, &mut waits).await {
                                return;
                            }
                        }
                        Err(_) => return,
                    }
                };
                row = next_row(row, sum);
            }
            tokens.push(row);
        }
        self.checker.answered();
        if tokens != undisturbed(prompt) {
            self.checker.violated(format!("the answer to {prompt} has other tokens than the undisturbed one"));
        }
    }

    async fn wait(&self, layer: u16, experts: &[u16], waits: &mut ExpertWait) -> bool {
        loop {
            let Some(replicas) = self.replicas(layer, experts) else { return false };
            match waits.step(&replicas, self.simulation.now()) {
                WaitStep::Retry => return true,
                WaitStep::GiveUp(_) => return false,
                WaitStep::Wait(time) => self.simulation.sleep(time.min(Duration::from_millis(200))).await,
            }
        }
    }

    fn replicas(&self, layer: u16, experts: &[u16]) -> Option<LayerReplicas> {
        let (log, state) = (self.node.log()?, self.node.state()?);
        let liveness = self.node.liveness.lock().unwrap().clone();
        let is_live = |node: &NodeId| {
            let peer = state.members.get(node).and_then(|member| peer_id(&member.peer));
            peer.and_then(|peer| liveness.get(&peer)).is_some_and(|liveness| *liveness != Liveness::Down)
        };
        let live = state.members.keys().copied().filter(is_live).map(|node| (node, None)).collect();
        let held = self.node.port.held.lock().unwrap().clone();
        Some(LayerReplicas::new(log.node_id(), layer, experts.iter().copied(), &state, &held, live))
    }

    /// The sum of the experts' outputs for a row.
    async fn call(&self, layer: u16, row: f32, experts: &[u16], hosts: &Mutex<HostTable>) -> Result<f32, CallError> {
        let replicas = self.replicas(layer, experts).ok_or(CallError::Cancelled)?;
        let route = |&expert: &u16| Route { expert, weight: 0.5 };
        let call = ExpertCall { layer, hidden: 1, rows: vec![row], routes: vec![experts.iter().map(route).collect()] };
        let mut call = LayerCall::new(MODEL, call, replicas);
        let mut rng = StdRng::seed_from_u64(self.simulation.random());
        let mut pending = FuturesUnordered::<BoxFuture<'static, CallInput>>::new();
        let (mut input, mut added) = (CallInput::Start, 0.0);
        loop {
            if self.counts_twice
                && let CallInput::Reply { frame, .. } = &input
                && let Ok((ReplyHeader::Done { .. }, rows)) = coel_node::experts::wire::decode_reply(frame, 1, 1)
            {
                added += rows.iter().sum::<f32>();
            }
            let effects = call.handle(input, &mut hosts.lock().unwrap(), self.simulation.now(), &mut rng);
            for effect in effects {
                match effect {
                    CallEffect::Send { attempt, host, frame, deadline } => {
                        pending.push(self.send(attempt, host, frame, deadline));
                    }
                    CallEffect::Compute { attempt, rows, work } => {
                        let outputs = compute(layer, &rows, &work, &self.node.port.held.lock().unwrap());
                        let outputs = outputs.map_err(|missing| LocalError::NotHeld(missing[0].index));
                        if self.counts_twice {
                            added += outputs.iter().flatten().sum::<f32>();
                        }
                        pending.push(future::ready(CallInput::Computed { attempt, outputs }).boxed());
                    }
                    CallEffect::ArmSecondChance { chance, after } => {
                        let due = self.simulation.sleep(after);
                        pending.push(due.map(move |()| CallInput::SecondChanceDue { chance }).boxed());
                    }
                    CallEffect::Report { .. } => {}
                    CallEffect::Finish(Ok(_)) if self.counts_twice => return Ok(added),
                    CallEffect::Finish(outcome) => return outcome.map(|outputs| outputs.values.iter().sum()),
                }
            }
            input = pending.next().await.expect("a call that has not finished waits for something");
        }
    }

    /// Asks a host. A reply that comes after the deadline comes too.
    fn send(
        &self,
        attempt: AttemptId,
        host: NodeId,
        frame: Frame,
        deadline: Duration,
    ) -> BoxFuture<'static, CallInput> {
        let peer = self.node.state().and_then(|state| peer_id(&state.members.get(&host)?.peer));
        let Some(peer) = peer else {
            return future::ready(CallInput::Failed { attempt, reason: "no member".into() }).boxed();
        };
        let simulation = self.simulation.clone();
        let asked = self.network.ask(&self.node.port, peer, move |there: Port| serve(simulation, there, frame).boxed());
        let until = self.simulation.sleep(deadline);
        async move {
            match future::select(asked, until).await {
                future::Either::Left((Ok(frame), _)) => CallInput::Reply { attempt, frame },
                future::Either::Left((Err(reason), _)) => CallInput::Failed { attempt, reason },
                future::Either::Right(_) => CallInput::DeadlineReached { attempt },
            }
        }
        .boxed()
    }
}

/// A host's side of a call.
async fn serve(simulation: Simulation, there: Port, frame: Frame) -> Option<Frame> {
    let (header, rows) = decode_call(&frame).ok()?;
    simulation.sleep(COMPUTE).await;
    let work: Vec<_> =
        header.work.iter().map(|w| (w.expert, w.rows.iter().map(|row| u32::from(*row)).collect())).collect();
    let outputs = compute(header.layer, &rows, &work, &there.held.lock().unwrap());
    Some(match outputs {
        Ok(outputs) => encode_reply(&ReplyHeader::Done { class: "simulated/exact".into() }, &outputs),
        Err(missing) => encode_reply(&ReplyHeader::NotHeld(missing), &[]),
    })
}

/// One output per pair, or the experts that are not held.
fn compute(layer: u16, rows: &[f32], work: &[(u16, Vec<u32>)], held: &Held) -> Result<Vec<f32>, Vec<ExpertId>> {
    let id = |index: u16| ExpertId::new(layer, index);
    let missing: Vec<ExpertId> = work.iter().map(|(index, _)| id(*index)).filter(|id| !held.contains_key(id)).collect();
    if !missing.is_empty() {
        return Err(missing);
    }
    Ok(work.iter().flat_map(|(index, of)| of.iter().map(|row| output(id(*index), rows[*row as usize]))).collect())
}
