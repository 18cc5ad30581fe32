//! One process: the log as it is, and around it the pure halves of the node, driven as the node drives them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coel_gossip::membership::liveness::{self, Detector, Liveness, Thresholds};
use coel_gossip::membership::process;
use coel_gossip::membership::state::{self, State as Gossip};
use coel_gossip::status::{Policy, Status};
use coel_gossip::{Identity, PeerId};
use coel_node::hosting::claims::correction;
use coel_node::ids::{peer_id, peer_key};
use coel_node::placement::{Effect, Leader, MemberFacts, MeshFacts};
use coel_store::simulation::{self, Process, SimulatedDisk, Simulation};
use coel_store::{
    Command, ExpertId, Log, MemberInfo, MeshId, NodeId, Outcome, Peer, Presence, Refusal, State, Timing, TokenHash,
    Transport,
};
use futures::FutureExt;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::{mpsc, watch};

use crate::checker::{Checker, trace};
use crate::model::{self, Held, MODEL};
use crate::network::{Event, LogTransport, Machine, Network, Port};

const TICK: Duration = Duration::from_millis(250);
const PING: Duration = Duration::from_millis(500);
const LEADER_PERIOD: Duration = Duration::from_millis(500);
const PROPOSE_DEADLINE: Duration = Duration::from_secs(15);

/// What is broken on purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// A vote is acknowledged before it is on the disk.
    pub unsynced_vote: bool,
    /// A dead learner is promoted.
    pub promotes_the_dead: bool,
    /// The author of a forwarded command is not checked.
    pub forgets_authors: bool,
    /// An answer that comes twice counts twice.
    pub counts_twice: bool,
}

/// What a process is started with.
#[derive(Clone)]
pub struct Setup {
    pub simulation: Simulation,
    pub network: Network,
    pub checker: Checker,
    pub faults: Faults,
    pub machine: Machine,
    pub process: Process,
    pub identity: Identity,
    pub disk: SimulatedDisk,
    /// Exact experts that it has room for.
    pub room: u64,
    /// What the folder remembers beside the log: the marker of a member, and the welcome.
    pub folder: Arc<Mutex<Folder>>,
    /// The machines whose process asks to be started anew.
    pub restarts: Arc<Mutex<Vec<Machine>>>,
}

/// The plain files of a data folder.
#[derive(Clone, Default)]
pub struct Folder {
    pub belongs: bool,
    /// The log is to be that of this node, which its node has become.
    pub readmitted: Option<(NodeId, MeshId)>,
    pub welcome: Vec<Peer>,
}

/// How a process gets into a mesh.
#[derive(Clone, Debug)]
pub enum Origin {
    New,
    Join { via: PeerId, token: TokenHash },
}

/// Whom gossip is to know, once that is known.
type Members = Arc<Mutex<Option<BTreeSet<PeerId>>>>;

/// A running node, for those that look at it from outside.
#[derive(Clone)]
pub struct Node {
    pub port: Port,
    pub liveness: Arc<Mutex<BTreeMap<PeerId, Liveness>>>,
    changed: Arc<watch::Sender<()>>,
}

impl Node {
    pub fn log(&self) -> Option<Log> {
        self.port.log.lock().unwrap().clone()
    }

    pub fn state(&self) -> Option<Arc<State>> {
        Some(self.log()?.state().borrow().clone())
    }
}

/// Starts a process; it goes on until it is killed.
pub fn start(setup: Setup, origin: Origin) -> Node {
    let (events, inbox) = mpsc::unbounded_channel();
    let port = Port {
        machine: setup.machine,
        process: setup.process,
        peer: setup.identity.peer_id(),
        events,
        log: Arc::default(),
        held: Arc::default(),
        confirmed: Arc::default(),
    };
    let node = Node { port: port.clone(), liveness: Arc::default(), changed: Arc::default() };
    setup.network.attach(port);
    let simulation = setup.simulation.clone();
    simulation.spawn_in(setup.process, run(setup, node.clone(), inbox, origin));
    node
}

