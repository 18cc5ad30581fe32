//! The one task that owns the swarm: feeds the pure half with what happens, and does what it returns.
//!
//! Owns: the swarm, the connections, the pure state, the published view of the members.
//! Invariants: every decision about load, liveness and addresses is made by the pure half; the link of a peer
//! exists exactly while it has a connection that is not given up.
//! Deliberately does not know: frames (streams run in tasks of their own).

mod connections;
mod dials;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::StreamExt;
use futures::future::join_all;
use libp2p::swarm::{ConnectionId, SwarmEvent};
use libp2p::{Multiaddr, PeerId, Swarm};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::{mpsc, oneshot, watch};

use self::connections::Connection;
use self::dials::{Asked, Purpose};
use crate::addresses::{AddressBook, split_peer};
use crate::config::Config;
use crate::error::DialError;
use crate::link::Shared;
use crate::liveness::{self, Detector, Liveness};
use crate::measure::Rtt;
use crate::message::Message;
use crate::neighbour::{self, Writer};
use crate::state::{self, State};
use crate::status::Status;
use crate::swarm::{Behaviour, BehaviourEvent, connection_limits};
use crate::view::PeerView;

/// How often timers are looked at; the resolution of everything the pure half decides by time.
const TICK: Duration = Duration::from_millis(100);
/// How long a former member keeps its connection.
const FAREWELL: Duration = Duration::from_secs(5);
/// How long goodbyes may take at shutdown, and then closing what is left.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(500);
/// What the node wants; only the latest counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wishes {
    pub members: Arc<BTreeMap<PeerId, Vec<Multiaddr>>>,
    pub status: Option<Status>,
    pub facts: Option<Bytes>,
}

#[derive(Debug)]
pub(crate) enum Command {
    Dial { addresses: Vec<Multiaddr>, peer: Option<PeerId>, reply: oneshot::Sender<Result<PeerId, DialError>> },
    Shutdown { done: oneshot::Sender<()> },
}

pub(crate) struct Driver {
    swarm: Swarm<Behaviour>,
    shared: Arc<Shared>,
    state: State,
    detector: Detector,
    book: AddressBook,
    rng: StdRng,
    /// Members as last applied, this node excluded.
    members: BTreeSet<PeerId>,
    wished: Wishes,
    connections: HashMap<PeerId, Vec<Connection>>,
    writers: HashMap<PeerId, Writer>,
    writers_made: u64,
    events: mpsc::Sender<neighbour::Event>,
    dials: HashMap<ConnectionId, Purpose>,
    asked: HashMap<u64, Asked>,
    asked_made: u64,
    /// Former members and when to disconnect them.
    farewells: HashMap<PeerId, Instant>,
    rtt: HashMap<PeerId, Rtt>,
    heard: HashMap<PeerId, Instant>,
    seeds: Vec<Multiaddr>,
    seeds_at: Instant,
    strangers_max: u32,
    suspect_after: Duration,
    /// The view is out of date; published at the next tick, or at once if `urgent`.
    dirty: bool,
    urgent: bool,
}

