//! Which file of a damaged sled database it is, and what is wrong with it, in words.
//!
//! sled says that something is wrong and seldom where. Its two small files end with a checksum of their own; where both are
//! whole, it is the database's large file.

use super::OpenError;
use std::fs;
use std::path::{Path, PathBuf};

/// Bytes at the end of sled's `conf`: a checksum.
const CONF_TAIL: usize = 4;
/// Bytes at the end of sled's snapshots: a length and a checksum.
const SNAPSHOT_TAIL: usize = 12;

/// Runs sled on files that may be damaged: some damage makes it panic.
pub(super) fn guarded<T>(run: impl FnOnce() -> sled::Result<T>) -> sled::Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run))
        .unwrap_or_else(|_| Err(sled::Error::ReportableBug("its pages contradict each other".into())))
}

/// What `error`, met while opening the database in `folder`, means.
pub(super) fn damaged(folder: &Path, error: &sled::Error) -> OpenError {
    let what = match error {
        sled::Error::Corruption { .. } => "its content does not match its checksums".into(),
        sled::Error::ReportableBug(what) | sled::Error::Unsupported(what) => what.clone(),
        other => other.to_string(),
    };
    OpenError::Damaged { path: damaged_file(folder), error: what }
}

fn damaged_file(folder: &Path) -> PathBuf {
    let files = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let damaged = files.into_iter().find(|path| match path.file_name().map(|name| name.to_string_lossy()) {
        Some(name) if name == "conf" => !is_whole(path, CONF_TAIL),
        Some(name) if name.starts_with("snap.") => !is_whole(path, SNAPSHOT_TAIL),
        _ => false,
    });
    damaged.unwrap_or_else(|| folder.join("db"))
}

/// Whether the checksum in the last four bytes is that of all but the last `tail`.
fn is_whole(path: &Path, tail: usize) -> bool {
    let bytes = fs::read(path).unwrap_or_default();
    let (Some(content), Some(checksum)) = (bytes.len().checked_sub(tail), bytes.last_chunk()) else { return false };
    crc32fast::hash(&bytes[..content]) == u32::from_le_bytes(*checksum)
}
