//! Notices that this node is excluded: that members of its mesh go on without it.
//!
//! A member that has recovered the mesh takes this node for a stranger, and so does a mesh that has forgotten it. They do not speak to it,
//! but they answer what they answer every stranger. Owns [`follow`], which asks members that do not let this node in.

use std::time::Duration;

use coel_gossip::PeerId;
use coel_store::{Member, NodeId};
use rand::seq::IteratorRandom;
use tokio::time::sleep;
use tracing::warn;

use super::admission::protocol::refusal;
use super::raft_network::PROTOCOL;
use super::{MeshView, members};
use crate::ids;

/// Pause between two rounds.
const PERIOD: Duration = Duration::from_secs(10);
/// Members that are looked at in one round.
const ASKED_MAX: usize = 3;

/// Asks now and then, until the node stops.
pub async fn follow(view: MeshView) {
    let mut said_by: Option<NodeId> = None;
    loop {
        sleep(PERIOD).await;
        let (state, own) = (view.state(), view.node());
        let others = state.members.iter().filter(|(node, _)| **node != own && Some(**node) != said_by);
        let mut asked: Vec<(&NodeId, &Member)> = others.choose_multiple(&mut rand::rng(), ASKED_MAX);
        // The one that said so is asked until it says otherwise.
        asked.extend(said_by.and_then(|node| state.members.get_key_value(&node)));
        let mut found = None;
        for (&node, member) in asked {
            let Some(peer) = ids::peer_id(&member.peer) else { continue };
            if lets_in(&view, node, peer).await {
                continue;
            }
            let addresses = members::parse_addresses(&member.addresses);
            let answer = refusal(view.gossip(), view.log().mesh_id(), peer, addresses).await;
            // A member that is behind may not know this node yet. That matters only where no other member leads.
            let matters = view.leader().is_none_or(|leader| leader == own || leader == node);
            found = answer
                .filter(|_| matters)
                .map(|why| (node, format!("{} does not let this node in: {why}", member.name)));
            if found.is_some() {
                break;
            }
        }
        if let Some((node, why)) = found.as_ref().filter(|(node, _)| said_by != Some(*node)) {
            warn!(%node, why, "a member does not let this node in");
        }
        said_by = found.as_ref().map(|(node, _)| *node);
        view.set_exclusion(found.map(|(_, why)| why));
    }
}

/// Whether a member opens to this node what it opens to members only.
async fn lets_in(view: &MeshView, node: NodeId, peer: PeerId) -> bool {
    !view.down().contains(&node) && view.gossip().open(peer, PROTOCOL).await.is_ok()
}
