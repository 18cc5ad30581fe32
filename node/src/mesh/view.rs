//! The mesh as this node sees it: what was agreed, who is there, what each member offers.
//!
//! Owns [`MeshView`], a bundle of handles. It turns gossip's and the log's words into plain facts, and brings this node's commands to
//! the log.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use coel_gossip::{Handle, PeerId, PeerView};
use coel_store::{Command, ExpertId, Log, ModelId, NodeId, Outcome, Placement, Precision, Slice, State};
use tokio::sync::watch;

use super::advert::{OwnOffer, offer_of};
use super::quorum::Quorum;
use super::{PROPOSE_DEADLINE, ProposalError};
use crate::budget::Offer;
use crate::ids;
use crate::placement::{Liveness, MemberFacts, MeshFacts, ModelFacts, model_to_serve};
use crate::registry::{ModelMeta, ModelRegistry};
use crate::weights::sources::{BlobSource, Likelihood, ranked};

/// Handles on what this node knows of the mesh. Cloning is cheap.
#[derive(Clone)]
pub struct MeshView {
    log: Log,
    gossip: Handle,
    offer: OwnOffer,
    registry: ModelRegistry,
    exclusion: Arc<watch::Sender<Option<String>>>,
}

impl MeshView {
    /// The view through these handles.
    pub fn new(log: Log, gossip: Handle, offer: OwnOffer, registry: ModelRegistry) -> Self {
        Self { log, gossip, offer, registry, exclusion: Arc::default() }
    }

    /// The log.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// The network.
    pub fn gossip(&self) -> &Handle {
        &self.gossip
    }

    /// This node's id.
    pub fn node(&self) -> NodeId {
        self.log.node_id()
    }

    /// The agreed state as this node has applied it.
    pub fn state(&self) -> Arc<State> {
        self.log.state().borrow().clone()
    }

    /// The leader, if one is known that is not down.
    pub fn leader(&self) -> Option<NodeId> {
        let leader = *self.log.leader().borrow();
        leader.filter(|leader| !self.down().contains(leader))
    }

    /// The voters, and what gossip takes each of them for.
    pub fn quorum(&self) -> Quorum {
        let (voters, state, peers) = (self.log.voters().borrow().clone(), self.state(), self.peers());
        let known = |node: &NodeId| {
            let member = state.members.get(node)?;
            if *node == self.node() {
                Some(Liveness::Up)
            } else {
                peers.get(&ids::peer_id(&member.peer)?).map(liveness)
            }
        };
        let (down, rest): (BTreeSet<_>, BTreeSet<_>) =
            voters.iter().copied().partition(|node| known(node) == Some(Liveness::Down));
        let up = rest.into_iter().filter(|node| known(node).is_some()).collect();
        Quorum { voters, up, down }
    }

    /// Why nothing can be agreed until voters come back, if so, and what to do.
    pub fn quorum_lost(&self) -> Option<String> {
        self.quorum().lost().map(|lost| self.exclusion().unwrap_or(lost))
    }

    /// Resolves with [`Self::quorum_lost`] as soon as there is such a reason.
    async fn until_quorum_lost(&self) -> String {
        let (mut peers, mut voters) = (self.gossip.peers(), self.log.voters());
        loop {
            peers.mark_unchanged();
            voters.mark_unchanged();
            if let Some(why) = self.quorum_lost() {
                return why;
            }
            let changed = tokio::select! {
                changed = peers.changed() => changed,
                changed = voters.changed() => changed,
            };
            if changed.is_err() {
                // The node is ending, and the log says so.
                return std::future::pending().await;
            }
        }
    }

