//! The dials under way, and how each kind of dial is made: a table without I/O.
//!
//! Three kinds: members that the detector wants back, peers that a handle requested, and configured addresses. Invariant: a
//! requested dial is answered once, with the first peer that is reached or with every failure.

use std::collections::{BTreeMap, HashMap};

use libp2p::swarm::ConnectionId;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId};
use tokio::sync::oneshot;

use crate::error::DialError;
use crate::membership::addresses::split_peer;

/// Why a dial is under way.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum DialPurpose {
    Member(PeerId),
    /// A handle waits for it, under this number.
    Requested(u64),
    /// A configured address.
    Seed,
}

/// A dial that a handle waits for; it may make several attempts at once.
struct RequestedDial {
    reply: oneshot::Sender<Result<PeerId, DialError>>,
    under_way: usize,
    causes: Vec<String>,
}

#[derive(Default)]
pub(super) struct Dials {
    under_way: HashMap<ConnectionId, DialPurpose>,
    requested: HashMap<u64, RequestedDial>,
    requests_made: u64,
}

/// A dial of this very peer. It is made beside an existing connection too, because the detector asks for that when it no
/// longer trusts the connection. And it takes a new port each time: two nodes that dial each other between the same two
/// ports would open one and the same TCP connection, with both ends believing that they began it.
pub(super) fn to_peer(peer: PeerId, addresses: Vec<Multiaddr>) -> DialOpts {
    DialOpts::peer_id(peer).condition(PeerCondition::Always).addresses(addresses).allocate_new_port().build()
}

/// A dial of any peer at this address.
pub(super) fn to_address(address: Multiaddr) -> DialOpts {
    DialOpts::unknown_peer_id().address(address).allocate_new_port().build()
}

/// Addresses by the peer that has to answer there, and those at which any may: `peer` if it is given, else the one that an
/// address names.
pub(super) fn by_peer(
    addresses: &[Multiaddr],
    peer: Option<PeerId>,
) -> (BTreeMap<PeerId, Vec<Multiaddr>>, Vec<Multiaddr>) {
    let (mut named, mut open) = (BTreeMap::<_, Vec<_>>::new(), Vec::new());
    for address in addresses {
        let (bare, by_address) = split_peer(address);
        match peer.or(by_address) {
            Some(peer) => named.entry(peer).or_default().push(bare),
            None => open.push(bare),
        }
    }
    (named, open)
}

impl Dials {
    /// A dial has begun.
    pub fn began(&mut self, connection: ConnectionId, purpose: DialPurpose) {
        if let DialPurpose::Requested(number) = purpose
            && let Some(dial) = self.requested.get_mut(&number)
        {
            dial.under_way += 1;
        }
        self.under_way.insert(connection, purpose);
    }

    /// A new request; its attempts follow, and then [`Dials::settle`].
    pub fn request(&mut self, reply: oneshot::Sender<Result<PeerId, DialError>>) -> u64 {
        let number = self.requests_made;
        self.requests_made += 1;
        self.requested.insert(number, RequestedDial { reply, under_way: 0, causes: Vec::new() });
        number
    }

    /// An attempt for a request failed before it began.
    pub fn refuse(&mut self, number: u64, cause: String) {
        if let Some(dial) = self.requested.get_mut(&number) {
            dial.causes.push(cause);
        }
    }

    /// Answers a request that has no attempt left.
    pub fn settle(&mut self, number: u64) {
        if self.requested.get(&number).is_some_and(|dial| dial.under_way == 0)
            && let Some(dial) = self.requested.remove(&number)
        {
            // The caller may have gone.
            let _ = dial.reply.send(Err(DialError::Failed { causes: dial.causes }));
        }
    }

    /// A connection to `peer` was established: answers the request that waits for it, if one does.
    pub fn connected(&mut self, connection: ConnectionId, peer: PeerId) {
        if let Some(DialPurpose::Requested(number)) = self.under_way.remove(&connection)
            && let Some(dial) = self.requested.remove(&number)
        {
            let _ = dial.reply.send(Ok(peer)); // the caller may have gone
        }
    }

    /// A dial failed. Returns its purpose; what a request waits for is settled here.
    pub fn failed(&mut self, connection: ConnectionId, cause: &dyn std::fmt::Display) -> Option<DialPurpose> {
        let purpose = self.under_way.remove(&connection)?;
        if let DialPurpose::Requested(number) = purpose
            && let Some(dial) = self.requested.get_mut(&number)
        {
            dial.under_way -= 1;
            dial.causes.push(cause.to_string());
            self.settle(number);
        }
        Some(purpose)
    }

    /// Forgets requests whose callers have gone.
    pub fn prune(&mut self) {
        self.requested.retain(|_, dial| !dial.reply.is_closed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: usize) -> ConnectionId {
        ConnectionId::new_unchecked(number)
    }

    #[test]
    fn a_request_is_answered_by_the_first_peer_that_is_reached() {
        let mut dials = Dials::default();
        let (reply, mut answer) = oneshot::channel();
        let number = dials.request(reply);
        dials.began(id(1), DialPurpose::Requested(number));
        dials.began(id(2), DialPurpose::Requested(number));
        assert_eq!(dials.failed(id(1), &"refused"), Some(DialPurpose::Requested(number)));
        assert!(answer.try_recv().is_err(), "another attempt is under way");
        let peer = PeerId::random();
        dials.connected(id(2), peer);
        assert_eq!(answer.try_recv().expect("answered").expect("reached"), peer);
        assert!(dials.under_way.is_empty() && dials.requested.is_empty());
    }

    #[test]
    fn a_request_that_fails_names_every_cause() {
        let mut dials = Dials::default();
        let (reply, mut answer) = oneshot::channel();
        let number = dials.request(reply);
        dials.refuse(number, "no transport".into());
        dials.began(id(1), DialPurpose::Requested(number));
        dials.settle(number);
        assert!(answer.try_recv().is_err(), "an attempt is under way");
        dials.failed(id(1), &"refused");
        let failed = answer.try_recv().expect("answered").expect_err("nobody was reached");
        assert!(matches!(failed, DialError::Failed { causes } if causes == ["no transport", "refused"]));
        assert_eq!(dials.failed(id(1), &"again"), None, "it is no longer under way");
    }

    #[test]
    fn requests_of_callers_that_have_gone_are_forgotten() {
        let mut dials = Dials::default();
        let (reply, answer) = oneshot::channel();
        dials.request(reply);
        dials.prune();
        assert_eq!(dials.requested.len(), 1);
        drop(answer);
        dials.prune();
        assert!(dials.requested.is_empty());
    }

    #[test]
    fn addresses_are_dialled_by_the_peer_that_has_to_answer() {
        let (named, given) = (PeerId::random(), PeerId::random());
        let address = |text: String| text.parse::<Multiaddr>().expect("a multiaddress");
        let bare = address("/ip4/10.0.0.1/tcp/1".into());
        let both = [bare.clone(), address(format!("{bare}/p2p/{named}"))];
        assert_eq!(by_peer(&both, None), ([(named, vec![bare.clone()])].into(), vec![bare.clone()]));
        assert_eq!(by_peer(&both, Some(given)), ([(given, vec![bare.clone(), bare])].into(), vec![]));
    }
}
