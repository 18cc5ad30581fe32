//! Residency against a driver that keeps its own books: rules of eviction one by one, then properties of any history.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn id(index: u16) -> ExpertId {
    ExpertId { layer: index / 100, index: index % 100 }
}

/// A disk and a memory, as the residency believes them to be.
struct World {
    residency: Residency,
    sizes: BTreeMap<ExpertId, u64>,
    memory: BTreeSet<ExpertId>,
    /// Under way, with the bytes they have taken.
    loads: BTreeMap<LoadId, (ExpertId, u64)>,
    /// What each claim needs still.
    needs: BTreeMap<ClaimId, BTreeSet<ExpertId>>,
    reads: Vec<(ExpertId, bool)>,
    budget: u64,
}

impl World {
    fn new(budget: u64, experts: impl IntoIterator<Item = (u16, u64)>) -> Self {
        let mut world = Self {
            residency: Residency::new(budget),
            sizes: BTreeMap::new(),
            memory: BTreeSet::new(),
            loads: BTreeMap::new(),
            needs: BTreeMap::new(),
            reads: Vec::new(),
            budget,
        };
        for (index, bytes) in experts {
            world.add(id(index), bytes);
        }
        world
    }

    fn add(&mut self, id: ExpertId, bytes: u64) {
        assert!(self.residency.add(id, bytes));
        self.obey();
        self.sizes.insert(id, bytes);
    }

    /// Carries out what is decided, and checks that it may be.
    fn obey(&mut self) {
        for effect in self.residency.effects() {
            match effect {
                Effect::Evict(id) => assert!(self.memory.remove(&id), "{id} was not in memory"),
                Effect::Read { id, load, urgent } => {
                    assert!(!self.memory.contains(&id), "{id} is in memory");
                    let mut under_way = self.loads.values().filter(|(other, _)| *other == id);
                    assert!(under_way.next().is_none() || self.removed_once(id), "{id} is on its way");
                    assert!(self.loads.insert(load, (id, self.sizes[&id])).is_none());
                    self.reads.push((id, urgent));
                }
                Effect::Hurry(load) | Effect::Abandon(load) => assert!(self.loads.contains_key(&load)),
            }
            // Memory grows by reads alone; a budget that was made smaller takes its time.
            let loading: u64 = self.loads.values().map(|(_, bytes)| bytes).sum();
            let held: u64 = self.memory.iter().map(|id| self.sizes[id]).sum();
            let grows = matches!(effect, Effect::Read { .. });
            assert!(!grows || held + loading <= self.budget, "{held} in memory and {loading} on their way");
        }
    }

    /// An expert that was replaced may be on its way twice.
    fn removed_once(&self, id: ExpertId) -> bool {
        self.loads.values().any(|(other, _)| *other == id)
    }

    fn need(&mut self, claim: u64, ids: &[u16]) {
        let (claim, ids) = (ClaimId(claim), ids.iter().map(|index| id(*index)).collect::<Vec<_>>());
        self.needs.entry(claim).or_default().extend(ids.iter().filter(|id| self.sizes.contains_key(id)));
        self.residency.need(claim, ids);
        self.obey();
    }

    fn prefetch(&mut self, claim: u64, ids: &[u16]) {
        self.residency.prefetch(ClaimId(claim), ids.iter().map(|index| id(*index)));
        self.obey();
    }

    /// The oldest load comes back whole.
    fn arrive(&mut self) -> bool {
        let Some((&load, &(id, _))) = self.loads.first_key_value() else { return false };
        self.loads.remove(&load);
        match self.residency.arrived(load) {
            Arrival::Kept(kept) => {
                assert_eq!(kept, id);
                self.memory.insert(id);
            }
            Arrival::Discarded => {}
        }
        self.obey();
        true
    }

    fn fail(&mut self) {
        let Some((&load, &(id, _))) = self.loads.first_key_value() else { return };
        self.loads.remove(&load);
        for loser in self.residency.came_back(load, true) {
            assert!(self.needs.get_mut(&loser).is_some_and(|needs| needs.remove(&id)), "{id} was needed by it");
        }
        self.obey();
    }

    /// Claims compute what they can; how many experts.
    fn compute(&mut self) -> usize {
        let mut done = 0;
        for claim in self.needs.keys().copied().collect::<Vec<_>>() {
            for id in self.residency.ready(claim) {
                // What failed for this claim may have come for another.
                let was_needed = self.needs.get_mut(&claim).is_some_and(|needs| needs.remove(&id));
                assert!(!was_needed || self.memory.contains(&id), "{id} is not there");
                self.residency.computed(claim, id, 1.0);
                self.obey();
                done += 1;
            }
        }
        done
    }

    fn release(&mut self, claim: u64) {
        self.needs.remove(&ClaimId(claim));
        self.residency.release(ClaimId(claim));
        self.obey();
    }

    /// What is needed is computed, however long it takes.
    fn come_to_rest(&mut self) {
        for _ in 0..100_000 {
            if self.compute() == 0 && !self.arrive() {
                break;
            }
        }
        let left: Vec<_> = self.needs.values().flatten().collect();
        assert!(left.is_empty(), "{left:?} never came");
    }

