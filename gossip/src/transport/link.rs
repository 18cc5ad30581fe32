//! What the streams of one peer share.
//!
//! Owns [`Link`], one per peer from its first connection to its last. Invariants: when a peer goes down or loses its last
//! connection its link is cut, and everything that waits on a stream of it ends at once, whatever the transport believes;
//! of each protocol a peer has at most [`STREAMS_PER_PEER_MAX`] streams open to us.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::membership::measure::{TRANSFER_BYTES_MIN, Throughput};
use crate::sync::lock;

/// Streams of one protocol that a peer may have open to us; each costs its server a task. Twice what the pool of an honest
/// peer keeps on the wire, because a caller whose deadline has passed opens another stream while the old one is being
/// served.
pub(crate) const STREAMS_PER_PEER_MAX: usize = 64;

#[derive(Debug, Default)]
pub(crate) struct Link {
    /// Cancelled when the link is cut.
    pub cut: CancellationToken,
    heard: AtomicBool,
    inbound: Mutex<Throughput>,
    /// Places for the peer's streams, by protocol.
    places: Mutex<HashMap<&'static str, Arc<Semaphore>>>,
}

/// A peer's right to one stream, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
}

impl Link {
    /// A frame with this payload came in, and its body took this long.
    pub fn received(&self, payload_bytes: usize, took: Duration) {
        self.heard.store(true, Ordering::Relaxed);
        if payload_bytes >= TRANSFER_BYTES_MIN {
            lock(&self.inbound).add(payload_bytes, took);
        }
    }

    /// Whether anything came in since the last call.
    pub fn take_heard(&self) -> bool {
        self.heard.swap(false, Ordering::Relaxed)
    }

    pub fn throughput_bytes_s(&self) -> Option<f64> {
        lock(&self.inbound).bytes_per_s()
    }

    /// A place for one more stream that the peer opens, unless it has too many.
    pub fn admit(&self, protocol: &'static str) -> Option<Place> {
        let places = lock(&self.places)
            .entry(protocol)
            .or_insert_with(|| Arc::new(Semaphore::new(STREAMS_PER_PEER_MAX)))
            .clone();
        places.try_acquire_owned().ok().map(|permit| Place { _permit: permit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_has_so_many_streams_of_a_protocol_and_no_more() {
        let link = Link::default();
        let mut held: Vec<_> = (0..STREAMS_PER_PEER_MAX).map(|_| link.admit("/one").expect("a place")).collect();
        assert!(link.admit("/one").is_none());
        assert!(link.admit("/other").is_some(), "each protocol has places of its own");
        held.pop();
        assert!(link.admit("/one").is_some(), "a stream that ended gives its place back");
    }
}
