//! A database in sled, and its one writer.
//!
//! Two facts of sled 0.34.7 shape this module: its `flush()` does not fsync on Linux, and concurrent `flush_async`
//! calls deadlock. So one thread owns every write. It takes what has queued up, applies it
//! to sled, flushes, calls `fdatasync` on sled's `db` file, and only then acknowledges the lot: writers that come
//! together share one fdatasync.
//!
//! Invariant, beside those of every database: after a failed write the database accepts nothing more, because a disk that
//! lost one fsync has lost unknown pages. A full disk is no such failure: it is found before sled begins to write ([`super::room`]),
//! and the batch is refused or kept until there is room. A database that has lost what was acknowledged does not open ([`super::mark`]).
//!
//! Values longer than [`PART_BYTES`] are cut into parts under consecutive keys: sled moves large pages to files of
//! their own, which the fdatasync would not cover.

use super::damage::{damaged, guarded};
use super::mark::Mark;
use super::room::{DATABASE_RESERVE_BYTES, FullDisk, Hold, Room, WhenFull};
use super::{Ack, Database, DiskError, Keys, OpenError, Write, WriteBatch, sync_folder};
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
/// Under this key is the number of the last write. No caller's key begins like it.
const NUMBER: &[u8] = b"#";
/// sled releases its lock a moment after the last handle is dropped and has no event for that, so a fresh opener tries a
/// few times before it concludes that another process has the folder.
const LOCK_TRIES: u32 = 10;
const LOCK_WAIT: Duration = Duration::from_millis(50);
/// How often a writer that waits for room looks for it.
const ROOM_PERIOD: Duration = Duration::from_secs(1);
/// Bytes that sled may write for one byte of a batch: it writes whole pages anew, and keeps the old ones for a while.
const WRITES_PER_BYTE: u64 = 8;

/// How sled's file is made durable: `fdatasync`, unless a test observes it or makes it fail. Called with the file and
/// the database's folder.
pub(crate) type SyncFile = Box<dyn FnMut(&File, &Path) -> std::io::Result<()> + Send>;

fn part_key(key: &[u8], part: usize) -> Vec<u8> {
    let mut full = Vec::with_capacity(key.len() + 4);
    full.extend_from_slice(key);
    full.extend_from_slice(&(part as u32).to_be_bytes());
    full
}

/// Adds to `batch` that `value` is stored under `key`, in parts. Parts of a longer value that was stored before may remain,
/// unread, until the key is removed.
fn put(batch: &mut sled::Batch, key: &[u8], value: &[u8]) {
    let mut first = (value.len() as u32).to_be_bytes().to_vec();
    let head = value.len().min(PART_BYTES);
    first.extend_from_slice(&value[..head]);
    batch.insert(part_key(key, 0), first);
    for (part, bytes) in value[head..].chunks(PART_BYTES).enumerate() {
        batch.insert(part_key(key, part + 1), bytes);
    }
}

struct Job {
    batch: WriteBatch,
    applied: Option<Ack>,
    durable: Ack,
}

impl Job {
    fn refuse(self, error: DiskError) {
        if let Some(applied) = self.applied {
            applied(Err(error.clone()));
        }
        (self.durable)(Err(error));
    }
}

/// A database in a folder.
pub(super) struct SledDatabase {
    path: PathBuf,
    db: sled::Db,
    queue: Mutex<Option<SyncSender<Job>>>,
    writer: Mutex<Option<JoinHandle<()>>>,
    hold: Arc<Hold>,
    /// Dropped last, when the database is closed.
    open: watch::Sender<()>,
}

impl SledDatabase {
    /// Opens or creates the database in the folder `path`. `sync` replaces the fdatasync.
    pub fn open(path: &Path, sync: Option<SyncFile>) -> Result<Self, OpenError> {
        Self::open_in(path, sync, Room::of(path, DATABASE_RESERVE_BYTES))
    }

