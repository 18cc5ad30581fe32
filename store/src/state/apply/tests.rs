//! Each command's rules as small stories; the invariants over random histories are beside them.

mod authors;
mod histories;

use super::*;
use crate::precision::Bounds;
use crate::state::Loss;

fn info(peer: u8) -> MemberInfo {
    MemberInfo { peer: Peer(vec![peer]), name: format!("n{peer}"), addresses: vec![format!("/{peer}")] }
}

fn join_of(peer: u8, token: u8, now_ms: u64) -> Command {
    let MemberInfo { peer, name, addresses } = info(peer);
    Command::Join { peer, name, addresses, token: TokenHash([token; 32]), now_ms, anew: false }
}

fn open(token: u8, uses: u32) -> Command {
    Command::Invite { token: TokenHash([token; 32]), uses, expires_at_ms: 1_000 }
}

fn model(name: &str) -> Model {
    Model {
        name: name.into(),
        manifest_bytes: 10,
        popularity: vec![vec![1, 1], vec![1, 1]],
        popularity_text: "test".into(),
        sensitivity: Vec::new(),
    }
}

fn register_of(id: u8, name: &str) -> Command {
    Command::RegisterModel { id: ModelId([id; 32]), model: model(name) }
}

/// Reads "0.0: 1 2 | 0.1: 3".
fn assignment(text: &str) -> Assignment {
    let mut result = Assignment::new();
    for part in text.split('|').filter(|part| !part.trim().is_empty()) {
        let (expert, nodes) = part.trim().split_once(':').unwrap();
        let nodes = nodes.split_whitespace().map(|n| (NodeId(n.parse().unwrap()), Precision::Exact));
        result.insert(expert.parse().unwrap(), nodes.collect());
    }
    result
}

fn place_of(expect: u64, text: &str) -> Command {
    Command::Place { expect: Epoch(expect), model: ModelId([1; 32]), replicas: assignment(text) }
}

fn ready_of(node: u64, epoch: u64, experts: &[&str], trunk: bool) -> Command {
    let experts = experts.iter().map(|e| (e.parse().unwrap(), Precision::Exact)).collect();
    Command::Ready { node: NodeId(node), epoch: Epoch(epoch), experts, trunk }
}

/// An author that may give the command, where node 1 leads.
fn rightful(command: &Command) -> Origin {
    let author = match authority(command) {
        Authority::Node(node) => node,
        Authority::Founder | Authority::Leader | Authority::Member => NodeId(1),
    };
    Origin { author, leader: NodeId(1) }
}

/// Applies a command by a rightful author.
fn apply(state: &mut State, command: &Command) -> Outcome {
    super::apply(state, command, Some(rightful(command)))
}

/// Three members, one model.
fn three() -> State {
    let mut state = State::default();
    let create = Command::CreateMesh { mesh: MeshId([9; 16]), member: info(1) };
    assert_eq!(apply(&mut state, &create), Outcome::Joined { node: NodeId(1) });
    assert_eq!(apply(&mut state, &open(7, 2)), Outcome::Done);
    assert_eq!(apply(&mut state, &join_of(2, 7, 0)), Outcome::Joined { node: NodeId(2) });
    assert_eq!(apply(&mut state, &join_of(3, 7, 0)), Outcome::Joined { node: NodeId(3) });
    assert_eq!(apply(&mut state, &register_of(1, "tiny")), Outcome::Done);
    state
}

#[track_caller]
fn refused(state: &mut State, command: Command, expected: Refusal) {
    let before = state.clone();
    assert_eq!(apply(state, &command), Outcome::Refused(expected));
    assert_eq!(*state, before, "a refusal changes nothing");
}

#[test]
fn a_mesh_is_created_once() {
    let mut state = three();
    let again = Command::CreateMesh { mesh: MeshId([8; 16]), member: info(8) };
    refused(&mut state, again, Refusal::MeshExists(MeshId([9; 16])));
}

#[test]
fn invites_are_refused_by_name() {
    let mut state = three();
    refused(&mut state, join_of(4, 8, 0), Refusal::UnknownInvite);
    refused(&mut state, join_of(4, 7, 0), Refusal::UsedUpInvite);
    apply(&mut state, &open(8, 1));
    refused(&mut state, join_of(4, 8, 3_500), Refusal::ExpiredInvite { late_ms: 2_500 });
    assert_eq!(apply(&mut state, &join_of(4, 8, 999)), Outcome::Joined { node: NodeId(4) });
}