    fn use_once(&mut self, ids: &[u16]) {
        self.residency.tick();
        self.need(1, ids);
        self.come_to_rest();
    }

    fn in_memory(&self) -> Vec<u16> {
        self.memory.iter().map(|id| id.layer * 100 + id.index).collect()
    }
}

#[test]
fn the_coldest_goes_first() {
    let mut world = World::new(30, (0..5).map(|index| (index, 10)));
    for ids in [[0, 1, 2], [0, 1, 2], [0, 2, 2]] {
        world.use_once(&ids);
    }
    world.use_once(&[3]);
    assert_eq!(world.in_memory(), [0, 2, 3], "1 was used least");
    // Heat fades: what was used often long ago gives way to what is used now.
    for _ in 0..400 {
        world.use_once(&[3]);
    }
    world.use_once(&[4]);
    world.use_once(&[4]);
    world.use_once(&[1]);
    assert_eq!(world.in_memory(), [1, 3, 4]);
    let counts = world.residency.counts();
    assert_eq!((counts.misses, counts.hits), (3 + 1 + 1 + 1, 3 + 2 + 400 + 1));
}

#[test]
fn a_long_pass_leaves_the_hot_ones_and_uses_the_rest_by_turns() {
    let mut world = World::new(120, (0..30).map(|index| (index, 10)));
    for _ in 0..3 {
        world.use_once(&[7, 8, 9]);
    }
    let reads = world.reads.len();
    let all: Vec<u16> = (0..30).collect();
    world.residency.tick();
    world.need(2, &all);
    // A prompt's rows: each expert gets few of them.
    for _ in 0..1000 {
        for id in world.residency.ready(ClaimId(2)) {
            world.needs.get_mut(&ClaimId(2)).unwrap().remove(&id);
            world.residency.computed(ClaimId(2), id, 0.05);
            world.obey();
        }
        if !world.arrive() {
            break;
        }
    }
    assert!(world.needs[&ClaimId(2)].is_empty());
    assert_eq!(world.reads.len() - reads, 27, "each is read once, the hot ones not at all");
    assert!([7, 8, 9].iter().all(|hot| world.in_memory().contains(hot)), "{:?}", world.in_memory());
}

#[test]
fn what_is_read_ahead_takes_the_place_of_what_is_colder_and_of_nothing_needed() {
    let mut world = World::new(30, (0..9).map(|index| (index, 10)));
    for _ in 0..5 {
        world.use_once(&[0, 1]);
    }
    world.use_once(&[2]);
    for _ in 0..400 {
        world.use_once(&[0]);
    }
    world.prefetch(1, &[3, 4]);
    assert_eq!(world.reads.last(), Some(&(id(4), false)), "1 and 2 are colder");
    assert!(world.arrive() && world.arrive());
    world.prefetch(1, &[3, 4, 5]);
    assert_eq!(world.in_memory(), [0, 3, 4], "neither 0, nor what is foreseen itself, goes for 5");
    world.need(1, &[3, 6]);
    assert_eq!((world.residency.counts().ahead, world.residency.counts().ahead_used), (2, 1));
    assert_eq!(world.in_memory(), [0, 3], "4 was wrong, and goes first");
}

#[test]
fn what_is_not_foreseen_any_more_is_given_up_and_what_is_needed_moves_up() {
    let mut world = World::new(100, (0..9).map(|index| (index, 10)));
    world.prefetch(1, &[3, 4]);
    let load = |index: u64| LoadId(index);
    world.residency.need(ClaimId(1), [id(4), id(5)]);
    let effects = world.residency.effects();
    let read = Effect::Read { id: id(5), load: load(2), urgent: true };
    assert_eq!(effects, [Effect::Hurry(load(1)), Effect::Abandon(load(0)), read]);
    // Given up, then needed: it is read anew once it has come back.
    world.loads.insert(load(2), (id(5), 10));
    world.residency.need(ClaimId(2), [id(3)]);
    assert!(world.residency.effects().is_empty());
    world.loads.remove(&load(0));
    assert!(world.residency.came_back(load(0), false).is_empty());
    assert_eq!(world.residency.effects(), [Effect::Read { id: id(3), load: load(3), urgent: true }]);
}

#[test]
fn two_claims_that_need_more_than_fits_both_get_it() {
    let mut world = World::new(20, (0..16).map(|index| (index, 10)));
    world.need(1, &[0, 1, 2, 3, 4, 5, 6, 7]);
    world.need(2, &[8, 9, 10, 11, 4, 5, 6, 7]);
    world.come_to_rest();
    assert!(world.reads.len() <= 16, "{} reads: nothing was read in vain", world.reads.len());
}

#[test]
fn a_failure_is_told_to_those_who_need_it_and_tried_again_by_the_next() {
    let mut world = World::new(30, (0..3).map(|index| (index, 10)));
    world.need(1, &[0, 1]);
    world.need(2, &[1]);
    world.arrive();
    let load = *world.loads.first_key_value().unwrap().0;
    world.loads.remove(&load);
    assert_eq!(world.residency.came_back(load, true), [ClaimId(1), ClaimId(2)]);
    assert_eq!(world.residency.ready(ClaimId(1)), [id(0), id(1)], "what failed is not waited for");
    world.obey();
    assert!(world.loads.is_empty(), "nor read again for nobody");
    world.needs.clear();
    world.release(1);
    world.release(2);
    world.need(3, &[1]);
    world.come_to_rest();
    assert_eq!(world.in_memory(), [0, 1]);
}

