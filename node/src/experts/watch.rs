//! Who could compute some experts of a layer, as that changes.
//!
//! Owns [`ReplicaWatch`]. It gathers what the placement, gossip and this node's engine say, and decides nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use coel_gossip::{Liveness, PeerId, PeerView, Peers};
use coel_store::{NodeId, State};
use tokio::sync::watch;

use super::dispatch::LayerReplicas;
use crate::hosting::{HeldExperts, Loaded};
use crate::ids;
use crate::mesh::MeshView;

/// What a home sees of the replicas of some experts, and when it changes.
pub(super) struct ReplicaWatch {
    home: NodeId,
    layer: u16,
    experts: Vec<u16>,
    held: watch::Receiver<Arc<HeldExperts>>,
    state: watch::Receiver<Arc<State>>,
    peers: watch::Receiver<Peers>,
}

impl ReplicaWatch {
    /// Of these experts of a layer.
    pub fn new(view: &MeshView, loaded: &Loaded, layer: u16, mut experts: Vec<u16>) -> Self {
        experts.sort_unstable();
        experts.dedup();
        Self {
            home: view.node(),
            layer,
            experts,
            held: loaded.held_changes(),
            state: view.log().state(),
            peers: view.gossip().peers(),
        }
    }

    /// Who could compute the experts now.
    pub fn replicas(&mut self) -> LayerReplicas {
        let held = self.held.borrow_and_update().clone();
        let state = self.state.borrow_and_update().clone();
        let peers = self.peers.borrow_and_update().clone();
        let live = live_hosts(&state, &peers);
        LayerReplicas::new(self.home, self.layer, self.experts.iter().copied(), &state, &held, live)
    }

    /// The peer id of a member.
    pub fn peer(&self, node: NodeId) -> Option<PeerId> {
        ids::peer_id(&self.state.borrow().members.get(&node)?.peer)
    }

    /// Resolves when [`Self::replicas`] may give something else.
    pub async fn changed(&mut self) {
        let changed = tokio::select! {
            changed = self.held.changed() => changed,
            changed = self.state.changed() => changed,
            changed = self.peers.changed() => changed,
        };
        if changed.is_err() {
            // The node is ending, and nothing changes any more.
            std::future::pending().await
        }
    }
}

/// The members that gossip does not consider down, and their smoothed round trips.
fn live_hosts(state: &State, peers: &BTreeMap<PeerId, PeerView>) -> BTreeMap<NodeId, Option<Duration>> {
    let live = state.members.iter().filter_map(|(&node, member)| {
        let view = peers.get(&ids::peer_id(&member.peer)?)?;
        (view.liveness != Liveness::Down).then(|| (node, view.rtt.map(|rtt| rtt.smoothed)))
    });
    live.collect()
}
