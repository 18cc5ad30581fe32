//! The node as a member: the log's transport, admission, and what the leader owes the mesh.
//!
//! - [`raft`]: the placement log's calls over gossip's streams.
//! - [`admit`]: both ends of the admission handshake.
//! - [`members`]: keeps gossip's idea of who is admitted equal to the log's.
//! - [`facts`]: what a node says of itself to all.
//! - [`holdings`]: which experts lie where, and what can be had of them.
//! - [`leader`]: the leader's duties: voters, and the placement.

pub mod admit;
pub mod facts;
pub mod holdings;
pub mod leader;
pub mod members;
pub mod raft;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long a proposal may take: a leader's election in the middle of it included.
pub const PROPOSE_DEADLINE: Duration = Duration::from_secs(15);

/// The wall clock, for the log's expiry dates only.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
