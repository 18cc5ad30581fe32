//! A mesh of machines in a simulation, and what can be done to it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use coel_gossip::Identity;
use coel_store::simulation::{self, DiskImage, Process, SimulatedDisk, Simulation};
use coel_store::{Command, NodeId, Outcome, Precision, State, TokenHash};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::answers::Home;
use crate::checker::{Checker, trace};
use crate::model;
use crate::network::{Machine, Network};
use crate::node::{self, Faults, Folder, Node, Origin, Setup};

/// A member that has been up for less is not given a vote.
const STEADY: Duration = Duration::from_secs(2);
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a mesh may take to come to rest once nothing disturbs it any more.
const REST: Duration = Duration::from_secs(120);

/// One machine and what is on it.
pub struct Host {
    identity: Identity,
    disk: SimulatedDisk,
    folder: Arc<Mutex<Folder>>,
    origin: Origin,
    /// While a process runs.
    pub node: Option<Node>,
    /// It never comes back.
    pub gone: bool,
    /// Its disk is.
    pub full: bool,
    started: Duration,
    /// It was started more than once.
    old: bool,
    /// Earlier states of the disk and the folder.
    images: Vec<(DiskImage, Folder)>,
}

/// The machines, and the network between them.
pub struct World {
    pub simulation: Simulation,
    pub network: Network,
    pub checker: Checker,
    pub faults: Faults,
    pub rng: StdRng,
    pub hosts: Vec<Host>,
    restarts: Arc<Mutex<Vec<Machine>>>,
    processes: u64,
    tokens: u64,
}

/// The identity in the data folder that is made on a machine.
fn identity(machine: usize) -> Identity {
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&(machine as u64).to_le_bytes());
    Identity::from_seed(seed)
}

impl World {
    pub fn new(simulation: &Simulation, faults: Faults) -> Self {
        let ms = Duration::from_millis;
        let mut rng = StdRng::seed_from_u64(simulation.random());
        let delay = if rng.random_bool(0.7) { Duration::from_micros(100)..ms(2) } else { ms(5)..ms(60) };
        Self {
            simulation: simulation.clone(),
            network: Network::new(simulation, delay),
            checker: Checker::default(),
            faults,
            rng,
            hosts: Vec::new(),
            restarts: Arc::default(),
            processes: 0,
            tokens: 0,
        }
    }

    /// Lets time pass. Processes that ask for it are started anew meanwhile.
    pub async fn sleep(&mut self, ms: u64) {
        let until = self.simulation.now() + Duration::from_millis(ms);
        loop {
            let left = until.saturating_duration_since(self.simulation.now());
            self.simulation.sleep(left.min(Duration::from_millis(50))).await;
            let restarts = std::mem::take(&mut *self.restarts.lock().unwrap());
            for Machine(machine) in restarts {
                self.kill(machine);
                self.start(machine);
            }
            if self.simulation.now() >= until {
                return;
            }
        }
    }

    fn add(&mut self, origin: Origin) -> usize {
        let machine = self.hosts.len();
        let disk = SimulatedDisk::new(&self.simulation, Duration::from_micros(200)..Duration::from_millis(15));
        if self.faults.unsynced_vote {
            disk.unsynced(b"Mv");
        }
        let host = Host {
            identity: identity(machine),
            disk,
            folder: Arc::default(),
            origin,
            node: None,
            gone: false,
            full: false,
            started: Duration::ZERO,
            old: false,
            images: Vec::new(),
        };
        self.hosts.push(host);
        machine
    }

    /// Starts the process of a machine.
    pub fn start(&mut self, machine: usize) {
        self.processes += 1;
        let host = &self.hosts[machine];
        if host.node.is_some() || host.gone || host.full {
            return;
        }
        if !host.folder.lock().unwrap().belongs {
            // What an unfinished attempt left does not count.
            let empty = SimulatedDisk::new(&self.simulation, Duration::ZERO..Duration::ZERO).image();
            host.disk.restore(&empty);
        }
        let setup = Setup {
            simulation: self.simulation.clone(),
            network: self.network.clone(),
            checker: self.checker.clone(),
            faults: self.faults,
            machine: Machine(machine),
            process: Process(self.processes),
            identity: host.identity.clone(),
            disk: host.disk.clone(),
            room: u64::from(model::EXPERTS * model::LAYERS),
            folder: host.folder.clone(),
            restarts: self.restarts.clone(),
        };
        let origin = host.origin.clone();
        trace(&format!("{:?} start {machine}", self.simulation.elapsed()));
        self.hosts[machine].started = self.simulation.elapsed();
        self.hosts[machine].node = Some(node::start(setup, origin));
    }

