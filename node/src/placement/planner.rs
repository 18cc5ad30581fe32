//! The first planner: cover every expert, then replicate by popularity, within byte budgets, moving as little as possible.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use coel_store::{ExpertId, NodeId};

use super::Popularity;

/// How many replicas an expert gets where there is room: one to serve, one to outlive a death.
const REPLICAS_WANTED: usize = 2;

/// A node that may hold experts, with the bytes its budget leaves for them (trunk, KV cache and buffers already taken off).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The node.
    pub node: NodeId,
    /// Bytes of expert weights it may hold.
    pub expert_bytes_max: u64,
}

/// A placement that fits: for each expert the nodes that hold it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Every expert of the model; never empty sets.
    pub replicas: BTreeMap<ExpertId, BTreeSet<NodeId>>,
}

/// The budgets cannot hold every expert once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the budgets of {nodes} node(s) leave {available_bytes} bytes for experts, the model's experts need {needed_bytes}: \
     {missing_bytes} bytes are missing; raise --memory on a node or add a node"
)]
pub struct Shortfall {
    /// Nodes that were counted.
    pub nodes: usize,
    /// What all experts need, once each.
    pub needed_bytes: u64,
    /// What the budgets leave, in whole experts.
    pub available_bytes: u64,
    /// The difference.
    pub missing_bytes: u64,
    /// The best that can be done: a table in which some experts are held by nobody.
    pub partial: Plan,
}

/// Plans the placement of `experts` (with their bytes) on `candidates`, starting from `current` replicas.
///
/// # Errors
/// [`Shortfall`] when not every expert can be held once; its `partial` plan still fits the budgets.
pub fn plan(
    experts: &BTreeMap<ExpertId, u64>,
    candidates: &[Candidate],
    current: &BTreeMap<ExpertId, BTreeSet<NodeId>>,
    popularity: &Popularity,
) -> Result<Plan, Box<Shortfall>> {
    let mut table = Table::new(experts, candidates, current);
    let ranked = popularity.ranked(experts.keys().copied());

    // What is held stays: sole replicas first, then the hot ones, in case a budget shrank.
    for round in 0..REPLICAS_WANTED {
        for &expert in &ranked {
            let holders = current.get(&expert).into_iter().flatten().copied();
            let holders: Vec<_> = holders.filter(|&node| table.may_hold(expert, node)).collect();
            if table.count(expert) <= round
                && let Some(&node) = holders.first()
            {
                table.put(expert, node);
            }
        }
    }
    // One replica of each, the heaviest first so that the last gaps are filled by the lightest.
    let mut by_weight = ranked.clone();
    by_weight.sort_by_key(|expert| Reverse(experts[expert]));
    let uncovered: Vec<_> = by_weight.into_iter().filter(|&expert| table.count(expert) == 0).collect();
    let mut missing = Vec::new();
    for expert in uncovered {
        if !table.place(expert) && !table.evict_spare_for(expert, &ranked) {
            missing.push(expert);
        }
    }
    // Then a second one, the hot ones first; ranked by popularity, so the hot set comes before the rest.
    if missing.is_empty() {
        for &expert in &ranked {
            if table.count(expert) < REPLICAS_WANTED && !table.place(expert) {
                table.exchange_for(expert);
            }
        }
        return Ok(Plan { replicas: table.replicas });
    }
    let needed_bytes: u64 = experts.values().sum();
    let missing_bytes = missing.iter().map(|expert| experts[expert]).sum();
    Err(Box::new(Shortfall {
        nodes: candidates.len(),
        needed_bytes,
        available_bytes: needed_bytes - missing_bytes,
        missing_bytes,
        partial: Plan { replicas: table.replicas },
    }))
}

/// Replicas under construction, with the room left on each node.
struct Table<'a> {
    experts: &'a BTreeMap<ExpertId, u64>,
    room: BTreeMap<NodeId, u64>,
    budget: BTreeMap<NodeId, u64>,
    current: &'a BTreeMap<ExpertId, BTreeSet<NodeId>>,
    replicas: BTreeMap<ExpertId, BTreeSet<NodeId>>,
}

impl<'a> Table<'a> {
    fn new(
        experts: &'a BTreeMap<ExpertId, u64>,
        candidates: &[Candidate],
        current: &'a BTreeMap<ExpertId, BTreeSet<NodeId>>,
    ) -> Self {
        let room: BTreeMap<_, _> = candidates.iter().map(|c| (c.node, c.expert_bytes_max)).collect();
        Self { experts, budget: room.clone(), room, current, replicas: BTreeMap::new() }
    }

    fn count(&self, expert: ExpertId) -> usize {
        self.replicas.get(&expert).map_or(0, BTreeSet::len)
    }

    fn holds(&self, expert: ExpertId, node: NodeId) -> bool {
        self.replicas.get(&expert).is_some_and(|nodes| nodes.contains(&node))
    }

