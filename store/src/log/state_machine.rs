//! The replicated state as openraft's state machine.
//!
//! The state lives in memory and is published after every applied batch. On disk there is the last snapshot and the log
//! after it: a restarted node loads the one and applies the other up to what it knew to be committed, so nothing but the
//! log itself is written per command.
//!
//! Invariants: the published state is exactly the state after `applied`. A snapshot on disk is whole: its record names the
//! slot of its bytes, and both become durable together.

use super::sled_log::StoreError;
use super::standing::History;
use super::types::{Entry, LogId, Payload, SnapshotMeta, StorageError, StoredMembership, TypeConfig};
use crate::cbor;
use crate::disk::{Disk, WriteBatch};
use crate::state::State;
use crate::state::apply::apply;
use crate::state::command::Outcome;
use crate::sync::lock;
use openraft::storage::RaftStateMachine;
use openraft::{OptionalSend, RaftSnapshotBuilder, Snapshot};
use serde::{Deserialize, Serialize};
use std::io::Cursor;
use std::sync::Arc;
use tokio::sync::{Mutex, watch};

/// Longest encoded state. A thousand members and ten thousand experts need a few megabytes.
pub(crate) const SNAPSHOT_BYTES_MAX: usize = 64 << 20;
const RECORD: &[u8] = b"Ms";
const RECORD_BYTES_MAX: usize = 1 << 20;

/// Where the current snapshot is and what it covers.
#[derive(Clone, Serialize, Deserialize)]
struct SnapshotRecord {
    meta: SnapshotMeta,
    slot: u64,
}

fn slot_key(slot: u64) -> Vec<u8> {
    [b"S".as_slice(), &slot.to_be_bytes()].concat()
}

/// The state machine of one node.
pub(crate) struct StateMachine {
    disk: Disk,
    saving: Arc<Mutex<()>>,
    applied: Option<LogId>,
    membership: StoredMembership,
    history: Arc<std::sync::Mutex<History>>,
    publish: watch::Sender<Arc<State>>,
}

impl StateMachine {
    /// The state machine as of the last snapshot in `disk`, and the channel on which its state is published. What it applies is noted in
    /// `history`.
    pub fn open(
        disk: Disk,
        history: Arc<std::sync::Mutex<History>>,
    ) -> Result<(Self, watch::Receiver<Arc<State>>), StoreError> {
        let mut state = State::default();
        let mut meta = SnapshotMeta::default();
        if let Some((record, bytes)) = load(&disk)? {
            state = cbor::from_slice(&bytes, SNAPSHOT_BYTES_MAX)?;
            meta = record.meta;
        }
        let (publish, follow) = watch::channel(Arc::new(state));
        let machine = Self {
            disk,
            saving: Arc::default(),
            applied: meta.last_log_id,
            membership: meta.last_membership,
            history,
            publish,
        };
        Ok((machine, follow))
    }
}

fn load(disk: &Disk) -> Result<Option<(SnapshotRecord, Vec<u8>)>, StoreError> {
    let Some(record) = disk.get(RECORD)? else {
        return Ok(None);
    };
    let record: SnapshotRecord = cbor::from_slice(&record, RECORD_BYTES_MAX)?;
    let bytes = disk.get(&slot_key(record.slot))?.ok_or(StoreError::SnapshotLost)?;
    Ok(Some((record, bytes)))
}

/// Replaces the snapshot on disk, unless a newer one is there; returns when it is durable. `saving` keeps a snapshot that
/// is being built apart from one that is being installed.
async fn save(disk: &Disk, saving: &Mutex<()>, meta: &SnapshotMeta, bytes: &[u8]) -> Result<(), StoreError> {
    let _alone = saving.lock().await;
    let old = load(disk)?.map(|(record, _)| record);
    if old.as_ref().is_some_and(|old| old.meta.last_log_id > meta.last_log_id) {
        return Ok(());
    }
    let mut batch = WriteBatch::default();
    replace(disk, &mut batch, meta, bytes)?;
    Ok(disk.write(batch).await?)
}

