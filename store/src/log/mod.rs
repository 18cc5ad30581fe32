//! The placement log: Raft (openraft) over sled, driven by a handle.
//!
//! | part | idea |
//! |---|---|
//! | [`types`] | the consensus library told about our types |
//! | [`sled_log`] | log and vote on disk |
//! | [`machine`] | the replicated state, its publication and its snapshots |
//! | [`rpc`], [`courier`] | messages between members, and their way out |
//! | [`serve`] | messages' way in: who is answered, and what |
//! | [`propose`] | a command's way to the leader and back |
//! | [`voters`] | who votes |
//! | [`timing`] | how patient all of it is |
//!
//! Invariants: nothing is acknowledged before it is on this node's disk (and a majority's); a node
//! answers only members of its own mesh; a mesh begins only by [`Log::create`], and a folder
//! belongs to one member of one mesh forever. This module does not know what a connection is, nor
//! who is up: the caller says so where it matters ([`Log::reconcile`]).

mod courier;
mod machine;
mod propose;
mod rpc;
mod serve;
mod sled_log;
mod timing;
mod types;
mod voters;

pub use courier::{Transport, Unreachable};
pub use propose::ProposeError;
pub use rpc::{RPC_BYTES_MAX, RpcRefusal};
pub use timing::Timing;
pub use voters::{VOTERS_MAX, voters};

use crate::command::{Command, Outcome};
use crate::disk::{Disk, OpenError, sync_folder};
use crate::ids::{MeshId, NodeId};
use crate::state::{MemberInfo, State};
use courier::Courier;
use machine::Machine;
use openraft::{ChangeMembers, LogIdOptionExt, Raft, ServerState};
use serve::Guests;
use sled_log::{Identity, SledLog, StoreError};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use types::{Metrics, RaftNode, TypeConfig};
use voters::{Change, Group};

/// How long one change of the consensus group may take before it is left to the next attempt.
const CHANGE_PATIENCE: Duration = Duration::from_secs(10);
/// How long the creator of a mesh waits for itself to become its leader. It is alone, so only a
/// stalled disk gets there.
const CREATE_PATIENCE: Duration = Duration::from_secs(60);
/// How long a shutdown waits for the last reader of the database.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// Why there is no log.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LogError {
    /// The database does not open; among others because another process has it.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The folder belongs to a mesh already.
    #[error("{path} already belongs to a mesh; start it with coel up, or choose an empty data folder")]
    AlreadyMember {
        /// The data folder.
        path: PathBuf,
    },
    /// The folder belongs to no mesh.
    #[error("{path} belongs to no mesh; create one (coel up --new) or join one (coel join INVITE)")]
    NotAMember {
        /// The data folder.
        path: PathBuf,
    },
    /// The times contradict each other.
    #[error("the log's timing makes no sense: {0}")]
    Timing(String),
    /// The log stopped, for good.
    #[error("the placement log stopped: {0}; check the disk, then restart the node")]
    Fatal(String),
}

impl From<StoreError> for LogError {
    fn from(error: StoreError) -> Self {
        Self::Fatal(error.to_string())
    }
}

/// A handle on this node's log; cloning it is cheap.
#[derive(Clone)]
pub struct Log(Arc<Inner>);

pub(crate) struct Inner {
    raft: Raft<TypeConfig>,
    disk: Mutex<Option<Disk>>,
    transport: Arc<dyn Transport>,
    identity: Identity,
    timing: Timing,
    state: watch::Receiver<Arc<State>>,
    leader: watch::Receiver<Option<NodeId>>,
    guests: Guests,
}

fn log_dir(dir: &Path) -> PathBuf {
    dir.join("log")
}

/// Written last when a folder becomes a member: without it, what is in the folder never counted.
fn marker(dir: &Path) -> PathBuf {
    log_dir(dir).join("member")
}

fn io_error(path: &Path) -> impl Fn(std::io::Error) -> LogError + '_ {
    move |error| OpenError::Io { path: path.into(), error: error.to_string() }.into()
}

/// Prepares an empty log folder: leftovers of an attempt that never finished are removed.
fn open_fresh(dir: &Path) -> Result<Disk, LogError> {
    let path = log_dir(dir);
    if Log::exists(dir) {
        return Err(LogError::AlreadyMember { path: dir.into() });
    }
    if path.exists() {
        // Opening first proves that no other process is at it.
        drop(Disk::open(&path, None)?);
        fs::remove_dir_all(&path).map_err(io_error(&path))?;
    }
    Ok(Disk::open(&path, None)?)
}

fn mark(dir: &Path, identity: Identity) -> Result<(), LogError> {
    let path = marker(dir);
    let write = || {
        let mut file = File::create(&path)?;
        writeln!(file, "node {} of mesh {}", identity.node, identity.mesh)?;
        file.sync_all()?;
        sync_folder(&log_dir(dir))
    };
    write().map_err(io_error(&path))
}

