//! Assigns the (row, expert) pairs of one layer to hosts: pure, from the routes, the placement and what is known of the hosts.
//!
//! A pair goes to a node that has a ready replica of its expert, in this order:
//!
//! 1. this node. The engine computes what it holds before it asks for more, so this covers experts that were loaded meanwhile;
//! 2. hosts that are neither cooling down nor overloaded, the highest precision first, so that whether an answer is exact
//!    does not depend on a random choice;
//! 3. overloaded hosts, the highest precision first ([`HostTable::is_overloaded`]);
//! 4. hosts that are cooling down, the highest precision first.
//!
//! Among equals it is the host already contacted in this layer that answers soonest, unless another would answer in less
//! than half the time. Others are drawn as the better of two random hosts, so that homes with the same stale figures do not
//! all choose the same one, and a host that was slow once is tried again.
//!
//! The invariant: each pair is assigned exactly once, to an available holder, or its expert is reported missing.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use coel_store::{Epoch, ExpertId, NodeId, Precision, State};
use rand::Rng;

use super::hosts::HostTable;
use super::wire::Work;

/// Another frame must shorten the wait by this factor: each host that is contacted costs one.
const SPREAD_FACTOR: u32 = 2;
/// Experts that an error names one by one.
const NAMED_MAX: usize = 8;

/// One (row, expert) pair of a layer, by its place in the order in which the decoder wants outputs back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pair {
    /// Row of the decoder's call.
    pub row: u16,
    /// Expert index within the layer.
    pub expert: u16,
    /// Position of its output row in the decoder's answer.
    pub slot: u32,
}

/// Who could compute the experts of one layer, as this home knows at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerReplicas {
    /// This node.
    pub home: NodeId,
    /// The decoder layer.
    pub layer: u16,
    /// The placement that this comes from.
    pub epoch: Epoch,
    /// By expert index, the nodes with a ready replica, reachable or not. The home is among them if it holds the expert.
    pub holders: BTreeMap<u16, BTreeMap<NodeId, Precision>>,
    /// By expert index, the nodes that are to have a replica by the placement and have none ready.
    pub loading: BTreeMap<u16, BTreeSet<NodeId>>,
    /// The peers that gossip does not consider down, and their smoothed round trips where measured.
    pub live: BTreeMap<NodeId, Option<Duration>>,
}

impl LayerReplicas {
    /// The replicas of `experts`, by the agreed placement and by what this node holds itself.
    pub fn new(
        home: NodeId,
        layer: u16,
        experts: impl IntoIterator<Item = u16>,
        state: &State,
        held: &BTreeMap<ExpertId, Precision>,
        live: BTreeMap<NodeId, Option<Duration>>,
    ) -> Self {
        let (mut holders, mut loading) = (BTreeMap::new(), BTreeMap::new());
        for index in experts {
            let expert = ExpertId { layer, index };
            let placed = || state.placement.iter().filter_map(|placement| placement.replicas.get(&expert)).flatten();
            let others = placed().filter(|(node, _)| **node != home);
            let others = others.filter_map(|(&node, replica)| Some((node, replica.ready?)));
            let ready: BTreeMap<_, _> = others.chain(held.get(&expert).map(|&precision| (home, precision))).collect();
            loading.insert(index, placed().map(|(&node, _)| node).filter(|node| !ready.contains_key(node)).collect());
            holders.insert(index, ready);
        }
        Self { home, layer, epoch: state.epoch(), holders, loading, live }
    }

    /// Whether the node could be asked now.
    pub fn is_live(&self, node: NodeId) -> bool {
        node == self.home || self.live.contains_key(&node)
    }

    /// The round trip to a peer, where it is live and measured.
    pub fn round_trip(&self, node: NodeId) -> Option<Duration> {
        self.live.get(&node).copied().flatten()
    }

    /// Nodes with a ready replica of the expert, at which precision.
    pub fn of(&self, expert: u16) -> impl Iterator<Item = (NodeId, Precision)> + '_ {
        self.holders.get(&expert).into_iter().flatten().map(|(&node, &precision)| (node, precision))
    }

    /// Nodes that have the expert, ready or not.
    pub fn placed(&self, expert: u16) -> impl Iterator<Item = NodeId> + '_ {
        self.of(expert).map(|(node, _)| node).chain(self.loading.get(&expert).into_iter().flatten().copied())
    }

    /// Whether each expert could be asked for now.
    pub fn is_complete(&self) -> bool {
        self.holders.values().all(|nodes| nodes.keys().any(|&node| self.is_live(node)))
    }
}

