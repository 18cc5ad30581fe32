//! [`DiskCache`] against a driver that keeps its own accounts: rules of eviction one by one, then properties of any
//! history.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn id(index: u16) -> ExpertId {
    ExpertId { layer: index / 100, index: index % 100 }
}

/// A disk and a memory, as the cache believes them to be.
struct World {
    cache: DiskCache,
    sizes: BTreeMap<ExpertId, u64>,
    memory: BTreeSet<ExpertId>,
    /// Loads under way, with the bytes that they have taken.
    loads: BTreeMap<LoadId, (ExpertId, u64)>,
    /// The experts that each claim still needs.
    needs: BTreeMap<ClaimId, BTreeSet<ExpertId>>,
    reads: Vec<(ExpertId, bool)>,
    capacity: u64,
}

impl World {
    fn new(capacity: u64, experts: impl IntoIterator<Item = (u16, u64)>) -> Self {
        let mut world = Self {
            cache: DiskCache::new(capacity),
            sizes: BTreeMap::new(),
            memory: BTreeSet::new(),
            loads: BTreeMap::new(),
            needs: BTreeMap::new(),
            reads: Vec::new(),
            capacity,
        };
        for (index, bytes) in experts {
            world.add(id(index), bytes);
        }
        world
    }

    fn add(&mut self, id: ExpertId, bytes: u64) {
        assert!(self.cache.add(id, bytes));
        self.carry_out();
        self.sizes.insert(id, bytes);
    }

    /// Carries out the effects, and checks that each is allowed.
    fn carry_out(&mut self) {
        for effect in self.cache.effects() {
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
            // Only reads take memory; a smaller capacity takes effect over time.
            let loading: u64 = self.loads.values().map(|(_, bytes)| bytes).sum();
            let held: u64 = self.memory.iter().map(|id| self.sizes[id]).sum();
            let grows = matches!(effect, Effect::Read { .. });
            assert!(!grows || held + loading <= self.capacity, "{held} in memory and {loading} on their way");
        }
    }

    /// An expert that was replaced may be on its way twice.
    fn removed_once(&self, id: ExpertId) -> bool {
        self.loads.values().any(|(other, _)| *other == id)
    }

    fn need(&mut self, claim: u64, ids: &[u16]) {
        let (claim, ids) = (ClaimId(claim), ids.iter().map(|index| id(*index)).collect::<Vec<_>>());
        self.needs.entry(claim).or_default().extend(ids.iter().filter(|id| self.sizes.contains_key(id)));
        self.cache.need(claim, ids);
        self.carry_out();
    }

    fn prefetch(&mut self, claim: u64, ids: &[u16]) {
        self.cache.prefetch(ClaimId(claim), ids.iter().map(|index| id(*index)));
        self.carry_out();
    }

    /// The oldest load ends and has read everything.
    fn arrive(&mut self) -> bool {
        let Some((&load, &(id, _))) = self.loads.first_key_value() else { return false };
        self.loads.remove(&load);
        match self.cache.arrived(load) {
            Arrival::Kept(kept) => {
                assert_eq!(kept, id);
                self.memory.insert(id);
            }
            Arrival::Discarded => {}
        }
        self.carry_out();
        true
    }

    fn fail(&mut self) {
        let Some((&load, &(id, _))) = self.loads.first_key_value() else { return };
        self.loads.remove(&load);
        for loser in self.cache.came_back(load, true) {
            assert!(self.needs.get_mut(&loser).is_some_and(|needs| needs.remove(&id)), "{id} was needed by it");
        }
        self.carry_out();
    }

    /// All claims compute the experts that are ready; how many.
    fn compute(&mut self) -> usize {
        let mut done = 0;
        for claim in self.needs.keys().copied().collect::<Vec<_>>() {
            for id in self.cache.ready(claim) {
                // An expert that failed for this claim may have arrived for another.
                let was_needed = self.needs.get_mut(&claim).is_some_and(|needs| needs.remove(&id));
                assert!(!was_needed || self.memory.contains(&id), "{id} is not in memory");
                self.cache.computed(claim, id, 1.0);
                self.carry_out();
                done += 1;
            }
        }
        done
    }

    fn release(&mut self, claim: u64) {
        self.needs.remove(&ClaimId(claim));
        self.cache.release(ClaimId(claim));
        self.carry_out();
    }

    /// Runs until every needed expert is computed.
    fn come_to_rest(&mut self) {
        for _ in 0..100_000 {
            if self.compute() == 0 && !self.arrive() {
                break;
            }
        }
        let left: Vec<_> = self.needs.values().flatten().collect();
        assert!(left.is_empty(), "{left:?} never arrived");
    }

