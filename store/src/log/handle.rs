//! The handle on this node's log: opening, proposing, following, closing.
//!
//! Futures are boxed. An async function is compiled in the crate that awaits it, and with it all of the consensus library that
//! it reaches.

use super::admission;
use super::admission_cache::AdmissionCache;
use super::elections::{self, Elections};
use super::error::LogError;
use super::folder::{self, close, mark, open_fresh, open_member};
use super::local::LocalMember;
use super::network::{RaftNetwork, Transport, call};
use super::propose::{self, ProposeError};
use super::recall::{self, Recollection};
use super::rpc::RpcRequest;
use super::serve;
use super::sled_log::{Identity, SledLog};
use super::standing::{Progress, Standing};
use super::state_machine::StateMachine;
use super::timing::Timing;
use super::types::{Metrics, RaftNode};
use super::voters::{Change, Group, Presence, majority};
use crate::disk::{Disk, FullDisk, WhenFull};
use crate::ids::{MeshId, NodeId, Peer};
use crate::runtime;
use crate::state::command::{Command, Outcome};
use crate::state::{MemberInfo, State};
use crate::sync::lock;
use futures::FutureExt;
use futures::future::BoxFuture;
use openraft::{ChangeMembers, LogIdOptionExt, Raft, ServerState};
use rand::Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;

/// How long one change of the consensus group may take before the next attempt takes over.
const CHANGE_PATIENCE: Duration = Duration::from_secs(10);
/// How long a member may take to answer before it is promoted.
const ANSWER_PATIENCE: Duration = Duration::from_secs(1);
/// How long the creator of a mesh waits until it leads. It is alone, so only a stalled disk takes this long.
const CREATE_PATIENCE: Duration = Duration::from_secs(60);
/// How long a shutdown waits for the last reader of the database.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// A handle on this node's log; cloning it is cheap.
#[derive(Clone)]
pub struct Log(Arc<LocalMember>);

impl Log {
    /// Whether the data folder `dir` belongs to a mesh.
    pub fn exists(dir: impl AsRef<Path>) -> bool {
        folder::exists(dir.as_ref())
    }