impl Driver {
    pub fn new(
        config: Config,
        swarm: Swarm<Behaviour>,
        shared: Arc<Shared>,
        events: mpsc::Sender<neighbour::Event>,
    ) -> Driver {
        let now = Instant::now();
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let incarnation = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX / 2);
        let mut book = AddressBook::default();
        swarm.listeners().for_each(|address| book.add_own(address));
        for address in &config.peers {
            if let (address, Some(peer)) = split_peer(address) {
                book.confirm(peer, &address);
            }
        }
        Driver {
            state: State::new(shared.me, incarnation, config.status, now),
            detector: Detector::new(config.liveness, now),
            book,
            rng: StdRng::from_os_rng(),
            members: BTreeSet::new(),
            wished: Wishes::default(),
            connections: HashMap::new(),
            writers: HashMap::new(),
            writers_made: 0,
            events,
            dials: HashMap::new(),
            asked: HashMap::new(),
            asked_made: 0,
            farewells: HashMap::new(),
            rtt: HashMap::new(),
            heard: HashMap::new(),
            seeds: config.peers.into_iter().filter(|address| split_peer(address).1.is_none()).collect(),
            seeds_at: now,
            strangers_max: config.strangers_max,
            suspect_after: config.liveness.suspect_after,
            dirty: false,
            urgent: false,
            swarm,
            shared,
        }
    }

    /// Runs until shutdown, or until nobody holds a handle any more. `early` is what the swarm reported before.
    pub async fn run(
        mut self,
        early: Vec<SwarmEvent<BehaviourEvent>>,
        mut commands: mpsc::Receiver<Command>,
        mut wishes: watch::Receiver<Wishes>,
        mut neighbours: mpsc::Receiver<neighbour::Event>,
    ) {
        // Also when this future is dropped with its runtime: nothing may wait on a driver that is gone.
        let _stopped = self.shared.stopped.clone().drop_guard();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        early.into_iter().for_each(|event| self.on_swarm(event));
        let done = loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Dial { addresses, peer, reply }) => self.dial_asked(addresses, peer, reply),
                    Some(Command::Shutdown { done }) => break Some(done),
                    None => break None,
                },
                Ok(()) = wishes.changed() => {
                    let wishes = wishes.borrow_and_update().clone();
                    self.on_wishes(wishes);
                }
                event = self.swarm.select_next_some() => self.on_swarm(event),
                Some(event) = neighbours.recv() => self.on_neighbour(event),
                _ = tick.tick() => self.on_tick(),
            }
            if self.urgent {
                self.publish();
            }
        };
        self.say_goodbye(&mut neighbours).await;
        // Cut links first: whoever is told that the node has stopped finds nothing pending.
        self.connections.keys().for_each(|peer| self.shared.cut_link(peer));
        self.shared.stopped.cancel();
        drop(self);
        if let Some(done) = done {
            let _ = done.send(()); // whoever asked may have gone
        }
    }

    fn on_wishes(&mut self, wishes: Wishes) {
        if !Arc::ptr_eq(&wishes.members, &self.wished.members) {
            self.set_members(&wishes.members);
        }
        if let Some(status) = wishes.status {
            self.feed_state(state::Input::SetStatus(status));
        }
        if let Some(facts) = &wishes.facts {
            self.feed_state(state::Input::SetFacts(facts.clone()));
        }
        self.wished = wishes;
    }

    fn set_members(&mut self, wished: &BTreeMap<PeerId, Vec<Multiaddr>>) {
        let others = || wished.iter().filter(|(peer, _)| **peer != self.shared.me);
        let given: BTreeMap<PeerId, Vec<Multiaddr>> = others().map(|(peer, at)| (*peer, at.clone())).collect();
        let members: BTreeSet<PeerId> = given.keys().copied().collect();
        let before = std::mem::replace(&mut self.members, members.clone());
        let limits = &mut self.swarm.behaviour_mut().limits;
        *limits.limits_mut() = connection_limits(self.strangers_max, members.len());
        members.iter().for_each(|peer| limits.bypass_peer_id(peer));
        for peer in before.difference(&members) {
            limits.remove_peer_id(peer);
            self.writers.remove(peer);
            self.heard.remove(peer);
            self.rtt.remove(peer);
            self.farewells.insert(*peer, Instant::now() + FAREWELL);
        }
        let moved = self.book.set_members(&given);
        self.feed_state(state::Input::SetMembers(members.clone()));
        self.feed_detector(liveness::Input::Members(members.clone()));
        for peer in members.difference(&before).copied() {
            self.farewells.remove(&peer);
            if self.connections.contains_key(&peer) {
                self.greet(peer);
            }
        }
        // New members are being dialled already.
        for peer in moved.into_iter().filter(|peer| before.contains(peer)) {
            self.feed_detector(liveness::Input::AddressLearned(peer));
        }
        self.urgent = true;
    }

    /// A member with a connection.
    fn greet(&mut self, peer: PeerId) {
        self.feed_detector(liveness::Input::Connected(peer));
        if !self.writers.contains_key(&peer) {
            self.writers_made += 1;
            let writer = Writer::spawn(self.writers_made, peer, self.shared.clone(), self.events.clone());
            self.writers.insert(peer, writer);
        }
    }

    fn on_neighbour(&mut self, event: neighbour::Event) {
        let is_current = |driver: &Driver, peer: &PeerId, writer: u64| {
            driver.writers.get(peer).is_some_and(|current| current.id == writer)
        };
        match event {
            neighbour::Event::Linked { peer, writer } if is_current(self, &peer, writer) => {
                self.feed_state(state::Input::Linked(peer));
            }
            neighbour::Event::Unlinked { peer, writer } if is_current(self, &peer, writer) => {
                self.feed_state(state::Input::Unlinked(peer));
            }
            // Of a writer that was replaced meanwhile.
            neighbour::Event::Linked { .. } | neighbour::Event::Unlinked { .. } => {}
            neighbour::Event::Message { peer, message } => self.feed_state(state::Input::Received(peer, message)),
        }
    }

    fn feed_state(&mut self, input: state::Input) {
        for output in self.state.handle(input, Instant::now(), &mut self.rng) {
            match output {
                state::Output::Send { to, message } => {
                    if let Some(writer) = self.writers.get(&to) {
                        writer.send(message);
                    }
                }
                state::Output::Changed(_) => self.dirty = true,
                state::Output::Left(peer) => {
                    tracing::info!(%peer, "a member said goodbye");
                    self.feed_detector(liveness::Input::Left(peer));
                }
            }
        }
    }

    fn feed_detector(&mut self, input: liveness::Input) {
        // A dial may fail on the spot, which is news for the detector again.
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            for output in self.detector.handle(input, Instant::now(), &mut self.rng) {
                match output {
                    liveness::Output::Dial { peer, attempt } => inputs.extend(self.dial_member(peer, attempt)),
                    liveness::Output::Close(peer) => self.cut(peer),
                    liveness::Output::Changed(peer, liveness) => {
                        match liveness {
                            Liveness::Up => tracing::info!(%peer, "a member is up"),
                            Liveness::Suspect => tracing::debug!(%peer, "a member is suspect"),
                            Liveness::Down => tracing::info!(%peer, "a member is down"),
                        }
                        self.urgent = true;
                    }
                }
            }
        }
    }

    fn on_tick(&mut self) {
        let now = Instant::now();
        for peer in self.members.clone() {
            if self.shared.link(&peer).is_some_and(|link| link.take_heard()) {
                self.on_heard(peer);
            }
        }
        self.feed_detector(liveness::Input::Tick);
        self.feed_state(state::Input::Tick);
        let parting: Vec<PeerId> = self.farewells.iter().filter(|(_, at)| **at <= now).map(|(peer, _)| *peer).collect();
        for peer in parting {
            self.farewells.remove(&peer);
            self.cut(peer);
        }
        self.close_stale(now);
        self.dial_seeds(now);
        self.asked.retain(|_, asked| !asked.reply.is_closed());
        if self.dirty {
            self.publish();
        }
    }

    fn publish(&mut self) {
        self.dirty = false;
        self.urgent = false;
        let view = |peer: &PeerId| {
            let record = self.state.record(peer);
            let status = record.and_then(|record| record.status.as_ref());
            let facts = record.and_then(|record| record.facts.as_ref());
            let link = self.shared.link(peer);
            PeerView {
                liveness: self.detector.liveness(peer).unwrap_or(Liveness::Suspect),
                connected: link.is_some(),
                status: status.map(|status| status.value),
                facts: facts.map(|facts| facts.value.clone()),
                incarnation: record.map_or(0, |record| record.incarnation),
                status_version: status.map_or(0, |status| status.version),
                facts_version: facts.map_or(0, |facts| facts.version),
                rtt: self.rtt.get(peer).copied(),
                throughput_bytes_s: link.and_then(|link| link.throughput_bytes_s()),
                addresses: self.book.of(peer),
                last_heard: self.heard.get(peer).copied(),
            }
        };
        let peers = self.members.iter().map(|peer| (*peer, view(peer))).collect();
        self.shared.peers.send_replace(Arc::new(peers));
    }

    /// Tells every neighbour that this node is ending and lets them close, which is how they say that they have
    /// heard; then closes what is left. None of it for long.
    async fn say_goodbye(&mut self, neighbours: &mut mpsc::Receiver<neighbour::Event>) {
        neighbours.close();
        let bye = Message::Bye { incarnation: self.state.incarnation() };
        let told: Vec<PeerId> = self.writers.keys().copied().collect();
        let telling = join_all(self.writers.drain().map(|(_, writer)| writer.finish(bye.clone())));
        let swarm = &mut self.swarm;
        let parting = async {
            let mut telling = std::pin::pin!(telling);
            loop {
                tokio::select! {
                    _ = &mut telling => break,
                    _ = swarm.select_next_some() => {}
                }
            }
            while told.iter().any(|peer| swarm.is_connected(peer)) {
                swarm.select_next_some().await;
            }
        };
        // Whoever does not answer is left without a word, as if this process had been killed.
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, parting).await;
        for peer in self.swarm.connected_peers().copied().collect::<Vec<_>>() {
            let _ = self.swarm.disconnect_peer_id(peer); // it is connected
        }
        let closing = async {
            while self.swarm.connected_peers().next().is_some() {
                self.swarm.select_next_some().await;
            }
        };
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, closing).await;
    }
}
