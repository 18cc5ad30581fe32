//! The connections there are, per peer: a table without I/O.
//!
//! Invariant: a peer that is listed has at least one connection, and at most [`CONNECTIONS_PER_PEER_MAX`] that the table has
//! not asked to close. It does not know which peers are members.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use libp2p::swarm::ConnectionId;
use libp2p::{Multiaddr, PeerId};

use crate::membership::addresses::split_peer;

/// Connections kept with one peer: one dialled by each side, each being replaced, twice. Members pass the limits of the
/// swarm, so this bounds theirs.
const CONNECTIONS_PER_PEER_MAX: usize = 8;

/// One established connection.
struct Connection {
    id: ConnectionId,
    remote: Multiaddr,
    /// When it was established, or last answered a ping.
    alive: Instant,
    /// The table has asked to close it.
    closing: bool,
}

#[derive(Default)]
pub(super) struct Connections(HashMap<PeerId, Vec<Connection>>);

impl Connections {
    /// Adds a connection. Returns the one to close, if the peer has too many: the one that has been silent for longest,
    /// which a restarted process may have left behind.
    pub fn add(&mut self, peer: PeerId, id: ConnectionId, remote: Multiaddr, now: Instant) -> Option<ConnectionId> {
        let connections = self.0.entry(peer).or_default();
        connections.push(Connection { id, remote, alive: now, closing: false });
        let open = connections.iter_mut().filter(|connection| !connection.closing);
        let mut open: Vec<_> = open.collect();
        if open.len() <= CONNECTIONS_PER_PEER_MAX {
            return None;
        }
        let silent = open.iter_mut().min_by_key(|connection| connection.alive)?;
        silent.closing = true;
        Some(silent.id)
    }

    /// Removes a connection. Returns whether it was the last one of a listed peer.
    pub fn remove(&mut self, peer: &PeerId, id: ConnectionId) -> bool {
        let Some(connections) = self.0.get_mut(peer) else {
            return false;
        };
        connections.retain(|connection| connection.id != id);
        connections.is_empty() && self.0.remove(peer).is_some()
    }

    /// A connection answered a ping.
    pub fn answered(&mut self, peer: &PeerId, id: ConnectionId, now: Instant) {
        let connections = self.0.get_mut(peer).into_iter().flatten();
        connections.filter(|connection| connection.id == id).for_each(|connection| connection.alive = now);
    }

    /// Whether the peer has a connection.
    pub fn has(&self, peer: &PeerId) -> bool {
        self.0.contains_key(peer)
    }

    /// The peers that have a connection.
    pub fn peers(&self) -> impl Iterator<Item = &PeerId> {
        self.0.keys()
    }

    /// The far end of a connection.
    pub fn remote(&self, peer: &PeerId, id: ConnectionId) -> Option<&Multiaddr> {
        self.0.get(peer)?.iter().find(|connection| connection.id == id).map(|connection| &connection.remote)
    }

    /// Whether a connection leads to this address.
    pub fn leads_to(&self, address: &Multiaddr) -> bool {
        self.0.values().flatten().any(|connection| split_peer(&connection.remote).0 == *address)
    }

    /// Connections that have been silent for `silence` while another to the same peer answered lately: what a restarted
    /// process leaves behind on a transport that does not notice.
    pub fn stale(&self, silence: Duration, now: Instant) -> Vec<ConnectionId> {
        let age = |connection: &&Connection| now.saturating_duration_since(connection.alive);
        let answers = |connections: &&Vec<Connection>| connections.iter().any(|c| age(&c) < silence / 2);
        let silent = self.0.values().filter(answers).flatten().filter(|connection| age(connection) > silence);
        silent.map(|connection| connection.id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn id(number: usize) -> ConnectionId {
        ConnectionId::new_unchecked(number)
    }

    fn remote() -> Multiaddr {
        "/ip4/10.0.0.1/tcp/1".parse().expect("a multiaddress")
    }

    #[test]
    fn a_peer_is_listed_from_its_first_connection_to_its_last() {
        let (peer, now) = (PeerId::random(), Instant::now());
        let mut table = Connections::default();
        assert!(!table.remove(&peer, id(1)), "it was never listed");
        assert_eq!(table.add(peer, id(1), remote(), now), None);
        assert_eq!(table.add(peer, id(2), remote(), now), None);
        assert!(!table.remove(&peer, id(1)) && table.has(&peer));
        assert!(table.leads_to(&remote()) && table.remote(&peer, id(2)) == Some(&remote()));
        assert!(table.remove(&peer, id(2)) && !table.has(&peer));
        assert_eq!((table.peers().count(), table.leads_to(&remote())), (0, false));
    }

    #[test]
    fn beyond_the_bound_the_connection_that_was_silent_for_longest_goes() {
        let (peer, start) = (PeerId::random(), Instant::now());
        let mut table = Connections::default();
        for number in 0..CONNECTIONS_PER_PEER_MAX {
            assert_eq!(table.add(peer, id(number), remote(), start + SECOND * number as u32), None);
        }
        table.answered(&peer, id(0), start + 60 * SECOND);
        assert_eq!(table.add(peer, id(100), remote(), start + 61 * SECOND), Some(id(1)));
        assert_eq!(table.add(peer, id(101), remote(), start + 62 * SECOND), Some(id(2)), "the first is still closing");
        table.remove(&peer, id(1));
        assert_eq!(table.add(peer, id(102), remote(), start + 63 * SECOND), Some(id(3)), "one closed, two came");
    }

    #[test]
    fn a_silent_connection_is_stale_only_beside_one_that_answers() {
        let (peer, start) = (PeerId::random(), Instant::now());
        let mut table = Connections::default();
        table.add(peer, id(1), remote(), start);
        assert_eq!(table.stale(SECOND, start + 10 * SECOND), [], "there is no other");
        table.add(peer, id(2), remote(), start + 10 * SECOND);
        assert_eq!(table.stale(SECOND, start + 10 * SECOND), [id(1)]);
        table.answered(&peer, id(1), start + 10 * SECOND);
        assert_eq!(table.stale(SECOND, start + 10 * SECOND), []);
    }
}
