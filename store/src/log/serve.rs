//! Incoming rpcs: whom this node answers, and what.
//!
//! Invariant: only members are answered, as [`super::admission`] finds out. There is one exception: a leader that left
//! still replicates until the group has let go of it, because otherwise nobody could learn that it left. The sender's
//! identity is the one that the transport has authenticated.

use super::admission::admits;
use super::local::LocalMember;
use super::propose::accept;
use super::rpc::{Chunk, Envelope, RpcRefusal, RpcReply, RpcRequest, check_append};
use super::standing::Memory;
use super::state_machine::SNAPSHOT_BYTES_MAX;
use crate::ids::Peer;
use openraft::error::{InstallSnapshotError, RaftError};
use openraft::raft::{AppendEntriesResponse, InstallSnapshotRequest};

pub(super) async fn handle(local: &LocalMember, from: &Peer, rpc: &[u8]) -> RpcReply {
    match check(local, from, rpc).await {
        Ok(request) => answer(local, from, request).await,
        Err(refusal) => {
            tracing::debug!(%from, %refusal, "refused an rpc");
            RpcReply::Refused(refusal)
        }
    }
}

async fn check(local: &LocalMember, from: &Peer, rpc: &[u8]) -> Result<RpcRequest, RpcRefusal> {
    let Envelope { mesh, to, request } = Envelope::decode(rpc)?;
    let ours = local.identity;
    if mesh != ours.mesh {
        return Err(RpcRefusal::OtherMesh { got: mesh, ours: ours.mesh });
    }
    if to != ours.node {
        return Err(RpcRefusal::OtherNode { got: to, ours: ours.node });
    }
    // Whether a witness is a member must not be asked of others in turn: the questions would go round in circles.
    let admitted = match request {
        RpcRequest::Knows(_) => local.knows(from),
        RpcRequest::Propose { .. } => admits(local, from).await,
        _ => local.replicates_with(from) || admits(local, from).await,
    };
    if !admitted {
        return Err(RpcRefusal::NotAMember(mesh));
    }
    match &request {
        RpcRequest::Append(request) => check_append(request)?,
        // openraft seeks to the offset before it writes, which allocates up to there.
        RpcRequest::Snapshot(chunk) if chunk.end() > SNAPSHOT_BYTES_MAX as u64 => {
            let why = format!("a snapshot beyond {SNAPSHOT_BYTES_MAX} bytes");
            return Err(RpcRefusal::Nonsense(why));
        }
        _ => {}
    }
    Ok(request)
}

async fn answer(local: &LocalMember, from: &Peer, request: RpcRequest) -> RpcReply {
    let failed = |error: &dyn std::error::Error| RpcReply::Failed(error.to_string());
    let full = local.full_disk();
    if let (Some(full), RpcRequest::Vote(_) | RpcRequest::Append(_) | RpcRequest::Snapshot(_)) = (&full, &request) {
        return failed(full);
    }
    match request {
        // A vote that it gave before may be forgotten.
        RpcRequest::Vote(_) if !local.recollection.may_vote() => not_yet(),
        RpcRequest::Append(request) if !local.recollection.may_follow(local, request.vote.leader_id.term) => not_yet(),
        RpcRequest::Vote(request) => local.raft.vote(request).await.map_or_else(|error| failed(&error), RpcReply::Vote),
        RpcRequest::Append(request) => match local.raft.append_entries(request).await {
            Ok(response) => {
                if !matches!(response, AppendEntriesResponse::HigherVote(_)) {
                    local.elections.leader_heard(local);
                }
                RpcReply::Append(response)
            }
            Err(error) => failed(&error),
        },
        RpcRequest::PreVote { last } => {
            RpcReply::PreVote(full.is_none() && local.recollection.may_vote() && local.elections.grants(local, last))
        }
        RpcRequest::Recall(node) => {
            // One after the other: readers of the state and of the metrics must not wait for each other.
            let mark = local.recollection.of(local, node);
            let known_as = local.state.borrow().node_of(from);
            let votes = local.voters.borrow().contains(&node);
            let electors = local.electors();
            RpcReply::Recalls(Memory { mark, known_as, votes, electors })
        }
        RpcRequest::Snapshot(chunk) if !local.recollection.may_follow(local, chunk.term()) => not_yet(),
        RpcRequest::Snapshot(chunk) => install(local, chunk).await,
        RpcRequest::Propose { command, wait_ms } => accept(local, from, command, wait_ms).await,
        RpcRequest::Knows(peer) => RpcReply::Knows(local.knows(&peer)),
    }
}

/// A node whose log may have gone back does not know what it has voted for.
fn not_yet() -> RpcReply {
    RpcReply::Failed("this node does not know yet what it has voted for".into())
}

async fn install(local: &LocalMember, chunk: Chunk) -> RpcReply {
    let request = InstallSnapshotRequest::from(chunk);
    let vote = request.vote;
    match local.raft.install_snapshot(request).await {
        Ok(response) => {
            // A former leader's is answered with a later vote.
            if response.vote == vote {
                local.elections.leader_heard(local);
            }
            RpcReply::Snapshot(response)
        }
        Err(RaftError::APIError(InstallSnapshotError::SnapshotMismatch(mismatch))) => {
            RpcReply::SnapshotRestart { expect: mismatch.expect, got: mismatch.got }
        }
        Err(error) => RpcReply::Failed(error.to_string()),
    }
}
