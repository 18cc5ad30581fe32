//! The network between processes: connections that take time, messages that are late, lost or out of order, links that are cut in one
//! direction or both.
//!
//! A machine answers dials while a process runs on it; a killed process resets its connections; a cut link says nothing. What two
//! processes send goes over their connection only, as it does between real ones.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coel_gossip::PeerId;
use coel_gossip::membership::message::Message;
use coel_store::simulation::{Process, Simulation};
use coel_store::{Log, NodeId, Peer, Transport, Unreachable};
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};

use crate::model::Held;

/// How long a dial, or a call, over a cut link takes to fail.
const CUT_PATIENCE: Duration = Duration::from_secs(5);
/// How long a call waits for a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);

/// One machine: where a process may run. It keeps its place in the network when the process is started anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Machine(pub usize);

/// What a process hears from the network.
pub enum Event {
    Connected(PeerId),
    Lost(PeerId),
    Refused(PeerId),
    Unanswered(PeerId),
    Message(PeerId, Message),
    Ping(PeerId),
}

/// One running process, as the network sees it.
#[derive(Clone)]
pub struct Port {
    pub machine: Machine,
    pub process: Process,
    pub peer: PeerId,
    pub events: mpsc::UnboundedSender<Event>,
    /// Once it has one.
    pub log: Arc<Mutex<Option<Log>>>,
    /// The experts that it holds.
    pub held: Arc<Mutex<Held>>,
    /// No other process of this identity was heard of.
    pub confirmed: Arc<watch::Sender<bool>>,
}

impl Port {
    async fn is_confirmed(&self) {
        // The sender is in the port itself.
        let _ = self.confirmed.subscribe().wait_for(|confirmed| *confirmed).await;
    }
}

#[derive(Default)]
struct State {
    ports: BTreeMap<Process, Port>,
    /// Both directions.
    connections: BTreeSet<(Process, Process)>,
    cut: BTreeSet<(Machine, Machine)>,
    /// Where each peer was last.
    homes: BTreeMap<PeerId, Machine>,
    /// Of a thousand messages so many are lost.
    lost_permille: u64,
}

/// The network; cloning the handle is cheap.
#[derive(Clone)]
pub struct Network {
    pub simulation: Simulation,
    state: Arc<Mutex<State>>,
    delay: std::ops::Range<Duration>,
}

impl Network {
    /// A network whose links take a time in `delay` for a message.
    pub fn new(simulation: &Simulation, delay: std::ops::Range<Duration>) -> Self {
        Self { simulation: simulation.clone(), state: Arc::default(), delay }
    }

    fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.state.lock().unwrap())
    }

    /// A time for one message to travel.
    fn latency(&self) -> Duration {
        let width = (self.delay.end - self.delay.start).as_nanos() as u64;
        self.delay.start + Duration::from_nanos(self.simulation.random() % width.max(1))
    }

    pub fn set_loss(&self, permille: u64) {
        self.with(|state| state.lost_permille = permille);
    }

    /// Cuts the way from one machine to another; the way back stays.
    pub fn cut(&self, from: Machine, to: Machine) {
        self.with(|state| state.cut.insert((from, to)));
    }

    pub fn mend_all(&self) {
        self.with(|state| {
            state.cut.clear();
            state.lost_permille = 0;
        });
    }

    pub fn attach(&self, port: Port) {
        self.with(|state| {
            state.homes.insert(port.peer, port.machine);
            state.ports.insert(port.process, port);
        });
    }

    /// Whether a process is there.
    pub fn has(&self, process: Process) -> bool {
        self.with(|state| state.ports.contains_key(&process))
    }

    /// A process is gone: whoever is connected to it hears so, unless the link is cut.
    pub fn detach(&self, process: Process) {
        let (port, others) = self.with(|state| {
            let port = state.ports.remove(&process);
            let others: Vec<Process> =
                state.connections.iter().filter(|(a, _)| *a == process).map(|(_, b)| *b).collect();
            (port, others)
        });
        let Some(port) = port else { return };
        for other in others {
            self.disconnect(&port, other);
        }
    }

    fn disconnect(&self, port: &Port, other: Process) {
        let target = self.with(|state| {
            state.connections.remove(&(port.process, other));
            state.connections.remove(&(other, port.process));
            state.ports.get(&other).cloned().filter(|target| !state.cut.contains(&(port.machine, target.machine)))
        });
        if let Some(target) = target {
            let peer = port.peer;
            self.later(move |_| drop(target.events.send(Event::Lost(peer))));
        }
    }

    /// Does something after the time that one message takes.
    fn later(&self, act: impl FnOnce(&Network) + Send + 'static) {
        let (network, latency) = (self.clone(), self.latency());
        self.simulation.spawn_in(Process::default(), async move {
            network.simulation.sleep(latency).await;
            act(&network);
        });
    }

    fn is_cut(&self, from: Machine, to: Machine) -> bool {
        self.with(|state| state.cut.contains(&(from, to)))
    }

    /// The processes that answer to a peer id: more than one where a data folder was copied.
    fn of_peer(&self, peer: PeerId) -> Vec<Port> {
        self.with(|state| state.ports.values().filter(|port| port.peer == peer).cloned().collect())
    }

    /// Dials a peer; the caller hears what comes of it.
    pub fn dial(&self, from: &Port, peer: PeerId) {
        let found: Vec<Port> = self.of_peer(peer).into_iter().filter(|port| port.process != from.process).collect();
        let pick = (!found.is_empty()).then(|| found[(self.simulation.random() % found.len() as u64) as usize].clone());
        let (network, from) = (self.clone(), from.clone());
        let home = self.with(|state| state.homes.get(&peer).copied());
        let to = pick.as_ref().map(|target| target.machine).or(home);
        let cut = to.is_none_or(|to| self.is_cut(from.machine, to) || self.is_cut(to, from.machine));
        let latency = if cut { CUT_PATIENCE } else { self.latency() * 2 };
        self.simulation.spawn_in(from.process, async move {
            network.simulation.sleep(latency).await;
            let event = match pick {
                _ if cut => Event::Unanswered(peer),
                Some(target) if network.connect(&from, &target) => Event::Connected(peer),
                _ => Event::Refused(peer),
            };
            let _ = from.events.send(event);
        });
    }

    /// Connects two processes, if both still run.
    fn connect(&self, from: &Port, target: &Port) -> bool {
        let both = self.with(|state| {
            let both = state.ports.contains_key(&from.process) && state.ports.contains_key(&target.process);
            if both {
                state.connections.extend([(from.process, target.process), (target.process, from.process)]);
            }
            both
        });
        if both {
            let _ = target.events.send(Event::Connected(from.peer));
        }
        both
    }

    /// Gives up the connections to a peer.
    pub fn close(&self, from: &Port, peer: PeerId) {
        for target in self.connected(from, peer) {
            self.disconnect(from, target.process);
        }
    }

    fn connected(&self, from: &Port, peer: PeerId) -> Vec<Port> {
        self.with(|state| {
            let others = state.connections.iter().filter(|(a, _)| *a == from.process).map(|(_, b)| b);
            others.filter_map(|other| state.ports.get(other)).filter(|port| port.peer == peer).cloned().collect()
        })
    }

    /// Whether a message on this way arrives.
    fn passes(&self, from: &Port, to: &Port) -> bool {
        let lost = self.with(|state| state.lost_permille);
        !self.is_cut(from.machine, to.machine) && (lost == 0 || self.simulation.random() % 1000 >= lost)
    }

    /// Sends an event to a connected peer; to one of its processes, where a data folder was copied.
    pub fn send(&self, from: &Port, peer: PeerId, event: impl FnOnce(PeerId) -> Event) {
        let mut connected = self.connected(from, peer);
        if !connected.is_empty() {
            let pick = if connected.len() > 1 { self.simulation.random() as usize % connected.len() } else { 0 };
            self.deliver(from, connected.swap_remove(pick), event(from.peer));
        }
    }

    /// Sends an event to every process of a connected peer, each on the stream that it has opened.
    pub fn reflect(&self, from: &Port, peer: PeerId, event: impl Fn(PeerId) -> Event) {
        for target in self.connected(from, peer) {
            self.deliver(from, target, event(from.peer));
        }
    }

    fn deliver(&self, from: &Port, target: Port, event: Event) {
        if self.passes(from, &target) {
            self.later(move |_| drop(target.events.send(event)));
        }
    }

    /// Has `serve` answer a request in the process of a connected peer. Fails where there is no connection, or it breaks; waits, if need
    /// be for long, where a message is lost.
    pub fn ask<T: Send + 'static>(
        &self,
        from: &Port,
        peer: PeerId,
        serve: impl FnOnce(Port) -> BoxFuture<'static, Option<T>> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, String>> {
        let (network, from) = (self.clone(), from.clone());
        async move {
            let until = network.simulation.elapsed() + CONNECT_PATIENCE;
            let target = loop {
                let mut connected = network.connected(&from, peer);
                if !connected.is_empty() {
                    let pick = network.simulation.random() % connected.len() as u64;
                    break connected.swap_remove(pick as usize);
                }
                if network.simulation.elapsed() > until {
                    return Err("no connection".into());
                }
                network.simulation.sleep(Duration::from_millis(100)).await;
            };
            if !network.passes(&from, &target) {
                network.simulation.sleep(CUT_PATIENCE).await;
                return Err("no answer".into());
            }
            network.simulation.sleep(network.latency()).await;
            let (done, wait) = oneshot::channel();
            let there = target.clone();
            network.simulation.spawn_in(target.process, async move {
                there.is_confirmed().await;
                let _ = done.send(serve(there).await);
            });
            let answer = wait.await;
            if !network.passes(&target, &from) {
                network.simulation.sleep(CUT_PATIENCE).await;
                return Err("the answer was lost".into());
            }
            network.simulation.sleep(network.latency()).await;
            match answer {
                Ok(Some(answer)) => Ok(answer),
                _ => Err("the connection broke".into()),
            }
        }
        .boxed()
    }
}

