//! How the mesh decides: one pure step from a state and a command to the next state and an outcome.
//!
//! The step is total and deterministic: any command, however senseless, has an outcome, and a refused one leaves the
//! state as it was. There is no clock, no randomness and no I/O; what a decision depends on is in the command and its
//! origin. Every member runs exactly this code over exactly the same log, so a change of behaviour here is a change of
//! the log's format.
//!
//! # Who may say what
//!
//! Invariant: a node speaks only for itself, and only the leader plans. The leader stamps each entry with the member
//! whose authenticated connection brought the command, or with itself; [`authority`] says who may be the author.
//!
//! | command | author |
//! |---|---|
//! | `CreateMesh` | the leader, which is the only node then |
//! | `Place` | the leader that put it into the log, a member |
//! | `Readdress`, `Leaving`, `Leave`, `Readmit`, `Ready`, `NotReady` | the node that the command names |
//! | `Join`, `Invite`, `RegisterModel`, `Precisions` | any member |
//!
//! Admission is any member's because a newcomer has no log to speak through; the member has checked its proof. For a peer
//! that is a member already, `Join` only tells its id: name, addresses and leaving remain that node's own word; unless it
//! has lost its log, and joins anew. A
//! placement that was planned under an earlier leader is refused, and the leader of now plans again.
//!
//! An entry without an author comes from a leader of a former build, and is applied as that build applied it: unchecked.
//! Members that applied it before their update did so, and the state must not depend on when a member updates. Nothing is
//! opened by that: only a leader writes entries, and a leader could stamp any author.
//! Members of the former build would apply what this one refuses, and their states would part for good. So the two do not
//! share a log: the version of Raft's messages ([`crate::log`]) refuses them by name until all nodes are updated.

use super::command::{Assignment, Command, Origin, Outcome, Refusal};
use super::{Invite, Member, MemberInfo, Model, Placement, Replica, State};
use crate::ids::{Epoch, ExpertId, MeshId, ModelId, NodeId, Peer, TokenHash};
use crate::precision::Precision;
use std::collections::{BTreeMap, BTreeSet};

/// Most members; a gossip digest lists at most twice as many.
pub const MEMBERS_MAX: usize = 1024;
/// Most models. One takes at most the 4 MiB of a log entry, so that all of them fill half of the longest snapshot.
pub const MODELS_MAX: usize = 8;
/// Longest name of a node or a model, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// Most addresses of a member; a machine has a handful.
pub const ADDRESSES_MAX: usize = 32;
/// Longest address, in bytes.
pub const ADDRESS_BYTES_MAX: usize = 512;
/// Longest network identity, in bytes; the ones in use have about 40.
pub const PEER_BYTES_MAX: usize = 128;
/// Most invites kept. Beyond that, the one that ends first is forgotten.
pub const INVITES_MAX: usize = 1024;

/// Who may be the author of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Authority {
    /// The leader of a mesh that has no members yet.
    Founder,
    /// The leader.
    Leader,
    /// This node.
    Node(NodeId),
    /// Any member.
    Member,
}

fn authority(command: &Command) -> Authority {
    match command {
        Command::CreateMesh { .. } => Authority::Founder,
        Command::Place { .. } => Authority::Leader,
        Command::Readdress { node, .. }
        | Command::Leaving { node, .. }
        | Command::Leave { node }
        | Command::Readmit { node }
        | Command::Ready { node, .. }
        | Command::NotReady { node, .. } => Authority::Node(*node),
        Command::Join { .. }
        | Command::Invite { .. }
        | Command::Forget { .. }
        | Command::RegisterModel { .. }
        | Command::Precisions { .. } => Authority::Member,
    }
}

/// Refuses a command whose author may not give it.
fn authorize(state: &State, command: &Command, origin: Origin) -> Result<(), Refusal> {
    let Origin { author, leader } = origin;
    match authority(command) {
        Authority::Founder | Authority::Leader if author != leader => {
            return Err(Refusal::NotTheLeader { author, leader });
        }
        Authority::Node(node) if author != node => return Err(Refusal::SpeaksForAnother { author, node }),
        Authority::Founder => return Ok(()),
        Authority::Leader | Authority::Node(_) | Authority::Member => {}
    }
    if state.members.contains_key(&author) { Ok(()) } else { Err(Refusal::NotAMember(author)) }
}

