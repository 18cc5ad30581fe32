//! The Raft log and vote on disk: openraft's `RaftLogStorage` over [`Disk`].
//!
//! Keys: `L` and the index (8 bytes, big-endian) for entries; `Mv` the vote, `Mc` the committed and `Mp` the last purged
//! log id, `Mi` this node's identity, `Mo` how far the other members had got. All writes go through the disk's one writer, in order. A vote is returned, and an
//! append called back, only when it is durable.
//!
//! Invariant: the stored indices have no hole, and the last entry is whole (checked when a member's log is opened).

use super::standing::Mark;
use super::types::{Entry, LogId, StorageError, StorageIOError, TypeConfig, Vote};
use crate::cbor;
use crate::disk::{Disk, DiskError, WriteBatch};
use crate::ids::{MeshId, NodeId};
use crate::sync::lock;
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{AnyError, LogIdOptionExt, LogState, OptionalSend, RaftLogReader};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex};

/// Longest encoded entry. A placement of 6,144 experts on two nodes each has about 0.5 MB.
pub(crate) const ENTRY_BYTES_MAX: usize = 4 << 20;
/// Replication reads stop after this many bytes, so that a frame stays below its limit.
const READ_BYTES_MAX: usize = 2 << 20;
/// Vote, log ids, identity: all far below this.
const META_BYTES_MAX: usize = 4096;

const VOTE: &[u8] = b"Mv";
const COMMITTED: &[u8] = b"Mc";
const PURGED: &[u8] = b"Mp";
const IDENTITY: &[u8] = b"Mi";
const OTHERS: &[u8] = b"Mo";
/// As many members as there can be, some twenty bytes each.
const OTHERS_BYTES_MAX: usize = 64 << 10;

/// The member, and its mesh, that a folder belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub node: NodeId,
    pub mesh: MeshId,
}

fn entry_key(index: u64) -> Vec<u8> {
    [b"L".as_slice(), &index.to_be_bytes()].concat()
}

fn index_of(key: &[u8]) -> Option<u64> {
    key.strip_prefix(b"L")?.try_into().ok().map(u64::from_be_bytes)
}

/// The first key after every entry.
const ENTRIES_END: &[u8] = b"M";

/// What the disk gave back is not what was written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Cbor(#[from] cbor::CborError),
    #[error("entry {0} of the log is missing")]
    Hole(u64),
    #[error("the snapshot's bytes are missing")]
    SnapshotLost,
}

impl StoreError {
    pub fn reading(self) -> StorageError {
        StorageIOError::read(AnyError::new(&self)).into()
    }

    pub fn writing(self) -> StorageError {
        StorageIOError::write(AnyError::new(&self)).into()
    }
}

/// The log of one node.
#[derive(Clone)]
pub(crate) struct SledLog {
    disk: Disk,
    /// What is on the disk for good: it may be less than what can be read.
    durable: Arc<Mutex<Mark>>,
}

impl SledLog {
    /// Opens the log in `disk`. An entry whose end never reached the disk was never acknowledged, and is dropped here.
    pub async fn open(disk: Disk) -> Result<Self, StoreError> {
        let log = Self { disk, durable: Arc::default() };
        let mut torn = Vec::new();
        for key in log.disk.keys(&entry_key(0), ENTRIES_END).rev() {
            let key = key?;
            if log.disk.get(&key)?.is_some() {
                break;
            }
            torn.push(key);
        }
        if let Some(first) = torn.last() {
            tracing::warn!(entries = torn.len(), "dropping unacknowledged entries at the end of the log");
            let mut batch = WriteBatch::default();
            batch.remove_range(first, ENTRIES_END);
            log.disk.write(batch).await?;
        }
        let (vote, last) = log.end()?;
        let term = vote.map_or(0, |vote| vote.leader_id.term);
        *lock(&log.durable) = Mark { term, index: last.index().unwrap_or(0) };
        Ok(log)
    }

    /// How far the other members had got, as far as this node remembers.
    pub fn others(&self) -> Result<BTreeMap<NodeId, Mark>, StoreError> {
        let bytes = self.disk.get(OTHERS)?;
        Ok(bytes.map(|bytes| cbor::from_slice(&bytes, OTHERS_BYTES_MAX)).transpose()?.unwrap_or_default())
    }