/// The log's way out of one process.
pub struct LogTransport {
    pub network: Network,
    pub port: Port,
    /// A fault that tests put in: answers "are you there" for others.
    pub answers_for_the_dead: bool,
    /// A fault that tests put in: everything that a leader is told counts as its own word.
    pub forgets_authors: bool,
}

impl Transport for LogTransport {
    fn call(&self, to: Peer, _: NodeId, rpc: Vec<u8>) -> BoxFuture<'static, Result<Vec<u8>, Unreachable>> {
        let Some(peer) = coel_node::ids::peer_id(&to) else {
            return async { Err(Unreachable("no peer".into())) }.boxed();
        };
        let from = coel_node::ids::peer_key(self.port.peer);
        let request = rpc.clone();
        let forgets = self.forgets_authors && rpc.windows(7).any(|bytes| bytes == b"Propose");
        let asked = self.network.ask(&self.port, peer, move |there: Port| {
            let log = there.log.lock().unwrap().clone();
            let from = if forgets { coel_node::ids::peer_key(there.peer) } else { from };
            async move { Some(log?.handle(from, rpc).await) }.boxed()
        });
        let (port, network) = (self.port.clone(), self.network.clone());
        let lies = self.answers_for_the_dead.then(|| self.port.clone());
        async move {
            port.is_confirmed().await;
            let answer = match &lies {
                Some(_) => {
                    let patience = Box::pin(network.simulation.sleep(Duration::from_millis(500)));
                    let silence = patience.map(|()| Err("silence".into()));
                    futures::future::select(asked, silence).await.factor_first().0
                }
                None => asked.await,
            };
            match (answer, lies) {
                // This node's own refusal is an answer too.
                (Err(why), Some(own)) => {
                    let log = own.log.lock().unwrap().clone();
                    let log = log.ok_or(Unreachable(why))?;
                    Ok(log.handle(coel_node::ids::peer_key(own.peer), request).await)
                }
                (answer, _) => answer.map_err(Unreachable),
            }
        }
        .boxed()
    }
}
