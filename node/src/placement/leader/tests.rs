use std::sync::Arc;

use coel_model::weights::config::ModelConfig;
use coel_store::manifest::FORMAT;
use coel_store::{
    BlobEntry, BlobId, Bounds, Epoch, ExpertId, Manifest, Member, Model, PartEntry, Peer, Precision, Replica, Slices,
    State,
};

use super::super::{Liveness, MemberFacts, Unplaceable, can_hold, can_spare};
use super::*;
use crate::budget::{ModelSizes, Offer};

const MODEL: ModelId = ModelId([7; 32]);
const EXPERTS: u16 = 4;
const EXACT: u64 = 160;

/// Four experts of 160 bytes, 90 at Q8 and 50 at Q4, beside a small trunk, with the configuration of the bundled model.
fn model() -> ModelFacts {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/fixture");
    let config = ModelConfig::parse(&std::fs::read_to_string(dir.join("config.json")).unwrap()).unwrap();
    let blob = |name: String, bytes| BlobEntry { id: BlobId::of(name.as_bytes()), bytes, chunks: Vec::new() };
    let slices = |name: &str, [exact, base, refine]: [u64; 3]| Slices {
        exact: blob(format!("{name} exact"), exact),
        base: Some(blob(format!("{name} base"), base)),
        refine: Some(blob(format!("{name} refine"), refine)),
    };
    let expert = |index: u16| (ExpertId::new(0, index), slices(&index.to_string(), [EXACT, 50, 40]));
    let manifest = Manifest {
        format: FORMAT,
        architecture: "Test".into(),
        files: Vec::new(),
        trunk: vec![PartEntry { name: "head".into(), slices: slices("head", [1000, 300, 200]) }],
        experts: (0..EXPERTS).map(expert).collect(),
    };
    let sizes = ModelSizes::of_manifest(&manifest, 10, &config);
    ModelFacts { id: MODEL, manifest: Arc::new(manifest), sizes: Arc::new(sizes) }
}

/// A mesh as node 1, which leads it, sees it.
struct World {
    facts: MeshFacts,
    leader: Leader,
    start: Instant,
}

impl World {
    /// Nodes with room for so many exact experts each; the first has every blob.
    fn new(rooms: &[u64]) -> Self {
        let model = model();
        let mut state = State::default();
        state.models.insert(MODEL, Model { name: "test".into(), ..Model::default() });
        let mut facts = MeshFacts {
            node: NodeId(1),
            leader: Some(NodeId(1)),
            state: Arc::default(),
            members: BTreeMap::new(),
            model: Some(model),
        };
        for (id, room) in (1..).zip(rooms) {
            let member =
                Member { peer: Peer(vec![id as u8]), name: format!("node-{id}"), addresses: vec![], leaving: false };
            state.members.insert(NodeId(id), member);
            let offer = offer(facts.model.as_ref().unwrap(), *room, id == 1);
            facts.members.insert(NodeId(id), MemberFacts { liveness: Liveness::Up, offer: Some(Arc::new(offer)) });
        }
        facts.state = Arc::new(state);
        Self { facts, leader: Leader::default(), start: Instant::now() }
    }

    fn state(&mut self) -> &mut State {
        Arc::make_mut(&mut self.facts.state)
    }

    fn set(&mut self, node: u64, liveness: Liveness) {
        self.facts.members.get_mut(&NodeId(node)).unwrap().liveness = liveness;
    }

    /// The effects after so many seconds, without the voters'.
    fn at(&mut self, seconds: u64) -> Vec<Effect> {
        let mut effects = self.leader.handle(&self.facts, self.start + Duration::from_secs(seconds));
        effects.retain(|effect| !matches!(effect, Effect::ReconcileVoters(_)));
        effects
    }

    /// Which members are there after so many seconds, as the voters are chosen by it.
    fn presence(&mut self, seconds: u64) -> Presence {
        let effects = self.leader.handle(&self.facts, self.start + Duration::from_secs(seconds));
        let found = effects.into_iter().find_map(|effect| match effect {
            Effect::ReconcileVoters(presence) => Some(presence),
            _ => None,
        });
        found.expect("a leader looks after the voters")
    }

    /// What is proposed after so many seconds, if anything is.
    fn proposed(&mut self, seconds: u64) -> Option<Assignment> {
        self.at(seconds).into_iter().find_map(|effect| match effect {
            Effect::Propose { command: Command::Place { replicas, .. }, .. } => Some(replicas),
            _ => None,
        })
    }