/// What a call has learnt that its replicas do not say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exclusions {
    /// Hosts that failed in this call.
    pub failed: BTreeSet<NodeId>,
    /// Experts that a node says it does not hold, whatever the placement says.
    pub absent: BTreeSet<(NodeId, u16)>,
}

impl Exclusions {
    /// Whether nothing is excluded.
    pub fn is_empty(&self) -> bool {
        self.failed.is_empty() && self.absent.is_empty()
    }

    /// Excludes nothing any more.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// The pairs that one node is to compute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The node; the home itself for experts that it holds.
    pub host: NodeId,
    /// Pairs in (expert, row) order, which is the order of the reply's rows.
    pub pairs: Vec<Pair>,
}

impl Assignment {
    /// Rows that the host needs, ascending, each once.
    pub fn rows(&self) -> Vec<u16> {
        self.pairs.iter().map(|pair| pair.row).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The work list. Its row indices count within [`Self::rows`].
    pub fn work(&self) -> Vec<Work> {
        let rows = self.rows();
        let mut work = Vec::<Work>::new();
        for pair in &self.pairs {
            let row = rows.binary_search(&pair.row).expect("rows() has every pair's row") as u16;
            match work.last_mut() {
                Some(last) if last.expert == pair.expert => last.rows.push(row),
                _ => work.push(Work { expert: pair.expert, rows: vec![row] }),
            }
        }
        work
    }
}

/// Experts that no live node has ready.
#[derive(Debug, Clone, Default, PartialEq, Eq, thiserror::Error)]
#[error("{}", describe(.experts))]
pub struct MissingExperts {
    /// Each missing expert, with the nodes that have it by the placement, ready or not.
    pub experts: BTreeMap<ExpertId, Vec<NodeId>>,
}

fn describe(experts: &BTreeMap<ExpertId, Vec<NodeId>>) -> String {
    let each = experts.iter().map(|(expert, nodes)| {
        let nodes: Vec<_> = nodes.iter().map(|node| format!("node {node}")).collect();
        if nodes.is_empty() {
            format!("{expert} (no replica in the placement)")
        } else {
            format!("{expert} (placed on {})", nodes.join(" and "))
        }
    });
    let named: Vec<_> = each.take(NAMED_MAX).collect();
    let more = experts.len().saturating_sub(named.len());
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    let named = named.join(", ");
    format!(
        "no live replica of expert {named}{more}; start a node that holds what is missing, or add one with free memory"
    )
}

/// How willingly a host is asked: lower is better.
type Rank = (Health, Reverse<Precision>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Health {
    Good,
    Overloaded,
    CoolingDown,
}

/// What [`assign`] decides from.
#[derive(Debug, Clone, Copy)]
pub struct DispatchContext<'a> {
    /// Who could compute the experts.
    pub replicas: &'a LayerReplicas,
    /// What the call has learnt besides.
    pub excluded: &'a Exclusions,
    /// Hosts that the call has contacted already.
    pub contacted: &'a BTreeSet<NodeId>,
    /// What was measured of the hosts.
    pub hosts: &'a HostTable,
    /// The present.
    pub now: Instant,
}

impl DispatchContext<'_> {
    fn estimate(&self, node: NodeId, rows: usize) -> Duration {
        self.hosts.estimate(node, self.replicas.round_trip(node), rows)
    }

    fn is_available(&self, node: NodeId, expert: u16) -> bool {
        let Exclusions { failed, absent } = self.excluded;
        self.replicas.is_live(node) && !failed.contains(&node) && !absent.contains(&(node, expert))
    }

    /// The rank of a host for `rows` rows of an expert that it holds at this precision.
    fn rank(&self, node: NodeId, precision: Precision, rows: usize) -> Rank {
        let health = if self.hosts.is_cooling_down(node, self.now) {
            Health::CoolingDown
        } else if self.hosts.is_overloaded(node, self.estimate(node, rows)) {
            Health::Overloaded
        } else {
            Health::Good
        };
        (health, Reverse(precision))
    }

