//! Merge rules by example, and anti-entropy in a simulated mesh with explicit time and a seeded generator.

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;

pub(super) fn identity(seed: u8) -> Identity {
    let keypair = libp2p::identity::Keypair::ed25519_from_bytes([seed; 32]).expect("any 32 bytes are a seed");
    Identity::from_bytes(&keypair.to_protobuf_encoding().expect("encodes")).expect("an identity")
}

pub(super) fn peer(seed: u8) -> PeerId {
    identity(seed).peer_id()
}

/// The process that started then; its nonce is 1.
pub(super) fn process(started_ms: u64) -> Process {
    Process { started_ms, nonce: 1 }
}

/// The first incarnation of the process that started then.
pub(super) fn started(started_ms: u64) -> Incarnation {
    Incarnation::first(process(started_ms))
}

fn status(memory: u8) -> Status {
    Status { memory, compute: 0 }
}

fn versioned<T>(version: u64, value: T) -> Option<Versioned<T>> {
    Some(Versioned { version, value })
}

pub(super) fn advert(origin: PeerId, started_ms: u64, status: Option<Versioned<Status>>) -> Advert {
    Advert { origin, incarnation: started(started_ms), sighting: None, status, facts: None }
}

/// A node `me` whose members are `others`, all of them linked, its greetings thrown away.
struct Node {
    state: State,
    rng: StdRng,
    now: Instant,
}

impl Node {
    fn new(me: u8, started_ms: u64, others: &[PeerId]) -> Node {
        let now = Instant::now();
        let state = State::new(identity(me), process(started_ms), Policy::default(), now);
        let mut node = Node { state, rng: StdRng::seed_from_u64(7), now };
        node.handle(Input::SetMembers(others.iter().copied().collect()));
        others.iter().for_each(|&other| drop(node.handle(Input::Linked(other))));
        node
    }

    fn handle(&mut self, input: Input) -> Vec<Output> {
        self.state.handle(input, self.now, &mut self.rng)
    }

    fn hears(&mut self, from: PeerId, adverts: Vec<Advert>) -> Vec<Output> {
        self.handle(Input::Received(from, Message::Delta(adverts)))
    }
}

fn delta(to: PeerId, adverts: Vec<Advert>) -> Output {
    Output::Send { to, message: Message::Delta(adverts) }
}

fn reflection(to: PeerId, advert: Advert) -> Output {
    Output::Reflect { to, message: Message::Delta(vec![advert]) }
}

#[test]
fn a_status_is_pushed_to_every_linked_member_and_to_nobody_else() {
    let (me, a, b) = (peer(1), peer(2), peer(3));
    let mut node = Node::new(1, 10, &[a, b]);
    node.handle(Input::Unlinked(b));
    let sent = node.handle(Input::SetStatus(status(200)));
    assert_eq!(sent, [delta(a, vec![advert(me, 10, versioned(1, status(200)))])]);
}

#[test]
fn facts_travel_when_they_change_and_keep_the_gap() {
    let (me, a) = (peer(1), peer(2));
    let mut node = Node::new(1, 10, &[a]);
    let facts = |version, text: &'static str| Advert {
        origin: me,
        incarnation: started(10),
        sighting: None,
        status: None,
        facts: versioned(version, Bytes::from_static(text.as_bytes())),
    };
    assert_eq!(node.handle(Input::SetFacts("one".into())), [delta(a, vec![facts(1, "one")])]);
    assert_eq!(node.handle(Input::SetFacts("one".into())), []);
    assert_eq!(node.handle(Input::SetFacts("two".into())), []);
    assert_eq!(node.handle(Input::SetFacts("three".into())), []);
    node.now += Policy::default().gap;
    assert_eq!(node.handle(Input::Tick), [delta(a, vec![facts(3, "three")])]);
    assert_eq!(node.handle(Input::Tick), []);
}

#[test]
fn a_fresh_link_gets_an_introduction_and_a_digest() {
    let (me, a) = (peer(1), peer(2));
    let mut node = Node::new(1, 10, &[a]);
    let own = Stamp { incarnation: started(10), status: 0, facts: 0 };
    let digest = Output::Send { to: a, message: Message::Digest(vec![(me, own)]) };
    assert_eq!(node.handle(Input::Linked(a)), [delta(a, vec![advert(me, 10, None)]), digest]);
}

#[test]
fn newer_wins_and_older_is_ignored() {
    let a = peer(2);
    let mut node = Node::new(1, 10, &[a]);
    assert_eq!(node.hears(a, vec![advert(a, 5, versioned(2, status(20)))]), [Output::Changed(a)]);
    assert_eq!(node.hears(a, vec![advert(a, 5, versioned(1, status(10)))]), []);
    assert_eq!(node.hears(a, vec![advert(a, 4, versioned(9, status(90)))]), []);
    assert_eq!(node.state.record(&a).unwrap().status, versioned(2, status(20)));
    // A restart begins counting at 1 again, and forgets what the process before had said.
    assert_eq!(node.hears(a, vec![advert(a, 6, None)]), [Output::Changed(a), reflection(a, advert(a, 6, None))]);
    assert_eq!(node.state.record(&a), Some(&Record { incarnation: started(6), ..Record::default() }));
}