async fn run(setup: Setup, node: Node, inbox: mpsc::UnboundedReceiver<Event>, origin: Origin) {
    let members = Members::default();
    setup.simulation.spawn(gossip(setup.clone(), node.clone(), inbox, members.clone()));
    let log = match open(&setup, &node, origin, &members).await {
        Ok(log) => log,
        Err(_) => return,
    };
    *node.port.log.lock().unwrap() = Some(log.clone());
    setup.simulation.spawn(follow_state(setup.clone(), node.clone(), log.clone(), members));
    setup.simulation.spawn(follow_leader(setup.clone(), log.clone()));
    setup.simulation.spawn(suspect(node.clone(), log.clone()));
    setup.simulation.spawn(lead(setup.clone(), node.clone(), log.clone()));
    setup.simulation.spawn(host(setup.clone(), node.clone(), log.clone()));
    setup.simulation.spawn(come_back(setup.clone(), log.clone()));
    setup.simulation.clone().spawn(claim(setup, node, log));
}

fn timing() -> Timing {
    Timing { snapshot_after: 40, entries_kept: 10, ..Timing::default() }
}

async fn open(setup: &Setup, node: &Node, origin: Origin, members: &Members) -> Result<Log, String> {
    let transport: Arc<dyn Transport> = Arc::new(LogTransport {
        network: setup.network.clone(),
        port: node.port.clone(),
        answers_for_the_dead: setup.faults.promotes_the_dead,
        forgets_authors: setup.faults.forgets_authors,
    });
    let failed = |error: coel_store::LogError| error.to_string();
    let me = peer_key(setup.identity.peer_id());
    let folder = setup.folder.lock().unwrap().clone();
    if folder.belongs {
        let log = simulation::open(&setup.disk, transport, timing()).await.map_err(failed)?;
        let log = log.ok_or("the folder belongs to nobody")?;
        if !log.state().borrow().members.contains_key(&log.node_id()) {
            *members.lock().unwrap() = Some(folder.welcome.iter().filter_map(peer_id).collect());
        }
        return Ok(log);
    }
    if let Some((id, mesh)) = folder.readmitted {
        *members.lock().unwrap() = Some(folder.welcome.iter().filter_map(peer_id).collect());
        let log = simulation::join(&setup.disk, id, mesh, transport, timing()).await.map_err(failed)?;
        *setup.folder.lock().unwrap() = Folder { belongs: true, readmitted: None, welcome: folder.welcome };
        return Ok(log);
    }
    match origin {
        Origin::New => {
            *members.lock().unwrap() = Some(BTreeSet::new());
            let info = MemberInfo { peer: me, name: setup.machine.0.to_string(), addresses: vec![] };
            let log = simulation::create(&setup.disk, info, transport, timing()).await.map_err(failed)?;
            setup.folder.lock().unwrap().belongs = true;
            Ok(log)
        }
        Origin::Join { via, token } => {
            *members.lock().unwrap() = Some(BTreeSet::from([via]));
            let (id, mesh, welcome) = loop {
                let (name, me) = (setup.machine.0.to_string(), me.clone());
                let asked =
                    setup.network.ask(&node.port, via, move |there: Port| admit(there, me, name, token).boxed());
                match asked.await {
                    Ok(admitted) => break admitted,
                    Err(_) => setup.simulation.sleep(Duration::from_millis(500)).await,
                }
            };
            // As on a real disk: the welcome before the log, the marker last.
            setup.folder.lock().unwrap().welcome.clone_from(&welcome);
            *members.lock().unwrap() = Some(welcome.iter().filter_map(peer_id).collect());
            setup.simulation.sleep(Duration::from_millis(5)).await;
            let log = simulation::join(&setup.disk, id, mesh, transport, timing()).await.map_err(failed)?;
            setup.folder.lock().unwrap().belongs = true;
            Ok(log)
        }
    }
}

/// The issuer's side of a handshake.
async fn admit(there: Port, peer: Peer, name: String, token: TokenHash) -> Option<(NodeId, MeshId, Vec<Peer>)> {
    let log = there.log.lock().unwrap().clone()?;
    let join = Command::Join { peer, name, addresses: vec![], token, now_ms: 1, anew: false };
    let Ok(Outcome::Joined { node }) = log.propose(join, PROPOSE_DEADLINE).await else { return None };
    let members = log.state().borrow().members.values().map(|member| member.peer.clone()).collect();
    Some((node, log.mesh_id(), members))
}