    /// The available nodes of the best rank: the home alone, if it holds the expert.
    fn best(&self, expert: u16, rows: usize) -> Vec<NodeId> {
        let available: Vec<_> = self.replicas.of(expert).filter(|(node, _)| self.is_available(*node, expert)).collect();
        if available.iter().any(|(node, _)| *node == self.replicas.home) {
            return vec![self.replicas.home];
        }
        let ranked: Vec<_> =
            available.into_iter().map(|(node, precision)| (self.rank(node, precision, rows), node)).collect();
        let best = ranked.iter().map(|(rank, _)| *rank).min();
        ranked.into_iter().filter(|(rank, _)| Some(*rank) == best).map(|(_, node)| node).collect()
    }
}

/// Assigns every pair of one layer to a node.
///
/// # Errors
/// [`MissingExperts`] names every expert that no available node holds; then nothing is assigned.
pub fn assign(
    pairs: &[Pair],
    context: DispatchContext<'_>,
    rng: &mut impl Rng,
) -> Result<Vec<Assignment>, MissingExperts> {
    let DispatchContext { replicas, contacted, .. } = context;
    let mut by_expert = BTreeMap::<u16, Vec<Pair>>::new();
    for &pair in pairs {
        by_expert.entry(pair.expert).or_default().push(pair);
    }
    let mut missing = BTreeMap::new();
    let mut choices = Vec::new();
    for (index, pairs) in by_expert {
        let best = context.best(index, pairs.len());
        if best.is_empty() {
            missing.insert(ExpertId { layer: replicas.layer, index }, replicas.placed(index).collect());
        } else {
            choices.push((best, pairs));
        }
    }
    if !missing.is_empty() {
        return Err(MissingExperts { experts: missing });
    }
    // Experts with the fewest choices first: they decide which hosts are contacted anyway.
    choices.sort_by_key(|(best, pairs)| (best.len(), pairs[0].expert));
    let mut assigned = BTreeMap::<NodeId, Vec<Pair>>::new();
    for (best, pairs) in choices {
        let rows_of = |node: NodeId| assigned.get(&node).map_or(0, Vec::len) + pairs.len();
        let estimate = |node: &NodeId| context.estimate(*node, rows_of(*node));
        let (near, far): (Vec<_>, Vec<_>) =
            best.iter().copied().partition(|node| assigned.contains_key(node) || contacted.contains(node));
        let near = near.into_iter().min_by_key(estimate);
        let host = match (near, better_of_two(&far, estimate, rng)) {
            (Some(near), Some(far)) if estimate(&near) > estimate(&far).saturating_mul(SPREAD_FACTOR) => far,
            (Some(near), _) => near,
            (None, Some(far)) => far,
            (None, None) => unreachable!("every expert that is left has a choice"),
        };
        assigned.entry(host).or_default().extend(pairs);
    }
    let each = assigned.into_iter().map(|(host, mut pairs)| {
        pairs.sort_by_key(|pair| (pair.expert, pair.row));
        Assignment { host, pairs }
    });
    Ok(each.collect())
}

/// The one of two random nodes that answers sooner; `None` of none.
fn better_of_two(nodes: &[NodeId], estimate: impl Fn(&NodeId) -> Duration, rng: &mut impl Rng) -> Option<NodeId> {
    if nodes.is_empty() {
        return None;
    }
    let (one, two) = (nodes[rng.random_range(0..nodes.len())], nodes[rng.random_range(0..nodes.len())]);
    Some(if estimate(&two) < estimate(&one) { two } else { one })
}

#[cfg(test)]
mod tests {
    use coel_store::{ModelId, Placement, Replica};
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::super::hosts::Answered;
    use super::*;

    /// Replicas and hosts as a test sets them; the home is node 1.
    struct World {
        replicas: LayerReplicas,
        hosts: HostTable,
        excluded: Exclusions,
        contacted: BTreeSet<NodeId>,
        now: Instant,
    }

    /// A world of exact replicas on nodes 2 to 5, all a millisecond away.
    fn world(holders: &[(u16, &[u64])]) -> World {
        let exact = |nodes: &[u64]| nodes.iter().map(|&node| (NodeId(node), Precision::Exact)).collect();
        let replicas = LayerReplicas {
            home: NodeId(1),
            layer: 2,
            holders: holders.iter().map(|&(expert, nodes)| (expert, exact(nodes))).collect(),
            live: (2..6).map(|node| (NodeId(node), Some(Duration::from_millis(1)))).collect(),
            ..LayerReplicas::default()
        };
        World {
            replicas,
            hosts: HostTable::default(),
            excluded: Exclusions::default(),
            contacted: BTreeSet::new(),
            now: Instant::now(),
        }
    }