#[test]
fn strangers_are_neither_heard_nor_kept() {
    let (a, stranger) = (peer(2), peer(9));
    let mut node = Node::new(1, 10, &[a]);
    assert_eq!(node.hears(stranger, vec![advert(a, 5, versioned(1, status(1)))]), []);
    assert_eq!(node.hears(a, vec![advert(stranger, 5, versioned(1, status(1)))]), []);
    assert_eq!(node.handle(Input::Received(stranger, Message::Digest(vec![]))), []);
    assert_eq!(node.state.record(&stranger), None);
    assert_eq!(node.handle(Input::Linked(stranger)), []);
}

#[test]
fn a_digest_is_answered_with_the_newer_and_asks_for_the_missing() {
    let (me, a, b, c) = (peer(1), peer(2), peer(3), peer(4));
    let mut node = Node::new(1, 10, &[a, b, c]);
    node.handle(Input::SetStatus(status(77)));
    node.hears(b, vec![advert(b, 5, versioned(3, status(30)))]);
    node.hears(c, vec![advert(c, 5, versioned(1, status(40)))]);
    let stamp = |started_ms, status| Stamp { incarnation: started(started_ms), status, facts: 0 };
    // `a` knows us, lacks news of b, and is ahead on c.
    let digest = vec![(me, stamp(10, 1)), (b, stamp(5, 2)), (c, stamp(5, 2))];
    assert_eq!(
        node.handle(Input::Received(a, Message::Digest(digest))),
        [
            delta(a, vec![advert(b, 5, versioned(3, status(30)))]),
            Output::Send { to: a, message: Message::Wanted(vec![(c, stamp(5, 1))]) },
        ]
    );
    let wanted = Message::Wanted(vec![(c, stamp(4, 9)), (peer(9), stamp(0, 0))]);
    assert_eq!(node.handle(Input::Received(a, wanted)), [delta(a, vec![advert(c, 5, versioned(1, status(40)))])]);
}

#[test]
fn large_answers_are_cut_into_bounded_messages() {
    let others: Vec<PeerId> = (2..10).map(peer).collect();
    let mut node = Node::new(1, 10, &others);
    for &origin in &others {
        let facts = versioned(1, Bytes::from(vec![0; crate::membership::message::FACTS_BYTES_MAX]));
        node.hears(origin, vec![Advert { facts, ..advert(origin, 1, None) }]);
    }
    let sent = node.handle(Input::Received(others[0], Message::Digest(vec![])));
    let sizes: Vec<usize> = sent
        .iter()
        .filter_map(|output| match output {
            Output::Send { message, .. } => Some(message.encode().len()),
            _ => None,
        })
        .collect();
    assert_eq!(sizes.len(), 4);
    assert!(sizes.iter().all(|&size| size <= crate::membership::message::MESSAGE_BYTES_MAX));
}

#[test]
fn a_node_whose_clock_went_back_jumps_ahead_of_what_the_mesh_remembers() {
    let (me, a) = (peer(1), peer(2));
    let mut node = Node::new(1, 10, &[a]);
    let sent = node.hears(a, vec![advert(me, 50, versioned(4, status(1)))]);
    let incarnation = Incarnation { rank: 51, process: process(10) };
    let sighting = Some(Sighting::sign(&identity(1), process(10), process(50)));
    let ahead = Advert { incarnation, sighting, ..advert(me, 10, None) };
    assert_eq!(sent, [delta(a, vec![ahead.clone()])]);
    // An echo of what it says now changes nothing, and neither does a stamp that cannot be outranked.
    node.now += OUTRANK_GAP;
    assert_eq!(node.hears(a, vec![ahead]), []);
    assert_eq!(node.hears(a, vec![advert(me, u64::MAX, None)]), []);
}

#[test]
fn a_farewell_counts_unless_it_is_of_the_process_before() {
    let a = peer(2);
    let mut node = Node::new(1, 10, &[a]);
    node.hears(a, vec![advert(a, 5, None)]);
    assert_eq!(node.handle(Input::Received(a, Message::Bye { incarnation: started(4) })), []);
    assert_eq!(node.handle(Input::Received(a, Message::Bye { incarnation: started(5) })), [Output::Left(a)]);
}

