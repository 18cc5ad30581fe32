//! A command's way into the log: directly where this node leads, else through the leader, again and again until the
//! deadline.
//!
//! Invariant: the leader stamps the author of an entry. Its own commands are its own; a forwarded one is the word of the
//! member whose authenticated connection brought it, by the members that the log itself lists.

use super::local::LocalMember;
use super::network::call;
use super::rpc::{RpcRefusal, RpcReply, RpcRequest};
use super::sled_log::ENTRY_BYTES_MAX;
use super::types::Proposal;
use crate::cbor;
use crate::disk::FullDisk;
use crate::ids::{NodeId, Peer};
use crate::runtime::{self, timeout, timeout_at};
use crate::state::command::{Command, Outcome, Refusal};
use crate::sync::lock;
use openraft::error::RaftError;
use rand::seq::IteratorRandom;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Pause before another attempt, so that an election is not disturbed by a hail of proposals.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a member may take to say who leads.
const ASK_PATIENCE: Duration = Duration::from_secs(1);
/// Longest time for which a forwarded command may occupy the leader.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// Room for what an entry holds beside its command: the log id and the author.
const ENTRY_OVERHEAD: usize = 256;

/// Why a command has no outcome. Only [`ProposeError::Fatal`] is final; the others may be retried.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// No majority of the voters is up, as far as this node can see.
    #[error("no leader: a majority of the mesh's voters is not reachable; the last agreed placement stays in force")]
    NoLeader,
    /// The leader is known but did not answer.
    #[error("the leader, node {leader}, did not answer: {why}")]
    Unreachable {
        /// The leader.
        leader: NodeId,
        /// What the transport said.
        why: String,
    },
    /// The leader took the command but could not commit it in time. It may still happen.
    #[error(
        "a majority of the mesh's voters did not agree within {} ms (it may still happen); see with `coel status` who is up",
        waited.as_millis()
    )]
    TimedOut {
        /// How long.
        waited: Duration,
    },
    /// This node's log takes no writes, and no other node is known to lead. It goes on by itself once there is room.
    #[error("this node's log takes nothing now (it may still happen): {0}")]
    Full(FullDisk),
    /// The log of this node stopped.
    #[error("the placement log stopped: {0}; restart the node")]
    Fatal(String),
}

/// The result of one attempt.
enum Attempt {
    Done(Outcome),
    Failed(ProposeError),
    /// The node that was asked names another leader, or none.
    Elsewhere(Option<(NodeId, Peer)>),
}

/// A refusal if the command is longer than an entry may be.
fn too_long(command: &Command) -> Option<Outcome> {
    let bytes = cbor::to_vec(command).map_or(usize::MAX, |bytes| bytes.len());
    let limit = ENTRY_BYTES_MAX - ENTRY_OVERHEAD;
    let refusal = Refusal::TooLarge { what: "bytes of the command".into(), actual: bytes as u64, limit: limit as u64 };
    (bytes > limit).then_some(Outcome::Refused(refusal))
}

/// A refusal if a member is to be forgotten that this leader hears, whatever the proposer believes. Who is up is not in the
/// state, so the log itself cannot refuse it.
fn still_up(local: &LocalMember, command: &Command) -> Option<Outcome> {
    match command {
        Command::Forget { node } if lock(&local.up).contains(node) => Some(Outcome::Refused(Refusal::StillUp(*node))),
        _ => None,
    }
}

pub(super) async fn propose(
    local: &LocalMember,
    command: Command,
    deadline: Duration,
) -> Result<Outcome, ProposeError> {
    if let Some(refused) = too_long(&command) {
        return Ok(refused);
    }
    let started = runtime::now();
    let until = started + deadline;
    let mut leader = local.leader.clone();
    let mut hint: Option<(NodeId, Peer)> = None;
    loop {
        let known = *leader.borrow_and_update();
        if let (None, Some(full)) = (known, local.full_disk()) {
            return Err(ProposeError::Full(full));
        }
        let attempt = match (hint.take(), known) {
            (Some((node, peer)), _) => forward(local, node, peer, &command, until).await,
            (None, Some(node)) if node == local.identity.node => write_here(local, &command, until, started).await,
            (None, Some(node)) => match local.peer_of(node) {
                Some(peer) => forward(local, node, peer, &command, until).await,
                None => Attempt::Failed(ProposeError::NoLeader),
            },
            // No leader speaks to a node that is a member under another id by now. Any member knows who leads.
            (None, None) if local.recollection.is_lost() => match any(local.others()) {
                Some((node, peer)) => {
                    forward(local, node, peer, &command, until.min(runtime::now() + ASK_PATIENCE)).await
                }
                None => Attempt::Failed(ProposeError::NoLeader),
            },
            (None, None) => Attempt::Failed(ProposeError::NoLeader),
        };
        let failure = match attempt {
            Attempt::Done(outcome) => return Ok(outcome),
            Attempt::Failed(error @ (ProposeError::Fatal(_) | ProposeError::Full(_))) => return Err(error),
            Attempt::Failed(error) => error,
            Attempt::Elsewhere(elsewhere) => {
                hint = elsewhere.filter(|(node, _)| *node != local.identity.node && Some(*node) != known);
                ProposeError::NoLeader
            }
        };
        if runtime::now() >= until {
            return Err(failure);
        }
        // A new leader ends the pause early.
        let pause = (runtime::now() + PAUSE).min(until);
        if let Ok(Err(_)) = timeout_at(pause, leader.changed()).await {
            return Err(ProposeError::Fatal("it was shut down".into()));
        }
    }
}

