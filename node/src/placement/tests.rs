//! Plans for small meshes, and the invariants over random ones, also while a mesh is on its way from one plan to the next.

use std::collections::{BTreeMap, BTreeSet};

use coel_store::{Bounds, Epoch, ExpertId, Loss, ModelId, NodeId, Placement, Precision, Replica};
use proptest::prelude::*;

use super::*;
use crate::budget::SizeByPrecision;

/// An expert takes 16 exactly, 9 at Q8, 5 at Q4, as one of BF16 does.
const EXACT: u64 = 16;

fn choices(weight: u64) -> SizeByPrecision {
    SizeByPrecision::new([5, 9, EXACT].map(|bytes| Some(bytes * weight)))
}

fn experts(layers: u16, per_layer: u16) -> ExpertSizes {
    let ids = (0..layers).flat_map(|layer| (0..per_layer).map(move |index| ExpertId { layer, index }));
    ids.map(|expert| (expert, choices(1))).collect()
}

/// Nodes with room for so many exact experts.
fn mesh(budgets: &[u64]) -> Vec<Candidate> {
    mesh_of(&budgets.iter().map(|&budget| (budget * EXACT, Bounds::AUTO)).collect::<Vec<_>>())
}

fn mesh_of(nodes: &[(u64, Bounds)]) -> Vec<Candidate> {
    let numbered = nodes.iter().zip(1..);
    let node = |(&(expert_bytes_max, accepts), id)| Candidate {
        node: NodeId(id),
        expert_bytes_max,
        page_bytes_max: 0,
        accepts,
    };
    numbered.map(node).collect()
}

/// Nodes with memory, beside the exchange, and disk for so many experts at Q4; no disk is none.
fn mesh_with_disks(nodes: &[(u64, u64)]) -> Vec<Candidate> {
    let mut mesh = mesh_of(&nodes.iter().map(|&(memory, _)| (memory * 5 + 9, Bounds::AUTO)).collect::<Vec<_>>());
    for (candidate, (_, disk)) in mesh.iter_mut().zip(nodes) {
        candidate.page_bytes_max = disk * 5;
    }
    mesh
}

/// Expected misses: the popularity of what exceeds each node's memory, beside the exchange.
fn misses(plan: &Plan, experts: &ExpertSizes, nodes: &[Candidate], loss: &ExpectedLoss) -> u64 {
    if plan.paged_bytes.is_empty() {
        return 0;
    }
    let popularity = |expert: &ExpertId| u64::from(loss.popularity().of(*expert));
    let mut missed: BTreeMap<ExpertId, u64> = BTreeMap::new();
    for candidate in nodes {
        let given = plan.replicas.iter().filter_map(|(e, nodes)| Some((*e, *nodes.get(&candidate.node)?)));
        let mut given: Vec<_> = given.collect();
        given.sort_by_key(|(expert, _)| (std::cmp::Reverse(popularity(expert)), *expert));
        let mut memory = candidate.expert_bytes_max.saturating_sub(9);
        for (expert, precision) in given {
            let bytes = experts[&expert].bytes(precision).unwrap();
            let fits = bytes <= memory;
            memory -= if fits { bytes } else { 0 };
            // Of two replicas the one in memory is asked.
            let miss = if fits { 0 } else { popularity(&expert) };
            missed.entry(expert).and_modify(|missed| *missed = miss.min(*missed)).or_insert(miss);
        }
    }
    missed.values().sum()
}

fn rising(layers: u16, per_layer: u16) -> ExpectedLoss {
    let counts = (0..layers).map(|_| (0..u32::from(per_layer)).collect()).collect();
    ExpectedLoss::new(Popularity::new(counts), Vec::new())
}

/// The replicas of a plan, all ready as wanted or none.
fn replicas_of(plan: &Plan, ready: bool) -> Current {
    let replica = |precision: Precision| Replica { precision, ready: ready.then_some(precision) };
    let each = plan.replicas.iter();
    each.map(|(&expert, nodes)| (expert, nodes.iter().map(|(&node, &p)| (node, replica(p))).collect())).collect()
}

fn held(plan: &Plan, node: u64) -> usize {
    plan.replicas.values().filter(|nodes| nodes.contains_key(&NodeId(node))).count()
}

/// Replicas at Q4, Q8 and exact.
fn counts(plan: &Plan) -> [usize; 3] {
    let all = || plan.replicas.values().flat_map(BTreeMap::values);
    Precision::ALL.map(|precision| all().filter(|p| **p == precision).count())
}

