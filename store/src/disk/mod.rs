//! Databases whose writes survive a power cut: a value by key, written in batches.
//!
//! [`Disk`] is the handle. Behind it is a [`Database`]: sled in a folder ([`sled_database`]), or one of a simulation
//! ([`simulated`]). [`files`] holds the same care for plain files.
//!
//! Invariants of every database: what was acknowledged as durable is there after a power cut; writes become durable in the
//! order in which they were queued, and each batch whole or not at all. The module does not know what the values mean.

mod damage;
mod files;
mod mark;
mod room;
pub(crate) mod simulated;
mod sled_database;

pub(crate) use files::{Renames, sync_folder};
pub use files::{replace_file, replace_secret_file};
pub use room::{FullDisk, free_disk_bytes};
pub(crate) use room::{Room, WEIGHTS_RESERVE_BYTES, WhenFull};
pub(crate) use sled_database::SyncFile;

use sled_database::SledDatabase;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use tokio::sync::watch;

/// Why a database cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Another process has the database open.
    #[error("{path} is in use by another process; stop that node, or choose another data folder (--data)")]
    InUse {
        /// Which database.
        path: PathBuf,
    },
    /// The files are not what was written.
    #[error("{path} is damaged: {error}")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        error: String,
    },
    /// There is no room to open it. It is not damaged.
    #[error("{0}. Nothing that was stored is lost; keep the data folder")]
    Full(#[from] FullDisk),
    /// The operating system refused.
    #[error("cannot open {path}: {error}; check that the folder is writable")]
    Io {
        /// Which path.
        path: PathBuf,
        /// What the system said.
        error: String,
    },
}

impl OpenError {
    /// What the system's `error` at `path` means.
    pub(crate) fn of_system(path: &Path, error: &std::io::Error) -> Self {
        match FullDisk::of(path, error) {
            Some(full) => full.into(),
            None => Self::Io { path: path.into(), error: error.to_string() },
        }
    }
}

/// Why the disk did not take or give back a value.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DiskError {
    /// There is too little room. The write was not begun, and may be tried again.
    #[error(transparent)]
    Full(#[from] FullDisk),
    /// sled, or the fdatasync after it, failed.
    #[error("writing {path}: {error}; check the disk, then restart the node")]
    Write {
        /// Which database.
        path: PathBuf,
        /// What the system said.
        error: String,
    },
    /// A read failed.
    #[error("reading {path}: {error}")]
    Read {
        /// Which database.
        path: PathBuf,
        /// What the system said.
        error: String,
    },
    /// The writer has stopped.
    #[error("{0} is closed")]
    Closed(PathBuf),
}

type Ack = Box<dyn FnOnce(Result<(), DiskError>) + Send>;

enum Write {
    Put { key: Vec<u8>, value: Vec<u8> },
    RemoveRange { from: Vec<u8>, until: Vec<u8> },
}

/// Writes that become readable and durable together. Later ones override earlier ones.
#[derive(Default)]
pub(crate) struct WriteBatch(Vec<Write>);

impl WriteBatch {
    /// Stores `value` under `key`.
    pub fn put(&mut self, key: &[u8], value: &[u8]) {
        self.0.push(Write::Put { key: key.into(), value: value.into() });
    }

    /// Removes everything from `from` on, below `until`.
    pub fn remove_range(&mut self, from: &[u8], until: &[u8]) {
        self.0.push(Write::RemoveRange { from: from.into(), until: until.into() });
    }

    /// Bytes of what it stores.
    fn bytes(&self) -> u64 {
        let bytes = |write: &Write| match write {
            Write::Put { key, value } => (key.len() + value.len()) as u64,
            Write::RemoveRange { .. } => 0,
        };
        self.0.iter().map(bytes).sum()
    }

    /// Whether it only removes.
    fn only_removes(&self) -> bool {
        self.0.iter().all(|write| matches!(write, Write::RemoveRange { .. }))
    }
}

