//! What the swarm reports about connections, and when connections are given up.
//!
//! Invariant: the connections kept with one peer are bounded, also with a member.

use std::collections::BTreeMap;
use std::time::Instant;

use libp2p::core::ConnectedPoint;
use libp2p::swarm::{ConnectionId, SwarmEvent};
use libp2p::{Multiaddr, PeerId, identify, mdns, ping};

use super::Driver;
use super::dials::DialPurpose;
use crate::membership::measure::Rtt;
use crate::membership::{liveness, state};
use crate::transport::swarm::BehaviourEvent;

/// Connections kept with one peer: one dialled by each side, each being replaced, twice. Members pass the limits of the
/// swarm, so this bounds theirs.
const CONNECTIONS_PER_PEER_MAX: usize = 8;

/// One established connection.
pub(super) struct Connection {
    pub(super) id: ConnectionId,
    pub(super) remote: Multiaddr,
    /// When it was established, or last answered a ping.
    pub(super) alive: Instant,
}

impl Driver {
    pub(super) fn on_swarm(&mut self, event: SwarmEvent<BehaviourEvent>) {
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

    pub(super) fn on_established(&mut self, peer: PeerId, id: ConnectionId, endpoint: &ConnectedPoint) {
        let remote = endpoint.get_remote_address().clone();
        if endpoint.is_dialer() {
            self.book.confirm(peer, &remote);
        }
        let connections = self.connections.entry(peer).or_default();
        connections.push(Connection { id, remote, alive: Instant::now() });
        // The one that has been silent for longest goes: what a restarted process left behind, if there is such.
        if connections.len() > CONNECTIONS_PER_PEER_MAX
            && let Some(oldest) = connections.iter().min_by_key(|connection| connection.alive)
        {
            self.swarm.close_connection(oldest.id);
        }
        self.endpoint.ensure_link(peer);
        if let Some(DialPurpose::Requested(request)) = self.dials.remove(&id)
            && let Some(dial) = self.requested.remove(&request)
        {
            let _ = dial.reply.send(Ok(peer)); // the caller may have gone
        }
        if self.members.contains(&peer) {
            self.heard.insert(peer, Instant::now());
            self.greet(peer);
        }
        self.urgent = true;
    }

    pub(super) fn on_closed(&mut self, peer: PeerId, id: ConnectionId) {
        let Some(connections) = self.connections.get_mut(&peer) else {
            return;
        };
        connections.retain(|connection| connection.id != id);
        if !connections.is_empty() {
            return;
        }
        self.connections.remove(&peer);
        self.cut_link(&peer);
        self.unlink(peer);
        self.feed_detector(liveness::Input::ConnectionLost(peer));
        self.urgent = true;
    }

    pub(super) fn on_ping(&mut self, event: &ping::Event) {
        let Ok(sample) = event.result else { return };
        let peer = event.peer;
        let connections = self.connections.get_mut(&peer).into_iter().flatten();
        for connection in connections.filter(|connection| connection.id == event.connection) {
            connection.alive = Instant::now();
        }
        if self.members.contains(&peer) {
            self.rtt.insert(peer, Rtt::after(self.rtt.get(&peer).copied(), sample));
            self.on_heard(peer);
        }
    }

    pub(super) fn on_heard(&mut self, peer: PeerId) {
        self.heard.insert(peer, Instant::now());
        self.dirty = true;
        self.feed_detector(liveness::Input::Heard(peer));
    }

    pub(super) fn on_identified(&mut self, peer: PeerId, id: ConnectionId, listens: &[Multiaddr]) {
        let mut connections = self.connections.get(&peer).into_iter().flatten();
        let Some(connection) = connections.find(|connection| connection.id == id) else {
            return;
        };
        let remote = connection.remote.clone();
        if self.book.identified(peer, listens, &remote) {
            self.feed_detector(liveness::Input::AddressLearned(peer));
        }
    }

    /// Ends everything that waits on a stream of `peer`, and drops its idle streams.
    pub(super) fn cut_link(&self, peer: &PeerId) {
        self.endpoint.cut_link(peer);
        self.pool.forget(peer);
    }

    /// Gives up every connection to `peer`; what waits on it fails now, not when the transport notices.
    pub(super) fn cut(&mut self, peer: PeerId) {
        self.cut_link(&peer);
        self.unlink(peer);
        // An error means that there is no connection to close.
        let _ = self.swarm.disconnect_peer_id(peer);
    }

    pub(super) fn unlink(&mut self, peer: PeerId) {
        if self.writers.remove(&peer).is_some() {
            self.feed_state(state::Input::Unlinked(peer));
        }
    }

    /// Closes connections that fell silent while another to the same peer did not: what a restarted process
    /// leaves behind on a transport that does not notice.
    pub(super) fn close_stale(&mut self, now: Instant) {
        for connections in self.connections.values() {
            let age = |connection: &Connection| now.saturating_duration_since(connection.alive);
            if !connections.iter().any(|connection| age(connection) < self.suspect_after / 2) {
                continue;
            }
            for connection in connections.iter().filter(|connection| age(connection) > self.suspect_after) {
                self.swarm.close_connection(connection.id);
            }
        }
    }
}