/// A node whose log is not what it was comes back under a new id, once its vote has passed on.
async fn come_back(setup: Setup, log: Log) {
    let mut standing = log.standing();
    trace(&format!("{:?} node {}: {:?}", setup.simulation.elapsed(), log.node_id(), *standing.borrow()));
    while !standing.borrow_and_update().is_lost() {
        if standing.changed().await.is_err() {
            return;
        }
        trace(&format!("{:?} node {}: {:?}", setup.simulation.elapsed(), log.node_id(), *standing.borrow()));
    }
    let node = log.node_id();
    setup.checker.lost_standing(&format!("node {node}: {:?}", *standing.borrow()));
    let mut known_as = node;
    let id = loop {
        match log.propose(Command::Readmit { node: known_as }, PROPOSE_DEADLINE).await {
            Ok(Outcome::Joined { node }) => break node,
            Ok(Outcome::Refused(Refusal::SpeaksForAnother { author, .. })) => known_as = author,
            _ => setup.simulation.sleep(Duration::from_millis(500)).await,
        }
    };
    log.vote_passed_on().await;
    let welcome = log.state().borrow().members.values().map(|member| member.peer.clone()).collect();
    let mesh = log.mesh_id();
    *setup.folder.lock().unwrap() = Folder { belongs: false, readmitted: Some((id, mesh)), welcome };
    setup.restarts.lock().unwrap().push(setup.machine);
}

