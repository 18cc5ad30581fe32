//! The log's folder inside a node's data folder: whose it is, and how it comes and goes.
//!
//! Invariants: a folder belongs to a member from the moment its marker is written, and without the marker its content never
//! counted; a log that is given up is kept under another name.

use super::error::LogError;
use super::sled_log::{Identity, SledLog};
use crate::disk::{Disk, OpenError, replace_file};
use crate::ids::MeshId;
use std::fs;
use std::path::{Path, PathBuf};

pub fn log_dir(dir: &Path) -> PathBuf {
    dir.join("log")
}

/// Written last when a folder becomes a member's. Without it the folder's content never counted.
fn marker(dir: &Path) -> PathBuf {
    log_dir(dir).join("member")
}

pub fn io_error(path: &Path) -> impl Fn(std::io::Error) -> LogError + '_ {
    move |error| OpenError::Io { path: path.into(), error: error.to_string() }.into()
}

/// Prepares an empty log folder; removes what an unfinished attempt left.
pub fn open_fresh(dir: &Path) -> Result<Disk, LogError> {
    let path = log_dir(dir);
    if exists(dir) {
        return Err(LogError::AlreadyMember { path: dir.into() });
    }
    if path.exists() {
        // Opening it first proves that no other process uses it.
        drop(Disk::open(&path, None)?);
        fs::remove_dir_all(&path).map_err(io_error(&path))?;
    }
    Ok(Disk::open(&path, None)?)
}

pub fn mark(dir: &Path, identity: Identity) -> Result<(), LogError> {
    let path = marker(dir);
    let line = format!("node {} of mesh {}\n", identity.node, identity.mesh);
    replace_file(&path, line.as_bytes()).map_err(io_error(&path))
}

/// Whether the data folder `dir` belongs to a mesh.
pub fn exists(dir: &Path) -> bool {
    marker(dir).exists()
}

/// Opens the log of the data folder `dir`, which belongs to a mesh.
pub async fn open_member(dir: &Path) -> Result<(Disk, SledLog, Identity), LogError> {
    if !exists(dir) {
        return Err(LogError::NotAMember { path: dir.into() });
    }
    let disk = Disk::open(&log_dir(dir), None)?;
    let log = SledLog::open(disk.clone()).await?;
    let identity = log
        .identity()?
        .ok_or_else(|| OpenError::Damaged { path: log_dir(dir), error: "it does not say which node it is".into() })?;
    Ok((disk, log, identity))
}

/// Closes a database; its files are free when this returns.
pub async fn close(disk: Disk) {
    // Closing waits for the writer thread.
    if let Ok(closed) = tokio::task::spawn_blocking(move || disk.closed()).await {
        closed.await;
    }
}

/// Where the log of a former mesh is kept: a name in `dir` that is free.
pub fn kept_log(dir: &Path, mesh: MeshId) -> PathBuf {
    let name = |n: u32| if n == 0 { format!("log-of-{mesh}") } else { format!("log-of-{mesh}-{n}") };
    let mut free = (0..).map(|n| dir.join(name(n))).filter(|path| !path.exists());
    free.next().expect("some number is free")
}

/// Makes `dir` a folder that belongs to no mesh, and keeps the log it had under another name, which is returned.
///
/// # Errors
/// [`LogError`]; the log is at one of the two places then, whole.
pub async fn set_aside(dir: &Path) -> Result<PathBuf, LogError> {
    let (disk, log, identity) = open_member(dir).await?;
    drop(log);
    close(disk).await;
    let kept = kept_log(dir, identity.mesh);
    fs::rename(log_dir(dir), &kept).map_err(io_error(&kept))?;
    crate::disk::sync_folder(dir).map_err(io_error(dir))?;
    Ok(kept)
}
