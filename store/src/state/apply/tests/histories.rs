//! The invariants of the replicated state over random histories, and commands as bytes.

use super::*;
use crate::cbor;
use proptest::prelude::*;

fn any_node() -> impl Strategy<Value = NodeId> {
    (0u64..6).prop_map(NodeId)
}

fn any_precision() -> impl Strategy<Value = Precision> {
    prop::sample::select(Precision::ALL.as_slice())
}

fn any_experts() -> impl Strategy<Value = Vec<ExpertId>> {
    prop::collection::vec((0u16..3, 0u16..3).prop_map(|(l, i)| ExpertId::new(l, i)), 0..5)
}

/// Commands drawn from a small world, so that they often meet.
fn any_command() -> impl Strategy<Value = Command> {
    let assignment = prop::collection::btree_map(
        (0u16..2, 0u16..2).prop_map(|(l, i)| ExpertId::new(l, i)),
        prop::collection::btree_map(any_node(), any_precision(), 0..3),
        0..4,
    );
    prop_oneof![
        1 => (any::<u8>(), 0u8..8).prop_map(|(mesh, peer)| Command::CreateMesh {
            mesh: MeshId([mesh; 16]),
            member: info(peer),
        }),
        4 => (0u8..8, 0u8..3, 0u64..2_000).prop_map(|(peer, token, now)| join_of(peer, token, now)),
        2 => (0u8..3, 0u32..3).prop_map(|(token, uses)| open(token, uses)),
        1 => (any_node(), any::<bool>()).prop_map(|(node, leaving)| Command::Leaving { node, leaving }),
        2 => any_node().prop_map(|node| Command::Leave { node }),
        1 => (0u8..3, "[ab]").prop_map(|(id, name)| register_of(id, &name)),
        4 => (0u64..4, 0u8..3, assignment).prop_map(|(expect, model, replicas)| Command::Place {
            expect: Epoch(expect),
            model: ModelId([model; 32]),
            replicas,
        }),
        4 => (any_node(), 0u64..4, any_experts(), any_precision(), any::<bool>()).prop_map(
            |(node, epoch, experts, precision, trunk)| {
                let experts = experts.into_iter().map(|expert| (expert, precision)).collect();
                Command::Ready { node, epoch: Epoch(epoch), experts, trunk }
            }
        ),
        1 => any_precision().prop_map(|precision| Command::Precisions { bounds: Bounds::only(precision) }),
        1 => (any_node(), any_experts()).prop_map(|(node, experts)| Command::NotReady { node, experts }),
    ]
}

/// Anybody as the author, under any leader; without either, as a former build wrote it; and now and then a rightful author,
/// so that histories get somewhere.
fn any_origin() -> impl Strategy<Value = Option<Option<Origin>>> {
    prop_oneof![
        5 => Just(None),
        4 => (any_node(), any_node()).prop_map(|(author, leader)| Some(Some(Origin { author, leader }))),
        1 => Just(Some(None)),
    ]
}

/// What a node alone may say of itself.
fn own_word(state: &State, node: NodeId) -> impl PartialEq + std::fmt::Debug + use<> {
    let placement = state.placement.as_ref();
    let ready = placement.map(|placement| {
        let ready = placement.of(node).filter_map(|(expert, replica)| Some((expert, replica.ready?)));
        ready.collect::<BTreeMap<_, _>>()
    });
    (state.members.get(&node).cloned(), ready, placement.map(|placement| placement.trunk_ready.contains(&node)))
}

/// Where experts are to be, and at which precision.
fn wanted(state: &State) -> Option<(ModelId, Assignment)> {
    state.placement.as_ref().map(|placement| {
        let hosts = |hosts: &BTreeMap<NodeId, Replica>| hosts.iter().map(|(node, r)| (*node, r.precision)).collect();
        (placement.model, placement.replicas.iter().map(|(expert, all)| (*expert, hosts(all))).collect())
    })
}