    impl World {
        fn hold(&mut self, expert: u16, node: u64, precision: Precision) {
            self.replicas.holders.entry(expert).or_default().insert(NodeId(node), precision);
        }

        /// Has the host take so long for a row.
        fn pace(&mut self, node: u64, row: Duration) {
            self.hosts.answered(NodeId(node), Answered { rows: 1, rows_ahead: 0, took: row, round_trip: None });
        }

        fn context(&self) -> DispatchContext<'_> {
            let Self { replicas, hosts, excluded, contacted, now } = self;
            DispatchContext { replicas, excluded, contacted, hosts, now: *now }
        }

        fn assign(&self, rows: &[&[u16]], seed: u64) -> Result<Vec<Assignment>, MissingExperts> {
            assign(&pairs(rows), self.context(), &mut SmallRng::seed_from_u64(seed))
        }

        /// Host, and its (expert, row) pairs.
        fn hosts(&self, rows: &[&[u16]]) -> Vec<(u64, Vec<(u16, u16)>)> {
            let pair = |pair: &Pair| (pair.expert, pair.row);
            let each = self.assign(rows, 1).unwrap().into_iter();
            each.map(|call| (call.host.0, call.pairs.iter().map(pair).collect())).collect()
        }

        /// The hosts chosen for expert 0 in many draws.
        fn chosen(&self) -> BTreeMap<u64, usize> {
            let mut counts = BTreeMap::new();
            for seed in 0..400 {
                *counts.entry(self.assign(&[&[0]], seed).unwrap()[0].host.0).or_default() += 1;
            }
            counts
        }
    }

    /// Pairs in decoder order from each row's experts.
    fn pairs(rows: &[&[u16]]) -> Vec<Pair> {
        let each = rows.iter().zip(0..).flat_map(|(experts, row)| experts.iter().map(move |&expert| (row, expert)));
        each.zip(0..).map(|((row, expert), slot)| Pair { row, expert, slot }).collect()
    }

    fn nodes<const N: usize>(nodes: [u64; N]) -> BTreeSet<NodeId> {
        nodes.map(NodeId).into()
    }

    #[test]
    fn what_is_held_here_stays_here() {
        let mut world = world(&[(0, &[1, 2]), (1, &[2, 3])]);
        world.excluded.failed = nodes([2]);
        assert_eq!(world.hosts(&[&[0, 1]]), [(1, vec![(0, 0)]), (3, vec![(1, 0)])]);
    }

    #[test]
    fn one_host_serves_all_it_can() {
        let world = world(&[(0, &[2]), (1, &[2, 3]), (2, &[2, 3])]);
        assert_eq!(world.hosts(&[&[0, 1, 2]]), [(2, vec![(0, 0), (1, 0), (2, 0)])]);
    }

    #[test]
    fn a_row_goes_once_to_a_host_whatever_it_is_for() {
        let world = world(&[(0, &[2]), (1, &[2])]);
        let call = &world.assign(&[&[0, 1], &[1]], 1).unwrap()[0];
        assert_eq!(call.rows(), [0, 1]);
        assert_eq!(call.work(), [Work { expert: 0, rows: vec![0] }, Work { expert: 1, rows: vec![0, 1] }]);
    }

    #[test]
    fn the_dead_the_failed_and_those_without_the_expert_are_not_asked() {
        let mut world = world(&[(0, &[2, 3])]);
        world.replicas.live.remove(&NodeId(2));
        assert_eq!(world.chosen().into_keys().collect::<Vec<_>>(), [3]);
        world.replicas.live.insert(NodeId(2), None);
        world.excluded.failed = nodes([3]);
        assert_eq!(world.chosen().into_keys().collect::<Vec<_>>(), [2]);
        world.excluded = Exclusions { absent: [(NodeId(2), 0)].into(), ..Exclusions::default() };
        assert_eq!(world.chosen().into_keys().collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn hosts_that_cool_down_are_asked_last() {
        let mut world = world(&[(0, &[2, 3]), (1, &[2])]);
        world.hosts.failed(NodeId(2), world.now);
        assert_eq!(world.hosts(&[&[0]]), [(3, vec![(0, 0)])]);
        assert_eq!(world.hosts(&[&[1]]), [(2, vec![(1, 0)])]);
    }

    #[test]
    fn of_two_replicas_the_nearer_is_preferred() {
        let mut world = world(&[(0, &[2, 3])]);
        world.replicas.live.insert(NodeId(2), Some(Duration::from_millis(500)));
        let chosen = world.chosen();
        assert!(chosen[&3] > 2 * chosen[&2], "{chosen:?}");
    }

    #[test]
    fn of_two_replicas_the_faster_is_preferred() {
        let mut world = world(&[(0, &[2, 3])]);
        world.pace(2, Duration::from_millis(80));
        world.pace(3, Duration::from_millis(2));
        let chosen = world.chosen();
        assert!(chosen[&3] > 2 * chosen[&2], "{chosen:?}");
    }

    #[test]
    fn of_two_replicas_the_idle_one_is_preferred_even_before_anything_was_measured() {
        let mut world = world(&[(0, &[2, 3])]);
        world.replicas.live.extend([(NodeId(2), None), (NodeId(3), None)]);
        world.hosts.sent(NodeId(2), 40);
        let chosen = world.chosen();
        assert!(chosen[&3] > 2 * chosen[&2], "{chosen:?}");
    }

    #[test]
    fn a_contacted_host_is_left_only_for_one_that_is_twice_as_fast() {
        let mut world = world(&[(0, &[2, 3])]);
        world.contacted = nodes([2]);
        world.pace(2, Duration::from_millis(5));
        world.pace(3, Duration::from_millis(4));
        assert_eq!(world.chosen(), [(2, 400)].into(), "another frame is not worth it");
        world.pace(2, Duration::from_millis(90));
        assert_eq!(world.chosen(), [(3, 400)].into());
    }

    #[test]
    fn a_higher_precision_is_preferred_whatever_is_faster() {
        let mut world = world(&[]);
        world.hold(0, 2, Precision::Q4);
        world.hold(0, 3, Precision::Exact);
        world.hold(0, 4, Precision::Q8);
        world.pace(3, Duration::from_millis(200));
        world.contacted = nodes([2]);
        assert_eq!(world.chosen(), [(3, 400)].into());
        world.replicas.live.remove(&NodeId(3));
        assert_eq!(world.chosen(), [(4, 400)].into(), "the next lower one");
    }

    #[test]
    fn one_slow_answer_does_not_make_answers_inexact() {
        let mut world = world(&[]);
        world.hold(0, 2, Precision::Q4);
        world.hold(0, 3, Precision::Exact);
        let slow = Answered { rows: 1, rows_ahead: 0, took: Duration::from_secs(4), round_trip: None };
        world.hosts.answered(NodeId(3), slow);
        assert_eq!(world.chosen(), [(3, 400)].into(), "nothing is queued there, and asking again measures anew");
    }

    #[test]
    fn a_lower_precision_is_asked_before_an_exact_host_that_is_overloaded_or_cools_down() {
        let mut world = world(&[]);
        world.hold(0, 2, Precision::Q8);
        world.hold(0, 3, Precision::Exact);
        world.hosts.sent(NodeId(3), 10_000);
        assert_eq!(world.chosen(), [(2, 400)].into(), "node 3 is overloaded");
        world.hosts.failed(NodeId(2), world.now);
        assert_eq!(world.chosen(), [(3, 400)].into(), "late is better than failed");
        world.hosts.failed(NodeId(3), world.now);
        assert_eq!(world.chosen(), [(3, 400)].into(), "of two that failed, the exact one");
        world.hosts = HostTable::default();
        world.hosts.failed(NodeId(3), world.now);
        assert_eq!(world.chosen(), [(2, 400)].into(), "node 3 cools down");
    }

    #[test]
    fn replicas_come_from_the_placement_and_from_what_is_held_here() {
        let held = BTreeMap::from([(ExpertId::new(2, 0), Precision::Q8), (ExpertId::new(3, 0), Precision::Q4)]);
        let live = BTreeMap::from([(NodeId(2), None)]);
        let replicas = LayerReplicas::new(NodeId(1), 2, [0, 1], &State::default(), &held, live);
        assert_eq!(replicas.of(0).collect::<Vec<_>>(), [(NodeId(1), Precision::Q8)]);
        assert_eq!(replicas.of(1).count(), 0);
        assert!(replicas.is_live(NodeId(1)) && replicas.is_live(NodeId(2)) && !replicas.is_live(NodeId(3)));
    }

    #[test]
    fn a_replica_counts_as_ready_by_its_nodes_word_and_here_by_what_is_held() {
        let replica = |ready| Replica { precision: Precision::Exact, ready };
        let ready = Some(Precision::Q8);
        let nodes = [(NodeId(1), replica(ready)), (NodeId(2), replica(ready)), (NodeId(3), replica(None))];
        let placement = Placement {
            epoch: Epoch(4),
            model: ModelId([1; 32]),
            replicas: [(ExpertId::new(2, 0), nodes.into())].into(),
            trunk_ready: BTreeSet::new(),
        };
        let state = State { placement: Some(placement), ..State::default() };
        let seen = |held: &[(u16, Precision)], live: &[u64]| {
            let held = held.iter().map(|&(index, precision)| (ExpertId::new(2, index), precision)).collect();
            let live = live.iter().map(|&node| (NodeId(node), None)).collect();
            LayerReplicas::new(NodeId(1), 2, [0], &state, &held, live)
        };
        let replicas = seen(&[], &[3]);
        assert_eq!((replicas.of(0).collect(), replicas.placed(0).count()), (vec![(NodeId(2), Precision::Q8)], 3));
        assert_eq!(replicas.loading[&0], self::nodes([1, 3]), "this node dropped it, node 3 never had it");
        assert!(!replicas.is_complete(), "node 2 is away");
        assert!(seen(&[], &[2]).is_complete() && seen(&[(0, Precision::Q4)], &[]).is_complete());
    }

    #[test]
    fn what_is_missing_is_named_with_its_holders() {
        let mut world = world(&[(0, &[2]), (1, &[3])]);
        world.replicas.live.remove(&NodeId(2));
        let error = world.assign(&[&[0, 1, 5]], 1).unwrap_err();
        assert_eq!(error.experts.len(), 2);
        let text = error.to_string();
        assert!(text.contains("2.0 (placed on node 2") && text.contains("2.5 (no replica"), "{text}");
    }

    proptest! {
        #[test]
        fn every_pair_is_assigned_exactly_once_to_a_live_holder_of_the_best_precision(
            holders in proptest::collection::vec(proptest::collection::btree_map(1u64..6, 0usize..3, 1..4), 8),
            routes in proptest::collection::vec(proptest::collection::btree_set(0u16..8, 1..4), 1..20),
            down in proptest::collection::btree_set(2u64..6, 0..3),
            cooling in proptest::collection::btree_set(2u64..6, 0..3),
            seed in any::<u64>(),
        ) {
            let mut world = world(&[]);
            for (nodes, expert) in holders.iter().zip(0..) {
                nodes.iter().for_each(|(&node, &precision)| world.hold(expert, node, Precision::ALL[precision]));
            }
            down.iter().for_each(|&node| _ = world.replicas.live.remove(&NodeId(node)));
            cooling.iter().for_each(|&node| world.hosts.failed(NodeId(node), world.now));
            let routes: Vec<Vec<u16>> = routes.into_iter().map(|r| r.into_iter().collect()).collect();
            let rows: Vec<&[u16]> = routes.iter().map(Vec::as_slice).collect();
            match world.assign(&rows, seed) {
                Ok(calls) => {
                    let mut got: Vec<_> = calls.iter().flat_map(|call| call.pairs.clone()).collect();
                    got.sort_by_key(|pair| pair.slot);
                    prop_assert_eq!(got, pairs(&rows));
                    for call in &calls {
                        let host = call.host.0;
                        prop_assert!(!down.contains(&host));
                        for pair in &call.pairs {
                            let nodes = &holders[usize::from(pair.expert)];
                            prop_assert!(nodes.contains_key(&host));
                            prop_assert!(host == 1 || !nodes.contains_key(&1), "what is held here stays here");
                            let better = nodes.iter().any(|(node, precision)| {
                                !down.contains(node) && !cooling.contains(node) && *precision > nodes[&host]
                            });
                            prop_assert!(host == 1 || !better, "a healthy host holds it at a higher precision");
                        }
                        let shown: usize = call.work().iter().map(|work| work.rows.len()).sum();
                        prop_assert_eq!(shown, call.pairs.len());
                    }
                }
                Err(missing) => for expert in missing.experts.keys() {
                    prop_assert!(holders[usize::from(expert.index)].keys().all(|node| down.contains(node)));
                },
            }
        }
    }
}