    /// Whether `node` is the only one that keeps the expert from before: everybody else would have to fetch it first.
    fn is_last_that_has_it(&self, expert: ExpertId, node: NodeId) -> bool {
        let Some(had) = self.current.get(&expert).filter(|had| had.contains(&node)) else { return false };
        self.replicas[&expert].iter().all(|&other| other == node || !had.contains(&other))
    }

    fn may_hold(&self, expert: ExpertId, node: NodeId) -> bool {
        !self.holds(expert, node) && self.room.get(&node).is_some_and(|&room| room >= self.experts[&expert])
    }

    fn put(&mut self, expert: ExpertId, node: NodeId) {
        self.replicas.entry(expert).or_default().insert(node);
        *self.room.get_mut(&node).expect("put only where may_hold") -= self.experts[&expert];
    }

    fn take(&mut self, expert: ExpertId, node: NodeId) {
        if let Some(nodes) = self.replicas.get_mut(&expert) {
            nodes.remove(&node);
            *self.room.get_mut(&node).expect("only candidates hold") += self.experts[&expert];
        }
    }

    /// Puts the expert on the emptiest node (by share of its budget) that has room and does not hold it.
    fn place(&mut self, expert: ExpertId) -> bool {
        let emptiest = self
            .room
            .iter()
            .filter(|&(&node, _)| self.may_hold(expert, node))
            .max_by_key(|&(&node, &room)| {
                let share = u128::from(room) * 1_000_000 / u128::from(self.budget[&node].max(1));
                (share, Reverse(node))
            })
            .map(|(&node, _)| node);
        emptiest.map(|node| self.put(expert, node)).is_some()
    }

    /// Makes room for an expert that nobody holds by giving up one spare replica of another, the least popular first.
    fn evict_spare_for(&mut self, expert: ExpertId, ranked: &[ExpertId]) -> bool {
        let bytes = self.experts[&expert];
        let spares = ranked.iter().rev().filter(|&&other| self.count(other) > 1);
        let spare = spares
            .flat_map(|&other| self.replicas[&other].iter().map(move |&node| (other, node)))
            .filter(|&(other, node)| !self.is_last_that_has_it(other, node))
            .find(|&(other, node)| self.room[&node] + self.experts[&other] >= bytes);
        spare
            .map(|(other, node)| {
                self.take(other, node);
                self.put(expert, node);
            })
            .is_some()
    }

