//! An engine: one device, the thread that owns it, and the handles on it.
//!
//! | room | what it owns |
//! |---|---|
//! | [`engine`], [`session`] | the handles that callers hold |
//! | `jobs`, `state` | what goes to the compute thread, and what handles share with it |
//! | `worker` | the compute thread: takes jobs, survives panics |
//! | `batches`, [`scheduler`] | requests of sessions, and which rows form the next batch |
//! | `remote_calls` | expert calls of peers |
//! | `executor` | all tensors of the device: runs a batch through a layer |
//! | `batch` | a batch in flight: plain state |
//! | [`device`], [`pages`], [`ledger`], [`expert_source`] | which device; whose pages; what is counted; where to turn for other experts |
//!
//! Calls go one way: engine → worker → batches → executor → batch.

mod batch;
mod batches;
pub mod block_on;
pub mod device;
pub mod engine;
mod error;
mod executor;
pub mod expert_source;
mod jobs;
pub mod ledger;
mod options;
pub mod pages;
mod remote_calls;
pub mod scheduler;
pub mod session;
mod state;
mod worker;

pub use self::jobs::{Advanced, Routes};