    /// Takes the proposal for the placement, all replicas ready.
    fn apply(&mut self, replicas: &Assignment) {
        let epoch = Epoch(self.facts.state.epoch().0 + 1);
        let ready = |(&node, &precision): (&NodeId, &Precision)| (node, Replica { precision, ready: Some(precision) });
        let replicas = replicas.iter().map(|(&expert, nodes)| (expert, nodes.iter().map(ready).collect())).collect();
        self.state().placement = Some(Placement { epoch, model: MODEL, replicas, trunk_ready: BTreeSet::new() });
    }

    /// A mesh that has come to rest.
    fn settled(rooms: &[u64]) -> Self {
        let mut world = Self::new(rooms);
        while let Some(replicas) = world.proposed(0) {
            world.apply(&replicas);
        }
        world
    }
}

fn offer(model: &ModelFacts, room: u64, complete: bool) -> Offer {
    Offer {
        memory_bytes: model.sizes.fixed_bytes(16, Precision::Exact) + room * EXACT,
        kv_tokens: 16,
        accepts: Bounds::AUTO,
        trunk: Some(Precision::Exact),
        complete_models: if complete { vec![MODEL] } else { Vec::new() },
        ..Offer::default()
    }
}

fn holders(replicas: &Assignment) -> BTreeSet<u64> {
    replicas.values().flat_map(|nodes| nodes.keys().map(|node| node.0)).collect()
}

#[test]
fn a_first_placement_covers_the_model_and_then_nothing_is_proposed() {
    let mut world = World::new(&[4, 4]);
    let first = world.proposed(0).unwrap();
    assert!(first.len() == usize::from(EXPERTS) && first.values().all(|nodes| nodes.len() == 2), "{first:?}");
    assert_eq!(world.proposed(1).as_ref(), Some(&first), "it was not applied: proposed again");
    world.apply(&first);
    assert_eq!((world.at(2), world.at(3)), (vec![], vec![]));
}

#[test]
fn only_the_leader_acts_and_a_new_one_knows_who_was_down() {
    let mut world = World::settled(&[4, 4, 4]);
    world.facts.leader = Some(NodeId(2));
    world.set(3, Liveness::Down);
    let follower =
        |world: &mut World, seconds| world.leader.handle(&world.facts, world.start + Duration::from_secs(seconds));
    assert_eq!((follower(&mut world, 1), follower(&mut world, 40)), (vec![], vec![]));
    world.facts.leader = Some(NodeId(1));
    let without = world.proposed(41).unwrap();
    assert!(!holders(&without).contains(&3), "{without:?}");
}

#[test]
fn a_plan_waits_for_members_that_have_not_said_what_they_can_hold_but_not_for_ever() {
    let mut world = World::new(&[4, 4]);
    world.facts.members.get_mut(&NodeId(2)).unwrap().offer = None;
    assert_eq!((world.at(0), world.at(14)), (vec![], vec![]));
    assert_eq!(holders(&world.proposed(15).unwrap()), BTreeSet::from([1]), "it speaks another version");
    world.facts.members.get_mut(&NodeId(2)).unwrap().offer =
        Some(Arc::new(offer(world.facts.model.as_ref().unwrap(), 4, false)));
    assert_eq!(holders(&world.proposed(16).unwrap()), BTreeSet::from([1, 2]));
    // Without the manifest there is nothing to plan with.
    world.facts.model = None;
    assert_eq!(world.at(17), vec![]);
}

#[test]
fn a_member_may_vote_once_it_has_been_up_for_a_while() {
    let mut world = World::new(&[4, 4, 4]);
    world.set(3, Liveness::Down);
    let nodes = |ids: &[u64]| ids.iter().copied().map(NodeId).collect::<BTreeSet<_>>();
    assert_eq!(world.presence(0), Presence { up: nodes(&[1, 2]), ..Presence::default() });
    world.set(3, Liveness::Up);
    assert_eq!(world.presence(1), Presence { up: nodes(&[1, 2, 3]), ..Presence::default() });
    assert_eq!(world.presence(2).steady, nodes(&[1, 2]));
    // A moment of silence starts the wait anew.
    world.set(2, Liveness::Suspect);
    assert_eq!(world.presence(3), Presence { up: nodes(&[1, 3]), steady: nodes(&[1, 3]), lost: nodes(&[]) });
    world.set(2, Liveness::Up);
    assert_eq!((world.presence(4).steady, world.presence(6).steady), (nodes(&[1, 3]), nodes(&[1, 2, 3])));
}

