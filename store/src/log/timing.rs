//! The log's clocks and counts. The defaults are for machines that are busy computing; openraft's own are for a rack of
//! idle servers.

use super::error::LogError;
use openraft::SnapshotPolicy;
use std::sync::Arc;
use std::time::Duration;

/// The log's clocks and counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Period of the leader's heartbeats, in milliseconds. Also the longest a replication call may take before the next
    /// attempt.
    pub heartbeat_ms: u64,
    /// Shortest silence after which a voter stands for election; above `heartbeat_ms`.
    pub election_min_ms: u64,
    /// Longest such silence; above `election_min_ms`.
    pub election_max_ms: u64,
    /// How long one snapshot chunk may take.
    pub snapshot_chunk_ms: u64,
    /// A snapshot is taken, and the log before it dropped, after this many entries.
    pub snapshot_after: u64,
    /// Entries kept behind a snapshot, for members that are a little late.
    pub entries_kept: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat_ms: 250,
            election_min_ms: 1500,
            election_max_ms: 3000,
            snapshot_chunk_ms: 10_000,
            snapshot_after: 500,
            entries_kept: 100,
        }
    }
}

impl Timing {
    pub(crate) fn election_max(&self) -> Duration {
        Duration::from_millis(self.election_max_ms)
    }

    /// The consensus library's configuration, if the values make sense together.
    pub(crate) fn config(&self) -> Result<Arc<openraft::Config>, LogError> {
        let Self { heartbeat_ms, election_min_ms, election_max_ms, .. } = *self;
        if !(heartbeat_ms < election_min_ms && election_min_ms < election_max_ms) {
            return Err(LogError::Timing(format!(
                "a heartbeat every {heartbeat_ms} ms, elections after {election_min_ms} to {election_max_ms} ms of silence"
            )));
        }
        let vote_ms = (2 * heartbeat_ms).max(election_min_ms * 2 / 5);
        let config = openraft::Config {
            cluster_name: "coel".into(),
            heartbeat_interval: self.heartbeat_ms,
            // `election` decides when to stand. The first of these is how long a voter may take to save and send its vote; the
            // second, for how long after a leader was heard a vote is refused: a dead leader is not replaced sooner.
            enable_elect: false,
            election_timeout_min: vote_ms,
            election_timeout_max: vote_ms + 1,
            install_snapshot_timeout: self.snapshot_chunk_ms,
            max_payload_entries: 64,
            // A member further behind gets the snapshot. More than the entries kept, or a snapshot
            // would not help it.
            replication_lag_threshold: self.snapshot_after + self.entries_kept,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(self.snapshot_after),
            snapshot_max_chunk_size: 1 << 20,
            max_in_snapshot_log_to_keep: self.entries_kept,
            ..openraft::Config::default()
        };
        config.validate().map(Arc::new).map_err(|error| LogError::Timing(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conflicting_times_are_named() {
        assert!(Timing::default().config().is_ok());
        let timing = Timing { heartbeat_ms: 2000, ..Timing::default() };
        let message = timing.config().unwrap_err().to_string();
        assert!(message.contains("2000") && message.contains("1500"), "{message}");
    }
}
