//! The detector, input by input, with explicit time.

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::Liveness::*;
use super::*;

const MS: Duration = Duration::from_millis(1);

struct Bench {
    detector: Detector,
    rng: StdRng,
    now: Instant,
    peer: PeerId,
}

impl Bench {
    /// Watches one member which nobody has looked for yet.
    fn new() -> Bench {
        let now = Instant::now();
        let peer = PeerId::random();
        let detector = Detector::new(Thresholds::default(), now);
        let mut bench = Bench { detector, rng: StdRng::seed_from_u64(3), now, peer };
        let first = bench.feed(Input::Members(BTreeSet::from([peer])));
        assert_eq!(first, [Output::Changed(peer, Suspect), Output::Dial { peer, attempt: 0 }]);
        bench
    }

    fn connected() -> Bench {
        let mut bench = Bench::new();
        assert_eq!(bench.feed(Input::Connected(bench.peer)), [Output::Changed(bench.peer, Up)]);
        bench
    }

    fn feed(&mut self, input: Input) -> Vec<Output> {
        self.detector.handle(input, self.now, &mut self.rng)
    }

    /// Ticks every 100 ms for `time`, and returns what came of it.
    fn pass(&mut self, time: Duration) -> Vec<Output> {
        let mut outputs = Vec::new();
        for _ in 0..time.as_millis() / 100 {
            self.now += 100 * MS;
            outputs.extend(self.feed(Input::Tick));
        }
        outputs
    }

    fn refused(&mut self) -> Vec<Output> {
        self.feed(Input::DialFailed { peer: self.peer, refused: true })
    }

    fn dial(&self, attempt: u32) -> Output {
        Output::Dial { peer: self.peer, attempt }
    }
}

#[test]
fn a_lost_connection_and_two_refusals_are_death_within_a_quarter_of_a_second() {
    let mut bench = Bench::connected();
    let peer = bench.peer;
    let started = bench.now;
    assert_eq!(bench.feed(Input::ConnectionLost(peer)), [Output::Changed(peer, Suspect), bench.dial(0)]);
    assert_eq!(bench.refused(), []);
    assert_eq!(bench.pass(200 * MS), [bench.dial(1)]);
    assert_eq!(bench.refused(), [Output::Changed(peer, Down)]);
    assert!(bench.now - started <= 250 * MS);
}

#[test]
fn a_failed_dial_that_nobody_refused_is_no_verdict() {
    let mut bench = Bench::connected();
    let peer = bench.peer;
    bench.feed(Input::ConnectionLost(peer));
    for _ in 0..10 {
        assert_eq!(bench.feed(Input::DialFailed { peer, refused: false }), []);
    }
    assert_eq!(bench.detector.liveness(&peer), Some(Suspect));
}

#[test]
fn a_slow_node_is_not_a_dead_one() {
    let mut bench = Bench::connected();
    let peer = bench.peer;
    // A word every 5 s is slow: suspicion comes and goes, death never does.
    for _ in 0..5 {
        let outputs = bench.pass(5000 * MS);
        assert_eq!(outputs, [Output::Changed(peer, Suspect), bench.dial(0)]);
        assert_eq!(bench.feed(Input::Heard(peer)), [Output::Changed(peer, Up)]);
        // The dial beside the living connection comes to nothing, and means nothing.
        assert_eq!(bench.refused(), []);
    }
}

#[test]
fn silence_becomes_suspicion_and_then_death_which_closes_the_connection() {
    let mut bench = Bench::connected();
    let peer = bench.peer;
    assert_eq!(bench.pass(2400 * MS), []);
    assert_eq!(bench.pass(100 * MS), [Output::Changed(peer, Suspect), bench.dial(0)]);
    assert_eq!(bench.pass(3400 * MS), []);
    assert_eq!(bench.pass(100 * MS), [Output::Close(peer), Output::Changed(peer, Down)]);
}