#[test]
fn a_member_that_is_down_is_awaited_then_given_up_and_loses_its_vote() {
    let mut world = World::settled(&[4, 4, 4]);
    let placed = world.facts.state.placement.clone().unwrap();
    let victim = placed.replicas.values().flat_map(BTreeMap::keys).find(|node| node.0 != 1).unwrap().0;
    world.set(victim, Liveness::Down);
    assert_eq!(world.at(1), vec![], "just lost");
    let awaited = LeaderReport { awaited: BTreeSet::from([NodeId(victim)]), ..LeaderReport::default() };
    assert_eq!(world.at(3), vec![Effect::Report(awaited)], "every expert has another holder, so nothing moves");
    assert_eq!(world.at(29), vec![]);
    let effects = world.leader.handle(&world.facts, world.start + Duration::from_secs(31));
    let presence = world.presence(31);
    assert_eq!(presence.lost, BTreeSet::from([NodeId(victim)]));
    assert!(!presence.up.contains(&NodeId(victim)) && presence.up.len() == 2, "{presence:?}");
    assert!(effects.contains(&Effect::Report(LeaderReport::default())), "{effects:?}");
    let replaced = world.proposed(32).unwrap();
    assert!(!holders(&replaced).contains(&victim), "{replaced:?}");
    // It is back: it holds experts again, and nobody is awaited.
    world.apply(&replaced);
    world.set(victim, Liveness::Up);
    assert!(world.proposed(33).is_none_or(|replicas| replicas.values().all(|nodes| !nodes.is_empty())));
}

#[test]
fn a_mesh_without_room_says_so_and_proposes_nothing_at_first() {
    let mut world = World::new(&[1]);
    let effects = world.at(0);
    let [Effect::Report(LeaderReport { problem: Some(problem), .. })] = &effects[..] else { panic!("{effects:?}") };
    assert!(problem.contains("bytes are missing"), "{problem}");
    assert_eq!(world.at(1), vec![], "it is said once");
    // A second node brings the room; the problem is gone with it.
    let model = world.facts.model.clone().unwrap();
    let member = Member { peer: Peer(vec![2]), name: "node-2".into(), addresses: vec![], leaving: false };
    world.state().members.insert(NodeId(2), member);
    let offer = Some(Arc::new(offer(&model, 4, false)));
    world.facts.members.insert(NodeId(2), MemberFacts { liveness: Liveness::Up, offer });
    let effects = world.at(2);
    assert!(effects.contains(&Effect::Report(LeaderReport::default())), "{effects:?}");
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Propose { .. })), "{effects:?}");
}

#[test]
fn a_leaving_member_hands_over_before_it_is_emptied() {
    let mut world = World::settled(&[4, 4]);
    world.apply(&(0..EXPERTS).map(|e| (ExpertId::new(0, e), [(NodeId(2), Precision::Exact)].into())).collect());
    world.state().members.get_mut(&NodeId(2)).unwrap().leaving = true;
    let step = world.proposed(0).unwrap();
    assert_eq!(holders(&step), BTreeSet::from([1, 2]), "node 2 serves until node 1 is ready");
    world.apply(&step);
    assert_eq!(holders(&world.proposed(1).unwrap()), BTreeSet::from([1]));
}

#[test]
fn a_member_can_be_spared_where_the_others_have_room() {
    let world = World::settled(&[4, 4]);
    assert_eq!(can_spare(&world.facts, NodeId(2)), Ok(()));
    let mut small = World::settled(&[1, 4]);
    let Err(Unplaceable::Short(why)) = can_spare(&small.facts, NodeId(2)) else { panic!("node 1 has no room") };
    assert!(why.starts_with("without this node, ") && why.contains("bytes are missing"), "{why}");
    assert_eq!(can_hold(&small.facts, Bounds::only(Precision::Q8)), Ok(()));
    small.facts.members.get_mut(&NodeId(2)).unwrap().offer = None;
    assert!(matches!(can_hold(&small.facts, Bounds::AUTO), Err(Unplaceable::NotYet(_))));
    small.facts.model = None;
    assert!(matches!(can_spare(&small.facts, NodeId(2)), Err(Unplaceable::NotYet(_))));
    small.state().models.clear();
    assert_eq!(can_spare(&small.facts, NodeId(2)), Ok(()), "there is nothing to hold");
}

#[test]
fn the_same_facts_at_the_same_times_give_the_same_effects() {
    let run = || {
        let mut world = World::new(&[3, 2, 4]);
        let mut seen = Vec::new();
        for second in 0..60 {
            if second == 5 {
                world.set(2, Liveness::Down);
            }
            let effects = world.at(second);
            for effect in &effects {
                if let Effect::Propose { command: Command::Place { replicas, .. }, .. } = effect {
                    world.apply(replicas);
                }
            }
            seen.push(effects);
        }
        seen
    };
    assert_eq!(run(), run());
}