/// Refuses a command with which the state would grow without end.
fn check_room(state: &State, command: &Command) -> Result<(), Refusal> {
    match command {
        Command::Join { peer, .. } if state.node_of(peer).is_none() => {
            at_most("members of the mesh", state.members.len() + 1, MEMBERS_MAX)
        }
        Command::RegisterModel { id, .. } if !state.models.contains_key(id) => {
            at_most("models of the mesh", state.models.len() + 1, MODELS_MAX)
        }
        _ => Ok(()),
    }
}

/// Applies one command. A refusal changes nothing. Without an origin the command is one of a former build's, which is not
/// checked against its author.
pub fn apply(state: &mut State, command: &Command, origin: Option<Origin>) -> Outcome {
    let checked = match origin {
        Some(origin) => authorize(state, command, origin).and_then(|()| check_room(state, command)),
        None => Ok(()),
    };
    checked.and_then(|()| step(state, command, origin)).unwrap_or_else(Outcome::Refused)
}

fn step(state: &mut State, command: &Command, origin: Option<Origin>) -> Step {
    match command {
        Command::CreateMesh { mesh, member } => create(state, *mesh, member),
        Command::Join { peer, name, addresses, token, now_ms, anew } => {
            let info = MemberInfo { peer: peer.clone(), name: name.clone(), addresses: addresses.clone() };
            match state.node_of(peer) {
                Some(node) if !anew => welcome_back(state, node, info, origin),
                lost => join(state, info, token, *now_ms, lost),
            }
        }
        Command::Readdress { node, name, addresses } => readdress(state, *node, name, addresses),
        Command::Invite { token, uses, expires_at_ms } => invite(state, *token, *uses, *expires_at_ms),
        Command::Leaving { node, leaving } => member(state, *node).map(|member| {
            member.leaving = *leaving;
            Outcome::Done
        }),
        Command::Leave { node } => leave(state, *node),
        Command::Forget { node } => forget(state, *node),
        Command::Readmit { node } => readmit(state, *node),
        Command::RegisterModel { id, model } => register(state, *id, model),
        Command::Place { expect, model, replicas } => place(state, *expect, *model, replicas),
        Command::Precisions { bounds } => {
            state.precisions = *bounds;
            Ok(Outcome::Done)
        }
        Command::Ready { node, epoch, experts, trunk } => ready(state, *node, *epoch, experts, *trunk),
        Command::NotReady { node, experts } => not_ready(state, *node, experts),
    }
}

type Step = Result<Outcome, Refusal>;

fn at_most(what: &str, actual: usize, limit: usize) -> Result<(), Refusal> {
    if actual <= limit {
        return Ok(());
    }
    Err(Refusal::TooLarge { what: what.into(), actual: actual as u64, limit: limit as u64 })
}

fn check_info(peer: &Peer, name: &str, addresses: &[String]) -> Result<(), Refusal> {
    at_most("bytes of the peer's identity", peer.0.len(), PEER_BYTES_MAX)?;
    at_most("bytes of the node's name", name.len(), NAME_BYTES_MAX)?;
    at_most("addresses of the node", addresses.len(), ADDRESSES_MAX)?;
    let longest = addresses.iter().map(String::len).max().unwrap_or(0);
    at_most("bytes of an address", longest, ADDRESS_BYTES_MAX)
}

fn member(state: &mut State, node: NodeId) -> Result<&mut Member, Refusal> {
    state.members.get_mut(&node).ok_or(Refusal::NotAMember(node))
}

fn create(state: &mut State, mesh: MeshId, info: &MemberInfo) -> Step {
    if !state.members.is_empty() || state.next_node_id != 0 {
        return Err(Refusal::MeshExists(state.mesh));
    }
    check_info(&info.peer, &info.name, &info.addresses)?;
    state.mesh = mesh;
    state.next_node_id = 1;
    Ok(admit(state, info.clone()))
}

