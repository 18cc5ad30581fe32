//! A device's room against a driver that keeps its own books.

use proptest::prelude::*;

use super::*;

fn id(index: u16) -> ExpertId {
    ExpertId { layer: index / 16, index: index % 16 }
}

/// A device as the room believes it to be.
struct World {
    room: DeviceRoom,
    costs: Costs,
    sizes: BTreeMap<ExpertId, u64>,
    up: BTreeSet<ExpertId>,
}

impl World {
    fn new(budget: u64, experts: impl IntoIterator<Item = (u16, u64)>) -> Self {
        let mut world = Self {
            room: DeviceRoom::new(budget),
            costs: Costs::default(),
            sizes: BTreeMap::new(),
            up: BTreeSet::new(),
        };
        for (index, bytes) in experts {
            world.add(index, bytes);
        }
        world
    }

    fn add(&mut self, index: u16, bytes: u64) {
        self.up.remove(&id(index));
        self.room.add(id(index), bytes);
        self.sizes.insert(id(index), bytes);
        if self.room.settle(id(index)) {
            self.up.insert(id(index));
        }
        self.check();
    }

    fn obey(&mut self, moves: Vec<Move>) -> usize {
        let swaps = moves.len();
        for step in moves {
            match step {
                Move::Demote(id) => assert!(self.up.remove(&id), "{id} is not up"),
                Move::Promote(id) => assert!(self.up.insert(id), "{id} is up"),
            }
            self.check_bytes();
        }
        self.check();
        swaps
    }

    fn check_bytes(&self) {
        let bytes: u64 = self.up.iter().map(|id| self.sizes[id]).sum();
        assert!(bytes <= self.room.budget(), "{bytes} of {}", self.room.budget());
    }

    fn check(&self) {
        self.check_bytes();
        assert_eq!(self.room.used(), self.up.iter().map(|id| self.sizes[id]).sum::<u64>());
        assert!(self.sizes.keys().all(|id| self.room.is_up(*id) == self.up.contains(id)));
    }

    /// A layer of a flight of so many rows, each expert needed by `rows` of them.
    fn need(&mut self, indices: &[u16], rows: usize, of: usize) -> usize {
        let needs: Vec<Need> =
            indices.iter().map(|index| Need { id: id(*index), rows, share: rows as f64 / of as f64 }).collect();
        let before: BTreeSet<ExpertId> = needs.iter().map(|need| need.id).filter(|id| self.up.contains(id)).collect();
        let moves = self.room.need(&needs, &self.costs);
        let swaps = self.obey(moves);
        assert!(before.is_subset(&self.up), "nothing needed goes down");
        swaps
    }

    fn is_up(&self, index: u16) -> bool {
        self.up.contains(&id(index))
    }
}

#[test]
fn what_is_used_much_more_takes_the_place_of_the_coldest() {
    let mut world = World::new(30, (0..6).map(|index| (index, 10)));
    assert!((0..3).all(|index| world.is_up(index)), "whoever comes first has a place");
    for _ in 0..4 {
        world.room.tick();
        world.need(&[0, 1, 5], 1, 1);
    }
    assert!([0, 1, 5].iter().all(|index| world.is_up(*index)), "2 was never used");
    for _ in 0..5 {
        world.room.tick();
        assert_eq!(world.need(&[2, 3], 1, 1), 0, "not for a little more");
    }
    for _ in 0..20 {
        world.room.tick();
        world.need(&[3], 1, 1);
    }
    assert!(world.is_up(3) && !world.is_up(2));
    let Uses { there, brought, beneath } = world.room.uses();
    assert_eq!(there + brought + beneath, 4 * 3 + 5 * 2 + 20);
    assert_eq!(brought, 2);
}

#[test]
fn few_at_once_unless_moving_pays() {
    let mut world = World::new(60, (0..12).map(|index| (index, 10)));
    world.room.tick();
    let six = [6, 7, 8, 9, 10, 11];
    assert_eq!(world.need(&six, 100, 100), 2 * SWAPS_MAX, "one goes down for each");
    world.costs.moved(10, 1.0);
    world.costs.computed(10, 100.0, 5.0);
    world.need(&six, 1, 100);
    assert!(six.iter().filter(|index| world.is_up(**index)).count() <= 2 * SWAPS_MAX);
    world.need(&six, 100, 100);
    assert!(six.iter().all(|index| world.is_up(*index)), "all that pay, whatever goes");
    // More than fits: what the layer needs stays, and the rest is computed beneath.
    let all: Vec<u16> = (0..12).collect();
    assert_eq!(world.need(&all, 100, 100), 0);
}

