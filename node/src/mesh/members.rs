//! Who is admitted: the log says it, gossip enforces it. Keeps the two equal, and this node's own entry in the log true.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use coel_gossip::{Handle, Multiaddr, PeerId};
use coel_store::{Command, Log, NodeId};
use tokio::sync::broadcast::error::RecvError;
use tracing::warn;

use super::admission::handshake::ADDRESSES_MAX;
use super::{MeshView, ProposalError};
use crate::ids;
use crate::lifecycle::Lifecycle;

/// How long to wait before a change of this node's entry that failed is proposed again.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// Why a node stops that others have removed.
const REMOVED: &str = "this node is no member of the mesh any more: another member has forgotten it (`coel forget`). To use it again, \
                       join anew with `coel join INVITE`, on the same data folder: its weights are kept";

/// Held while this node hands over what it holds and leaves: until then its entry does not say that it is leaving.
pub type Departure = Arc<tokio::sync::Mutex<()>>;

/// The addresses that parse. Others were written by a newer coel, or made up.
pub fn parse_addresses(addresses: &[String]) -> Vec<Multiaddr> {
    addresses.iter().filter_map(|address| address.parse().ok()).collect()
}

/// The addresses this node tells others that it listens on. A machine with many interfaces has many; those that reach beyond the
/// machine come first.
pub fn own_addresses(gossip: &Handle) -> Vec<String> {
    let mut listening: Vec<_> = gossip.listen_addresses().iter().map(ToString::to_string).collect();
    listening.sort_by_key(|address| address.starts_with("/ip4/127.") || address.starts_with("/ip6/::1/"));
    listening.truncate(ADDRESSES_MAX);
    listening
}

/// Gossip's members, and what they were made from: who may call this node.
#[derive(Default)]
struct AdmissionCache {
    /// Members of the log, and nodes that left and still vote.
    members: BTreeMap<NodeId, (PeerId, Vec<Multiaddr>)>,
    /// Peers for which known members vouched, and that this node's own log does not know yet.
    vouched: BTreeSet<PeerId>,
}

impl AdmissionCache {
    /// Takes over what the log says now, and returns the peers to admit.
    fn update(&mut self, state: &coel_store::State, voters: &BTreeSet<NodeId>) -> BTreeMap<PeerId, Vec<Multiaddr>> {
        self.members.retain(|node, _| voters.contains(node));
        let members = state.members.iter();
        self.members.extend(members.filter_map(|(&node, member)| {
            Some((node, (ids::peer_id(&member.peer)?, parse_addresses(&member.addresses))))
        }));
        let mut admitted: BTreeMap<_, _> = self.members.values().cloned().collect();
        self.vouched.retain(|peer| !admitted.contains_key(peer));
        admitted.extend(self.vouched.iter().map(|&peer| (peer, Vec::new())));
        admitted
    }
}

/// Keeps gossip's members equal to the log's, until the log stops.
///
/// A newcomer's log is empty at first and then catches up. Until it has reached this node's own admission, the members named in the
/// welcome stay admitted, or nobody could send the log. A node that left stays admitted until its vote has passed on, or it could
/// not pass it on. And a node that was down may be called by a leader it has never heard of: after an unauthorized attempt the members
/// it does know are asked to vouch for the caller.
pub async fn follow(gossip: Handle, log: Log) {
    let (mut state, mut voters) = (log.state(), log.voters());
    let mut unauthorized = gossip.unauthorized_attempts();
    let mut told = BTreeMap::new();
    let mut cache = AdmissionCache::default();
    loop {
        let now = state.borrow_and_update().clone();
        let admitted = cache.update(&now, &voters.borrow_and_update());
        let caught_up = now.members.contains_key(&log.node_id()) || !told.is_empty();
        if caught_up && told != admitted {
            gossip.set_members(admitted.clone());
            told = admitted;
        }
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            changed = voters.changed() => if changed.is_err() { return },
            attempt = unauthorized.recv() => match attempt {
                // Before its own admission this node knows nobody who could vouch.
                Ok(peer) if caught_up && log.admits(&ids::peer_key(peer)).await => {
                    cache.vouched.insert(peer);
                }
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            },
        }
    }
}

