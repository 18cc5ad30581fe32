//! The log's folder inside a node's data folder: whose it is, and how it comes and goes.
//!
//! Invariants: a folder belongs to a member from the moment its marker is written, and without the marker its content never
//! counted; a log that is given up is kept under another name.

use super::error::{DamagedLog, LogError};
use super::sled_log::{Identity, SledLog, StoreError};
use super::state_machine::snapshot;
use crate::disk::{Disk, DiskError, OpenError, replace_file};
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
    move |error| OpenError::of_system(path, &error).into()
}

/// Prepares an empty log folder; removes what an unfinished attempt left.
pub fn open_fresh(dir: &Path) -> Result<Disk, LogError> {
    let path = log_dir(dir);
    if exists(dir) {
        return Err(LogError::AlreadyMember { path: dir.into() });
    }
    if path.exists() {
        // Opening it first proves that no other process uses it. Damage to it costs nothing.
        match Disk::open(&path, None) {
            Err(OpenError::Damaged { .. }) => {}
            opened => drop(opened?),
        }
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

/// Opens the log of the data folder `dir`, which belongs to a mesh, and reads all of it once.
///
/// # Errors
/// [`LogError::Damaged`] where it is not what was written, and the others.
pub async fn open_member(dir: &Path) -> Result<(Disk, SledLog, Identity), LogError> {
    if !exists(dir) {
        return Err(LogError::NotAMember { path: dir.into() });
    }
    let disk = Disk::open(&log_dir(dir), None).map_err(|error| match error {
        OpenError::Damaged { .. } => damaged(dir, error),
        other => other.into(),
    })?;
    let unreadable = |error: String| damaged(dir, OpenError::Damaged { path: log_dir(dir).join("db"), error });
    let read = async {
        let log = SledLog::open(disk.clone()).await?;
        log.check()?;
        snapshot(&disk)?;
        Ok((log.identity()?, log))
    };
    match read.await {
        Ok((Some(identity), log)) => Ok((disk, log, identity)),
        Ok((None, _)) => Err(unreadable("it does not say which node it is".into())),
        Err(error @ StoreError::Disk(DiskError::Full(_) | DiskError::Write { .. } | DiskError::Closed(_))) => {
            Err(error.into())
        }
        Err(error) => Err(unreadable(error.to_string())),
    }
}

/// What the log of the data folder `dir` being damaged means.
fn damaged(dir: &Path, damage: OpenError) -> LogError {
    let said = fs::read_to_string(marker(dir)).ok().filter(|said| said.len() < 100);
    let damaged = DamagedLog {
        damage,
        member: said.map_or_else(|| "the member that it was".into(), |said| said.trim().to_owned()),
        log: log_dir(dir),
        kept: free_name(dir, "damaged-log"),
    };
    Box::new(damaged).into()
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
    free_name(dir, &format!("log-of-{mesh}"))
}

fn free_name(dir: &Path, name: &str) -> PathBuf {
    let numbered = |n: u32| if n == 0 { name.to_owned() } else { format!("{name}-{n}") };
    let mut free = (0..).map(|n| dir.join(numbered(n))).filter(|path| !path.exists());
    free.next().expect("some number is free")
}

/// Makes `dir` a folder that belongs to no mesh, and keeps the log it had, damaged or not, under another name, which is returned.
///
/// # Errors
/// [`LogError`]; the log is at one of the two places then, as it was.
pub async fn set_aside(dir: &Path) -> Result<PathBuf, LogError> {
    let kept = match open_member(dir).await {
        Ok((disk, log, identity)) => {
            drop(log);
            close(disk).await;
            kept_log(dir, identity.mesh)
        }
        Err(LogError::Damaged(damaged)) => damaged.kept,
        Err(error) => return Err(error),
    };
    fs::rename(log_dir(dir), &kept).map_err(io_error(&kept))?;
    crate::disk::sync_folder(dir).map_err(io_error(dir))?;
    Ok(kept)
}
