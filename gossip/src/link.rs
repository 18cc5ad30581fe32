//! What the streams of one peer share, and what every part of the driver half shares.
//!
//! Owns: [`Link`], one per peer from its first connection to its last, and [`Shared`].
//! Invariant: when a peer goes down or loses its last connection its link is cut, and everything that waits on a
//! stream of it ends at once, whatever the transport believes.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use libp2p::{Multiaddr, PeerId};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::measure::{TRANSFER_BYTES_MIN, Throughput};
use crate::pool::Pool;
use crate::view::Peers;

#[derive(Debug, Default)]
pub(crate) struct Link {
    /// Cancelled when the link is cut.
    pub cut: CancellationToken,
    heard: AtomicBool,
    inbound: Mutex<Throughput>,
}

impl Link {
    /// A frame with this payload came in, and its body took this long.
    pub fn received(&self, payload_bytes: usize, took: Duration) {
        self.heard.store(true, Ordering::Relaxed);
        if payload_bytes >= TRANSFER_BYTES_MIN {
            lock(&self.inbound).add(payload_bytes, took);
        }
    }

    /// Whether anything came in since this was asked last.
    pub fn take_heard(&self) -> bool {
        self.heard.swap(false, Ordering::Relaxed)
    }

    pub fn throughput_bytes_s(&self) -> Option<f64> {
        lock(&self.inbound).bytes_per_s()
    }
}

/// What the driver, the handles and the tasks of streams all see. No lock is held across an await.
pub(crate) struct Shared {
    pub me: PeerId,
    pub control: libp2p_stream::Control,
    pub members: RwLock<Arc<BTreeSet<PeerId>>>,
    pub links: Mutex<HashMap<PeerId, Arc<Link>>>,
    pub listening: RwLock<Vec<Multiaddr>>,
    pub peers: watch::Sender<Peers>,
    pub pool: Pool,
    /// Strangers that asked for a protocol of the members.
    pub knocks: broadcast::Sender<PeerId>,
    /// Cancelled when the driver ends.
    pub stopped: CancellationToken,
    pub runtime: tokio::runtime::Handle,
}

impl Shared {
    pub fn is_member(&self, peer: &PeerId) -> bool {
        self.members.read().unwrap_or_else(PoisonError::into_inner).contains(peer)
    }

    pub fn link(&self, peer: &PeerId) -> Option<Arc<Link>> {
        lock(&self.links).get(peer).cloned()
    }

    /// The link of a peer that just connected.
    pub fn ensure_link(&self, peer: PeerId) {
        lock(&self.links).entry(peer).or_default();
    }

    pub fn cut_link(&self, peer: &PeerId) {
        if let Some(link) = lock(&self.links).remove(peer) {
            link.cut.cancel();
        }
        self.pool.forget(peer);
    }
}

/// Nothing that runs under these locks can leave a value half changed, so a poisoned one is taken as it is.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
