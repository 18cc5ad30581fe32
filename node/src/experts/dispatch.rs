//! Who computes which expert for which row: pure, from the routes, the placement and what gossip says of the hosts.
//!
//! Order of preference (all of it lossless): this node; a host already contacted in this layer; the better of two random
//! replicas by round trip and calls in flight. A host that failed is not asked again in this layer while another replica
//! is left, and asked last for a while after that.

use std::collections::{BTreeMap, BTreeSet};

use coel_store::{ExpertId, NodeId};
use rand::Rng;

use super::wire::Work;

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

/// What is known of a host that could be asked now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HostLoad {
    /// Smoothed round trip in seconds; 0 where nothing was measured yet.
    pub rtt_s: f64,
    /// Calls of this home it has not answered yet.
    pub in_flight: u32,
    /// It failed a moment ago: better ask another one first.
    pub shunned: bool,
}

impl HostLoad {
    /// Expected wait: a call queues behind those in flight.
    fn cost(&self) -> f64 {
        self.rtt_s * f64::from(1 + self.in_flight)
    }
}

/// The replicas of one layer's experts, as the home sees them.
pub trait Replicas {
    /// This node.
    fn home(&self) -> NodeId;
    /// Nodes with a ready replica, dead or alive, ascending.
    fn of(&self, expert: ExpertId) -> Vec<NodeId>;
    /// The load of a host; `None` if it is down.
    fn load(&self, node: NodeId) -> Option<HostLoad>;
}

/// What one host is asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Who computes; the home itself for local experts.
    pub host: NodeId,
    /// Pairs in (expert, row) order: the order of the reply's rows.
    pub pairs: Vec<Pair>,
}