    /// Begins a mesh.
    pub async fn create(&mut self) -> usize {
        let machine = self.add(Origin::New);
        self.start(machine);
        while self.log_of(machine).is_none() {
            self.sleep(5).await;
        }
        machine
    }

    fn log_of(&self, machine: usize) -> Option<coel_store::Log> {
        self.hosts[machine].node.as_ref().and_then(Node::log)
    }

    /// Starts a newcomer with an invite of `via`, if there is one to be had; it may take a while until it is in.
    pub async fn join(&mut self, via: usize) -> Option<usize> {
        let token = self.token();
        let (log, peer) = (self.log_of(via)?, self.hosts[via].identity.peer_id());
        let invite = Command::Invite { token, uses: 1, expires_at_ms: u64::MAX };
        let Ok(Outcome::Done) = log.propose(invite, WRITE_DEADLINE).await else { return None };
        let machine = self.add(Origin::Join { via: peer, token });
        self.start(machine);
        Some(machine)
    }

    fn token(&mut self) -> TokenHash {
        self.tokens += 1;
        TokenHash::of(&self.tokens.to_le_bytes())
    }

    /// Has a machine answer a prompt, while whatever happens happens.
    pub fn answer(&mut self, machine: usize) {
        let Some(node) = self.hosts[machine].node.clone() else { return };
        let prompt = self.rng.random_range(0..1000);
        let home = Home {
            simulation: self.simulation.clone(),
            network: self.network.clone(),
            checker: self.checker.clone(),
            counts_twice: self.faults.counts_twice,
            node: node.clone(),
        };
        self.simulation.spawn_in(node.port.process, home.answer(prompt));
    }

    /// Writes through a machine; whether it was acknowledged is noted.
    pub fn write(&mut self, machine: usize) {
        let token = self.token();
        let (Some(node), Some(log)) = (&self.hosts[machine].node, self.log_of(machine)) else { return };
        let checker = self.checker.clone();
        self.simulation.spawn_in(node.port.process, async move {
            let invite = Command::Invite { token, uses: 1, expires_at_ms: u64::MAX };
            if let Ok(Outcome::Done) = log.propose(invite, WRITE_DEADLINE).await {
                checker.acknowledged(token);
            }
        });
    }

    /// A member says that others hold what they do not.
    pub fn slander(&mut self, machine: usize) {
        let (Some(node), Some(log)) = (&self.hosts[machine].node, self.log_of(machine)) else { return };
        let state = log.state().borrow().clone();
        let Some(placement) = &state.placement else { return };
        let victim = state.members.keys().copied().find(|&member| member != log.node_id());
        let Some(victim) = victim else { return };
        let experts = placement.of(victim).map(|(expert, _)| (expert, Precision::Q4)).collect();
        let command = Command::Ready { node: victim, epoch: placement.epoch, experts, trunk: true };
        self.simulation.spawn_in(node.port.process, async move {
            let _ = log.propose(command, WRITE_DEADLINE).await;
        });
    }

    /// Registers the model through a machine.
    pub async fn register_model(&self, machine: usize) {
        if let Some(log) = self.log_of(machine) {
            let _ = log.propose(model::registration(), WRITE_DEADLINE).await;
        }
    }

    /// kill -9: what was on its way to the disk gets there.
    pub fn kill(&mut self, machine: usize) {
        self.end(machine, usize::MAX);
    }

    /// The power goes: of what was on its way to the disk some gets there.
    pub fn cut_power(&mut self, machine: usize) {
        let kept = self.rng.random_range(0..=self.hosts[machine].disk.pending());
        self.end(machine, kept);
    }

    fn end(&mut self, machine: usize, kept: usize) {
        trace(&format!("{:?} end {machine}, {kept} writes kept", self.simulation.elapsed()));
        if let Some(node) = self.hosts[machine].node.take() {
            self.hosts[machine].old = true;
            self.simulation.kill(node.port.process);
            self.network.detach(node.port.process);
            self.hosts[machine].disk.cut_power(kept);
        }
    }

