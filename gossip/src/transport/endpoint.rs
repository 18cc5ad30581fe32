//! What the driver, the handles and the tasks of streams share of one node.
//!
//! Owns [`Endpoint`]. Each value in it has one writer: the driver writes links, listening addresses, the view of the
//! peers and this process's standing, a handle writes the members. Everyone else reads, or waits for a change. Invariant: no value is borrowed across
//! an await.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use libp2p::{Multiaddr, PeerId};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use super::link::Link;
use crate::error::Duplicate;
use crate::membership::view::Peers;

/// What the members know of other processes of this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Standing {
    /// They have not been asked yet.
    #[default]
    Unknown,
    /// None has heard of an earlier one.
    Confirmed,
    /// An earlier one is alive.
    Duplicate(Duplicate),
}

pub(crate) struct Endpoint {
    pub me: PeerId,
    pub control: libp2p_stream::Control,
    /// Who may use protocols for members; this node excluded.
    pub members: watch::Sender<Arc<BTreeSet<PeerId>>>,
    links: watch::Sender<HashMap<PeerId, Arc<Link>>>,
    /// Addresses this node listens on.
    pub listening: watch::Sender<Vec<Multiaddr>>,
    /// The members as the rest of the node sees them.
    pub peers: watch::Sender<Peers>,
    /// Strangers that asked for a protocol of the members.
    pub unauthorized: broadcast::Sender<PeerId>,
    /// Whether this process may act as the node.
    pub standing: watch::Sender<Standing>,
    /// Cancelled when the driver ends.
    pub stopped: CancellationToken,
    pub runtime: tokio::runtime::Handle,
}

impl Endpoint {
    /// An endpoint without members or links, on the current runtime. `unauthorized_max` attempts of strangers wait to be
    /// looked at.
    pub fn new(
        me: PeerId,
        control: libp2p_stream::Control,
        listening: Vec<Multiaddr>,
        unauthorized_max: usize,
    ) -> Endpoint {
        Endpoint {
            me,
            control,
            members: watch::Sender::default(),
            links: watch::Sender::default(),
            listening: watch::Sender::new(listening),
            peers: watch::Sender::default(),
            unauthorized: broadcast::Sender::new(unauthorized_max),
            standing: watch::Sender::default(),
            stopped: CancellationToken::new(),
            runtime: tokio::runtime::Handle::current(),
        }
    }

    pub fn is_member(&self, peer: &PeerId) -> bool {
        self.members.borrow().contains(peer)
    }

    pub fn link(&self, peer: &PeerId) -> Option<Arc<Link>> {
        self.links.borrow().get(peer).cloned()
    }

    /// Members were asked, and none has heard of an earlier process of this node.
    pub fn confirm(&self) {
        self.standing.send_if_modified(|standing| {
            let is_news = *standing == Standing::Unknown;
            if is_news {
                *standing = Standing::Confirmed;
            }
            is_news
        });
    }

    /// An earlier process of this node is alive. That is final.
    pub fn set_duplicate(&self, earlier_ms: u64) {
        self.standing.send_replace(Standing::Duplicate(Duplicate { peer: self.me, earlier_ms }));
    }

    /// The earlier process of this node that is alive, if one is.
    pub fn duplicate(&self) -> Option<Duplicate> {
        match *self.standing.borrow() {
            Standing::Duplicate(duplicate) => Some(duplicate),
            Standing::Unknown | Standing::Confirmed => None,
        }
    }

    /// The link of a peer, as soon as the driver has heard of its connection.
    pub async fn linked(&self, peer: &PeerId) -> Option<Arc<Link>> {
        let mut links = self.links.subscribe();
        // An error would mean that this endpoint is gone.
        let links = links.wait_for(|links| links.contains_key(peer)).await.ok()?;
        links.get(peer).cloned()
    }

    /// The link of a peer that has just connected.
    pub fn ensure_link(&self, peer: PeerId) {
        self.links.send_if_modified(|links| {
            let is_new = !links.contains_key(&peer);
            links.entry(peer).or_default();
            is_new
        });
    }

    /// Ends everything that waits on a stream of this peer.
    pub fn cut_link(&self, peer: &PeerId) {
        let mut link = None;
        self.links.send_if_modified(|links| {
            link = links.remove(peer);
            link.is_some()
        });
        if let Some(link) = link {
            link.cut.cancel();
        }
    }
}
