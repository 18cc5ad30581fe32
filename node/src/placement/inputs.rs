//! What the planner works on, made from what one node knows of the mesh; and whether a change of the mesh could be planned at all.
//!
//! Owns [`MeshFacts`], plain values at one moment, and [`can_spare`] and [`can_hold`]. It does not know where facts come from.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use coel_store::{Bounds, Manifest, Model, ModelId, NodeId, Placement, State};

use super::obtainable::{explain_unobtainable, obtainable};
use super::{Candidate, Current, ExpectedLoss, Popularity, model_to_serve, plan};
use crate::budget::{ExpertSizes, ModelSizes, Offer, SizeByPrecision};

/// Whether a member is reachable, as gossip sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liveness {
    /// It answers.
    Up,
    /// It was not heard for a moment.
    Suspect,
    /// It is taken for dead.
    Down,
}

/// What one node knows of a member.
#[derive(Debug, Clone, PartialEq)]
pub struct MemberFacts {
    /// Whether it is reachable.
    pub liveness: Liveness,
    /// What it offers, once it has said so.
    pub offer: Option<Arc<Offer>>,
}

impl MemberFacts {
    /// Whether the member has said how it holds the trunk: only then is its room known.
    fn has_room_known(&self) -> bool {
        self.offer.as_ref().is_some_and(|offer| offer.trunk.is_some())
    }
}

/// What one node knows of the model that the mesh serves.
#[derive(Debug, Clone)]
pub struct ModelFacts {
    /// Which model.
    pub id: ModelId,
    /// Its blobs.
    pub manifest: Arc<Manifest>,
    /// Its sizes.
    pub sizes: Arc<ModelSizes>,
}

/// What one node knows of the mesh at one moment.
#[derive(Debug, Clone)]
pub struct MeshFacts {
    /// This node.
    pub node: NodeId,
    /// The leader, if one is known.
    pub leader: Option<NodeId>,
    /// What was agreed.
    pub state: Arc<State>,
    /// The members that gossip knows, this node included. A member that is missing here is down.
    pub members: BTreeMap<NodeId, MemberFacts>,
    /// The model to serve, once this node has its manifest.
    pub model: Option<ModelFacts>,
}

impl MeshFacts {
    /// Whether this node leads.
    pub fn leads(&self) -> bool {
        self.leader == Some(self.node)
    }

    /// Members that are up, this node among them.
    pub fn up(&self) -> BTreeSet<NodeId> {
        let is_up = |node: &NodeId| {
            *node == self.node || self.members.get(node).is_some_and(|facts| facts.liveness == Liveness::Up)
        };
        self.state.members.keys().copied().filter(is_up).collect()
    }

    /// Members that are down.
    pub fn down(&self) -> BTreeSet<NodeId> {
        let is_down = |node: &NodeId| self.members.get(node).is_none_or(|facts| facts.liveness == Liveness::Down);
        self.state.members.keys().copied().filter(|node| *node != self.node && is_down(node)).collect()
    }

    /// Members that are up and have not said what they can hold, although there is a model to hold.
    pub fn mute(&self) -> BTreeSet<NodeId> {
        if self.state.models.is_empty() {
            return BTreeSet::new();
        }
        let members = self.members.iter().filter(|(node, _)| self.state.members.contains_key(node));
        let mute = members.filter(|(_, facts)| facts.liveness == Liveness::Up && !facts.has_room_known());
        mute.map(|(&node, _)| node).collect()
    }

    /// The model to serve, as registered and as known here; `None` until both are there.
    pub(super) fn served(&self) -> Option<(&Model, &ModelFacts)> {
        let (id, registered) = model_to_serve(&self.state)?;
        Some((registered, self.model.as_ref().filter(|model| model.id == id)?))
    }

    /// The placement of this model.
    pub(super) fn placement_of(&self, model: ModelId) -> Option<&Placement> {
        self.state.placement.as_ref().filter(|placement| placement.model == model)
    }

    /// Nodes that may hold experts now, with the room their budgets leave. `None` while a member that is up has not said what it can
    /// hold: it will in a moment, and a plan without it would have to be made again.
    pub(super) fn candidates(
        &self,
        model: &ModelFacts,
        gone: &BTreeSet<NodeId>,
        precisions: Bounds,
    ) -> Option<Vec<Candidate>> {
        let placed = self.state.placement.iter().flat_map(|placement| placement.replicas.values());
        let holders: BTreeSet<_> = placed.flat_map(|nodes| nodes.keys().copied()).collect();
        let mut candidates = Vec::new();
        for (&node, member) in &self.state.members {
            if member.leaving || gone.contains(&node) {
                continue;
            }
            match self.members.get(&node) {
                Some(MemberFacts { offer: Some(offer), .. }) if offer.trunk.is_some() => {
                    candidates.push(candidate(model, node, offer, precisions));
                }
                Some(MemberFacts { liveness: Liveness::Up, .. }) => return None,
                // Just lost, and it holds something: wait until it is back or given up.
                _ if holders.contains(&node) => return None,
                _ => {}
            }
        }
        Some(candidates)
    }

