//! What is configured before a node starts.

use std::time::Duration;

use libp2p::Multiaddr;

use crate::identity::Identity;
use crate::membership::liveness::Thresholds;
use crate::membership::status::Policy;

/// Everything about gossip that is decided before [`start`](crate::start). The members come later, through
/// [`Handle::set_members`](crate::Handle::set_members).
#[derive(Clone, Debug)]
pub struct Config {
    pub identity: Identity,
    /// Addresses to listen on. Port 0 takes a free one. Default: TCP and QUIC on every IPv4 interface, port 0.
    pub listen: Vec<Multiaddr>,
    /// Addresses at which some member may be found beyond the local network, with or without `/p2p/ID`. They are
    /// dialled again from time to time as long as a member is missing. Default: none.
    pub peers: Vec<Multiaddr>,
    /// Announce this node on the local network, and look for members there. Default: on.
    pub mdns: bool,
    /// When this node's status is sent.
    pub status: Policy,
    /// When silence and refusals become verdicts.
    pub liveness: Thresholds,
    /// Time between two pings of a connection; well below `liveness.suspect_after`. Default 500 ms.
    pub ping_interval: Duration,
    /// How long a connection without streams is kept. Members always have a stream, so this ends connections of
    /// others. Default 60 s.
    pub idle_timeout: Duration,
    /// Most connections with strangers, established or being established. Default 64.
    pub strangers_max: u32,
}

impl Config {
    /// The defaults for `identity`.
    pub fn new(identity: Identity) -> Config {
        let any = |rest: &str| format!("/ip4/0.0.0.0/{rest}").parse().expect("a well-formed multiaddress");
        Config {
            identity,
            listen: vec![any("tcp/0"), any("udp/0/quic-v1")],
            peers: Vec::new(),
            mdns: true,
            status: Policy::default(),
            liveness: Thresholds::default(),
            ping_interval: Duration::from_millis(500),
            idle_timeout: Duration::from_secs(60),
            strangers_max: 64,
        }
    }
}