/// Whoever was not the author has the same word as before, and nobody but the leader has placed anything.
fn check_authors(before: &State, after: &State, command: &Command, origin: Origin) {
    let Origin { author, leader } = origin;
    let placed = matches!(command, Command::Place { .. });
    for node in before.members.keys().filter(|node| **node != author) {
        // A new placement drops what it does not place; that is the leader's to say.
        assert!(placed || own_word(before, *node) == own_word(after, *node), "node {author} spoke for node {node}");
        assert!(after.members.contains_key(node), "node {author} removed node {node}");
    }
    if wanted(before) != wanted(after) {
        let left = *command == Command::Leave { node: author };
        assert!(author == leader && placed || left, "node {author} placed, but node {leader} leads");
    }
}

fn check_invariants(before: &State, after: &State, outcome: &Outcome, ever: &mut BTreeSet<NodeId>) {
    assert!(after.epoch() >= before.epoch(), "the epoch only grows");
    let moved = |s: &State| {
        s.placement.as_ref().map(|p| {
            let hosts =
                p.replicas.iter().map(|(e, h)| (*e, h.iter().map(|(n, r)| (*n, r.precision)).collect::<Vec<_>>()));
            (p.model, hosts.collect::<Vec<_>>())
        })
    };
    if moved(before) != moved(after) {
        assert!(after.epoch() > before.epoch(), "another placement is another epoch");
    }
    for node in after.members.keys().filter(|node| !before.members.contains_key(node)) {
        assert!(ever.insert(*node), "node id {node} was used before");
        assert_eq!(*outcome, Outcome::Joined { node: *node });
    }
    if let Some(placement) = &after.placement {
        let hosts = placement.replicas.values().flat_map(|hosts| hosts.keys());
        for node in hosts.chain(&placement.trunk_ready) {
            assert!(after.members.contains_key(node), "replica on {node}, which is not a member");
        }
        assert!(after.models.contains_key(&placement.model));
    }
    let peers: BTreeSet<_> = after.members.values().map(|member| &member.peer).collect();
    assert_eq!(peers.len(), after.members.len(), "one member per peer");
    if matches!(outcome, Outcome::Refused(_)) {
        assert_eq!(before, after, "a refusal changes nothing");
    }
}

proptest! {
    #[test]
    fn invariants_hold_over_any_history(
        commands in prop::collection::vec((any_command(), any_origin()), 0..60),
    ) {
        let mut state = State::default();
        let mut ever = BTreeSet::new();
        let start = [
            Command::CreateMesh { mesh: MeshId([1; 16]), member: info(0) },
            open(0, 3),
            register_of(1, "a"),
        ];
        let start = start.into_iter().map(|command| (command, None));
        for (command, origin) in start.chain(commands) {
            let before = state.clone();
            let origin = origin.unwrap_or_else(|| Some(rightful(&command)));
            let outcome = super::super::apply(&mut state, &command, origin);
            check_invariants(&before, &state, &outcome, &mut ever);
            if let Some(origin) = origin {
                check_authors(&before, &state, &command, origin);
            }
        }
        let bytes = cbor::to_vec(&state).unwrap();
        prop_assert_eq!(cbor::from_slice::<State>(&bytes, bytes.len()).unwrap(), state);
    }

    #[test]
    fn commands_survive_the_wire(command in any_command()) {
        let bytes = cbor::to_vec(&command).unwrap();
        prop_assert_eq!(cbor::from_slice::<Command>(&bytes, bytes.len()).unwrap(), command);
    }

    #[test]
    fn strange_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = cbor::from_slice::<Command>(&bytes, 200);
        let _ = cbor::from_slice::<Outcome>(&bytes, 200);
        let _ = cbor::from_slice::<State>(&bytes, 200);
    }

    #[test]
    fn damaged_commands_never_panic(command in any_command(), at in any::<prop::sample::Index>(), to: u8) {
        let mut bytes = cbor::to_vec(&command).unwrap();
        let at = at.index(bytes.len());
        bytes[at] = to;
        let mut state = three();
        if let Ok(command) = cbor::from_slice::<Command>(&bytes, bytes.len()) {
            apply(&mut state, &command);
        }
    }
}