#[test]
fn a_prompt_leaves_most_of_what_is_hot() {
    let mut world = World::new(100, (0..32).map(|index| (index, 10)));
    for _ in 0..50 {
        world.room.tick();
        world.need(&[20, 21, 22, 23, 24, 25], 1, 1);
    }
    world.costs.moved(10, 1.0);
    world.costs.computed(10, 64.0, 5.0);
    world.room.tick();
    for layer in 0..8u16 {
        let layer: Vec<u16> = (4 * layer..4 * layer + 4).collect();
        world.need(&layer, 64, 256);
        assert!(layer.iter().all(|index| world.is_up(*index)));
    }
    assert!((20..26).all(|index| world.is_up(index)), "the others pass through the rest");
}

#[test]
fn what_is_foreseen_counts_as_used_once_more() {
    let mut world = World::new(20, (0..4).map(|index| (index, 10)));
    let ahead = |world: &mut World, ids: &[u16]| {
        let ids: Vec<_> = ids.iter().map(|index| id(*index)).collect();
        let moves = world.room.prefetch(&ids);
        world.obey(moves)
    };
    for _ in 0..10 {
        world.room.tick();
        world.need(&[0], 1, 1);
    }
    assert_eq!(ahead(&mut world, &[2, 0]), 2);
    assert!(world.is_up(0) && world.is_up(2), "1 was never used");
    for _ in 0..10 {
        world.room.tick();
        world.need(&[2], 1, 1);
    }
    assert_eq!(ahead(&mut world, &[3, 1]), 0, "neither is worth what is there");
}

#[test]
fn what_does_not_fit_stays_beneath() {
    let mut world = World::new(15, [(0, 10), (1, 20), (2, 5)]);
    for _ in 0..50 {
        world.room.tick();
        world.need(&[1], 1, 1);
    }
    assert!(!world.is_up(1) && world.is_up(0) && world.is_up(2));
    let mut none = World::new(0, [(0, 10)]);
    none.room.tick();
    assert_eq!(none.need(&[0], 5, 5), 0);
    assert_eq!(none.room.uses(), Uses { there: 0, brought: 0, beneath: 1 });
}

#[derive(Clone, Debug)]
enum Step {
    Tick,
    Need(Vec<u16>, usize),
    Foresee(Vec<u16>),
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
        2 => ids().prop_map(Step::Foresee),
        1 => (0u16..24, 1u64..30).prop_map(|(id, bytes)| Step::Add(id, bytes)),
        1 => (0u16..24).prop_map(Step::Drop),
        1 => any::<u8>().prop_map(Step::Moved),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(rows, seconds)| Step::Computed(rows, seconds)),
    ]
}

proptest! {
    /// Whatever happens, the budget holds and what is needed is not evicted ([`World`] checks both); and whoever is used
    /// in every flight afterwards, with no more others than fit beside it, is on the device in the end.
    #[test]
    fn any_history(
        budget in 0u64..120,
        sizes in proptest::collection::vec(1u64..30, 24),
        steps in proptest::collection::vec(step(), 0..60),
        hot in 0u16..24,
    ) {
        let mut world = World::new(budget, (0..).zip(sizes));
        for step in steps {
            match step {
                Step::Tick => world.room.tick(),
                Step::Need(ids, rows) => _ = world.need(&ids, rows, 256),
                Step::Foresee(ids) => {
                    let ids: Vec<_> = ids.into_iter().map(id).collect();
                    let moves = world.room.prefetch(&ids);
                    world.obey(moves);
                }
                Step::Add(index, bytes) => world.add(index, bytes),
                Step::Drop(index) => {
                    world.room.forget(id(index));
                    world.up.remove(&id(index));
                    world.sizes.remove(&id(index));
                    world.check();
                    let moves = world.room.fill(|_| true);
                    world.obey(moves);
                    let free = world.room.budget() - world.room.used();
                    let beneath = world.sizes.iter().filter(|(id, _)| !world.up.contains(id));
                    prop_assert!(beneath.into_iter().all(|(_, bytes)| *bytes > free), "no place stays empty");
                }
                Step::Moved(seconds) => world.costs.moved(10, f64::from(seconds)),
                Step::Computed(rows, seconds) => world.costs.computed(10, f64::from(rows), f64::from(seconds)),
            }
        }
        for _ in 0..400 {
            world.room.tick();
            world.need(&[hot], 1, 1);
        }
        let fits = world.sizes.get(&id(hot)).is_some_and(|bytes| *bytes <= budget);
        prop_assert_eq!(world.is_up(hot), fits);
    }
}
