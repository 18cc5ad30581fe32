//! Admission: whether a peer counts as a member, although this node's copy of the log may be behind.
//!
//! Membership is what the log says. A node that was away while the mesh changed may meet a leader it has never heard of;
//! refusing it would shut this node out for good. So an unknown peer is admitted on the word of a member that this node
//! knows, and that word holds for a few seconds. A node that has just joined, whose state is still empty, admits any peer
//! that knows the mesh's id.
//!
//! Invariant: the same stranger causes one round of questions at a time.

use super::local::LocalMember;
use super::network::call;
use super::rpc::{RpcReply, RpcRequest};
use crate::ids::{NodeId, Peer};
use crate::runtime::{self, timeout};
use futures::stream::{FuturesUnordered, StreamExt};
use std::time::Duration;

/// How long the members have to answer.
const WORD_PATIENCE: Duration = Duration::from_secs(2);

pub(super) async fn admits(local: &LocalMember, peer: &Peer) -> bool {
    if local.knows(peer) || local.is_empty() {
        return true;
    }
    if let Some(word) = local.admissions.word(peer, runtime::now()) {
        return word;
    }
    // Until the answer is in, the same stranger causes no second round of questions.
    local.admissions.remember(peer, runtime::now(), false);
    let witnesses: Vec<(NodeId, Peer)> = {
        let state = local.state.borrow();
        let others = state.members.iter().filter(|(node, _)| **node != local.identity.node);
        others.map(|(node, member)| (*node, member.peer.clone())).collect()
    };
    let mesh = local.identity.mesh;
    let mut answers: FuturesUnordered<_> = witnesses
        .into_iter()
        .map(|(node, witness)| call(&*local.transport, mesh, node, witness, RpcRequest::Knows(peer.clone())))
        .collect();
    let vouched = async {
        while let Some(answer) = answers.next().await {
            if matches!(answer, Ok(RpcReply::Knows(true))) {
                return true;
            }
        }
        false
    };
    let word = timeout(WORD_PATIENCE, vouched).await.unwrap_or(false);
    local.admissions.remember(peer, runtime::now(), word);
    word
}