type Keys<'a> = Box<dyn DoubleEndedIterator<Item = Result<Vec<u8>, DiskError>> + Send + 'a>;

/// What is behind a [`Disk`].
trait Database: Send + Sync {
    fn path(&self) -> &Path;

    /// Queues a batch. `applied` is called once it can be read, `durable` once it is on the disk.
    fn submit(&self, batch: WriteBatch, applied: Option<Ack>, durable: Ack);

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, DiskError>;

    fn keys(&self, from: &[u8], until: &[u8]) -> Keys<'_>;

    /// Ends when the database is closed.
    fn open(&self) -> watch::Receiver<()>;

    /// From now on does so with writes that find no room, and with those that wait for it.
    fn when_full(&self, when_full: WhenFull);

    /// What a write waits for.
    fn full(&self) -> watch::Receiver<Option<FullDisk>>;
}

/// A handle on one database; cloning it is cheap. Dropping the last one closes the database.
#[derive(Clone)]
pub(crate) struct Disk(Arc<dyn Database>);

impl Disk {
    /// Opens or creates the database in the folder `path`. `sync` replaces the fdatasync.
    pub fn open(path: &Path, sync: Option<SyncFile>) -> Result<Self, OpenError> {
        Ok(Self(Arc::new(SledDatabase::open(path, sync)?)))
    }

    /// Writes a batch; returns when it is on the disk.
    pub async fn write(&self, batch: WriteBatch) -> Result<(), DiskError> {
        let (done, wait) = tokio::sync::oneshot::channel();
        self.0.submit(batch, None, Box::new(move |result| drop(done.send(result))));
        wait.await.unwrap_or_else(|_| Err(self.is_closed()))
    }

    /// Writes a batch; returns when it can be read, and calls `durable` when it is on the disk.
    pub async fn write_then(&self, batch: WriteBatch, durable: Ack) -> Result<(), DiskError> {
        let (done, wait) = tokio::sync::oneshot::channel();
        self.0.submit(batch, Some(Box::new(move |result| drop(done.send(result)))), durable);
        wait.await.unwrap_or_else(|_| Err(self.is_closed()))
    }

    /// Writes a batch from a thread that may block; returns when it is on the disk.
    pub fn write_blocking(&self, batch: WriteBatch) -> Result<(), DiskError> {
        let (done, wait) = sync_channel(1);
        self.0.submit(batch, None, Box::new(move |result| drop(done.send(result))));
        wait.recv().unwrap_or_else(|_| Err(self.is_closed()))
    }

    fn is_closed(&self) -> DiskError {
        DiskError::Closed(self.0.path().into())
    }

    /// The value under `key`, if it is there whole.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, DiskError> {
        self.0.get(key)
    }

    /// The keys from `from` on, below `until`, of which something is stored, in order.
    pub fn keys(&self, from: &[u8], until: &[u8]) -> Keys<'_> {
        self.0.keys(from, until)
    }

    /// What becomes of writes that find no room, those that wait for it included. At first they are refused.
    pub fn when_full(&self, when_full: WhenFull) {
        self.0.when_full(when_full);
    }

    /// What the writes wait for, while they do.
    pub fn full(&self) -> watch::Receiver<Option<FullDisk>> {
        self.0.full()
    }

    /// Gives this handle up, and resolves when the last one is gone and the database is closed.
    pub fn closed(self) -> impl Future<Output = ()> {
        let mut open = self.0.open();
        drop(self);
        async move { while open.changed().await.is_ok() {} }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn a_database_is_closed_when_its_last_handle_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::open(folder.path(), None).unwrap();
        let other = disk.clone();
        let mut closed = Box::pin(disk.closed());
        assert!((&mut closed).now_or_never().is_none(), "another handle is left");
        drop(other);
        closed.await;
        Disk::open(folder.path(), None).unwrap();
    }
}
