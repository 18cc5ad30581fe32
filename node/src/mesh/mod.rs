//! This node as a member of the mesh: the log's network, admission, and what the members know of one another.
//!
//! - [`raft_network`]: the placement log's calls over gossip's streams.
//! - [`admission`]: how a stranger becomes a member.
//! - [`identity`]: this node's key on disk.
//! - [`members`]: keeps gossip's members equal to the log's, and this node's own entry true.
//! - [`advert`]: a node's offer as gossip carries it, and this node's own.
//! - [`view`]: the mesh as this node sees it.
//! - [`quorum`]: whether the voters can agree on anything; pure.
//! - [`suspicion`]: tells the log when the leader is gone.
//! - [`exclusion`]: notices that the mesh goes on without this node.
//! - [`readmission`]: comes back under a new id where the log is not what it was.
//! - [`leader`]: drives the leader's state machine, which is [`crate::placement`]'s.
//!
//! Nothing here decides where experts go.

pub mod admission;
pub mod advert;
pub mod exclusion;
pub mod identity;
pub mod leader;
pub mod members;
pub mod quorum;
pub mod raft_network;
pub mod readmission;
pub mod suspicion;
pub mod view;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use coel_store::{ProposeError, Refusal};

pub use advert::OwnOffer;
pub use quorum::Quorum;
pub use view::MeshView;

/// How long a proposal may take, an election included.
pub const PROPOSE_DEADLINE: Duration = Duration::from_secs(15);

/// Why the log did not take a command.
#[derive(Debug, thiserror::Error)]
pub enum ProposalError {
    /// The command is against the rules; repeating it does not help.
    #[error("{refusal}; {}", .refusal.remedy())]
    Refused { refusal: Refusal },
    /// Nothing can be agreed until voters come back. The command was not given to the log.
    #[error("{why}")]
    NoQuorum { why: String },
    /// The voters went down while the command was under way.
    #[error("{why}. The command may still happen when they are back; `coel status` says what is agreed")]
    QuorumLost { why: String },
    /// No answer came in time; the command may still have happened.
    #[error(transparent)]
    Failed(#[from] ProposeError),
}

/// The wall clock in milliseconds since the Unix epoch, for the log's expiry dates only.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
