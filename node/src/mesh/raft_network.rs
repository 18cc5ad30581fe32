//! The placement log's remote calls, as requests on gossip's persistent streams.
//!
//! Invariant: none leaves before it is known that no earlier process of this node is alive, nor once one is known to be. Two
//! processes of one voter would be two logs with one vote.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coel_gossip::{Frame, Handle, Incoming, Protocol};
use coel_store::{Log, NodeId, Peer, Transport, Unreachable};
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::Semaphore;
use tracing::debug;

use crate::ids;

/// Raft's calls carry log entries and snapshots, both bounded by the store.
pub const PROTOCOL: Protocol = Protocol::new("/coel/raft/1", 16 << 20);

/// Longest a call may take; openraft gives most of them up sooner.
const DEADLINE: Duration = Duration::from_secs(10);
/// Streams served at once. A member keeps a few; one beyond the bound is dropped, and its member calls again.
const STREAMS_MAX: usize = 256;

/// [`Transport`] on gossip.
pub struct RaftNetwork(pub Handle);

impl Transport for RaftNetwork {
    fn call(&self, to: Peer, target: NodeId, rpc: Vec<u8>) -> BoxFuture<'static, Result<Vec<u8>, Unreachable>> {
        let gossip = self.0.clone();
        async move {
            let unreachable = |why: String| Unreachable(format!("node {target}: {why}"));
            let peer = ids::peer_id(&to).ok_or_else(|| unreachable("its peer id is malformed".into()))?;
            // The copy of a data folder must not speak for the node.
            gossip.confirmed().await.map_err(|duplicate| unreachable(duplicate.to_string()))?;
            let frame = Frame { header: Bytes::new(), payload: rpc.into() };
            let reply = gossip.request(peer, PROTOCOL, frame, DEADLINE).await;
            reply.map(|frame| frame.payload.to_vec()).map_err(|error| unreachable(error.to_string()))
        }
        .boxed()
    }
}

/// Answers the log's calls of other members until the swarm stops.
///
/// Each stream has a task of its own; gossip bounds the streams that a member holds open. The identity that the stream has
/// authenticated goes to the log with every call: it becomes the author of what the member proposes.
pub async fn serve(mut incoming: Incoming, log: Log) {
    let places = Arc::new(Semaphore::new(STREAMS_MAX));
    while let Some((peer, mut stream)) = incoming.next().await {
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let log = log.clone();
        tokio::spawn(async move {
            let _place = place;
            while let Ok(Some(frame)) = stream.recv().await {
                let answer = log.handle(ids::peer_key(peer), frame.payload.to_vec()).await;
                let frame = Frame { header: Bytes::new(), payload: answer.into() };
                if let Err(error) = stream.send(&frame).await {
                    debug!(%peer, %error, "raft stream ended");
                    break;
                }
            }
        });
    }
}
