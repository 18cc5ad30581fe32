//! Calls with plain values: hosts are played by hand, time stands still unless a test moves it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use coel_gossip::Frame;
use coel_model::nn::expert_call::ExpertCall;
use coel_model::nn::router::Route;
use coel_model::serve::expert_source::ExpertOutputs;
use coel_store::{ExpertId, ModelId, NodeId, Precision};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::super::dispatch::LayerReplicas;
use super::super::hosts::HostTable;
use super::super::wait::{ExpertWait, WaitStep};
use super::super::wire::{ReplyHeader, WireError, decode_call, encode_reply};
use super::*;

const HOME: NodeId = NodeId(1);
const LAYER: u16 = 5;
const HIDDEN: usize = 2;
const MODEL: ModelId = ModelId([7; 32]);
const CLASS: &str = "cpu-avx2/exact";

/// A call whose rows begin with their own number.
fn layer_call(rows: &[&[u16]]) -> ExpertCall {
    let routes = |experts: &&[u16]| experts.iter().map(|&expert| Route { expert, weight: 0.5 }).collect();
    ExpertCall {
        layer: LAYER,
        hidden: HIDDEN,
        rows: (0..rows.len()).flat_map(|row| [row as f32, 0.25]).collect(),
        routes: rows.iter().map(routes).collect(),
    }
}

/// What any node computes of a row for an expert.
fn output(row: f32, expert: u16) -> [f32; HIDDEN] {
    [row * 1000.0 + f32::from(expert), -row]
}

/// All outputs of the call, in the decoder's order.
fn outputs_of(call: &ExpertCall) -> Vec<f32> {
    let rows = call.routes.iter().zip(0..);
    rows.flat_map(|(routes, row)| routes.iter().flat_map(move |route| output(row as f32, route.expert))).collect()
}

/// An attempt as the node that got it sees it.
#[derive(Debug, Clone)]
struct Got {
    attempt: AttemptId,
    node: NodeId,
    /// (row, expert), in the order of the outputs.
    pairs: Vec<(u32, u16)>,
    outputs: Vec<f32>,
    deadline: Duration,
}

impl Got {
    fn new(attempt: AttemptId, node: NodeId, rows: &[f32], work: &[(u16, Vec<u32>)], deadline: Duration) -> Self {
        let each = work.iter().flat_map(|(expert, indices)| indices.iter().map(move |&index| (index, *expert)));
        let each: Vec<_> = each.map(|(index, expert)| (rows[index as usize * HIDDEN], expert)).collect();
        let pairs = each.iter().map(|&(row, expert)| (row as u32, expert)).collect();
        let outputs = each.iter().flat_map(|&(row, expert)| output(row, expert)).collect();
        Self { attempt, node, pairs, outputs, deadline }
    }

    /// What an effect asks of a node, if it does.
    fn of(effect: &CallEffect) -> Option<Self> {
        match effect {
            CallEffect::Send { attempt, host, frame, deadline } => {
                let (header, rows) = decode_call(frame).expect("a valid call");
                assert_eq!((header.model, header.layer, header.hidden_size), (MODEL, LAYER, HIDDEN as u32));
                let work: Vec<_> = header
                    .work
                    .into_iter()
                    .map(|work| (work.expert, work.rows.into_iter().map(u32::from).collect()))
                    .collect();
                Some(Self::new(*attempt, *host, &rows, &work, *deadline))
            }
            CallEffect::Compute { attempt, rows, work } => Some(Self::new(*attempt, HOME, rows, work, Duration::ZERO)),
            _ => None,
        }
    }

    /// The node has computed what it was asked for.
    fn done(&self) -> CallInput {
        let Self { attempt, outputs, .. } = self.clone();
        if self.node == HOME {
            return CallInput::Computed { attempt, outputs: Ok(outputs) };
        }
        self.reply(&ReplyHeader::Done { class: CLASS.into() }, &outputs)
    }

    fn reply(&self, header: &ReplyHeader, rows: &[f32]) -> CallInput {
        CallInput::Reply { attempt: self.attempt, frame: encode_reply(header, rows) }
    }

    fn not_held(&self, expert: u16) -> CallInput {
        if self.node == HOME {
            return CallInput::Computed { attempt: self.attempt, outputs: Err(LocalError::NotHeld(expert)) };
        }
        self.reply(&ReplyHeader::NotHeld(vec![ExpertId { layer: LAYER, index: expert }]), &[])
    }

    fn broken(&self) -> CallInput {
        CallInput::Failed { attempt: self.attempt, reason: "the connection broke".into() }
    }

