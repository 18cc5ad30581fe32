//! Whether a file system has room for a write: looked at before anything is written.
//!
//! Owns [`FullDisk`], the refusal; [`Room`], the look; and [`Hold`], what the writer of a database does meanwhile. Invariant: a
//! database begins no write that would leave less than its reserve, because sled takes no more writes once the system has
//! refused one of them. Other processes may fill the disk between the look and the write; the reserve is for them too. The module
//! does not know what is written.

use crate::sync::lock;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use tokio::sync::watch;

/// Bytes that databases leave free.
pub(crate) const DATABASE_RESERVE_BYTES: u64 = 16 << 20;
/// Bytes that weights leave free: when they find no room any more, the log still does.
pub(crate) const WEIGHTS_RESERVE_BYTES: u64 = 64 << 20;
/// Bytes that are written to see whether the system takes any.
const PROBE_BYTES: usize = 64 << 10;

/// There is too little room on a disk. Retryable: nothing was written, and what was on the disk is there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the disk of {path} is full: {free_bytes} bytes are free there, and {needed_bytes} are needed; make room on it"
)]
pub struct FullDisk {
    /// What was to be written there.
    pub path: PathBuf,
    /// Bytes that are free.
    pub free_bytes: u64,
    /// Bytes that have to be, the reserve included.
    pub needed_bytes: u64,
}

impl FullDisk {
    /// What the system's `error` at `path` means, if it is that.
    pub(crate) fn of(path: &Path, error: &io::Error) -> Option<Self> {
        let is_full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        is_full.then(|| {
            let folder = path.ancestors().find(|path| path.is_dir()).unwrap_or(path);
            let free_bytes = free_disk_bytes(folder).unwrap_or(0);
            Self { path: path.into(), free_bytes, needed_bytes: DATABASE_RESERVE_BYTES }
        })
    }
}

/// Whether `needed` bytes can be written where `free` are, so that `reserve` are left.
fn fits(free: u64, needed: u64, reserve: u64) -> bool {
    free >= needed.saturating_add(reserve)
}

/// Bytes that this process may still write in `folder`. A file system that gives no sizes, as some of a network do, counts as empty.
///
/// # Errors
/// Those of the file system.
pub fn free_disk_bytes(folder: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(folder)?;
    Ok(if found.f_blocks == 0 { u64::MAX } else { found.f_bavail.saturating_mul(found.f_frsize) })
}

type FreeBytes = dyn Fn(&Path) -> io::Result<u64> + Send + Sync;

/// The room in a folder; cloning is cheap.
#[derive(Clone)]
pub(crate) struct Room {
    folder: PathBuf,
    reserve: u64,
    free_bytes: Arc<FreeBytes>,
}

impl Room {
    /// That in `folder`, beside `reserve` bytes that are left free.
    pub fn of(folder: &Path, reserve: u64) -> Self {
        Self { folder: folder.into(), reserve, free_bytes: Arc::new(free_disk_bytes) }
    }

    /// Asks `free_bytes` instead of the system.
    #[cfg(test)]
    pub fn with(self, free_bytes: impl Fn(&Path) -> io::Result<u64> + Send + Sync + 'static) -> Self {
        Self { free_bytes: Arc::new(free_bytes), ..self }
    }

    /// The same for writes that are to make room: they may use half of the reserve.
    pub fn for_removals(&self) -> Self {
        Self { reserve: self.reserve / 2, ..self.clone() }
    }

    /// Whether `bytes` more can be written. Where the system does not say, the write itself will tell.
    ///
    /// # Errors
    /// [`FullDisk`].
    pub fn check(&self, bytes: u64) -> Result<(), FullDisk> {
        match (self.free_bytes)(&self.folder) {
            Ok(free_bytes) if !fits(free_bytes, bytes, self.reserve) => {
                let needed_bytes = bytes.saturating_add(self.reserve);
                Err(FullDisk { path: self.folder.clone(), free_bytes, needed_bytes })
            }
            _ => Ok(()),
        }
    }

    /// The same, by writing: a quota, or a file system without free inodes, has room by its own account.
    ///
    /// # Errors
    /// [`FullDisk`].
    pub fn probe(&self) -> Result<(), FullDisk> {
        self.check(0)?;
        let file = self.folder.join("room.tmp");
        let written = std::fs::write(&file, vec![1; PROBE_BYTES]);
        // What cannot be removed is overwritten by the next probe.
        let _ = std::fs::remove_file(&file);
        written.err().and_then(|error| FullDisk::of(&self.folder, &error)).map_or(Ok(()), Err)
    }
}