    fn open_in(path: &Path, sync: Option<SyncFile>, room: Room) -> Result<Self, OpenError> {
        let failed = |error: std::io::Error| OpenError::of_system(path, &error);
        // sled writes while it opens, and calls its files contradictory where that fails.
        let unless_full = |error: OpenError| match error {
            OpenError::Damaged { .. } => room.probe().map_or_else(OpenError::from, |()| error),
            other => other,
        };
        fs::create_dir_all(path).map_err(failed)?;
        room.check(0)?;
        settle(path).map_err(failed)?;
        let db = open_sled(path).map_err(unless_full)?;
        // sled does not sync it when it creates it, and does not open with half of it.
        File::open(path.join("conf")).and_then(|conf| conf.sync_all()).map_err(failed)?;
        let (mark, acknowledged) = Mark::open(path).map_err(failed)?;
        let number = check(&db, path, acknowledged).map_err(unless_full)?;
        // The entries of the folders themselves must survive too.
        sync_folder(path).map_err(failed)?;
        if let Some(parent) = path.parent() {
            sync_folder(parent).map_err(failed)?;
        }
        let file = File::options().read(true).write(true).open(path.join("db")).map_err(failed)?;
        let (queue, jobs) = sync_channel(QUEUE_MAX);
        let sync = sync.unwrap_or_else(|| Box::new(|file, _| file.sync_data()));
        let hold = Arc::<Hold>::default();
        let mut writer = Writer {
            path: path.into(),
            db: db.clone(),
            file,
            jobs,
            sync,
            mark,
            number,
            room: room.clone(),
            hold: Arc::clone(&hold),
            failed: None,
        };
        let thread =
            std::thread::Builder::new().name("coel-disk".into()).spawn(move || writer.run()).map_err(failed)?;
        Ok(Self {
            path: path.into(),
            db,
            queue: Mutex::new(Some(queue)),
            writer: Mutex::new(Some(thread)),
            hold,
            open: watch::Sender::new(()),
        })
    }

    fn read_error(&self, error: impl ToString) -> DiskError {
        DiskError::Read { path: self.path.clone(), error: error.to_string() }
    }
}

impl Database for SledDatabase {
    fn path(&self) -> &Path {
        &self.path
    }

    fn submit(&self, batch: WriteBatch, applied: Option<Ack>, durable: Ack) {
        let queue = lock(&self.queue).clone();
        let job = Job { batch, applied, durable };
        let lost = match queue {
            Some(queue) => queue.send(job).err().map(|error| error.0),
            None => Some(job),
        };
        if let Some(job) = lost {
            job.refuse(DiskError::Closed(self.path.clone()));
        }
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, DiskError> {
        let read = |part| self.db.get(part_key(key, part)).map_err(|error| self.read_error(error));
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

    fn keys(&self, from: &[u8], until: &[u8]) -> Keys<'_> {
        let heads = self.db.range(from.to_vec()..until.to_vec()).keys();
        Box::new(heads.filter_map(move |key| match key {
            // Part 0 stands for the whole value.
            Ok(key) => {
                let (name, part) = key.split_last_chunk::<4>()?;
                (*part == [0; 4]).then(|| Ok(name.to_vec()))
            }
            Err(error) => Some(Err(self.read_error(error))),
        }))
    }

    fn open(&self) -> watch::Receiver<()> {
        self.open.subscribe()
    }

    fn when_full(&self, when_full: WhenFull) {
        self.hold.set(when_full);
    }

    fn full(&self) -> watch::Receiver<Option<FullDisk>> {
        self.hold.full()
    }
}

impl Drop for SledDatabase {
    fn drop(&mut self) {
        // The writer ends with its queue. Waiting for it frees sled's lock before this call returns.
        drop(lock(&self.queue).take());
        self.hold.set(WhenFull::Refuse);
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
    mark: Mark,
    /// How many writes there have been, ever.
    number: u64,
    room: Room,
    hold: Arc<Hold>,
    failed: Option<DiskError>,
}

impl Writer {
    fn run(&mut self) {
        // One that found no room beside others: these are acknowledged before it waits.
        let mut left = None;
        while let Some(first) = left.take().or_else(|| self.jobs.recv().ok()) {
            if let Err(full) = self.hold.wait(ROOM_PERIOD, || self.check_room(&first.batch, 0)) {
                first.refuse(full.into());
                continue;
            }
            let (mut waiting, mut bytes) = (Vec::new(), 0);
            let mut next = Some(first);
            while let Some(job) = next {
                bytes += job.batch.bytes();
                let result = self.apply(job.batch);
                if let Some(applied) = job.applied {
                    applied(result);
                }
                waiting.push(job.durable);
                next = if waiting.len() < SHARED_SYNC_MAX { self.jobs.try_recv().ok() } else { None };
                left = next.take_if(|next| self.check_room(&next.batch, bytes).is_err());
            }
            let result = self.sync();
            for durable in waiting {
                durable(result.clone());
            }
        }
    }

