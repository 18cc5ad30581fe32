//! This node as a member of its mesh: what the log's parts share.

use super::admission_cache::AdmissionCache;
use super::elections::Elections;
use super::network::Transport;
use super::sled_log::{Identity, SledLog};
use super::timing::Timing;
use super::types::{LogId, TypeConfig};
use crate::disk::Disk;
use crate::ids::{NodeId, Peer};
use crate::state::State;
use crate::sync::lock;
use openraft::Raft;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

/// The consensus group's member on this node.
pub(super) struct LocalMember {
    pub raft: Raft<TypeConfig>,
    /// Taken at shutdown.
    pub disk: Mutex<Option<Disk>>,
    pub transport: Arc<dyn Transport>,
    pub identity: Identity,
    pub timing: Timing,
    pub state: watch::Receiver<Arc<State>>,
    pub leader: watch::Receiver<Option<NodeId>>,
    pub voters: watch::Receiver<BTreeSet<NodeId>>,
    pub admissions: AdmissionCache,
    pub elections: Arc<Elections>,
}

impl LocalMember {
    /// The network identity of a member, by the consensus group or by the state.
    pub fn peer_of(&self, node: NodeId) -> Option<Peer> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let grouped = metrics.membership_config.membership().get_node(&node).map(|node| node.peer.clone());
        grouped.or_else(|| self.state.borrow().members.get(&node).map(|member| member.peer.clone()))
    }

    /// The end of this node's log; the outer `None` if it cannot be read.
    pub fn last_log_id(&self) -> Option<Option<LogId>> {
        let disk = lock(&self.disk).clone()?;
        SledLog::last_in(disk).ok()
    }

    /// Whether this node's own copy of the state lists the peer as a member.
    pub fn knows(&self, peer: &Peer) -> bool {
        self.state.borrow().node_of(peer).is_some()
    }

    /// Whether the consensus group still counts on this peer, member or not.
    pub fn replicates_with(&self, peer: &Peer) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let mut group = metrics.membership_config.membership().nodes();
        group.any(|(_, node)| node.peer == *peer)
    }

    /// Whether this node has just joined, so that its state is still empty.
    pub fn is_empty(&self) -> bool {
        self.state.borrow().members.is_empty()
    }
}