/// Drives gossip and the failure detector.
async fn gossip(setup: Setup, node: Node, mut inbox: mpsc::UnboundedReceiver<Event>, members: Members) {
    let Setup { simulation, network, identity, process, .. } = setup;
    let me = identity.peer_id();
    let port = node.port.clone();
    let mut rng = StdRng::seed_from_u64(simulation.random());
    let started_ms = 1_000_000 + simulation.elapsed().as_millis() as u64;
    let started = process::Process { started_ms, nonce: process.0 };
    let mut gossip = Gossip::new(identity, started, Policy::default(), simulation.now());
    let mut detector = Detector::new(Thresholds::default(), simulation.now());
    let mut watched = None;
    let mut tick = simulation.sleep(TICK);
    let mut pinged = simulation.elapsed();
    let mut told: Vec<state::Output> =
        gossip.handle(state::Input::SetStatus(Status::from_bits(0xffff)), simulation.now(), &mut rng);
    loop {
        let now = simulation.now();
        let mut noticed = Vec::new();
        let known = members.lock().unwrap().clone();
        let wanted = known.map(|known| known.into_iter().filter(|peer| *peer != me).collect::<BTreeSet<PeerId>>());
        if wanted != watched
            && let Some(wanted) = wanted
        {
            watched = Some(wanted.clone());
            noticed.extend(detector.handle(liveness::Input::Members(wanted.clone()), now, &mut rng));
            told.extend(gossip.handle(state::Input::SetMembers(wanted), now, &mut rng));
        }
        let event = tokio::select! {
            biased;
            event = inbox.recv() => event,
            () = &mut tick => None,
        };
        let now = simulation.now();
        match event {
            Some(Event::Connected(peer)) => {
                noticed.extend(detector.handle(liveness::Input::Connected(peer), now, &mut rng));
                told.extend(gossip.handle(state::Input::Linked(peer), now, &mut rng));
            }
            Some(Event::Lost(peer)) => {
                noticed.extend(detector.handle(liveness::Input::ConnectionLost(peer), now, &mut rng));
                told.extend(gossip.handle(state::Input::Unlinked(peer), now, &mut rng));
            }
            Some(Event::Refused(peer)) => {
                noticed.extend(detector.handle(liveness::Input::DialFailed { peer, refused: true }, now, &mut rng));
            }
            Some(Event::Unanswered(peer)) => {
                noticed.extend(detector.handle(liveness::Input::DialFailed { peer, refused: false }, now, &mut rng));
            }
            Some(Event::Ping(peer)) => noticed.extend(detector.handle(liveness::Input::Heard(peer), now, &mut rng)),
            Some(Event::Message(peer, message)) => {
                noticed.extend(detector.handle(liveness::Input::Heard(peer), now, &mut rng));
                told.extend(gossip.handle(state::Input::Received(peer, message), now, &mut rng));
            }
            None => {
                if let Some(log) = node.log() {
                    let facts = (log.node_id(), log.progress());
                    let facts = coel_store::cbor::to_vec(&facts).expect("plain data").into();
                    told.extend(gossip.handle(state::Input::SetFacts(facts), now, &mut rng));
                }
                noticed.extend(detector.handle(liveness::Input::Tick, now, &mut rng));
                told.extend(gossip.handle(state::Input::Tick, now, &mut rng));
                if simulation.elapsed() - pinged >= PING {
                    pinged = simulation.elapsed();
                    watched.iter().flatten().for_each(|peer| network.send(&port, *peer, Event::Ping));
                }
                tick = simulation.sleep(TICK);
            }
        }
        let mut changed = false;
        for output in noticed {
            match output {
                liveness::Output::Dial { peer, .. } => network.dial(&port, peer),
                liveness::Output::Close(peer) => network.close(&port, peer),
                liveness::Output::Changed(peer, liveness) => {
                    node.liveness.lock().unwrap().insert(peer, liveness);
                    changed = true;
                }
            }
        }
        for output in told.drain(..) {
            match output {
                state::Output::Send { to, message } => {
                    network.send(&port, to, |from| Event::Message(from, message.clone()));
                }
                state::Output::Changed(peer) => {
                    let facts = gossip.record(&peer).and_then(|record| record.facts.as_ref());
                    let said = facts.and_then(|facts| coel_store::cbor::from_slice(&facts.value, 1000).ok());
                    if let (Some((id, progress)), Some(log)) = (said, node.log()) {
                        log.heard(id, progress);
                    }
                }
                state::Output::Reflect { to, message } => {
                    network.reflect(&port, to, |from| Event::Message(from, message.clone()));
                }
                state::Output::Confirmed => drop(port.confirmed.send_replace(true)),
                state::Output::Duplicate(_) => {
                    trace(&format!(
                        "{:?} machine {} stops: another process has its identity",
                        simulation.elapsed(),
                        port.machine.0
                    ));
                    network.detach(port.process);
                    simulation.kill(port.process);
                }
                state::Output::Left(_) | state::Output::Alternates(_) => {}
            }
        }
        if changed {
            node.changed.send_replace(());
        }
    }
}

/// Keeps gossip's members equal to the log's, and has every state checked.
async fn follow_state(setup: Setup, node: Node, log: Log, members: Members) {
    let mut states = log.state();
    let me = peer_key(setup.identity.peer_id());
    loop {
        let state = states.borrow_and_update().clone();
        if !state.members.is_empty() {
            setup.checker.applied(setup.simulation.elapsed(), setup.process, &me, &state);
            let peers = state.members.values().filter_map(|member| peer_id(&member.peer));
            *members.lock().unwrap() = Some(peers.collect());
            node.changed.send_replace(());
        }
        if states.changed().await.is_err() {
            return;
        }
    }
}

async fn follow_leader(setup: Setup, log: Log) {
    let mut leader = log.leader();
    loop {
        if *leader.borrow_and_update() == Some(log.node_id()) {
            setup.checker.leads(setup.simulation.elapsed(), log.mesh_id(), log.term(), log.node_id());
        }
        if leader.changed().await.is_err() {
            return;
        }
    }
}

async fn suspect(node: Node, log: Log) {
    let (mut leader, mut changes) = (log.leader(), node.changed.subscribe());
    loop {
        changes.borrow_and_update();
        let known = *leader.borrow_and_update();
        if let Some(gone) = known.filter(|leader| facts(&node, &log, 0).down().contains(leader)) {
            log.suspect(gone);
        }
        tokio::select! {
            biased;
            changed = leader.changed() => if changed.is_err() { return },
            _ = changes.changed() => {}
        }
    }
}

