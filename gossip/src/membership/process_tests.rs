//! Histories of several processes of one node: its neighbours between them, messages late, lost, doubled and in any order.

use proptest::prelude::{ProptestConfig, Strategy, any, prop_assert, prop_assert_eq, proptest};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::tests::{advert, identity, peer, process, started};
use super::*;

const TICK: Duration = Duration::from_millis(100);
/// The node whose data folder was copied.
const NODE: u8 = 1;

/// A process with its state.
struct Actor {
    peer: PeerId,
    process: Process,
    state: State,
    linked: BTreeSet<PeerId>,
    runs: bool,
    confirmed: bool,
    duplicate_of: Option<Process>,
}

/// The neighbours come first, all linked with one another, and then the processes of [`NODE`].
struct World {
    actors: Vec<Actor>,
    node: PeerId,
    members: BTreeSet<PeerId>,
    under_way: Vec<(usize, PeerId, Message)>,
    rng: StdRng,
    now: Instant,
    /// Of messages, the share that is lost, and of the others the shares that wait for the next tick and that come twice.
    lost: f64,
    late: f64,
    alternated: usize,
}

impl World {
    fn new(neighbours: u8, seed: u64, (lost, late): (f64, f64)) -> World {
        let members: BTreeSet<PeerId> = (NODE..=NODE + neighbours).map(peer).collect();
        let (rng, now) = (StdRng::seed_from_u64(seed), Instant::now());
        let mut world = World {
            actors: Vec::new(),
            node: peer(NODE),
            members,
            under_way: Vec::new(),
            rng,
            now,
            lost,
            late,
            alternated: 0,
        };
        let all = world.members.clone();
        for nth in 1..=neighbours {
            world.start(NODE + nth, process(1), all.clone());
        }
        world
    }

    /// Starts a process that reaches these members.
    fn start(&mut self, seed: u8, process: Process, linked: BTreeSet<PeerId>) -> usize {
        let state = State::new(identity(seed), process, Policy::default(), self.now);
        let peer = peer(seed);
        let linked: BTreeSet<PeerId> = linked.into_iter().filter(|member| *member != peer).collect();
        let links = linked.clone();
        self.actors.push(Actor { peer, process, state, linked, runs: true, confirmed: false, duplicate_of: None });
        let actor = self.actors.len() - 1;
        self.act(actor, Input::SetMembers(self.members.clone()));
        links.into_iter().for_each(|member| self.act(actor, Input::Linked(member)));
        actor
    }

    /// The running processes of `to` that are linked with `from`.
    fn processes(&self, from: PeerId, to: PeerId) -> Vec<usize> {
        let runs = |actor: &Actor| actor.peer == to && actor.linked.contains(&from) && actor.runs;
        self.actors.iter().enumerate().filter(|(_, actor)| runs(actor)).map(|(nth, _)| nth).collect()
    }

    fn act(&mut self, at: usize, input: Input) {
        let from = self.actors[at].peer;
        for output in self.actors[at].state.handle(input, self.now, &mut self.rng) {
            let (to, message, reached) = match output {
                // A member takes its processes for one, and reaches any of them.
                Output::Send { to, message } => {
                    let reached = self.processes(from, to).into_iter().choose(&mut self.rng);
                    (to, message, reached.into_iter().collect::<Vec<_>>())
                }
                Output::Reflect { to, message } => (to, message, self.processes(from, to)),
                Output::Confirmed => {
                    self.actors[at].confirmed = true;
                    continue;
                }
                Output::Duplicate(earlier) => {
                    (self.actors[at].duplicate_of, self.actors[at].runs) = (Some(earlier), false);
                    continue;
                }
                Output::Alternates(_) => {
                    self.alternated += 1;
                    continue;
                }
                Output::Changed(_) | Output::Left(_) => continue,
            };
            assert!(self.members.contains(&to));
            self.under_way.extend(reached.into_iter().map(|at| (at, from, message.clone())));
        }
    }

