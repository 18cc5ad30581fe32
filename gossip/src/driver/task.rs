//! The one task that owns the swarm: feeds the pure half with what happens, and carries out what it returns.
//!
//! Owns: the swarm, the tables of connections and dials, the pure state, the published view of the members.
//! Invariants: the pure half makes every decision about load, liveness and addresses; the link of a peer exists exactly
//! while it has a connection that is not given up; there is one neighbour task per connected member.
//! Deliberately does not know: frames (streams run in tasks of their own).

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::StreamExt;
use futures::future::join_all;
use libp2p::core::ConnectedPoint;
use libp2p::swarm::{self, ConnectionId, SwarmEvent};
use libp2p::{Multiaddr, PeerId, Swarm, identify, mdns, ping};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::{mpsc, oneshot, watch};

use super::connections::Connections;
use super::dials::{self, DialPurpose, Dials};
use super::neighbours::{self, NeighbourWriter};
use crate::config::Config;
use crate::error::DialError;
use crate::membership::addresses::{AddressBook, split_peer};
use crate::membership::liveness::{self, Detector, Liveness};
use crate::membership::measure::Rtt;
use crate::membership::message::Message;
use crate::membership::process::Process;
use crate::membership::state::{self, State};
use crate::membership::status::Status;
use crate::membership::view::PeerView;
use crate::transport::endpoint::Endpoint;
use crate::transport::pool::StreamPool;
use crate::transport::swarm::{Behaviour, BehaviourEvent, connection_limits, is_refusal};

/// How often timers are looked at; the resolution of everything the pure half decides by time.
const TICK: Duration = Duration::from_millis(100);
/// Pause between dials of configured addresses while a member is missing.
const SEED_PERIOD: Duration = Duration::from_secs(10);
/// How long a former member keeps its connection.
const FAREWELL: Duration = Duration::from_secs(5);
/// How long goodbyes may take at shutdown, and then closing what is left.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(500);

