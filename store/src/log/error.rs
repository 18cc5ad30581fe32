//! Why there is no log, or no log any more.

use super::sled_log::StoreError;
use crate::disk::OpenError;
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
    /// The times contradict each other.
    #[error("the log's timing makes no sense: {0}")]
    Timing(String),
    /// The log stopped, for good.
    #[error("the placement log stopped: {0}; check the disk, then restart the node")]
    Fatal(String),
}

impl From<StoreError> for LogError {
    fn from(error: StoreError) -> Self {
        Self::Fatal(error.to_string())
    }
}