impl Call {
    /// Rows the host needs, ascending, each once.
    pub fn rows(&self) -> Vec<u16> {
        self.pairs.iter().map(|pair| pair.row).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The work list, its row indices counting within [`Self::rows`].
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
pub struct Missing {
    /// Each missing expert, with the nodes that hold it by the placement.
    pub experts: BTreeMap<ExpertId, Vec<NodeId>>,
}

fn describe(experts: &BTreeMap<ExpertId, Vec<NodeId>>) -> String {
    let each = experts.iter().map(|(expert, nodes)| {
        let nodes: Vec<_> = nodes.iter().map(|node| format!("node {node}")).collect();
        if nodes.is_empty() {
            format!("{expert} (no replica in the placement)")
        } else {
            format!("{expert} (held by {}, not answering)", nodes.join(", "))
        }
    });
    let listed: Vec<_> = each.take(8).collect();
    let more = experts.len().saturating_sub(listed.len());
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    format!("no live replica of expert {}{more}; start a node that holds them or add one with room", listed.join(", "))
}

/// Assigns every pair of one layer to a host. `failed` hosts are not asked.
///
/// # Errors
/// [`Missing`] names every expert that has nobody left.
pub fn assign(
    layer: u16,
    pairs: &[Pair],
    replicas: &dyn Replicas,
    failed: &BTreeSet<NodeId>,
    rng: &mut impl Rng,
) -> Result<Vec<Call>, Missing> {
    let home = replicas.home();
    let mut by_expert = BTreeMap::<u16, Vec<Pair>>::new();
    for &pair in pairs {
        by_expert.entry(pair.expert).or_default().push(pair);
    }
    let mut calls = BTreeMap::<NodeId, Vec<Pair>>::new();
    let mut missing = BTreeMap::new();
    let mut remote = Vec::new();
    for (index, pairs) in by_expert {
        let expert = ExpertId { layer, index };
        let holders = replicas.of(expert);
        let mut alive: Vec<_> = holders
            .iter()
            .copied()
            .filter(|node| !failed.contains(node) && (*node == home || replicas.load(*node).is_some()))
            .collect();
        let trusted = |node: &NodeId| replicas.load(*node).is_some_and(|load| !load.shunned);
        if alive.iter().any(trusted) {
            alive.retain(|node| *node == home || trusted(node));
        }
        if alive.contains(&home) {
            calls.entry(home).or_default().extend(pairs);
        } else if alive.is_empty() {
            missing.insert(expert, holders);
        } else {
            remote.push((alive, pairs));
        }
    }
    if !missing.is_empty() {
        return Err(Missing { experts: missing });
    }
    // Experts with the fewest choices first: they decide which hosts are contacted anyway.
    remote.sort_by_key(|(alive, pairs)| (alive.len(), pairs[0].expert));
    for (alive, pairs) in remote {
        let contacted = alive.iter().copied().filter(|node| calls.contains_key(node));
        let host =
            contacted.min_by_key(|node| calls[node].len()).unwrap_or_else(|| better_of_two(&alive, replicas, rng));
        calls.entry(host).or_default().extend(pairs);
    }
    Ok(calls
        .into_iter()
        .map(|(host, mut pairs)| {
            pairs.sort_by_key(|pair| (pair.expert, pair.row));
            Call { host, pairs }
        })
        .collect())
}

/// Two random replicas, the cheaper one: stale load figures make no herd.
fn better_of_two(alive: &[NodeId], replicas: &dyn Replicas, rng: &mut impl Rng) -> NodeId {
    let cost = |node| replicas.load(node).map_or(f64::INFINITY, |load| load.cost());
    let one = alive[rng.random_range(0..alive.len())];
    let two = alive[rng.random_range(0..alive.len())];
    if cost(two) < cost(one) { two } else { one }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;

    struct World {
        replicas: BTreeMap<u16, Vec<u64>>,
        down: Vec<u64>,
        shunned: Vec<u64>,
        slow: Vec<u64>,
    }

    impl Replicas for World {
        fn home(&self) -> NodeId {
            NodeId(1)
        }
        fn of(&self, expert: ExpertId) -> Vec<NodeId> {
            self.replicas.get(&expert.index).into_iter().flatten().map(|&id| NodeId(id)).collect()
        }
        fn load(&self, node: NodeId) -> Option<HostLoad> {
            let rtt_s = if self.slow.contains(&node.0) { 0.5 } else { 0.001 };
            let shunned = self.shunned.contains(&node.0);
            (!self.down.contains(&node.0)).then_some(HostLoad { rtt_s, in_flight: 0, shunned })
        }
    }

    fn world(replicas: &[(u16, &[u64])]) -> World {
        let replicas = replicas.iter().map(|&(expert, nodes)| (expert, nodes.to_vec())).collect();
        World { replicas, down: vec![], shunned: vec![], slow: vec![] }
    }

    /// Pairs in decoder order from each row's experts.
    fn pairs(rows: &[&[u16]]) -> Vec<Pair> {
        let each = rows.iter().zip(0..).flat_map(|(experts, row)| experts.iter().map(move |&expert| (row, expert)));
        each.zip(0..).map(|((row, expert), slot)| Pair { row, expert, slot }).collect()
    }

    /// Host, and its (expert, row) pairs.
    type Asked = (u64, Vec<(u16, u16)>);

    fn hosts(world: &World, rows: &[&[u16]], failed: &[u64]) -> Result<Vec<Asked>, Missing> {
        let failed = failed.iter().map(|&id| NodeId(id)).collect();
        let calls = assign(2, &pairs(rows), world, &failed, &mut SmallRng::seed_from_u64(1))?;
        let pair = |pair: &Pair| (pair.expert, pair.row);
        Ok(calls.into_iter().map(|call| (call.host.0, call.pairs.iter().map(pair).collect())).collect())
    }

    #[test]
    fn what_is_held_here_stays_here() {
        let world = world(&[(0, &[1, 2]), (1, &[2, 3])]);
        let calls = hosts(&world, &[&[0, 1]], &[2]).unwrap();
        assert_eq!(calls, [(1, vec![(0, 0)]), (3, vec![(1, 0)])]);
    }

    #[test]
    fn one_host_serves_all_it_can() {
        let world = world(&[(0, &[2]), (1, &[2, 3]), (2, &[2, 3])]);
        assert_eq!(hosts(&world, &[&[0, 1, 2]], &[]).unwrap(), [(2, vec![(0, 0), (1, 0), (2, 0)])]);
    }

    #[test]
    fn a_row_goes_once_to_a_host_whatever_it_is_for() {
        let world = world(&[(0, &[2]), (1, &[2])]);
        let calls = assign(0, &pairs(&[&[0, 1], &[1]]), &world, &BTreeSet::new(), &mut SmallRng::seed_from_u64(1));
        let call = &calls.unwrap()[0];
        assert_eq!(call.rows(), [0, 1]);
        assert_eq!(call.work(), [Work { expert: 0, rows: vec![0] }, Work { expert: 1, rows: vec![0, 1] }]);
    }

    #[test]
    fn the_dead_and_the_failed_are_not_asked() {
        let mut world = world(&[(0, &[2, 3])]);
        world.down = vec![2];
        assert_eq!(hosts(&world, &[&[0]], &[]).unwrap()[0].0, 3);
        world.down = vec![];
        assert_eq!(hosts(&world, &[&[0]], &[3]).unwrap()[0].0, 2);
    }

    #[test]
    fn the_shunned_are_asked_last() {
        let mut world = world(&[(0, &[2, 3]), (1, &[2])]);
        world.shunned = vec![2];
        assert_eq!(hosts(&world, &[&[0]], &[]).unwrap(), [(3, vec![(0, 0)])]);
        assert_eq!(hosts(&world, &[&[1]], &[]).unwrap(), [(2, vec![(1, 0)])]);
    }

    #[test]
    fn of_two_replicas_the_quicker_is_preferred() {
        let mut world = world(&[(0, &[2, 3])]);
        world.slow = vec![2];
        let mut rng = SmallRng::seed_from_u64(7);
        let mut asked = |host| {
            let picks = (0..400).map(|_| assign(0, &pairs(&[&[0]]), &world, &BTreeSet::new(), &mut rng).unwrap());
            picks.filter(|calls| calls[0].host == NodeId(host)).count()
        };
        assert!(asked(3) > 2 * asked(2));
    }

    #[test]
    fn what_is_missing_is_named_with_who_had_it() {
        let mut world = world(&[(0, &[2]), (1, &[3])]);
        world.down = vec![2];
        let error = hosts(&world, &[&[0, 1, 5]], &[]).unwrap_err();
        assert_eq!(error.experts.len(), 2);
        let text = error.to_string();
        assert!(text.contains("2.0 (held by node 2") && text.contains("2.5 (no replica"), "{text}");
    }

    proptest! {
        #[test]
        fn every_pair_is_computed_exactly_once_by_a_live_holder(
            holders in proptest::collection::vec(proptest::collection::btree_set(1u64..6, 1..4), 8),
            routes in proptest::collection::vec(proptest::collection::btree_set(0u16..8, 1..4), 1..20),
            down in proptest::collection::btree_set(2u64..6, 0..3),
            seed in any::<u64>(),
        ) {
            let replicas = holders.iter().zip(0..).map(|(nodes, e)| (e, nodes.iter().copied().collect())).collect();
            let world = World { replicas, down: down.iter().copied().collect(), shunned: vec![], slow: vec![] };
            let routes: Vec<Vec<u16>> = routes.into_iter().map(|r| r.into_iter().collect()).collect();
            let rows: Vec<&[u16]> = routes.iter().map(Vec::as_slice).collect();
            let wanted = pairs(&rows);
            match assign(0, &wanted, &world, &BTreeSet::new(), &mut SmallRng::seed_from_u64(seed)) {
                Ok(calls) => {
                    let mut got: Vec<_> = calls.iter().flat_map(|call| call.pairs.clone()).collect();
                    got.sort_by_key(|pair| pair.slot);
                    prop_assert_eq!(got, wanted);
                    for call in &calls {
                        prop_assert!(!down.contains(&call.host.0));
                        prop_assert!(call.pairs.iter().all(|p| holders[usize::from(p.expert)].contains(&call.host.0)));
                        let shown: usize = call.work().iter().map(|work| work.rows.len()).sum();
                        prop_assert_eq!(shown, call.pairs.len());
                    }
                }
                Err(missing) => for expert in missing.experts.keys() {
                    prop_assert!(holders[usize::from(expert.index)].iter().all(|node| down.contains(node)));
                },
            }
        }
    }
}
