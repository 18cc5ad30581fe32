//! Experts that do not all fit where they are computed.
//!
//! Two offloads lie below the memory that computes: host memory beside a GPU's own, and disk. An expert in host memory can
//! be computed there too; [`device`] decides, as values, which experts are promoted to the GPU, by their score and by what
//! moving and computing were measured to [cost](costs), and [`cpu`] carries it out.
//!
//! Experts on disk are read while others are computed. [`residency`] decides, as values, what is read and what is evicted;
//! [`disk`] carries it out with `readers`, threads that follow a [`read_plan`]; [`predict`] says what the next layer will
//! need before it is asked; [`meter`] counts what came of it all.
//!
//! The invariants: a budget is hard, because what is read goes past the page cache into memory that was counted
//! beforehand; and no result depends on what was read when, because expert outputs are added in one order however they
//! come. An expert that the CPU computes beside a GPU may differ in its last bits; an answer's usage names the CPU's
//! kernel class then. Nothing here knows sessions or peers.

use std::collections::HashMap;

use coel_kernels::DeviceExpert;
use coel_weights::{layout::ExpertId, memory::ReadError, slices::Precision};

pub mod costs;
pub(crate) mod cpu;
pub mod device;
pub(crate) mod disk;
mod heat;
pub mod meter;
pub mod predict;
pub mod read_plan;
mod readers;
pub mod residency;

/// Experts where a device computes them, and their precisions.
pub(crate) type DeviceExperts = HashMap<ExpertId, (DeviceExpert, Precision)>;

/// Why an expert cannot be kept on disk, or cannot be read from it. Requests that need it fail; others do not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OffloadError {
    #[error("{id} cannot be read: {why}")]
    Read { id: ExpertId, why: ReadError },
    #[error("there is no memory to read {id} into: {why}")]
    Memory { id: ExpertId, why: String },
    #[error("{id} takes {bytes} bytes in memory, and experts on disk have {budget} there")]
    TooSmall { id: ExpertId, bytes: u64, budget: u64 },
    #[error("reading threads cannot be started: {why}")]
    Start { why: String },
}
