//! Every command by the right author and by the wrong ones.

use super::*;

/// One command of each kind that has an outcome other than a refusal in the state of [`placed`], about node 2 where it is
/// about a node.
fn one_of_each() -> Vec<Command> {
    let node = NodeId(2);
    let epoch = Epoch(1);
    let all = vec![
        Command::CreateMesh { mesh: MeshId([9; 16]), member: info(1) },
        join_of(4, 8, 0),
        Command::Readdress { node, name: "renamed".into(), addresses: vec!["/elsewhere".into()] },
        open(9, 1),
        Command::Leaving { node, leaving: true },
        Command::Leave { node },
        Command::Forget { node },
        Command::Readmit { node },
        register_of(2, "other"),
        Command::Place { expect: epoch, model: ModelId([1; 32]), replicas: assignment("0.0: 1 3") },
        Command::Precisions { bounds: Bounds::only(Precision::Q8) },
        Command::Ready { node, epoch, experts: [(ExpertId::new(0, 1), Precision::Exact)].into(), trunk: true },
        Command::NotReady { node, experts: vec![ExpertId::new(0, 0)] },
    ];
    let names: BTreeSet<_> = all.iter().map(Command::name).collect();
    assert_eq!(names.len(), all.len());
    // One more command has to be listed here before this compiles.
    for command in &all {
        match command {
            Command::CreateMesh { .. }
            | Command::Join { .. }
            | Command::Readdress { .. }
            | Command::Invite { .. }
            | Command::Leaving { .. }
            | Command::Leave { .. }
            | Command::Forget { .. }
            | Command::Readmit { .. }
            | Command::RegisterModel { .. }
            | Command::Place { .. }
            | Command::Precisions { .. }
            | Command::Ready { .. }
            | Command::NotReady { .. } => {}
        }
    }
    all
}

/// Three members, an open invite, and a placement on nodes 1 and 2, where 2 serves one of its two experts.
fn placed() -> State {
    let mut state = three();
    apply(&mut state, &open(8, 1));
    assert_eq!(apply(&mut state, &place_of(0, "0.0: 1 2 | 0.1: 2")), Outcome::Epoch(Epoch(1)));
    assert_eq!(apply(&mut state, &ready_of(2, 1, &["0.0"], false)), Outcome::Done);
    state
}

#[test]
fn every_command_is_accepted_of_the_right_author_and_refused_of_every_other() {
    let leader = NodeId(1);
    for command in one_of_each() {
        let before = if matches!(command, Command::CreateMesh { .. }) { State::default() } else { placed() };
        for author in (1..=4).map(NodeId) {
            // Node 4 is nobody yet.
            let expected = match authority(&command) {
                Authority::Founder | Authority::Leader if author != leader => {
                    Some(Refusal::NotTheLeader { author, leader })
                }
                Authority::Node(node) if author != node => Some(Refusal::SpeaksForAnother { author, node }),
                Authority::Member if author == NodeId(4) => Some(Refusal::NotAMember(author)),
                _ => None,
            };
            let mut state = before.clone();
            let outcome = super::super::apply(&mut state, &command, Some(Origin { author, leader }));
            match expected {
                Some(refusal) => {
                    assert_eq!(outcome, Outcome::Refused(refusal), "{} by node {author}", command.name());
                    assert_eq!(state, before, "a refusal changes nothing");
                }
                None => {
                    assert!(
                        !matches!(outcome, Outcome::Refused(_)),
                        "{} by node {author}: {outcome:?}",
                        command.name()
                    );
                    assert_ne!(state, before, "{} by node {author}", command.name());
                }
            }
        }
    }
}

#[test]
fn the_authority_of_each_command_is_pinned() {
    let node = Authority::Node(NodeId(2));
    let expected = [
        ("create-mesh", Authority::Founder),
        ("join", Authority::Member),
        ("readdress", node),
        ("invite", Authority::Member),
        ("leaving", node),
        ("leave", node),
        ("forget", Authority::Member),
        ("readmit", node),
        ("register-model", Authority::Member),
        ("place", Authority::Leader),
        ("precisions", Authority::Member),
        ("ready", node),
        ("not-ready", node),
    ];
    let found: Vec<_> = one_of_each().iter().map(|command| (command.name(), authority(command))).collect();
    assert_eq!(found, expected);
}

#[test]
fn a_plan_of_an_earlier_leader_is_refused() {
    let mut state = placed();
    // Node 1 planned while it led; when its plan reached the log node 3 did.
    let origin = Origin { author: NodeId(1), leader: NodeId(3) };
    let before = state.clone();
    let outcome = super::super::apply(&mut state, &place_of(1, "0.0: 3"), Some(origin));
    assert_eq!(outcome, Outcome::Refused(Refusal::NotTheLeader { author: NodeId(1), leader: NodeId(3) }));
    assert_eq!(state, before);
}

#[test]
fn whoever_has_left_says_nothing_more() {
    let mut state = placed();
    let left = Origin { author: NodeId(3), leader: NodeId(1) };
    apply(&mut state, &Command::Leave { node: NodeId(3) });
    for command in [open(9, 1), Command::Leaving { node: NodeId(3), leaving: false }] {
        let before = state.clone();
        let outcome = super::super::apply(&mut state, &command, Some(left));
        assert_eq!(outcome, Outcome::Refused(Refusal::NotAMember(NodeId(3))), "{}", command.name());
        assert_eq!(state, before);
    }
    // A leader that left goes on for a moment; it does not plan any more.
    let left_leader = Origin { author: NodeId(3), leader: NodeId(3) };
    let outcome = super::super::apply(&mut state, &place_of(1, "0.0: 1"), Some(left_leader));
    assert_eq!(outcome, Outcome::Refused(Refusal::NotAMember(NodeId(3))));
}

#[test]
fn an_entry_of_a_former_build_is_applied_as_that_build_did() {
    for command in one_of_each() {
        let mut state = if matches!(command, Command::CreateMesh { .. }) { State::default() } else { placed() };
        let outcome = super::super::apply(&mut state, &command, None);
        assert!(!matches!(outcome, Outcome::Refused(_)), "{}: {outcome:?}", command.name());
    }
}

#[test]
fn members_and_models_are_bounded() {
    let mut state = three();
    apply(&mut state, &open(8, u32::MAX));
    let numbered = |number: usize| Command::Join {
        peer: Peer(number.to_be_bytes().to_vec()),
        name: String::new(),
        addresses: Vec::new(),
        token: TokenHash([8; 32]),
        now_ms: 0,
        anew: false,
    };
    while state.members.len() < MEMBERS_MAX {
        let newcomer = numbered(state.members.len());
        assert!(matches!(apply(&mut state, &newcomer), Outcome::Joined { .. }));
    }
    let too_many = |what: &str, limit: usize| Refusal::TooLarge {
        what: what.into(),
        actual: limit as u64 + 1,
        limit: limit as u64,
    };
    refused(&mut state, numbered(MEMBERS_MAX), too_many("members of the mesh", MEMBERS_MAX));
    let known = numbered(MEMBERS_MAX - 1);
    assert!(matches!(apply(&mut state, &known), Outcome::Joined { .. }), "a member that asks again is no newcomer");

    for id in 2..=MODELS_MAX as u8 {
        assert_eq!(apply(&mut state, &register_of(id, &format!("m{id}"))), Outcome::Done);
    }
    refused(&mut state, register_of(99, "m99"), too_many("models of the mesh", MODELS_MAX));
    assert_eq!(apply(&mut state, &register_of(1, "tiny")), Outcome::Done, "one that is registered already");
}
