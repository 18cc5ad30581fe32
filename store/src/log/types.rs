//! The consensus library, told about our types: proposals in, outcomes out, members by `NodeId`.
//!
//! [`Entry`] is openraft's own entry and beside it the author. Invariant: its encoding is that of `openraft::Entry` over
//! [`Command`], with one field more, so that entries of a former build, which have no author, decode here, and a former
//! build decodes ours and ignores the author.

use crate::ids::{NodeId, Peer};
use crate::state::command::{Command, Origin, Outcome};
use openraft::entry::{FromAppData, RaftEntry, RaftPayload};
use openraft::log_id::RaftLogId;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::Cursor;

/// What the consensus group keeps per member: enough to call it. Names and addresses are in the replicated state; this
/// copy is needed before that state has reached a newcomer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RaftNode {
    /// Its network identity.
    pub peer: Peer,
}

/// A command with its author, on its way into the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    /// The member whose word it is.
    pub author: NodeId,
    /// Its word.
    pub command: Command,
}

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Its place, and the leader that put it there.
    pub log_id: LogId,
    /// Its content.
    pub payload: Payload,
    /// The member that proposed the command; absent where there is no command, and in entries of a former build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<NodeId>,
}

/// The content of an entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Payload {
    /// Nothing: a new leader begins its term with it.
    Blank,
    /// A command to the state.
    Normal(Command),
    /// A change of the consensus group.
    Membership(Membership),
}

impl Entry {
    /// Who stands behind the command, if the entry says so.
    pub fn origin(&self) -> Option<Origin> {
        Some(Origin { author: self.author?, leader: self.log_id.leader_id.node_id })
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.payload {
            Payload::Blank => write!(f, "{}: blank", self.log_id),
            Payload::Normal(command) => write!(f, "{}: {}", self.log_id, command.name()),
            Payload::Membership(membership) => write!(f, "{}: {membership:?}", self.log_id),
        }
    }
}

impl RaftPayload<NodeId, RaftNode> for Entry {
    fn is_blank(&self) -> bool {
        matches!(self.payload, Payload::Blank)
    }

    fn get_membership(&self) -> Option<&Membership> {
        match &self.payload {
            Payload::Membership(membership) => Some(membership),
            Payload::Blank | Payload::Normal(_) => None,
        }
    }
}

impl RaftLogId<NodeId> for Entry {
    fn get_log_id(&self) -> &LogId {
        &self.log_id
    }

    fn set_log_id(&mut self, log_id: &LogId) {
        self.log_id = *log_id;
    }
}

impl RaftEntry<NodeId, RaftNode> for Entry {
    fn new_blank(log_id: LogId) -> Self {
        Self { log_id, payload: Payload::Blank, author: None }
    }

    fn new_membership(log_id: LogId, membership: Membership) -> Self {
        Self { log_id, payload: Payload::Membership(membership), author: None }
    }
}

impl FromAppData<Proposal> for Entry {
    fn from_app_data(Proposal { author, command }: Proposal) -> Self {
        Self { log_id: LogId::default(), payload: Payload::Normal(command), author: Some(author) }
    }
}

openraft::declare_raft_types!(
    /// Types of the placement log.
    pub TypeConfig:
        D = Proposal,
        R = Outcome,
        NodeId = NodeId,
        Node = RaftNode,
        Entry = Entry,
        SnapshotData = Cursor<Vec<u8>>,
        Responder = openraft::impls::OneshotResponder<TypeConfig>,
        AsyncRuntime = super::async_runtime::LogRuntime,
);

pub(crate) type Membership = openraft::Membership<NodeId, RaftNode>;
pub(crate) type LogId = openraft::LogId<NodeId>;
pub(crate) type Vote = openraft::Vote<NodeId>;
pub(crate) type StorageError = openraft::StorageError<NodeId>;
pub(crate) type StorageIOError = openraft::StorageIOError<NodeId>;
pub(crate) type SnapshotMeta = openraft::SnapshotMeta<NodeId, RaftNode>;
pub(crate) type StoredMembership = openraft::StoredMembership<NodeId, RaftNode>;
pub(crate) type Metrics = openraft::RaftMetrics<NodeId, RaftNode>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cbor;
    use openraft::CommittedLeaderId;
    use std::collections::BTreeSet;

    openraft::declare_raft_types!(
        /// The types of a build whose entries had no author.
        FormerConfig:
            D = Command,
            R = Outcome,
            NodeId = NodeId,
            Node = RaftNode,
            Entry = openraft::Entry<FormerConfig>,
            SnapshotData = Cursor<Vec<u8>>,
            Responder = openraft::impls::OneshotResponder<FormerConfig>,
            AsyncRuntime = openraft::TokioRuntime,
    );

    type FormerEntry = openraft::Entry<FormerConfig>;

    fn decoded<T: serde::de::DeserializeOwned>(value: &impl Serialize) -> T {
        let bytes = cbor::to_vec(value).unwrap();
        cbor::from_slice(&bytes, bytes.len()).unwrap()
    }

    fn log_id() -> LogId {
        LogId::new(CommittedLeaderId::new(3, NodeId(2)), 17)
    }

    #[test]
    fn entries_of_a_former_build_are_read_and_have_no_author() {
        let command = Command::Leaving { node: NodeId(4), leaving: true };
        let membership = Membership::new(vec![BTreeSet::from([NodeId(1)])], ());
        for (former, payload) in [
            (openraft::EntryPayload::Blank, Payload::Blank),
            (openraft::EntryPayload::Normal(command.clone()), Payload::Normal(command)),
            (openraft::EntryPayload::Membership(membership.clone()), Payload::Membership(membership)),
        ] {
            let former = FormerEntry { log_id: log_id(), payload: former };
            let entry = Entry { log_id: log_id(), payload, author: None };
            assert_eq!(decoded::<Entry>(&former), entry);
            assert_eq!(entry.origin(), None);
            assert_eq!(cbor::to_vec(&entry).unwrap(), cbor::to_vec(&former).unwrap(), "equal without an author");
        }
    }

    #[test]
    fn an_entry_keeps_its_author_and_a_former_build_reads_the_rest() {
        let command = Command::Leave { node: NodeId(4) };
        let mut entry = Entry::from_app_data(Proposal { author: NodeId(4), command: command.clone() });
        entry.set_log_id(&log_id());
        assert_eq!(decoded::<Entry>(&entry), entry);
        assert_eq!(entry.origin(), Some(Origin { author: NodeId(4), leader: NodeId(2) }));
        let former: FormerEntry = decoded(&entry);
        assert_eq!(former.log_id, log_id());
        assert!(matches!(former.payload, openraft::EntryPayload::Normal(read) if read == command));
    }
}
