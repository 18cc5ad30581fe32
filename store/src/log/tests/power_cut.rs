//! Power cuts: what was acknowledged is there again, whatever else the disk had got to.
//!
//! The files are copied where a power cut would freeze them: right after an fdatasync (nothing
//! later has reached the disk), and torn, with any part of the later writes on the disk and the
//! rest lost. A store opened from the copy must hold everything acknowledged up to that fdatasync.

use crate::disk::{Disk, SyncFile, WriteBatch};
use crate::ids::NodeId;
use crate::log::sled_log::SledLog;
use crate::log::state_machine::StateMachine;
use crate::log::types::{Entry, LogId, Payload, Vote};
use crate::state::command::Command;
use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use openraft::{CommittedLeaderId, RaftLogReader, RaftSnapshotBuilder};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// The unit in which a disk writes a page or loses it.
pub(super) const PAGE: usize = 4096;

fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(CommittedLeaderId::new(term, NodeId(1)), index)
}

/// An entry of about `bytes` bytes, which names itself.
pub(super) fn entry(term: u64, index: u64, bytes: usize) -> Entry {
    let name = format!("{term}/{index}/{}", "x".repeat(bytes));
    let command = Command::Readdress { node: NodeId(index), name, addresses: vec![] };
    Entry { log_id: log_id(term, index), payload: Payload::Normal(command), author: Some(NodeId(index)) }
}

/// The files of a database as they are now: name and content.
pub(super) type Files = Vec<(PathBuf, Vec<u8>)>;

pub(super) fn freeze(path: &Path) -> Files {
    let mut files = Files::new();
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            files.push((entry.file_name().into(), fs::read(entry.path()).unwrap()));
        }
    }
    files
}

pub(super) fn thaw(files: &Files) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("log")).unwrap();
    for (name, content) in files {
        fs::write(dir.path().join("log").join(name), content).unwrap();
    }
    dir
}

/// What a cut leaves when, after `synced`, some pages of `later` reached the disk and others not.
fn tear(synced: &Files, later: &Files, rng: &mut StdRng) -> Files {
    let share = rng.random_range(0.0..1.0);
    let old = |name: &PathBuf| synced.iter().find(|(other, _)| other == name).map(|(_, bytes)| bytes.as_slice());
    let mut torn = Files::new();
    for (name, new) in later {
        let old = old(name).unwrap_or_default();
        if name == Path::new("durable") {
            // It may know of an fdatasync between the two states, which this cut does as if there was none.
            torn.push((name.clone(), old.to_vec()));
            continue;
        }
        let mut bytes = old.to_vec();
        // The file's length is metadata of its own: it may be ahead of the content.
        if new.len() > bytes.len() && rng.random_bool(0.5) {
            bytes.resize(new.len(), 0);
        }
        let end = bytes.len();
        for start in (0..end.min(new.len())).step_by(PAGE) {
            if rng.random_bool(share) {
                let stop = (start + PAGE).min(end).min(new.len());
                bytes[start..stop].copy_from_slice(&new[start..stop]);
            }
        }
        torn.push((name.clone(), bytes));
    }
    torn
}

/// What was acknowledged.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Known {
    vote: Option<Vote>,
    /// Every entry that must be there, by index.
    pub entries: Vec<Entry>,
    purged: Option<LogId>,
    snapshot: Option<LogId>,
}

pub(super) async fn check(files: &Files, known: &Known, what: &str) {
    let dir = thaw(files);
    let disk = Disk::open(&dir.path().join("log"), None).unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut log = SledLog::open(disk.clone()).await.unwrap();
    let vote = log.read_vote().await.unwrap();
    assert!(vote >= known.vote, "{what}: vote {vote:?}, acknowledged {:?}", known.vote);
    let state = log.get_log_state().await.unwrap();
    assert!(state.last_purged_log_id >= known.purged, "{what}: {state:?}");
    let (mut machine, _) = StateMachine::open(disk.clone(), Default::default()).unwrap();
    let snapshot = machine.applied_state().await.unwrap().0;
    assert!(snapshot >= known.snapshot, "{what}: snapshot {snapshot:?}");
    // Entries may be gone only where a later purge got through, which needs the snapshot.
    let purged = state.last_purged_log_id;
    assert!(snapshot >= purged, "{what}: purged {purged:?} beyond snapshot {snapshot:?}");
    for entry in &known.entries {
        if Some(entry.log_id) <= purged {
            continue;
        }
        let index = entry.log_id.index;
        let found = log.try_get_log_entries(index..=index).await.unwrap();
        assert_eq!(found.first().map(|e| e.log_id), Some(entry.log_id), "{what}");
        assert_eq!(found[0], *entry, "{what}");
    }
}