fn used(plan: &Plan, experts: &ExpertSizes, node: NodeId) -> u64 {
    let each = plan.replicas.iter().filter_map(|(expert, nodes)| experts[expert].bytes(*nodes.get(&node)?));
    each.sum()
}

#[test]
fn three_budgets_of_seventy_percent_hold_everything_twice_and_exactly() {
    let plan = plan(&experts(6, 24), &mesh(&[100, 100, 100]), &Current::new(), &rising(6, 24)).unwrap();
    assert_eq!((plan.replicas.len(), counts(&plan)), (144, [0, 0, 288]));
    assert!(plan.replicas.values().all(|nodes| nodes.len() == 2));
    assert_eq!((held(&plan, 1), held(&plan, 2), held(&plan, 3)), (96, 96, 96));
}

#[test]
fn a_third_node_completes_the_mesh_without_a_single_move() {
    let (experts, loss) = (experts(6, 24), rising(6, 24));
    let two = plan(&experts, &mesh(&[100, 100]), &Current::new(), &loss).unwrap();
    let three = plan(&experts, &mesh(&[100, 100, 100]), &replicas_of(&two, true), &loss).unwrap();
    for (expert, nodes) in &two.replicas {
        assert!(nodes.iter().all(|(node, p)| three.replicas[expert].get(node) == Some(p)), "{expert} moved");
    }
    assert!(three.replicas.values().all(|nodes| nodes.len() == 2));
}

#[test]
fn budgets_of_half_cover_everything_and_double_the_hot() {
    let (experts, loss) = (experts(6, 24), rising(6, 24));
    let plan = plan(&experts, &mesh(&[72, 72, 72]), &Current::new(), &loss).unwrap();
    assert!(plan.replicas.values().all(|nodes| !nodes.is_empty()));
    let hot = loss.popularity().hot(experts.keys().copied());
    assert!(!hot.is_empty());
    assert!(hot.iter().all(|expert| plan.replicas[expert].len() == 2));
    assert_eq!(counts(&plan), [0, 0, 216], "what fits once exactly is exact");
}

#[test]
fn a_death_is_mended_with_what_is_left() {
    let (experts, loss) = (experts(6, 24), rising(6, 24));
    let whole = plan(&experts, &mesh(&[100, 100, 100]), &Current::new(), &loss).unwrap();
    let mended = plan(&experts, &mesh(&[100, 100]), &replicas_of(&whole, true), &loss).unwrap();
    assert_eq!((mended.replicas.len(), counts(&mended)), (144, [0, 0, 200]));
    // With one more gone it no longer fits exactly, and everything is still served.
    let last = plan(&experts, &mesh(&[100]), &replicas_of(&mended, true), &loss).unwrap();
    assert_eq!(held(&last, 1), 144);
    assert!(counts(&last)[1] > 0 && counts(&last)[2] > 0, "{:?}", counts(&last));
}

#[test]
fn a_shortfall_is_named_in_bytes() {
    let error = plan(&experts(6, 24), &mesh(&[10, 10, 10]), &Current::new(), &rising(6, 24)).unwrap_err();
    // Each node keeps room for an exchange (9), and the rest (151) holds 30 experts at Q4.
    assert_eq!((error.needed_bytes, error.missing_bytes), (144 * 5, (144 - 90) * 5));
    assert!(error.to_string().contains(&error.missing_bytes.to_string()), "{error}");
    let exact = mesh_of(&[(40 * EXACT, Bounds::only(Precision::Exact)); 3]);
    let error = plan(&experts(6, 24), &exact, &Current::new(), &rising(6, 24)).unwrap_err();
    assert_eq!(error.needed_bytes, 144 * EXACT, "of nodes that accept nothing else");
}

#[test]
fn disks_are_used_only_where_memories_do_not_suffice() {
    let (experts, loss) = (experts(6, 24), rising(6, 24));
    let enough = mesh_with_disks(&[(72, 200), (72, 200)]);
    let without = mesh_with_disks(&[(72, 0), (72, 0)]);
    let plan_of = |nodes: &[Candidate]| plan(&experts, nodes, &Current::new(), &loss);
    assert_eq!(plan_of(&enough), plan_of(&without));
    assert!(plan_of(&enough).unwrap().paged_bytes.is_empty());
    // One expert short: without a disk that is refused, and the remedy is named.
    let error = plan_of(&mesh_with_disks(&[(72, 0), (71, 0)])).unwrap_err().to_string();
    assert!(error.contains("5 bytes are missing") && error.contains("--disk"), "{error}");
    let short = plan_of(&mesh_with_disks(&[(72, 200), (71, 0)])).unwrap();
    assert_eq!(counts(&short), [144, 0, 0], "once each, at the least that is accepted");
    assert_eq!(short.paged_bytes, BTreeMap::new(), "the room of an exchange takes the last one");
    assert_eq!((held(&short, 1), held(&short, 2)), (73, 71));
}

