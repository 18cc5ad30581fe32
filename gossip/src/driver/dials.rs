//! Dialling: members that the detector wants back, peers that a handle requested, and configured addresses.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{self, ConnectionId};
use libp2p::{Multiaddr, PeerId};
use tokio::sync::oneshot;

use super::Driver;
use crate::error::DialError;
use crate::membership::addresses::split_peer;
use crate::membership::liveness;
use crate::transport::swarm::is_refusal;

/// Pause between dials of configured addresses while a member is missing.
const SEED_PERIOD: Duration = Duration::from_secs(10);

/// Why a dial is under way.
pub(super) enum DialPurpose {
    Member(PeerId),
    /// A handle waits for it, under this number.
    Requested(u64),
    /// A configured address.
    Seed,
}

/// A dial that a handle waits for; it may make several attempts at once.
pub(super) struct RequestedDial {
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
                self.dials.insert(connection, DialPurpose::Member(peer));
                None
            }
            Err(error) => {
                tracing::debug!(%peer, %error, "cannot dial a member");
                Some(liveness::Input::DialFailed { peer, refused: false })
            }
        }
    }

    pub(super) fn dial_requested(
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
            let _ = reply.send(Ok(*connected)); // the caller may have gone
            return;
        }
        for (peer, addresses) in by_peer {
            let always = DialOpts::peer_id(peer).condition(PeerCondition::Always);
            options.push(always.addresses(addresses).allocate_new_port().build());
        }
        let id = self.requests_made;
        self.requests_made += 1;
        let mut dial = RequestedDial { reply, under_way: 0, causes: Vec::new() };
        for options in options {
            let connection = options.connection_id();
            match self.swarm.dial(options) {
                Ok(()) => {
                    dial.under_way += 1;
                    self.dials.insert(connection, DialPurpose::Requested(id));
                }
                Err(error) => dial.causes.push(error.to_string()),
            }
        }
        self.requested.insert(id, dial);
        self.settle_requested(id);
    }

    /// Answers a dial that has no attempt left.
    pub(super) fn settle_requested(&mut self, id: u64) {
        if self.requested.get(&id).is_some_and(|dial| dial.under_way == 0)
            && let Some(dial) = self.requested.remove(&id)
        {
            // The caller may have gone.
            let _ = dial.reply.send(Err(DialError::Failed { causes: dial.causes }));
        }
    }

    pub(super) fn on_dial_failed(&mut self, connection: ConnectionId, error: &swarm::DialError) {
        match self.dials.remove(&connection) {
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
            Some(DialPurpose::Requested(id)) => {
                if let Some(dial) = self.requested.get_mut(&id) {
                    dial.under_way -= 1;
                    dial.causes.push(error.to_string());
                    self.settle_requested(id);
                }
            }
            Some(DialPurpose::Seed) => tracing::debug!(%error, "no peer at a configured address"),
            None => {}
        }
    }

    /// Dials configured addresses that name no peer, while a member has no connection.
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
                Ok(()) => drop(self.dials.insert(connection, DialPurpose::Seed)),
                Err(error) => tracing::debug!(%seed, %error, "cannot dial a configured address"),
            }
        }
    }
}
