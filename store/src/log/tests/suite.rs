//! openraft's suite for storage implementations, on real files.

use crate::disk::Disk;
use crate::log::sled_log::SledLog;
use crate::log::state_machine::StateMachine;
use crate::log::types::{StorageError, TypeConfig};
use openraft::testing::{StoreBuilder, Suite};

struct OnDisk;

impl StoreBuilder<TypeConfig, SledLog, StateMachine, tempfile::TempDir> for OnDisk {
    async fn build(&self) -> Result<(tempfile::TempDir, SledLog, StateMachine), StorageError> {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(&dir.path().join("log"), None).unwrap();
        let log = SledLog::open(disk.clone()).await.unwrap();
        let (machine, _) = StateMachine::open(disk, Default::default()).unwrap();
        Ok((dir, log, machine))
    }
}

#[test]
fn openraft_accepts_the_store() {
    Suite::test_all(OnDisk).unwrap();
}
