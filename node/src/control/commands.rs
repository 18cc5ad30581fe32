//! What the node does for a command on this machine that asks through the control socket.
//!
//! Invariant: a command that is refused has changed nothing, and says why and what to do.

use std::collections::BTreeSet;
use std::time::Duration;

use coel_store::{Bounds, Command, NodeId, State};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::warn;

use super::{Conversation, Reply, Request};
use crate::generation::AnswerGate;
use crate::import::{Importer, import};
use crate::lifecycle::Lifecycle;
use crate::mesh::admission::invite::token_hash;
use crate::mesh::admission::protocol::new_invite;
use crate::mesh::members::Departure;
use crate::mesh::{MeshView, PROPOSE_DEADLINE, now_ms};
use crate::placement::{MeshFacts, Unplaceable, can_hold, can_spare};
use crate::status::StatusView;

/// How long `leave` waits for others to take over what this node holds: a download of all of it.
const HANDOVER_DEADLINE: Duration = Duration::from_secs(600);
/// How long `leave` waits for answers that are being written here. Longer ones are cut off, and their clients are told.
const ANSWERS_DEADLINE: Duration = Duration::from_secs(60);

/// What commands need of the node.
#[derive(Clone)]
pub struct CommandHandles {
    /// The mesh.
    pub view: MeshView,
    /// The status document.
    pub status: StatusView,
    /// Imports.
    pub importer: Importer,
    /// Lets answers begin.
    pub answers: AnswerGate,
    /// Held while the node leaves.
    pub departure: Departure,
    /// How the node ends.
    pub lifecycle: Lifecycle,
}

/// Answers one conversation.
pub async fn converse(mut conversation: Conversation, node: CommandHandles) {
    let Some(request) = conversation.request().await else {
        return;
    };
    let is_change = !matches!(request, Request::Status | Request::Stop);
    if is_change && let Err(duplicate) = node.view.gossip().confirmed().await {
        return conversation.say(&Reply::Failed(duplicate.to_string())).await;
    }
    let answer = match request {
        Request::Status => json(&node.status.now()),
        Request::Invite { uses, ttl_s } => invite(&node.view, uses, ttl_s).await.and_then(|line| json(&line)),
        Request::Import { dir, name } => {
            let (sender, mut progress) = tokio::sync::mpsc::channel(16);
            let importer = node.importer.clone();
            let mut task = tokio::spawn(async move {
                // A step that finds the channel full is skipped: only the latest matters.
                let note = move |what: &str, done, total| {
                    let _ = sender.try_send(Reply::Progress { what: what.to_owned(), done, total });
                };
                import(&importer, &dir, name, note).await
            });
            while let Some(reply) = progress.recv().await {
                conversation.say(&reply).await;
            }
            (&mut task).await.unwrap_or_else(|error| Err(error.to_string())).and_then(|model| json(&model))
        }
        Request::Forget { node: name } => forget(&node.view, &name).await.and_then(|()| json(&())),
        Request::Precision { bounds } => precision(&node.view, bounds).await.and_then(|()| json(&())),
        Request::Leave => match leave(&node).await {
            Ok(()) => {
                node.lifecycle.set_left();
                conversation.say(&Reply::Done(serde_json::Value::Null)).await;
                return node.lifecycle.stop();
            }
            Err(why) => Err(why),
        },
        Request::Stop => {
            conversation.say(&Reply::Done(serde_json::Value::Null)).await;
            return node.lifecycle.stop();
        }
    };
    conversation.say(&answer.map_or_else(Reply::Failed, Reply::Done)).await;
}

fn json(value: &impl serde::Serialize) -> Result<serde_json::Value, String> {
    serde_json::to_value(value).map_err(|error| error.to_string())
}

async fn propose(view: &MeshView, command: Command) -> Result<(), String> {
    view.propose(command).await.map(drop).map_err(|error| error.to_string())
}

/// Refuses at once what no majority can agree on.
fn check_quorum(view: &MeshView) -> Result<(), String> {
    view.quorum_lost().map_or(Ok(()), Err)
}

/// Removes a member that is down for good.
async fn forget(view: &MeshView, name: &str) -> Result<(), String> {
    check_quorum(view)?;
    let node = to_forget(&view.state(), view.node(), &view.down(), name)?;
    propose(view, Command::Forget { node }).await
}

/// The member that `name` means (its id, or its name), if it may be forgotten.
fn to_forget(state: &State, own: NodeId, down: &BTreeSet<NodeId>, name: &str) -> Result<NodeId, String> {
    let by_id = name.parse().ok().map(NodeId).filter(|node| state.members.contains_key(node));
    let named = state.members.iter().filter(|(_, member)| member.name == name).map(|(&node, _)| node);
    let found: BTreeSet<NodeId> = by_id.map_or_else(|| named.collect(), |node| BTreeSet::from([node]));
    let mut former = state.former.iter().flat_map(|former| &former.members);
    if found.is_empty()
        && let Some((node, _)) = former.find(|(node, member)| member.name == name || node.to_string() == name)
    {
        return Ok(*node);
    }
    match found.iter().collect::<Vec<_>>()[..] {
        [] => Err(format!("no member is called '{name}'; `coel status` lists them")),
        [node] if *node == own => Err("this node cannot forget itself; `coel leave` leaves the mesh".into()),
        [node] if !down.contains(node) => {
            Err(format!("node {node} is not down; run `coel leave` on it, or stop it and try again"))
        }
        [node] => Ok(*node),
        _ => {
            let ids: Vec<_> = found.iter().map(ToString::to_string).collect();
            Err(format!("several members are called '{name}'; give one of their ids: {}", ids.join(", ")))
        }
    }
}

