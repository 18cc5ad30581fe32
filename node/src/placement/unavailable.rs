//! Unavailable members: how long the mesh waits for them, and what it may do meanwhile.
//!
//! Owns [`Since`] and [`restore_coverage`]. Most members that vanish come back: a process restarts, a cable or a radio fails for a
//! moment. Planning without such a member makes the others fetch, slice and load what it held, at fewer bits where room is short, and
//! its return makes them do as much again. So the mesh at first waits. Invariants: while it waits, no placed replica moves or changes
//! its precision; an expert that no live node serves gets another replica only where there is room for it at its precision.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use coel_store::{Assignment, ExpertId, NodeId, Placement, Precision};

use super::{Candidate, Popularity};
use crate::budget::ExpertSizes;

/// Once a node is down this long, other nodes with room take over the experts that it alone served. Not zero, since a restart is
/// quicker than a download.
const COVER_AFTER: Duration = Duration::from_secs(2);
/// Once a node is down this long, the mesh plans without it. About the time that the others need to fetch or slice, and to load, what
/// it held (one thread slices 14 GB of weights in 40 s, and reads and verifies them in less): waiting as long as the move takes is at
/// most twice as bad as having known beforehand. A process restarts well within it, and so does a small machine.
const REPLACE_AFTER: Duration = Duration::from_secs(30);

/// Since when a condition has held for each member.
#[derive(Debug, Default)]
pub struct Since(BTreeMap<NodeId, Instant>);

/// Members that are not there.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unavailable {
    /// Members that are expected back.
    pub waited_for: BTreeSet<NodeId>,
    /// Members that are not.
    pub gone: BTreeSet<NodeId>,
}

impl Unavailable {
    /// All of them.
    pub fn all(&self) -> BTreeSet<NodeId> {
        self.waited_for.union(&self.gone).copied().collect()
    }
}

impl Since {
    /// Notes for which members the condition holds now.
    pub fn update(&mut self, members: &BTreeSet<NodeId>, now: Instant) {
        self.0.retain(|node, _| members.contains(node));
        for &node in members {
            self.0.entry(node).or_insert(now);
        }
    }

    /// Members for which the condition has held for at least this long.
    pub fn longer_than(&self, time: Duration, now: Instant) -> BTreeSet<NodeId> {
        let long = self.0.iter().filter(|(_, since)| now.duration_since(**since) >= time);
        long.map(|(&node, _)| node).collect()
    }

    /// Where the condition is being down: which members are waited for and which are given up. Members that have only just vanished
    /// are in neither set. Only a holder of something in `placed` is worth waiting for.
    pub fn unavailable(&self, placed: Option<&Placement>, now: Instant) -> Unavailable {
        let down = self.longer_than(COVER_AFTER, now);
        let mut gone = self.longer_than(REPLACE_AFTER, now);
        let holds = |node: &NodeId| placed.is_some_and(|placed| placed.of(*node).next().is_some());
        let (waited_for, others) = down.difference(&gone).copied().partition::<BTreeSet<_>, _>(holds);
        gone.extend(others);
        Unavailable { waited_for, gone }
    }
}

/// The present placement, plus a replica of every expert all of whose holders are in `unavailable`, the popular experts first, as far
/// as `candidates` have room for it at the precision at which it was placed.
pub fn restore_coverage(
    placed: &Placement,
    candidates: &[Candidate],
    unavailable: &BTreeSet<NodeId>,
    experts: &ExpertSizes,
    popularity: &Popularity,
) -> Assignment {
    let held = |nodes: &BTreeMap<NodeId, coel_store::Replica>| {
        nodes.iter().map(|(&node, replica)| (node, replica.precision)).collect::<BTreeMap<_, _>>()
    };
    let mut covered: Assignment = placed.replicas.iter().map(|(&expert, nodes)| (expert, held(nodes))).collect();
    let mut rooms: BTreeMap<_, _> = candidates.iter().map(|c| (c.node, Room::of(c, placed, experts))).collect();
    let uncovered = covered.iter().filter(|(_, nodes)| nodes.keys().all(|node| unavailable.contains(node)));
    for expert in popularity.ranked(uncovered.map(|(&expert, _)| expert).collect::<Vec<_>>()) {
        let nodes = covered.entry(expert).or_default();
        let Some(precision) = nodes.values().copied().max() else { continue };
        let Some(bytes) = experts.get(&expert).and_then(|choices| choices.bytes(precision)) else { continue };
        let fitting = candidates.iter().filter(|c| c.accepts.has(precision) && rooms[&c.node].free_bytes >= bytes);
        let emptiest = fitting.max_by_key(|c| (rooms[&c.node].share(), Reverse(c.node))).map(|c| c.node);
        if let Some(room) = emptiest.and_then(|node| rooms.get_mut(&node)) {
            room.free_bytes -= bytes;
            nodes.extend(emptiest.map(|node| (node, precision)));
        }
    }
    covered
}

