//! From the placement there is towards the one that was planned, never taking a live expert away.
//!
//! Owns [`within_reach`]: as much of a plan as can be done at once. The invariant: every expert that some node serves now is served by
//! one of them until another replica is ready, and no node is asked for more than its budget on the way. Planned again once
//! something is ready, the next part of the way is open.

use std::collections::{BTreeMap, BTreeSet};

use coel_store::{ExpertId, NodeId, Placement, Precision};

use super::{Candidate, Experts, Plan};

/// What of `plan` may be proposed now.
///
/// An expert that none of its planned nodes serves yet stays also where it is served, as it is there; and with nodes in `leaving`,
/// ready or not, so that what died with its last holder is still known by that holder's name. Where that is more than a node
/// has room for, what it was to hold beyond what it holds now waits: more exact replicas first, then new ones.
pub fn within_reach(
    mut plan: Plan,
    placed: &Placement,
    candidates: &[Candidate],
    leaving: &BTreeSet<NodeId>,
    experts: &Experts,
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
            let limit = if growth.now.is_some() { budget.raises_bytes_max } else { budget.bytes_max };
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
    /// In all: what it may page, or what its memory holds.
    bytes_max: u64,
    /// While it is given more exact replicas: one that is not to page any more makes nothing larger before it has stopped.
    raises_bytes_max: u64,
}

impl Budget {
    fn of(candidate: &Candidate, plan: &Plan, experts: &Experts) -> Self {
        let memory = candidate.expert_bytes_max;
        let bytes_max = memory.max(candidate.page_bytes_max);
        let pages = plan.bytes_on(experts, candidate.node) > memory;
        Self { bytes_max, raises_bytes_max: if pages { bytes_max } else { memory } }
    }
}

/// What a node is to hold beyond what it serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Growth {
    /// The order in which growth waits: a replica that is served at less first, then a second one, then an only one.
    rank: u8,
    expert: ExpertId,
    /// As the node serves it now.
    now: Option<Precision>,
    bytes: u64,
}

impl Growth {
    fn of(
        plan: &Plan,
        placed: &Placement,
        experts: &Experts,
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