    /// Remembers how far the other members had got. Nobody waits for it to be on the disk.
    pub async fn save_others(&self, others: &BTreeMap<NodeId, Mark>) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        batch.put(OTHERS, &cbor::to_vec(others)?);
        Ok(self.disk.write_then(batch, Box::new(|_| ())).await?)
    }

    /// Gives up the leadership that a node may have had when it ended. The consensus library would take it up again in the same term,
    /// asking nobody.
    pub async fn resign(&mut self) -> Result<(), StoreError> {
        let Some(mut vote) = self.meta::<Vote>(VOTE)?.filter(|vote| vote.committed) else { return Ok(()) };
        if self.identity()?.is_some_and(|own| own.node == vote.leader_id.node_id) {
            vote.committed = false;
            self.put_vote(&vote).await?;
        }
        Ok(())
    }

    async fn put_vote(&self, vote: &Vote) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        batch.put(VOTE, &cbor::to_vec(vote)?);
        self.disk.write(batch).await?;
        lock(&self.durable).term = vote.leader_id.term;
        Ok(())
    }

    /// How far this node's log has got on the disk, as that changes.
    pub fn durable(&self) -> Arc<Mutex<Mark>> {
        Arc::clone(&self.durable)
    }

    /// The identity of this folder, once it has one.
    pub fn identity(&self) -> Result<Option<Identity>, StoreError> {
        self.meta(IDENTITY)
    }

    pub async fn save_identity(&self, identity: Identity) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        batch.put(IDENTITY, &cbor::to_vec(&identity)?);
        Ok(self.disk.write(batch).await?)
    }

    /// Reads every entry.
    ///
    /// # Errors
    /// [`StoreError`], where one is missing or cannot be decoded.
    pub fn check(&self) -> Result<(), StoreError> {
        let mut next = None;
        for key in self.disk.keys(&entry_key(0), ENTRIES_END) {
            let Some(index) = index_of(&key?) else { continue };
            if let Some(missing) = next.filter(|next| *next != index) {
                return Err(StoreError::Hole(missing));
            }
            self.entry(index)?;
            next = index.checked_add(1);
        }
        Ok(())
    }

    /// Every entry, in order.
    pub fn all_entries(&self) -> Result<Vec<Entry>, StoreError> {
        self.entries(0, u64::MAX, usize::MAX)
    }

    /// The last log id in an open database.
    pub fn last_in(disk: Disk) -> Result<Option<LogId>, StoreError> {
        Ok(Self { disk, durable: Arc::default() }.log_state()?.last_log_id)
    }

    /// The stored vote and the last log id, which is that of a snapshot where there is no entry.
    pub fn end(&self) -> Result<(Option<Vote>, Option<LogId>), StoreError> {
        Ok((self.meta(VOTE)?, self.log_state()?.last_log_id))
    }

    /// Adds to `batch` that this log belongs to `identity` and begins after `at`, where a snapshot ends.
    pub fn restart(&self, batch: &mut WriteBatch, identity: Identity, vote: Vote, at: LogId) -> Result<(), StoreError> {
        batch.remove_range(&entry_key(0), ENTRIES_END);
        batch.put(IDENTITY, &cbor::to_vec(&identity)?);
        batch.put(VOTE, &cbor::to_vec(&vote)?);
        batch.put(COMMITTED, &cbor::to_vec(&at)?);
        batch.put(PURGED, &cbor::to_vec(&at)?);
        Ok(())
    }

    fn meta<T: DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, StoreError> {
        let bytes = self.disk.get(key)?;
        Ok(bytes.map(|bytes| cbor::from_slice(&bytes, META_BYTES_MAX)).transpose()?)
    }

    fn entry(&self, index: u64) -> Result<(Entry, usize), StoreError> {
        let bytes = self.disk.get(&entry_key(index))?.ok_or(StoreError::Hole(index))?;
        Ok((cbor::from_slice(&bytes, bytes.len())?, bytes.len()))
    }

    /// The stored entries with `start <= index < end`, up to about `bytes_max` bytes of them, but at
    /// least one if there is one.
    fn entries(&self, start: u64, end: u64, bytes_max: usize) -> Result<Vec<Entry>, StoreError> {
        let mut entries = Vec::new();
        let mut total = 0;
        for key in self.disk.keys(&entry_key(start), &entry_key(end)) {
            let Some(index) = index_of(&key?) else { continue };
            let (entry, bytes) = self.entry(index)?;
            total += bytes;
            if total > bytes_max && !entries.is_empty() {
                break;
            }
            entries.push(entry);
        }
        Ok(entries)
    }

    fn last_log_id(&self) -> Result<Option<LogId>, StoreError> {
        let Some(key) = self.disk.keys(&entry_key(0), ENTRIES_END).next_back() else {
            return Ok(None);
        };
        let Some(index) = index_of(&key?) else {
            return Ok(None);
        };
        Ok(Some(self.entry(index)?.0.log_id))
    }

    fn log_state(&self) -> Result<LogState<TypeConfig>, StoreError> {
        let last_purged_log_id = self.meta(PURGED)?;
        let last_log_id = self.last_log_id()?.or(last_purged_log_id);
        Ok(LogState { last_purged_log_id, last_log_id })
    }
}

