//! A member as the rest of the node sees it: one plain value per peer, published as a whole.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use libp2p::{Multiaddr, PeerId};

use super::liveness::Liveness;
use super::measure::Rtt;
use super::status::Status;

/// All members but this node, at one moment.
pub type Peers = Arc<BTreeMap<PeerId, PeerView>>;

/// One member as this node sees it.
#[derive(Clone, Debug)]
pub struct PeerView {
    pub liveness: Liveness,
    pub connected: bool,
    /// Last status it published; kept when it goes down.
    pub status: Option<Status>,
    /// Last facts it published, as it encoded them; kept when it goes down.
    pub facts: Option<Bytes>,
    /// When its process started, in milliseconds since the Unix epoch; 0 until it is known.
    pub started_ms: u64,
    /// Two processes with its identity were heard in turn a short while ago: its data folder was copied.
    pub alternates: bool,
    /// Counts of its status and its facts within its process; 0 until there are any.
    pub status_version: u64,
    pub facts_version: u64,
    /// Round-trip time of pings.
    pub rtt: Option<Rtt>,
    /// Rate at which large frames (64 KiB and more) arrive from it.
    pub throughput_bytes_s: Option<f64>,
    /// The addresses at which it may be found, the most recently proven first.
    pub addresses: Vec<Multiaddr>,
    /// When anything came from it directly.
    pub last_heard: Option<Instant>,
}
