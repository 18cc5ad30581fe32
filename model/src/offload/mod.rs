//! Experts that do not fit into the memory of the device that computes them.
//!
//! They are offloaded to two places: to host memory beside a GPU, where the CPU computes them (`cpu`), and to disk,
//! from where they are read while others are computed (`disk`). Each offload is a driver, which moves bytes, and a
//! policy, which decides as values. Both policies stand on one cache.
//!
//! | room | what it owns |
//! |---|---|
//! | `cpu` | the driver of CPU offload, its policy `DeviceCache`, and the measured costs of moving and computing |
//! | `disk` | the driver of disk offload, its policy `DiskCache`, read plans and reading threads |
//! | `cache` | capacity, pins, predictions and eviction, for any kind of entry |
//! | `score` | how much an entry is used |
//! | [`predict`] | which experts the next layer will need |
//! | [`meter`] | counters of all this |
//!
//! Arrows: driver → policy → cache → score.
//!
//! The invariants: budgets are hard, because experts are read into memory that was counted beforehand, past the page
//! cache; and no result depends on what was read when, because expert outputs are added in one order however they come.
//! An expert that the CPU computes beside a GPU may differ in its last bits; the usage of an answer then names the
//! CPU's kernel class. Nothing here knows sessions or peers.

use std::collections::HashMap;

use coel_kernels::DeviceExpert;
use coel_weights::{layout::ExpertId, memory::ReadError, slices::Precision};

mod cache;
pub(crate) mod cpu;
pub(crate) mod disk;
pub mod meter;
pub mod predict;
mod score;

/// Experts in the memory of the device that computes them, with their precisions.
pub(crate) type DeviceExperts = HashMap<ExpertId, (DeviceExpert, Precision)>;

/// Why an expert cannot be kept on disk, or cannot be read. Requests that need the expert fail; others do not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OffloadError {
    #[error("{id} cannot be read: {why}")]
    Read { id: ExpertId, why: ReadError },
    #[error("there is no memory to read {id} into: {why}")]
    Memory { id: ExpertId, why: String },
    #[error("{id} takes {bytes} bytes in memory, and experts on disk may take {budget}")]
    TooSmall { id: ExpertId, bytes: u64, budget: u64 },
    #[error("reading threads cannot be started: {why}")]
    Start { why: String },
}
