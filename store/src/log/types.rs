//! The consensus library, told about our types: commands in, outcomes out, members by `NodeId`.

use crate::command::{Command, Outcome};
use crate::ids::{NodeId, Peer};
use serde::{Deserialize, Serialize};
use std::io::Cursor;

/// What the consensus group keeps per member: enough to call it. Names and addresses are in the
/// replicated state; this copy is needed before that state has reached a newcomer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RaftNode {
    /// Its network identity.
    pub peer: Peer,
}

openraft::declare_raft_types!(
    /// Types of the placement log.
    pub TypeConfig:
        D = Command,
        R = Outcome,
        NodeId = NodeId,
        Node = RaftNode,
        Entry = openraft::Entry<TypeConfig>,
        SnapshotData = Cursor<Vec<u8>>,
        Responder = openraft::impls::OneshotResponder<TypeConfig>,
        AsyncRuntime = openraft::TokioRuntime,
);

pub(crate) type Entry = openraft::Entry<TypeConfig>;
pub(crate) type LogId = openraft::LogId<NodeId>;
pub(crate) type Vote = openraft::Vote<NodeId>;
pub(crate) type StorageError = openraft::StorageError<NodeId>;
pub(crate) type StorageIOError = openraft::StorageIOError<NodeId>;
pub(crate) type SnapshotMeta = openraft::SnapshotMeta<NodeId, RaftNode>;
pub(crate) type StoredMembership = openraft::StoredMembership<NodeId, RaftNode>;
pub(crate) type Metrics = openraft::RaftMetrics<NodeId, RaftNode>;