fn admit(state: &mut State, info: MemberInfo) -> Outcome {
    let node = NodeId(state.next_node_id);
    state.next_node_id += 1;
    for former in &mut state.former {
        former.members.retain(|_, member| member.peer != info.peer);
    }
    let MemberInfo { peer, name, addresses } = info;
    state.members.insert(node, Member { peer, name, addresses, leaving: false });
    Outcome::Joined { node }
}

fn welcome_back(state: &mut State, node: NodeId, info: MemberInfo, origin: Option<Origin>) -> Step {
    check_info(&info.peer, &info.name, &info.addresses)?;
    // What a member says of itself is its own word; a former build took the proposer's for it.
    if origin.is_none_or(|origin| origin.author == node) {
        let member = member(state, node)?;
        member.name = info.name;
        member.addresses = info.addresses;
        member.leaving = false;
    }
    Ok(Outcome::Joined { node })
}

/// Admits a newcomer; `lost` is the member that it was before it lost its log.
fn join(state: &mut State, info: MemberInfo, token: &TokenHash, now_ms: u64, lost: Option<NodeId>) -> Step {
    check_info(&info.peer, &info.name, &info.addresses)?;
    let invite = state.invites.get_mut(token).ok_or(Refusal::UnknownInvite)?;
    if now_ms >= invite.expires_at_ms {
        return Err(Refusal::ExpiredInvite { late_ms: now_ms - invite.expires_at_ms });
    }
    invite.uses_left = invite.uses_left.checked_sub(1).ok_or(Refusal::UsedUpInvite)?;
    let joined = admit(state, info);
    if let Some(lost) = lost {
        leave(state, lost)?;
    }
    Ok(joined)
}

fn readdress(state: &mut State, node: NodeId, name: &str, addresses: &[String]) -> Step {
    let member = member(state, node)?;
    check_info(&member.peer, name, addresses)?;
    member.name = name.into();
    member.addresses = addresses.to_vec();
    Ok(Outcome::Done)
}

fn invite(state: &mut State, token: TokenHash, uses: u32, expires_at_ms: u64) -> Step {
    state.invites.insert(token, Invite { uses_left: uses, expires_at_ms });
    if state.invites.len() > INVITES_MAX {
        let ends_first = state.invites.iter().min_by_key(|(token, i)| (i.expires_at_ms, **token));
        if let Some(oldest) = ends_first.map(|(token, _)| *token) {
            state.invites.remove(&oldest);
        }
    }
    Ok(Outcome::Done)
}

fn forget(state: &mut State, node: NodeId) -> Step {
    let awaited = state.former.iter_mut().any(|former| former.members.remove(&node).is_some());
    if awaited { Ok(Outcome::Done) } else { leave(state, node) }
}

fn readmit(state: &mut State, node: NodeId) -> Step {
    let Member { peer, name, addresses, .. } = member(state, node)?.clone();
    let joined = admit(state, MemberInfo { peer, name, addresses });
    leave(state, node)?;
    Ok(joined)
}

fn leave(state: &mut State, node: NodeId) -> Step {
    member(state, node)?;
    if state.members.len() == 1 {
        return Err(Refusal::LastMember(node));
    }
    state.members.remove(&node);
    let Some(placement) = &mut state.placement else {
        return Ok(Outcome::Done);
    };
    placement.trunk_ready.remove(&node);
    let mut held = false;
    for hosts in placement.replicas.values_mut() {
        held |= hosts.remove(&node).is_some();
    }
    if !held {
        return Ok(Outcome::Done);
    }
    placement.epoch = placement.epoch.next();
    Ok(Outcome::Epoch(placement.epoch))
}