#[test]
fn refusals_beside_a_silent_connection_are_death_too() {
    // A killed process behind a UDP transport: the connection looks alive, its listener is gone.
    let mut bench = Bench::connected();
    let peer = bench.peer;
    bench.pass(2500 * MS);
    assert_eq!(bench.refused(), []);
    assert_eq!(bench.pass(200 * MS), [bench.dial(1)]);
    assert_eq!(bench.refused(), [Output::Close(peer), Output::Changed(peer, Down)]);
}

#[test]
fn time_in_which_this_process_did_not_run_is_not_silence() {
    let mut bench = Bench::connected();
    bench.pass(1000 * MS);
    bench.now += Duration::from_secs(30);
    assert_eq!(bench.feed(Input::Tick), []);
    assert_eq!(bench.detector.liveness(&bench.peer), Some(Up));
    assert_eq!(bench.pass(1500 * MS).len(), 2, "what was silence before still counts");
}

#[test]
fn a_member_that_never_answered_goes_down_in_the_end() {
    let mut bench = Bench::new();
    bench.feed(Input::DialFailed { peer: bench.peer, refused: false });
    let outputs = bench.pass(6000 * MS);
    assert!(outputs.contains(&Output::Changed(bench.peer, Down)));
}

#[test]
fn the_dead_are_redialled_with_a_bounded_backoff() {
    let mut bench = Bench::connected();
    let peer = bench.peer;
    bench.feed(Input::ConnectionLost(peer));
    let mut pauses = Vec::new();
    for _ in 0..12 {
        bench.refused();
        let mut pause = Duration::ZERO;
        while bench.pass(100 * MS).is_empty() {
            pause += 100 * MS;
        }
        pauses.push(pause);
    }
    assert!(pauses[0] <= 200 * MS, "{pauses:?}");
    assert!(pauses[11] >= 3000 * MS && pauses[11] <= 5000 * MS, "{pauses:?}");
}

#[test]
fn the_dead_rise_when_they_connect_and_only_then() {
    let mut bench = Bench::connected();
    let peer = bench.peer;
    bench.pass(6000 * MS);
    assert_eq!(bench.detector.liveness(&peer), Some(Down));
    assert_eq!(bench.feed(Input::Heard(peer)), []);
    assert_eq!(bench.feed(Input::ConnectionLost(peer)), []);
    assert_eq!(bench.feed(Input::Connected(peer)), [Output::Changed(peer, Up)]);
}

#[test]
fn a_new_address_is_tried_at_once() {
    let mut bench = Bench::connected();
    let peer = bench.peer;
    bench.feed(Input::ConnectionLost(peer));
    bench.refused();
    bench.pass(200 * MS);
    bench.refused();
    assert_eq!(bench.feed(Input::AddressLearned(peer)), [bench.dial(0)]);
    assert_eq!(bench.feed(Input::AddressLearned(peer)), [bench.dial(0)], "even if an old one is being tried");
    bench.feed(Input::Connected(peer));
    assert_eq!(bench.feed(Input::AddressLearned(peer)), [], "no need while connected");
}

#[test]
fn a_farewell_is_believed_at_once() {
    let mut bench = Bench::connected();
    let peer = bench.peer;
    assert_eq!(bench.feed(Input::Left(peer)), [Output::Close(peer), Output::Changed(peer, Down)]);
    assert_eq!(bench.feed(Input::ConnectionLost(peer)), []);
    assert_eq!(bench.pass(4900 * MS), []);
    assert_eq!(bench.pass(100 * MS), [bench.dial(0)]);
}

#[test]
fn those_who_are_no_longer_members_are_forgotten() {
    let mut bench = Bench::connected();
    bench.feed(Input::Members(BTreeSet::new()));
    assert_eq!(bench.detector.liveness(&bench.peer), None);
    assert_eq!(bench.feed(Input::ConnectionLost(bench.peer)), []);
    assert_eq!(bench.pass(10_000 * MS), []);
}