    /// The nodes with room already hold this expert: hand one of them something from a full node, and take its place there.
    fn exchange_for(&mut self, expert: ExpertId) -> bool {
        let bytes = self.experts[&expert];
        let roomy: Vec<_> = self.room.keys().copied().filter(|&node| self.holds(expert, node)).collect();
        let full: Vec<_> = self.room.keys().copied().filter(|&node| !self.holds(expert, node)).collect();
        for &to in &roomy {
            for &from in &full {
                let other = self.replicas.iter().map(|(&other, _)| other).find(|&other| {
                    self.holds(other, from)
                        && !self.is_last_that_has_it(other, from)
                        && self.may_hold(other, to)
                        && self.room[&from] + self.experts[&other] >= bytes
                });
                if let Some(other) = other {
                    self.take(other, from);
                    self.put(other, to);
                    self.put(expert, from);
                    return true;
                }
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn experts(layers: u16, per_layer: u16) -> BTreeMap<ExpertId, u64> {
        let ids = (0..layers).flat_map(|layer| (0..per_layer).map(move |index| ExpertId { layer, index }));
        ids.map(|expert| (expert, MIB)).collect()
    }

    fn mesh(budgets: &[u64]) -> Vec<Candidate> {
        let numbered = budgets.iter().zip(1..);
        numbered.map(|(&mib, id)| Candidate { node: NodeId(id), expert_bytes_max: mib * MIB }).collect()
    }

    fn rising(layers: u16, per_layer: u16) -> Popularity {
        Popularity::new((0..layers).map(|_| (0..u32::from(per_layer)).collect()).collect())
    }

    fn held(plan: &Plan, node: u64) -> usize {
        plan.replicas.values().filter(|nodes| nodes.contains(&NodeId(node))).count()
    }

    #[test]
    fn three_budgets_of_seventy_percent_hold_everything_twice() {
        let plan = plan(&experts(6, 24), &mesh(&[100, 100, 100]), &BTreeMap::new(), &rising(6, 24)).unwrap();
        assert_eq!(plan.replicas.len(), 144);
        assert!(plan.replicas.values().all(|nodes| nodes.len() == 2));
        assert_eq!((held(&plan, 1), held(&plan, 2), held(&plan, 3)), (96, 96, 96));
    }

    #[test]
    fn a_third_node_completes_the_mesh_without_a_single_move() {
        let experts = experts(6, 24);
        let popularity = rising(6, 24);
        let two = plan(&experts, &mesh(&[100, 100]), &BTreeMap::new(), &popularity).unwrap();
        let three = plan(&experts, &mesh(&[100, 100, 100]), &two.replicas, &popularity).unwrap();
        for (expert, nodes) in &two.replicas {
            assert!(three.replicas[expert].is_superset(nodes), "{expert} moved");
        }
        assert!(three.replicas.values().all(|nodes| nodes.len() == 2));
    }

    #[test]
    fn budgets_of_half_cover_everything_and_double_the_hot() {
        let (experts, popularity) = (experts(6, 24), rising(6, 24));
        let plan = plan(&experts, &mesh(&[72, 72, 72]), &BTreeMap::new(), &popularity).unwrap();
        assert!(plan.replicas.values().all(|nodes| !nodes.is_empty()));
        let hot = popularity.hot(experts.keys().copied());
        assert!(!hot.is_empty());
        assert!(hot.iter().all(|expert| plan.replicas[expert].len() == 2));
        assert_eq!(plan.replicas.values().map(BTreeSet::len).sum::<usize>(), 216);
    }

    #[test]
    fn a_death_is_mended_with_what_is_left() {
        let (experts, popularity) = (experts(6, 24), rising(6, 24));
        let whole = plan(&experts, &mesh(&[100, 100, 100]), &BTreeMap::new(), &popularity).unwrap();
        let mended = plan(&experts, &mesh(&[100, 100]), &whole.replicas, &popularity).unwrap();
        assert_eq!(mended.replicas.len(), 144);
        assert_eq!(held(&mended, 1) + held(&mended, 2), 200);
    }

    #[test]
    fn a_shortfall_is_named_in_bytes() {
        let error = plan(&experts(6, 24), &mesh(&[40, 40, 40]), &BTreeMap::new(), &rising(6, 24)).unwrap_err();
        assert_eq!(error.missing_bytes, 24 * MIB);
        assert!(error.to_string().contains(&(24 * MIB).to_string()), "{error}");
    }

    #[test]
    fn spare_replicas_give_way_to_experts_nobody_holds() {
        let experts = experts(1, 4);
        let both = BTreeSet::from([NodeId(1), NodeId(2)]);
        let current = experts.keys().take(2).map(|&expert| (expert, both.clone())).collect();
        let plan = plan(&experts, &mesh(&[2, 2]), &current, &rising(1, 4)).unwrap();
        assert!(plan.replicas.values().all(|nodes| nodes.len() == 1));
        assert_eq!(plan.replicas.len(), 4);
    }

    proptest! {
        #[test]
        fn every_plan_fits_covers_and_keeps(
            budgets in proptest::collection::vec(0u64..40, 1..6),
            counts in proptest::collection::vec(0u32..100, 30),
            weights in proptest::collection::vec(1u64..3, 30),
            was in proptest::collection::vec((0u16..30, 1u64..8), 0..60),
        ) {
            let experts: BTreeMap<_, _> =
                weights.iter().zip(0..).map(|(&w, index)| (ExpertId { layer: 0, index }, w * MIB)).collect();
            let mut current = BTreeMap::<ExpertId, BTreeSet<NodeId>>::new();
            for (index, node) in was {
                current.entry(ExpertId { layer: 0, index }).or_default().insert(NodeId(node));
            }
            let mesh = mesh(&budgets);
            let popularity = Popularity::new(vec![counts]);
            let outcome = plan(&experts, &mesh, &current, &popularity);
            prop_assert_eq!(&outcome, &plan(&experts, &mesh, &current, &popularity));
            let table = match &outcome {
                Ok(plan) => {
                    prop_assert!(experts.keys().all(|expert| !plan.replicas[expert].is_empty()));
                    plan
                }
                Err(shortfall) => {
                    prop_assert!(shortfall.missing_bytes > 0);
                    &shortfall.partial
                }
            };
            for candidate in &mesh {
                let used: u64 = table.replicas.iter()
                    .filter(|(_, nodes)| nodes.contains(&candidate.node))
                    .map(|(expert, _)| experts[expert]).sum();
                prop_assert!(used <= candidate.expert_bytes_max);
            }
            prop_assert!(table.replicas.values().all(|nodes| nodes.len() <= REPLICAS_WANTED));
            // Where what is there fits, nobody loses the last copy that needs no download.
            let used = |node| -> u64 {
                current.iter().filter(|(_, nodes)| nodes.contains(&node)).map(|(expert, _)| experts[expert]).sum()
            };
            if mesh.iter().all(|candidate| used(candidate.node) <= candidate.expert_bytes_max) {
                for (expert, had) in &current {
                    let had: BTreeSet<_> = had.iter().filter(|node| mesh.iter().any(|c| c.node == **node)).collect();
                    let kept = table.replicas.get(expert).into_iter().flatten().any(|node| had.contains(node));
                    prop_assert!(had.is_empty() || kept, "{} was moved", expert);
                }
            }
        }
    }
}
