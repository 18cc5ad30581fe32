//! [`DeviceCache`] against a driver that keeps its own accounts.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn id(index: u16) -> ExpertId {
    ExpertId { layer: index / 16, index: index % 16 }
}

/// A device as the cache believes it to be.
struct World {
    cache: DeviceCache,
    costs: Costs,
    sizes: BTreeMap<ExpertId, u64>,
    promoted: BTreeSet<ExpertId>,
}

impl World {
    fn new(capacity: u64, experts: impl IntoIterator<Item = (u16, u64)>) -> Self {
        let mut world = Self {
            cache: DeviceCache::new(capacity),
            costs: Costs::default(),
            sizes: BTreeMap::new(),
            promoted: BTreeSet::new(),
        };
        for (index, bytes) in experts {
            world.add(index, bytes);
        }
        world
    }

    fn add(&mut self, index: u16, bytes: u64) {
        self.promoted.remove(&id(index));
        self.cache.add(id(index), bytes);
        self.sizes.insert(id(index), bytes);
        if self.cache.promote_if_free(id(index)) {
            self.promoted.insert(id(index));
        }
        self.check();
    }

    fn carry_out(&mut self, moves: Vec<Move>) -> usize {
        let swaps = moves.len();
        for step in moves {
            match step {
                Move::Demote(id) => assert!(self.promoted.remove(&id), "{id} is not on the device"),
                Move::Promote(id) => assert!(self.promoted.insert(id), "{id} is on the device"),
            }
            self.check_bytes();
        }
        self.check();
        swaps
    }

    fn check_bytes(&self) {
        let bytes: u64 = self.promoted.iter().map(|id| self.sizes[id]).sum();
        assert!(bytes <= self.cache.capacity(), "{bytes} of {}", self.cache.capacity());
    }

    fn check(&self) {
        self.check_bytes();
        assert_eq!(self.cache.used(), self.promoted.iter().map(|id| self.sizes[id]).sum::<u64>());
        assert!(self.sizes.keys().all(|id| self.cache.is_promoted(*id) == self.promoted.contains(id)));
    }

    /// A layer of a batch of so many rows, each expert needed by `rows` of them.
    fn need(&mut self, indices: &[u16], rows: usize, of: usize) -> usize {
        let needs: Vec<Need> =
            indices.iter().map(|index| Need { id: id(*index), rows, share: rows as f64 / of as f64 }).collect();
        let before: BTreeSet<ExpertId> =
            needs.iter().map(|need| need.id).filter(|id| self.promoted.contains(id)).collect();
        let moves = self.cache.need(&needs, &self.costs);
        let swaps = self.carry_out(moves);
        assert!(before.is_subset(&self.promoted), "no needed expert is demoted");
        swaps
    }

    fn is_promoted(&self, index: u16) -> bool {
        self.promoted.contains(&id(index))
    }
}

#[test]
fn an_expert_that_is_used_much_more_displaces_the_coldest() {
    let mut world = World::new(30, (0..6).map(|index| (index, 10)));
    assert!((0..3).all(|index| world.is_promoted(index)), "the first ones have space");
    for _ in 0..4 {
        world.cache.tick();
        world.need(&[0, 1, 5], 1, 1);
    }
    assert!([0, 1, 5].iter().all(|index| world.is_promoted(*index)), "2 was never used");
    for _ in 0..5 {
        world.cache.tick();
        assert_eq!(world.need(&[2, 3], 1, 1), 0, "not for a little more");
    }
    for _ in 0..20 {
        world.cache.tick();
        world.need(&[3], 1, 1);
    }
    assert!(world.is_promoted(3) && !world.is_promoted(2));
    let Uses { hits, promoted, on_cpu } = world.cache.uses();
    assert_eq!(hits + promoted + on_cpu, 4 * 3 + 5 * 2 + 20);
    assert_eq!(promoted, 2);
}

#[test]
fn few_at_once_unless_moving_pays() {
    let mut world = World::new(60, (0..12).map(|index| (index, 10)));
    world.cache.tick();
    let six = [6, 7, 8, 9, 10, 11];
    assert_eq!(world.need(&six, 100, 100), 2 * SWAPS_MAX, "one is demoted for each");
    world.costs.moved(10, 1.0);
    world.costs.computed(10, 100.0, 5.0);
    world.need(&six, 1, 100);
    assert!(six.iter().filter(|index| world.is_promoted(**index)).count() <= 2 * SWAPS_MAX);
    world.need(&six, 100, 100);
    assert!(six.iter().all(|index| world.is_promoted(*index)), "all that pay, whatever is demoted");
    // More than fits: the ones that the layer needs stay, and the CPU computes the rest.
    let all: Vec<u16> = (0..12).collect();
    assert_eq!(world.need(&all, 100, 100), 0);
}