/// What the node wants to be true; only the latest value counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct DesiredState {
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
    endpoint: Arc<Endpoint>,
    pool: Arc<StreamPool>,
    state: State,
    detector: Detector,
    book: AddressBook,
    rng: StdRng,
    /// Members as last applied, this node excluded.
    members: BTreeSet<PeerId>,
    /// As last applied.
    desired: DesiredState,
    connections: Connections,
    /// One per connected member.
    writers: HashMap<PeerId, NeighbourWriter>,
    writers_made: u64,
    /// Leads against the streams that a member has opened: one for each of its processes.
    reflections: HashMap<PeerId, Vec<mpsc::Sender<Message>>>,
    events: mpsc::Sender<neighbours::Event>,
    dials: Dials,
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
        endpoint: Arc<Endpoint>,
        pool: Arc<StreamPool>,
        events: mpsc::Sender<neighbours::Event>,
    ) -> Driver {
        let now = Instant::now();
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let started_ms = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX / 2);
        let mut rng = StdRng::from_os_rng();
        let process = Process { started_ms, nonce: rng.random() };
        let mut book = AddressBook::default();
        swarm.listeners().for_each(|address| book.add_own(address));
        for address in &config.peers {
            if let (address, Some(peer)) = split_peer(address) {
                book.confirm(peer, &address);
            }
        }
        Driver {
            state: State::new(config.identity.clone(), process, config.status, now),
            detector: Detector::new(config.liveness, now),
            book,
            rng,
            members: BTreeSet::new(),
            desired: DesiredState::default(),
            connections: Connections::default(),
            writers: HashMap::new(),
            writers_made: 0,
            reflections: HashMap::new(),
            events,
            dials: Dials::default(),
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
            endpoint,
            pool,
        }
    }

    /// Runs until shutdown, or until the last handle is dropped. `early` are events that the swarm reported before.
    pub async fn run(
        mut self,
        early: Vec<SwarmEvent<BehaviourEvent>>,
        mut commands: mpsc::Receiver<Command>,
        mut desired: watch::Receiver<DesiredState>,
        mut neighbours: mpsc::Receiver<neighbours::Event>,
    ) {
        // Also when this future is dropped with its runtime: nothing may wait on a driver that is gone.
        let _stopped = self.endpoint.stopped.clone().drop_guard();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        early.into_iter().for_each(|event| self.on_swarm(event));
        let done = loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Dial { addresses, peer, reply }) => self.dial_requested(&addresses, peer, reply),
                    Some(Command::Shutdown { done }) => break Some(done),
                    None => break None,
                },
                Ok(()) = desired.changed() => {
                    let desired = desired.borrow_and_update().clone();
                    self.on_desired(desired);
                }
                event = self.swarm.select_next_some() => self.on_swarm(event),
                Some(event) = neighbours.recv() => self.on_neighbour(event),
                _ = tick.tick() => self.on_tick(),
            }
            if self.urgent {
                self.publish();
            }
            if self.endpoint.duplicate().is_some() {
                break None;
            }
        };
        // A duplicate just goes: the node is still here, in another process.
        if self.endpoint.duplicate().is_none() {
            self.say_goodbye(&mut neighbours).await;
        }
        // Links are cut first, so that nothing is pending once the node counts as stopped.
        self.connections.peers().for_each(|peer| self.cut_link(peer));
        self.close().await;
        self.endpoint.stopped.cancel();
        drop(self);
        if let Some(done) = done {
            let _ = done.send(()); // the caller may have gone
        }
    }

    fn on_desired(&mut self, desired: DesiredState) {
        if !Arc::ptr_eq(&desired.members, &self.desired.members) {
            self.set_members(&desired.members);
        }
        if let Some(status) = desired.status {
            self.feed_state(state::Input::SetStatus(status));
        }
        if let Some(facts) = &desired.facts {
            self.feed_state(state::Input::SetFacts(facts.clone()));
        }
        self.desired = desired;
    }

    fn set_members(&mut self, desired: &BTreeMap<PeerId, Vec<Multiaddr>>) {
        let others = || desired.iter().filter(|(peer, _)| **peer != self.endpoint.me);
        let given: BTreeMap<PeerId, Vec<Multiaddr>> = others().map(|(peer, at)| (*peer, at.clone())).collect();
        let members: BTreeSet<PeerId> = given.keys().copied().collect();
        let before = std::mem::replace(&mut self.members, members.clone());
        let limits = &mut self.swarm.behaviour_mut().limits;
        *limits.limits_mut() = connection_limits(self.strangers_max, members.len());
        members.iter().for_each(|peer| limits.bypass_peer_id(peer));
        for peer in before.difference(&members) {
            limits.remove_peer_id(peer);
            self.writers.remove(peer);
            self.reflections.remove(peer);
            self.heard.remove(peer);
            self.rtt.remove(peer);
            self.farewells.insert(*peer, Instant::now() + FAREWELL);
        }
        let moved = self.book.set_members(&given);
        self.feed_state(state::Input::SetMembers(members.clone()));
        self.feed_detector(liveness::Input::Members(members.clone()));
        for peer in members.difference(&before).copied() {
            self.farewells.remove(&peer);
            if self.connections.has(&peer) {
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
            let endpoint = self.endpoint.clone();
            let writer = NeighbourWriter::spawn(self.writers_made, peer, endpoint, self.events.clone());
            self.writers.insert(peer, writer);
        }
    }

    fn on_swarm(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                self.on_established(peer_id, connection_id, &endpoint);
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, cause, .. } => {
                tracing::debug!(peer = %peer_id, ?cause, "a connection closed");
                self.on_closed(peer_id, connection_id);
            }
            SwarmEvent::OutgoingConnectionError { connection_id, error, .. } => {
                self.on_dial_failed(connection_id, &error);
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                self.book.add_own(&address);
                self.endpoint.listening.send_modify(|listening| listening.push(address));
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.endpoint.listening.send_modify(|listening| listening.retain(|known| *known != address));
            }
            SwarmEvent::ListenerClosed { addresses, reason, .. } => {
                tracing::warn!(?addresses, ?reason, "a listener closed");
            }
            SwarmEvent::Behaviour(BehaviourEvent::Ping(event)) => self.on_ping(&event),
            SwarmEvent::Behaviour(BehaviourEvent::Identify(identify::Event::Received {
                peer_id,
                connection_id,
                info,
            })) => self.on_identified(peer_id, connection_id, &info.listen_addrs),
            SwarmEvent::Behaviour(BehaviourEvent::Mdns(mdns::Event::Discovered(found))) => {
                let mut by_peer: BTreeMap<PeerId, Vec<Multiaddr>> = BTreeMap::new();
                found.into_iter().for_each(|(peer, address)| by_peer.entry(peer).or_default().push(address));
                for (peer, addresses) in by_peer {
                    if self.book.announced(peer, &addresses) {
                        self.feed_detector(liveness::Input::AddressLearned(peer));
                    }
                }
            }
            _ => {}
        }
    }

    fn on_established(&mut self, peer: PeerId, id: ConnectionId, endpoint: &ConnectedPoint) {
        let remote = endpoint.get_remote_address().clone();
        if endpoint.is_dialer() {
            self.book.confirm(peer, &remote);
        }
        if let Some(surplus) = self.connections.add(peer, id, remote, Instant::now()) {
            self.swarm.close_connection(surplus);
        }
        self.endpoint.ensure_link(peer);
        self.dials.connected(id, peer);
        if self.members.contains(&peer) {
            self.heard.insert(peer, Instant::now());
            self.greet(peer);
        }
        self.urgent = true;
    }

    fn on_closed(&mut self, peer: PeerId, id: ConnectionId) {
        if !self.connections.remove(&peer, id) {
            return;
        }
        self.cut_link(&peer);
        self.unlink(peer);
        self.feed_detector(liveness::Input::ConnectionLost(peer));
        self.urgent = true;
    }

    fn on_ping(&mut self, event: &ping::Event) {
        let Ok(sample) = event.result else { return };
        let peer = event.peer;
        self.connections.answered(&peer, event.connection, Instant::now());
        if self.members.contains(&peer) {
            self.rtt.insert(peer, Rtt::after(self.rtt.get(&peer).copied(), sample));
            self.on_heard(peer);
        }
    }

    fn on_heard(&mut self, peer: PeerId) {
        self.heard.insert(peer, Instant::now());
        self.dirty = true;
        self.feed_detector(liveness::Input::Heard(peer));
    }

    fn on_identified(&mut self, peer: PeerId, id: ConnectionId, listens: &[Multiaddr]) {
        let Some(remote) = self.connections.remote(&peer, id) else { return };
        if self.book.identified(peer, listens, remote) {
            self.feed_detector(liveness::Input::AddressLearned(peer));
        }
    }

    /// Ends everything that waits on a stream of `peer`, and drops its idle streams.
    fn cut_link(&self, peer: &PeerId) {
        self.endpoint.cut_link(peer);
        self.pool.forget(peer);
    }

    /// Gives up every connection to `peer`; what waits on it fails now, not when the transport notices.
    fn cut(&mut self, peer: PeerId) {
        self.cut_link(&peer);
        self.unlink(peer);
        // An error means that there is no connection to close.
        let _ = self.swarm.disconnect_peer_id(peer);
    }

    fn unlink(&mut self, peer: PeerId) {
        if self.writers.remove(&peer).is_some() {
            self.feed_state(state::Input::Unlinked(peer));
        }
    }

    /// Returns the failure, if the dial failed on the spot.
    fn dial_member(&mut self, peer: PeerId, attempt: u32) -> Option<liveness::Input> {
        let options = dials::to_peer(peer, self.book.to_dial(&peer, attempt));
        let connection = options.connection_id();
        match self.swarm.dial(options) {
            Ok(()) => {
                self.dials.began(connection, DialPurpose::Member(peer));
                None
            }
            Err(error) => {
                tracing::debug!(%peer, %error, "cannot dial a member");
                Some(liveness::Input::DialFailed { peer, refused: false })
            }
        }
    }

    fn dial_requested(
        &mut self,
        addresses: &[Multiaddr],
        peer: Option<PeerId>,
        reply: oneshot::Sender<Result<PeerId, DialError>>,
    ) {
        let (named, open) = dials::by_peer(addresses, peer);
        if let Some(connected) = named.keys().find(|peer| self.connections.has(peer)) {
            let _ = reply.send(Ok(*connected)); // the caller may have gone
            return;
        }
        let request = self.dials.request(reply);
        let open = open.into_iter().map(dials::to_address);
        for options in open.chain(named.into_iter().map(|(peer, addresses)| dials::to_peer(peer, addresses))) {
            let connection = options.connection_id();
            match self.swarm.dial(options) {
                Ok(()) => self.dials.began(connection, DialPurpose::Requested(request)),
                Err(error) => self.dials.refuse(request, error.to_string()),
            }
        }
        self.dials.settle(request);
    }

    fn on_dial_failed(&mut self, connection: ConnectionId, error: &swarm::DialError) {
        match self.dials.failed(connection, error) {
            Some(DialPurpose::Member(peer)) => {
                let mut refused = is_refusal(error);
                tracing::debug!(%peer, %error, refused, "cannot reach a member");
                if let swarm::DialError::WrongPeerId { address, .. } | swarm::DialError::LocalPeerId { address } = error
                {
                    // One wrong address hides the right ones, because the dial ends with the first that answers.
                    self.book.forget(&peer, address);
                    refused = self.book.of(&peer).is_empty();
                }
                self.feed_detector(liveness::Input::DialFailed { peer, refused });
            }
            Some(DialPurpose::Seed) => tracing::debug!(%error, "no peer at a configured address"),
            Some(DialPurpose::Requested(_)) | None => {}
        }
    }

    /// Dials configured addresses that name no peer, while a member has no connection.
    fn dial_seeds(&mut self, now: Instant) {
        let missing = self.members.iter().any(|peer| !self.connections.has(peer));
        if now < self.seeds_at || !missing {
            return;
        }
        self.seeds_at = now + SEED_PERIOD;
        for seed in self.seeds.iter().filter(|seed| !self.connections.leads_to(seed)) {
            let options = dials::to_address(seed.clone());
            let connection = options.connection_id();
            match self.swarm.dial(options) {
                Ok(()) => self.dials.began(connection, DialPurpose::Seed),
                Err(error) => tracing::debug!(%seed, %error, "cannot dial a configured address"),
            }
        }
    }

    fn on_neighbour(&mut self, event: neighbours::Event) {
        let is_current = |driver: &Driver, peer: &PeerId, writer: u64| {
            driver.writers.get(peer).is_some_and(|current| current.id == writer)
        };
        match event {
            neighbours::Event::Linked { peer, writer } if is_current(self, &peer, writer) => {
                self.feed_state(state::Input::Linked(peer));
            }
            neighbours::Event::Unlinked { peer, writer } if is_current(self, &peer, writer) => {
                self.feed_state(state::Input::Unlinked(peer));
            }
            // Of a writer that was replaced meanwhile.
            neighbours::Event::Linked { .. } | neighbours::Event::Unlinked { .. } => {}
            neighbours::Event::Opened { peer, reflections } => {
                let streams = self.reflections.entry(peer).or_default();
                streams.retain(|stream| !stream.is_closed());
                streams.push(reflections);
            }
            neighbours::Event::Message { peer, message } => self.feed_state(state::Input::Received(peer, message)),
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
                state::Output::Reflect { to, message } => {
                    for stream in self.reflections.get(&to).into_iter().flatten() {
                        // A stream that has ended, or is full, needs none.
                        let _ = stream.try_send(message.clone());
                    }
                }
                state::Output::Alternates(peer) => {
                    self.urgent = true;
                    tracing::warn!(
                        %peer,
                        "two processes run with the identity of one member: its data folder was copied. The later one stops by itself"
                    );
                }
                state::Output::Confirmed => self.endpoint.confirm(),
                state::Output::Duplicate(earlier) => self.endpoint.set_duplicate(earlier.started_ms),
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
            if self.endpoint.link(&peer).is_some_and(|link| link.take_heard()) {
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
        for connection in self.connections.stale(self.suspect_after, now) {
            self.swarm.close_connection(connection);
        }
        self.dial_seeds(now);
        self.dials.prune();
        if self.dirty {
            self.publish();
        }
    }

    fn publish(&mut self) {
        self.dirty = false;
        self.urgent = false;
        let now = Instant::now();
        let view = |peer: &PeerId| {
            let record = self.state.record(peer);
            let status = record.and_then(|record| record.status.as_ref());
            let facts = record.and_then(|record| record.facts.as_ref());
            let link = self.endpoint.link(peer);
            PeerView {
                liveness: self.detector.liveness(peer).unwrap_or(Liveness::Suspect),
                connected: link.is_some(),
                status: status.map(|status| status.value),
                facts: facts.map(|facts| facts.value.clone()),
                started_ms: record.map_or(0, |record| record.incarnation.process.started_ms),
                alternates: self.state.alternates(peer, now),
                status_version: status.map_or(0, |status| status.version),
                facts_version: facts.map_or(0, |facts| facts.version),
                rtt: self.rtt.get(peer).copied(),
                throughput_bytes_s: link.and_then(|link| link.throughput_bytes_s()),
                addresses: self.book.of(peer),
                last_heard: self.heard.get(peer).copied(),
            }
        };
        let peers = self.members.iter().map(|peer| (*peer, view(peer))).collect();
        self.endpoint.peers.send_replace(Arc::new(peers));
    }

    /// Tells every neighbour that this node is ending and lets them close, which is how they say that they have
    /// heard. Not for long.
    async fn say_goodbye(&mut self, neighbours: &mut mpsc::Receiver<neighbours::Event>) {
        neighbours.close();
        let bye = self.state.farewell();
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
        // A peer that does not answer hears nothing, as if this process had been killed.
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, parting).await;
    }

    /// Closes every connection, so that others see it at once.
    async fn close(&mut self) {
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
