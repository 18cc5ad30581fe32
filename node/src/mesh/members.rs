//! The admitted members: the log lists them, gossip enforces the list. This module keeps the two equal.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use coel_gossip::{Handle, Multiaddr, PeerId};
use coel_store::{Log, NodeId};
use tokio::sync::broadcast::error::RecvError;

use crate::ids;

/// How often it is looked whether a node that left still votes.
const VOTERS_PERIOD: Duration = Duration::from_secs(1);

/// Addresses that can be used; others were written by a newer coel, or a liar.
pub fn parse(addresses: &[String]) -> Vec<Multiaddr> {
    addresses.iter().filter_map(|address| address.parse().ok()).collect()
}

/// Follows the log until it stops.
///
/// A newcomer's log is empty at first and then catches up. Until it contains this node's own admission, the members that the
/// welcome named stay, or nobody could send it the log. A node that left stays until its vote has passed on, which it could
/// not do otherwise. And a node that was away may be called by a leader it has never heard of: after an unauthorized attempt
/// the members that this node knows are asked to vouch for the stranger.
pub async fn follow(gossip: Handle, log: Log) {
    let mut state = log.state();
    let mut attempts = gossip.unauthorized_attempts();
    let mut told = BTreeMap::new();
    let mut vouched = BTreeSet::new();
    let mut peers = BTreeMap::<NodeId, (PeerId, Vec<Multiaddr>)>::new();
    loop {
        let now = state.borrow_and_update().clone();
        let voters = log.voters();
        peers.retain(|node, _| voters.contains(node));
        peers.extend(
            now.members
                .iter()
                .filter_map(|(&node, member)| Some((node, (ids::peer_id(&member.peer)?, parse(&member.addresses))))),
        );
        let mut members: BTreeMap<_, _> = peers.values().cloned().collect();
        vouched.retain(|peer| !members.contains_key(peer));
        members.extend(vouched.iter().map(|&peer| (peer, Vec::new())));
        let caught_up = now.members.contains_key(&log.node_id()) || !told.is_empty();
        if caught_up && told != members {
            gossip.set_members(members.clone());
            told = members;
        }
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            attempt = attempts.recv() => match attempt {
                // Before its own admission this node knows nobody who could vouch.
                Ok(peer) if caught_up && log.admits(&ids::peer_key(peer)).await => {
                    vouched.insert(peer);
                }
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            },
            () = tokio::time::sleep(VOTERS_PERIOD) => {}
        }
    }
}