    /// Destroys a machine for good, if it has not run long enough to have been given a vote.
    pub fn destroy_newcomer(&mut self, machine: usize) {
        let host = &self.hosts[machine];
        let is_new = matches!(host.origin, Origin::Join { .. }) && !host.old;
        if is_new && host.node.is_some() && self.simulation.elapsed() - host.started < STEADY {
            self.kill(machine);
            self.hosts[machine].gone = true;
        }
    }

    pub fn pause(&self, machine: usize) {
        if let Some(node) = &self.hosts[machine].node {
            self.simulation.pause(node.port.process);
        }
    }

    /// The disk of a machine takes no more, or takes again, if it belongs to a member: no process starts on it while it is full.
    pub fn fill(&mut self, machine: usize, full: bool) {
        if self.log_of(machine).is_some() || !full {
            trace(&format!("{:?} {machine} full: {full}", self.simulation.elapsed()));
            self.hosts[machine].full = full;
            self.hosts[machine].disk.fill(full);
        }
    }

    /// The machine that leads by its own word.
    pub fn leading(&self) -> Option<usize> {
        (0..self.hosts.len())
            .find(|&machine| self.log_of(machine).is_some_and(|log| *log.leader().borrow() == Some(log.node_id())))
    }

    /// Remembers what is on a machine's disk now.
    pub fn back_up(&mut self, machine: usize) {
        let host = &mut self.hosts[machine];
        let image = (host.disk.image(), host.folder.lock().unwrap().clone());
        host.images.push(image);
    }

    /// Puts back an earlier state of a machine's disk, and starts it. Only while others vote beside it, which remember what it had: a node
    /// that votes alone, or whose mesh remembers nothing, is beyond help.
    pub fn roll_back(&mut self, machine: usize) {
        let others = (0..self.hosts.len()).filter(|&other| other != machine && self.log_of(other).is_some()).count();
        let votes = self.log_of(machine).map_or(0, |log| log.voters().borrow().len());
        let count = self.hosts[machine].images.len();
        if count == 0 || votes < 3 || others < self.hosts.len() - 1 {
            return;
        }
        let pick = self.rng.random_range(0..count);
        let (image, folder) = self.hosts[machine].images[pick].clone();
        if !folder.belongs {
            return;
        }
        self.kill(machine);
        self.checker.disks_lie();
        let host = &mut self.hosts[machine];
        host.images.clear();
        trace(&format!("{:?} roll back {machine}", self.simulation.elapsed()));
        host.disk.restore(&image);
        *host.folder.lock().unwrap() = folder;
        self.start(machine);
    }

    /// Starts another machine with a copy of a machine's data folder, while that one runs. The copy stops by itself, and never runs again.
    pub async fn copy(&mut self, machine: usize) -> Option<usize> {
        self.log_of(machine)?;
        let copy = self.add(self.hosts[machine].origin.clone());
        let (image, folder) = (self.hosts[machine].disk.image(), self.hosts[machine].folder.lock().unwrap().clone());
        self.hosts[copy].identity = self.hosts[machine].identity.clone();
        self.hosts[copy].disk.restore(&image);
        *self.hosts[copy].folder.lock().unwrap() = folder;
        trace(&format!("{:?} copy {machine} to {copy}", self.simulation.elapsed()));
        self.start(copy);
        Some(copy)
    }

    /// Destroys a machine for good.
    pub fn destroy(&mut self, machine: usize) {
        self.kill(machine);
        self.hosts[machine].gone = true;
    }

    /// `coel recover` on a machine that is left, and its start.
    pub async fn recover(&mut self, machine: usize) {
        self.kill(machine);
        self.checker.recovered();
        match simulation::recover(&self.hosts[machine].disk).await {
            Ok(Some(_)) => self.start(machine),
            other => self.checker.violated(format!("machine {machine} has nothing to go on from: {other:?}")),
        }
    }

    /// Whether the process of a machine runs; one that has ended by itself does not.
    pub fn is_running(&self, machine: usize) -> bool {
        let node = self.hosts[machine].node.as_ref();
        node.is_some_and(|node| self.network.has(node.port.process))
    }

