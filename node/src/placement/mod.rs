//! Where experts go, and how exactly each is held there: the leader's decisions, all pure.
//!
//! Owns two things. The planner ([`plan`]) decides which node holds which expert at which precision. Its input is plain values; its
//! output is a complete table of replicas, or the reason why there is none. The [`Leader`] decides when to plan, what of a plan to
//! propose next, and which members to wait for. It takes [`MeshFacts`] and the time, and returns [`Effect`]s.
//!
//! Lossless first: while every expert fits once as in the checkpoint, everything is exact. Only below that are experts held at
//! fewer bits: each at the fewest accepted, the hot ones twice, and the remaining room goes where it saves the most expected loss per
//! byte ([`upgrade`]; METHODS: popularity times measured sensitivity). Disks come last ([`paging`]): only where the memories do not
//! hold every expert once at the fewest bits accepted.
//!
//! Invariants, checked by the tests over random meshes:
//! - a node never gets more expert bytes than its memory leaves, or its disk if that is more, nor a precision that it does not
//!   accept; no node gets more than its memory leaves where the mesh can do without;
//! - a placed replica that still fits is not moved (a move is a download), unless moving makes answers more exact by a share that is
//!   worth it; so the order in which nodes join matters little;
//! - every expert is held once before any is held twice, and hot experts are held twice before cold ones;
//! - no expert is taken from the only live node that serves it before another replica is ready ([`next_safe_step`]);
//! - with the same holders, a larger budget never gives a worse plan;
//! - the same input gives the same plan on every node.
//!
//! It does not know how replicas get to their nodes, how facts are gathered, or what an expert computes.

mod assign;
mod inputs;
mod leader;
mod loss;
mod obtainable;
mod paging;
mod planner;
mod popularity;
mod safe_step;
mod table;
mod unavailable;
mod upgrade;

use std::collections::BTreeMap;

use coel_store::{Assignment, Bounds, ExpertId, Model, ModelId, NodeId, Replica, State};

pub use assign::assign_precisions;
pub use inputs::{Liveness, MemberFacts, MeshFacts, ModelFacts, Unplaceable, can_hold, can_spare};
pub use leader::{Effect, Leader, LeaderReport};
pub use loss::ExpectedLoss;
pub use planner::{Shortfall, plan};
pub use popularity::Popularity;
pub use safe_step::next_safe_step;
pub use unavailable::{Since, Unavailable, restore_coverage};

use crate::budget::ExpertSizes;

/// The replicas there are, as the log has them.
pub type Current = BTreeMap<ExpertId, BTreeMap<NodeId, Replica>>;

/// A node that may hold experts, with the bytes its budgets leave for them: trunk, KV cache and buffers are already deducted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The node.
    pub node: NodeId,
    /// Bytes of expert weights it may hold in memory.
    pub expert_bytes_max: u64,
    /// Bytes of expert weights it may be given if it pages them; 0 where it cannot.
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
    pub fn bytes_on(&self, experts: &ExpertSizes, node: NodeId) -> u64 {
        let given = self.replicas.iter().filter_map(|(expert, nodes)| experts.get(expert)?.bytes(*nodes.get(&node)?));
        given.sum()
    }
}

/// The model that the mesh serves: the placed one, or the first registered before there is a placement.
pub fn model_to_serve(state: &State) -> Option<(ModelId, &Model)> {
    let placed = state.placement.as_ref().map(|placement| placement.model);
    let id = placed.or_else(|| state.models.keys().next().copied())?;
    state.models.get(&id).map(|model| (id, model))
}

#[cfg(test)]
mod tests;
