//! The one writer of a sled database.
//!
//! Two facts of sled 0.34.7 shape this module: its `flush()` does not fsync on Linux, and concurrent `flush_async`
//! calls deadlock. So one thread owns every write. It takes what has queued up, applies it
//! to sled, flushes, calls `fdatasync` on sled's `db` file, and only then acknowledges the lot: writers that come
//! together share one fdatasync.
//!
//! Invariants: what was acknowledged as durable is there after a power cut; writes become durable in the order in which
//! they were queued, and each batch whole or not at all. After a failed write the database accepts nothing more,
//! because a disk that lost one fsync has lost unknown pages.
//!
//! Values longer than [`PART_BYTES`] are cut into parts under consecutive keys: sled moves large pages to files of
//! their own, which the fdatasync would not cover. The module does not know what the values mean. [`files`] holds the
//! same care for plain files.

mod files;

pub(crate) use files::{Renames, sync_folder};
pub use files::{replace_file, replace_secret_file};

use crate::sync::lock;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::watch;

/// Bytes of one stored value. sled keeps a page (at most 20 values of this size) inline below
/// 128 KiB.
const PART_BYTES: usize = 4096;
/// Most writes that share one fdatasync, so that the first of them does not wait forever.
const SHARED_SYNC_MAX: usize = 64;
/// Writes that may queue up. Every caller but one waits for its own write, so the bound is never reached in practice.
const QUEUE_MAX: usize = 1024;
/// sled's page cache in bytes. Everything stored here is small.
const CACHE_BYTES: u64 = 16 << 20;
/// sled releases its lock a moment after the last handle is dropped and has no event for that, so a fresh opener tries a
/// few times before it concludes that another process has the folder.
const LOCK_TRIES: u32 = 10;
const LOCK_WAIT: Duration = Duration::from_millis(50);

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
    #[error("{path} is damaged: {error}; restore the folder from a backup, or remove the data folder and join again")]
    Damaged {
        /// Which database.
        path: PathBuf,
        /// What is wrong.
        error: String,
    },
    /// The operating system refused.
    #[error("cannot open {path}: {error}; check that the folder is writable and the disk has room")]
    Io {
        /// Which path.
        path: PathBuf,
        /// What the system said.
        error: String,
    },
}

/// Why the disk did not take or give back a value.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DiskError {
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

/// How sled's file is made durable: `fdatasync`, unless a test observes it or makes it fail. Called with the file and
/// the database's folder.
pub(crate) type SyncFile = Box<dyn FnMut(&File, &Path) -> std::io::Result<()> + Send>;

/// Writes that become readable and durable together.
#[derive(Default)]
pub(crate) struct WriteBatch(sled::Batch);

impl WriteBatch {
    /// Stores `value` under `key`, in parts. Parts of a longer value that was stored before may remain, unread, until
    /// the key is removed.
    pub fn put(&mut self, key: &[u8], value: &[u8]) {
        let mut first = (value.len() as u32).to_be_bytes().to_vec();
        let head = value.len().min(PART_BYTES);
        first.extend_from_slice(&value[..head]);
        self.0.insert(part_key(key, 0), first);
        for (part, bytes) in value[head..].chunks(PART_BYTES).enumerate() {
            self.0.insert(part_key(key, part + 1), bytes);
        }
    }
}

fn part_key(key: &[u8], part: usize) -> Vec<u8> {
    let mut full = Vec::with_capacity(key.len() + 4);
    full.extend_from_slice(key);
    full.extend_from_slice(&(part as u32).to_be_bytes());
    full
}

struct Job {
    batch: WriteBatch,
    applied: Option<Ack>,
    durable: Ack,
}

struct Inner {
    path: PathBuf,
    db: sled::Db,
    queue: Mutex<Option<SyncSender<Job>>>,
    writer: Mutex<Option<JoinHandle<()>>>,
    /// Dropped last, when the database is closed; that ends the wait in [`Disk::closed`].
    open: watch::Sender<()>,
}

/// A handle on one database; cloning it is cheap. Dropping the last one closes the database.
#[derive(Clone)]
pub(crate) struct Disk(Arc<Inner>);