    /// Creates a mesh with a random id; this node is its first member and its leader.
    pub fn create(
        dir: impl AsRef<Path>,
        me: MemberInfo,
        transport: Arc<dyn Transport>,
        timing: Timing,
    ) -> BoxFuture<'static, Result<Self, LogError>> {
        Self::create_in(dir.as_ref().to_owned(), me, transport, timing).boxed()
    }

    async fn create_in(
        dir: PathBuf,
        me: MemberInfo,
        transport: Arc<dyn Transport>,
        timing: Timing,
    ) -> Result<Self, LogError> {
        let log = Self::create_on(open_fresh(&dir)?, me, transport, timing).await?;
        mark(&dir, log.0.identity)?;
        tracing::info!(mesh = %log.mesh_id(), "created a mesh");
        Ok(log)
    }

    /// Creates a mesh whose first log is that in `disk`, which is empty.
    pub(crate) async fn create_on(
        disk: Disk,
        me: MemberInfo,
        transport: Arc<dyn Transport>,
        timing: Timing,
    ) -> Result<Self, LogError> {
        let identity = Identity { node: NodeId(1), mesh: MeshId(runtime::rng().random()) };
        let log = Self::start_fresh(disk, identity, transport, timing).await?;
        let alone = BTreeMap::from([(identity.node, RaftNode { peer: me.peer.clone() })]);
        log.0.raft.initialize(alone).await.map_err(|error| LogError::Fatal(error.to_string()))?;
        let command = Command::CreateMesh { mesh: identity.mesh, member: me };
        match log.propose(command, CREATE_PATIENCE).await {
            Ok(Outcome::Joined { .. }) => Ok(log),
            Ok(other) => Err(LogError::Fatal(format!("the new mesh answered {other:?}"))),
            Err(error) => Err(LogError::Fatal(error.to_string())),
        }
    }

    /// Opens the log of a folder that belongs to a member already.
    pub fn open(
        dir: impl AsRef<Path>,
        transport: Arc<dyn Transport>,
        timing: Timing,
    ) -> BoxFuture<'static, Result<Self, LogError>> {
        Self::open_in(dir.as_ref().to_owned(), transport, timing).boxed()
    }

    async fn open_in(dir: PathBuf, transport: Arc<dyn Transport>, timing: Timing) -> Result<Self, LogError> {
        let (disk, log, identity) = open_member(&dir).await?;
        Self::start(disk, log, identity, false, transport, timing).await
    }

    /// The node, and the mesh, that the data folder `dir` belongs to.
    ///
    /// # Errors
    /// [`LogError`]: where it belongs to none, is in use, is damaged, or cannot be read.
    pub fn membership(dir: impl AsRef<Path>) -> BoxFuture<'static, Result<(NodeId, MeshId), LogError>> {
        let dir = dir.as_ref().to_owned();
        async move {
            let (disk, log, identity) = open_member(&dir).await?;
            drop(log);
            close(disk).await;
            Ok((identity.node, identity.mesh))
        }
        .boxed()
    }

    /// Makes the data folder `dir` one that belongs to no mesh, and keeps its log, damaged or not, under another name, which is
    /// returned.
    ///
    /// # Errors
    /// [`LogError`]; the log is at one of the two places then, as it was.
    pub fn set_aside(dir: impl AsRef<Path>) -> BoxFuture<'static, Result<PathBuf, LogError>> {
        let dir = dir.as_ref().to_owned();
        async move { folder::set_aside(&dir).await }.boxed()
    }

    /// Creates the empty log of a node that a member has just admitted as `node` of `mesh`. It fills as soon as the
    /// leader knows the node.
    pub fn join(
        dir: impl AsRef<Path>,
        node: NodeId,
        mesh: MeshId,
        transport: Arc<dyn Transport>,
        timing: Timing,
    ) -> BoxFuture<'static, Result<Self, LogError>> {
        Self::join_in(dir.as_ref().to_owned(), node, mesh, transport, timing).boxed()
    }

    async fn join_in(
        dir: PathBuf,
        node: NodeId,
        mesh: MeshId,
        transport: Arc<dyn Transport>,
        timing: Timing,
    ) -> Result<Self, LogError> {
        let dir = &dir;
        let identity = Identity { node, mesh };
        let disk = open_fresh(dir)?;
        let log = Self::start_fresh(disk, identity, transport, timing).await?;
        mark(dir, identity)?;
        tracing::info!(%node, %mesh, "joined a mesh");
        Ok(log)
    }

    /// The log that [`open_fresh`] prepared, as that of `identity`.
    pub(crate) async fn start_fresh(
        disk: Disk,
        identity: Identity,
        transport: Arc<dyn Transport>,
        timing: Timing,
    ) -> Result<Self, LogError> {
        let log = SledLog::open(disk.clone()).await?;
        log.save_identity(identity).await?;
        Self::start(disk, log, identity, true, transport, timing).await
    }

    pub(crate) async fn start(
        disk: Disk,
        mut store: SledLog,
        identity: Identity,
        fresh: bool,
        transport: Arc<dyn Transport>,
        timing: Timing,
    ) -> Result<Self, LogError> {
        let config = timing.config()?;
        store.resign().await?;
        let history = Arc::default();
        let (machine, state) = StateMachine::open(disk.clone(), Arc::clone(&history))?;
        let recollection = Recollection::new(store.clone(), fresh, history)?;
        // The consensus library stops for good where a write fails.
        disk.when_full(WhenFull::Wait);
        let full = disk.full();
        let network = RaftNetwork { transport: Arc::clone(&transport), mesh: identity.mesh };
        let raft = Raft::new(identity.node, config, network, store, machine)
            .await
            .map_err(|error| LogError::Fatal(error.to_string()))?;
        let leader = follow_leader(raft.metrics(), full.clone(), timing);
        let voters = follow_voters(raft.metrics());
        let elections = Arc::new(Elections::new(timing));
        let local = Arc::new(LocalMember {
            raft,
            disk: Mutex::new(Some(disk)),
            transport,
            identity,
            timing,
            state,
            leader,
            voters,
            up: Mutex::default(),
            admissions: AdmissionCache::default(),
            elections: Arc::clone(&elections),
            recollection,
            full,
        });
        runtime::spawn(recall::remember(Arc::downgrade(&local)));
        if !fresh {
            runtime::spawn(recall::drive(Arc::downgrade(&local)));
        }
        runtime::spawn(elections::drive(Arc::downgrade(&local), elections));
        Ok(Self(local))
    }

    /// This node's id in the log.
    pub fn node_id(&self) -> NodeId {
        self.0.identity.node
    }

    /// The mesh that this node belongs to.
    pub fn mesh_id(&self) -> MeshId {
        self.0.identity.mesh
    }

    /// The state up to the last entry that this node has applied. It may lag behind the leader's.
    pub fn state(&self) -> watch::Receiver<Arc<State>> {
        self.0.state.clone()
    }

    /// The leader, if one is known. This node itself counts as the leader only while a majority has answered it within
    /// the time of an election.
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

    /// Whether this node's log is what it was, as far as the others remember.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.0.recollection.standing()
    }

    /// The members whose logs have parted from this node's, each with the index of an entry up to which they differ.
    pub fn parted(&self) -> watch::Receiver<BTreeMap<NodeId, u64>> {
        self.0.recollection.parted()
    }

    /// Why this node's log takes no writes for now. It goes on by itself once there is room.
    pub fn full_disk(&self) -> Option<FullDisk> {
        self.0.full_disk()
    }

    /// How far this node's log has got, for the others to remember.
    pub fn progress(&self) -> Progress {
        self.0.recollection.progress(&self.0)
    }

    /// Takes note of how far the log of the member `node` has got, as it says.
    pub fn heard(&self, node: NodeId, progress: Progress) {
        self.0.recollection.heard(&self.0, node, progress);
    }

    /// Says that the process of `node` is gone. If it leads, another leader is elected at once instead of after a silence.
    pub fn suspect(&self, node: NodeId) {
        let leader = self.0.raft.metrics().borrow().current_leader;
        if leader == Some(node) && node != self.node_id() {
            self.0.elections.leader_suspected(&self.0);
        }
    }

    /// Waits until this node's vote does not count any more, after it has left or was readmitted. A voter that stops before could take
    /// the quorum with it.
    pub fn vote_passed_on(&self) -> BoxFuture<'_, ()> {
        recall::vote_passed_on(&self.0).boxed()
    }

    /// The members whose votes count; those of before and after, while a change of voters is not agreed on.
    pub fn voters(&self) -> watch::Receiver<BTreeSet<NodeId>> {
        self.0.voters.clone()
    }

    /// Puts a command of this node's into the log and returns its outcome. Forwards it where another node leads, and
    /// tries again through changes of leader, for at most `deadline`.
    ///
    /// # Errors
    /// [`ProposeError`]. A refusal is an outcome, not an error. After an error the command may still happen; commands are
    /// harmless when repeated.
    pub fn propose(&self, command: Command, deadline: Duration) -> BoxFuture<'_, Result<Outcome, ProposeError>> {
        propose::propose(&self.0, command, deadline).boxed()
    }

    /// Answers an rpc, whatever its bytes are. `from` is the identity that the sender has proved on its connection: it
    /// becomes the author of what it proposes.
    pub fn handle(&self, from: Peer, rpc: Vec<u8>) -> BoxFuture<'_, Vec<u8>> {
        async move { serve::handle(&self.0, &from, &rpc).await.encode() }.boxed()
    }

    /// Whether `peer` is a member, as far as this node can find out: by its own copy of the state or, since that may be
    /// behind, by the word of a member it knows.
    pub fn admits<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, bool> {
        admission::admits(&self.0, peer).boxed()
    }

    /// Brings the consensus group in line with the members: replicates to newcomers, promotes learners that are steady and
    /// have caught up, replaces lost voters where others can take over, removes nodes that left. A call makes at most a few
    /// steps; call it now and then. It does nothing on a node that does not lead.
    ///
    /// # Errors
    /// [`LogError::Fatal`] if the log has stopped.
    pub fn reconcile(&self, presence: Presence) -> BoxFuture<'_, Result<(), LogError>> {
        self.reconcile_group(presence).boxed()
    }

    async fn reconcile_group(&self, mut presence: Presence) -> Result<(), LogError> {
        lock(&self.0.up).clone_from(&presence.up);
        presence.up.insert(self.node_id());
        presence.steady.insert(self.node_id());
        // Newcomers, voters, leavers: after one change of each kind another look at the world is due.
        for _ in 0..3 {
            let metrics = self.0.raft.metrics().borrow().clone();
            if metrics.state != ServerState::Leader || self.0.full_disk().is_some() {
                return Ok(());
            }
            let state = Arc::clone(&self.0.state.borrow());
            if state.members.is_empty() {
                return Ok(());
            }
            let members = state.members.keys().copied().collect();
            let Some(change) = Group::of(&metrics).next(&members, &presence) else {
                return Ok(());
            };
            if let Change::SetVoters(target) = &change
                && let Some(silent) = self.silent(target, &state).await
            {
                tracing::info!(node = %silent, "a member that is to vote does not answer; the voters stay as they are for now");
                return Ok(());
            }
            tracing::info!(?change, "changing the consensus group");
            match runtime::timeout(CHANGE_PATIENCE, self.change(change, &state)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => {
                    tracing::warn!("the change of the consensus group takes long; trying again later");
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Why these voters must not be chosen at this very moment: one of them that would be promoted does not answer, or no majority
    /// of them does. A change of voters counts on them from its first moment on, so the group would be stuck if they had died
    /// since they were last seen.
    async fn silent(&self, target: &BTreeSet<NodeId>, state: &State) -> Option<NodeId> {
        let voting = self.0.voters.borrow().clone();
        let others = target.iter().filter(|node| **node != self.node_id());
        let asked = others.map(|&node| async move {
            let peer = state.members.get(&node)?.peer.clone();
            let question = RpcRequest::Knows(peer.clone());
            let asked = call(&*self.0.transport, self.0.identity.mesh, node, peer, question);
            // Any answer will do.
            let answered = runtime::timeout(ANSWER_PATIENCE, asked).await;
            (!matches!(answered, Ok(Ok(_)))).then_some(node)
        });
        let silent: Vec<NodeId> = futures::future::join_all(asked).await.into_iter().flatten().collect();
        let is_minority = target.len() - silent.len() < majority(target.len());
        silent.into_iter().find(|node| is_minority || !voting.contains(node))
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
            // Another change is under way, or this node leads no more; the next call starts over.
            Err(openraft::error::RaftError::APIError(error)) => {
                tracing::debug!(%error, "the consensus group was not changed");
                Ok(())
            }
        }
    }

    /// Stops the log and closes its files; returns when they are free for another process. Other handles on this log are
    /// useless afterwards.
    pub fn shutdown(self) -> BoxFuture<'static, ()> {
        self.stop().boxed()
    }

    async fn stop(self) {
        if let Some(disk) = &*lock(&self.0.disk) {
            disk.when_full(WhenFull::Refuse);
        }
        // An error means that the log has stopped already.
        let _ = self.0.raft.shutdown().await;
        self.0.recollection.close();
        let Some(disk) = lock(&self.0.disk).take() else { return };
        // Closing waits for the writer thread. Replication tasks may hold handles for a moment longer.
        let closed = async {
            if let Ok(closed) = tokio::task::spawn_blocking(move || disk.closed()).await {
                closed.await;
            }
        };
        if runtime::timeout(CLOSE_PATIENCE, closed).await.is_err() {
            tracing::warn!("the log's database is still being read");
        }
    }
}

/// Publishes the leader, until the log stops. A node whose log waits for room leads no more, whatever it last heard.
fn follow_leader(
    mut metrics: watch::Receiver<Metrics>,
    mut full: watch::Receiver<Option<FullDisk>>,
    timing: Timing,
) -> watch::Receiver<Option<NodeId>> {
    let (publish, follow) = watch::channel(None);
    runtime::spawn(async move {
        loop {
            let is_full = full.borrow_and_update().is_some();
            let leader = {
                let metrics = metrics.borrow_and_update();
                known_leader(&metrics, timing).filter(|leader| !is_full || *leader != metrics.id)
            };
            publish.send_if_modified(|published| std::mem::replace(published, leader) != leader);
            let changed = tokio::select! {
                biased;
                changed = metrics.changed() => changed,
                changed = full.changed() => changed,
            };
            if changed.is_err() {
                break;
            }
        }
        publish.send_replace(None);
    });
    follow
}

/// Publishes the voters, until the log stops.
fn follow_voters(mut metrics: watch::Receiver<Metrics>) -> watch::Receiver<BTreeSet<NodeId>> {
    let voters = |metrics: &Metrics| metrics.membership_config.voter_ids().collect::<BTreeSet<_>>();
    let (publish, follow) = watch::channel(voters(&metrics.borrow()));
    runtime::spawn(async move {
        while metrics.changed().await.is_ok() {
            let (mut now, is_agreed) = {
                let metrics = metrics.borrow_and_update();
                (voters(&metrics), *metrics.membership_config.log_id() <= metrics.last_applied)
            };
            publish.send_if_modified(|published| {
                if !is_agreed {
                    now.extend(published.iter());
                }
                let is_new = *published != now;
                *published = now;
                is_new
            });
        }
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