#[test]
fn a_member_that_joins_again_is_itself_and_uses_nothing_up() {
    let mut state = three();
    apply(&mut state, &open(8, 1));
    let again = Command::Join {
        peer: Peer(vec![2]),
        name: "renamed".into(),
        addresses: vec!["/elsewhere".into()],
        token: TokenHash([0; 32]),
        now_ms: u64::MAX,
        anew: false,
    };
    let before = state.clone();
    assert_eq!(apply(&mut state, &again), Outcome::Joined { node: NodeId(2) });
    assert_eq!(state, before, "what node 2 says of itself is its own word");

    // By its own word, and by that of a former build, which did not ask.
    for origin in [Some(Origin { author: NodeId(2), leader: NodeId(1) }), None] {
        let mut state = before.clone();
        assert_eq!(super::apply(&mut state, &again, origin), Outcome::Joined { node: NodeId(2) });
        assert_eq!(state.members[&NodeId(2)].addresses, ["/elsewhere"]);
        assert_eq!(state.members[&NodeId(2)].name, "renamed");
        assert_eq!(state.invites[&TokenHash([8; 32])].uses_left, 1);
    }
}

#[test]
fn a_member_is_readmitted_under_a_new_id_each_time() {
    let mut state = three();
    let readmit = |node| Command::Readmit { node: NodeId(node) };
    let by = |author| Some(Origin { author: NodeId(author), leader: NodeId(1) });
    assert_eq!(super::apply(&mut state, &readmit(2), by(2)), Outcome::Joined { node: NodeId(4) });
    assert_eq!(state.members.keys().copied().collect::<Vec<_>>(), [NodeId(1), NodeId(3), NodeId(4)]);
    assert_eq!(state.node_of(&Peer(vec![2])), Some(NodeId(4)));
    // The same command again, late, is not about what the node is now. It is told what that is.
    let refusal = Refusal::SpeaksForAnother { author: NodeId(4), node: NodeId(2) };
    assert_eq!(super::apply(&mut state, &readmit(2), by(4)), Outcome::Refused(refusal));
    assert_eq!(super::apply(&mut state, &readmit(4), by(4)), Outcome::Joined { node: NodeId(5) });
}

#[test]
fn a_member_that_has_lost_its_log_comes_back_under_a_new_id() {
    let mut state = three();
    let Command::Join { peer, name, addresses, token, now_ms, .. } = join_of(2, 8, 0) else { unreachable!() };
    let anew = Command::Join { peer, name, addresses, token, now_ms, anew: true };
    refused(&mut state, anew.clone(), Refusal::UnknownInvite);
    apply(&mut state, &open(8, 2));
    assert_eq!(apply(&mut state, &anew), Outcome::Joined { node: NodeId(4) });
    assert_eq!(state.members.keys().copied().collect::<Vec<_>>(), [NodeId(1), NodeId(3), NodeId(4)]);
    assert_eq!(state.node_of(&Peer(vec![2])), Some(NodeId(4)));
    // Each time it asks it may have voted under the id that it got before.
    assert_eq!(apply(&mut state, &anew), Outcome::Joined { node: NodeId(5) });
    refused(&mut state, anew, Refusal::UsedUpInvite);
}

#[test]
fn node_ids_are_not_reused() {
    let mut state = three();
    assert_eq!(apply(&mut state, &Command::Leave { node: NodeId(3) }), Outcome::Done);
    apply(&mut state, &open(8, 1));
    assert_eq!(apply(&mut state, &join_of(3, 8, 0)), Outcome::Joined { node: NodeId(4) });
    refused(&mut state, Command::Leaving { node: NodeId(3), leaving: true }, Refusal::NotAMember(NodeId(3)));
}

#[test]
fn the_last_member_stays() {
    let mut state = three();
    apply(&mut state, &Command::Leave { node: NodeId(1) });
    apply(&mut state, &Command::Leave { node: NodeId(3) });
    refused(&mut state, Command::Leave { node: NodeId(2) }, Refusal::LastMember(NodeId(2)));
}

#[test]
fn a_model_keeps_its_name() {
    let mut state = three();
    assert_eq!(apply(&mut state, &register_of(1, "tiny")), Outcome::Done);
    let id = ModelId([1; 32]);
    refused(&mut state, register_of(2, "tiny"), Refusal::NameTaken { name: "tiny".into(), id });
    refused(&mut state, register_of(1, "other"), Refusal::RegisteredAs { id, name: "tiny".into() });
    assert_eq!(apply(&mut state, &register_of(2, "other")), Outcome::Done);
}

