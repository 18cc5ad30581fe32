//! The plan where the memories of the mesh do not hold every expert even once: the hottest in memory, the coldest on disks.
//!
//! Owns [`paged`]. A node that pages keeps all its experts on disk and some of them in memory, so what counts is the excess over its
//! memory. Invariants: all memories together hold the hottest experts that fit, except that an expert already in a memory stays there
//! (a move is a download); the excess is shared out in proportion to the memories; no disk and no memory is given more than it has.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use coel_store::{ExpertId, NodeId};

use super::table::Table;
use super::{Candidate, Current};
use crate::budget::ExpertSizes;

/// Load of a memory is counted in millionths.
const WHOLE: u128 = 1_000_000;

/// A table with every expert once at the fewest bits accepted, on disk where memory does not suffice, and second replicas only in the
/// remaining memory; and the experts for which no node has room. `ranked` are all experts, the most popular first; `exchange_bytes` is
/// what each memory keeps free.
pub(super) fn paged<'a>(
    experts: &'a ExpertSizes,
    candidates: &[Candidate],
    current: &'a Current,
    ranked: &[ExpertId],
    exchange_bytes: u64,
) -> (Table<'a>, Vec<ExpertId>) {
    let memory = |c: &Candidate| c.expert_bytes_max.saturating_sub(exchange_bytes);
    let whole = |c: &Candidate| Candidate { expert_bytes_max: memory(c).max(c.page_bytes_max), ..c.clone() };
    let mut paging = Paging {
        table: Table::new(experts, &candidates.iter().map(whole).collect::<Vec<_>>(), current),
        memory: candidates.iter().map(|c| (c.node, memory(c))).collect(),
        current,
    };
    paging.fill_memory(ranked, true);
    paging.fill_memory(ranked, false);
    let missing = paging.share_out(ranked);
    if missing.is_empty() {
        paging.double(ranked);
    }
    (paging.table, missing)
}

struct Paging<'a> {
    /// Its room is memory or disk, whichever is larger.
    table: Table<'a>,
    /// Bytes of memory of each node, all of it.
    memory: BTreeMap<NodeId, u64>,
    current: &'a Current,
}

impl Paging<'_> {
    /// Gives experts without a replica to memories that have room: with `only_held`, to nodes that hold them already.
    fn fill_memory(&mut self, ranked: &[ExpertId], only_held: bool) {
        for &expert in ranked {
            if self.table.count(expert) > 0 {
                continue;
            }
            let roomy: Vec<_> = self.table.nodes().filter(|&node| self.fits_memory(expert, node)).collect();
            let roomy = if only_held { self.best_held(expert, &roomy) } else { roomy };
            if let Some(node) = self.least_loaded(expert, &roomy) {
                self.table.put_floor(expert, node);
            }
        }
    }

    /// The others go to disks, each memory being overrun alike; what lies on a disk stays there as far as that allows.
    fn share_out(&mut self, ranked: &[ExpertId]) -> Vec<ExpertId> {
        let mut open: Vec<_> = ranked.iter().copied().filter(|&expert| self.table.count(expert) == 0).collect();
        let limits = self.limits(&open);
        open.retain(|&expert| {
            let roomy: Vec<_> = self.table.nodes().filter(|&node| self.table.may_hold_floor(expert, node)).collect();
            let within = |node: &NodeId| self.used(*node) + self.floor_bytes(expert, *node) <= limits[node];
            let held: Vec<_> = self.best_held(expert, &roomy).into_iter().filter(within).collect();
            let stays = self.least_loaded(expert, &held);
            stays.map(|node| self.table.put_floor(expert, node)).is_none()
        });
        // The heaviest first, so that the last gaps are filled by the lightest.
        open.sort_by_key(|&expert| Reverse(self.table.heaviest_bytes(expert)));
        open.retain(|&expert| {
            let roomy: Vec<_> = self.table.nodes().filter(|&node| self.table.may_hold_floor(expert, node)).collect();
            let node = self.least_loaded(expert, &roomy);
            node.map(|node| self.table.put_floor(expert, node)).is_none()
        });
        open
    }

    /// Second replicas in memory that is left: of what is paged elsewhere, or may die with its only holder.
    fn double(&mut self, ranked: &[ExpertId]) {
        for &expert in ranked.iter().filter(|expert| self.table.count(**expert) == 1).collect::<Vec<_>>() {
            let roomy: Vec<_> = self.table.nodes().filter(|&node| self.fits_memory(expert, node)).collect();
            let held = self.best_held(expert, &roomy);
            if let Some(node) = self.least_loaded(expert, if held.is_empty() { &roomy } else { &held }) {
                self.table.put_floor(expert, node);
            }
        }
    }

    /// How much each node may be given while experts that lie there stay there: its share of `open`, rounded up by one expert.
    fn limits(&self, open: &[ExpertId]) -> BTreeMap<NodeId, u64> {
        let cap = |node: NodeId| self.used(node) + self.table.room(node);
        let at = |node: NodeId, load: u128| {
            let overrun = u128::from(self.memory[&node]).saturating_mul(load) / WHOLE;
            overrun.clamp(u128::from(self.used(node)), u128::from(cap(node))) as u64
        };
        let sum = |load: u128| self.table.nodes().map(|node| u128::from(at(node, load))).sum::<u128>();
        let placed = self.table.nodes().map(|node| u128::from(self.used(node))).sum::<u128>();
        let wanted = placed + open.iter().map(|&expert| u128::from(self.table.lightest_bytes(expert))).sum::<u128>();
        let (mut below, mut load) = (0, u128::from(u64::MAX) * WHOLE);
        while load - below > 1 {
            let middle = below.midpoint(load);
            if sum(middle) >= wanted { load = middle } else { below = middle }
        }
        let rounded = |node: NodeId| {
            let expert = open.iter().map(|&expert| self.floor_bytes(expert, node)).max().unwrap_or(0);
            at(node, load).saturating_add(expert.saturating_sub(1))
        };
        self.table.nodes().map(|node| (node, rounded(node))).collect()
    }

    fn fits_memory(&self, expert: ExpertId, node: NodeId) -> bool {
        self.table.may_hold_floor(expert, node)
            && self.used(node) + self.floor_bytes(expert, node) <= self.memory[&node]
    }

    /// Of `nodes`, those that hold the expert now, if any of them does: those where it is ready, else where it is coming.
    fn best_held(&self, expert: ExpertId, nodes: &[NodeId]) -> Vec<NodeId> {
        let holders = self.current.get(&expert).into_iter().flatten().filter(|(node, _)| nodes.contains(node));
        let (ready, coming): (Vec<_>, Vec<_>) = holders.partition(|(_, replica)| replica.ready.is_some());
        let holders = if ready.is_empty() { coming } else { ready };
        holders.into_iter().map(|(&node, _)| node).collect()
    }

    /// The node whose memory would be the least full, or overrun, with the expert; the first of equals.
    fn least_loaded(&self, expert: ExpertId, nodes: &[NodeId]) -> Option<NodeId> {
        let load = |node: NodeId| {
            let bytes = u128::from(self.used(node)) + u128::from(self.floor_bytes(expert, node));
            bytes * WHOLE / u128::from(self.memory[&node].max(1))
        };
        nodes.iter().copied().min_by_key(|&node| (load(node), node))
    }

    fn used(&self, node: NodeId) -> u64 {
        self.table.used(node)
    }

    fn floor_bytes(&self, expert: ExpertId, node: NodeId) -> u64 {
        self.table.floor(expert, node).map_or(0, |floor| self.table.bytes(expert, floor))
    }
}
