//! Where experts go, and how exactly each is held there: the leader's planner, pure.
//!
//! Owns the decision which node holds which expert at which precision. Its input is what the log and gossip say, as plain values;
//! its output is a complete table of replicas, or the reason why there can be none.
//!
//! Lossless first: while every expert fits once as the checkpoint has it, everything is exact. Only below that are experts held at
//! fewer bits, and then by what it costs: each at the least that is accepted, the hot ones twice, and what room is left goes
//! where it saves most harm per byte ([`raise`]; METHODS: popularity times measured sensitivity). Disks come last ([`paging`]): only
//! where the memories do not hold every expert once at the least that is accepted.
//!
//! Invariants, checked by the tests over random meshes:
//! - a node never gets more expert bytes than its memory leaves, or its disk if that is more, nor a precision that it does not
//!   accept; and none gets more than its memory leaves where all could do without;
//! - nothing that is placed and still fits is moved (a move is a download), unless that makes answers more exact by a share that is
//!   worth it; so it matters little in which order nodes came;
//! - every expert is held once before any is held twice, and hot ones are held twice before cold ones;
//! - no expert is taken from the only live node that has it before another one is ready ([`within_reach`]);
//! - who holds what being equal, a larger budget never gives a worse plan;
//! - the same input gives the same plan on every node.
//!
//! It does not know how replicas get to their nodes, who is alive (the caller leaves the dead out), or what an expert computes.

mod absence;
mod harm;
mod mix;
mod paging;
mod planner;
mod popularity;
mod raise;
mod reach;
mod table;

use std::collections::BTreeMap;

use coel_store::{Assignment, Bounds, ExpertId, NodeId, Precision, Replica, Slices};

pub use absence::{Away, Since, cover};
pub use harm::Harm;
pub use mix::mix;
pub use planner::{Shortfall, plan};
pub use popularity::Popularity;
pub use reach::within_reach;

/// What the experts of a model take.
pub type Experts = BTreeMap<ExpertId, Choices>;

/// The replicas there are, as the log has them.
pub type Current = BTreeMap<ExpertId, BTreeMap<NodeId, Replica>>;

/// Bytes of an expert at the precisions that it has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Choices {
    /// In the order of [`Precision::ALL`].
    bytes: [Option<u64>; 3],
}

impl Choices {
    /// Those given, in the order of [`Precision::ALL`].
    pub fn new(bytes: [Option<u64>; 3]) -> Self {
        Self { bytes }
    }

    /// Those of these slices.
    pub fn of(slices: &Slices) -> Self {
        Self { bytes: Precision::ALL.map(|precision| slices.bytes(precision)) }
    }

    /// Those of them that are to be `kept`.
    pub fn only(self, kept: impl Fn(Precision) -> bool) -> Self {
        Self { bytes: Precision::ALL.map(|precision| self.bytes(precision).filter(|_| kept(precision))) }
    }

    /// Bytes at this precision.
    pub fn bytes(&self, precision: Precision) -> Option<u64> {
        self.bytes[precision as usize]
    }

    /// The precisions that are fewer bytes than every higher one, ascending.
    fn sensible(self) -> impl Iterator<Item = Precision> {
        let fewer = move |precision: &Precision| {
            let higher = Precision::ALL.into_iter().filter(|higher| higher > precision);
            let mut higher = higher.filter_map(|higher| self.bytes(higher));
            self.bytes(*precision).is_some_and(|bytes| higher.all(|more| bytes < more))
        };
        Precision::ALL.into_iter().filter(fewer)
    }
}

/// A node that may hold experts, with the bytes its budgets leave for them (trunk, KV cache and buffers already taken off).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The node.
    pub node: NodeId,
    /// Bytes of expert weights it may hold in memory.
    pub expert_bytes_max: u64,
    /// Bytes of expert weights it may be given if it has them in memory by turns only; 0 where it cannot.
    pub page_bytes_max: u64,
    /// At which precisions it may hold them.
    pub accepts: Bounds,
}

/// A placement that fits: for each expert the nodes that hold it, and how exactly.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Every expert of the model; never empty sets.
    pub replicas: Assignment,
    /// The nodes that are given more than their memory holds, and by how many bytes.
    pub paged_bytes: BTreeMap<NodeId, u64>,
}

impl Plan {
    /// Bytes of the experts that the plan gives to `node`.
    pub fn bytes_on(&self, experts: &Experts, node: NodeId) -> u64 {
        let given = self.replicas.iter().filter_map(|(expert, nodes)| experts.get(expert)?.bytes(*nodes.get(&node)?));
        given.sum()
    }
}

#[cfg(test)]
mod tests;