impl Log {
    /// Whether the data folder `dir` belongs to a mesh.
    pub fn exists(dir: impl AsRef<Path>) -> bool {
        marker(dir.as_ref()).exists()
    }

    /// A new mesh with a random id, of which this node is the first member and the leader.
    pub async fn create(
        dir: impl AsRef<Path>,
        me: MemberInfo,
        transport: Arc<dyn Transport>,
        timing: Timing,
    ) -> Result<Self, LogError> {
        let dir = dir.as_ref();
        let identity = Identity { node: NodeId(1), mesh: MeshId(rand::random()) };
        let disk = open_fresh(dir)?;
        let log = Self::start(disk, Some(identity), dir, transport, timing).await?;
        let alone = BTreeMap::from([(identity.node, RaftNode { peer: me.peer.clone() })]);
        log.0.raft.initialize(alone).await.map_err(|error| LogError::Fatal(error.to_string()))?;
        let command = Command::CreateMesh { mesh: identity.mesh, member: me };
        match log.propose(command, CREATE_PATIENCE).await {
            Ok(Outcome::Joined { .. }) => {}
            Ok(other) => return Err(LogError::Fatal(format!("the new mesh answered {other:?}"))),
            Err(error) => return Err(LogError::Fatal(error.to_string())),
        }
        mark(dir, identity)?;
        tracing::info!(mesh = %identity.mesh, "created a mesh");
        Ok(log)
    }

    /// The log of a folder that is a member already.
    pub async fn open(dir: impl AsRef<Path>, transport: Arc<dyn Transport>, timing: Timing) -> Result<Self, LogError> {
        let dir = dir.as_ref();
        if !Self::exists(dir) {
            return Err(LogError::NotAMember { path: dir.into() });
        }
        let disk = Disk::open(&log_dir(dir), None)?;
        Self::start(disk, None, dir, transport, timing).await
    }

    /// The empty log of a node that a member has just admitted as `node` of `mesh`; it fills as
    /// soon as the leader has learnt of it.
    pub async fn join(
        dir: impl AsRef<Path>,
        node: NodeId,
        mesh: MeshId,
        transport: Arc<dyn Transport>,
        timing: Timing,
    ) -> Result<Self, LogError> {
        let dir = dir.as_ref();
        let identity = Identity { node, mesh };
        let disk = open_fresh(dir)?;
        let log = Self::start(disk, Some(identity), dir, transport, timing).await?;
        mark(dir, identity)?;
        tracing::info!(%node, %mesh, "joined a mesh");
        Ok(log)
    }

    async fn start(
        disk: Disk,
        fresh: Option<Identity>,
        dir: &Path,
        transport: Arc<dyn Transport>,
        timing: Timing,
    ) -> Result<Self, LogError> {
        let config = timing.config()?;
        let store = SledLog::open(disk.clone()).await?;
        if let Some(identity) = fresh {
            store.save_identity(identity).await?;
        }
        let identity = store.identity()?.ok_or_else(|| OpenError::Damaged {
            path: log_dir(dir),
            error: "it does not say which node it is".into(),
        })?;
        let (machine, state) = Machine::open(disk.clone())?;
        let courier = Courier { transport: Arc::clone(&transport), mesh: identity.mesh };
        let raft = Raft::new(identity.node, config, courier, store, machine)
            .await
            .map_err(|error| LogError::Fatal(error.to_string()))?;
        let leader = follow_leader(raft.metrics(), timing);
        Ok(Self(Arc::new(Inner {
            raft,
            disk: Mutex::new(Some(disk)),
            transport,
            identity,
            timing,
            state,
            leader,
            guests: Guests::default(),
        })))
    }

    /// Which member this node is.
    pub fn node_id(&self) -> NodeId {
        self.0.identity.node
    }

    /// Which mesh this node belongs to.
    pub fn mesh_id(&self) -> MeshId {
        self.0.identity.mesh
    }

    /// The state as far as this node has applied the log. It may lag behind the leader's.
    pub fn state(&self) -> watch::Receiver<Arc<State>> {
        self.0.state.clone()
    }

    /// The leader, if one is known. A leader that has not heard from a majority for as long as an
    /// election takes counts as none.
    pub fn leader(&self) -> watch::Receiver<Option<NodeId>> {
        self.0.leader.clone()
    }

    /// The index of the last applied entry; zero before the first.
    pub fn applied(&self) -> u64 {
        self.0.raft.metrics().borrow().last_applied.index().unwrap_or(0)
    }

    /// The current term.
    pub fn term(&self) -> u64 {
        self.0.raft.metrics().borrow().current_term
    }