impl RaftLogReader<TypeConfig> for SledLog {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError> {
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        if start >= end {
            return Ok(Vec::new());
        }
        self.entries(start, end, usize::MAX).map_err(StoreError::reading)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, StorageError> {
        self.entries(start, end, READ_BYTES_MAX).map_err(StoreError::reading)
    }
}

impl RaftLogStorage<TypeConfig> for SledLog {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError> {
        self.log_state().map_err(StoreError::reading)
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), StorageError> {
        self.put_vote(vote).await.map_err(StoreError::writing)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError> {
        self.meta(VOTE).map_err(StoreError::reading)
    }

    // The committed id only spares a restarted node the wait for a leader, so nobody waits for its fdatasync.
    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), StorageError> {
        let save = async {
            let mut batch = WriteBatch::default();
            match committed {
                Some(log_id) => batch.put(COMMITTED, &cbor::to_vec(&log_id)?),
                None => batch.remove_range(COMMITTED, &[COMMITTED, &[0xff]].concat()),
            }
            Ok(self.disk.write_then(batch, Box::new(|_| ())).await?)
        };
        save.await.map_err(StoreError::writing)
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, StorageError> {
        self.meta(COMMITTED).map_err(StoreError::reading)
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut batch = WriteBatch::default();
        let mut last = 0;
        for entry in entries {
            last = entry.log_id.index;
            let bytes = cbor::to_vec(&entry).map_err(|error| StoreError::from(error).writing())?;
            batch.put(&entry_key(entry.log_id.index), &bytes);
        }
        let mark = Arc::clone(&self.durable);
        let durable = Box::new(move |result: Result<(), DiskError>| {
            if result.is_ok() {
                let mut mark = lock(&mark);
                mark.index = mark.index.max(last);
            }
            callback.log_io_completed(result.map_err(std::io::Error::other));
        });
        self.disk.write_then(batch, durable).await.map_err(|error| StoreError::from(error).writing())
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError> {
        let truncate = async {
            let mut batch = WriteBatch::default();
            batch.remove_range(&entry_key(log_id.index), ENTRIES_END);
            {
                let mut mark = lock(&self.durable);
                mark.index = mark.index.min(log_id.index.saturating_sub(1));
            }
            Ok(self.disk.write(batch).await?)
        };
        truncate.await.map_err(StoreError::writing)
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError> {
        let purge = async {
            let mut batch = WriteBatch::default();
            batch.put(PURGED, &cbor::to_vec(&log_id)?);
            let end = entry_key(log_id.index.saturating_add(1));
            batch.remove_range(&entry_key(0), &end);
            self.disk.write(batch).await?;
            let mut mark = lock(&self.durable);
            mark.index = mark.index.max(log_id.index);
            Ok(())
        };
        purge.await.map_err(StoreError::writing)
    }
}
