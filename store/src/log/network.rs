//! The way out: the consensus library's calls over the node's [`Transport`].
//!
//! The module puts a call into its envelope and translates a reply for the library: a member that cannot be reached, or
//! that answers nonsense, is given a pause. It does not know what a connection is.

use super::rpc::{Envelope, RpcReply, RpcRequest};
use super::types::{RaftNode, TypeConfig};
use crate::ids::{MeshId, NodeId, Peer};
use futures::future::BoxFuture;
use openraft::RaftNetworkFactory;
use openraft::error::{
    InstallSnapshotError, NetworkError, PayloadTooLarge, RPCError, RaftError, RemoteError, SnapshotMismatch,
};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest,
    VoteResponse,
};
use std::sync::Arc;

/// A member could not be called: there is no connection, or it broke before the whole reply arrived.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unreachable(pub String);

/// How bytes get to another member and the reply back; the node crate implements it.
///
/// The future may be dropped at any moment, because the log has timeouts of its own. A late or repeated reply must not be
/// taken for the reply to another call. `to` is the identity that the other side must have proved.
pub trait Transport: Send + Sync + 'static {
    /// Hands `rpc` to [`Log::handle`](crate::Log::handle) of member `target`, together with this node's proven identity,
    /// and returns what that returns. Both are at most [`RPC_BYTES_MAX`](crate::RPC_BYTES_MAX) bytes.
    fn call(&self, to: Peer, target: NodeId, rpc: Vec<u8>) -> BoxFuture<'static, Result<Vec<u8>, Unreachable>>;
}

/// Sends one request and returns its reply.
pub(super) async fn call(
    transport: &dyn Transport,
    mesh: MeshId,
    to: NodeId,
    peer: Peer,
    request: RpcRequest,
) -> Result<RpcReply, Unreachable> {
    let bytes = Envelope { mesh, to, request }.encode().map_err(|error| Unreachable(error.to_string()))?;
    let reply = transport.call(peer, to, bytes).await?;
    RpcReply::decode(&reply).map_err(|error| Unreachable(format!("reply of node {to}: {error}")))
}

/// Makes one [`PeerClient`] per member.
pub(super) struct RaftNetwork {
    pub transport: Arc<dyn Transport>,
    pub mesh: MeshId,
}

/// Calls one member.
pub(super) struct PeerClient {
    transport: Arc<dyn Transport>,
    mesh: MeshId,
    to: NodeId,
    peer: Peer,
}

impl RaftNetworkFactory<TypeConfig> for RaftNetwork {
    type Network = PeerClient;

    async fn new_client(&mut self, target: NodeId, node: &RaftNode) -> PeerClient {
        PeerClient { transport: Arc::clone(&self.transport), mesh: self.mesh, to: target, peer: node.peer.clone() }
    }
}

type Failure<E = openraft::error::Infallible> = RPCError<NodeId, RaftNode, RaftError<NodeId, E>>;

impl PeerClient {
    async fn call<E: std::error::Error>(&self, request: RpcRequest) -> Result<RpcReply, Failure<E>> {
        let reply = call(&*self.transport, self.mesh, self.to, self.peer.clone(), request).await;
        reply.map_err(|error| self.pause(error))
    }

    fn pause<E: std::error::Error>(&self, error: Unreachable) -> Failure<E> {
        tracing::debug!(node = %self.to, %error, "cannot call a member");
        RPCError::Unreachable(openraft::error::Unreachable::new(&error))
    }

    fn unexpected<E: std::error::Error>(&self, reply: RpcReply) -> Failure<E> {
        self.pause(Unreachable(match reply {
            RpcReply::Refused(refusal) => format!("node {} refused: {refusal}", self.to),
            RpcReply::Failed(why) => format!("node {} failed: {why}", self.to),
            _ => format!("node {} answered another request", self.to),
        }))
    }
}

impl openraft::RaftNetwork<TypeConfig> for PeerClient {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<NodeId>, Failure> {
        let entries = rpc.entries.len() as u64;
        let envelope = Envelope { mesh: self.mesh, to: self.to, request: RpcRequest::Append(rpc) };
        let bytes = match envelope.encode() {
            Ok(bytes) => bytes,
            Err(_) if entries > 1 => return Err(PayloadTooLarge::new_entries_hint(entries / 2).into()),
            Err(error) => return Err(RPCError::Network(NetworkError::new(&error))),
        };
        let reply = self.transport.call(self.peer.clone(), self.to, bytes).await;
        let reply = reply.map_err(|error| self.pause(error))?;
        match RpcReply::decode(&reply) {
            Ok(RpcReply::Append(response)) => Ok(response),
            Ok(other) => Err(self.unexpected(other)),
            Err(error) => Err(self.pause(Unreachable(error.to_string()))),
        }
    }

    async fn install_snapshot(
        &mut self,
        rpc: InstallSnapshotRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<InstallSnapshotResponse<NodeId>, Failure<InstallSnapshotError>> {
        match self.call(RpcRequest::Snapshot(rpc.into())).await? {
            RpcReply::Snapshot(response) => Ok(response),
            RpcReply::SnapshotRestart { expect, got } => {
                let mismatch = InstallSnapshotError::SnapshotMismatch(SnapshotMismatch { expect, got });
                Err(RPCError::RemoteError(RemoteError::new(self.to, RaftError::APIError(mismatch))))
            }
            other => Err(self.unexpected(other)),
        }
    }

    async fn vote(&mut self, rpc: VoteRequest<NodeId>, _option: RPCOption) -> Result<VoteResponse<NodeId>, Failure> {
        match self.call(RpcRequest::Vote(rpc)).await? {
            RpcReply::Vote(response) => Ok(response),
            other => Err(self.unexpected(other)),
        }
    }
}