async fn invite(view: &MeshView, uses: u32, ttl_s: u64) -> Result<String, String> {
    check_quorum(view)?;
    let invite = new_invite(view.log().mesh_id(), view.gossip());
    let token = token_hash(&invite.token);
    let expires_at_ms = now_ms().saturating_add(ttl_s.saturating_mul(1000));
    propose(view, Command::Invite { token, uses, expires_at_ms }).await?;
    Ok(invite.to_string())
}

/// What is `asked` about the mesh, as soon as the facts for it are there.
async fn once_known(view: &MeshView, asked: impl Fn(&MeshFacts) -> Result<(), Unplaceable>) -> Result<(), String> {
    let deadline = Instant::now() + PROPOSE_DEADLINE;
    let mut changes = view.changes();
    loop {
        let missing = match asked(&view.facts()) {
            Ok(()) => return Ok(()),
            Err(Unplaceable::Short(why)) => return Err(why),
            Err(Unplaceable::NotYet(missing)) => missing,
        };
        check_quorum(view)?;
        if !timeout_at(deadline, changes.changed()).await.unwrap_or(false) {
            return Err(format!("{missing}; `coel status` says which node is silent; try again in a moment"));
        }
    }
}

/// Says at which precisions the mesh is to hold experts. Refused where not every expert would fit.
async fn precision(view: &MeshView, bounds: Bounds) -> Result<(), String> {
    check_quorum(view)?;
    once_known(view, |facts| can_hold(facts, bounds)).await?;
    propose(view, Command::Precisions { bounds }).await
}

/// Hands over what this node holds, then leaves. Refused before anything changes where the others could not take it.
async fn leave(handles: &CommandHandles) -> Result<(), String> {
    let (view, log) = (&handles.view, handles.view.log());
    let node = view.node();
    if view.state().members.keys().all(|member| *member == node) {
        let data = handles.importer.data.display();
        return Err(format!("this is the last node of the mesh; stop it, and delete {data} to end the mesh for good"));
    }
    let _departure = handles.departure.lock().await;
    check_quorum(view)?;
    once_known(view, |facts| can_spare(facts, node)).await?;
    propose(view, Command::Leaving { node, leaving: true }).await?;
    let mut state = log.state();
    let handed_over = state.wait_for(|state| {
        let placed = state.placement.as_ref();
        placed.is_none_or(|placement| placement.of(node).next().is_none())
    });
    // The guard on the state must not be held while the log is asked.
    let handed_over = timeout(HANDOVER_DEADLINE, handed_over).await.map(drop);
    if handed_over.is_err() {
        propose(view, Command::Leaving { node, leaving: false }).await?;
        return Err(
            "the other nodes did not take over this node's experts in time, so it stays. `coel status` says why".into(),
        );
    }
    // Other nodes compute for the answers being written here meanwhile. Once this node is no member, none does.
    handles.answers.close();
    if timeout(ANSWERS_DEADLINE, handles.answers.idle()).await.is_err() {
        warn!("leaving while answers are still being written");
    }
    handles.lifecycle.set_leaving(true);
    match propose(view, Command::Leave { node }).await {
        Err(why) if view.state().members.contains_key(&node) => {
            handles.lifecycle.set_leaving(false);
            handles.answers.open();
            return Err(why);
        }
        // Done; or done, and the answer was lost.
        _ => {}
    }
    // A voter that stops before its vote has passed on could take the quorum with it.
    // Where that takes too long it still votes; it has left all the same.
    let _ = timeout(PROPOSE_DEADLINE, log.vote_passed_on()).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use coel_store::{Member, Peer};

    use super::*;

    #[test]
    fn only_a_member_that_is_down_and_named_without_doubt_is_forgotten() {
        let member = |id: u8, name: &str| Member {
            peer: Peer(vec![id]),
            name: name.into(),
            addresses: Vec::new(),
            leaving: false,
        };
        let members = [(1, "attic"), (2, "cellar"), (3, "cellar"), (4, "2")];
        let members = members.map(|(id, name)| (NodeId(id.into()), member(id, name)));
        let state = State { members: members.into(), ..State::default() };
        let down = BTreeSet::from([NodeId(1), NodeId(2), NodeId(3), NodeId(4)]);
        let chosen = |name, down: &BTreeSet<NodeId>| to_forget(&state, NodeId(1), down, name);
        assert_eq!(chosen("2", &down), Ok(NodeId(2)), "an id comes before a name");
        assert_eq!(chosen("4", &down), Ok(NodeId(4)));
        for (name, down, why) in [
            ("attic", &down, "coel leave"),
            ("cellar", &down, "2, 3"),
            ("roof", &down, "no member"),
            ("9", &down, "no member"),
            ("3", &BTreeSet::new(), "is not down"),
        ] {
            let refused = chosen(name, down).unwrap_err();
            assert!(refused.contains(why), "{name}: {refused}");
        }
    }
}