#[test]
fn the_hottest_are_in_memory_and_the_coldest_are_shared_out() {
    let (experts, loss) = (experts(1, 100), rising(1, 100));
    // Memory for 60 of 100: the node without a disk gets hot ones only; the others page as their memories bear.
    let nodes = mesh_with_disks(&[(10, 0), (20, 100), (30, 100)]);
    let cold = plan(&experts, &nodes, &Current::new(), &loss).unwrap();
    assert_eq!(counts(&cold), [100, 0, 0]);
    assert_eq!([1, 2, 3].map(|node| held(&cold, node)), [10, 36, 54]);
    let hot = |expert: &ExpertId| expert.index >= 40;
    assert!(cold.replicas.iter().all(|(expert, nodes)| !nodes.contains_key(&NodeId(1)) || hot(expert)));
    assert_eq!(misses(&cold, &experts, &nodes, &loss), (0..40).sum::<u64>(), "the coldest forty");
    // 16 and 24 beyond memory, less the room of an exchange.
    assert_eq!(cold.paged_bytes, BTreeMap::from([(NodeId(2), 16 * 5 - 9), (NodeId(3), 24 * 5 - 9)]));
    let again = plan(&experts, &nodes, &replicas_of(&cold, true), &loss).unwrap();
    assert_eq!(again, cold, "and there it stays");
}

#[test]
fn a_node_that_joins_takes_its_share_of_what_is_paged_and_memory_ends_it() {
    let (experts, loss) = (experts(1, 100), rising(1, 100));
    let alone = plan(&experts, &mesh_with_disks(&[(30, 100)]), &Current::new(), &loss).unwrap();
    assert_eq!(alone.paged_bytes[&NodeId(1)], 70 * 5 - 9);
    let two = mesh_with_disks(&[(30, 100), (30, 100)]);
    let joined = plan(&experts, &two, &replicas_of(&alone, true), &loss).unwrap();
    assert_eq!([1, 2].map(|node| held(&joined, node)), [50, 50]);
    let mut hottest = (70..100).map(|index| ExpertId::new(0, index));
    assert!(hottest.all(|e| joined.replicas[&e].contains_key(&NodeId(1))), "what lay in memory has moved");
    assert_eq!(misses(&joined, &experts, &two, &loss), (0..40).sum::<u64>());
    // A third one with memory alone: paging ends, and nothing goes to a node that pages.
    let three = mesh_with_disks(&[(30, 100), (30, 100), (40, 0)]);
    let ended = plan(&experts, &three, &replicas_of(&joined, true), &loss).unwrap();
    assert!(ended.paged_bytes.is_empty());
    assert_eq!([1, 2, 3].map(|node| held(&ended, node)), [30, 30, 40]);
    for (expert, nodes) in &ended.replicas {
        let was = &joined.replicas[expert];
        assert!(nodes.keys().all(|node| *node == NodeId(3) || was.contains_key(node)), "{expert} moved");
    }
}

#[test]
fn a_death_is_mended_from_disk_without_moving_what_is_left() {
    let (experts, loss) = (experts(1, 100), rising(1, 100));
    let two = mesh_with_disks(&[(60, 100), (60, 0)]);
    let whole = plan(&experts, &two, &Current::new(), &loss).unwrap();
    assert!(whole.paged_bytes.is_empty());
    let mended = plan(&experts, &two[..1], &replicas_of(&whole, true), &loss).unwrap();
    assert_eq!(held(&mended, 1), 100);
    assert!(mended.paged_bytes.contains_key(&NodeId(1)));
    // Disks too small as well: as much as there is room for, and what is missing is said.
    let error = plan(&experts, &mesh_with_disks(&[(60, 90)]), &replicas_of(&whole, true), &loss).unwrap_err();
    assert_eq!((error.missing_bytes, error.available_bytes), (10 * 5, 90 * 5));
    assert_eq!(held(&error.partial, 1), 90);
}

