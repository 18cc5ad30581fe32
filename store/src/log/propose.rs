//! A command's way into the log: here if this node leads, else over to the leader, again and again
//! until the deadline.

use super::Inner;
use super::courier::ask;
use super::rpc::{Ask, Reply};
use super::sled_log::ENTRY_BYTES_MAX;
use crate::cbor;
use crate::command::{Command, Outcome, Refusal};
use crate::ids::{NodeId, Peer};
use openraft::error::RaftError;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

/// Pause before asking again, so that an election is not disturbed by a hail of questions.
const PAUSE: Duration = Duration::from_millis(50);
/// Longest that a forwarded command may occupy the leader.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// Room for the envelope around a command in the log.
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
    /// The log of this node stopped.
    #[error("the placement log stopped: {0}; restart the node")]
    Fatal(String),
}

/// What one attempt came to.
enum Attempt {
    Done(Outcome),
    Failed(ProposeError),
    /// The asked node says that this one leads.
    Elsewhere(Option<(NodeId, Peer)>),
}

/// A refusal if the command is longer than an entry may be.
fn too_long(command: &Command) -> Option<Outcome> {
    let bytes = cbor::to_vec(command).map_or(usize::MAX, |bytes| bytes.len());
    let limit = ENTRY_BYTES_MAX - ENTRY_OVERHEAD;
    let refusal = Refusal::TooLarge { what: "bytes of the command".into(), actual: bytes as u64, limit: limit as u64 };
    (bytes > limit).then_some(Outcome::Refused(refusal))
}

pub(super) async fn propose(inner: &Inner, command: Command, deadline: Duration) -> Result<Outcome, ProposeError> {
    if let Some(refused) = too_long(&command) {
        return Ok(refused);
    }
    let started = Instant::now();
    let until = started + deadline;
    let mut leader = inner.leader.clone();
    let mut hint: Option<(NodeId, Peer)> = None;
    loop {
        let known = *leader.borrow_and_update();
        let attempt = match (hint.take(), known) {
            (Some((node, peer)), _) => forward(inner, node, peer, &command, until).await,
            (None, Some(node)) if node == inner.identity.node => write_here(inner, &command, until, started).await,
            (None, Some(node)) => match peer_of(inner, node) {
                Some(peer) => forward(inner, node, peer, &command, until).await,
                None => Attempt::Failed(ProposeError::NoLeader),
            },
            (None, None) => Attempt::Failed(ProposeError::NoLeader),
        };
        let failure = match attempt {
            Attempt::Done(outcome) => return Ok(outcome),
            Attempt::Failed(ProposeError::Fatal(why)) => return Err(ProposeError::Fatal(why)),
            Attempt::Failed(error) => error,
            Attempt::Elsewhere(elsewhere) => {
                hint = elsewhere.filter(|(node, _)| *node != inner.identity.node && Some(*node) != known);
                ProposeError::NoLeader
            }
        };
        if Instant::now() >= until {
            return Err(failure);
        }
        // A new leader ends the pause early.
        let pause = (Instant::now() + PAUSE).min(until);
        if let Ok(Err(_)) = timeout_at(pause, leader.changed()).await {
            return Err(ProposeError::Fatal("it was shut down".into()));
        }
    }
}

async fn write_here(inner: &Inner, command: &Command, until: Instant, started: Instant) -> Attempt {
    match timeout_at(until, inner.raft.client_write(command.clone())).await {
        Ok(Ok(written)) => Attempt::Done(written.data),
        Ok(Err(RaftError::Fatal(error))) => Attempt::Failed(ProposeError::Fatal(error.to_string())),
        Ok(Err(RaftError::APIError(_))) => Attempt::Elsewhere(None),
        Err(_) => Attempt::Failed(ProposeError::TimedOut { waited: started.elapsed() }),
    }
}

async fn forward(inner: &Inner, leader: NodeId, peer: Peer, command: &Command, until: Instant) -> Attempt {
    // A leader that died holds nobody longer than it takes to elect another.
    let patience = until.saturating_duration_since(Instant::now()).min(inner.timing.election_max() * 2);
    let question = Ask::Propose { command: command.clone(), wait_ms: patience.as_millis() as u64 };
    let unreachable = |why: String| Attempt::Failed(ProposeError::Unreachable { leader, why });
    match timeout(patience, ask(&*inner.transport, inner.identity.mesh, leader, peer, question)).await {
        Ok(Ok(Reply::Outcome(outcome))) => Attempt::Done(outcome),
        Ok(Ok(Reply::NotLeader(elsewhere))) => Attempt::Elsewhere(elsewhere),
        Ok(Ok(Reply::NotAgreed)) => Attempt::Failed(ProposeError::TimedOut { waited: patience }),
        Ok(Ok(Reply::Failed(why))) => unreachable(why),
        Ok(Ok(Reply::Refused(refusal))) => unreachable(refusal.to_string()),
        Ok(Ok(_)) => unreachable("it answered another question".into()),
        Ok(Err(error)) => unreachable(error.to_string()),
        Err(_) => unreachable(format!("no answer within {} ms", patience.as_millis())),
    }
}

/// The network identity of a member, by the consensus group or by the state.
pub(super) fn peer_of(inner: &Inner, node: NodeId) -> Option<Peer> {
    let metrics = inner.raft.metrics();
    let metrics = metrics.borrow();
    let grouped = metrics.membership_config.membership().get_node(&node).map(|node| node.peer.clone());
    grouped.or_else(|| inner.state.borrow().members.get(&node).map(|member| member.peer.clone()))
}

/// Serves a command that another member forwarded to us as its leader.
pub(super) async fn accept(inner: &Inner, command: Command, wait_ms: u64) -> Reply {
    let me = inner.identity.node;
    let leader = *inner.leader.borrow();
    if leader != Some(me) {
        return Reply::NotLeader(leader.and_then(|node| Some((node, peer_of(inner, node)?))));
    }
    if let Some(refused) = too_long(&command) {
        return Reply::Outcome(refused);
    }
    let wait = Duration::from_millis(wait_ms).min(WAIT_MAX);
    match timeout(wait, inner.raft.client_write(command)).await {
        Ok(Ok(written)) => Reply::Outcome(written.data),
        Ok(Err(RaftError::Fatal(error))) => Reply::Failed(error.to_string()),
        Ok(Err(RaftError::APIError(_))) => Reply::NotLeader(None),
        Err(_) => Reply::NotAgreed,
    }
}
