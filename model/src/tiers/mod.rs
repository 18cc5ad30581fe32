//! Experts that do not all fit into memory.
//!
//! Two tiers lie beneath the memory that computes: host memory beneath a device's own, and disk beneath that. What lies
//! in host memory can be computed there too; [`device`] decides, as values, which experts are brought up to the device,
//! by their heat and by what moving and computing were measured to [cost](costs).
//!
//! What is needed next comes from disk while the rest is computed. [`residency`] decides, as values, what is read and
//! what goes; `shelf` carries it out with `readers`, threads that follow a [`recipe`] into a [`buffer`]; [`predict`]
//! says what the next layer will need before it is asked; [`fit`] divides a memory budget, and [`meter`] counts what
//! came of it all.
//!
//! The invariants: the budget is hard, because what is read goes past the page cache into memory that was counted
//! beforehand; and no result depends on what was read when, because expert outputs are added in one order however they
//! come. Where an expert was computed does show in the last bits where a device is of another kernel class than the host,
//! and is told. Nothing here knows sessions or peers.

use crate::layout::ExpertId;

pub mod buffer;
pub mod costs;
pub mod device;
pub mod fit;
mod heat;
pub mod meter;
pub mod predict;
mod readers;
pub mod recipe;
pub mod residency;
pub(crate) mod shelf;

pub use recipe::ReadError;

/// Why an expert cannot be kept on disk, or not be had from it. Requests that need it fail; others do not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TierError {
    #[error("{id} cannot be read: {why}")]
    Read { id: ExpertId, why: ReadError },
    #[error("there is no memory to read {id} into: {why}")]
    Memory { id: ExpertId, why: String },
    #[error("{id} takes {bytes} bytes in memory, and experts on disk have {budget} there")]
    TooSmall { id: ExpertId, bytes: u64, budget: u64 },
    #[error("reading threads cannot be started: {why}")]
    Start { why: String },
}