impl Disk {
    /// Opens or creates the database in the folder `path`. `sync` replaces the fdatasync.
    pub fn open(path: &Path, sync: Option<SyncFile>) -> Result<Self, OpenError> {
        let damaged = |error: std::io::Error| OpenError::Io { path: path.into(), error: error.to_string() };
        fs::create_dir_all(path).map_err(damaged)?;
        settle(path).map_err(damaged)?;
        let db = open_sled(path)?;
        // The entries of the folders themselves must survive too.
        sync_folder(path).map_err(damaged)?;
        if let Some(parent) = path.parent() {
            sync_folder(parent).map_err(damaged)?;
        }
        let file = File::options().read(true).write(true).open(path.join("db")).map_err(damaged)?;
        let (queue, jobs) = sync_channel(QUEUE_MAX);
        let sync = sync.unwrap_or_else(|| Box::new(|file, _| file.sync_data()));
        let mut writer = Writer { path: path.into(), db: db.clone(), file, jobs, sync, failed: None };
        let thread =
            std::thread::Builder::new().name("coel-disk".into()).spawn(move || writer.run()).map_err(damaged)?;
        Ok(Self(Arc::new(Inner {
            path: path.into(),
            db,
            queue: Mutex::new(Some(queue)),
            writer: Mutex::new(Some(thread)),
            open: watch::Sender::new(()),
        })))
    }

    /// Queues a batch. `applied` is called once it can be read, `durable` once it is on the disk.
    fn submit(&self, batch: WriteBatch, applied: Option<Ack>, durable: Ack) {
        let queue = lock(&self.0.queue).clone();
        let job = Job { batch, applied, durable };
        let lost = match queue {
            Some(queue) => queue.send(job).err().map(|error| error.0),
            None => Some(job),
        };
        if let Some(job) = lost {
            let error = DiskError::Closed(self.0.path.clone());
            if let Some(applied) = job.applied {
                applied(Err(error.clone()));
            }
            (job.durable)(Err(error));
        }
    }

    /// Writes a batch; returns when it is on the disk.
    pub async fn write(&self, batch: WriteBatch) -> Result<(), DiskError> {
        let (done, wait) = tokio::sync::oneshot::channel();
        self.submit(batch, None, Box::new(move |result| drop(done.send(result))));
        wait.await.unwrap_or_else(|_| Err(DiskError::Closed(self.0.path.clone())))
    }

    /// Writes a batch; returns when it can be read, and calls `durable` when it is on the disk.
    pub async fn write_then(&self, batch: WriteBatch, durable: Ack) -> Result<(), DiskError> {
        let (done, wait) = tokio::sync::oneshot::channel();
        self.submit(batch, Some(Box::new(move |result| drop(done.send(result)))), durable);
        wait.await.unwrap_or_else(|_| Err(DiskError::Closed(self.0.path.clone())))
    }

    /// Writes a batch from a thread that may block; returns when it is on the disk.
    pub fn write_blocking(&self, batch: WriteBatch) -> Result<(), DiskError> {
        let (done, wait) = sync_channel(1);
        self.submit(batch, None, Box::new(move |result| drop(done.send(result))));
        wait.recv().unwrap_or_else(|_| Err(DiskError::Closed(self.0.path.clone())))
    }

    fn read_error(&self, error: impl ToString) -> DiskError {
        DiskError::Read { path: self.0.path.clone(), error: error.to_string() }
    }

