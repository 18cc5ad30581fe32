//! The messages of the placement log, as bytes: what `Transport::call` carries and `Log::handle` answers.
//!
//! A request is one version byte and an [`RpcRequest`] in its envelope, in CBOR. The envelope names the mesh and the node
//! it is meant for, so that a call that reached the wrong process is refused by name. A reply is a version byte and an
//! [`RpcReply`]. A proposal names no author: the receiver knows who sent it.
//!
//! Invariant: decoding is total. The length is checked first; then every fault is a typed error.

use super::standing::Memory;
use super::types::TypeConfig;
use crate::cbor::{self, CborError};
use crate::ids::{MeshId, NodeId, Peer};
use crate::state::command::{Command, Outcome};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest,
    VoteResponse,
};
use openraft::{LogId, SnapshotMeta, SnapshotSegmentId, Vote};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest rpc and longest reply in bytes. Entries are at most 4 MiB each, batches stop at about
/// 2 MiB, snapshot chunks are 1 MiB.
pub const RPC_BYTES_MAX: usize = 8 << 20;

/// The version of these messages, and of the log that they carry: members of version 4 let none join anew and have no digest of what
/// they applied, those of version 3 cannot forget another and answer no pre-vote, and those of version 2 do not check who authored a
/// command.
const VERSION: u8 = 5;

/// A request in its envelope.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Envelope {
    pub mesh: MeshId,
    /// The receiver.
    pub to: NodeId,
    #[serde(rename = "ask")]
    pub request: RpcRequest,
}

/// What one member asks of another. The names of the variants are on the wire.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum RpcRequest {
    Vote(VoteRequest<NodeId>),
    Append(AppendEntriesRequest<TypeConfig>),
    Snapshot(Chunk),
    /// To the leader: put this into the log as the sender's word, and reply with its outcome.
    Propose {
        command: Command,
        /// How long the proposer will wait.
        wait_ms: u64,
    },
    /// Would you vote for the sender, whose log ends here?
    PreVote {
        last: Option<LogId<NodeId>>,
    },
    /// How far do you remember the sender's log to have got, that of this node?
    Recall(NodeId),
    /// Is this peer a member? Asked by a node that was away while members joined.
    Knows(Peer),
}

/// A piece of a snapshot: openraft's request with its data as a byte string.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Chunk {
    vote: Vote<NodeId>,
    meta: SnapshotMeta<NodeId, super::types::RaftNode>,
    pub offset: u64,
    #[serde(with = "serde_bytes")]
    data: Vec<u8>,
    done: bool,
}

impl Chunk {
    /// The term of the leader that sends it.
    pub fn term(&self) -> u64 {
        self.vote.leader_id.term
    }

    /// The offset after this piece, in bytes.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.data.len() as u64)
    }
}

impl From<InstallSnapshotRequest<TypeConfig>> for Chunk {
    fn from(request: InstallSnapshotRequest<TypeConfig>) -> Self {
        let InstallSnapshotRequest { vote, meta, offset, data, done } = request;
        Self { vote, meta, offset, data, done }
    }
}

impl From<Chunk> for InstallSnapshotRequest<TypeConfig> {
    fn from(chunk: Chunk) -> Self {
        let Chunk { vote, meta, offset, data, done } = chunk;
        Self { vote, meta, offset, data, done }
    }
}

/// What a member answers. The names of the variants are on the wire.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum RpcReply {
    Vote(VoteResponse<NodeId>),
    Append(AppendEntriesResponse<NodeId>),
    Snapshot(InstallSnapshotResponse<NodeId>),
    /// The chunk does not continue what was received; start over.
    SnapshotRestart {
        expect: SnapshotSegmentId,
        got: SnapshotSegmentId,
    },
    /// Whether the node would.
    PreVote(bool),
    /// So far.
    Recalls(Memory),
    Outcome(Outcome),
    /// Ask the leader instead, if one is known.
    NotLeader(Option<(NodeId, Peer)>),
    Knows(bool),
    Refused(RpcRefusal),
    /// The leader has put it into its log, but no majority agreed in time.
    NotAgreed,
    /// The asked node cannot serve its log any more.
    Failed(String),
}

