//! Damage to the database's files, as a failing disk or a careless copy does it: it is found and named when the log is opened, or
//! it has cost nothing.

use super::power_cut::{PAGE, check, entry, freeze, live, thaw};
use crate::disk::{Disk, OpenError};
use crate::log::sled_log::SledLog;
use openraft::storage::RaftLogStorageExt;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_damage_loses_in_silence_what_was_acknowledged() {
    let mut rng = StdRng::seed_from_u64(5);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut known = live(Disk::open(&path, None).unwrap(), 40, &mut rng, |_| ()).await;
    // sled writes a snapshot of its own when it opens; entries come after it.
    let mut log = SledLog::open(Disk::open(&path, None).unwrap()).await.unwrap();
    let next = known.entries.last().unwrap().log_id.index + 1;
    for index in next..next + 10 {
        let new = entry(9, index, 500);
        log.blocking_append([new.clone()]).await.unwrap();
        known.entries.push(new);
    }
    drop(log);
    let whole = freeze(&path);
    check(&whole, &known, "undamaged").await;
    let (mut found, mut harmless) = (0, 0);
    for case in 0..300 {
        let mut files = whole.clone();
        let index = rng.random_range(0..files.len());
        let (name, bytes) = &mut files[index];
        let at = rng.random_range(0..bytes.len());
        let damage = match case % 3 {
            0 => {
                bytes.truncate(at);
                "cut off"
            }
            1 => {
                bytes[at] ^= 1 << (case % 8);
                "one bit flipped"
            }
            _ => {
                let end = bytes.len().min(at + PAGE);
                bytes[at..end].fill(0);
                "a page of zeros"
            }
        };
        let (name, what) = (name.clone(), format!("case {case}: {} at {at}: {damage}", name.display()));
        let dir = thaw(&files);
        match Disk::open(&dir.path().join("log"), None) {
            Ok(disk) => {
                drop(disk);
                check(&files, &known, &what).await;
                harmless += 1;
            }
            Err(OpenError::Damaged { path, error }) => {
                assert_eq!(path.file_name(), Some(name.as_os_str()), "{what}: {error}");
                found += 1;
            }
            Err(other) => panic!("{what}: {other}"),
        }
    }
    // Most of the large file is free space, and sled does without the first bytes of `conf`.
    assert!(found > 100 && harmless > 0, "{found} found, {harmless} harmless");
}
