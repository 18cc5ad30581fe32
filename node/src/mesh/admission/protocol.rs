//! Both ends of the admission handshake: the member that checks the proof, and the node that wants in.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use coel_gossip::{Frame, FrameStream, Handle, Incoming, Multiaddr, PeerId, Protocol};
use coel_store::{Command, Log, MeshId, NodeId, Outcome, cbor};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{info, warn};

use super::handshake::{ADDRESSES_MAX, Greeted, MESSAGE_BYTES_MAX, Message, Newcomer, VERSION, find_invite, proof};
use super::invite::{Invite, token_hash};
use crate::config::NAME_BYTES_MAX;
use crate::ids;
use crate::mesh::{MeshView, ProposalError, members, now_ms};

/// The only protocol that answers a stranger.
pub const PROTOCOL: Protocol = Protocol::new("/coel/join/1", MESSAGE_BYTES_MAX as u32 + 64);
/// Longest a stranger may take for a message.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(10);
/// Longest a newcomer waits for a member's answer, which includes a proposal to the log.
const WELCOME_DEADLINE: Duration = Duration::from_secs(20);
/// Longest a member that does not let this node in is waited for.
const REFUSAL_DEADLINE: Duration = Duration::from_secs(3);
/// Handshakes at once; strangers cost little, but not nothing.
const HANDSHAKES_MAX: usize = 16;

/// The refusal of a node that asks for a mesh which was recovered. The node that hears it knows it by this text.
const SUCCEEDED: &str = "the mesh was recovered without its other members; ask for an invite to the mesh that goes on from it \
                         (coel invite), and use it here (coel join INVITE)";

/// What a node is to do that a member takes for a stranger.
const STRANGER: &str = "it does not know this node as a member any more; if it was forgotten, or has left, use a new invite on this data \
                        folder (coel join INVITE)";

/// Why a node was not admitted.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No member answered at the invite's addresses.
    #[error(
        "no member answers at the invite's addresses ({tried}): {why}; is the node that issued it running and reachable?"
    )]
    Unreachable { tried: String, why: String },
    /// The mesh said no.
    #[error("the mesh refused: {0}")]
    Refused(String),
    /// The other side speaks something else.
    #[error("the handshake failed: {0}")]
    Broken(String),
}

/// A newcomer's place in the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    /// Its id in the log.
    pub node: NodeId,
    /// The members, itself included.
    pub members: Vec<Greeted>,
}

/// Serves the handshake until the swarm stops.
pub async fn serve(mut incoming: Incoming, view: MeshView) {
    let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    // One at a time from each: a single stranger must not take every place.
    let talking = Arc::new(Mutex::new(BTreeSet::new()));
    while let Some((stranger, mut stream)) = incoming.next().await {
        let Ok(place) = places.clone().try_acquire_owned() else {
            continue;
        };
        if !lock(&talking).insert(stranger) {
            continue;
        }
        let (view, talking) = (view.clone(), talking.clone());
        tokio::spawn(async move {
            let outcome = host(&mut stream, stranger, &view).await;
            lock(&talking).remove(&stranger);
            match outcome {
                Ok(node) => info!(peer = %stranger, %node, "admitted"),
                Err(reason) => {
                    warn!(peer = %stranger, reason, "not admitted");
                    let _ = say(&mut stream, &Message::Refused { reason }).await;
                }
            }
            let _ = timeout(MESSAGE_DEADLINE, stream.close()).await;
            drop(place);
        });
    }
}

fn lock(talking: &Mutex<BTreeSet<PeerId>>) -> MutexGuard<'_, BTreeSet<PeerId>> {
    talking.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn host(stream: &mut FrameStream, stranger: PeerId, view: &MeshView) -> Result<NodeId, String> {
    let (log, local) = (view.log(), view.gossip().local_peer_id());
    let mesh = log.mesh_id();
    match hear(stream, MESSAGE_DEADLINE).await? {
        Message::Hello { version: VERSION, mesh: asked } if asked == mesh => {}
        Message::Hello { version: VERSION, mesh: asked } if log.state().borrow().follows(asked) => {
            return Err(SUCCEEDED.into());
        }
        // Which mesh this is, a stranger is not told.
        Message::Hello { version: VERSION, .. } => return Err("the invite is for another mesh".into()),
        Message::Hello { version, .. } => {
            return Err(format!("admission version {version}; this node speaks version {VERSION}"));
        }
        _ => return Err("expected Hello".into()),
    }
    let nonce: [u8; 32] = rand::random();
    say(stream, &Message::Challenge { nonce }).await?;
    let Message::Proof { proof, name, addresses, former, anew } = hear(stream, MESSAGE_DEADLINE).await? else {
        return Err("expected Proof".into());
    };
    if name.is_empty() || name.len() > NAME_BYTES_MAX || addresses.len() > ADDRESSES_MAX {
        return Err(format!("a node has a name of 1 to {NAME_BYTES_MAX} bytes and at most {ADDRESSES_MAX} addresses"));
    }
    let state = log.state().borrow().clone();
    let token = find_invite(state.invites.keys(), &proof, mesh, stranger, local, &nonce)
        .ok_or("this mesh knows no such invite; ask a member for a new one with `coel invite`")?;
    if let Some(former) = former.filter(|former| !state.follows(*former)) {
        return Err(format!(
            "the node belongs to mesh {former}, and this mesh does not go on from that one; leave it first (coel leave), or use \
             another data folder (--data)"
        ));
    }
    let join = Command::Join { peer: ids::peer_key(stranger), name, addresses, token, now_ms: now_ms(), anew };
    match view.propose(join).await {
        Ok(Outcome::Joined { node }) => {
            let members = greet(log, node).await;
            say(stream, &Message::Welcome { node, members }).await?;
            Ok(node)
        }
        Ok(other) => Err(format!("the log answered {other:?}")),
        Err(error @ ProposalError::Failed(_)) => Err(format!("{error}; try again when the mesh has a quorum")),
        Err(error) => Err(error.to_string()),
    }
}