    fn late(&self) -> CallInput {
        CallInput::DeadlineReached { attempt: self.attempt }
    }
}

/// A home with one call.
struct Home {
    machine: LayerCall,
    replicas: LayerReplicas,
    hosts: HostTable,
    now: Instant,
    rng: SmallRng,
    wanted: Vec<f32>,
}

/// A home with a call of these routes; `holders` of exact replicas, of whom all peers are live.
fn home(rows: &[&[u16]], holders: &[(u16, &[u64])]) -> Home {
    let exact = |nodes: &[u64]| nodes.iter().map(|&node| (NodeId(node), Precision::Exact)).collect();
    let replicas = LayerReplicas {
        home: HOME,
        layer: LAYER,
        holders: holders.iter().map(|&(expert, nodes)| (expert, exact(nodes))).collect(),
        live: (2..6).map(|node| (NodeId(node), Some(Duration::from_millis(1)))).collect(),
        ..LayerReplicas::default()
    };
    Home::new(layer_call(rows), replicas, 1)
}

impl Home {
    fn new(call: ExpertCall, replicas: LayerReplicas, seed: u64) -> Self {
        Self {
            wanted: outputs_of(&call),
            machine: LayerCall::new(MODEL, call, replicas.clone()),
            replicas,
            hosts: HostTable::default(),
            now: Instant::now(),
            rng: SmallRng::seed_from_u64(seed),
        }
    }

    fn handle(&mut self, input: CallInput) -> Vec<CallEffect> {
        self.machine.handle(input, &mut self.hosts, self.now, &mut self.rng)
    }

    /// What nodes are asked, and nothing else happens.
    fn asked(&mut self, input: CallInput) -> Vec<Got> {
        let effects = self.handle(input);
        let asked: Vec<_> = effects.iter().filter_map(Got::of).collect();
        let reports = effects.iter().filter(|effect| matches!(effect, CallEffect::Report { .. })).count();
        assert_eq!(asked.len() + reports, effects.len(), "{effects:?}");
        asked
    }

    fn asks_one(&mut self, input: CallInput) -> Got {
        let [one] = self.asked(input).try_into().expect("one node is asked");
        one
    }

    fn finishes(&mut self, input: CallInput) -> Result<ExpertOutputs, CallError> {
        match self.handle(input).pop() {
            Some(CallEffect::Finish(outcome)) => outcome,
            other => panic!("not finished: {other:?}"),
        }
    }

    /// The input completes the call, with the right outputs.
    fn completes(&mut self, input: CallInput) -> ExpertOutputs {
        let outputs = self.finishes(input).unwrap();
        assert_eq!(outputs.values, self.wanted);
        outputs
    }

    /// The input begins a pause before a second chance.
    fn pauses(&mut self, input: CallInput) -> CallInput {
        match self.handle(input).pop() {
            Some(CallEffect::ArmSecondChance { chance, after: SECOND_CHANCE_AFTER }) => {
                CallInput::SecondChanceDue { chance }
            }
            other => panic!("no pause: {other:?}"),
        }
    }

    fn mesh_changed(&self) -> CallInput {
        CallInput::MeshChanged(self.replicas.clone())
    }
}

fn missing(outcome: Result<ExpertOutputs, CallError>) -> (MissingExperts, Vec<(NodeId, HostFailure)>) {
    match outcome {
        Err(CallError::Missing { missing, failures }) => (missing, failures),
        other => panic!("{other:?}"),
    }
}

fn unavailable(outcome: Result<ExpertOutputs, CallError>) -> (MissingExperts, Vec<(NodeId, HostFailure)>) {
    match outcome {
        Err(CallError::Unavailable { missing, failures }) => (missing, failures),
        other => panic!("{other:?}"),
    }
}

fn expert(index: u16) -> ExpertId {
    ExpertId { layer: LAYER, index }
}

#[test]
fn outputs_land_in_their_slots_whoever_answers_first() {
    let mut home = home(&[&[0, 1], &[1, 2], &[0, 2]], &[(0, &[2]), (1, &[3]), (2, &[2])]);
    let asked = home.asked(CallInput::Start);
    let [two, three] = asked.try_into().expect("one frame per host");
    assert_eq!((two.node, three.node), (NodeId(2), NodeId(3)));
    assert_eq!(two.pairs, [(0, 0), (2, 0), (1, 2), (2, 2)]);
    assert_eq!(home.handle(three.done()), []);
    let outputs = home.completes(two.done());
    let shares: Vec<_> = outputs.shares.iter().map(|share| (share.elsewhere.as_deref(), &*share.slots)).collect();
    assert_eq!(shares, [(Some(CLASS), &[1, 2][..]), (Some(CLASS), &[0, 4, 3, 5][..])]);
}