#[test]
fn placements_compare_and_set_the_epoch() {
    let mut state = three();
    assert_eq!(apply(&mut state, &place_of(0, "0.0: 1 2")), Outcome::Epoch(Epoch(1)));
    let stale = Refusal::StaleEpoch { expected: Epoch(0), actual: Epoch(1) };
    refused(&mut state, place_of(0, "0.0: 1 2"), stale);
    refused(&mut state, place_of(1, "0.0: 1 9"), Refusal::NotAMember(NodeId(9)));
    refused(&mut state, place_of(1, "2.0: 1"), Refusal::UnknownExpert(ExpertId::new(2, 0)));
    let unknown = Command::Place { expect: Epoch(1), model: ModelId([5; 32]), replicas: Assignment::new() };
    refused(&mut state, unknown, Refusal::UnknownModel(ModelId([5; 32])));
    let placement = state.placement.unwrap();
    assert_eq!(placement.replicas.len(), 4, "experts nobody was given are known to be missing");
    assert_eq!(placement.missing().len(), 4);
}

#[test]
fn readiness_survives_where_nothing_changed() {
    let mut state = three();
    apply(&mut state, &place_of(0, "0.0: 1 2 | 0.1: 2 3"));
    apply(&mut state, &ready_of(1, 1, &["0.0", "0.1"], true));
    apply(&mut state, &ready_of(2, 1, &["0.0", "0.1"], false));
    assert_eq!(apply(&mut state, &place_of(1, "0.0: 1 3 | 0.1: 2 3")), Outcome::Epoch(Epoch(2)));
    let placement = state.placement.clone().unwrap();
    let ready = |expert: &str| placement.hosts(expert.parse().unwrap()).map(|h| h.0.0).collect::<Vec<_>>();
    assert_eq!((ready("0.0"), ready("0.1")), (vec![1], vec![2]));
    assert_eq!(placement.trunk_ready, BTreeSet::from([NodeId(1)]));
}

#[test]
fn a_replica_serves_at_the_precision_it_has_until_the_wanted_one_is_there() {
    let mut state = three();
    apply(&mut state, &place_of(0, "0.0: 1"));
    let expert = ExpertId::new(0, 0);
    let claim = |state: &mut State, precision| {
        let epoch = state.epoch();
        apply(state, &Command::Ready { node: NodeId(1), epoch, experts: [(expert, precision)].into(), trunk: false })
    };
    assert_eq!(claim(&mut state, Precision::Q4), Outcome::Done);
    let replica = |state: &State| state.placement.as_ref().unwrap().replicas[&expert][&NodeId(1)];
    assert_eq!(replica(&state), Replica { precision: Precision::Exact, ready: Some(Precision::Q4) });

    let replicas = [(expert, [(NodeId(1), Precision::Q8)].into())].into();
    apply(&mut state, &Command::Place { expect: Epoch(1), model: ModelId([1; 32]), replicas });
    assert_eq!(replica(&state), Replica { precision: Precision::Q8, ready: Some(Precision::Q4) });
    assert_eq!(state.placement.as_ref().unwrap().missing().len(), 3, "the other experts, which nobody has");
    claim(&mut state, Precision::Q8);
    assert!(replica(&state).is_settled());
}

#[test]
fn what_was_measured_has_the_shape_of_the_model() {
    let mut state = three();
    let register = |sensitivity| Command::RegisterModel {
        id: ModelId([2; 32]),
        model: Model { sensitivity, ..model("measured") },
    };
    let loss = |q4, q8| Loss { q4, q8 };
    for bad in [
        vec![vec![loss(0.1, 0.0); 2]],
        vec![vec![loss(0.1, 0.0); 2], vec![loss(0.1, f32::NAN); 2]],
        vec![vec![loss(-0.1, 0.0); 2], vec![loss(0.1, 0.0); 2]],
    ] {
        let before = state.clone();
        let outcome = apply(&mut state, &register(bad));
        assert!(matches!(outcome, Outcome::Refused(Refusal::Sensitivity(_))), "{outcome:?}");
        assert_eq!(state, before);
    }
    assert_eq!(apply(&mut state, &register(vec![vec![loss(0.1, 0.0); 2]; 2])), Outcome::Done);
}