    /// The experts at the precisions that the members other than `gone` can provide. A leaving member is a source only of what
    /// nobody else has, since it may have left before the last of it was fetched.
    pub(super) fn experts(&self, model: &ModelFacts, gone: &BTreeSet<NodeId>) -> ExpertSizes {
        let known =
            self.members.iter().filter(|(node, _)| self.state.members.contains_key(node) && !gone.contains(node));
        let all: Vec<_> = known.collect();
        let leaving = |node: &NodeId| self.state.members.get(node).is_some_and(|member| member.leaving);
        let staying: Vec<_> = all.iter().copied().filter(|(node, _)| !leaving(node)).collect();
        let is_complete = |facts: &MemberFacts| facts.offer.as_ref().is_some_and(|offer| offer.has_all_of(model.id));
        if staying.iter().any(|(_, facts)| is_complete(facts)) {
            return model.sizes.experts().clone();
        }
        let from = |members: &[(&NodeId, &MemberFacts)]| {
            let holders: Vec<_> = members.iter().map(|(_, facts)| facts.offer.as_ref()?.holds.as_ref()).collect();
            let nodes: BTreeSet<_> = members.iter().map(|(node, _)| **node).collect();
            let serves = |expert| {
                let hosts = self.placement_of(model.id)?.hosts(expert);
                hosts.filter(|(node, _)| nodes.contains(node)).map(|(_, precision)| precision).max()
            };
            obtainable(model.id, &model.manifest, &holders, serves)
        };
        // Of an expert that none of the staying members has, `obtainable` says every precision. The leaving members know better.
        let (mut experts, from_all) = (from(&staying), from(&all));
        for (expert, bytes) in &mut experts {
            if *bytes == SizeByPrecision::of(&model.manifest.experts[expert]) {
                *bytes = from_all[expert];
            }
        }
        experts
    }

    fn could_place(&self, gone: &BTreeSet<NodeId>, precisions: Bounds) -> Result<(), Unplaceable> {
        if model_to_serve(&self.state).is_none() {
            return Ok(());
        }
        let (registered, model) =
            self.served().ok_or(Unplaceable::NotYet("this node does not have the model's manifest yet"))?;
        let candidates = self
            .candidates(model, gone, precisions)
            .ok_or(Unplaceable::NotYet("not every member has said yet what it can hold"))?;
        let experts = self.experts(model, gone);
        let planned = plan(&experts, &candidates, &Current::new(), &expected_loss(registered));
        planned.map(drop).map_err(|shortfall| {
            let why = why_unobtainable(model, &experts, &candidates);
            Unplaceable::Short(why.unwrap_or_else(|| shortfall.to_string()))
        })
    }
}

/// The loss by which the model's experts are compared.
pub(super) fn expected_loss(registered: &Model) -> ExpectedLoss {
    ExpectedLoss::new(Popularity::new(registered.popularity.clone()), registered.sensitivity.clone())
}

/// Why there is no plan, if the reason is not room but what can be obtained.
pub(super) fn why_unobtainable(model: &ModelFacts, experts: &ExpertSizes, candidates: &[Candidate]) -> Option<String> {
    let roomy = candidates.iter().filter(|c| c.expert_bytes_max.max(c.page_bytes_max) > 0);
    let lowest = roomy.clone().map(|candidate| candidate.accepts.lowest()).min()?;
    let accepted = |precision| roomy.clone().any(|candidate| candidate.accepts.has(precision));
    explain_unobtainable(&model.manifest, experts, accepted, lowest)
}

fn candidate(model: &ModelFacts, node: NodeId, offer: &Offer, precisions: Bounds) -> Candidate {
    let (expert_bytes_max, page_bytes_max) = model.sizes.offered_room(offer, offer.has_all_of(model.id), precisions);
    Candidate {
        node,
        expert_bytes_max,
        page_bytes_max,
        accepts: offer.accepts.and(precisions).unwrap_or(offer.accepts),
    }
}

/// Why every expert could not be placed, or why that is not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unplaceable {
    /// Facts are missing that arrive in a moment.
    NotYet(&'static str),
    /// What is missing and the remedy, in words.
    Short(String),
}

impl Unplaceable {
    fn prefixed(self, prefix: &str) -> Self {
        match self {
            Self::NotYet(what) => Self::NotYet(what),
            Self::Short(why) => Self::Short(format!("{prefix}, {why}")),
        }
    }
}

/// Whether the other members could hold every expert without `node`.
///
/// # Errors
/// [`Unplaceable`].
pub fn can_spare(facts: &MeshFacts, node: NodeId) -> Result<(), Unplaceable> {
    let gone = facts.down().into_iter().chain([node]).collect();
    facts.could_place(&gone, facts.state.precisions).map_err(|why| why.prefixed("without this node"))
}

/// Whether every expert could be held at these precisions.
///
/// # Errors
/// [`Unplaceable`].
pub fn can_hold(facts: &MeshFacts, precisions: Bounds) -> Result<(), Unplaceable> {
    facts.could_place(&facts.down(), precisions).map_err(|why| why.prefixed(&format!("at {precisions}")))
}
