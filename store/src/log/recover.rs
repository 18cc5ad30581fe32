//! A mesh that has lost the majority of its voters goes on from what one member has.
//!
//! Owns [`Recovery`]. No vote can decide this: it is a person's word. The survivor becomes the only voter of a new mesh, under a
//! new id, so that no member of the former mesh is heard any more: two halves of a mesh that were both recovered stay two
//! meshes. The survivor's whole log counts, entries included that it never knew to be committed: one of them may
//! have been acknowledged.
//!
//! Invariant: the folder holds the former mesh or the new one, whole, after a crash at any point.

use super::error::LogError;
use super::folder::{close, io_error, kept_log, log_dir, mark, open_member};
use super::sled_log::{Identity, SledLog, StoreError};
use super::state_machine::{apply_entry, replace, snapshot};
use super::types::{LogId, Membership, RaftNode, SnapshotMeta, StoredMembership, Vote};
use crate::cbor;
use crate::disk::{Disk, WriteBatch, sync_folder};
use crate::ids::{MeshId, NodeId};
use crate::state::State;
use openraft::CommittedLeaderId;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A member's log, opened to begin a new mesh from it. The node must not run.
pub struct Recovery {
    dir: PathBuf,
    disk: Disk,
    survivor: Survivor,
}

/// What a member's log has to go on from.
pub(crate) struct Survivor {
    identity: Identity,
    state: State,
    term: u64,
    index: u64,
}

impl Survivor {
    /// Reads the log in `disk`; `None` if it does not list this node as a member.
    pub fn of(disk: &Disk, log: &SledLog, identity: Identity) -> Result<Option<Self>, StoreError> {
        let (mut state, covered) = snapshot(disk)?;
        for entry in log.all_entries()? {
            if Some(entry.log_id) > covered {
                apply_entry(&mut state, &entry)?;
            }
        }
        let (vote, last) = log.end()?;
        let last = last.max(covered);
        let voted = vote.map_or(0, |vote| vote.leader_id.term);
        let term = voted.max(last.map_or(0, |last| last.leader_id.term));
        let index = last.map_or(0, |last| last.index);
        Ok(state.members.contains_key(&identity.node).then_some(Self { identity, state, term, index }))
    }

    /// Makes the log in `disk` that of the only voter of the new `mesh`.
    pub async fn begin(self, disk: &Disk, log: &SledLog, mesh: MeshId) -> Result<Identity, StoreError> {
        let Self { identity, state, term, index } = self;
        let mut next = state.recovered(identity.node, mesh).expect("a survivor is a member");
        let at = LogId::new(CommittedLeaderId::new(term + 1, identity.node), index + 1);
        next.applied = next.applied.then(at.index, &mesh.0, &[]);
        let identity = Identity { mesh, ..identity };
        let mut batch = WriteBatch::default();
        let bytes = cbor::to_vec(&next)?;
        replace(disk, &mut batch, &snapshot_meta(at, &next), &bytes)?;
        log.restart(&mut batch, identity, Vote::new(term + 2, identity.node), at)?;
        disk.write(batch).await?;
        Ok(identity)
    }
}

impl Recovery {
    /// Reads the log in the data folder `dir`. Changes nothing.
    ///
    /// # Errors
    /// [`LogError`]: where the folder belongs to no mesh, is in use, cannot be read, or has nothing to go on from.
    pub async fn open(dir: &Path) -> Result<Self, LogError> {
        let (disk, log, identity) = open_member(dir).await?;
        let survivor = Survivor::of(&disk, &log, identity)?;
        let survivor = survivor.ok_or_else(|| LogError::NothingToRecover { path: dir.into() })?;
        Ok(Self { dir: dir.into(), disk, survivor })
    }

    /// This node's id.
    pub fn node(&self) -> NodeId {
        self.survivor.identity.node
    }

    /// What this node knows of the mesh that is to be recovered.
    pub fn state(&self) -> &State {
        &self.survivor.state
    }

    /// Keeps a copy of the former log beside it, and makes the folder that of the only voter of a new mesh, whose id it returns.
    ///
    /// # Errors
    /// [`LogError`]; the folder holds the former mesh or the new one then, whole.
    pub async fn commit(self) -> Result<MeshId, LogError> {
        let Self { dir, disk, survivor } = self;
        let mesh = MeshId(rand::random());
        close(disk).await;
        keep_copy(&dir, survivor.state.mesh)?;
        let (disk, log, _) = open_member(&dir).await?;
        let identity = survivor.begin(&disk, &log, mesh).await?;
        mark(&dir, identity)?;
        drop(log);
        close(disk).await;
        tracing::info!(%mesh, node = %identity.node, "recovered");
        Ok(mesh)
    }
}

/// A snapshot that ends at `at`, of a mesh whose members all vote.
fn snapshot_meta(at: LogId, state: &State) -> SnapshotMeta {
    let voters: BTreeSet<NodeId> = state.members.keys().copied().collect();
    let nodes = state.members.iter().map(|(node, member)| (*node, RaftNode { peer: member.peer.clone() }));
    let membership = Membership::new(vec![voters], nodes.collect::<BTreeMap<_, _>>());
    SnapshotMeta {
        last_log_id: Some(at),
        last_membership: StoredMembership::new(Some(at), membership),
        snapshot_id: at.to_string(),
    }
}

/// Copies the log in the data folder `dir`, which is that of `mesh`. The copy is whole, and on the disk, when it has its name.
fn keep_copy(dir: &Path, mesh: MeshId) -> Result<(), LogError> {
    let kept = kept_log(dir, mesh);
    let partial = kept.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(io_error(&partial))?;
    }
    copy_folder(&log_dir(dir), &partial)?;
    fs::rename(&partial, &kept).map_err(io_error(&kept))?;
    sync_folder(dir).map_err(io_error(dir))
}

/// Copies the files of a folder, and of those in it, to the disk.
fn copy_folder(from: &Path, to: &Path) -> Result<(), LogError> {
    fs::create_dir_all(to).map_err(io_error(to))?;
    for entry in fs::read_dir(from).map_err(io_error(from))? {
        let entry = entry.map_err(io_error(from))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if source.is_dir() {
            copy_folder(&source, &target)?;
        } else {
            fs::copy(&source, &target).map_err(io_error(&source))?;
            fs::File::open(&target).and_then(|file| file.sync_all()).map_err(io_error(&target))?;
        }
    }
    sync_folder(to).map_err(io_error(to))
}