    /// Puts a command of this node's into the log, through changes of leader.
    ///
    /// # Errors
    /// [`ProposalError`]; at once where the quorum is lost, or as soon as it is.
    pub async fn propose(&self, command: Command) -> Result<Outcome, ProposalError> {
        if let Some(why) = self.quorum_lost() {
            return Err(ProposalError::NoQuorum { why });
        }
        let outcome = tokio::select! {
            outcome = self.log.propose(command, PROPOSE_DEADLINE) => outcome?,
            why = self.until_quorum_lost() => return Err(ProposalError::QuorumLost { why }),
        };
        match outcome {
            Outcome::Refused(refusal) => Err(ProposalError::Refused { refusal }),
            outcome => Ok(outcome),
        }
    }

    /// Why a member does not let this node in, and what to do: it has recovered the mesh without this node, or knows it no more.
    /// `None` where none is known to.
    pub fn exclusion(&self) -> Option<String> {
        self.exclusion.borrow().clone()
    }

    /// Notes why a member does not let this node in, if one does not.
    pub(super) fn set_exclusion(&self, exclusion: Option<String>) {
        self.exclusion.send_replace(exclusion);
    }

    /// What gossip says of the peers.
    pub fn peers(&self) -> Arc<BTreeMap<PeerId, PeerView>> {
        self.gossip.peers().borrow().clone()
    }

    /// What this node knows of the mesh now, for the planner.
    pub fn facts(&self) -> MeshFacts {
        let state = self.state();
        let known = model_to_serve(&state).and_then(|(id, _)| self.registry.get(id));
        let model = known.map(|meta| model_facts(&meta));
        MeshFacts { node: self.node(), leader: self.leader(), members: self.members(&state), state, model }
    }

    /// Liveness and offer of every member that gossip knows, this node included.
    fn members(&self, state: &State) -> BTreeMap<NodeId, MemberFacts> {
        let peers = self.peers();
        let each = state.members.iter().filter_map(|(&node, member)| {
            if node == self.node() {
                return Some((node, MemberFacts { liveness: Liveness::Up, offer: Some(self.offer.get()) }));
            }
            let view = peers.get(&ids::peer_id(&member.peer)?)?;
            let offer = offer_of(view).map(Arc::new);
            Some((node, MemberFacts { liveness: liveness(view), offer }))
        });
        each.collect()
    }

    /// What a member offers, as far as this node knows.
    pub fn offer_of(&self, node: NodeId, view: Option<&PeerView>) -> Option<Arc<Offer>> {
        if node == self.node() { Some(self.offer.get()) } else { view.and_then(offer_of).map(Arc::new) }
    }

    /// Members that gossip takes for dead.
    pub fn down(&self) -> BTreeSet<NodeId> {
        let (state, peers) = (self.state(), self.peers());
        let own = self.node();
        let is_down = |peer: Option<PeerId>| {
            peer.and_then(|peer| peers.get(&peer)).is_none_or(|view| liveness(view) == Liveness::Down)
        };
        let down = state.members.iter().filter(|&(&node, member)| node != own && is_down(ids::peer_id(&member.peer)));
        down.map(|(&node, _)| node).collect()
    }

    /// Members of which two processes were heard a short while ago: their data folder was copied.
    pub fn copied(&self) -> BTreeSet<NodeId> {
        let (state, peers) = (self.state(), self.peers());
        let alternates = |peer: &PeerId| peers.get(peer).is_some_and(|view| view.alternates);
        let copied =
            state.members.iter().filter(|(_, member)| ids::peer_id(&member.peer).is_some_and(|peer| alternates(&peer)));
        copied.map(|(&node, _)| node).collect()
    }

    /// The other members that are there, and whether one of them has every blob of the model.
    pub fn others(&self, model: ModelId) -> (BTreeSet<NodeId>, bool) {
        let members = self.members(&self.state());
        let there = members.iter().filter(|(node, facts)| **node != self.node() && facts.liveness != Liveness::Down);
        let complete = |facts: &MemberFacts| facts.offer.as_ref().is_some_and(|offer| offer.has_all_of(model));
        (there.clone().map(|(&node, _)| node).collect(), there.clone().any(|(_, facts)| complete(facts)))
    }