/// What a database does with a write that finds no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum WhenFull {
    /// It refuses it.
    #[default]
    Refuse,
    /// It keeps it, and those that come after it, until there is room.
    Wait,
}

/// The waiting of one database's writer.
#[derive(Default)]
pub(super) struct Hold {
    when_full: Mutex<WhenFull>,
    changed: Condvar,
    full: watch::Sender<Option<FullDisk>>,
}

impl Hold {
    pub fn set(&self, when_full: WhenFull) {
        *lock(&self.when_full) = when_full;
        self.changed.notify_all();
    }

    /// What the writer waits for.
    pub fn full(&self) -> watch::Receiver<Option<FullDisk>> {
        self.full.subscribe()
    }

    /// Returns once `check` finds room, and looks every `period`.
    ///
    /// # Errors
    /// [`FullDisk`], where the database is to refuse such writes.
    pub fn wait(&self, period: Duration, check: impl Fn() -> Result<(), FullDisk>) -> Result<(), FullDisk> {
        let mut when_full = lock(&self.when_full);
        let mut is_said = false;
        let waited = loop {
            match check() {
                Ok(()) => break Ok(()),
                Err(full) if *when_full == WhenFull::Refuse => break Err(full),
                Err(full) => {
                    if !std::mem::replace(&mut is_said, true) {
                        tracing::error!("{full}. The database takes no writes until there is; what it holds is safe");
                    }
                    self.full.send_replace(Some(full));
                }
            }
            let waiting = self.changed.wait_timeout(when_full, period);
            when_full = waiting.map_or_else(|poisoned| poisoned.into_inner().0, |(guard, _)| guard);
        };
        if is_said {
            self.full.send_replace(None);
            if waited.is_ok() {
                tracing::warn!("the disk has room again; the database goes on");
            }
        }
        waited
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn a_write_fits_where_it_leaves_the_reserve() {
        for (free, needed, reserve, expected) in [
            (0, 0, 0, true),
            (0, 1, 0, false),
            (10, 4, 6, true),
            (10, 5, 6, false),
            (u64::MAX, 1, 2, true),
            (9, u64::MAX, 1, false),
        ] {
            assert_eq!(fits(free, needed, reserve), expected, "{free} {needed} {reserve}");
        }
    }

    #[test]
    fn a_refusal_names_the_path_and_the_bytes() {
        let room = Room::of(Path::new("/data"), 16).with(|_| Ok(20));
        assert_eq!((room.check(4), room.for_removals().check(12)), (Ok(()), Ok(())));
        let full = room.check(5).unwrap_err();
        assert_eq!(full, FullDisk { path: "/data".into(), free_bytes: 20, needed_bytes: 21 });
        let said = full.to_string();
        assert!(
            said.contains("/data") && said.contains("20 bytes are free") && said.contains("21 are needed"),
            "{said}"
        );
        let silent = room.with(|_| Err(io::ErrorKind::Unsupported.into()));
        assert_eq!(silent.check(u64::MAX), Ok(()));
    }

    #[test]
    fn only_a_full_disk_is_taken_for_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("not/there");
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
            assert_eq!(FullDisk::of(&path, &kind.into()).map(|full| full.path), Some(path.clone()));
        }
        assert_eq!(FullDisk::of(&path, &io::ErrorKind::PermissionDenied.into()), None);
        Room::of(folder.path(), 0).probe().unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the probe is gone");
    }

    #[test]
    fn a_writer_waits_until_there_is_room_or_nobody_wants_it_to() {
        let (hold, looks) = (Hold::default(), AtomicU64::new(0));
        let full = FullDisk { path: "/data".into(), free_bytes: 0, needed_bytes: 1 };
        let look = |room_at: u64| {
            let at = looks.fetch_add(1, Ordering::Relaxed) + 1;
            if at < room_at { Err(full.clone()) } else { Ok(()) }
        };
        let period = Duration::from_millis(1);
        assert_eq!(hold.wait(period, || look(2)), Err(full.clone()));
        hold.set(WhenFull::Wait);
        assert_eq!(hold.wait(period, || look(5)), Ok(()));
        assert_eq!((looks.load(Ordering::Relaxed), hold.full().borrow().clone()), (5, None));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| hold.wait(Duration::from_secs(3600), || look(u64::MAX)));
            while hold.full().borrow().is_none() {
                std::thread::yield_now();
            }
            hold.set(WhenFull::Refuse);
            assert_eq!(waiting.join().unwrap(), Err(full.clone()));
        });
        assert_eq!(*hold.full().borrow(), None);
    }
}
