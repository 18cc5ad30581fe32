//! This node as a member of its mesh: what the log's parts share.

use super::admission_cache::AdmissionCache;
use super::elections::Elections;
use super::network::Transport;
use super::recall::Recollection;
use super::sled_log::{Identity, SledLog};
use super::standing::Electors;
use super::timing::Timing;
use super::types::{LogId, TypeConfig};
use crate::disk::{Disk, FullDisk};
use crate::ids::{NodeId, Peer};
use crate::state::State;
use crate::sync::lock;
use openraft::{LogIdOptionExt, Raft};
use std::collections::{BTreeMap, BTreeSet};
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
    /// Members that were up when this node last looked at the voters as their leader.
    pub up: Mutex<BTreeSet<NodeId>>,
    pub admissions: AdmissionCache,
    pub elections: Arc<Elections>,
    pub recollection: Recollection,
    /// Why this node's log takes no writes for now.
    pub full: watch::Receiver<Option<FullDisk>>,
}

impl LocalMember {
    /// The network identity of a member, by the consensus group or by the state.
    pub fn peer_of(&self, node: NodeId) -> Option<Peer> {
        let grouped = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow();
            metrics.membership_config.membership().get_node(&node).map(|node| node.peer.clone())
        };
        grouped.or_else(|| self.state.borrow().members.get(&node).map(|member| member.peer.clone()))
    }

    /// The other nodes, by the consensus group and by the state.
    pub fn others(&self) -> BTreeMap<NodeId, Peer> {
        let mut others = self.electors().peers;
        let state = Arc::clone(&self.state.borrow());
        others.extend(state.members.iter().map(|(node, member)| (*node, member.peer.clone())));
        others.remove(&self.identity.node);
        others
    }

    /// Who votes, as far as this node knows.
    pub fn electors(&self) -> Electors {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let index = metrics.membership_config.log_id().index().unwrap_or(0);
        let membership = metrics.membership_config.membership();
        let peers = membership.nodes().map(|(node, known)| (*node, known.peer.clone())).collect();
        Electors { index, voters: membership.get_joint_config().clone(), peers }
    }

    /// Why this node's log takes no writes for now. The consensus library waits meanwhile: it sends nothing, and what it is told it
    /// keeps in a queue without bound.
    pub fn full_disk(&self) -> Option<FullDisk> {
        self.full.borrow().clone()
    }

    /// Resolves when the log begins to wait for room.
    pub async fn fills(&self) -> FullDisk {
        let mut full = self.full.clone();
        loop {
            if let Some(full) = full.borrow_and_update().clone() {
                return full;
            }
            if full.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
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