#[test]
fn the_period_of_digests_grows_with_the_mesh() {
    assert_eq!(anti_entropy_period(3), Duration::from_secs(1));
    assert_eq!(
        anti_entropy_period(11),
        Duration::from_secs_f64(11.0 * 6.0 * 79.0 / 4096.0).max(Duration::from_secs(1))
    );
    assert!(anti_entropy_period(100) > Duration::from_secs(9));
}

/// Nodes that exchange messages without delay along `links`, in lock step.
struct Mesh {
    nodes: BTreeMap<PeerId, State>,
    rng: StdRng,
    now: Instant,
    /// Carried so far, by kind: deltas, digests, wanted.
    carried: [usize; 3],
}

impl Mesh {
    fn new(size: u8, links: &[(PeerId, PeerId)]) -> Mesh {
        let now = Instant::now();
        let state = |seed| State::new(identity(seed), process(1), Policy::default(), now);
        let nodes: BTreeMap<_, _> = (1..=size).map(|seed| (peer(seed), state(seed))).collect();
        let peers: Vec<PeerId> = nodes.keys().copied().collect();
        let mut mesh = Mesh { nodes, rng: StdRng::seed_from_u64(11), now, carried: [0; 3] };
        for &peer in &peers {
            mesh.act(peer, Input::SetMembers(peers.iter().copied().collect()));
        }
        for &(a, b) in links {
            mesh.act(a, Input::Linked(b));
            mesh.act(b, Input::Linked(a));
        }
        mesh.carried = [0; 3];
        mesh
    }

    /// Feeds one input and carries everything that follows from it.
    fn act(&mut self, at: PeerId, input: Input) {
        let mut pending = vec![(at, input)];
        while let Some((at, input)) = pending.pop() {
            for output in self.nodes.get_mut(&at).unwrap().handle(input, self.now, &mut self.rng) {
                if let Output::Send { to, message } = output {
                    match &message {
                        Message::Delta(_) => self.carried[0] += 1,
                        Message::Digest(_) => self.carried[1] += 1,
                        Message::Wanted(_) => self.carried[2] += 1,
                        Message::Bye { .. } => {}
                    }
                    pending.push((to, Input::Received(at, message)));
                }
            }
        }
    }

    fn step(&mut self, time: Duration) {
        self.now += time;
        for peer in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.act(peer, Input::Tick);
        }
    }

    fn knows(&self, at: PeerId, of: PeerId) -> Option<Status> {
        Some(self.nodes[&at].record(&of)?.status.as_ref()?.value)
    }
}

#[test]
fn a_third_node_learns_by_anti_entropy_what_no_one_told_it() {
    // a - b - c: a and c cannot reach each other, and pushes go one hop.
    let (a, b, c) = (peer(1), peer(2), peer(3));
    let mut mesh = Mesh::new(3, &[(a, b), (b, c)]);
    mesh.act(a, Input::SetStatus(status(123)));
    assert_eq!(mesh.knows(b, a), Some(status(123)));
    assert_eq!(mesh.knows(c, a), None);
    assert_eq!(mesh.carried, [1, 0, 0]);
    mesh.step(Duration::from_millis(1200));
    mesh.step(Duration::from_millis(1200));
    assert_eq!(mesh.knows(c, a), Some(status(123)));
    // At most one digest a node and period, each answered by at most one delta and one request.
    assert!(mesh.carried[1] <= 6, "{:?}", mesh.carried);
    assert!(mesh.carried[2] <= mesh.carried[1], "{:?}", mesh.carried);
}

#[test]
fn a_ring_of_thirty_converges_and_then_carries_only_digests() {
    let peers: Vec<PeerId> = (1..=30).map(peer).collect();
    let links: Vec<_> = (0..30).map(|at| (peers[at], peers[(at + 1) % 30])).collect();
    let mut mesh = Mesh::new(30, &links);
    for (at, &peer) in peers.iter().enumerate() {
        mesh.act(peer, Input::SetStatus(status(at as u8)));
    }
    let period = anti_entropy_period(30).mul_f64(1.1);
    let everyone_knows_everyone = |mesh: &Mesh| {
        let others = |at: PeerId| peers.iter().enumerate().filter(move |(_, of)| **of != at);
        peers.iter().all(|&at| others(at).all(|(nth, &of)| mesh.knows(at, of).map(|s| s.memory) == Some(nth as u8)))
    };
    let mut rounds = 0;
    while !everyone_knows_everyone(&mesh) {
        rounds += 1;
        assert!(rounds < 60, "no convergence after {rounds} periods");
        mesh.step(period);
    }
    // With nothing left to publish, only repair is carried.
    for node in mesh.nodes.values_mut() {
        node.publisher = Publisher::new(Policy::default());
    }
    mesh.carried = [0; 3];
    for _ in 0..5 {
        mesh.step(period);
    }
    // Keepalives sent while converging may still be spreading; nothing else is carried.
    assert_eq!(mesh.carried[1], 150, "one digest a node and period");
}