    /// The node that a machine is.
    pub fn node_id(&self, machine: usize) -> Option<NodeId> {
        self.log_of(machine).map(|log| log.node_id())
    }

    /// The term in which a machine is.
    pub fn term(&self, machine: usize) -> u64 {
        self.log_of(machine).map_or(0, |log| log.term())
    }

    /// The power goes: of what was on its way to the disk, so many writes get there.
    pub fn cut_power_keeping(&mut self, machine: usize, kept: usize) {
        self.end(machine, kept);
    }

    /// Cuts all links between two groups of machines: in both directions, or in one.
    pub fn part(&self, left: &[usize], right: &[usize], both: bool) {
        for (&a, b) in left.iter().flat_map(|a| right.iter().map(move |b| (a, *b))) {
            self.network.cut(Machine(a), Machine(b));
            if both {
                self.network.cut(Machine(b), Machine(a));
            }
        }
    }

    /// Undoes every disturbance: links are whole, stopped processes go on, dead ones are started.
    pub fn heal(&mut self) {
        self.network.mend_all();
        self.simulation.resume_all();
        for machine in 0..self.hosts.len() {
            self.fill(machine, false);
            self.start(machine);
        }
    }

    /// The machines on which a process runs.
    pub fn running(&self) -> Vec<usize> {
        (0..self.hosts.len()).filter(|&machine| self.hosts[machine].node.is_some()).collect()
    }

    /// The nodes that are in the mesh.
    fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.hosts.iter().filter_map(|host| host.node.as_ref()).filter(|node| node.log().is_some())
    }

    /// The state that all nodes of the mesh have, if it is one.
    fn agreed(&self) -> Option<Arc<State>> {
        let mut states = self.nodes().filter_map(Node::state);
        let first = states.next()?;
        states.all(|state| state == first).then_some(first)
    }

    /// Every machine in a few words.
    pub fn describe(&self) -> String {
        let each = self.hosts.iter().enumerate().map(|(machine, host)| {
            if host.gone {
                return format!("{machine}: gone");
            }
            let Some(log) = self.log_of(machine) else { return format!("{machine}: no log") };
            let voters: Vec<u64> = log.voters().borrow().iter().map(|node| node.0).collect();
            let members: Vec<u64> = log.state().borrow().members.keys().map(|node| node.0).collect();
            let leader = log.leader().borrow().map(|node| node.0);
            let standing = *log.standing().borrow();
            format!(
                "{machine}: node {}, term {}, leader {leader:?}, voters {voters:?}, members {members:?}, {standing:?}",
                log.node_id(),
                log.term()
            )
        });
        each.collect::<Vec<_>>().join("; ")
    }

    /// Waits until the mesh has come to rest: a write through every node is acknowledged, all states are equal, and every expert is where it
    /// was placed. Anything else is a violation.
    pub async fn come_to_rest(&mut self) {
        trace(&format!("{:?} {}", self.simulation.elapsed(), self.describe()));
        let until = self.simulation.elapsed() + REST;
        let machines = self.running();
        for machine in machines {
            let token = self.token();
            loop {
                if self.checker.violation().is_some() {
                    return;
                }
                if self.simulation.elapsed() > until {
                    let what =
                        format!("machine {machine} cannot write although nothing disturbs it; {}", self.describe());
                    return self.checker.violated(what);
                }
                let Some(log) = self.log_of(machine) else {
                    self.sleep(100).await;
                    continue;
                };
                let invite = Command::Invite { token, uses: 1, expires_at_ms: u64::MAX };
                if let Ok(Outcome::Done) = log.propose(invite, Duration::from_secs(5)).await {
                    self.checker.acknowledged(token);
                    break;
                }
                self.sleep(100).await;
            }
        }
        let settled = |state: &State| {
            let placed = state.placement.as_ref();
            state.models.is_empty() || placed.is_some_and(|placement| placement.missing().is_empty())
        };
        loop {
            if self.checker.violation().is_some() {
                return;
            }
            match self.agreed() {
                Some(state) if settled(&state) => return self.checker.is_whole(&state),
                agreed if self.simulation.elapsed() > until => {
                    let what = if agreed.is_some() { "experts are missing" } else { "states differ" };
                    return self.checker.violated(format!("{what} although nothing disturbs the mesh"));
                }
                _ => self.sleep(100).await,
            }
        }
    }
}
