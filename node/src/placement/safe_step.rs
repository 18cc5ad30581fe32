//! From the present placement towards the planned one, without taking a live expert away.
//!
//! Owns [`next_safe_step`]: as much of a plan as can be done at once. Invariants: every expert that some node serves now stays served
//! until another replica is ready, and no node is asked for more than its budget on the way. When a replica becomes ready, planning
//! again opens the next step.

use std::collections::{BTreeMap, BTreeSet};

use coel_store::{ExpertId, NodeId, Placement, Precision};

use super::{Candidate, Plan};
use crate::budget::ExpertSizes;

/// The part of `plan` that may be proposed now.
///
/// An expert that none of its planned nodes serves yet also stays where it is served now, at the precision it has there. It also stays
/// with nodes in `leaving`, ready or not, so that an expert whose last holder died is still known by that holder's name. Where that
/// is more than a node has room for, the node's growth waits: upgrades first, then new replicas.
pub fn next_safe_step(
    mut plan: Plan,
    placed: &Placement,
    candidates: &[Candidate],
    leaving: &BTreeSet<NodeId>,
    experts: &ExpertSizes,
) -> Plan {
    let budgets: BTreeMap<_, _> = candidates.iter().map(|c| (c.node, Budget::of(c, &plan, experts))).collect();
    let mut kept = BTreeMap::<NodeId, BTreeSet<ExpertId>>::new();
    for (expert, held) in &placed.replicas {
        let wanted = plan.replicas.entry(*expert).or_default();
        let ready = |node: &NodeId| held.get(node).and_then(|replica| replica.ready);
        if wanted.keys().any(|node| ready(node).is_some()) {
            continue;
        }
        let going = held.iter().filter(|(node, _)| leaving.contains(node));
        wanted.extend(going.map(|(&node, replica)| (node, replica.ready.unwrap_or(replica.precision))));
        let serving = held.keys().filter(|node| budgets.contains_key(node));
        let serving = serving.filter_map(|node| Some((ready(node)?, std::cmp::Reverse(*node))));
        if let Some((precision, node)) = serving.max() {
            wanted.insert(node.0, precision);
            kept.entry(node.0).or_default().insert(*expert);
        }
    }
    for (node, kept) in kept {
        let (mut used, budget) = (plan.bytes_on(experts, node), &budgets[&node]);
        for growth in Growth::of(&plan, placed, experts, node, &kept) {
            let limit = if growth.now.is_some() { budget.upgrades_bytes_max } else { budget.bytes_max };
            if used <= limit {
                continue;
            }
            used = used.saturating_sub(growth.bytes);
            let replicas = plan.replicas.entry(growth.expert).or_default();
            match growth.now {
                Some(now) => replicas.insert(node, now),
                None => replicas.remove(&node),
            };
        }
    }
    plan
}

/// How many bytes a node may be asked for on the way.
struct Budget {
    /// In all: what its disk or its memory holds, whichever is more.
    bytes_max: u64,
    /// While replicas are upgraded. A node that is to stop paging upgrades nothing before it has stopped.
    upgrades_bytes_max: u64,
}

impl Budget {
    fn of(candidate: &Candidate, plan: &Plan, experts: &ExpertSizes) -> Self {
        let memory = candidate.expert_bytes_max;
        let bytes_max = memory.max(candidate.page_bytes_max);
        let pages = plan.bytes_on(experts, candidate.node) > memory;
        Self { bytes_max, upgrades_bytes_max: if pages { bytes_max } else { memory } }
    }
}

/// What a node is to hold beyond what it serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Growth {
    /// The order in which growth waits: upgrades first, then second replicas, then only replicas.
    rank: u8,
    expert: ExpertId,
    /// The precision at which the node serves it now.
    now: Option<Precision>,
    bytes: u64,
}

impl Growth {
    fn of(
        plan: &Plan,
        placed: &Placement,
        experts: &ExpertSizes,
        node: NodeId,
        kept: &BTreeSet<ExpertId>,
    ) -> BTreeSet<Self> {
        let planned = plan.replicas.iter().filter(|(expert, _)| !kept.contains(expert));
        let planned = planned.filter_map(|(&expert, nodes)| Some((expert, *nodes.get(&node)?, nodes.len())));
        let growth = planned.filter_map(|(expert, wanted, replicas)| {
            let now = placed.replicas.get(&expert).and_then(|held| held.get(&node)?.ready);
            let size = |precision| experts.get(&expert).and_then(|choices| choices.bytes(precision)).unwrap_or(0);
            let bytes = size(wanted).saturating_sub(now.map_or(0, size));
            let rank = if now.is_some() { 0 } else { 1 + u8::from(replicas < 2) };
            (bytes > 0).then_some(Self { rank, expert, now, bytes })
        });
        growth.collect()
    }
}