/// Adds to `batch` that this is the snapshot.
pub(super) fn replace(
    disk: &Disk,
    batch: &mut WriteBatch,
    meta: &SnapshotMeta,
    bytes: &[u8],
) -> Result<(), StoreError> {
    let slot = load(disk)?.map_or(0, |(old, _)| old.slot + 1);
    batch.remove_range(b"S", b"T");
    batch.put(&slot_key(slot), bytes);
    batch.put(RECORD, &cbor::to_vec(&SnapshotRecord { meta: meta.clone(), slot })?);
    Ok(())
}

/// The state after the snapshot in `disk`, and the last entry that it covers.
pub(super) fn snapshot(disk: &Disk) -> Result<(State, Option<LogId>), StoreError> {
    match load(disk)? {
        Some((record, bytes)) => Ok((cbor::from_slice(&bytes, SNAPSHOT_BYTES_MAX)?, record.meta.last_log_id)),
        None => Ok((State::default(), None)),
    }
}

/// The step of one entry.
pub(super) fn apply_entry(state: &mut State, entry: &Entry) -> Result<Outcome, StoreError> {
    let outcome = match &entry.payload {
        Payload::Normal(command) => {
            let outcome = apply(state, command, entry.origin());
            let (index, author) = (entry.log_id.index, entry.author);
            tracing::debug!(index, ?author, command = command.name(), ?outcome, "applied");
            outcome
        }
        Payload::Blank | Payload::Membership(_) => Outcome::Done,
    };
    state.applied = state.applied.then(entry.log_id.index, &cbor::to_vec(entry)?, &cbor::to_vec(&outcome)?);
    Ok(outcome)
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), StorageError> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Outcome>, StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut state = Arc::clone(&self.publish.borrow());
        let mut outcomes = Vec::new();
        for entry in entries {
            self.applied = Some(entry.log_id);
            let next = Arc::make_mut(&mut state);
            let outcome = apply_entry(next, &entry).map_err(StoreError::writing)?;
            lock(&self.history).push(next.applied);
            if let Payload::Membership(membership) = entry.payload {
                self.membership = StoredMembership::new(Some(entry.log_id), membership);
            }
            outcomes.push(outcome);
        }
        self.publish.send_replace(state);
        Ok(outcomes)
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder {
            disk: self.disk.clone(),
            saving: Arc::clone(&self.saving),
            applied: self.applied,
            membership: self.membership.clone(),
            state: Arc::clone(&self.publish.borrow()),
        }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, StorageError> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError> {
        let bytes = snapshot.into_inner();
        let install = async {
            let state: State = cbor::from_slice(&bytes, SNAPSHOT_BYTES_MAX)?;
            save(&self.disk, &self.saving, meta, &bytes).await?;
            Ok(state)
        };
        let state = install.await.map_err(StoreError::writing)?;
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        lock(&self.history).push(state.applied);
        self.publish.send_replace(Arc::new(state));
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<TypeConfig>>, StorageError> {
        let loaded = load(&self.disk).map_err(StoreError::reading)?;
        Ok(loaded.map(|(record, bytes)| Snapshot { meta: record.meta, snapshot: Box::new(Cursor::new(bytes)) }))
    }
}

/// A state that is being written as a snapshot.
pub(crate) struct SnapshotBuilder {
    disk: Disk,
    saving: Arc<Mutex<()>>,
    applied: Option<LogId>,
    membership: StoredMembership,
    state: Arc<State>,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>, StorageError> {
        let applied = self.applied.map_or_else(|| "none".into(), |log_id| log_id.to_string());
        let meta = SnapshotMeta {
            last_log_id: self.applied,
            last_membership: self.membership.clone(),
            // Equal logs give equal bytes, so what a snapshot covers names it.
            snapshot_id: applied,
        };
        let build = async {
            let bytes = cbor::to_vec(&*self.state)?;
            save(&self.disk, &self.saving, &meta, &bytes).await?;
            Ok(bytes)
        };
        let bytes = build.await.map_err(StoreError::writing)?;
        Ok(Snapshot { meta, snapshot: Box::new(Cursor::new(bytes)) })
    }
}