/// The mesh as this node sees it; every node offers the same room.
fn facts(node: &Node, log: &Log, room: u64) -> MeshFacts {
    let state = log.state().borrow().clone();
    let liveness = node.liveness.lock().unwrap().clone();
    let member = |(&id, member): (&NodeId, &coel_store::Member)| {
        use coel_node::placement::Liveness as Placed;
        let seen = match peer_id(&member.peer).and_then(|peer| liveness.get(&peer).copied()) {
            _ if id == log.node_id() => Placed::Up,
            Some(Liveness::Up) => Placed::Up,
            Some(Liveness::Suspect) => Placed::Suspect,
            Some(Liveness::Down) | None => Placed::Down,
        };
        let offer = (seen != Placed::Down || id == log.node_id()).then(|| model::offer(room));
        (id, MemberFacts { liveness: seen, offer })
    };
    let members = state.members.iter().map(member).collect();
    let leader = *log.leader().borrow();
    let has_model = state.models.contains_key(&MODEL);
    MeshFacts { node: log.node_id(), leader, members, state, model: has_model.then(model::facts) }
}

async fn lead(setup: Setup, node: Node, log: Log) {
    let mut leader = Leader::default();
    loop {
        let facts = facts(&node, &log, setup.room);
        for effect in leader.handle(&facts, setup.simulation.now()) {
            match effect {
                Effect::ReconcileVoters(presence) => {
                    let presence = if setup.faults.promotes_the_dead { everyone(&facts) } else { presence };
                    let _ = log.reconcile(presence).await;
                }
                Effect::Propose { command, .. } => {
                    let _ = log.propose(command, PROPOSE_DEADLINE).await;
                }
                Effect::Report(_) => {}
            }
        }
        setup.simulation.sleep(LEADER_PERIOD).await;
    }
}

/// All members, dead or not.
fn everyone(facts: &MeshFacts) -> Presence {
    let all: BTreeSet<NodeId> = facts.state.members.keys().copied().collect();
    Presence { steady: all.clone(), up: all, lost: BTreeSet::new() }
}

/// Gets what the placement assigns to this node, and drops what it does not.
async fn host(setup: Setup, node: Node, log: Log) {
    let mut states = log.state();
    loop {
        let state = states.borrow_and_update().clone();
        let assigned: Held = state
            .placement
            .iter()
            .flat_map(|placement| placement.of(log.node_id()))
            .map(|(expert, replica)| (expert, replica.precision))
            .collect();
        let missing: Vec<(ExpertId, _)> = {
            let mut held = node.port.held.lock().unwrap();
            held.retain(|expert, _| assigned.contains_key(expert));
            assigned.into_iter().filter(|(expert, precision)| held.get(expert) != Some(precision)).collect()
        };
        if let Some((expert, precision)) = missing.first() {
            let fetch = 10 + setup.simulation.random() % 90;
            setup.simulation.sleep(Duration::from_millis(fetch)).await;
            node.port.held.lock().unwrap().insert(*expert, *precision);
            setup.checker.said(log.node_id(), *expert, *precision);
            node.changed.send_replace(());
        } else if states.changed().await.is_err() {
            return;
        }
    }
}

/// Keeps what the log says of this node's replicas true.
async fn claim(setup: Setup, node: Node, log: Log) {
    let (mut states, mut changes) = (log.state(), node.changed.subscribe());
    loop {
        changes.borrow_and_update();
        let state = states.borrow_and_update().clone();
        let held = node.port.held.lock().unwrap().clone();
        if let Some(command) = correction(&state, log.node_id(), &held, Some(MODEL))
            && log.propose(command, PROPOSE_DEADLINE).await.is_err()
        {
            setup.simulation.sleep(Duration::from_secs(1)).await;
            continue;
        }
        tokio::select! {
            biased;
            changed = states.changed() => if changed.is_err() { return },
            _ = changes.changed() => {}
        }
        setup.simulation.sleep(Duration::from_millis(200)).await;
    }
}