    /// Carries messages in any order, and what follows from them, until those that are left wait for the next tick.
    fn carry(&mut self) {
        let mut waiting = Vec::new();
        while !self.under_way.is_empty() {
            let next = self.rng.random_range(0..self.under_way.len());
            let (at, from, message) = self.under_way.swap_remove(next);
            if self.rng.random_bool(self.late) {
                waiting.push((at, from, message));
            } else if !self.rng.random_bool(self.lost) && self.actors[at].runs {
                if self.rng.random_bool(self.late) {
                    waiting.push((at, from, message.clone()));
                }
                self.act(at, Input::Received(from, message));
            }
        }
        self.under_way = waiting;
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.carry();
            self.now += TICK;
            for at in 0..self.actors.len() {
                if !self.actors[at].runs {
                    continue;
                }
                self.act(at, Input::Tick);
                if self.rng.random_bool(0.05) {
                    let memory = self.rng.random();
                    self.act(at, Input::SetStatus(Status { memory, compute: 0 }));
                }
            }
        }
        self.carry();
    }

    /// The neighbours remember this process of the node, which has ended.
    fn remember(&mut self, dead: Process) {
        let neighbours = (0..self.actors.len()).filter(|&at| self.actors[at].peer != self.node).collect::<Vec<_>>();
        for at in neighbours {
            let told = Advert { incarnation: Incarnation::first(dead), ..advert(peer(NODE), 0, None) };
            self.act(at, Input::Received(peer(NODE), Message::Delta(vec![told])));
        }
    }

    fn of_node(&self) -> impl Iterator<Item = &Actor> {
        self.actors.iter().filter(|actor| actor.peer == self.node)
    }

    fn first_neighbour(&self) -> &State {
        &self.actors[0].state
    }
}