#[test]
fn spare_replicas_give_way_to_experts_nobody_holds() {
    let experts = experts(1, 4);
    let both = |precision| [1, 2].map(|node| (NodeId(node), Replica { precision, ready: Some(precision) }));
    let current = experts.keys().take(2).map(|&expert| (expert, both(Precision::Exact).into())).collect();
    let plan = plan(&experts, &mesh(&[2, 2]), &current, &rising(1, 4)).unwrap();
    assert!(plan.replicas.values().all(|nodes| nodes.len() == 1));
    assert_eq!(counts(&plan), [0, 0, 4]);
}

#[test]
fn nodes_hold_only_what_they_accept() {
    let (experts, loss) = (experts(1, 4), rising(1, 4));
    let only = Bounds::only;
    // The exact node suffices; the other one holds spares in its own way.
    let nodes = mesh_of(&[(4 * EXACT, Bounds::AUTO), (4 * EXACT, only(Precision::Q8))]);
    let both = plan(&experts, &nodes, &Current::new(), &loss).unwrap();
    assert_eq!(counts(&both), [0, 4, 4]);
    assert!(both.replicas.values().all(|nodes| nodes[&NodeId(1)] == Precision::Exact));
    // A mesh that wants no more than Q8 has it twice, and not exactly although there is room.
    let nodes = mesh_of(&[(8 * EXACT, "..q8".parse().unwrap()), (8 * EXACT, "..q8".parse().unwrap())]);
    assert_eq!(counts(&plan(&experts, &nodes, &Current::new(), &loss).unwrap()), [0, 8, 0]);
    let exact_only = BTreeMap::from([(ExpertId::new(0, 0), SizeByPrecision::new([None, None, Some(16)]))]);
    assert!(plan(&exact_only, &mesh_of(&[(99, only(Precision::Q4))]), &Current::new(), &loss).is_err());
    assert!(plan(&exact_only, &mesh_of(&[(99, "q8..".parse().unwrap())]), &Current::new(), &loss).is_ok());
}

#[test]
fn an_upgrade_keeps_every_expert_where_it_is() {
    let (experts, loss) = (experts(2, 8), rising(2, 8));
    let accept = |bounds: &str| mesh_of(&[(8 * EXACT, bounds.parse().unwrap()), (8 * EXACT, bounds.parse().unwrap())]);
    let low = plan(&experts, &accept("q4"), &Current::new(), &loss).unwrap();
    assert_eq!(counts(&low), [32, 0, 0]);
    let raised = plan(&experts, &accept("q8"), &replicas_of(&low, true), &loss).unwrap();
    let places = |plan: &Plan| {
        let each = plan.replicas.iter();
        each.map(|(expert, nodes)| (*expert, nodes.keys().copied().collect::<BTreeSet<_>>())).collect::<Vec<_>>()
    };
    // At Q8 two of each no longer fit; but nothing lies where it did not before.
    for ((_, before), (expert, after)) in places(&low).iter().zip(places(&raised)) {
        assert!(after.is_subset(before) && !after.is_empty(), "{expert} moved");
    }
    assert_eq!((counts(&raised)[0], counts(&raised)[2]), (0, 0));
}

#[test]
fn a_node_with_room_takes_over_what_others_hold_badly() {
    let (experts, loss) = (experts(1, 16), rising(1, 16));
    let alone = plan(&experts, &mesh(&[7]), &Current::new(), &loss).unwrap();
    let joined = plan(&experts, &mesh(&[7, 8]), &replicas_of(&alone, true), &loss).unwrap();
    assert!(loss.of_plan(&joined) < loss.of_plan(&alone) / 4.0);
    assert!(held(&joined, 1) < 16 && held(&joined, 2) > 0);
    let again = plan(&experts, &mesh(&[7, 8]), &replicas_of(&joined, true), &loss).unwrap();
    assert_eq!(again, joined, "and then it stays so");
}

#[test]
fn it_matters_little_in_which_order_nodes_come() {
    let (experts, loss) = (experts(6, 24), rising(6, 24));
    // Room for 0.55 of the experts as they are on the first, 0.5 on the second; then in other proportions, and a third.
    for budgets in [&[80, 72][..], &[72, 80], &[60, 30], &[50, 90], &[60, 40, 30]] {
        let nodes = mesh(budgets);
        let at_once = loss.of_plan(&plan(&experts, &nodes, &Current::new(), &loss).unwrap());
        let mut current = Current::new();
        for count in 1..=nodes.len() {
            let arrived = plan(&experts, &nodes[..count], &current, &loss).unwrap();
            let again = plan(&experts, &nodes[..count], &replicas_of(&arrived, true), &loss).unwrap();
            assert_eq!(again, arrived, "{budgets:?}: and there it stays");
            current = replicas_of(&arrived, true);
            let loss = loss.of_plan(&arrived);
            assert!(count < nodes.len() || loss <= at_once * 1.1, "{budgets:?}: {loss} and not {at_once}");
        }
    }
}