    /// The peers to ask for a blob, best first: nodes that serve this slice of the expert in random order, then nodes that have the
    /// whole model, then the other members that are there. `None` stands for a blob of the trunk or a file.
    pub fn sources(&self, state: &State, model: ModelId, expert: Option<(ExpertId, Slice)>) -> Vec<BlobSource> {
        let members = self.members(state);
        let ready: BTreeSet<NodeId> = match (&state.placement, expert) {
            (Some(placement), Some((expert, slice))) => {
                let hosts = placement.hosts(expert).filter(|(_, precision)| slice.is_part_of(*precision));
                hosts.map(|(node, _)| node).collect()
            }
            (Some(placement), None) => placement.trunk_ready.clone(),
            (None, _) => BTreeSet::new(),
        };
        let there = members.iter().filter(|(node, facts)| **node != self.node() && facts.liveness != Liveness::Down);
        let sources = there.filter_map(|(node, facts)| {
            let member = state.members.get(node)?;
            let likelihood = if ready.contains(node) {
                Likelihood::Serves
            } else if facts.offer.as_ref().is_some_and(|offer| offer.has_all_of(model)) {
                Likelihood::Complete
            } else {
                Likelihood::Unknown
            };
            Some((likelihood, BlobSource { peer: ids::peer_id(&member.peer)?, name: member.name.clone() }))
        });
        ranked(sources.collect(), &mut rand::rng())
    }

    /// For each expert the number of nodes that could compute it now: this node if it has it among `held`, and live nodes with a ready
    /// replica.
    pub fn live_replicas(
        &self,
        placement: &Placement,
        held: &BTreeMap<ExpertId, Precision>,
    ) -> BTreeMap<ExpertId, usize> {
        let (own, down) = (self.node(), self.down());
        let each = placement.replicas.iter().map(|(&expert, nodes)| {
            let others =
                nodes.iter().filter(|(node, replica)| **node != own && replica.ready.is_some() && !down.contains(node));
            (expert, others.count() + usize::from(held.contains_key(&expert)))
        });
        each.collect()
    }

    /// Whether this node's log has come as far as its own admission.
    pub fn is_caught_up(&self, state: &State) -> bool {
        state.members.contains_key(&self.node())
    }

    /// Tells when any of this may have changed.
    pub fn changes(&self) -> Changes {
        Changes {
            state: self.log.state(),
            leader: self.log.leader(),
            peers: self.gossip.peers(),
            offer: self.offer.subscribe(),
            models: self.registry.subscribe(),
        }
    }
}

/// Waits for changes of a [`MeshView`].
pub struct Changes {
    state: watch::Receiver<Arc<State>>,
    leader: watch::Receiver<Option<NodeId>>,
    peers: watch::Receiver<Arc<BTreeMap<PeerId, PeerView>>>,
    offer: watch::Receiver<Arc<Offer>>,
    models: watch::Receiver<BTreeMap<ModelId, Arc<ModelMeta>>>,
}

impl Changes {
    /// Waits until something has changed since the last call. `false` once the log or the network has stopped.
    pub async fn changed(&mut self) -> bool {
        let changed = tokio::select! {
            changed = self.state.changed() => changed,
            changed = self.leader.changed() => changed,
            changed = self.peers.changed() => changed,
            changed = self.offer.changed() => changed,
            changed = self.models.changed() => changed,
        };
        changed.is_ok()
    }
}

fn liveness(view: &PeerView) -> Liveness {
    match view.liveness {
        coel_gossip::Liveness::Up => Liveness::Up,
        coel_gossip::Liveness::Suspect => Liveness::Suspect,
        coel_gossip::Liveness::Down => Liveness::Down,
    }
}

fn model_facts(meta: &ModelMeta) -> ModelFacts {
    ModelFacts { id: meta.id, manifest: meta.manifest.clone(), sizes: meta.sizes.clone() }
}