/// The members, once this node has applied the newcomer's admission itself.
async fn greet(log: &Log, newcomer: NodeId) -> Vec<Greeted> {
    let mut state = log.state();
    let applied = state.wait_for(|state| state.members.contains_key(&newcomer));
    // A follower applies a moment after the leader; what is missing then, the newcomer learns from the log itself.
    let _ = timeout(MESSAGE_DEADLINE, applied).await;
    let state = log.state().borrow().clone();
    let greeted = state.members.iter().map(|(&node, member)| Greeted {
        node,
        peer: member.peer.clone(),
        addresses: member.addresses.clone(),
    });
    greeted.collect()
}

/// Asks the mesh of `invite` to admit this node.
///
/// # Errors
/// [`JoinError`]; nothing was written on this side.
pub async fn join(gossip: &Handle, invite: &Invite, me: Newcomer) -> Result<Admitted, JoinError> {
    let broken = JoinError::Broken;
    let unreachable = |why: String| JoinError::Unreachable {
        tried: invite.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        why,
    };
    let host = gossip
        .dial(invite.addresses.clone(), Some(invite.peer), WELCOME_DEADLINE)
        .await
        .map_err(|error| unreachable(error.to_string()))?;
    let mut stream = gossip.open(host, PROTOCOL).await.map_err(|error| unreachable(error.to_string()))?;
    say(&mut stream, &Message::Hello { version: VERSION, mesh: invite.mesh }).await.map_err(broken)?;
    let nonce = match hear(&mut stream, MESSAGE_DEADLINE).await.map_err(broken)? {
        Message::Challenge { nonce } => nonce,
        Message::Refused { reason } => return Err(JoinError::Refused(reason)),
        _ => return Err(broken("expected Challenge".into())),
    };
    let proof = proof(&token_hash(&invite.token), invite.mesh, gossip.local_peer_id(), host, &nonce);
    let Newcomer { name, addresses, former, anew } = me;
    let message = Message::Proof { proof, name, addresses, former, anew };
    say(&mut stream, &message).await.map_err(broken)?;
    match hear(&mut stream, WELCOME_DEADLINE).await.map_err(broken)? {
        Message::Welcome { node, members } => Ok(Admitted { node, members }),
        Message::Refused { reason } => Err(JoinError::Refused(reason)),
        _ => Err(broken("expected Welcome".into())),
    }
}

async fn say(stream: &mut FrameStream, message: &Message) -> Result<(), String> {
    let frame = Frame::new(Bytes::new(), cbor::to_vec(message).expect("messages are plain data"));
    let sent = timeout(MESSAGE_DEADLINE, stream.send(&frame)).await;
    sent.map_err(|_| "no answer in time".to_owned())?.map_err(|error| error.to_string())
}

async fn hear(stream: &mut FrameStream, deadline: Duration) -> Result<Message, String> {
    let frame = timeout(deadline, stream.recv()).await.map_err(|_| "no answer in time".to_owned())?;
    let frame = frame.map_err(|error| error.to_string())?.ok_or("the other side hung up")?;
    cbor::from_slice(&frame.payload, MESSAGE_BYTES_MAX).map_err(|error| error.to_string())
}

/// Asks a member that does not let this node in for the reason: it has recovered `mesh` without this node, or its log knows no such
/// member. `None` if it does not say.
pub async fn refusal(gossip: &Handle, mesh: MeshId, peer: PeerId, addresses: Vec<Multiaddr>) -> Option<String> {
    let host = gossip.dial(addresses, Some(peer), REFUSAL_DEADLINE).await.ok()?;
    let mut stream = gossip.open(host, PROTOCOL).await.ok()?;
    say(&mut stream, &Message::Hello { version: VERSION, mesh }).await.ok()?;
    match hear(&mut stream, REFUSAL_DEADLINE).await.ok()? {
        Message::Refused { reason } if reason == SUCCEEDED => Some(reason),
        // What a stranger hears.
        Message::Challenge { .. } => Some(STRANGER.into()),
        _ => None,
    }
}

/// A new invite of this node. The log must have it before anyone gets the line.
pub fn new_invite(mesh: MeshId, gossip: &Handle) -> Invite {
    let addresses = members::parse_addresses(&members::own_addresses(gossip));
    Invite { mesh, token: rand::random(), peer: gossip.local_peer_id(), addresses }
}