fn register(state: &mut State, id: ModelId, model: &Model) -> Step {
    at_most("bytes of the model's name", model.name.len(), NAME_BYTES_MAX)?;
    at_most("layers of the model", model.popularity.len(), usize::from(u16::MAX))?;
    let widest = model.popularity.iter().map(Vec::len).max().unwrap_or(0);
    at_most("experts of a layer", widest, usize::from(u16::MAX))?;
    check_sensitivity(model)?;
    if let Some(known) = state.models.get(&id) {
        if known.name == model.name {
            return Ok(Outcome::Done);
        }
        return Err(Refusal::RegisteredAs { id, name: known.name.clone() });
    }
    if let Some((other, _)) = state.models.iter().find(|(_, known)| known.name == model.name) {
        return Err(Refusal::NameTaken { name: model.name.clone(), id: *other });
    }
    state.models.insert(id, model.clone());
    Ok(Outcome::Done)
}

fn check_sensitivity(model: &Model) -> Result<(), Refusal> {
    let Model { popularity, sensitivity, .. } = model;
    let widths = |shape: &mut dyn Iterator<Item = usize>| shape.collect::<Vec<_>>();
    let same = widths(&mut popularity.iter().map(Vec::len)) == widths(&mut sensitivity.iter().map(Vec::len));
    if !sensitivity.is_empty() && !same {
        return Err(Refusal::Sensitivity("it has another shape than their popularity".into()));
    }
    let is_loss = |loss: f32| loss.is_finite() && loss >= 0.0;
    match sensitivity.iter().flatten().find(|loss| !is_loss(loss.q4) || !is_loss(loss.q8)) {
        Some(loss) => Err(Refusal::Sensitivity(format!("{loss:?}"))),
        None => Ok(()),
    }
}

fn place(state: &mut State, expect: Epoch, id: ModelId, assignment: &Assignment) -> Step {
    let actual = state.epoch();
    if expect != actual {
        return Err(Refusal::StaleEpoch { expected: expect, actual });
    }
    let model = state.models.get(&id).ok_or(Refusal::UnknownModel(id))?;
    for (expert, hosts) in assignment {
        if !model.has(*expert) {
            return Err(Refusal::UnknownExpert(*expert));
        }
        if let Some(stranger) = hosts.keys().find(|node| !state.members.contains_key(node)) {
            return Err(Refusal::NotAMember(*stranger));
        }
    }
    let old = state.placement.as_ref().filter(|old| old.model == id);
    // A replica that is wanted at another precision goes on serving at the one it has.
    let ready = |expert: &ExpertId, node: &NodeId| old.and_then(|old| old.replicas.get(expert)?.get(node)?.ready);
    let mut replicas: BTreeMap<ExpertId, BTreeMap<NodeId, Replica>> =
        model.experts().map(|expert| (expert, BTreeMap::new())).collect();
    for (expert, hosts) in assignment {
        let replica = |(node, precision): (&NodeId, &Precision)| {
            (*node, Replica { precision: *precision, ready: ready(expert, node) })
        };
        replicas.insert(*expert, hosts.iter().map(replica).collect());
    }
    let trunk_ready = old.map_or_else(BTreeSet::new, |old| old.trunk_ready.clone());
    let epoch = actual.next();
    state.placement = Some(Placement { epoch, model: id, replicas, trunk_ready });
    Ok(Outcome::Epoch(epoch))
}

fn ready(state: &mut State, node: NodeId, epoch: Epoch, experts: &BTreeMap<ExpertId, Precision>, trunk: bool) -> Step {
    member(state, node)?;
    let actual = state.epoch();
    let placement = match &mut state.placement {
        Some(placement) if placement.epoch == epoch => placement,
        _ => {
            return Err(Refusal::StaleEpoch { expected: epoch, actual });
        }
    };
    for (expert, precision) in experts {
        if let Some(replica) = placement.replicas.get_mut(expert).and_then(|hosts| hosts.get_mut(&node)) {
            replica.ready = Some(*precision);
        }
    }
    if trunk {
        placement.trunk_ready.insert(node);
    }
    Ok(Outcome::Done)
}

fn not_ready(state: &mut State, node: NodeId, experts: &[ExpertId]) -> Step {
    member(state, node)?;
    if let Some(placement) = &mut state.placement {
        for expert in experts {
            if let Some(replica) = placement.replicas.get_mut(expert).and_then(|hosts| hosts.get_mut(&node)) {
                replica.ready = None;
            }
        }
    }
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests;
