//! A placement under construction: replicas with their precisions, and the room left on each node.
//!
//! Invariant: the room of a node is its budget less the bytes of its replicas, and never below zero. The table does not decide what
//! is worth placing where; the planner does.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use coel_store::{ExpertId, NodeId, Precision};

use super::{Candidate, Current, Plan};
use crate::budget::ExpertSizes;

/// Replicas under construction.
pub(super) struct Table<'a> {
    experts: &'a ExpertSizes,
    candidates: BTreeMap<NodeId, Candidate>,
    current: &'a Current,
    room: BTreeMap<NodeId, u64>,
    least_bytes: u64,
    replicas: BTreeMap<ExpertId, BTreeMap<NodeId, Precision>>,
}

impl<'a> Table<'a> {
    pub fn new(experts: &'a ExpertSizes, candidates: &[Candidate], current: &'a Current) -> Self {
        let least = experts.values().flat_map(|choices| choices.sensible().next().and_then(|p| choices.bytes(p)));
        let mut table = Self {
            experts,
            candidates: BTreeMap::new(),
            current,
            room: BTreeMap::new(),
            least_bytes: least.min().unwrap_or(0),
            replicas: BTreeMap::new(),
        };
        table.admit(candidates);
        table
    }

    /// More nodes, which hold nothing yet.
    pub fn admit(&mut self, candidates: &[Candidate]) {
        for candidate in candidates {
            self.room.insert(candidate.node, candidate.expert_bytes_max);
            self.candidates.insert(candidate.node, candidate.clone());
        }
    }

    pub fn into_plan(self) -> Plan {
        Plan { replicas: self.replicas, paged_bytes: BTreeMap::new() }
    }

    pub fn nodes(&self) -> impl Iterator<Item = NodeId> + use<> {
        self.candidates.keys().copied().collect::<Vec<_>>().into_iter()
    }