/// Popularity falls steeply; what is popular is robust, as shared habits are, and a few rare experts are not.
fn skewed() -> (ExpertSizes, ExpectedLoss, ExpectedLoss) {
    let experts = experts(1, 32);
    let counts: Vec<u32> = (0..32).map(|index| 4000 / (index + 1)).collect();
    let q4 = |index: u16| if index.is_multiple_of(5) { 0.002 } else { 0.0002 * f32::from(index + 1) };
    let losses = (0..32).map(|index| Loss { q4: q4(index), q8: q4(index) / 200.0 }).collect();
    let measured = ExpectedLoss::new(Popularity::new(vec![counts.clone()]), vec![losses]);
    (experts, measured, ExpectedLoss::new(Popularity::new(vec![counts]), Vec::new()))
}

#[test]
fn mixed_precision_beats_uniform_and_popularity_alone_at_equal_bytes() {
    let (experts, loss, popularity_alone) = skewed();
    let uniform = |precision: Precision| -> f64 { experts.keys().map(|&expert| loss.of(expert, precision)).sum() };
    // Beside the exchange there is room for 6 bits a weight, where uniform is Q4; and for 11, where it is Q8.
    for (budget, uniform_at) in [(32 * 6 + 9, Precision::Q4), (32 * 11 + 9, Precision::Q8)] {
        let node = mesh_of(&[(budget, Bounds::AUTO)]);
        let mixed = plan(&experts, &node, &Current::new(), &loss).unwrap();
        let popular = plan(&experts, &node, &Current::new(), &popularity_alone).unwrap();
        let [mixed, popular] = [mixed, popular].map(|plan| loss.of_plan(&plan));
        assert!(mixed < popular && mixed < uniform(uniform_at), "{budget}: {mixed} {popular}");
    }
}

fn any_bounds() -> impl Strategy<Value = Bounds> {
    prop::sample::select(vec!["auto", "auto", "auto", "q4", "..q8", "q8..", "exact"])
        .prop_map(|text| text.parse().unwrap())
}

/// Bytes that a node may be given, in memory or by turns.
fn capacity(candidate: &Candidate) -> u64 {
    candidate.expert_bytes_max.max(candidate.page_bytes_max)
}

/// A mesh in the middle of something: a model, nodes, and replicas of which some are ready as they may be.
#[derive(Debug, Clone)]
struct World {
    experts: ExpertSizes,
    nodes: Vec<Candidate>,
    current: Current,
    loss: ExpectedLoss,
}

prop_compose! {
    fn worlds(equal: bool)(
        count in 1usize..24,
        nodes in prop::collection::vec((0u64..400, any_bounds()), 1..5),
        disks in prop::collection::vec(prop_oneof![Just(0u64), 0u64..600], 4),
        popularity in prop::collection::vec(0u32..100, 24),
        losses in prop::collection::vec((0.0f32..1.0, 0.0f32..0.1), 24),
        measured: bool,
        weights in prop::collection::vec(1u64..3, 24),
        replicas in prop::collection::vec((0u16..24, 1u64..6, 0usize..3, 0usize..4), 0..40),
    ) -> World {
        let weight = |index: u16| if equal { 1 } else { weights[usize::from(index)] };
        let experts = (0..count as u16).map(|index| (ExpertId::new(0, index), choices(weight(index)))).collect();
        let mut nodes = mesh_of(&nodes);
        for (node, disk) in nodes.iter_mut().zip(disks) {
            node.page_bytes_max = disk;
        }
        let losses = losses.into_iter().map(|(q4, q8)| Loss { q4, q8 }).collect();
        let sensitivity = if measured { vec![losses] } else { Vec::new() };
        let loss = ExpectedLoss::new(Popularity::new(vec![popularity]), sensitivity);
        let mut world = World { experts, nodes, current: Current::new(), loss };
        for (index, node, wanted, ready) in replicas {
            let (expert, precision) = (ExpertId::new(0, index), Precision::ALL[wanted]);
            if !world.experts.contains_key(&expert) {
                continue;
            }
            let ready = Precision::ALL.get(ready).copied();
            // What is ready is in its node's memory, or on its disk, so it fits.
            let fits = ready.is_none_or(|ready| world.serves(NodeId(node)) + world.bytes(expert, ready) <= world.budget(NodeId(node)));
            if fits {
                world.current.entry(expert).or_default().entry(NodeId(node)).or_insert(Replica { precision, ready });
            }
        }
        world
    }
}