#[test]
fn the_mesh_remembers_which_precisions_it_wants() {
    let mut state = three();
    assert_eq!(state.precisions, Bounds::AUTO);
    let bounds = Bounds::only(Precision::Q8);
    assert_eq!(apply(&mut state, &Command::Precisions { bounds }), Outcome::Done);
    assert_eq!((state.precisions, state.epoch()), (bounds, Epoch(0)));
}

#[test]
fn stale_and_foreign_reports_are_harmless() {
    let mut state = three();
    let nothing = Refusal::StaleEpoch { expected: Epoch(1), actual: Epoch(0) };
    refused(&mut state, ready_of(2, 1, &["0.0"], true), nothing);
    apply(&mut state, &place_of(0, "0.0: 1"));
    let late = Refusal::StaleEpoch { expected: Epoch(0), actual: Epoch(1) };
    refused(&mut state, ready_of(1, 0, &["0.0"], true), late);
    let before = state.clone();
    assert_eq!(apply(&mut state, &ready_of(2, 1, &["0.0", "7.7"], false)), Outcome::Done);
    assert_eq!(state, before, "node 2 was not assigned any of these");
}

#[test]
fn what_is_lost_is_named() {
    let mut state = three();
    apply(&mut state, &place_of(0, "0.0: 1 | 0.1: 1 2 | 1.0: 2 | 1.1: 2 3"));
    for node in 1..=3 {
        apply(&mut state, &ready_of(node, 1, &["0.0", "0.1", "1.0", "1.1"], true));
    }
    assert_eq!(state.placement.as_ref().unwrap().coverage(), 1.0);
    let corrupt = Command::NotReady { node: NodeId(2), experts: vec![ExpertId::new(1, 0)] };
    assert_eq!(apply(&mut state, &corrupt), Outcome::Done);
    assert_eq!(state.placement.as_ref().unwrap().missing(), [ExpertId::new(1, 0)]);
    assert_eq!(apply(&mut state, &Command::Leave { node: NodeId(1) }), Outcome::Epoch(Epoch(2)));
    let placement = state.placement.unwrap();
    assert_eq!(placement.missing(), [ExpertId::new(0, 0), ExpertId::new(1, 0)]);
    assert!(!placement.trunk_ready.contains(&NodeId(1)));
}

#[test]
fn oversized_parts_are_refused() {
    let mut state = three();
    let long = Command::Readdress { node: NodeId(1), name: "x".repeat(129), addresses: vec![] };
    let what = "bytes of the node's name".to_string();
    refused(&mut state, long, Refusal::TooLarge { what, actual: 129, limit: 128 });
    for token in 0..2_000u32 {
        let mut hash = [0; 32];
        hash[..4].copy_from_slice(&token.to_be_bytes());
        apply(&mut state, &Command::Invite { token: TokenHash(hash), uses: 1, expires_at_ms: u64::from(token) });
    }
    assert_eq!(state.invites.len(), INVITES_MAX);
    let earliest = state.invites.values().map(|i| i.expires_at_ms).min();
    // One more is the invite of the first three, which ends at 1000.
    assert_eq!(earliest, Some(2_001 - INVITES_MAX as u64));
}

#[test]
fn every_refusal_says_what_to_do() {
    let id = ModelId([1; 32]);
    for refusal in [
        Refusal::MeshExists(MeshId([1; 16])),
        Refusal::UnknownInvite,
        Refusal::ExpiredInvite { late_ms: 5_000 },
        Refusal::UsedUpInvite,
        Refusal::StaleEpoch { expected: Epoch(1), actual: Epoch(2) },
        Refusal::SpeaksForAnother { author: NodeId(1), node: NodeId(2) },
        Refusal::NotTheLeader { author: NodeId(1), leader: NodeId(2) },
        Refusal::NotAMember(NodeId(1)),
        Refusal::LastMember(NodeId(1)),
        Refusal::UnknownModel(id),
        Refusal::NameTaken { name: "a".into(), id },
        Refusal::RegisteredAs { id, name: "a".into() },
        Refusal::UnknownExpert(ExpertId::new(0, 1)),
        Refusal::Sensitivity("x".into()),
        Refusal::TooLarge { what: "x".into(), actual: 2, limit: 1 },
    ] {
        assert!(!refusal.to_string().is_empty() && !refusal.remedy().is_empty());
    }
}