fn any(others: BTreeMap<NodeId, Peer>) -> Option<(NodeId, Peer)> {
    others.into_iter().choose(&mut runtime::rng())
}

async fn write_here(local: &LocalMember, command: &Command, until: Instant, started: Instant) -> Attempt {
    let proposal = Proposal { author: local.identity.node, command: command.clone() };
    let written = tokio::select! {
        biased;
        written = timeout_at(until, local.raft.client_write(proposal)) => written,
        full = local.fills() => return Attempt::Failed(ProposeError::Full(full)),
    };
    match written {
        Ok(Ok(written)) => Attempt::Done(written.data),
        Ok(Err(RaftError::Fatal(error))) => Attempt::Failed(ProposeError::Fatal(error.to_string())),
        Ok(Err(RaftError::APIError(_))) => Attempt::Elsewhere(None),
        Err(_) => Attempt::Failed(ProposeError::TimedOut { waited: started.elapsed() }),
    }
}

async fn forward(local: &LocalMember, leader: NodeId, peer: Peer, command: &Command, until: Instant) -> Attempt {
    // A leader that died delays a proposer no longer than the election of another takes.
    let patience = until.saturating_duration_since(runtime::now()).min(local.timing.election_max() * 2);
    let request = RpcRequest::Propose { command: command.clone(), wait_ms: patience.as_millis() as u64 };
    let unreachable = |why: String| Attempt::Failed(ProposeError::Unreachable { leader, why });
    match timeout(patience, call(&*local.transport, local.identity.mesh, leader, peer, request)).await {
        Ok(Ok(RpcReply::Outcome(outcome))) => Attempt::Done(outcome),
        Ok(Ok(RpcReply::NotLeader(elsewhere))) => Attempt::Elsewhere(elsewhere),
        Ok(Ok(RpcReply::NotAgreed)) => Attempt::Failed(ProposeError::TimedOut { waited: patience }),
        Ok(Ok(RpcReply::Failed(why))) => unreachable(why),
        Ok(Ok(RpcReply::Refused(refusal))) => unreachable(refusal.to_string()),
        Ok(Ok(_)) => unreachable("it answered another request".into()),
        Ok(Err(error)) => unreachable(error.to_string()),
        Err(_) => unreachable(format!("no answer within {} ms", patience.as_millis())),
    }
}

/// Serves a command that the member `from` forwarded to this node as its leader.
pub(super) async fn accept(local: &LocalMember, from: &Peer, command: Command, wait_ms: u64) -> RpcReply {
    let leader = *local.leader.borrow();
    if leader != Some(local.identity.node) {
        return RpcReply::NotLeader(leader.and_then(|node| Some((node, local.peer_of(node)?))));
    }
    // Another member's word admits a stranger to the conversation, but gives it no voice: that is the log's alone.
    let Some(author) = local.state.borrow().node_of(from) else {
        return RpcReply::Refused(RpcRefusal::NotAMember(local.identity.mesh));
    };
    let refused = too_long(&command).or_else(|| still_up(local, &command));
    if let Some(refused) = refused {
        return RpcReply::Outcome(refused);
    }
    let wait = Duration::from_millis(wait_ms).min(WAIT_MAX);
    let written = tokio::select! {
        biased;
        written = timeout(wait, local.raft.client_write(Proposal { author, command })) => written,
        full = local.fills() => return RpcReply::Failed(full.to_string()),
    };
    match written {
        Ok(Ok(written)) => RpcReply::Outcome(written.data),
        Ok(Err(RaftError::Fatal(error))) => RpcReply::Failed(error.to_string()),
        Ok(Err(RaftError::APIError(_))) => RpcReply::NotLeader(None),
        Err(_) => RpcReply::NotAgreed,
    }
}
