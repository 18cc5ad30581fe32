//! Carries the consensus library's calls over the node's [`Transport`].
//!
//! It knows how to put a call into an envelope and what a reply means to the library: a member
//! that cannot be reached is given a pause, one that answers nonsense too. It does not know what a
//! connection is.

use super::rpc::{Ask, Envelope, Reply};
use super::types::{RaftNode, TypeConfig};
use crate::ids::{MeshId, NodeId, Peer};
use futures::future::BoxFuture;
use openraft::error::{
    InstallSnapshotError, NetworkError, PayloadTooLarge, RPCError, RaftError, RemoteError, SnapshotMismatch,
};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest,
    VoteResponse,
};
use openraft::{RaftNetwork, RaftNetworkFactory};
use std::sync::Arc;

/// A member could not be asked: no connection, or it broke before the whole reply was there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unreachable(pub String);

/// How bytes get to another member and the reply back; the node crate implements it.
///
/// The future may be dropped at any moment (the log has timeouts of its own). A call that was
/// answered twice or answered late must not be confused with another one. `to` is the identity that
/// the other side must have proved.
pub trait Transport: Send + Sync + 'static {
    /// Hands `rpc` to [`Log::handle`](crate::Log::handle) of member `target` and returns what that
    /// returns. Both are at most [`RPC_BYTES_MAX`](crate::RPC_BYTES_MAX) bytes.
    fn call(&self, to: Peer, target: NodeId, rpc: Vec<u8>) -> BoxFuture<'static, Result<Vec<u8>, Unreachable>>;
}

/// One question, one answer.
pub(crate) async fn ask(
    transport: &dyn Transport,
    mesh: MeshId,
    to: NodeId,
    peer: Peer,
    ask: Ask,
) -> Result<Reply, Unreachable> {
    let bytes = Envelope { mesh, to, ask }.encode().map_err(|error| Unreachable(error.to_string()))?;
    let reply = transport.call(peer, to, bytes).await?;
    Reply::decode(&reply).map_err(|error| Unreachable(format!("reply of node {to}: {error}")))
}

/// Makes one [`Line`] per member.
pub(crate) struct Courier {
    pub transport: Arc<dyn Transport>,
    pub mesh: MeshId,
}

/// The way to one member.
pub(crate) struct Line {
    transport: Arc<dyn Transport>,
    mesh: MeshId,
    to: NodeId,
    peer: Peer,
}

impl RaftNetworkFactory<TypeConfig> for Courier {
    type Network = Line;

    async fn new_client(&mut self, target: NodeId, node: &RaftNode) -> Line {
        Line { transport: Arc::clone(&self.transport), mesh: self.mesh, to: target, peer: node.peer.clone() }
    }
}

type Failure<E = openraft::error::Infallible> = RPCError<NodeId, RaftNode, RaftError<NodeId, E>>;

impl Line {
    async fn ask<E: std::error::Error>(&self, question: Ask) -> Result<Reply, Failure<E>> {
        let reply = ask(&*self.transport, self.mesh, self.to, self.peer.clone(), question).await;
        reply.map_err(|error| self.pause(error))
    }

    fn pause<E: std::error::Error>(&self, error: Unreachable) -> Failure<E> {
        tracing::debug!(node = %self.to, %error, "cannot ask");
        RPCError::Unreachable(openraft::error::Unreachable::new(&error))
    }

    fn unexpected<E: std::error::Error>(&self, reply: Reply) -> Failure<E> {
        self.pause(Unreachable(match reply {
            Reply::Refused(refusal) => format!("node {} refused: {refusal}", self.to),
            Reply::Failed(why) => format!("node {} failed: {why}", self.to),
            _ => format!("node {} answered another question", self.to),
        }))
    }
}

impl RaftNetwork<TypeConfig> for Line {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<NodeId>, Failure> {
        let entries = rpc.entries.len() as u64;
        let envelope = Envelope { mesh: self.mesh, to: self.to, ask: Ask::Append(rpc) };
        let bytes = match envelope.encode() {
            Ok(bytes) => bytes,
            Err(_) if entries > 1 => return Err(PayloadTooLarge::new_entries_hint(entries / 2).into()),
            Err(error) => return Err(RPCError::Network(NetworkError::new(&error))),
        };
        let reply = self.transport.call(self.peer.clone(), self.to, bytes).await;
        let reply = reply.map_err(|error| self.pause(error))?;
        match Reply::decode(&reply) {
            Ok(Reply::Append(response)) => Ok(response),
            Ok(other) => Err(self.unexpected(other)),
            Err(error) => Err(self.pause(Unreachable(error.to_string()))),
        }
    }

    async fn install_snapshot(
        &mut self,
        rpc: InstallSnapshotRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<InstallSnapshotResponse<NodeId>, Failure<InstallSnapshotError>> {
        match self.ask(Ask::Snapshot(rpc.into())).await? {
            Reply::Snapshot(response) => Ok(response),
            Reply::SnapshotRestart { expect, got } => {
                let mismatch = InstallSnapshotError::SnapshotMismatch(SnapshotMismatch { expect, got });
                Err(RPCError::RemoteError(RemoteError::new(self.to, RaftError::APIError(mismatch))))
            }
            other => Err(self.unexpected(other)),
        }
    }

    async fn vote(&mut self, rpc: VoteRequest<NodeId>, _option: RPCOption) -> Result<VoteResponse<NodeId>, Failure> {
        match self.ask(Ask::Vote(rpc)).await? {
            Reply::Vote(response) => Ok(response),
            other => Err(self.unexpected(other)),
        }
    }
}