    /// The value under `key`, if it is there whole.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, DiskError> {
        let read = |part| self.0.db.get(part_key(key, part)).map_err(|error| self.read_error(error));
        let Some(first) = read(0)? else { return Ok(None) };
        let Some((bytes, head)) = first.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let bytes = u32::from_be_bytes(*bytes) as usize;
        let mut value = head.to_vec();
        let mut part = 1;
        while value.len() < bytes {
            let Some(next) = read(part)?.filter(|next| !next.is_empty()) else {
                return Ok(None);
            };
            value.extend_from_slice(&next);
            part += 1;
        }
        value.truncate(bytes);
        Ok(Some(value))
    }

    /// The keys from `from` on, below `until`, of which something is stored, in order.
    pub fn keys(&self, from: &[u8], until: &[u8]) -> impl DoubleEndedIterator<Item = Result<Vec<u8>, DiskError>> {
        let heads = self.0.db.range(from.to_vec()..until.to_vec()).keys();
        heads.filter_map(move |key| match key {
            // Part 0 stands for the whole value.
            Ok(key) => {
                let (name, part) = key.split_last_chunk::<4>()?;
                (*part == [0; 4]).then(|| Ok(name.to_vec()))
            }
            Err(error) => Some(Err(self.read_error(error))),
        })
    }

    /// Adds to `batch` the removal of everything from `from` on, below `until`.
    pub fn remove_range(&self, batch: &mut WriteBatch, from: &[u8], until: &[u8]) -> Result<(), DiskError> {
        for key in self.0.db.range(from.to_vec()..until.to_vec()).keys() {
            batch.0.remove(key.map_err(|error| self.read_error(error))?);
        }
        Ok(())
    }

    /// Gives this handle up, and resolves when the last one is gone and the database is closed.
    pub fn closed(self) -> impl Future<Output = ()> {
        let mut open = self.0.open.subscribe();
        drop(self);
        async move { while open.changed().await.is_ok() {} }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The writer ends with its queue. Waiting for it frees sled's lock before this call returns.
        drop(lock(&self.queue).take());
        let writer = lock(&self.writer).take();
        if let Some(writer) = writer {
            let _ = writer.join();
        }
    }
}

struct Writer {
    path: PathBuf,
    db: sled::Db,
    file: File,
    jobs: Receiver<Job>,
    sync: SyncFile,
    failed: Option<DiskError>,
}

impl Writer {
    fn run(&mut self) {
        while let Ok(first) = self.jobs.recv() {
            let mut waiting = Vec::new();
            let mut next = Some(first);
            while let Some(job) = next {
                let result = self.apply(job.batch);
                if let Some(applied) = job.applied {
                    applied(result);
                }
                waiting.push(job.durable);
                next = if waiting.len() < SHARED_SYNC_MAX { self.jobs.try_recv().ok() } else { None };
            }
            let result = self.sync();
            for durable in waiting {
                durable(result.clone());
            }
        }
    }

    /// Remembers the first failure: every later write meets it again.
    fn guard(&mut self, result: Result<(), String>) -> Result<(), DiskError> {
        if let Err(error) = result {
            let error = DiskError::Write { path: self.path.clone(), error };
            tracing::error!(%error, "the database takes no more writes");
            self.failed = Some(error);
        }
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn apply(&mut self, batch: WriteBatch) -> Result<(), DiskError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = self.db.apply_batch(batch.0).map_err(|error| error.to_string());
        self.guard(result)
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let flushed = self.db.flush().map_err(|error| error.to_string());
        let synced = flushed.and_then(|_| (self.sync)(&self.file, &self.path).map_err(|error| error.to_string()));
        self.guard(synced)
    }
}

/// Prepares the files before sled opens them. What is there becomes durable, because sled writes a snapshot of it and
/// fsyncs only that. A snapshot whose writing was interrupted is deleted, because sled would take it for the newest one
/// and refuse to open.
fn settle(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            // If another process is writing it right now it is not ours to remove, and the lock stops us next.
            if !in_use(path)? {
                fs::remove_file(entry.path())?;
            }
        } else if name == "db" || name == "conf" {
            File::open(entry.path())?.sync_data()?;
        }
    }
    Ok(())
}

/// Whether another process holds sled's lock right now.
fn in_use(path: &Path) -> std::io::Result<bool> {
    match File::options().read(true).write(true).open(path.join("db")) {
        Ok(file) => match file.try_lock() {
            Ok(()) => file.unlock().map(|()| false),
            Err(fs::TryLockError::WouldBlock) => Ok(true),
            Err(fs::TryLockError::Error(error)) => Err(error),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn open_sled(path: &Path) -> Result<sled::Db, OpenError> {
    let config =
        || sled::Config::new().path(path).cache_capacity(CACHE_BYTES).flush_every_ms(None).mode(sled::Mode::LowSpace);
    for tries_left in (0..LOCK_TRIES).rev() {
        match config().open() {
            Ok(db) => return Ok(db),
            // sled has no error kind for a held lock.
            Err(sled::Error::Io(error)) if error.to_string().starts_with("could not acquire lock") => {
                if tries_left == 0 {
                    break;
                }
                std::thread::sleep(LOCK_WAIT);
            }
            Err(error) => {
                return Err(OpenError::Damaged { path: path.into(), error: error.to_string() });
            }
        }
    }
    Err(OpenError::InUse { path: path.into() })
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