#[test]
fn a_prompt_leaves_the_hot_experts() {
    let mut world = World::new(100, (0..32).map(|index| (index, 10)));
    for _ in 0..50 {
        world.cache.tick();
        world.need(&[20, 21, 22, 23, 24, 25], 1, 1);
    }
    world.costs.moved(10, 1.0);
    world.costs.computed(10, 64.0, 5.0);
    world.cache.tick();
    for layer in 0..8u16 {
        let layer: Vec<u16> = (4 * layer..4 * layer + 4).collect();
        world.need(&layer, 64, 256);
        assert!(layer.iter().all(|index| world.is_promoted(*index)));
    }
    assert!((20..26).all(|index| world.is_promoted(index)), "the prompt's experts take turns in the rest");
}

#[test]
fn a_predicted_expert_counts_as_used_once_more() {
    let mut world = World::new(20, (0..4).map(|index| (index, 10)));
    let prefetch = |world: &mut World, ids: &[u16]| {
        let ids: Vec<_> = ids.iter().map(|index| id(*index)).collect();
        let moves = world.cache.prefetch(&ids);
        world.carry_out(moves)
    };
    for _ in 0..10 {
        world.cache.tick();
        world.need(&[0], 1, 1);
    }
    assert_eq!(prefetch(&mut world, &[2, 0]), 2);
    assert!(world.is_promoted(0) && world.is_promoted(2), "1 was never used");
    for _ in 0..10 {
        world.cache.tick();
        world.need(&[2], 1, 1);
    }
    assert_eq!(prefetch(&mut world, &[3, 1]), 0, "neither is worth a resident");
}

#[test]
fn an_expert_that_does_not_fit_stays_on_the_cpu() {
    let mut world = World::new(15, [(0, 10), (1, 20), (2, 5)]);
    for _ in 0..50 {
        world.cache.tick();
        world.need(&[1], 1, 1);
    }
    assert!(!world.is_promoted(1) && world.is_promoted(0) && world.is_promoted(2));
    let mut none = World::new(0, [(0, 10)]);
    none.cache.tick();
    assert_eq!(none.need(&[0], 5, 5), 0);
    assert_eq!(none.cache.uses(), Uses { hits: 0, promoted: 0, on_cpu: 1 });
}

#[derive(Clone, Debug)]
enum Step {
    Tick,
    Need(Vec<u16>, usize),
    Predict(Vec<u16>),
    Add(u16, u64),
    Drop(u16),
    Moved(u8),
    Computed(u8, u8),
}

fn step() -> impl Strategy<Value = Step> {
    let ids = || proptest::collection::btree_set(0u16..24, 0..8).prop_map(|ids| ids.into_iter().collect::<Vec<_>>());
    prop_oneof![
        2 => Just(Step::Tick),
        6 => (ids(), 1usize..200).prop_map(|(ids, rows)| Step::Need(ids, rows)),
        2 => ids().prop_map(Step::Predict),
        1 => (0u16..24, 1u64..30).prop_map(|(id, bytes)| Step::Add(id, bytes)),
        1 => (0u16..24).prop_map(Step::Drop),
        1 => any::<u8>().prop_map(Step::Moved),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(rows, seconds)| Step::Computed(rows, seconds)),
    ]
}

proptest! {
    /// After any history, the capacity holds and no needed expert is demoted ([`World`] checks both); and an expert
    /// that every batch uses afterwards is on the device in the end, if it fits.
    #[test]
    fn any_history(
        capacity in 0u64..120,
        sizes in proptest::collection::vec(1u64..30, 24),
        steps in proptest::collection::vec(step(), 0..60),
        hot in 0u16..24,
    ) {
        let mut world = World::new(capacity, (0..).zip(sizes));
        for step in steps {
            match step {
                Step::Tick => world.cache.tick(),
                Step::Need(ids, rows) => _ = world.need(&ids, rows, 256),
                Step::Predict(ids) => {
                    let ids: Vec<_> = ids.into_iter().map(id).collect();
                    let moves = world.cache.prefetch(&ids);
                    world.carry_out(moves);
                }
                Step::Add(index, bytes) => world.add(index, bytes),
                Step::Drop(index) => {
                    world.cache.remove(id(index));
                    world.promoted.remove(&id(index));
                    world.sizes.remove(&id(index));
                    world.check();
                    let moves = world.cache.fill(|_| true);
                    world.carry_out(moves);
                    let free = world.cache.capacity() - world.cache.used();
                    let on_cpu = world.sizes.iter().filter(|(id, _)| !world.promoted.contains(id));
                    prop_assert!(on_cpu.into_iter().all(|(_, bytes)| *bytes > free), "no space stays empty");
                }
                Step::Moved(seconds) => world.costs.moved(10, f64::from(seconds)),
                Step::Computed(rows, seconds) => world.costs.computed(10, f64::from(rows), f64::from(seconds)),
            }
        }
        for _ in 0..400 {
            world.cache.tick();
            world.need(&[hot], 1, 1);
        }
        let fits = world.sizes.get(&id(hot)).is_some_and(|bytes| *bytes <= capacity);
        prop_assert_eq!(world.is_promoted(hot), fits);
    }
}
