//! Why an engine refuses or fails a job.

use coel_weights::{error::LoadError, layout::ExpertId, memory::ReadError};

use crate::{
    nn::batch::DecodeError,
    offload::OffloadError,
    serve::{device::DeviceError, expert_source::SourceError},
};

/// Why an engine refused or failed a job.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Offload(#[from] OffloadError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("{0} is not held here")]
    NotHeld(ExpertId),
    #[error("{0} does not exist in this model")]
    NoSuchExpert(ExpertId),
    #[error("the trunk is not loaded")]
    NoTrunk,
    #[error("the trunk is already loaded")]
    TrunkLoaded,
    #[error("{wanted} tokens of cache are wanted and {free} are free now; try again when a request has ended")]
    Busy { wanted: usize, free: usize },
    #[error("{wanted} tokens of cache are wanted, but at most {limit} can be had here (context and KV pool)")]
    TooLong { wanted: usize, limit: usize },
    #[error("a malformed expert call: {0}")]
    Call(String),
    #[error("the compute thread cannot be started: {0}")]
    Start(String),
    /// This job is lost. The compute thread goes on, or says later why it could not.
    #[error("the compute thread panicked over this request: {0}")]
    Panicked(String),
    /// The compute thread has ended for good.
    #[error("the compute thread has failed: {0}; restart the process")]
    Failed(String),
    #[error("the compute thread has stopped")]
    Stopped,
}
