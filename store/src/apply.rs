//! How the mesh decides: one pure step from a state and a command to the next state and an answer.
//!
//! Total and deterministic: any command, however senseless, has an outcome, and a refused one
//! leaves the state as it was. There is no clock, no randomness and no I/O here; what a decision
//! depends on is in the command. Every member runs exactly this code over exactly the same log,
//! so a change of behaviour here is a change of the log's format.

use crate::command::{Assignment, Command, Outcome, Refusal};
use crate::ids::{Epoch, ExpertId, MeshId, ModelId, NodeId, Peer, TokenHash};
use crate::precision::Precision;
use crate::state::{Invite, Member, MemberInfo, Model, Placement, Replica, State};
use std::collections::{BTreeMap, BTreeSet};

/// Longest name of a node or a model, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// Most addresses of a member; a machine has a handful.
pub const ADDRESSES_MAX: usize = 32;
/// Longest address, in bytes.
pub const ADDRESS_BYTES_MAX: usize = 512;
/// Longest network identity, in bytes; the ones in use have about 40.
pub const PEER_BYTES_MAX: usize = 128;
/// Most invites kept. Beyond it the one that ends first is forgotten.
pub const INVITES_MAX: usize = 1024;

/// Applies one command. A refusal changes nothing.
pub fn apply(state: &mut State, command: &Command) -> Outcome {
    let outcome = match command {
        Command::CreateMesh { mesh, member } => create(state, *mesh, member),
        Command::Join { peer, name, addresses, token, now_ms } => {
            let info = MemberInfo { peer: peer.clone(), name: name.clone(), addresses: addresses.clone() };
            join(state, info, token, *now_ms)
        }
        Command::Readdress { node, name, addresses } => readdress(state, *node, name, addresses),
        Command::Invite { token, uses, expires_at_ms } => invite(state, *token, *uses, *expires_at_ms),
        Command::Leaving { node, leaving } => member(state, *node).map(|member| {
            member.leaving = *leaving;
            Outcome::Done
        }),
        Command::Leave { node } => leave(state, *node),
        Command::RegisterModel { id, model } => register(state, *id, model),
        Command::Place { expect, model, replicas } => place(state, *expect, *model, replicas),
        Command::Precisions { bounds } => {
            state.precisions = *bounds;
            Ok(Outcome::Done)
        }
        Command::Ready { node, epoch, experts, trunk } => ready(state, *node, *epoch, experts, *trunk),
        Command::NotReady { node, experts } => not_ready(state, *node, experts),
    };
    outcome.unwrap_or_else(Outcome::Refused)
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
    let MemberInfo { peer, name, addresses } = info;
    state.members.insert(node, Member { peer, name, addresses, leaving: false });
    Outcome::Joined { node }
}

fn join(state: &mut State, info: MemberInfo, token: &TokenHash, now_ms: u64) -> Step {
    check_info(&info.peer, &info.name, &info.addresses)?;
    if let Some(node) = state.node_of(&info.peer) {
        let member = member(state, node)?;
        member.name = info.name;
        member.addresses = info.addresses;
        member.leaving = false;
        return Ok(Outcome::Joined { node });
    }
    let invite = state.invites.get_mut(token).ok_or(Refusal::UnknownInvite)?;
    if now_ms >= invite.expires_at_ms {
        return Err(Refusal::ExpiredInvite { late_ms: now_ms - invite.expires_at_ms });
    }
    invite.uses_left = invite.uses_left.checked_sub(1).ok_or(Refusal::UsedUpInvite)?;
    Ok(admit(state, info))
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