    fn use_once(&mut self, ids: &[u16]) {
        self.cache.tick();
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
    // Scores decay: an expert used often long ago gives way to one used now.
    for _ in 0..400 {
        world.use_once(&[3]);
    }
    world.use_once(&[4]);
    world.use_once(&[4]);
    world.use_once(&[1]);
    assert_eq!(world.in_memory(), [1, 3, 4]);
    let counts = world.cache.counts();
    assert_eq!((counts.misses, counts.hits), (3 + 1 + 1 + 1, 3 + 2 + 400 + 1));
}

#[test]
fn a_long_pass_leaves_the_hot_experts_and_the_rest_take_turns() {
    let mut world = World::new(120, (0..30).map(|index| (index, 10)));
    for _ in 0..3 {
        world.use_once(&[7, 8, 9]);
    }
    let reads = world.reads.len();
    let all: Vec<u16> = (0..30).collect();
    world.cache.tick();
    world.need(2, &all);
    // A prompt's rows: each expert gets few of them.
    for _ in 0..1000 {
        for id in world.cache.ready(ClaimId(2)) {
            world.needs.get_mut(&ClaimId(2)).unwrap().remove(&id);
            world.cache.computed(ClaimId(2), id, 0.05);
            world.carry_out();
        }
        if !world.arrive() {
            break;
        }
    }
    assert!(world.needs[&ClaimId(2)].is_empty());
    assert_eq!(world.reads.len() - reads, 27, "each is read once, the hot experts not at all");
    assert!([7, 8, 9].iter().all(|hot| world.in_memory().contains(hot)), "{:?}", world.in_memory());
}

#[test]
fn a_prefetch_displaces_colder_experts_and_no_needed_one() {
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
    assert_eq!(world.in_memory(), [0, 3, 4], "neither 0 nor a predicted expert is evicted for 5");
    world.need(1, &[3, 6]);
    assert_eq!((world.cache.counts().prefetched, world.cache.counts().prefetch_used), (2, 1));
    assert_eq!(world.in_memory(), [0, 3], "4 was a wrong prediction, and is evicted first");
}

#[test]
fn a_prefetch_is_abandoned_or_becomes_urgent() {
    let mut world = World::new(100, (0..9).map(|index| (index, 10)));
    world.prefetch(1, &[3, 4]);
    let load = |index: u64| LoadId(index);
    world.cache.need(ClaimId(1), [id(4), id(5)]);
    let effects = world.cache.effects();
    let read = Effect::Read { id: id(5), load: load(2), urgent: true };
    assert_eq!(effects, [Effect::Hurry(load(1)), Effect::Abandon(load(0)), read]);
    // Abandoned, then needed: read again once the load has come back.
    world.loads.insert(load(2), (id(5), 10));
    world.cache.need(ClaimId(2), [id(3)]);
    assert!(world.cache.effects().is_empty());
    world.loads.remove(&load(0));
    assert!(world.cache.came_back(load(0), false).is_empty());
    assert_eq!(world.cache.effects(), [Effect::Read { id: id(3), load: load(3), urgent: true }]);
}

#[test]
fn two_claims_that_need_more_than_fits_are_both_served() {
    let mut world = World::new(20, (0..16).map(|index| (index, 10)));
    world.need(1, &[0, 1, 2, 3, 4, 5, 6, 7]);
    world.need(2, &[8, 9, 10, 11, 4, 5, 6, 7]);
    world.come_to_rest();
    assert!(world.reads.len() <= 16, "{} reads: no read was in vain", world.reads.len());
}

#[test]
fn a_failure_reaches_the_claims_that_wait_and_the_next_claim_tries_again() {
    let mut world = World::new(30, (0..3).map(|index| (index, 10)));
    world.need(1, &[0, 1]);
    world.need(2, &[1]);
    world.arrive();
    let load = *world.loads.first_key_value().unwrap().0;
    world.loads.remove(&load);
    assert_eq!(world.cache.came_back(load, true), [ClaimId(1), ClaimId(2)]);
    assert_eq!(world.cache.ready(ClaimId(1)), [id(0), id(1)], "a claim does not wait for an expert that failed");
    world.carry_out();
    assert!(world.loads.is_empty(), "nor is it read again without a claim");
    world.needs.clear();
    world.release(1);
    world.release(2);
    world.need(3, &[1]);
    world.come_to_rest();
    assert_eq!(world.in_memory(), [0, 1]);
}

#[test]
fn an_expert_that_is_removed_or_replaced_leaves_no_claim_waiting() {
    let mut world = World::new(40, (0..3).map(|index| (index, 10)));
    world.need(1, &[0, 1]);
    world.cache.remove(id(0));
    world.carry_out();
    world.sizes.remove(&id(0)).unwrap();
    world.needs.get_mut(&ClaimId(1)).unwrap().remove(&id(0));
    assert_eq!(world.cache.ready(ClaimId(1)), [id(0)], "removed, which its claim must learn");
    world.sizes.insert(id(0), 10);
    world.add(id(1), 20);
    world.come_to_rest();
    assert!(world.memory.contains(&id(1)));
    assert_eq!(world.cache.used(), 20);
    assert!(!world.cache.add(id(2), 41), "it could never fit");
}

#[derive(Clone, Debug)]
enum Move {
    Need(u64, Vec<u16>),
    Predict(u64, Vec<u16>),
    Arrive,
    Fail,
    Compute,
    Release(u64),
    Replace(u16, u64),
    Capacity(u64),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let ids = || prop::collection::vec(0u16..24, 1..10);
    let step = prop_oneof![
        3 => (0u64..3, ids()).prop_map(|(claim, ids)| Move::Need(claim, ids)),
        3 => (0u64..3, ids()).prop_map(|(claim, ids)| Move::Predict(claim, ids)),
        6 => Just(Move::Arrive),
        1 => Just(Move::Fail),
        6 => Just(Move::Compute),
        1 => (0u64..3).prop_map(Move::Release),
        1 => (0u16..24, 1u64..6).prop_map(|(index, bytes)| Move::Replace(index, bytes)),
        1 => (6u64..40).prop_map(Move::Capacity),
    ];
    prop::collection::vec(step, 1..150)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// What is used never exceeds the capacity, no needed expert is evicted (it would never arrive), and every needed
    /// expert arrives.
    #[test]
    fn any_history_keeps_the_capacity_and_ends_with_everything_computed(capacity in 6u64..40, moves in moves()) {
        let mut world = World::new(capacity, (0..24).map(|index| (index, 1 + u64::from(index) % 5)));
        for step in moves {
            match step {
                Move::Need(claim, ids) => {
                    world.cache.tick();
                    world.need(claim, &ids);
                }
                Move::Predict(claim, ids) => world.prefetch(claim, &ids),
                Move::Arrive => _ = world.arrive(),
                Move::Fail => world.fail(),
                Move::Compute => _ = world.compute(),
                Move::Release(claim) => world.release(claim),
                Move::Capacity(capacity) => {
                    world.capacity = capacity;
                    world.cache.set_capacity(capacity);
                    world.carry_out();
                }
                Move::Replace(index, bytes) => {
                    let id = id(index);
                    // Its old loads keep their memory until they come back.
                    prop_assert!(world.cache.add(id, bytes));
                    let replaced = world.cache.effects();
                    let (evictions, others): (Vec<_>, Vec<_>) =
                        replaced.into_iter().partition(|effect| *effect == Effect::Evict(id));
                    for _ in evictions {
                        prop_assert!(world.memory.remove(&id));
                    }
                    world.sizes.insert(id, bytes);
                    world.cache.effects = others;
                    world.carry_out();
                }
            }
            for (claim, needs) in &world.needs {
                for id in needs.intersection(&world.memory) {
                    prop_assert!(world.cache.ready(*claim).contains(id));
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
        prop_assert_eq!(world.cache.used(), held, "the accounts agree at rest");
    }
}

#[test]
fn a_smaller_capacity_takes_effect_as_far_as_no_claim_needs_it() {
    let mut world = World::new(40, (0..4).map(|index| (index, 10)));
    let resize = |world: &mut World, capacity: u64| {
        world.capacity = capacity;
        world.cache.set_capacity(capacity);
        world.carry_out();
    };
    world.need(1, &[0, 1, 2, 3]);
    world.come_to_rest();
    world.need(1, &[0]);
    resize(&mut world, 25);
    assert_eq!(world.in_memory().len(), 2);
    resize(&mut world, 5);
    assert_eq!((world.in_memory(), world.cache.used()), (vec![0], 10), "it is needed");
    world.need(2, &[1]);
    world.compute();
    assert_eq!((world.in_memory(), world.cache.used()), (vec![], 0));
    assert!(world.loads.is_empty(), "there is no room for the expert that is needed now");
    resize(&mut world, 10);
    world.come_to_rest();
    assert_eq!(world.in_memory(), [1]);
}
