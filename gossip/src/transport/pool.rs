//! Idle streams, kept for the next request.
//!
//! Owns: per (member, protocol) the streams no request is using, and how many requests may run at once.
//! Invariants: a stream in the pool is between two frames; no more than [`CONCURRENT_MAX`] requests to one
//! member and protocol are on the wire, the rest wait their turn within their deadline.
//! Deliberately does not know: deadlines, and retries beyond the one for a stream that died while idle.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use libp2p::PeerId;
use tokio::sync::Semaphore;

use super::endpoint::Endpoint;
use super::frame::{Frame, Protocol};
use super::link::STREAMS_PER_PEER_MAX;
use super::stream::{self, FrameStream};
use crate::error::{RequestError, StreamError};
use crate::sync::lock;

/// Requests on the wire to one (member, protocol): enough for every layer of a few sequences, and far below the
/// streams one connection may have.
const CONCURRENT_MAX: usize = 32;
const _: () = assert!(2 * CONCURRENT_MAX <= STREAMS_PER_PEER_MAX);
/// Idle streams kept of one (member, protocol).
const IDLE_MAX: usize = 8;

#[derive(Debug)]
struct Slot {
    idle: Mutex<Vec<FrameStream>>,
    turns: Semaphore,
}

#[derive(Debug, Default)]
pub(crate) struct StreamPool {
    slots: Mutex<HashMap<(PeerId, &'static str), Arc<Slot>>>,
}

impl StreamPool {
    fn slot(&self, peer: PeerId, protocol: Protocol) -> Arc<Slot> {
        let fresh = || Arc::new(Slot { idle: Mutex::default(), turns: Semaphore::new(CONCURRENT_MAX) });
        lock(&self.slots).entry((peer, protocol.name)).or_insert_with(fresh).clone()
    }

    /// Drops the idle streams of `peer`.
    pub fn forget(&self, peer: &PeerId) {
        lock(&self.slots).retain(|(of, _), _| of != peer);
    }

    /// One request and its reply, on an idle stream or a new one.
    pub async fn exchange(
        &self,
        endpoint: &Endpoint,
        peer: PeerId,
        protocol: Protocol,
        frame: &Frame,
    ) -> Result<Frame, RequestError> {
        let slot = self.slot(peer, protocol);
        let _turn = slot.turns.acquire().await.expect("the semaphore is never closed");
        if let Some(mut stream) = slot.take() {
            match stream.exchange(frame).await {
                Ok(reply) => {
                    slot.give_back(stream);
                    return Ok(reply);
                }
                Err(error) if !stream.is_receiving() && died_idle(&error) => {
                    tracing::debug!(%peer, protocol = protocol.name, %error, "an idle stream had died; opening another");
                }
                Err(error) => return Err(error.into()),
            }
        }
        let mut stream = stream::open(endpoint, peer, protocol).await?;
        let reply = stream.exchange(frame).await?;
        // An idle stream keeps its connection alive, which a stranger has no claim to.
        if endpoint.is_member(&peer) {
            slot.give_back(stream);
        }
        Ok(reply)
    }
}

impl Slot {
    /// The most recently used stream, which is the least likely to have died.
    fn take(&self) -> Option<FrameStream> {
        let mut idle = lock(&self.idle);
        idle.retain(FrameStream::is_live);
        idle.pop()
    }

    fn give_back(&self, stream: FrameStream) {
        let mut idle = lock(&self.idle);
        if idle.len() < IDLE_MAX && stream.is_live() {
            idle.push(stream);
        }
    }
}

/// Whether a stream fails like this when its far side went away while it was idle.
fn died_idle(error: &StreamError) -> bool {
    matches!(error, StreamError::Closed { .. } | StreamError::Io { .. })
}