/// Stops a node that others have removed.
pub async fn stop_if_removed(log: Log, lifecycle: Lifecycle) {
    let (mut state, node) = (log.state(), log.node_id());
    let mut was_member = false;
    loop {
        let is_member = state.borrow_and_update().members.contains_key(&node);
        if was_member && !is_member && !lifecycle.is_leaving() {
            lifecycle.fail(REMOVED.into());
        }
        was_member |= is_member;
        if state.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Keeps the log's entry of this node true: a restart may have changed its name and addresses, or interrupted its departure.
pub async fn keep_own_entry(view: MeshView, name: String, departure: Departure) {
    let node = view.node();
    let (mut state, mut listening) = (view.log().state(), view.gossip().listen_address_changes());
    loop {
        listening.mark_unchanged();
        let addresses = own_addresses(view.gossip());
        let known = state.borrow_and_update().members.get(&node).cloned();
        let mut is_true = true;
        if let Some(member) = known {
            if member.name != name || member.addresses != addresses {
                is_true &= correct(&view, Command::Readdress { node, name: name.clone(), addresses }).await;
            }
            if member.leaving
                && let Ok(_stays) = departure.try_lock()
            {
                is_true &= correct(&view, Command::Leaving { node, leaving: false }).await;
            }
        }
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return std::future::pending().await },
            changed = listening.changed() => if changed.is_err() { return std::future::pending().await },
            () = tokio::time::sleep(AGAIN_AFTER), if !is_true => {}
        }
    }
}

/// Proposes a change of this node's entry; whether the log has it or will never have it.
async fn correct(view: &MeshView, command: Command) -> bool {
    match view.propose(command).await {
        Ok(_) => true,
        Err(ProposalError::Refused { refusal }) => {
            warn!(%refusal, "the log refuses a change of this node's entry");
            true
        }
        Err(error) => {
            warn!(%error, "the log does not have this node's entry as it is yet; trying again");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use coel_store::{Member, MemberInfo, Outcome, Peer, State, Timing, TokenHash, Transport, Unreachable};
    use futures::FutureExt;
    use futures::future::BoxFuture;

    use super::*;

    #[test]
    fn a_node_that_left_stays_admitted_while_it_votes_and_a_vouched_peer_until_the_log_knows_it() {
        let [one, two, stranger] = [PeerId::random(), PeerId::random(), PeerId::random()];
        let member =
            |peer| Member { peer: ids::peer_key(peer), name: String::new(), addresses: vec![], leaving: false };
        let mut state =
            State { members: [(NodeId(1), member(one)), (NodeId(2), member(two))].into(), ..State::default() };
        let mut cache = AdmissionCache::default();
        let voters = BTreeSet::from([NodeId(1), NodeId(2)]);
        cache.vouched.insert(stranger);
        let admitted = |cache: &mut AdmissionCache, state: &State, voters: &BTreeSet<NodeId>| {
            cache.update(state, voters).into_keys().collect::<BTreeSet<_>>()
        };
        assert_eq!(admitted(&mut cache, &state, &voters), BTreeSet::from([one, two, stranger]));
        state.members.remove(&NodeId(2));
        state.members.insert(NodeId(3), member(stranger));
        assert_eq!(admitted(&mut cache, &state, &voters), BTreeSet::from([one, two, stranger]), "it still votes");
        assert!(cache.vouched.is_empty(), "the log knows it now");
        assert_eq!(admitted(&mut cache, &state, &BTreeSet::from([NodeId(1)])), BTreeSet::from([one, stranger]));
    }

    /// No other node is there.
    struct Nobody;

    impl Transport for Nobody {
        fn call(&self, _: Peer, _: NodeId, _: Vec<u8>) -> BoxFuture<'static, Result<Vec<u8>, Unreachable>> {
            async { Err(Unreachable("nobody is there".into())) }.boxed()
        }
    }

    #[tokio::test]
    async fn a_node_that_others_have_removed_stops_and_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let me = MemberInfo { peer: Peer(vec![1]), name: "attic".into(), addresses: vec![] };
        let log = Log::create(folder.path(), me, Arc::new(Nobody), Timing::default()).await.unwrap();
        let token = TokenHash::of(b"cellar");
        let joins = Command::Join {
            peer: Peer(vec![9]),
            name: "cellar".into(),
            addresses: vec![],
            token,
            now_ms: 1,
            anew: false,
        };
        let patience = Duration::from_secs(60);
        for command in [Command::Invite { token, uses: 1, expires_at_ms: 2 }, joins] {
            assert!(!matches!(log.propose(command, patience).await.unwrap(), Outcome::Refused(_)));
        }
        let lifecycle = Lifecycle::default();
        let stopping = stop_if_removed(log.clone(), lifecycle.clone());
        let removed = async {
            log.propose(Command::Forget { node: log.node_id() }, patience).await.unwrap();
            lifecycle.stopping().cancelled().await;
        };
        tokio::select! {
            biased;
            () = stopping => panic!("the log has not stopped"),
            () = removed => {}
        }
        let why = lifecycle.fatal().expect("it says why");
        assert!(why.contains("coel join INVITE"), "{why}");
        log.shutdown().await;
    }
}
