//! Why there is no log, or no log any more.

use super::sled_log::StoreError;
use crate::disk::{DiskError, OpenError};
use std::path::PathBuf;

/// Why there is no log.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LogError {
    /// The database does not open, for example because another process has it.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The folder belongs to a mesh already.
    #[error("{path} already belongs to a mesh; start it with coel up, or choose an empty data folder")]
    AlreadyMember {
        /// The data folder.
        path: PathBuf,
    },
    /// The folder belongs to no mesh.
    #[error("{path} belongs to no mesh; create one (coel up --new) or join one (coel join INVITE)")]
    NotAMember {
        /// The data folder.
        path: PathBuf,
    },
    /// The log does not list this node as a member, so no mesh can go on from it.
    #[error(
        "the log in {path} does not list this node as a member, so there is nothing to go on from; join a mesh (coel join INVITE)"
    )]
    NothingToRecover {
        /// The data folder.
        path: PathBuf,
    },
    /// The log is not what was written.
    #[error(transparent)]
    Damaged(#[from] Box<DamagedLog>),
    /// The times contradict each other.
    #[error("the log's timing makes no sense: {0}")]
    Timing(String),
    /// The log stopped, for good.
    #[error("the placement log stopped: {0}; check the disk, then restart the node")]
    Fatal(String),
}

impl From<StoreError> for LogError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Disk(DiskError::Full(full)) => OpenError::from(full).into(),
            error => Self::Fatal(error.to_string()),
        }
    }
}

/// A log that is not what was written, so that its node cannot go on as the member that it was. The advice never costs more than is
/// lost already: it deletes nothing.
#[derive(Clone, Debug, thiserror::Error)]
#[error(
    "{damage}. This node cannot go on as {member}. Keep the data folder: the weights in it are not affected. If another member is \
     left, use a new invite of its mesh here (coel join INVITE): the damaged log is set aside as {kept}, and this node joins anew, \
     under a new id. If this node had the only vote, the members, invites and models that no other member has heard of are lost \
     with this log: where another member is left, run `coel recover` on that one first; where none is, move {log} away and begin \
     a mesh with `coel up --new`"
)]
pub struct DamagedLog {
    /// Which file, and what is wrong with it.
    pub damage: OpenError,
    /// Which node it was, as far as that is known.
    pub member: String,
    /// The log's folder.
    pub log: PathBuf,
    /// Where joining anew keeps it.
    pub kept: PathBuf,
}