impl World {
    fn bytes(&self, expert: ExpertId, precision: Precision) -> u64 {
        self.experts[&expert].bytes(precision).unwrap()
    }

    fn budget(&self, node: NodeId) -> u64 {
        self.nodes.iter().find(|c| c.node == node).map_or(0, capacity)
    }

    /// Bytes that are ready on a node.
    fn serves(&self, node: NodeId) -> u64 {
        let ready = self.current.iter().filter_map(|(&expert, nodes)| Some((expert, nodes.get(&node)?.ready?)));
        ready.map(|(expert, precision)| self.bytes(expert, precision)).sum()
    }

    fn plan(&self) -> Result<Plan, Box<Shortfall>> {
        plan(&self.experts, &self.nodes, &self.current, &self.loss)
    }

    fn placement(&self) -> Placement {
        let replicas = self.experts.keys().map(|e| (*e, self.current.get(e).cloned().unwrap_or_default())).collect();
        Placement { epoch: Epoch(1), model: ModelId([0; 32]), replicas, trunk_ready: BTreeSet::new() }
    }

    /// ExpertSizes that a node which is there serves now.
    fn live(&self) -> BTreeSet<ExpertId> {
        let there = |node: &NodeId| self.nodes.iter().any(|c| c.node == *node);
        let served = |nodes: &BTreeMap<NodeId, Replica>| nodes.iter().any(|(node, r)| there(node) && r.ready.is_some());
        self.current.iter().filter(|(_, nodes)| served(nodes)).map(|(expert, _)| *expert).collect()
    }

    /// As the log would, given what may be proposed now; nodes drop what is no longer theirs. Whether anything changed.
    fn place(&mut self, plan: Plan) -> bool {
        let placed = self.placement();
        let next = next_safe_step(plan, &placed, &self.nodes, &BTreeSet::new(), &self.experts);
        let ready = |expert: &ExpertId, node: &NodeId| placed.replicas[expert].get(node).and_then(|r| r.ready);
        let now: Current = next
            .replicas
            .iter()
            .map(|(&e, nodes)| {
                (e, nodes.iter().map(|(&n, &p)| (n, Replica { precision: p, ready: ready(&e, &n) })).collect())
            })
            .collect();
        let changed = now != placed.replicas;
        self.current = now;
        changed
    }
}

fn check(world: &World, plan: &Plan) {
    for candidate in &world.nodes {
        let used = used(plan, &world.experts, candidate.node);
        assert!(used <= capacity(candidate), "{} is over", candidate.node);
        let paged = plan.paged_bytes.get(&candidate.node).copied().unwrap_or(0);
        assert_eq!(paged, used.saturating_sub(candidate.expert_bytes_max), "{} pages something else", candidate.node);
    }
    for (expert, nodes) in &plan.replicas {
        assert!(nodes.len() <= 2, "{expert} is held more than twice");
        for (node, precision) in nodes {
            let accepts = world.nodes.iter().find(|c| c.node == *node).expect("placed on a node that is there").accepts;
            assert!(accepts.has(*precision), "{node} does not accept {precision}");
        }
    }
}

