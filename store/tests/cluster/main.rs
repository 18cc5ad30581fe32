//! The log as a mesh sees it: members in one process, joined by channels.
//!
//! Times here are short so that elections happen, and every wait has a generous guard: nothing is
//! asserted about how long something takes.

mod mesh;

use coel_store::{
    Assignment, Command, Epoch, Log, LogError, MemberInfo, ModelId, NodeId, OpenError, Outcome, Peer, Presence,
    ProposeError, Recovery, Refusal, Timing, TokenHash, Transport, Unreachable,
};
use futures::FutureExt;
use futures::future::BoxFuture;
use mesh::{GUARD, Mesh, info, peer, timing};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

fn rename(node: NodeId, name: &str) -> Command {
    Command::Readdress { node, name: name.into(), addresses: vec![] }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mesh_grows_and_all_agree() {
    let mut mesh = Mesh::new("a").await;
    assert_eq!(mesh.join("a", "b").await, NodeId(2));
    assert_eq!(mesh.voters(), 1, "two members have one voter");
    assert_eq!(mesh.join("b", "c").await, NodeId(3), "a follower forwards");
    assert_eq!(mesh.voters(), 3);
    for (name, node) in [("a", NodeId(1)), ("b", NodeId(2)), ("c", NodeId(3))] {
        assert_eq!(mesh.propose(name, rename(node, &format!("{name} renamed"))).await, Outcome::Done);
    }
    mesh.until_equal().await;
    let state = mesh.state("b");
    assert_eq!(state.members[&NodeId(3)].name, "c renamed");
    assert_eq!(state.mesh, mesh.log("a").mesh_id());
    assert!(mesh.log("b").applied() > 0 && mesh.log("b").term() > 0);
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_author_of_an_entry_is_whoever_sent_it() {
    let mesh = Mesh::of(&["a", "b", "c"]).await;
    let mut plans_refused = 0;
    for name in ["a", "b", "c"] {
        let author = mesh.log(name).node_id();
        for node in (1..=3).map(NodeId).filter(|node| *node != author) {
            let refused = Outcome::Refused(Refusal::SpeaksForAnother { author, node });
            assert_eq!(mesh.propose(name, Command::Leave { node }).await, refused);
            assert_eq!(mesh.propose(name, rename(node, "not its own word")).await, refused);
        }
        let plan = Command::Place { expect: Epoch(0), model: ModelId([1; 32]), replicas: Assignment::new() };
        match mesh.propose(name, plan).await {
            Outcome::Refused(Refusal::NotTheLeader { author: planner, leader }) => {
                assert!(planner == author && leader != author, "{planner} planned under {leader}");
                plans_refused += 1;
            }
            // Only the leader's plan is examined.
            outcome => assert_eq!(outcome, Outcome::Refused(Refusal::UnknownModel(ModelId([1; 32])))),
        }
        assert_eq!(mesh.propose(name, rename(author, "its own word")).await, Outcome::Done);
    }
    assert!(plans_refused > 0, "not all of them led");
    mesh.until_equal().await;
    assert!(mesh.state("a").members.values().all(|member| member.name == "its own word"));
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_of_three_go_on_without_the_leader_and_it_catches_up() {
    let mut mesh = Mesh::of(&["a", "b", "c"]).await;
    let leader = mesh.leader().await;
    let before = mesh.log(&leader).term();
    mesh.stop(&leader).await;
    let others: Vec<String> = mesh.nodes.keys().cloned().collect();
    for (round, name) in others.iter().cycle().take(4).enumerate() {
        let node = mesh.log(name).node_id();
        assert_eq!(mesh.propose(name, rename(node, &format!("round {round}"))).await, Outcome::Done);
    }
    assert!(mesh.log(&others[0]).term() > before);
    mesh.start(&leader).await;
    mesh.until_equal().await;
    let last = mesh.log(&others[1]).node_id();
    assert_eq!(mesh.state(&leader).members[&last].name, "round 3");
    let back = mesh.log(&leader).node_id();
    assert_eq!(mesh.propose(&leader, rename(back, "back")).await, Outcome::Done);
    mesh.until_equal().await;
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minority_refuses_to_write_and_keeps_what_was_agreed() {
    let mesh = Mesh::of(&["a", "b", "c"]).await;
    mesh.until_equal().await;
    let leader = mesh.leader().await;
    mesh.wires.cut(&leader);
    let agreed = mesh.state(&leader);
    let short = Duration::from_millis(2_500);
    let own = mesh.log(&leader).node_id();
    let error = mesh.log(&leader).propose(rename(own, "alone"), short).await.unwrap_err();
    assert!(matches!(error, ProposeError::NoLeader | ProposeError::TimedOut { .. }), "{error}");
    mesh.until("the leader knows that it leads nobody", |mesh| mesh.log(&leader).leader().borrow().is_none()).await;
    let error = mesh.log(&leader).propose(rename(own, "alone"), short).await.unwrap_err();
    assert_eq!(error, ProposeError::NoLeader);
    assert_eq!(mesh.state(&leader), agreed);

    let other = mesh.nodes.keys().find(|name| **name != leader).unwrap().clone();
    let others = mesh.log(&other).node_id();
    assert_eq!(mesh.propose(&other, rename(others, "majority")).await, Outcome::Done);
    mesh.wires.mend(&leader);
    mesh.until_equal().await;
    assert_eq!(mesh.state(&leader).members[&others].name, "majority");
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mesh_of_one_restarts_with_everything() {
    let mut mesh = Mesh::new("a").await;
    let id = mesh.log("a").mesh_id();
    mesh.propose("a", rename(NodeId(1), "kept")).await;
    let path = mesh.dir.path().join("a");
    assert!(Log::exists(&path));
    let second = Log::open(&path, mesh.wires.port("a"), timing()).await;
    assert!(matches!(second, Err(LogError::Open(OpenError::InUse { .. }))));
    let created = Log::create(&path, info("a"), mesh.wires.port("a"), timing()).await;
    assert!(matches!(created, Err(LogError::AlreadyMember { .. })));
    let agreed = mesh.state("a");
    mesh.stop("a").await;
    mesh.start("a").await;
    assert_eq!(mesh.state("a"), agreed, "the state is there before anyone was asked");
    assert_eq!((mesh.log("a").mesh_id(), mesh.log("a").node_id()), (id, NodeId(1)));
    assert_eq!(mesh.propose("a", rename(NodeId(1), "again")).await, Outcome::Done);
    let nowhere = Log::open(mesh.dir.path().join("nowhere"), mesh.wires.port("x"), timing()).await;
    assert!(matches!(nowhere, Err(LogError::NotAMember { .. })));
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_never_finished_does_not_count() {
    let mesh = Mesh::new("a").await;
    let path = mesh.dir.path().join("b");
    let log = Log::create(&path, info("b"), mesh.wires.port("b"), timing()).await.unwrap();
    let first = log.mesh_id();
    log.shutdown().await;
    std::fs::remove_file(path.join("log/member")).unwrap();
    assert!(!Log::exists(&path));
    let log = Log::create(&path, info("b"), mesh.wires.port("b"), timing()).await.unwrap();
    assert_ne!(log.mesh_id(), first);
    log.shutdown().await;
    // Nor does what is damaged in it.
    std::fs::remove_file(path.join("log/member")).unwrap();
    std::fs::write(path.join("log/conf"), [0; 64]).unwrap();
    Log::create(&path, info("b"), mesh.wires.port("b"), timing()).await.unwrap().shutdown().await;
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_other_meshes_and_garbage_get_nothing() {
    let mesh = Mesh::of(&["a", "b"]).await;
    let other = Mesh::new("x").await;
    let said = |reply: Vec<u8>| String::from_utf8_lossy(&reply).into_owned();
    let log = mesh.log("a");

    // A real request of another mesh, caught on the wire.
    let caught: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    struct Catch(Arc<Mutex<Vec<Vec<u8>>>>);
    impl Transport for Catch {
        fn call(&self, _: Peer, _: NodeId, rpc: Vec<u8>) -> BoxFuture<'static, Result<Vec<u8>, Unreachable>> {
            self.0.lock().unwrap().push(rpc);
            async { Err(Unreachable("caught".into())) }.boxed()
        }
    }
    let catch = Arc::new(Catch(Arc::clone(&caught)));
    let thief = Log::create(mesh.dir.path().join("thief"), info("thief"), catch, timing()).await.unwrap();
    assert!(!mesh.log("a").admits(&peer("stranger")).await);
    let token = TokenHash([1; 32]);
    let invite = Command::Invite { token, uses: 1, expires_at_ms: 10 };
    thief.propose(invite, GUARD).await.unwrap();
    let join = Command::Join { peer: peer("a"), name: "a".into(), addresses: vec![], token, now_ms: 1, anew: false };
    thief.propose(join, GUARD).await.unwrap();
    thief.reconcile(Presence::default()).await.unwrap();
    mesh.until("a question is caught", |_| !caught.lock().unwrap().is_empty()).await;
    let question = caught.lock().unwrap()[0].clone();
    thief.shutdown().await;

    let reply = said(log.handle(peer("b"), question.clone()).await);
    assert!(reply.contains("OtherMesh"), "{reply}");
    let reply = said(log.handle(peer("stranger"), question.clone()).await);
    assert!(reply.contains("OtherMesh"), "{reply}");

    // The same request, addressed to this mesh by a peer that it does not know.
    let mut forged = question.clone();
    let theirs = other.log("x").mesh_id();
    assert_ne!(theirs, log.mesh_id());
    let at = forged.windows(5).position(|w| w == b"\x64mesh").unwrap() + 6;
    forged[at..at + 16].copy_from_slice(&log.mesh_id().0);
    let to = forged.windows(3).position(|w| w == b"\x62to").unwrap() + 3;
    forged[to] = 1;
    let reply = said(log.handle(peer("stranger"), forged.clone()).await);
    assert!(reply.contains("NotAMember"), "{reply}");
    forged[to] = 7;
    let reply = said(log.handle(peer("b"), forged).await);
    assert!(reply.contains("OtherNode"), "{reply}");

    for garbage in [vec![], vec![1], vec![9; 40], vec![1; 9 << 20], question[..question.len() / 2].to_vec()] {
        let reply = said(log.handle(peer("b"), garbage).await);
        assert!(reply.contains("Malformed") || reply.contains("Version"), "{reply}");
    }
    assert_eq!(mesh.propose("b", rename(NodeId(2), "well")).await, Outcome::Done, "nothing was harmed");
    other.close().await;
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_leave_and_voters_follow() {
    let mut mesh = Mesh::of(&["a", "b", "c", "d"]).await;
    assert_eq!(mesh.voters(), 3);
    // A voter stays down, and the fourth member takes its place.
    let leader = mesh.leader().await;
    let voting = mesh.log(&leader).voters().borrow().clone();
    let is_voter = |name: &&String| **name != leader && voting.contains(&mesh.nodes[*name].node_id());
    let lost = mesh.nodes.keys().find(is_voter).unwrap().clone();
    let lost_id = mesh.log(&lost).node_id();
    mesh.stop(&lost).await;
    let down = BTreeSet::from([lost_id]);
    let of_leader = |mesh: &Mesh| mesh.log(&leader).voters().borrow().clone();
    mesh.reconcile_until("the voter is replaced", &down, |m| {
        let voters = of_leader(m);
        voters.len() == 3 && !voters.contains(&lost_id)
    })
    .await;
    // The lost member comes back and leaves for good by its own proposal. Nobody waits for it.
    mesh.start(&lost).await;
    assert_eq!(mesh.propose(&lost, Command::Leave { node: lost_id }).await, Outcome::Done);
    mesh.stop(&lost).await;
    mesh.until_equal_after_reconcile(&BTreeSet::new()).await;
    assert_eq!(mesh.voters(), 3);
    assert!(!mesh.log(&leader).admits(&peer(&lost)).await);
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_voter_hands_over_and_leaves() {
    let mut mesh = Mesh::of(&["a", "b"]).await;
    assert_eq!(mesh.propose("a", Command::Leave { node: NodeId(1) }).await, Outcome::Done);
    let nobody = BTreeSet::new();
    let b_alone = |mesh: &Mesh| *mesh.log("b").voters().borrow() == BTreeSet::from([NodeId(2)]);
    mesh.reconcile_until("b votes alone", &nobody, |m| b_alone(m) && m.voters() == 1).await;
    mesh.stop("a").await;
    assert_eq!(mesh.propose("b", rename(NodeId(2), "heir")).await, Outcome::Done);
    assert_eq!(mesh.state("b").members.len(), 1);
    mesh.reconcile_until("a is forgotten", &nobody, |m| m.state("b").members[&NodeId(2)].name == "heir").await;
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_away_accepts_a_leader_it_never_met() {
    let mut mesh = Mesh::of(&["a", "b", "c"]).await;
    // c is away while d joins, so c can learn of d only from the other members.
    mesh.until_equal().await;
    mesh.stop("c").await;
    let token = TokenHash::of(b"d");
    mesh.propose("a", Command::Invite { token, uses: 1, expires_at_ms: 1_000 }).await;
    let MemberInfo { peer: id, name, addresses } = info("d");
    let join = Command::Join { peer: id, name, addresses, token, now_ms: 1, anew: false };
    let Outcome::Joined { node } = mesh.propose("a", join).await else { panic!("not admitted") };
    let log = Log::join(mesh.dir.path().join("d"), node, mesh.log("a").mesh_id(), mesh.wires.port("d"), timing())
        .await
        .unwrap();
    mesh.wires.plug("d", &log);
    mesh.nodes.insert("d".into(), log);
    mesh.until_equal_after_reconcile(&BTreeSet::from([NodeId(3)])).await;
    mesh.start("c").await;
    assert!(mesh.log("c").admits(&peer("d")).await, "a member vouches for it");
    assert!(!mesh.log("c").admits(&peer("stranger")).await);
    mesh.until_equal().await;
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_replaces_a_long_log() {
    let mut mesh = Mesh::new("a").await;
    mesh.stop("a").await;
    let quick = Timing { snapshot_after: 20, entries_kept: 2, ..timing() };
    let start = |mesh: &Mesh, name: &str| Log::open(mesh.dir.path().join(name), mesh.wires.port(name), quick);
    let log = start(&mesh, "a").await.unwrap();
    mesh.wires.plug("a", &log);
    mesh.nodes.insert("a".into(), log);
    for round in 0..120 {
        mesh.propose("a", rename(NodeId(1), &format!("{round} {}", "x".repeat(100)))).await;
    }
    mesh.join("a", "b").await;
    mesh.until_equal().await;
    assert!(mesh.state("b").members[&NodeId(1)].name.starts_with("119 "));
    let agreed = mesh.state("b");
    mesh.stop("b").await;
    mesh.start("b").await;
    assert_eq!(mesh.state("b").members, agreed.members, "the installed snapshot was kept");
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn newcomers_that_died_are_not_promoted() {
    let mut mesh = Mesh::of(&["a", "b"]).await;
    // c joins, has the whole log, and dies; nobody has noticed yet.
    let admitted = mesh.admit("a", "c").await;
    let log = mesh.log("c");
    mesh.reconcile_until("c has the state", &BTreeSet::from([admitted]), |mesh| {
        mesh.state("c").members.contains_key(&admitted)
    })
    .await;
    assert_eq!(mesh.voters(), 1, "c is not steady");
    mesh.wires.unplug("c");
    let everyone = mesh.without(&BTreeSet::new());
    for _ in 0..3 {
        mesh.log("a").reconcile(everyone.clone()).await.unwrap();
    }
    assert_eq!(mesh.voters(), 1, "c does not answer");
    assert_eq!(mesh.propose("a", rename(NodeId(1), "alive")).await, Outcome::Done);
    mesh.wires.plug("c", &log);
    mesh.reconcile_until("c is back, and votes", &BTreeSet::new(), |mesh| mesh.voters() == 3).await;
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mesh_that_lost_its_only_voter_goes_on_from_the_survivor() {
    let mut mesh = Mesh::of(&["a", "b"]).await;
    let former = mesh.log("a").mesh_id();
    assert_eq!(mesh.propose("a", rename(NodeId(1), "lost")).await, Outcome::Done);
    mesh.until_equal().await;
    let agreed = mesh.state("b");
    mesh.stop("a").await;
    let nobody = mesh.log("b").propose(rename(NodeId(2), "alone"), Duration::from_secs(1)).await;
    assert!(nobody.is_err(), "b has no vote");
    mesh.stop("b").await;

    let folder = mesh.dir.path().join("b");
    let recovery = Recovery::open(&folder).await.unwrap();
    assert_eq!((recovery.node(), recovery.state()), (NodeId(2), &*agreed), "the whole log counts");
    let id = recovery.commit().await.unwrap();
    assert!(id != former && folder.join(format!("log-of-{former}")).is_dir(), "the former log is kept");
    assert_eq!(Log::membership(&folder).await.unwrap(), (NodeId(2), id));
    mesh.start("b").await;
    mesh.until("b leads", |mesh| *mesh.log("b").leader().borrow() == Some(NodeId(2))).await;
    assert_eq!(mesh.state("b").members.len(), 1);
    assert!(mesh.state("b").follows(former));
    assert_eq!(mesh.propose("b", rename(NodeId(2), "heir")).await, Outcome::Done);

    // The lost voter comes back to life: neither hears the other.
    mesh.start("a").await;
    mesh.until("a leads its own", |mesh| *mesh.log("a").leader().borrow() == Some(NodeId(1))).await;
    let refused = String::from_utf8_lossy(&mesh.log("b").handle(peer("a"), Vec::new()).await).into_owned();
    assert!(refused.contains("Malformed"), "{refused}");
    assert_eq!(mesh.state("b").members[&NodeId(2)].name, "heir");
    assert_eq!(mesh.state("a").members[&NodeId(2)].name, "b");
    mesh.stop("a").await;

    // It follows: its former log is set aside, and it joins under a new id.
    let kept = Log::set_aside(mesh.dir.path().join("a")).await.unwrap();
    assert!(kept.is_dir() && !Log::exists(mesh.dir.path().join("a")));
    assert_eq!(mesh.join("b", "a").await, NodeId(3));
    assert!(mesh.state("b").former[0].members.is_empty(), "everyone has followed");
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_log_is_named_and_set_aside() {
    let mut mesh = Mesh::of(&["a"]).await;
    for step in 0..50 {
        assert_eq!(mesh.propose("a", rename(NodeId(1), &format!("step {step}"))).await, Outcome::Done);
    }
    let id = mesh.state("a").mesh;
    mesh.stop("a").await;
    let folder = mesh.dir.path().join("a");
    let database = folder.join("log/db");
    let bytes = std::fs::metadata(&database).unwrap().len();
    std::fs::File::options().write(true).open(&database).unwrap().set_len(bytes / 2).unwrap();
    let error = Log::membership(&folder).await.unwrap_err();
    assert!(matches!(error, LogError::Damaged(_)), "{error}");
    let said = error.to_string();
    for part in
        [&database.display().to_string(), "is damaged", &format!("node 1 of mesh {id}"), "coel join", "damaged-log"]
    {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    let error = Recovery::open(&folder).await.err().unwrap();
    assert!(matches!(error, LogError::Damaged(_)), "{error}");
    let kept = Log::set_aside(&folder).await.unwrap();
    assert!(kept == folder.join("damaged-log") && kept.join("db").is_file() && !Log::exists(&folder));
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ghost_is_forgotten_and_its_vote_with_it() {
    let mut mesh = Mesh::of(&["a", "b", "c"]).await;
    assert_eq!(
        mesh.propose("b", Command::Leave { node: NodeId(3) }).await,
        Outcome::Refused(Refusal::SpeaksForAnother { author: NodeId(2), node: NodeId(3) })
    );
    // The leader hears it, whatever another member believes.
    let follower = if mesh.leader().await == "a" { "b" } else { "a" };
    let still_up = Outcome::Refused(Refusal::StillUp(NodeId(3)));
    assert_eq!(mesh.propose(follower, Command::Forget { node: NodeId(3) }).await, still_up);
    mesh.stop("c").await;
    let ghost = BTreeSet::from([NodeId(3)]);
    for log in mesh.nodes.values() {
        log.reconcile(mesh.without(&ghost)).await.unwrap();
    }
    assert_eq!(mesh.propose(follower, Command::Forget { node: NodeId(3) }).await, Outcome::Done);
    mesh.reconcile_until("one of two votes", &ghost, |mesh| mesh.voters() == 1).await;
    assert_eq!(mesh.state("a").members.len(), 2);
    assert!(!mesh.log("a").admits(&peer("c")).await);
    mesh.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_that_was_cut_off_disturbs_nobody_when_it_is_back() {
    let mesh = Mesh::of(&["a", "b", "c"]).await;
    let leader = mesh.leader().await;
    let away = ["a", "b", "c"].into_iter().find(|name| *name != leader).unwrap();
    let log = mesh.log(away);
    let term = mesh.log(&leader).term();
    mesh.wires.unplug(away);
    // It hears nobody for several elections, though its own calls arrive.
    for step in 0..10 {
        assert_eq!(mesh.propose(&leader, rename(NodeId(1), &format!("step {step}"))).await, Outcome::Done);
        tokio::time::sleep(Duration::from_millis(timing().election_max_ms / 2)).await;
    }
    assert_eq!(log.term(), term, "it asks before it stands");
    mesh.wires.plug(away, &log);
    mesh.until_equal().await;
    assert_eq!((mesh.log(&leader).term(), mesh.leader().await), (term, leader), "the leader leads on");
    mesh.close().await;
}