/// The room a node has left beside what it was given.
struct Room {
    free_bytes: u64,
    of_bytes: u64,
}

impl Room {
    fn of(candidate: &Candidate, placed: &Placement, experts: &ExpertSizes) -> Self {
        let size = |expert: ExpertId, precision| {
            experts.get(&expert).and_then(|choices| choices.bytes(precision)).unwrap_or(0)
        };
        let given = placed.of(candidate.node).map(|(expert, replica)| {
            size(expert, replica.ready.map_or(replica.precision, |ready| ready.max(replica.precision)))
        });
        let used: u64 = given.sum();
        let pages = used > candidate.expert_bytes_max;
        // Where not everything is exact, a replica may be being exchanged, which takes one expert twice.
        let mixed = placed.replicas.values().flat_map(BTreeMap::values).any(|r| r.precision != Precision::Exact);
        let exchange =
            if mixed { experts.keys().map(|&expert| size(expert, Precision::Q8)).max().unwrap_or(0) } else { 0 };
        let of_bytes = if pages { candidate.page_bytes_max } else { candidate.expert_bytes_max };
        Self { free_bytes: of_bytes.saturating_sub(used + exchange), of_bytes }
    }

    /// Its free share, in millionths.
    fn share(&self) -> u128 {
        u128::from(self.free_bytes) * 1_000_000 / u128::from(self.of_bytes.max(1))
    }
}

#[cfg(test)]
mod tests {
    use coel_store::{Bounds, Epoch, ModelId, Replica};