/// Writes to a store for a while: votes, appends of all sizes, truncation, snapshots and purges.
/// Calls `between` with what is acknowledged before each step.
pub(super) async fn live(disk: Disk, steps: u64, rng: &mut StdRng, mut between: impl FnMut(&Known)) -> Known {
    let mut log = SledLog::open(disk.clone()).await.unwrap();
    let (mut machine, _) = StateMachine::open(disk, Default::default()).unwrap();
    let mut known = Known::default();
    let mut term = 1;
    let mut next = 0;
    for step in 0..steps {
        between(&known);
        match step % 8 {
            0 => {
                term += 1;
                let vote = Vote::new(term, NodeId(1));
                log.save_vote(&vote).await.unwrap();
                known.vote = Some(vote);
            }
            5 if next > 3 => {
                // A conflicting tail is dropped; from here on nobody counts on it.
                next -= 2;
                known.entries.retain(|entry| entry.log_id.index < next);
                between(&known);
                log.truncate(log_id(term, next)).await.unwrap();
            }
            7 if known.entries.len() > 6 => {
                let half = known.entries.len() / 2;
                let applied: Vec<_> = known.entries.drain(..half).collect();
                let last = applied.last().map(|entry| entry.log_id);
                machine.apply(applied).await.unwrap();
                let mut builder = machine.get_snapshot_builder().await;
                builder.build_snapshot().await.unwrap();
                known.snapshot = last;
                log.purge(last.unwrap()).await.unwrap();
                known.purged = last;
            }
            _ => {
                let count = rng.random_range(1..6);
                let size = if rng.random_bool(0.2) { 60_000 } else { 300 };
                let entries: Vec<_> =
                    (next..next + count).map(|index| entry(term, index, rng.random_range(0..size))).collect();
                log.blocking_append(entries.clone()).await.unwrap();
                log.save_committed(entries.last().map(|entry| entry.log_id)).await.unwrap();
                known.entries.extend(entries);
                next += count;
            }
        }
    }
    known
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_acknowledged_survives_a_cut_after_any_fdatasync() {
    let dir = tempfile::tempdir().unwrap();
    let frozen: Arc<Mutex<Option<Files>>> = Arc::default();
    let sync: SyncFile = {
        let frozen = Arc::clone(&frozen);
        Box::new(move |file, path| {
            file.sync_data()?;
            *frozen.lock().unwrap() = Some(freeze(path));
            Ok(())
        })
    };
    let disk = Disk::open(&dir.path().join("log"), Some(sync)).unwrap();
    let mut cuts = Vec::new();
    let mut rng = StdRng::seed_from_u64(1);
    live(disk, 40, &mut rng, |known| {
        if let Some(files) = frozen.lock().unwrap().clone() {
            cuts.push((files, known.clone()));
        }
    })
    .await;
    assert!(cuts.len() > 30);
    for (cut, (files, known)) in cuts.iter().enumerate() {
        check(files, known, &format!("cut {cut}")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_acknowledged_survives_a_torn_cut() {
    for seed in 0..6 {
        let mut rng = StdRng::seed_from_u64(seed);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let synced: Arc<Mutex<Files>> = Arc::default();
        let sync: SyncFile = {
            let synced = Arc::clone(&synced);
            Box::new(move |file, path| {
                file.sync_data()?;
                *synced.lock().unwrap() = freeze(path);
                Ok(())
            })
        };
        let disk = Disk::open(&path, Some(sync)).unwrap();
        let mut cuts: Vec<(Files, Known)> = Vec::new();
        let mut before: Option<(Files, Known)> = None;
        let mut tearing = StdRng::seed_from_u64(seed + 1000);
        live(disk, 32, &mut rng, |known| {
            // Between the last step's fdatasync and this one's lie the writes that may be torn.
            let now = synced.lock().unwrap().clone();
            if let Some((old, acknowledged)) = before.take() {
                cuts.push((tear(&old, &now, &mut tearing), acknowledged));
            }
            before = (!now.is_empty()).then(|| (now, known.clone()));
        })
        .await;
        for (cut, (files, known)) in cuts.iter().enumerate() {
            check(files, known, &format!("seed {seed}, torn cut {cut}")).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_sled_snapshot_does_not_lock_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut rng = StdRng::seed_from_u64(3);
    let known = live(Disk::open(&path, None).unwrap(), 6, &mut rng, |_| ()).await;
    fs::write(path.join("snap.00000000FFFFFFFF.generating"), b"half").unwrap();
    check(&freeze(&path), &known, "orphan").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_fdatasync_is_never_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let mut calls = 0;
    let sync: SyncFile = Box::new(move |file, _| {
        calls += 1;
        if calls == 2 { Err(std::io::Error::other("the disk lost a page")) } else { file.sync_data() }
    });
    let disk = Disk::open(&dir.path().join("log"), Some(sync)).unwrap();
    let one = |value: u8| {
        let mut batch = WriteBatch::default();
        batch.put(b"key", &[value]);
        batch
    };
    disk.write(one(1)).await.unwrap();
    for value in 2..5 {
        // The call would succeed again, but what it would vouch for is not known any more.
        let error = disk.write(one(value)).await.unwrap_err().to_string();
        assert!(error.contains("lost a page"), "{error}");
    }
}