proptest! {
    #[test]
    fn every_plan_fits_and_covers(world in worlds(false)) {
        let outcome = world.plan();
        prop_assert_eq!(&outcome, &world.plan());
        match &outcome {
            Ok(plan) => {
                check(&world, plan);
                prop_assert!(world.experts.keys().all(|expert| !plan.replicas[expert].is_empty()));
            }
            Err(shortfall) => {
                check(&world, &shortfall.partial);
                prop_assert!(shortfall.missing_bytes > 0);
            }
        }
    }

    #[test]
    fn everything_is_covered_if_that_can_be(mut world in worlds(true)) {
        // Of experts that are alike, a node holds a number that its budget alone decides.
        world.current.clear();
        let room = |c: &Candidate, bytes: u64| c.expert_bytes_max.saturating_sub(bytes);
        let least = |c: &Candidate| world.bytes(ExpertId::new(0, 0), c.accepts.lowest());
        let mixed: u64 = world.nodes.iter().map(|c| room(c, 9) / least(c)).sum();
        let paged: u64 = world.nodes.iter().map(|c| room(c, 9).max(c.page_bytes_max) / least(c)).sum();
        let exact: u64 = world.nodes.iter().filter(|c| c.accepts.has(Precision::Exact)).map(|c| c.expert_bytes_max / EXACT).sum();
        let plan = world.plan();
        let count = world.experts.len() as u64;
        prop_assert_eq!(plan.is_ok(), paged >= count || exact >= count, "{:?}", plan);
        if let Ok(plan) = plan {
            prop_assert!(plan.paged_bytes.is_empty() || mixed < count, "it pages without need: {plan:?}");
            let once = plan.replicas.values().all(|nodes| nodes.len() == 1);
            prop_assert!(mixed >= count || exact >= count || once || paged > mixed);
            let lossless = counts(&plan)[2] as u64 >= count && world.loss.of_plan(&plan) == 0.0;
            prop_assert!(lossless || exact < count || world.nodes.iter().any(|c| !c.accepts.has(Precision::Exact)));
        }
    }

    #[test]
    fn more_disk_is_never_worse(mut world in worlds(true), more in 0u64..300, node in any::<prop::sample::Index>()) {
        world.current.clear();
        // Of nodes that accept the same, so that an expert takes the same room everywhere.
        world.nodes.iter_mut().for_each(|node| node.accepts = Bounds::AUTO);
        let misses = |world: &World, plan: &Plan| misses(plan, &world.experts, &world.nodes, &world.loss);
        let small = world.plan();
        let node = node.index(world.nodes.len());
        let mut large = world.clone();
        large.nodes[node].page_bytes_max += more;
        match (small, large.plan()) {
            (Ok(small), Ok(grown)) => prop_assert!(misses(&large, &grown) <= misses(&world, &small)),
            (Ok(small), Err(_)) => prop_assert!(false, "it was covered by {small:?}"),
            (Err(small), Err(grown)) => prop_assert!(grown.missing_bytes <= small.missing_bytes),
            (Err(_), Ok(_)) => {}
        }
    }

    #[test]
    fn what_is_paged_is_the_coldest(mut world in worlds(true)) {
        world.current.clear();
        world.nodes.iter_mut().for_each(|node| node.accepts = Bounds::AUTO);
        let Ok(plan) = world.plan() else { return Ok(()) };
        if plan.paged_bytes.is_empty() {
            return Ok(());
        }
        let in_memory: u64 = world.nodes.iter().map(|c| c.expert_bytes_max.saturating_sub(9) / 5).sum();
        let mut popularity: Vec<_> = world.experts.keys().map(|&e| u64::from(world.loss.popularity().of(e))).collect();
        popularity.sort_unstable();
        let coldest = popularity.len().saturating_sub(in_memory as usize);
        let least: u64 = popularity[..coldest].iter().sum();
        prop_assert!(misses(&plan, &world.experts, &world.nodes, &world.loss) <= least);
        // No memory is overrun while another could take an expert more, and none much more than another.
        let overrun = |c: &Candidate| used(&plan, &world.experts, c.node) as f64 / c.expert_bytes_max.saturating_sub(9).max(1) as f64;
        for one in world.nodes.iter().filter(|c| plan.paged_bytes.contains_key(&c.node)) {
            let cap = |c: &Candidate| c.expert_bytes_max.saturating_sub(9).max(c.page_bytes_max);
            for other in world.nodes.iter().filter(|c| cap(c) >= used(&plan, &world.experts, c.node) + 5) {
                let expert = 5.0 / other.expert_bytes_max.saturating_sub(9).max(1) as f64;
                prop_assert!(overrun(one) <= 1.0 || overrun(one) <= overrun(other) + expert + 1e-5, "{one:?} {other:?} {plan:?}");
            }
        }
    }

    #[test]
    fn a_larger_node_is_never_worse(mut world in worlds(false), more in 0u64..200) {
        world.nodes.truncate(1);
        world.current.clear();
        let small = world.plan();
        world.nodes[0].expert_bytes_max += more;
        if let Ok(small) = small {
            let large = world.plan().unwrap();
            prop_assert!(world.loss.of_plan(&large) <= world.loss.of_plan(&small) * (1.0 + 1e-12));
        }
    }

    #[test]
    fn more_room_for_the_same_replicas_is_never_worse(mut world in worlds(false), more in 0u64..200, node in any::<prop::sample::Index>()) {
        world.nodes.iter_mut().for_each(|node| node.page_bytes_max = 0);
        let hosts: BTreeSet<_> = match world.plan() {
            Ok(plan) => plan.replicas.iter().flat_map(|(&e, nodes)| nodes.keys().map(move |&n| (e, n))).collect(),
            Err(_) => return Ok(()),
        };
        let raised = |nodes: &[Candidate]| {
            let mut table = table::Table::new(&world.experts, nodes, &world.current);
            for &(expert, node) in &hosts {
                if table.may_hold_floor(expert, node) {
                    table.put_floor(expert, node);
                }
            }
            upgrade::upgrade(&mut table, &world.loss);
            table.into_plan()
        };
        let small = raised(&world.nodes);
        let mut nodes = world.nodes.clone();
        nodes[node.index(world.nodes.len())].expert_bytes_max += more;
        let large = raised(&nodes);
        prop_assert!(world.loss.of_plan(&large) <= world.loss.of_plan(&small) * (1.0 + 1e-12));
    }

    #[test]
    fn nothing_live_is_taken_away_on_the_way_and_the_way_ends(
        mut world in worlds(false),
        order in prop::collection::vec(any::<prop::sample::Index>(), 400),
    ) {
        let live = world.live();
        let mut order = order.into_iter();
        let mut quiet = 0;
        while quiet < 2 {
            let plan = match world.plan() {
                Ok(plan) => plan,
                Err(shortfall) => shortfall.partial,
            };
            quiet = if world.place(plan) { 0 } else { quiet + 1 };
            prop_assert!(world.live().is_superset(&live), "{:?} are lost", live.difference(&world.live()));
            for candidate in &world.nodes {
                let wanted: u64 = world.current.iter()
                    .filter_map(|(&e, nodes)| Some(world.bytes(e, nodes.get(&candidate.node)?.precision))).sum();
                prop_assert!(wanted <= capacity(candidate), "{} is asked for too much", candidate.node);
            }
            // Nodes get there in any order.
            let mut open: Vec<_> = world.current.values_mut().flat_map(BTreeMap::values_mut).filter(|r| !r.is_settled()).collect();
            let Some(next) = order.next() else { panic!("it does not come to rest: {world:?}") };
            if !open.is_empty() {
                let next = next.index(open.len());
                open[next].ready = Some(open[next].precision);
                quiet = 0;
            }
        }
    }
}