    use super::super::{Current, ExpectedLoss, plan};
    use super::*;
    use crate::budget::SizeByPrecision;

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);
    const C: NodeId = NodeId(3);

    fn set(nodes: &[NodeId]) -> BTreeSet<NodeId> {
        nodes.iter().copied().collect()
    }

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    /// Six experts of 16 bytes, 9 at Q8 and 5 at Q4.
    fn experts() -> ExpertSizes {
        (0..6).map(|index| (ExpertId::new(0, index), SizeByPrecision::new([Some(5), Some(9), Some(16)]))).collect()
    }

    fn candidate(node: NodeId, expert_bytes_max: u64) -> Candidate {
        Candidate { node, expert_bytes_max, page_bytes_max: 0, accepts: Bounds::AUTO }
    }

    fn loss() -> ExpectedLoss {
        ExpectedLoss::new(Popularity::new(vec![vec![6, 5, 4, 3, 2, 1]]), Vec::new())
    }

    /// Everything that a plan gives, served.
    fn placed(candidates: &[Candidate]) -> Placement {
        let planned = plan(&experts(), candidates, &Current::new(), &loss()).unwrap();
        let served = |(expert, nodes): (_, BTreeMap<_, _>)| {
            let ready = |(node, precision)| (node, Replica { precision, ready: Some(precision) });
            (expert, nodes.into_iter().map(ready).collect())
        };
        let replicas = planned.replicas.into_iter().map(served).collect();
        Placement { epoch: Epoch(1), model: ModelId([1; 32]), replicas, trunk_ready: BTreeSet::new() }
    }

    fn precisions(assignment: &Assignment) -> BTreeSet<Precision> {
        assignment.values().flat_map(BTreeMap::values).copied().collect()
    }

    /// What the placement becomes at `now`, as the leader does it.
    fn step(down: &Since, placement: &Placement, candidates: &[Candidate], now: Instant) -> Assignment {
        let Unavailable { waited_for, gone } = down.unavailable(Some(placement), now);
        let away: BTreeSet<_> = waited_for.union(&gone).copied().collect();
        let there: Vec<_> = candidates.iter().filter(|c| !away.contains(&c.node)).cloned().collect();
        if waited_for.is_empty() {
            return plan(&experts(), &there, &placement.replicas, &loss()).unwrap().replicas;
        }
        restore_coverage(placement, &there, &away, &experts(), loss().popularity())
    }

    #[test]
    fn down_means_down_all_the_time() {
        let (mut down, start) = (Since::default(), Instant::now());
        down.update(&set(&[A]), start);
        down.update(&set(&[A, B]), at(start, 3));
        assert_eq!(down.longer_than(Duration::from_secs(3), at(start, 4)), set(&[A]));
        down.update(&set(&[B]), at(start, 5));
        down.update(&set(&[A, B]), at(start, 6));
        assert_eq!(down.longer_than(Duration::from_secs(3), at(start, 7)), set(&[B]), "node 1 was back in between");
    }

    #[test]
    fn a_node_that_holds_something_is_waited_for_and_not_for_ever() {
        let (mut down, start) = (Since::default(), Instant::now());
        let placement = placed(&[candidate(A, 48), candidate(B, 48)]);
        down.update(&set(&[B, C]), start);
        let away = |seconds| down.unavailable(Some(&placement), at(start, seconds));
        assert_eq!(away(1), Unavailable::default());
        assert_eq!(away(2), Unavailable { waited_for: set(&[B]), gone: set(&[C]) });
        assert_eq!(away(29), away(2));
        assert_eq!(away(30), Unavailable { waited_for: set(&[]), gone: set(&[B, C]) });
        assert_eq!(down.unavailable(None, at(start, 2)), Unavailable { waited_for: set(&[]), gone: set(&[B, C]) });
    }

    #[test]
    fn a_short_absence_leaves_an_exact_mesh_exact() {
        let candidates = [candidate(A, 40), candidate(B, 40), candidate(C, 40)];
        let placement = placed(&candidates);
        let before: Assignment = step(&Since::default(), &placement, &candidates, Instant::now());
        assert_eq!(precisions(&before), BTreeSet::from([Precision::Exact]));
        let (mut down, start) = (Since::default(), Instant::now());
        down.update(&set(&[C]), start);
        for seconds in 2..30 {
            assert_eq!(step(&down, &placement, &candidates, at(start, seconds)), before, "after {seconds} s");
        }
        let without = step(&down, &placement, &candidates, at(start, 30));
        assert!(precisions(&without).len() > 1 && without.values().all(|nodes| !nodes.contains_key(&C)), "{without:?}");
        // It is back: as if nothing had been.
        down.update(&set(&[]), at(start, 20));
        assert_eq!(step(&down, &placement, &candidates, at(start, 40)), before);
    }

    #[test]
    fn what_nobody_serves_is_covered_as_it_was_where_there_is_room() {
        // C holds the two least popular experts alone; A has room for one more, and B for none.
        let exact = |nodes: &[NodeId]| -> BTreeMap<_, _> {
            let replica = Replica { precision: Precision::Exact, ready: Some(Precision::Exact) };
            nodes.iter().map(|&node| (node, replica)).collect()
        };
        let on = [&[A, C][..], &[B], &[A], &[B], &[C], &[C]];
        let replicas = (0..6).map(|index| (ExpertId::new(0, index), exact(on[usize::from(index)]))).collect();
        let placement = Placement { epoch: Epoch(1), model: ModelId([1; 32]), replicas, trunk_ready: BTreeSet::new() };
        let there = [candidate(A, 50), candidate(B, 32)];
        let covered = restore_coverage(&placement, &there, &set(&[C]), &experts(), loss().popularity());
        let as_it_was = placement.replicas.iter().all(|(expert, nodes)| {
            nodes.iter().all(|(node, replica)| covered[expert].get(node) == Some(&replica.precision))
        });
        assert!(as_it_was, "{covered:?}");
        let nodes = |index| covered[&ExpertId::new(0, index)].keys().copied().collect::<BTreeSet<_>>();
        assert_eq!((nodes(4), nodes(5)), (set(&[A, C]), set(&[C])), "the more popular one");
        assert_eq!(nodes(0), set(&[A, C]), "it is served");
        // A node that accepts slices only takes none of them.
        let q8 = Candidate { accepts: Bounds::only(Precision::Q8), ..candidate(A, 500) };
        let covered = restore_coverage(&placement, &[q8], &set(&[C]), &experts(), loss().popularity());
        assert!(covered[&ExpertId::new(0, 4)].keys().eq([&C]));
    }
}