    /// Replicas of the expert.
    pub fn of(&self, expert: ExpertId) -> impl Iterator<Item = (NodeId, Precision)> + '_ {
        self.replicas.get(&expert).into_iter().flatten().map(|(&node, &precision)| (node, precision))
    }

    /// All replicas.
    pub fn all(&self) -> impl Iterator<Item = (ExpertId, NodeId, Precision)> + '_ {
        self.replicas.iter().flat_map(|(&expert, nodes)| nodes.iter().map(move |(&node, &p)| (expert, node, p)))
    }

    pub fn count(&self, expert: ExpertId) -> usize {
        self.replicas.get(&expert).map_or(0, BTreeMap::len)
    }

    pub fn held(&self, expert: ExpertId, node: NodeId) -> Option<Precision> {
        self.replicas.get(&expert)?.get(&node).copied()
    }

    pub fn room(&self, node: NodeId) -> u64 {
        self.room.get(&node).copied().unwrap_or(0)
    }

    /// Bytes of what the node holds.
    pub fn used(&self, node: NodeId) -> u64 {
        self.candidates.get(&node).map_or(0, |candidate| candidate.expert_bytes_max - self.room(node))
    }

    /// Bytes of the expert at the least that it has.
    pub fn lightest_bytes(&self, expert: ExpertId) -> u64 {
        let least = self.experts[&expert].sensible().next();
        least.map_or(0, |precision| self.bytes(expert, precision))
    }

    /// Bytes of the expert as the checkpoint has it.
    pub fn heaviest_bytes(&self, expert: ExpertId) -> u64 {
        self.experts[&expert].bytes(Precision::Exact).unwrap_or(0)
    }

    /// Bytes of the expert at this precision, which it must have.
    pub fn bytes(&self, expert: ExpertId, precision: Precision) -> u64 {
        self.experts[&expert].bytes(precision).expect("asked of precisions that the expert has")
    }

    /// Bytes of the least of all experts.
    pub fn least_bytes(&self) -> u64 {
        self.least_bytes
    }

    /// Precisions at which `node` may hold the expert, ascending, each of more bytes than the one before.
    pub fn choices(&self, expert: ExpertId, node: NodeId) -> Vec<Precision> {
        let Some(candidate) = self.candidates.get(&node) else { return Vec::new() };
        self.experts[&expert].sensible().filter(|&precision| candidate.accepts.has(precision)).collect()
    }

    /// The least that `node` may hold of the expert.
    pub fn floor(&self, expert: ExpertId, node: NodeId) -> Option<Precision> {
        self.choices(expert, node).first().copied()
    }

    /// Whether there is room for the expert on `node`, which does not hold it yet.
    pub fn may_hold(&self, expert: ExpertId, node: NodeId, precision: Precision) -> bool {
        self.held(expert, node).is_none()
            && self.choices(expert, node).contains(&precision)
            && self.room(node) >= self.bytes(expert, precision)
    }

    /// Whether it fits at the least that is accepted there.
    pub fn may_hold_floor(&self, expert: ExpertId, node: NodeId) -> bool {
        self.floor(expert, node).is_some_and(|precision| self.may_hold(expert, node, precision))
    }

    /// Puts the expert there, where it [may be held](Self::may_hold).
    pub fn put(&mut self, expert: ExpertId, node: NodeId, precision: Precision) {
        debug_assert!(self.may_hold(expert, node, precision));
        *self.room.get_mut(&node).expect("only candidates hold") -= self.bytes(expert, precision);
        self.replicas.entry(expert).or_default().insert(node, precision);
    }

    pub fn put_floor(&mut self, expert: ExpertId, node: NodeId) {
        let precision = self.floor(expert, node).expect("put only where it may be held");
        self.put(expert, node, precision);
    }

    /// Takes every replica back to the least that is accepted of it.
    pub fn lower_all(&mut self) {
        let all: Vec<_> = self.all().collect();
        for (expert, node, _) in all {
            let floor = self.floor(expert, node).expect("what is held is accepted");
            self.change(expert, node, floor);
        }
    }

    /// Whether nothing could be held more exactly, whatever the room.
    pub fn is_saturated(&self) -> bool {
        self.all().all(|(expert, node, precision)| self.choices(expert, node).last() == Some(&precision))
    }

    pub fn take(&mut self, expert: ExpertId, node: NodeId) {
        if let Some(precision) = self.replicas.get_mut(&expert).and_then(|nodes| nodes.remove(&node)) {
            *self.room.get_mut(&node).expect("only candidates hold") += self.bytes(expert, precision);
        }
    }

    /// Holds the expert at another precision, if there is room.
    pub fn change(&mut self, expert: ExpertId, node: NodeId, precision: Precision) -> bool {
        let Some(now) = self.held(expert, node) else { return false };
        let (room, wanted) = (self.room(node) + self.bytes(expert, now), self.bytes(expert, precision));
        if room < wanted {
            return false;
        }
        self.room.insert(node, room - wanted);
        self.replicas.entry(expert).or_default().insert(node, precision);
        true
    }

    /// Of `nodes`, the one with the most room by share of its budget; the first of equals.
    pub fn emptiest(&self, nodes: impl Iterator<Item = NodeId>) -> Option<NodeId> {
        nodes.max_by_key(|&node| (self.room_share(node), Reverse(node)))
    }

    /// The node's room in millionths of its budget.
    pub fn room_share(&self, node: NodeId) -> u64 {
        let budget = self.candidates.get(&node).map_or(1, |candidate| candidate.expert_bytes_max.max(1));
        (u128::from(self.room(node)) * 1_000_000 / u128::from(budget)) as u64
    }

    /// Whether `node` is the only one that keeps the expert from before: every other node would have to fetch it first.
    pub fn is_last_that_has_it(&self, expert: ExpertId, node: NodeId) -> bool {
        let Some(had) = self.current.get(&expert).filter(|had| had.contains_key(&node)) else { return false };
        self.of(expert).all(|(other, _)| other == node || !had.contains_key(&other))
    }
}
