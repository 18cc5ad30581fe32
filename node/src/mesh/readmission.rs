//! A node whose log is not what it was comes back into the mesh under a new id.
//!
//! Owns [`follow`], which tells the log how far the others say that theirs have got, and the folder's note of who this node has become.
//! Invariant: a node whose vote counts goes on until it has passed on; a node that was stopped in between goes on from where it was.
//! What a log's standing is, [`coel_store`] decides.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use coel_store::{Command, MeshId, NodeId, Outcome, Refusal, Standing, replace_file};
use serde::{Deserialize, Serialize};
use tokio::time::sleep;
use tracing::{debug, error, info};

use super::MeshView;
use super::advert::log_of;
use crate::ids;
use crate::lifecycle::Lifecycle;

/// Pause before the mesh is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// Which node of which mesh the data folder is to be that of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readmitted {
    /// The node.
    pub node: NodeId,
    /// Its mesh.
    pub mesh: MeshId,
}

impl Readmitted {
    fn path(data: &Path) -> PathBuf {
        data.join("readmitted.json")
    }

    /// The note in a data folder, if there is one.
    pub fn read(data: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(Self::path(data)).ok()?).ok()
    }

    fn write(self, data: &Path) -> std::io::Result<()> {
        replace_file(&Self::path(data), &serde_json::to_vec(&self)?)
    }

    /// Takes the note away: the folder is that of this node now.
    ///
    /// # Errors
    /// The system's.
    pub fn done(data: &Path) -> std::io::Result<()> {
        remove_note(&Self::path(data))
    }
}

/// Removes a note in the data folder, for good, where there is one.
///
/// # Errors
/// The system's.
pub fn remove_note(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        removed => removed?,
    }
    match path.parent() {
        Some(folder) => std::fs::File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

/// Tells the log how far those of the others have got, as they say, until the node stops.
pub async fn hear_others(view: MeshView) {
    let mut peers = view.gossip().peers();
    let mut heard: BTreeMap<_, (u64, u64)> = BTreeMap::new();
    loop {
        let now = peers.borrow_and_update().clone();
        for (peer, member) in &*now {
            let version = (member.started_ms, member.facts_version);
            if heard.insert(*peer, version) != Some(version)
                && let Some((mesh, node, progress)) = log_of(member)
                && mesh == view.log().mesh_id()
                // A member speaks for itself only.
                && view.state().node_of(&ids::peer_key(*peer)) == Some(node)
            {
                view.log().heard(node, progress);
            }
        }
        heard.retain(|peer, _| now.contains_key(peer));
        if peers.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Waits until this node's log is not what it was, then has it admitted under a new id, and starts the node anew.
pub async fn follow(view: MeshView, data: PathBuf, lifecycle: Lifecycle) {
    let mut standing = view.log().standing();
    let lost = loop {
        let now = *standing.borrow_and_update();
        if now.is_lost() {
            break now;
        }
        if standing.changed().await.is_err() {
            return std::future::pending().await;
        }
    };
    let node = view.node();
    error!(%node, "{}", explain(lost));
    // That this node is removed from the members is its own word.
    lifecycle.set_leaving(true);
    let mut known_as = node;
    let id = loop {
        match view.log().propose(Command::Readmit { node: known_as }, super::PROPOSE_DEADLINE).await {
            Ok(Outcome::Joined { node }) => break node,
            // It was admitted anew before, and the log of that is gone too, or was never begun.
            Ok(Outcome::Refused(Refusal::SpeaksForAnother { author, .. })) if author != known_as => {
                known_as = author;
                continue;
            }
            Ok(outcome) => debug!(?outcome, "this node is not admitted anew yet"),
            Err(error) => debug!(%error, "this node is not admitted anew yet"),
        }
        sleep(AGAIN).await;
    };
    view.log().vote_passed_on().await;
    match (Readmitted { node: id, mesh: view.log().mesh_id() }).write(&data) {
        Ok(()) => {
            info!(%id, former = %node, "admitted anew under another id; starting again with an empty log");
            lifecycle.restart();
        }
        Err(error) => lifecycle.fail(format!("{}: {error}", Readmitted::path(&data).display())),
    }
    // A task that ends is a fault of its own.
    std::future::pending().await
}

/// What has happened to the log, and what follows, for people.
pub fn explain(standing: Standing) -> String {
    let what = match standing {
        Standing::WentBack { remembered, found } => format!(
            "this node's log went back: other members remember that it had entry {} and voted in term {}, and it ends at entry {}, term {}. \
             A backup or a snapshot of the machine was restored",
            remembered.index, remembered.term, found.index, found.term
        ),
        Standing::Parted { index } => format!(
            "this node's log has parted from that of the other voters: up to entry {index} they have something else. The data folder was copied, \
             or a backup restored"
        ),
        Standing::Replaced { by } => {
            format!("this node was admitted anew, as node {by}, and the log of that is not here")
        }
        Standing::Confirmed | Standing::Unconfirmed => return String::new(),
    };
    format!(
        "{what}. It votes no more, and comes back under a new id with the log of the others as soon as they can agree on that; its own is kept \
         under another name. Weights stay"
    )
}