    /// Whose votes count at present.
    pub fn voters(&self) -> BTreeSet<NodeId> {
        self.0.raft.metrics().borrow().membership_config.voter_ids().collect()
    }

    /// Puts a command into the log and returns what came of it, asking the leader if that is
    /// another node, through changes of leader, for at most `deadline`.
    ///
    /// A refusal is an outcome, not an error. After an error the command may still have happened:
    /// it is retried at least once, and commands are harmless when repeated.
    pub async fn propose(&self, command: Command, deadline: Duration) -> Result<Outcome, ProposeError> {
        propose::propose(&self.0, command, deadline).await
    }

    /// Answers an rpc that the peer `from` sent, whatever its bytes are.
    pub async fn handle(&self, from: crate::ids::Peer, rpc: Vec<u8>) -> Vec<u8> {
        serve::handle(&self.0, &from, &rpc).await.encode()
    }

    /// Whether `peer` is a member, as far as this node can find out: by its own copy of the state,
    /// or, if that may be behind, by asking the members it knows.
    pub async fn admits(&self, peer: &crate::ids::Peer) -> bool {
        serve::admits(&self.0, peer).await
    }

    /// Brings the consensus group in line with the members: replicates to newcomers, promotes those
    /// that caught up, replaces voters in `down` that others can replace, forgets who left. Each
    /// call makes at most a few steps; call it now and then. Does nothing on a node that does not
    /// lead.
    pub async fn reconcile(&self, down: &BTreeSet<NodeId>) -> Result<(), LogError> {
        // Newcomers, voters, leavers: one change each is all there can be before another look at
        // the world is due.
        for _ in 0..3 {
            let metrics = self.0.raft.metrics().borrow().clone();
            if metrics.state != ServerState::Leader {
                return Ok(());
            }
            let state = Arc::clone(&self.0.state.borrow());
            if state.members.is_empty() {
                return Ok(());
            }
            let members = state.members.keys().copied().collect();
            let Some(change) = Group::of(&metrics).next(&members, down) else {
                return Ok(());
            };
            tracing::info!(?change, "changing the consensus group");
            match tokio::time::timeout(CHANGE_PATIENCE, self.change(change, &state)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => {
                    tracing::warn!("the change of the consensus group is not through yet; trying again later");
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn change(&self, change: Change, state: &State) -> Result<(), LogError> {
        let changes = match change {
            Change::AddLearners(nodes) => ChangeMembers::AddNodes(
                nodes
                    .into_iter()
                    .filter_map(|node| Some((node, RaftNode { peer: state.members.get(&node)?.peer.clone() })))
                    .collect(),
            ),
            Change::SetVoters(voters) => ChangeMembers::ReplaceAllVoters(voters),
            Change::Remove(nodes) => ChangeMembers::RemoveNodes(nodes),
        };
        match self.0.raft.change_membership(changes, true).await {
            Ok(_) => Ok(()),
            Err(openraft::error::RaftError::Fatal(error)) => Err(LogError::Fatal(error.to_string())),
            // Another change is under way, or the lead was lost: the next call will see.
            Err(openraft::error::RaftError::APIError(error)) => {
                tracing::debug!(%error, "the consensus group was not changed");
                Ok(())
            }
        }
    }

    /// Stops the log and closes its files. Other handles on it are useless afterwards.
    pub async fn shutdown(self) {
        let _ = self.0.raft.shutdown().await;
        let disk = self.0.disk.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        let Some(disk) = disk else { return };
        // Replication tasks hold readers for a moment longer.
        let closed = async {
            while disk.handles() > 1 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(CLOSE_PATIENCE, closed).await.is_err() {
            tracing::warn!("the log's database is still being read");
        }
        // Closing waits for the writer thread.
        let _ = tokio::task::spawn_blocking(move || drop(disk)).await;
    }
}

/// Publishes who leads, and ends when the log does.
fn follow_leader(mut metrics: watch::Receiver<Metrics>, timing: Timing) -> watch::Receiver<Option<NodeId>> {
    let (publish, follow) = watch::channel(None);
    tokio::spawn(async move {
        loop {
            let leader = known_leader(&metrics.borrow_and_update(), timing);
            publish.send_if_modified(|published| std::mem::replace(published, leader) != leader);
            if metrics.changed().await.is_err() {
                break;
            }
        }
        publish.send_replace(None);
    });
    follow
}

fn known_leader(metrics: &Metrics, timing: Timing) -> Option<NodeId> {
    let leader = metrics.current_leader?;
    if metrics.running_state.is_err() {
        return None;
    }
    if leader != metrics.id {
        return Some(leader);
    }
    let heard = metrics.millis_since_quorum_ack.is_some_and(|age| age <= timing.election_max_ms);
    (metrics.state == ServerState::Leader && heard).then_some(leader)
}

#[cfg(test)]
mod tests;
