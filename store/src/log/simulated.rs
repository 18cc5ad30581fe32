//! Logs on simulated disks, for [`crate::simulation`].

use super::error::LogError;
use super::handle::Log;
use super::network::Transport;
use super::recover::Survivor;
use super::sled_log::{Identity, SledLog};
use super::timing::Timing;
use crate::disk::simulated::SimulatedDisk;
use crate::ids::{MeshId, NodeId};
use crate::runtime;
use crate::state::MemberInfo;
use rand::Rng;
use std::sync::Arc;

/// [`Log::create`] on a disk that is empty.
///
/// # Errors
/// [`LogError`].
pub async fn create(
    disk: &SimulatedDisk,
    me: MemberInfo,
    transport: Arc<dyn Transport>,
    timing: Timing,
) -> Result<Log, LogError> {
    Log::create_on(disk.disk(), me, transport, timing).await
}

/// [`Log::join`] on a disk that is empty.
///
/// # Errors
/// [`LogError`].
pub async fn join(
    disk: &SimulatedDisk,
    node: NodeId,
    mesh: MeshId,
    transport: Arc<dyn Transport>,
    timing: Timing,
) -> Result<Log, LogError> {
    Log::start_fresh(disk.disk(), Identity { node, mesh }, transport, timing).await
}

/// [`Log::open`] of the log on a disk; `None` if it belongs to no member.
///
/// # Errors
/// [`LogError`].
pub async fn open(
    disk: &SimulatedDisk,
    transport: Arc<dyn Transport>,
    timing: Timing,
) -> Result<Option<Log>, LogError> {
    let disk = disk.disk();
    let log = SledLog::open(disk.clone()).await?;
    let Some(identity) = log.identity()? else { return Ok(None) };
    Log::start(disk, log, identity, false, transport, timing).await.map(Some)
}

/// What `coel recover` does to the log on a disk; `None` if it has nothing to go on from. No process may be using the disk.
///
/// # Errors
/// [`LogError`].
pub async fn recover(disk: &SimulatedDisk) -> Result<Option<MeshId>, LogError> {
    let disk = disk.disk();
    let log = SledLog::open(disk.clone()).await?;
    let Some(identity) = log.identity()? else { return Ok(None) };
    let Some(survivor) = Survivor::of(&disk, &log, identity)? else { return Ok(None) };
    let mesh = MeshId(runtime::rng().random());
    survivor.begin(&disk, &log, mesh).await?;
    Ok(Some(mesh))
}