fn check_safe_step(held: &[(u64, Option<Precision>)], planned: &[u64], expected: &[u64]) {
    let expert = ExpertId::new(0, 0);
    let replica =
        |&(node, ready): &(u64, Option<Precision>)| (NodeId(node), Replica { precision: Precision::Exact, ready });
    let placed = Placement {
        epoch: Epoch(1),
        model: ModelId([0; 32]),
        replicas: BTreeMap::from([(expert, held.iter().map(replica).collect())]),
        trunk_ready: BTreeSet::new(),
    };
    let nodes = planned.iter().map(|&node| (NodeId(node), Precision::Exact)).collect();
    let plan = Plan { replicas: BTreeMap::from([(expert, nodes)]), ..Plan::default() };
    let leaving = BTreeSet::from([NodeId(9)]);
    let plan = next_safe_step(plan, &placed, &mesh(&[1, 1, 1]), &leaving, &experts(1, 1));
    let found: Vec<_> = plan.replicas[&expert].keys().map(|node| node.0).collect();
    assert_eq!(found, expected, "{held:?} {planned:?}");
}

#[test]
fn the_last_ready_replica_stays_until_another_is_ready() {
    let (ready, q4) = (Some(Precision::Exact), Some(Precision::Q4));
    check_safe_step(&[(9, ready)], &[1], &[1, 9]);
    check_safe_step(&[(9, ready), (1, None)], &[1], &[1, 9]);
    check_safe_step(&[(9, ready), (1, q4)], &[1], &[1]);
    check_safe_step(&[(9, ready), (2, ready)], &[1], &[1, 2, 9]);
    check_safe_step(&[(9, None)], &[1], &[1, 9]);
    check_safe_step(&[(2, q4)], &[1], &[1, 2]);
    check_safe_step(&[(2, ready), (3, q4)], &[3], &[3]);
    check_safe_step(&[(2, q4), (3, ready)], &[1], &[1, 3]);
}