#[test]
fn a_call_of_nothing_finishes_at_once() {
    let mut home = home(&[&[], &[]], &[]);
    home.completes(CallInput::Start);
}

#[test]
fn a_host_that_fails_is_replaced_at_once_while_others_compute() {
    let mut home = home(&[&[0, 1]], &[(0, &[2]), (1, &[3])]);
    home.replicas.holders.get_mut(&0).unwrap().insert(NodeId(4), Precision::Exact);
    assert_eq!(home.handle(home.mesh_changed()), []);
    home.hosts.failed(NodeId(4), home.now);
    let [two, three] = home.asked(CallInput::Start).try_into().expect("two hosts");
    let four = home.asks_one(two.broken());
    assert_eq!((four.node, &four.pairs), (NodeId(4), &two.pairs));
    assert!(home.hosts.is_cooling_down(NodeId(2), home.now));
    assert_eq!(home.handle(four.done()), []);
    home.completes(three.done());
}

/// What becomes of an attempt.
type Outcome<'a> = &'a dyn Fn(&Got) -> CallInput;

#[test]
fn a_failure_is_reported_with_its_reason() {
    let refused = ReplyHeader::Refused("rows of 3 values".into());
    let done = ReplyHeader::Done { class: CLASS.into() };
    let cases: [(Outcome<'_>, HostFailure); 5] = [
        (&Got::broken, HostFailure::Transport("the connection broke".into())),
        (&|got| got.reply(&refused, &[]), HostFailure::Refused("rows of 3 values".into())),
        (
            &|got| got.reply(&done, &[1.0]),
            HostFailure::InvalidReply(WireError::Payload { expected: HIDDEN * 4, actual: 4 }),
        ),
        (&|got| got.not_held(9), HostFailure::Unasked),
        (&|got| got.not_held(0), HostFailure::NotHeld),
    ];
    for (input, failure) in cases {
        let mut home = home(&[&[0]], &[(0, &[2, 3])]);
        let first = home.asks_one(CallInput::Start);
        let effects = home.handle(input(&first));
        assert_eq!(effects[0], CallEffect::Report { host: first.node, failure: failure.clone() });
        let second = Got::of(&effects[1]).expect("a replica is asked");
        assert_ne!(second.node, first.node);
        let forgiven = failure == HostFailure::NotHeld;
        assert_eq!(home.hosts.is_cooling_down(first.node, home.now), !forgiven, "{failure}");
        home.completes(second.done());
    }
}

#[test]
fn a_late_host_is_replaced_and_its_late_reply_ignored() {
    let mut home = home(&[&[0]], &[(0, &[2, 3])]);
    let late = home.asks_one(CallInput::Start);
    let effects = home.handle(late.late());
    assert_eq!(effects[0], CallEffect::Report { host: late.node, failure: HostFailure::Late(late.deadline) });
    let replica = Got::of(&effects[1]).unwrap();
    assert_eq!(home.handle(late.done()), []);
    assert_eq!(home.handle(late.late()), []);
    let outputs = home.completes(replica.done());
    assert_eq!(outputs.shares.len(), 1, "counted once");
}

#[test]
fn a_host_waits_less_long_where_others_could_take_over() {
    let mut sole = home(&[&[0]], &[(0, &[2])]);
    let mut one_of_two = home(&[&[0]], &[(0, &[2, 3])]);
    assert!(one_of_two.asks_one(CallInput::Start).deadline < sole.asks_one(CallInput::Start).deadline);
    one_of_two.replicas.live.remove(&NodeId(3));
    let mut other_down = Home::new(layer_call(&[&[0]]), one_of_two.replicas, 1);
    assert_eq!(other_down.asks_one(CallInput::Start).deadline, Duration::from_secs(30));
}

#[test]
fn a_host_that_lost_one_expert_goes_on_with_the_others() {
    let mut home = home(&[&[0, 1]], &[(0, &[2]), (1, &[2])]);
    home.replicas.holders.get_mut(&0).unwrap().insert(NodeId(3), Precision::Q4);
    home.handle(home.mesh_changed());
    let both = home.asks_one(CallInput::Start);
    assert_eq!((both.node, both.pairs.len()), (NodeId(2), 2));
    let [two, three] = home.asked(both.not_held(0)).try_into().expect("both hosts");
    assert_eq!((two.node, &*two.pairs), (NodeId(2), &[(0, 1)][..]));
    assert_eq!((three.node, &*three.pairs), (NodeId(3), &[(0, 0)][..]));
    home.handle(two.done());
    home.completes(three.done());
}

#[test]
fn an_exact_replica_is_asked_first_and_a_lower_one_when_it_fails() {
    let mut home = home(&[&[0]], &[(0, &[2])]);
    home.replicas.holders.get_mut(&0).unwrap().insert(NodeId(3), Precision::Q4);
    home.handle(home.mesh_changed());
    let exact = home.asks_one(CallInput::Start);
    assert_eq!(exact.node, NodeId(2));
    let lower = home.asks_one(exact.broken());
    assert_eq!(lower.node, NodeId(3));
    home.completes(lower.done());
}

#[test]
fn where_no_replica_is_live_the_call_fails_at_once_and_names_the_holders() {
    let mut home = home(&[&[0, 1, 2]], &[(0, &[2]), (1, &[9]), (2, &[])]);
    let (missing, failures) = missing(home.finishes(CallInput::Start));
    assert_eq!(missing.experts, [(expert(1), vec![NodeId(9)]), (expert(2), vec![])].into());
    assert_eq!(failures, []);
    assert_eq!(home.hosts.rows_in_flight(NodeId(2)), 0, "nothing was sent");
}

#[test]
fn experts_whose_hosts_are_away_or_not_ready_are_unavailable_and_not_missing() {
    let mut home = home(&[&[0, 1, 2]], &[(0, &[2]), (1, &[9]), (2, &[])]);
    home.replicas.loading.insert(2, [HOME, NodeId(3)].into());
    home.handle(home.mesh_changed());
    let (missing, failures) = unavailable(home.finishes(CallInput::Start));
    assert_eq!(missing.experts, [(expert(1), vec![NodeId(9)]), (expert(2), vec![HOME, NodeId(3)])].into());
    assert_eq!(failures, []);
}

#[test]
fn a_host_that_falls_silent_during_the_call_makes_its_expert_unavailable() {
    let mut home = home(&[&[0]], &[(0, &[2])]);
    let asked = home.asks_one(CallInput::Start);
    home.replicas.live.remove(&NodeId(2));
    assert_eq!(home.handle(home.mesh_changed()), [], "the attempt is still open");
    let due = home.pauses(asked.broken());
    let (missing, _) = unavailable(home.finishes(due));
    assert_eq!(missing.experts, [(expert(0), vec![NodeId(2)])].into());
}

#[test]
fn a_host_that_is_heard_again_during_a_pause_computes() {
    let mut home = home(&[&[0]], &[(0, &[2])]);
    let asked = home.asks_one(CallInput::Start);
    let away = home.replicas.live.remove(&NodeId(2)).unwrap();
    home.handle(home.mesh_changed());
    let due = home.pauses(asked.broken());
    home.replicas.live.insert(NodeId(2), away);
    home.handle(home.mesh_changed());
    let again = home.asks_one(due);
    home.completes(again.done());
}

#[test]
fn an_answer_asks_again_once_its_sole_host_is_heard_and_gets_the_same_outputs() {
    let call = || home(&[&[0, 1], &[1]], &[(0, &[2]), (1, &[3])]);
    let (mut first, mut waits) = (call(), ExpertWait::default());
    let [two, three] = first.asked(CallInput::Start).try_into().expect("two hosts");
    assert_eq!(first.handle(two.done()), []);
    let away = first.replicas.live.remove(&NodeId(3)).unwrap();
    first.handle(first.mesh_changed());
    let due = first.pauses(three.broken());
    let (missing, _) = unavailable(first.finishes(due));
    assert_eq!(missing.experts.keys().collect::<Vec<_>>(), [&expert(1)]);
    // What the answer lacks, seen every second of the silence.
    let lacks = |replicas: &LayerReplicas| {
        let holders = replicas.holders.iter().filter(|(index, _)| **index == 1);
        LayerReplicas { holders: holders.map(|(&index, nodes)| (index, nodes.clone())).collect(), ..replicas.clone() }
    };
    for second in 0..8 {
        let step = waits.step(&lacks(&first.replicas), first.now + Duration::from_secs(second));
        assert!(matches!(step, WaitStep::Wait(_)), "after {second} s: {step:?}");
    }
    first.replicas.live.insert(NodeId(3), away);
    let heard = first.now + Duration::from_secs(8);
    assert_eq!(waits.step(&lacks(&first.replicas), heard), WaitStep::Retry);
    let mut second = Home { now: heard, hosts: first.hosts, ..call() };
    let [two, three] = second.asked(CallInput::Start).try_into().expect("both again");
    second.handle(three.done());
    second.completes(two.done());
}

#[test]
fn a_host_that_fails_for_good_is_not_waited_for() {
    let refused = ReplyHeader::Refused("rows of 3 values".into());
    let for_good: [Outcome<'_>; 3] =
        [&|got| got.reply(&refused, &[]), &|got| got.not_held(9), &|got| got.reply(&ReplyHeader::NotHeld(vec![]), &[])];
    for input in for_good {
        let mut home = home(&[&[0]], &[(0, &[2])]);
        let mut asked = home.asks_one(CallInput::Start);
        for _ in 0..SECOND_CHANCES {
            let due = home.pauses(input(&asked));
            asked = home.asks_one(due);
        }
        missing(home.finishes(input(&asked)));
    }
}

#[test]
fn the_last_hosts_get_second_chances_and_then_the_call_fails() {
    let mut home = home(&[&[0]], &[(0, &[2])]);
    let mut asked = home.asks_one(CallInput::Start);
    for _ in 0..SECOND_CHANCES {
        let due = home.pauses(asked.broken());
        asked = home.asks_one(due.clone());
        assert_eq!(asked.node, NodeId(2));
        assert_eq!(home.handle(due), [], "a timer counts once");
    }
    let error = home.finishes(asked.broken());
    let text = error.clone().unwrap_err().to_string();
    assert!(text.contains("expert 5.0 (placed on node 2"), "{text}");
    assert!(text.ends_with("(node 2 could not be asked: the connection broke)"), "each reason once: {text}");
    assert_eq!(unavailable(error).1.len(), 1);
}

#[test]
fn a_second_chance_may_succeed() {
    let mut home = home(&[&[0]], &[(0, &[2])]);
    let first = home.asks_one(CallInput::Start);
    let due = home.pauses(first.not_held(0));
    let second = home.asks_one(due);
    home.completes(second.done());
}

#[test]
fn pairs_with_a_replica_do_not_wait_for_those_without() {
    let mut home = home(&[&[0, 1]], &[(0, &[2]), (1, &[2, 3])]);
    let both = home.asks_one(CallInput::Start);
    assert_eq!(both.pairs.len(), 2);
    let effects = home.handle(both.broken());
    let [_, CallEffect::ArmSecondChance { chance, .. }, send] = &effects[..] else { panic!("{effects:?}") };
    let three = Got::of(send).expect("the other expert's replica is asked");
    assert_eq!((three.node, &*three.pairs), (NodeId(3), &[(0, 1)][..]));
    let two = home.asks_one(CallInput::SecondChanceDue { chance: *chance });
    assert_eq!((two.node, &*two.pairs), (NodeId(2), &[(0, 0)][..]));
    home.handle(two.done());
    home.completes(three.done());
}

#[test]
fn a_failure_during_a_pause_waits_for_the_same_chance() {
    let mut home = home(&[&[0, 1]], &[(0, &[2]), (1, &[3])]);
    let [two, three] = home.asked(CallInput::Start).try_into().expect("two hosts");
    let due = home.pauses(two.broken());
    assert_eq!(home.asked(three.broken()).len(), 0, "no second pause");
    let [two, three] = home.asked(due).try_into().expect("both again");
    home.handle(two.done());
    home.completes(three.done());
}

#[test]
fn a_replica_that_appears_during_a_pause_is_asked_at_once() {
    let mut home = home(&[&[0]], &[(0, &[2])]);
    let first = home.asks_one(CallInput::Start);
    let due = home.pauses(first.broken());
    assert_eq!(home.handle(home.mesh_changed()), [], "nothing that helps");
    home.replicas.holders.get_mut(&0).unwrap().insert(NodeId(4), Precision::Q8);
    let four = home.asks_one(home.mesh_changed());
    assert_eq!(four.node, NodeId(4));
    assert_eq!(home.handle(due), [], "the pause is over already");
    home.completes(four.done());
}

#[test]
fn what_this_node_holds_after_all_is_computed_here() {
    let mut home = home(&[&[0, 1], &[0]], &[(0, &[1, 2]), (1, &[2])]);
    let [here, there] = home.asked(CallInput::Start).try_into().expect("here and there");
    assert_eq!((here.node, &*here.pairs), (HOME, &[(0, 0), (1, 0)][..]));
    home.handle(there.done());
    let outputs = home.completes(here.done());
    assert_eq!(outputs.shares[1].elsewhere, None);
    assert_eq!(home.hosts.rows_in_flight(HOME), 0);
}

#[test]
fn what_this_node_dropped_meanwhile_is_asked_of_a_replica() {
    let mut home = home(&[&[0]], &[(0, &[1, 2])]);
    let here = home.asks_one(CallInput::Start);
    let there = home.asks_one(here.not_held(0));
    assert_eq!(there.node, NodeId(2));
    home.completes(there.done());
}

#[test]
fn a_fault_of_this_nodes_engine_ends_the_call() {
    let results =
        [Err(LocalError::Engine("the compute thread has stopped".into())), Err(LocalError::NotHeld(9)), Ok(vec![1.0])];
    for outputs in results {
        let mut home = home(&[&[0, 1]], &[(0, &[1, 2]), (1, &[2])]);
        let [here, there] = home.asked(CallInput::Start).try_into().expect("here and there");
        let outcome = home.finishes(CallInput::Computed { attempt: here.attempt, outputs });
        assert!(matches!(outcome, Err(CallError::Engine(_))), "{outcome:?}");
        assert_eq!(home.hosts.rows_in_flight(NodeId(2)), 0);
        assert_eq!(home.handle(there.done()), []);
    }
}

#[test]
fn a_cancelled_call_ends_and_nothing_is_in_flight() {
    let mut home = home(&[&[0, 1]], &[(0, &[2]), (1, &[3])]);
    let [two, three] = home.asked(CallInput::Start).try_into().expect("two hosts");
    assert_eq!(home.hosts.rows_in_flight(NodeId(3)), 1);
    let due = home.pauses(two.broken());
    assert_eq!(home.finishes(CallInput::Cancelled), Err(CallError::Cancelled));
    assert_eq!(home.hosts.rows_in_flight(NodeId(3)), 0);
    for input in [due, three.done(), three.late(), CallInput::Start, home.mesh_changed(), CallInput::Cancelled] {
        assert_eq!(home.handle(input), []);
    }
}

#[test]
fn an_outcome_of_the_wrong_kind_is_ignored() {
    let mut home = home(&[&[0, 1]], &[(0, &[1]), (1, &[2])]);
    let [here, there] = home.asked(CallInput::Start).try_into().expect("here and there");
    assert_eq!(home.handle(CallInput::DeadlineReached { attempt: here.attempt }), []);
    assert_eq!(home.handle(CallInput::Computed { attempt: there.attempt, outputs: Ok(vec![0.0; HIDDEN]) }), []);
    home.handle(here.done());
    home.completes(there.done());
}

#[test]
fn an_answer_teaches_the_hosts_pace() {
    let mut home = home(&[&[0], &[0]], &[(0, &[2])]);
    let two = home.asks_one(CallInput::Start);
    home.now += Duration::from_millis(9);
    home.completes(two.done());
    let estimate = home.hosts.estimate(NodeId(2), Some(Duration::ZERO), 1);
    assert_eq!(estimate, Duration::from_millis(4), "8 ms beyond the round trip, for two rows");
}

/// One step of a random history. Numbers choose among what is possible then.
#[derive(Debug, Clone, Copy)]
enum Step {
    Done(usize),
    NotHeld(usize, u16),
    Broken(usize),
    Late(usize),
    Refused(usize),
    Garbage(usize),
    /// An outcome of an attempt that is over, or was never made.
    Stale(usize),
    ChanceDue,
    /// The node dies or comes back.
    Liveness(u64),
    /// The node loads the expert or drops it.
    Placement(u64, u16),
    Wait(u64),
    Cancel,
}

fn step() -> impl Strategy<Value = Step> {
    let pick = any::<usize>;
    prop_oneof![
        6 => pick().prop_map(Step::Done),
        4 => (pick(), 0..7u16).prop_map(|(pick, expert)| Step::NotHeld(pick, expert)),
        4 => pick().prop_map(Step::Broken),
        3 => pick().prop_map(Step::Late),
        1 => pick().prop_map(Step::Refused),
        2 => pick().prop_map(Step::Garbage),
        2 => pick().prop_map(Step::Stale),
        4 => Just(Step::ChanceDue),
        3 => (2..6u64).prop_map(Step::Liveness),
        3 => (1..6u64, 0..6u16).prop_map(|(node, expert)| Step::Placement(node, expert)),
        2 => (0..15_000u64).prop_map(Step::Wait),
        1 => Just(Step::Cancel),
    ]
}

/// A call under a random history, and what must hold of it after every input.
struct History {
    home: Home,
    open: BTreeMap<AttemptId, Got>,
    over: Vec<Got>,
    chances: Vec<ChanceId>,
    answered: BTreeSet<(u32, u16)>,
    attempts: usize,
    pauses: u32,
    outcomes: Vec<Result<ExpertOutputs, CallError>>,
    cancelled: bool,
}

impl History {
    fn new(home: Home) -> Self {
        Self {
            home,
            open: BTreeMap::new(),
            over: Vec::new(),
            chances: Vec::new(),
            answered: BTreeSet::new(),
            attempts: 0,
            pauses: 0,
            outcomes: Vec::new(),
            cancelled: false,
        }
    }

    fn is_over(&self) -> bool {
        !self.outcomes.is_empty()
    }

    fn pick(&self, pick: usize) -> Option<Got> {
        self.open.values().nth(pick % self.open.len().max(1)).cloned()
    }

    /// Ends an attempt with the input.
    fn end(&mut self, got: Option<Got>, input: impl Fn(&Got) -> CallInput) -> Result<(), TestCaseError> {
        let Some(got) = got else { return Ok(()) };
        self.open.remove(&got.attempt);
        let input = input(&got);
        if input == got.done() {
            for &pair in &got.pairs {
                prop_assert!(self.answered.insert(pair), "{:?} is answered twice", pair);
            }
        }
        self.over.push(got);
        self.feed(input)
    }

    fn feed(&mut self, input: CallInput) -> Result<(), TestCaseError> {
        let was_over = self.is_over();
        for effect in self.home.handle(input) {
            prop_assert!(!self.is_over(), "an effect after the end: {:?}", effect);
            if let Some(got) = Got::of(&effect) {
                self.attempts += 1;
                prop_assert!(self.home.replicas.is_live(got.node));
                for (_, expert) in &got.pairs {
                    prop_assert!(self.home.replicas.of(*expert).any(|(node, _)| node == got.node));
                }
                self.open.insert(got.attempt, got);
                continue;
            }
            match effect {
                CallEffect::ArmSecondChance { chance, .. } => {
                    self.pauses += 1;
                    self.chances.push(chance);
                }
                CallEffect::Finish(outcome) => {
                    self.check_missing(&outcome)?;
                    self.outcomes.push(outcome);
                }
                _ => {}
            }
        }
        if self.is_over() {
            self.open.clear();
        }
        if was_over {
            prop_assert!(self.outcomes.len() == 1);
        }
        self.check()
    }

    /// A call without a host for some experts says that they may come back exactly where each is placed on a node that does not fail
    /// for good.
    fn check_missing(&self, outcome: &Result<ExpertOutputs, CallError>) -> Result<(), TestCaseError> {
        let (missing, failures, is_retryable) = match outcome {
            Err(CallError::Missing { missing, failures }) => (missing, failures, false),
            Err(CallError::Unavailable { missing, failures }) => (missing, failures, true),
            _ => return Ok(()),
        };
        prop_assert!(!missing.experts.is_empty());
        let fails_for_good = |node| failures.iter().any(|(failed, why)| *failed == node && !why.is_passing());
        let is_expected = |expert: &ExpertId| self.home.replicas.placed(expert.index).any(|node| !fails_for_good(node));
        prop_assert_eq!(is_retryable, missing.experts.keys().all(is_expected));
        Ok(())
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let mut rows = BTreeMap::<NodeId, usize>::new();
        let mut pairs = self.answered.clone();
        for got in self.open.values() {
            *rows.entry(got.node).or_default() += got.pairs.len();
            for &pair in &got.pairs {
                prop_assert!(pairs.insert(pair), "{:?} is in two attempts", pair);
            }
        }
        for node in (2..6).map(NodeId) {
            let expected = rows.get(&node).copied().unwrap_or(0);
            prop_assert_eq!(self.home.hosts.rows_in_flight(node), expected, "in flight at {}", node);
        }
        prop_assert!(self.pauses <= SECOND_CHANCES);
        // An attempt that does not answer excludes its host, or one expert there, until the next second chance.
        let (experts, nodes) = (6, 5);
        let attempts_max = (SECOND_CHANCES as usize + 1) * experts * nodes * (experts + 1);
        prop_assert!(self.attempts <= attempts_max, "{} attempts", self.attempts);
        Ok(())
    }

    fn take(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Done(pick) => self.end(self.pick(pick), Got::done),
            Step::NotHeld(pick, expert) => self.end(self.pick(pick), |got| {
                // One of those asked for, or of a peer sometimes another.
                let asked = got.pairs[usize::from(expert) % got.pairs.len()].1;
                got.not_held(if expert == 6 && got.node != HOME { 99 } else { asked })
            }),
            Step::Broken(pick) => self.end(self.peer(pick), Got::broken),
            Step::Late(pick) => self.end(self.peer(pick), Got::late),
            Step::Refused(pick) => self.end(self.peer(pick), |got| got.reply(&ReplyHeader::Refused("no".into()), &[])),
            Step::Garbage(pick) => self.end(self.peer(pick), |got| {
                let frame =
                    Frame::new(vec![pick as u8; 3], got.pairs.iter().map(|(_, e)| *e as u8).collect::<Vec<_>>());
                CallInput::Reply { attempt: got.attempt, frame }
            }),
            Step::Stale(pick) => {
                let Some(got) = self.over.get(pick % self.over.len().max(1)).cloned() else { return Ok(()) };
                let inputs = [got.done(), got.broken(), got.late(), got.not_held(0)];
                self.feed(inputs[pick % inputs.len()].clone())
            }
            Step::ChanceDue => match self.chances.last().copied() {
                Some(chance) => self.feed(CallInput::SecondChanceDue { chance }),
                None => Ok(()),
            },
            Step::Liveness(node) => {
                let (node, live) = (NodeId(node), &mut self.home.replicas.live);
                if live.remove(&node).is_none() {
                    live.insert(node, None);
                }
                self.feed(self.home.mesh_changed())
            }
            Step::Placement(node, expert) => {
                let nodes = self.home.replicas.holders.entry(expert).or_default();
                if nodes.remove(&NodeId(node)).is_none() {
                    nodes.insert(NodeId(node), Precision::Q8);
                }
                self.feed(self.home.mesh_changed())
            }
            Step::Wait(ms) => {
                self.home.now += Duration::from_millis(ms);
                Ok(())
            }
            Step::Cancel => {
                self.cancelled |= !self.is_over();
                self.feed(CallInput::Cancelled)
            }
        }
    }

    /// An open attempt at a peer.
    fn peer(&self, pick: usize) -> Option<Got> {
        self.pick(pick).filter(|got| got.node != HOME)
    }

    /// Every open attempt gets an outcome, and every pause ends, until the call does.
    fn drain(&mut self, outcomes: &[bool]) -> Result<(), TestCaseError> {
        for answers in outcomes.iter().copied().cycle().take(5000) {
            if self.is_over() {
                return Ok(());
            }
            match self.pick(0) {
                Some(got) if answers => self.end(Some(got), Got::done)?,
                Some(got) if got.node == HOME => self.end(Some(got), |got| got.not_held(got.pairs[0].1))?,
                Some(got) => self.end(Some(got), Got::late)?,
                None => self.take(Step::ChanceDue)?,
            }
        }
        prop_assert!(false, "the call does not end");
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_call_finishes_exactly_once_with_every_pair_answered_once(
        holders in proptest::collection::vec(proptest::collection::btree_map(1u64..6, 0usize..3, 0..4), 6),
        routes in proptest::collection::vec(proptest::collection::btree_set(0u16..6, 0..4), 0..6),
        down in proptest::collection::btree_set(2u64..6, 0..2),
        steps in proptest::collection::vec(step(), 0..60),
        outcomes in proptest::collection::vec(any::<bool>(), 1..20),
        seed in any::<u64>(),
    ) {
        let node = |(&node, &precision): (&u64, &usize)| (NodeId(node), Precision::ALL[precision]);
        let replicas = LayerReplicas {
            home: HOME,
            layer: LAYER,
            holders: holders.iter().zip(0..).map(|(nodes, expert)| (expert, nodes.iter().map(node).collect())).collect(),
            live: (2..6).filter(|node| !down.contains(node)).map(|node| (NodeId(node), None)).collect(),
            ..LayerReplicas::default()
        };
        let routes: Vec<Vec<u16>> = routes.into_iter().map(|experts| experts.into_iter().collect()).collect();
        let call = layer_call(&routes.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let slots = call.slots() as u32;
        let mut history = History::new(Home::new(call, replicas, seed));
        history.feed(CallInput::Start)?;
        for step in steps {
            history.take(step)?;
        }
        history.drain(&outcomes)?;
        prop_assert_eq!(history.outcomes.len(), 1);
        for node in (2..6).map(NodeId) {
            prop_assert_eq!(history.home.hosts.rows_in_flight(node), 0);
        }
        match history.outcomes.pop() {
            Some(Ok(outputs)) => {
                prop_assert_eq!(outputs.values, history.home.wanted);
                let mut answered: Vec<_> = outputs.shares.into_iter().flat_map(|share| share.slots).collect();
                answered.sort_unstable();
                prop_assert_eq!(answered, (0..slots).collect::<Vec<_>>());
            }
            Some(Err(CallError::Missing { .. } | CallError::Unavailable { .. })) => {}
            Some(Err(CallError::Cancelled)) => prop_assert!(history.cancelled),
            other => prop_assert!(false, "{:?}", other),
        }
    }
}