/// A start within a few milliseconds of others, the neighbours that it reaches (a bit each), and the pause before the next.
fn starts() -> impl Strategy<Value = Vec<(u64, u64, u8, u64)>> {
    proptest::collection::vec((10..14_u64, any::<u64>(), 1..8_u8, 0..3000_u64), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn of_several_processes_the_earliest_by_the_clock_goes_on_and_the_others_end(
        starts in starts(), neighbours in 1..4_u8, seed: u64, dead in proptest::option::of((5..20_u64, any::<u64>())),
        lost in 0.0..0.3_f64, late in 0.0..0.5_f64,
    ) {
        let mut world = World::new(neighbours, seed, (lost, late));
        world.run(TICK * 3);
        if let Some((started_ms, nonce)) = dead {
            world.remember(Process { started_ms, nonce });
        }
        for (started_ms, nonce, reached, pause_ms) in starts {
            let reached = (1..=neighbours).filter(|nth| reached >> (nth - 1) & 1 == 1).map(|nth| peer(NODE + nth));
            let mut reached: BTreeSet<PeerId> = reached.collect();
            if reached.is_empty() {
                reached.insert(peer(NODE + 1));
            }
            world.start(NODE, Process { started_ms, nonce }, reached);
            world.run(Duration::from_millis(pause_ms));
        }
        world.run(Duration::from_secs(20));
        let started: BTreeSet<Process> = world.of_node().map(|actor| actor.process).collect();
        let earliest = *started.first().expect("one was started");
        for actor in world.of_node() {
            prop_assert_eq!(actor.duplicate_of.is_none(), actor.process == earliest, "{:?}", actor.process);
            prop_assert!(actor.duplicate_of.is_none_or(|by| started.contains(&by) && by < actor.process));
        }
        // And the one that goes on is the one that the mesh knows.
        let known = world.first_neighbour().record(&peer(NODE)).expect("known").incarnation.process;
        prop_assert_eq!(known, earliest);
    }
}

#[test]
fn a_copy_hears_of_the_original_from_the_first_neighbour_and_before_it_is_confirmed() {
    for copy_ms in [20, 10, 5] {
        let mut world = World::new(1, 3, (0.0, 0.0));
        let everyone = world.members.clone();
        let original = world.start(NODE, process(10), everyone.clone());
        world.run(Duration::from_secs(2));
        assert!(world.actors[original].confirmed);
        let copy = world.start(NODE, Process { started_ms: copy_ms, nonce: 7 }, everyone);
        world.carry();
        let ended = |at: usize| world.actors[at].duplicate_of.is_some();
        assert_eq!((ended(original), ended(copy)), (copy_ms < 10, copy_ms >= 10), "by the clocks, then by the nonces");
        assert!(!world.actors[copy].confirmed);
        assert_eq!(world.alternated, usize::from(copy_ms >= 10), "the neighbour hears the original again");
        // Another one right after it, so that the original has just outranked one.
        let everyone = world.members.clone();
        let another = world.start(NODE, process(30), everyone);
        world.run(GRACE + TICK);
        assert!(world.actors[another].duplicate_of.is_some() && !world.actors[another].confirmed);
    }
}

#[test]
fn a_restart_is_no_alarm_and_is_confirmed_once_a_member_has_heard_of_it() {
    let mut world = World::new(2, 5, (0.0, 0.0));
    let everyone = world.members.clone();
    // Started in this order; the clock was set back before the last two.
    for (nonce, started_ms) in (1..).zip([10, 20, 15, 15]) {
        let running = world.start(NODE, Process { started_ms, nonce }, everyone.clone());
        world.carry();
        assert!(!world.actors[running].confirmed);
        world.run(GRACE + TICK);
        assert!(world.actors[running].confirmed && world.actors[running].duplicate_of.is_none());
        world.run(Duration::from_secs(3));
        // kill -9
        world.actors[running].runs = false;
    }
    assert_eq!(world.alternated, 0);
}

#[test]
fn where_nobody_can_be_asked_a_process_is_confirmed_at_once_or_after_a_while() {
    let mut alone = World::new(0, 1, (0.0, 0.0));
    let first = alone.start(NODE, process(10), BTreeSet::new());
    assert!(alone.actors[first].confirmed);
    let mut cut_off = World::new(1, 1, (0.0, 0.0));
    let first = cut_off.start(NODE, process(10), BTreeSet::new());
    cut_off.run(PATIENCE - TICK);
    assert!(!cut_off.actors[first].confirmed);
    cut_off.run(TICK * 2);
    assert!(cut_off.actors[first].confirmed);
}

#[test]
fn nobody_else_can_end_a_process_and_what_was_said_of_its_predecessor_does_not() {
    let (me, a) = (peer(NODE), peer(2));
    let [earlier, own] = [process(5), process(10)];
    let tells = |sighting: Sighting, now: Instant| {
        let mut state = State::new(identity(NODE), own, Policy::default(), now);
        let mut rng = StdRng::seed_from_u64(7);
        state.handle(Input::SetMembers([a].into()), now, &mut rng);
        let incarnation = started(10).outranked_by(earlier).expect("not the end of the range");
        let told = Advert { incarnation, sighting: Some(sighting), ..advert(me, 0, None) };
        let message = Message::Delta(vec![told]);
        let outputs = state.handle(Input::Received(a, message.clone()), now, &mut rng);
        assert!(state.handle(Input::Received(a, message), now, &mut rng).is_empty(), "it says nothing twice");
        outputs.contains(&Output::Duplicate(earlier))
    };
    let now = Instant::now();
    let genuine = Sighting::sign(&identity(NODE), earlier, own);
    assert!(tells(genuine, now));
    assert!(!tells(Sighting::sign(&identity(2), earlier, own), now), "signed by another node");
    assert!(!tells(Sighting { signature: [0; 64], ..genuine }, now));
    let predecessor = Process { nonce: 2, ..own };
    assert!(!tells(Sighting::sign(&identity(NODE), earlier, predecessor), now), "of another process");
}
