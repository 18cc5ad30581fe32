//! Incoming rpcs: who is answered, and what.
//!
//! Only members are. Membership is what the log says, and a node's copy of the log may be behind:
//! one that was away while the mesh changed may meet a leader it has never heard of, and refusing
//! it would shut this node out for good. So a stranger is vouched for by a member that we know, and
//! that word is good for a few seconds. A node that has just joined and whose state is still empty
//! answers whoever knows the mesh's id. And a leader that left still replicates until the group has
//! let go of it: otherwise nobody could be told that it left.

use super::courier::ask;
use super::propose::accept;
use super::rpc::{Ask, Chunk, Envelope, Reply, RpcRefusal, check_append};
use super::{Inner, machine::SNAPSHOT_BYTES_MAX};
use crate::ids::{NodeId, Peer};
use futures::stream::{FuturesUnordered, StreamExt};
use openraft::error::{InstallSnapshotError, RaftError};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How long a word about a stranger holds, for or against.
const WORD_HOLDS: Duration = Duration::from_secs(2);
/// How long the members have to give it.
const WORD_PATIENCE: Duration = Duration::from_secs(2);
/// Most strangers remembered. Beyond it all are forgotten.
const GUESTS_MAX: usize = 64;

/// What members said about peers that our own state does not know.
#[derive(Default)]
pub(super) struct Guests(Mutex<BTreeMap<Peer, (Instant, bool)>>);

impl Guests {
    fn word(&self, peer: &Peer, now: Instant) -> Option<bool> {
        let words = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        words.get(peer).filter(|(given, _)| now.duration_since(*given) < WORD_HOLDS).map(|(_, word)| *word)
    }

    fn remember(&self, peer: &Peer, now: Instant, word: bool) {
        let mut words = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if words.len() >= GUESTS_MAX {
            words.clear();
        }
        words.insert(peer.clone(), (now, word));
    }
}

/// By our own copy of the state alone.
fn knows(inner: &Inner, peer: &Peer) -> bool {
    inner.state.borrow().node_of(peer).is_some()
}

/// Whether the consensus group still counts on this peer, member or not.
fn replicates(inner: &Inner, peer: &Peer) -> bool {
    let metrics = inner.raft.metrics();
    let metrics = metrics.borrow();
    let mut group = metrics.membership_config.membership().nodes();
    group.any(|(_, node)| node.peer == *peer)
}

fn is_new_here(inner: &Inner) -> bool {
    inner.state.borrow().members.is_empty()
}

pub(super) async fn admits(inner: &Inner, peer: &Peer) -> bool {
    if knows(inner, peer) || is_new_here(inner) {
        return true;
    }
    if let Some(word) = inner.guests.word(peer, Instant::now()) {
        return word;
    }
    // Until the answer is in, the same stranger causes no second round of questions.
    inner.guests.remember(peer, Instant::now(), false);
    let known: Vec<(NodeId, Peer)> = {
        let state = inner.state.borrow();
        let others = state.members.iter().filter(|(node, _)| **node != inner.identity.node);
        others.map(|(node, member)| (*node, member.peer.clone())).collect()
    };
    let mut answers: FuturesUnordered<_> = known
        .into_iter()
        .map(|(node, witness)| ask(&*inner.transport, inner.identity.mesh, node, witness, Ask::Knows(peer.clone())))
        .collect();
    let vouched = async {
        while let Some(answer) = answers.next().await {
            if matches!(answer, Ok(Reply::Knows(true))) {
                return true;
            }
        }
        false
    };
    let word = timeout(WORD_PATIENCE, vouched).await.unwrap_or(false);
    inner.guests.remember(peer, Instant::now(), word);
    word
}

pub(super) async fn handle(inner: &Inner, from: &Peer, rpc: &[u8]) -> Reply {
    match check(inner, from, rpc).await {
        Ok(question) => answer(inner, question).await,
        Err(refusal) => {
            tracing::debug!(%from, %refusal, "refused an rpc");
            Reply::Refused(refusal)
        }
    }
}

async fn check(inner: &Inner, from: &Peer, rpc: &[u8]) -> Result<Ask, RpcRefusal> {
    let Envelope { mesh, to, ask } = Envelope::decode(rpc)?;
    let ours = inner.identity;
    if mesh != ours.mesh {
        return Err(RpcRefusal::OtherMesh { got: mesh, ours: ours.mesh });
    }
    if to != ours.node {
        return Err(RpcRefusal::OtherNode { got: to, ours: ours.node });
    }
    // Asking about the one who asks about another would go round in circles.
    let admitted = match ask {
        Ask::Knows(_) => knows(inner, from),
        Ask::Propose { .. } => admits(inner, from).await,
        _ => replicates(inner, from) || admits(inner, from).await,
    };
    if !admitted {
        return Err(RpcRefusal::NotAMember(mesh));
    }
    match &ask {
        Ask::Append(request) => check_append(request)?,
        // The library seeks to the offset before it writes, which allocates up to there.
        Ask::Snapshot(chunk) if chunk.end() > SNAPSHOT_BYTES_MAX as u64 => {
            let why = format!("a snapshot beyond {SNAPSHOT_BYTES_MAX} bytes");
            return Err(RpcRefusal::Nonsense(why));
        }
        _ => {}
    }
    Ok(ask)
}

async fn answer(inner: &Inner, question: Ask) -> Reply {
    let failed = |error: &dyn std::error::Error| Reply::Failed(error.to_string());
    match question {
        Ask::Vote(request) => inner.raft.vote(request).await.map_or_else(|error| failed(&error), Reply::Vote),
        Ask::Append(request) => {
            inner.raft.append_entries(request).await.map_or_else(|error| failed(&error), Reply::Append)
        }
        Ask::Snapshot(chunk) => install(inner, chunk).await,
        Ask::Propose { command, wait_ms } => accept(inner, command, wait_ms).await,
        Ask::Knows(peer) => Reply::Knows(knows(inner, &peer)),
    }
}

async fn install(inner: &Inner, chunk: Chunk) -> Reply {
    match inner.raft.install_snapshot(chunk.into()).await {
        Ok(response) => Reply::Snapshot(response),
        Err(RaftError::APIError(InstallSnapshotError::SnapshotMismatch(mismatch))) => {
            Reply::SnapshotRestart { expect: mismatch.expect, got: mismatch.got }
        }
        Err(error) => Reply::Failed(error.to_string()),
    }
}
