//! What the node does for a command on this machine that asks through the control socket.
//!
//! Invariant: a command that is refused has changed nothing, and says why and what to do.

use std::sync::Arc;
use std::time::Duration;

use coel_store::{Bounds, Command, Outcome};
use tracing::warn;

use crate::admission::invite::token_hash;
use crate::control::{Conversation, Reply, Request};
use crate::import::import;
use crate::mesh::leader::Unplaceable;
use crate::mesh::{PROPOSE_DEADLINE, admit, leader, now_ms};
use crate::report;
use crate::shared::Shared;

/// How long `leave` waits for others to take over what this node holds: a download of all of it.
const HANDOVER_DEADLINE: Duration = Duration::from_secs(600);
/// How long `leave` waits for answers that are being written here: what is longer is cut off, and said so to the client.
const ANSWERS_DEADLINE: Duration = Duration::from_secs(60);
/// How often it is looked whether this node still votes.
const VOTE_PERIOD: Duration = Duration::from_millis(250);
/// How often it is asked again what was not known yet.
const LOOK_PERIOD: Duration = Duration::from_millis(100);

/// Answers one conversation.
pub async fn converse(mut conversation: Conversation, shared: Arc<Shared>, api_url: String) {
    let Some(request) = conversation.request().await else {
        return;
    };
    let answer = match request {
        Request::Status => json(&report::status(&shared, &api_url)),
        Request::Invite { uses, ttl_s } => invite(&shared, uses, ttl_s).await.and_then(|line| json(&line)),
        Request::Import { dir, name } => {
            let (sender, mut progress) = tokio::sync::mpsc::channel(16);
            let importing = shared.clone();
            let mut task = tokio::spawn(async move {
                // A step that finds the channel full is skipped: only the latest matters.
                let note = move |what: &str, done, total| {
                    let _ = sender.try_send(Reply::Progress { what: what.to_owned(), done, total });
                };
                import(&importing, &dir, name, note).await
            });
            while let Some(reply) = progress.recv().await {
                conversation.say(&reply).await;
            }
            (&mut task).await.unwrap_or_else(|error| Err(error.to_string())).and_then(|model| json(&model))
        }
        Request::Precision { bounds } => precision(&shared, bounds).await.and_then(|()| json(&())),
        Request::Leave => match leave(&shared).await {
            Ok(()) => {
                shared.left.send_replace(true);
                conversation.say(&Reply::Done(serde_json::Value::Null)).await;
                return shared.stopping.cancel();
            }
            Err(why) => Err(why),
        },
        Request::Stop => {
            conversation.say(&Reply::Done(serde_json::Value::Null)).await;
            return shared.stopping.cancel();
        }
    };
    conversation.say(&answer.map_or_else(Reply::Failed, Reply::Done)).await;
}

fn json(value: &impl serde::Serialize) -> Result<serde_json::Value, String> {
    serde_json::to_value(value).map_err(|error| error.to_string())
}

async fn propose(shared: &Shared, command: Command) -> Result<(), String> {
    match shared.log.propose(command, PROPOSE_DEADLINE).await {
        Ok(Outcome::Refused(refusal)) => Err(format!("{refusal}; {}", refusal.remedy())),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

async fn invite(shared: &Shared, uses: u32, ttl_s: u64) -> Result<String, String> {
    let invite = admit::new_invite(shared.log.mesh_id(), &shared.gossip);
    let token = token_hash(&invite.token);
    let expires_at_ms = now_ms().saturating_add(ttl_s.saturating_mul(1000));
    propose(shared, Command::Invite { token, uses, expires_at_ms }).await?;
    Ok(invite.to_string())
}

/// What is asked, as soon as it is known.
async fn once_known(ask: impl Fn() -> Result<(), Unplaceable>) -> Result<(), String> {
    let deadline = tokio::time::Instant::now() + PROPOSE_DEADLINE;
    loop {
        match ask() {
            Ok(()) => return Ok(()),
            Err(Unplaceable::Short(why)) => return Err(why),
            Err(Unplaceable::NotYet(what)) if tokio::time::Instant::now() >= deadline => {
                return Err(format!("{what}; `coel status` says who is silent; try again in a moment"));
            }
            Err(Unplaceable::NotYet(_)) => tokio::time::sleep(LOOK_PERIOD).await,
        }
    }
}

/// Says at which precisions the mesh is to hold experts. Refused where not every expert would fit.
async fn precision(shared: &Shared, bounds: Bounds) -> Result<(), String> {
    once_known(|| leader::can_hold(shared, bounds)).await?;
    propose(shared, Command::Precisions { bounds }).await
}

/// Hands over what this node holds, then leaves. Refused before anything changes where the others could not take it.
async fn leave(shared: &Shared) -> Result<(), String> {
    let node = shared.log.node_id();
    if shared.state().members.keys().all(|member| *member == node) {
        let data = shared.config.data.display();
        return Err(format!("this is the last node of the mesh; stop it, and delete {data} to end the mesh for good"));
    }
    once_known(|| leader::can_spare(shared, node)).await?;
    propose(shared, Command::Leaving { node, leaving: true }).await?;
    let mut state = shared.log.state();
    let handed_over = state.wait_for(|state| {
        let placed = state.placement.as_ref();
        placed.is_none_or(|placement| placement.of(node).next().is_none())
    });
    // The guard on the state must not be held while the log is asked.
    let handed_over = tokio::time::timeout(HANDOVER_DEADLINE, handed_over).await.map(drop);
    if handed_over.is_err() {
        propose(shared, Command::Leaving { node, leaving: false }).await?;
        return Err(
            "the others did not take over in time what this node holds; it stays. `coel status` says why".into()
        );
    }
    // Others compute for them meanwhile; once this node is no member any more nobody does.
    shared.retiring.send_replace(true);
    let mut answers = shared.answers.subscribe();
    let ended = tokio::time::timeout(ANSWERS_DEADLINE, answers.wait_for(|answers| *answers == 0)).await.is_ok();
    if !ended {
        warn!("leaving with answers still being written");
    }
    match propose(shared, Command::Leave { node }).await {
        Err(why) if shared.state().members.contains_key(&node) => {
            shared.retiring.send_replace(false);
            return Err(why);
        }
        // Done; or done, and the answer was lost.
        _ => {}
    }
    // A voter that stops before its vote has passed on could take the quorum with it.
    let deadline = tokio::time::Instant::now() + PROPOSE_DEADLINE;
    while shared.log.voters().contains(&node) && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(VOTE_PERIOD).await;
    }
    Ok(())
}
