//! What a node says of itself and the mesh: one document, for `coel status`, the testnet and the tests.
//!
//! Owns the document ([`Status`]), how it is put together ([`StatusView`]), and whether a request would be served ([`ReadinessView`]).
//! Fields of the document are only ever added, with a default.

mod readiness;
mod report;
mod warnings;

use std::collections::BTreeMap;

use coel_store::{Bounds, ExpertId, NodeId, Precision};
use serde::{Deserialize, Serialize};

pub use readiness::ReadinessView;
pub use report::StatusView;

use crate::import::ImportProgress;
use crate::service::{ModelInfo, Readiness};

/// A node's view, as `coel status --json` prints it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The mesh, in hex.
    pub mesh: String,
    /// This node's id in the log.
    pub node_id: NodeId,
    /// This node's name.
    pub name: String,
    /// This node's libp2p identity.
    pub peer_id: String,
    /// Where its HTTP listens: `http://127.0.0.1:PORT`.
    pub api: String,
    /// `cpu`, `cuda:N` or `vulkan:N`, with the kernel class, e.g. `cpu/avx512`.
    pub device: Option<String>,
    /// The leader, as far as this node knows.
    pub leader: Option<NodeId>,
    /// Raft term.
    pub term: u64,
    /// Index of the last applied log entry.
    pub applied: u64,
    /// BLAKE3 of the replicated state's encoding: equal wherever `applied` is.
    pub state_hash: String,
    /// Version of the placement; 0 before the first.
    pub epoch: u64,
    /// Models that are registered.
    pub models: Vec<ModelInfo>,
    /// The model that is placed.
    pub model: Option<ModelInfo>,
    /// At which precisions the mesh is to hold its experts.
    pub precisions: Bounds,
    /// Share of its experts with a ready replica on a live node, as this node sees it.
    pub coverage: f64,
    /// Fewest such replicas of any expert.
    pub replicas_min: usize,
    /// Why there is no placement, or only a partial one; from the leader only.
    pub planner: Option<String>,
    /// Members that are down and expected back, so that their experts stay placed on them; from the leader only.
    #[serde(default)]
    pub awaited: Vec<NodeId>,
    /// What could go wrong next with the quorum, and what a person can do about it.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// The import that runs on this node.
    #[serde(default)]
    pub importing: Option<ImportProgress>,
    /// Whether a request would be served now, and what it waits for.
    pub readiness: Readiness,
    /// All members, this node included.
    pub nodes: Vec<NodeStatus>,
    /// This node's own figures.
    pub own: OwnStatus,
    /// Every expert's replicas.
    pub placement: BTreeMap<String, Vec<ReplicaStatus>>,
}

/// A member, as another one sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Id in the log.
    pub node_id: NodeId,
    /// Its name.
    pub name: String,
    /// Its libp2p identity.
    pub peer_id: String,
    /// `up`, `suspect` or `down`; `self` for the node asked.
    pub liveness: String,
    /// On its way out.
    pub leaving: bool,
    /// Has a vote in the log.
    pub voter: bool,
    /// Smoothed round trip.
    pub rtt_ms: Option<f64>,
    /// Memory headroom, 0 to 1, as gossiped.
    pub memory_headroom: Option<f64>,
    /// Compute headroom, 0 to 1, as gossiped.
    pub compute_headroom: Option<f64>,
    /// Memory it may use for models.
    pub memory_budget_bytes: Option<u64>,
    /// Disk it may use for weights, where that has a bound.
    pub disk_budget_bytes: Option<u64>,
    /// By how many bytes the experts placed on it exceed its memory, so that it pages them; as far as the node asked knows the model.
    pub paged_bytes: Option<u64>,
    /// Experts placed on it.
    pub experts: usize,
    /// Of them, those it has reported ready as wanted.
    pub experts_ready: usize,
    /// Experts it has reported ready, by the precision at which they are.
    pub precisions: Counts,
    /// Their bytes, as far as the node asked knows the model.
    pub expert_bytes: Option<u64>,
    /// At which precision it holds the trunk.
    pub trunk: Option<Precision>,
}

/// Experts by precision.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub q4: usize,
    pub q8: usize,
    pub exact: usize,
}

/// `12 q4, 30 exact`, or `-` for none.
impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let each = [(self.q4, Precision::Q4), (self.q8, Precision::Q8), (self.exact, Precision::Exact)];
        let each = each.iter().filter(|(count, _)| *count > 0).map(|(count, precision)| format!("{count} {precision}"));
        let text = each.collect::<Vec<_>>().join(", ");
        f.write_str(if text.is_empty() { "-" } else { &text })
    }
}

impl Counts {
    /// Counts these.
    pub fn of(precisions: impl Iterator<Item = Precision>) -> Self {
        precisions.fold(Self::default(), |mut counts, precision| {
            *match precision {
                Precision::Q4 => &mut counts.q4,
                Precision::Q8 => &mut counts.q8,
                Precision::Exact => &mut counts.exact,
            } += 1;
            counts
        })
    }
}

/// What a node knows of itself only.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnStatus {
    /// Experts held.
    pub experts: usize,
    /// Of them, by precision.
    pub precisions: Counts,
    /// Of them, those held on disk and paged.
    #[serde(default)]
    pub paged: usize,
    /// Bytes of weights in this node's own files.
    #[serde(default)]
    pub disk_bytes: u64,
    /// Bytes received over the weight stream since the node started.
    pub bytes_fetched: u64,
    /// Damaged blobs that were replaced since the node started.
    #[serde(default)]
    pub blobs_repaired: u64,
    /// The ledger: trunk, experts, KV cache and buffers, as reserved.
    pub memory_bytes: u64,
    /// Resident memory of the process after its start, before it knew a model.
    pub rss_before_bytes: u64,
    /// What the ledger may reach.
    pub memory_budget_bytes: u64,
    /// (row, expert) pairs this home computed itself.
    pub rows_local: u64,
    /// (row, expert) pairs this home had computed by peers.
    pub rows_remote: u64,
    /// (row, expert) pairs computed here for other homes.
    pub rows_served: u64,
    /// Answers of this home that wait for experts whose hosts are away.
    #[serde(default)]
    pub answers_waiting: u64,
}

/// One replica of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// The node that holds it.
    pub node: NodeId,
    /// At which precision it is wanted.
    pub precision: Precision,
    /// At which precision it is served now: verified, loaded and reported.
    pub serves: Option<Precision>,
    /// Whether that is as wanted.
    pub ready: bool,
}

/// The key of [`Status::placement`].
pub fn expert_key(expert: ExpertId) -> String {
    expert.to_string()
}