#[test]
fn one_that_is_dropped_or_replaced_leaves_nobody_waiting() {
    let mut world = World::new(40, (0..3).map(|index| (index, 10)));
    world.need(1, &[0, 1]);
    world.residency.remove(id(0));
    world.obey();
    world.sizes.remove(&id(0)).unwrap();
    world.needs.get_mut(&ClaimId(1)).unwrap().remove(&id(0));
    assert_eq!(world.residency.ready(ClaimId(1)), [id(0)], "gone, which its claim must know");
    world.sizes.insert(id(0), 10);
    world.add(id(1), 20);
    world.come_to_rest();
    assert!(world.memory.contains(&id(1)));
    assert_eq!(world.residency.used, 20);
    assert!(!world.residency.add(id(2), 41), "it could never fit");
}

#[derive(Clone, Debug)]
enum Move {
    Need(u64, Vec<u16>),
    Foresee(u64, Vec<u16>),
    Arrive,
    Fail,
    Compute,
    Release(u64),
    Replace(u16, u64),
    Budget(u64),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let ids = || prop::collection::vec(0u16..24, 1..10);
    let step = prop_oneof![
        3 => (0u64..3, ids()).prop_map(|(claim, ids)| Move::Need(claim, ids)),
        3 => (0u64..3, ids()).prop_map(|(claim, ids)| Move::Foresee(claim, ids)),
        6 => Just(Move::Arrive),
        1 => Just(Move::Fail),
        6 => Just(Move::Compute),
        1 => (0u64..3).prop_map(Move::Release),
        1 => (0u16..24, 1u64..6).prop_map(|(index, bytes)| Move::Replace(index, bytes)),
        1 => (6u64..40).prop_map(Move::Budget),
    ];
    prop::collection::vec(step, 1..150)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// The books never exceed the budget, nothing needed is evicted (it would never come), and all that is needed comes.
    #[test]
    fn any_history_keeps_the_budget_and_ends_with_everything_computed(budget in 6u64..40, moves in moves()) {
        let mut world = World::new(budget, (0..24).map(|index| (index, 1 + u64::from(index) % 5)));
        for step in moves {
            match step {
                Move::Need(claim, ids) => {
                    world.residency.tick();
                    world.need(claim, &ids);
                }
                Move::Foresee(claim, ids) => world.prefetch(claim, &ids),
                Move::Arrive => _ = world.arrive(),
                Move::Fail => world.fail(),
                Move::Compute => _ = world.compute(),
                Move::Release(claim) => world.release(claim),
                Move::Budget(budget) => {
                    world.budget = budget;
                    world.residency.set_budget(budget);
                    world.obey();
                }
                Move::Replace(index, bytes) => {
                    let id = id(index);
                    // Its old loads keep what they took until they come back.
                    prop_assert!(world.residency.add(id, bytes));
                    let replaced = world.residency.effects();
                    let (evictions, others): (Vec<_>, Vec<_>) =
                        replaced.into_iter().partition(|effect| *effect == Effect::Evict(id));
                    for _ in evictions {
                        prop_assert!(world.memory.remove(&id));
                    }
                    world.sizes.insert(id, bytes);
                    world.residency.effects = others;
                    world.obey();
                }
            }
            for (claim, needs) in &world.needs {
                for id in needs.intersection(&world.memory) {
                    prop_assert!(world.residency.ready(*claim).contains(id));
                }
            }
        }
        world.come_to_rest();
        prop_assert!(world.loads.is_empty());
        for claim in 0..3 {
            world.release(claim);
        }
        world.come_to_rest();
        let held: u64 = world.memory.iter().map(|id| world.sizes[id]).sum();
        prop_assert_eq!(world.residency.used, held, "the books agree once all is quiet");
    }
}

#[test]
fn a_smaller_budget_takes_effect_as_far_as_nobody_needs_it() {
    let mut world = World::new(40, (0..4).map(|index| (index, 10)));
    let give = |world: &mut World, budget: u64| {
        world.budget = budget;
        world.residency.set_budget(budget);
        world.obey();
    };
    world.need(1, &[0, 1, 2, 3]);
    world.come_to_rest();
    world.need(1, &[0]);
    give(&mut world, 25);
    assert_eq!(world.in_memory().len(), 2);
    give(&mut world, 5);
    assert_eq!((world.in_memory(), world.residency.used), (vec![0], 10), "it is computed with");
    world.need(2, &[1]);
    world.compute();
    assert_eq!((world.in_memory(), world.residency.used), (vec![], 0));
    assert!(world.loads.is_empty(), "there is no room for what is needed now");
    give(&mut world, 10);
    world.come_to_rest();
    assert_eq!(world.in_memory(), [1]);
}