/// Why a request was not served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum RpcRefusal {
    /// Not decodable.
    #[error("malformed request: {0}")]
    Malformed(String),
    /// Another version of the protocol.
    #[error("protocol version {got} is not spoken here, only {known}; run the same release on all nodes")]
    Version {
        /// What the request has.
        got: u8,
        /// What this node speaks.
        known: u8,
    },
    /// Another mesh.
    #[error("the request is for mesh {got}, this node belongs to mesh {ours}")]
    OtherMesh {
        /// What the request names.
        got: MeshId,
        /// Where this node belongs.
        ours: MeshId,
    },
    /// Another node.
    #[error("the request is for node {got}, this is node {ours}")]
    OtherNode {
        /// The node that the request names.
        got: NodeId,
        /// This node.
        ours: NodeId,
    },
    /// The sender is no member.
    #[error("the sender is not a member of mesh {0}; join it first (coel join INVITE)")]
    NotAMember(MeshId),
    /// The request makes no sense.
    #[error("{0}")]
    Nonsense(String),
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CborError> {
    let mut bytes = vec![VERSION];
    bytes.extend(cbor::to_vec(value)?);
    if bytes.len() > RPC_BYTES_MAX {
        return Err(CborError::TooLong { bytes: bytes.len(), limit: RPC_BYTES_MAX });
    }
    Ok(bytes)
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, RpcRefusal> {
    match bytes.split_first() {
        None => Err(RpcRefusal::Malformed("empty".into())),
        Some((&VERSION, body)) => {
            cbor::from_slice(body, RPC_BYTES_MAX).map_err(|error| RpcRefusal::Malformed(error.to_string()))
        }
        Some((&got, _)) => Err(RpcRefusal::Version { got, known: VERSION }),
    }
}

impl Envelope {
    pub fn encode(&self) -> Result<Vec<u8>, CborError> {
        encode(self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, RpcRefusal> {
        decode(bytes)
    }
}

impl RpcReply {
    /// Never fails: a reply that cannot be encoded becomes a short one that says so.
    pub fn encode(&self) -> Vec<u8> {
        encode(self).unwrap_or_else(|error| encode(&Self::Failed(error.to_string())).unwrap_or_else(|_| vec![VERSION]))
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, RpcRefusal> {
        decode(bytes)
    }
}

/// Refuses entries that do not follow each other, or do not follow what they claim to follow. The consensus library takes
/// both for granted, so a peer must not be able to break them.
pub(crate) fn check_append(request: &AppendEntriesRequest<TypeConfig>) -> Result<(), RpcRefusal> {
    let mut before: Option<LogId<NodeId>> = request.prev_log_id;
    for entry in &request.entries {
        let next = before.map_or(0, |before| before.index.saturating_add(1));
        let in_order = before.is_none_or(|before| entry.log_id.leader_id >= before.leader_id);
        if entry.log_id.index != next || !in_order {
            return Err(RpcRefusal::Nonsense(format!("entry {} where index {next} follows", entry.log_id)));
        }
        before = Some(entry.log_id);
    }
    if before.is_some_and(|last| last.index == u64::MAX) {
        return Err(RpcRefusal::Nonsense("the last possible index is in use".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::types::Entry;
    use openraft::CommittedLeaderId;
    use openraft::entry::RaftEntry;
    use proptest::prelude::*;

    fn entry(term: u64, index: u64) -> Entry {
        Entry::new_blank(LogId::new(CommittedLeaderId::new(term, NodeId(1)), index))
    }

    fn append(prev: Option<(u64, u64)>, entries: &[(u64, u64)]) -> AppendEntriesRequest<TypeConfig> {
        AppendEntriesRequest {
            vote: Vote::new_committed(3, NodeId(1)),
            prev_log_id: prev.map(|(term, index)| entry(term, index).log_id),
            entries: entries.iter().map(|(term, index)| entry(*term, *index)).collect(),
            leader_commit: None,
        }
    }

    fn envelope(request: RpcRequest) -> Envelope {
        Envelope { mesh: MeshId([1; 16]), to: NodeId(2), request }
    }

    #[test]
    fn entries_must_follow_each_other() {
        assert!(check_append(&append(None, &[(1, 0), (1, 1), (2, 2)])).is_ok());
        assert!(check_append(&append(Some((1, 4)), &[(1, 5)])).is_ok());
        assert!(check_append(&append(Some((1, 4)), &[])).is_ok());
        assert!(check_append(&append(Some((1, 4)), &[(1, 6)])).is_err());
        assert!(check_append(&append(None, &[(1, 1)])).is_err());
        assert!(check_append(&append(Some((2, 4)), &[(1, 5)])).is_err());
        assert!(check_append(&append(Some((1, u64::MAX)), &[])).is_err());
    }

    #[test]
    fn another_version_is_refused_by_number() {
        let mut bytes = envelope(RpcRequest::Knows(Peer(vec![1]))).encode().unwrap();
        assert!(Envelope::decode(&bytes).is_ok());
        bytes[0] = 9;
        let refusal = Envelope::decode(&bytes).unwrap_err();
        assert_eq!(refusal, RpcRefusal::Version { got: 9, known: VERSION });
        assert!(matches!(Envelope::decode(&[]), Err(RpcRefusal::Malformed(_))));
    }

    #[test]
    fn a_proposal_is_spelled_as_ever() {
        // Pinned: a change of these bytes is a new version.
        let request = RpcRequest::Propose { command: Command::Leave { node: NodeId(3) }, wait_ms: 7 };
        let mut bytes = b"\x05\xa3\x64mesh\x50".to_vec();
        bytes.extend([1; 16]);
        bytes.extend(b"\x62to\x02\x63ask\xa1\x67Propose\xa2\x67command\xa1\x65Leave\xa1\x64node\x03\x67wait_ms\x07");
        assert_eq!(envelope(request).encode().unwrap(), bytes);
        assert!(matches!(
            Envelope::decode(&bytes).unwrap().request,
            RpcRequest::Propose { command: Command::Leave { node: NodeId(3) }, wait_ms: 7 }
        ));
    }

    #[test]
    fn a_snapshot_chunk_costs_its_bytes_once() {
        let chunk = Chunk {
            vote: Vote::new_committed(3, NodeId(1)),
            meta: SnapshotMeta::default(),
            offset: 0,
            data: vec![200; 100_000],
            done: true,
        };
        assert!(envelope(RpcRequest::Snapshot(chunk)).encode().unwrap().len() < 101_000);
    }

    proptest! {
        #[test]
        fn strange_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Envelope::decode(&bytes);
            let _ = RpcReply::decode(&bytes);
        }

        #[test]
        fn damaged_requests_never_panic(at in any::<prop::sample::Index>(), to: u8, prev: u64) {
            for request in [
                RpcRequest::Append(append(Some((1, prev)), &[(1, prev.wrapping_add(1)), (2, prev.wrapping_add(2))])),
                RpcRequest::Vote(VoteRequest::new(Vote::new(3, NodeId(2)), None)),
                RpcRequest::Knows(Peer(vec![7; 38])),
            ] {
                let mut bytes = envelope(request).encode().unwrap();
                let at = at.index(bytes.len());
                bytes[at] = to;
                if let Ok(Envelope { request: RpcRequest::Append(request), .. }) = Envelope::decode(&bytes) {
                    let _ = check_append(&request);
                }
            }
        }
    }
}
