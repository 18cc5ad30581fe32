//! This node as a member of the mesh: the log's network, admission, and what the members know of one another.
//!
//! - [`raft_network`]: the placement log's calls over gossip's streams.
//! - [`admission`]: how a stranger becomes a member.
//! - [`identity`]: this node's key on disk.
//! - [`members`]: keeps gossip's members equal to the log's, and this node's own entry true.
//! - [`advert`]: a node's offer as gossip carries it, and this node's own.
//! - [`view`]: the mesh as this node sees it.
//! - [`suspicion`]: tells the log when the leader is gone.
//! - [`succession`]: notices that the mesh goes on without this node.
//! - [`leader`]: drives the leader's state machine, which is [`crate::placement`]'s.
//!
//! Nothing here decides where experts go.

pub mod admission;
pub mod advert;
pub mod identity;
pub mod leader;
pub mod members;
pub mod raft_network;
pub mod succession;
pub mod suspicion;
pub mod view;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use coel_store::{Command, Log, Outcome, ProposeError, Refusal};

pub use advert::OwnOffer;
pub use view::{MeshView, Quorum};

/// How long a proposal may take, an election included.
pub const PROPOSE_DEADLINE: Duration = Duration::from_secs(15);

/// Why the log did not take a command.
#[derive(Debug, thiserror::Error)]
pub enum ProposalError {
    /// The command is against the rules; repeating it does not help.
    #[error("{refusal}; {}", .refusal.remedy())]
    Refused { refusal: Refusal },
    /// No answer came in time; the command may still have happened.
    #[error(transparent)]
    Failed(#[from] ProposeError),
}

/// Puts a command into the log, through changes of leader.
///
/// # Errors
/// [`ProposalError`].
pub async fn propose(log: &Log, command: Command) -> Result<Outcome, ProposalError> {
    match log.propose(command, PROPOSE_DEADLINE).await? {
        Outcome::Refused(refusal) => Err(ProposalError::Refused { refusal }),
        outcome => Ok(outcome),
    }
}

/// The wall clock in milliseconds since the Unix epoch, for the log's expiry dates only.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
