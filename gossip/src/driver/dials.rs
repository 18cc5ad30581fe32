//! Dialling: members the detector wants back, peers somebody asked for, and given addresses.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{self, ConnectionId};
use libp2p::{Multiaddr, PeerId};
use tokio::sync::oneshot;

use super::Driver;
use crate::addresses::split_peer;
use crate::error::DialError;
use crate::liveness;
use crate::swarm::is_refusal;

/// Pause between dials of given addresses while a member is missing.
const SEED_PERIOD: Duration = Duration::from_secs(10);

/// On whose behalf a dial is under way.
pub(super) enum Purpose {
    Member(PeerId),
    Asked(u64),
    Seed,
}

/// A dial somebody waits for, which may take several attempts at once.
pub(super) struct Asked {
    pub(super) reply: oneshot::Sender<Result<PeerId, DialError>>,
    pub(super) under_way: usize,
    pub(super) causes: Vec<String>,
}

impl Driver {
    /// Returns the failure, if the dial failed on the spot.
    pub(super) fn dial_member(&mut self, peer: PeerId, attempt: u32) -> Option<liveness::Input> {
        let addresses = self.book.to_dial(&peer, attempt);
        // Beside an existing connection too: the detector asks for that when it no longer trusts it. And from a
        // new port each time: two nodes that dial each other between the same two ports would open one and the
        // same TCP connection, with both ends believing that they began it.
        let options =
            DialOpts::peer_id(peer).condition(PeerCondition::Always).addresses(addresses).allocate_new_port().build();
        let connection = options.connection_id();
        match self.swarm.dial(options) {
            Ok(()) => {
                self.dials.insert(connection, Purpose::Member(peer));
                None
            }
            Err(error) => {
                tracing::debug!(%peer, %error, "cannot dial a member");
                Some(liveness::Input::DialFailed { peer, refused: false })
            }
        }
    }

    pub(super) fn dial_asked(
        &mut self,
        addresses: Vec<Multiaddr>,
        peer: Option<PeerId>,
        reply: oneshot::Sender<Result<PeerId, DialError>>,
    ) {
        let mut by_peer: BTreeMap<PeerId, Vec<Multiaddr>> = BTreeMap::new();
        let mut options = Vec::new();
        for address in &addresses {
            let (bare, named) = split_peer(address);
            match peer.or(named) {
                Some(peer) => by_peer.entry(peer).or_default().push(bare),
                None => {
                    options.push(DialOpts::unknown_peer_id().address(bare).allocate_new_port().build());
                }
            }
        }
        if let Some(connected) = by_peer.keys().find(|peer| self.connections.contains_key(peer)) {
            let _ = reply.send(Ok(*connected)); // whoever asked may have gone
            return;
        }
        for (peer, addresses) in by_peer {
            let always = DialOpts::peer_id(peer).condition(PeerCondition::Always);
            options.push(always.addresses(addresses).allocate_new_port().build());
        }
        let id = self.asked_made;
        self.asked_made += 1;
        let mut asked = Asked { reply, under_way: 0, causes: Vec::new() };
        for options in options {
            let connection = options.connection_id();
            match self.swarm.dial(options) {
                Ok(()) => {
                    asked.under_way += 1;
                    self.dials.insert(connection, Purpose::Asked(id));
                }
                Err(error) => asked.causes.push(error.to_string()),
            }
        }
        self.asked.insert(id, asked);
        self.settle_asked(id);
    }

    /// Answers a dial that has no attempt left.
    pub(super) fn settle_asked(&mut self, id: u64) {
        if self.asked.get(&id).is_some_and(|asked| asked.under_way == 0)
            && let Some(asked) = self.asked.remove(&id)
        {
            let _ = asked.reply.send(Err(DialError::Failed { causes: asked.causes }));
        }
    }

    pub(super) fn on_dial_failed(&mut self, connection: ConnectionId, error: &swarm::DialError) {
        match self.dials.remove(&connection) {
            Some(Purpose::Member(peer)) => {
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
            Some(Purpose::Asked(id)) => {
                if let Some(asked) = self.asked.get_mut(&id) {
                    asked.under_way -= 1;
                    asked.causes.push(error.to_string());
                    self.settle_asked(id);
                }
            }
            Some(Purpose::Seed) => tracing::debug!(%error, "nobody at a given address"),
            None => {}
        }
    }

    /// Looks at given addresses that name no peer, while a member has no connection.
    pub(super) fn dial_seeds(&mut self, now: Instant) {
        let missing = self.members.iter().any(|peer| !self.connections.contains_key(peer));
        if now < self.seeds_at || !missing {
            return;
        }
        self.seeds_at = now + SEED_PERIOD;
        for seed in &self.seeds {
            let mut connected = self.connections.values().flatten();
            if connected.any(|connection| split_peer(&connection.remote).0 == *seed) {
                continue;
            }
            let options = DialOpts::unknown_peer_id().address(seed.clone()).allocate_new_port().build();
            let connection = options.connection_id();
            match self.swarm.dial(options) {
                Ok(()) => drop(self.dials.insert(connection, Purpose::Seed)),
                Err(error) => tracing::debug!(%seed, %error, "cannot dial a given address"),
            }
        }
    }
}