    /// Whether there is room for a batch, after others of so many bytes that are not on the disk yet.
    fn check_room(&self, batch: &WriteBatch, others: u64) -> Result<(), FullDisk> {
        // A failed database refuses it anyway, for a better reason.
        if self.failed.is_some() {
            return Ok(());
        }
        let bytes = others.saturating_add(batch.bytes()).saturating_mul(WRITES_PER_BYTE);
        if batch.only_removes() { self.room.for_removals().check(bytes) } else { self.room.check(bytes) }
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
        let result = self.write(batch).map_err(|error| error.to_string());
        self.guard(result)
    }

    fn write(&mut self, batch: WriteBatch) -> sled::Result<()> {
        self.number += 1;
        let mut all = sled::Batch::default();
        all.insert(NUMBER, &self.number.to_be_bytes());
        for write in batch.0 {
            match write {
                Write::Put { key, value } => put(&mut all, &key, &value),
                Write::RemoveRange { from, until } => {
                    for key in self.db.range(from..until).keys() {
                        all.remove(key?);
                    }
                }
            }
        }
        self.db.apply_batch(all)
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let flushed = self.db.flush().map_err(|error| error.to_string());
        let synced = flushed.and_then(|_| (self.sync)(&self.file, &self.path).map_err(|error| error.to_string()));
        if synced.is_ok()
            && let Err(error) = self.mark.set(self.number)
        {
            // The mark lags behind then, which is allowed.
            tracing::debug!(%error, "the mark of the database was not moved");
        }
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

/// Reads everything, so that damage is found now and not in the middle of a day. Returns the number of the last write.
fn check(db: &sled::Db, path: &Path, acknowledged: u64) -> Result<u64, OpenError> {
    let read = guarded(|| {
        db.iter().try_for_each(|value| value.map(drop))?;
        db.get(NUMBER)
    });
    let number = read.map_err(|error| damaged(path, &error))?;
    let number = number.and_then(|bytes| (*bytes).try_into().ok()).map_or(0, u64::from_be_bytes);
    if number < acknowledged {
        let lost = acknowledged - number;
        let error = format!("the last {lost} of {acknowledged} writes that were on the disk are gone");
        return Err(OpenError::Damaged { path: path.join("db"), error });
    }
    Ok(number)
}

/// Whether the system refused, rather than sled, which found the files to be other than it left them.
fn is_of_system(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{InvalidData, Other, UnexpectedEof};
    !matches!(error.kind(), InvalidData | Other | UnexpectedEof)
}

fn open_sled(path: &Path) -> Result<sled::Db, OpenError> {
    let config =
        || sled::Config::new().path(path).cache_capacity(CACHE_BYTES).flush_every_ms(None).mode(sled::Mode::LowSpace);
    for tries_left in (0..LOCK_TRIES).rev() {
        match guarded(|| config().open()) {
            Ok(db) => return Ok(db),
            // sled has no error kind for a held lock.
            Err(sled::Error::Io(error)) if error.to_string().starts_with("could not acquire lock") => {
                if tries_left == 0 {
                    break;
                }
                std::thread::sleep(LOCK_WAIT);
            }
            Err(sled::Error::Io(error)) if is_of_system(&error) => {
                return Err(OpenError::of_system(path, &error));
            }
            Err(error) => return Err(damaged(path, &error)),
        }
    }
    Err(OpenError::InUse { path: path.into() })
}

#[cfg(test)]
mod tests {
    use super::super::Disk;
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// A database in `folder` that is told that so many bytes are free beside its reserve.
    fn told(folder: &Path, free: &Arc<AtomicU64>) -> Result<Disk, OpenError> {
        let free = Arc::clone(free);
        let room = Room::of(folder, DATABASE_RESERVE_BYTES)
            .with(move |_| Ok((DATABASE_RESERVE_BYTES / 2).saturating_add(free.load(Ordering::Relaxed))));
        Ok(Disk(Arc::new(SledDatabase::open_in(folder, None, room)?)))
    }

    fn value(key: &[u8], bytes: usize) -> WriteBatch {
        let mut batch = WriteBatch::default();
        batch.put(key, &vec![7; bytes]);
        batch
    }

    #[tokio::test]
    async fn a_full_disk_costs_nothing_but_what_it_refuses() {
        let (folder, free) = (tempfile::tempdir().unwrap(), Arc::new(AtomicU64::new(u64::MAX)));
        let disk = told(folder.path(), &free).unwrap();
        disk.write(value(b"a", 9)).await.unwrap();
        free.store(0, Ordering::Relaxed);
        let refused = disk.write(value(b"b", 9)).await.unwrap_err();
        assert!(matches!(&refused, DiskError::Full(full) if full.path == folder.path()), "{refused}");
        let mut removal = WriteBatch::default();
        removal.remove_range(b"x", b"y");
        disk.write(removal).await.unwrap();
        assert_eq!((disk.get(b"a").unwrap(), disk.get(b"b").unwrap()), (Some(vec![7; 9]), None));
        free.store(u64::MAX, Ordering::Relaxed);
        disk.write(value(b"b", 9)).await.unwrap();
        disk.closed().await;

        free.store(0, Ordering::Relaxed);
        let full = told(folder.path(), &free).map(drop).unwrap_err();
        assert!(matches!(full, OpenError::Full(_)), "{full}");
        free.store(u64::MAX, Ordering::Relaxed);
        assert_eq!(told(folder.path(), &free).unwrap().get(b"b").unwrap(), Some(vec![7; 9]));
    }

    #[tokio::test]
    async fn writes_that_wait_for_room_are_done_in_order_and_others_are_acknowledged() {
        let (folder, free) = (tempfile::tempdir().unwrap(), Arc::new(AtomicU64::new(u64::MAX)));
        let disk = told(folder.path(), &free).unwrap();
        disk.when_full(WhenFull::Wait);
        free.store(DATABASE_RESERVE_BYTES, Ordering::Relaxed);
        disk.write(value(b"small", 9)).await.unwrap();
        let (waiting, mut full) = (disk.clone(), disk.full());
        let large = tokio::spawn(async move { waiting.write(value(b"large", 4 << 20)).await });
        full.wait_for(Option::is_some).await.unwrap();
        let waiting = disk.clone();
        let later = tokio::spawn(async move { waiting.write(value(b"later", 9)).await });
        assert_eq!(disk.get(b"large").unwrap(), None);
        free.store(u64::MAX, Ordering::Relaxed);
        large.await.unwrap().unwrap();
        later.await.unwrap().unwrap();
        assert_eq!(*disk.full().borrow(), None);

        free.store(0, Ordering::Relaxed);
        let waiting = disk.clone();
        let given_up = tokio::spawn(async move { waiting.write(value(b"given up", 9)).await });
        full.wait_for(Option::is_some).await.unwrap();
        disk.when_full(WhenFull::Refuse);
        assert!(matches!(given_up.await.unwrap(), Err(DiskError::Full(_))));
    }
}
