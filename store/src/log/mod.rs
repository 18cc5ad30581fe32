//! The placement log: Raft (openraft) over sled, driven by a handle.
//!
//! | module | idea |
//! |---|---|
//! | [`handle`] | [`Log`]: opening, proposing, following, closing |
//! | [`folder`] | whose the log's folder is, and how it comes and goes |
//! | [`simulated`] | the same on simulated disks |
//! | [`recover`] | a new mesh from what one member has, by a person's word |
//! | [`propose`] | a command's way to the leader and back; the author of an entry |
//! | [`serve`], [`admission`] | the messages' way in: whom this node answers, and what |
//! | [`network`], [`rpc`] | the messages' way out, and their bytes |
//! | [`local`], [`admission_cache`] | shared by these: this node as a member, and the words it heard about strangers |
//! | [`state_machine`] | the replicated state, its publication and its snapshots |
//! | [`sled_log`] | log and vote on disk |
//! | [`voters`] | the choice of voters (pure) |
//! | [`election`], [`elections`] | when to stand for election: the pre-vote (pure), and its driver |
//! | [`async_runtime`] | the consensus library's tasks and clock |
//! | [`standing`], [`recall`] | whether this node's log is still what it was (pure), and whom it asks |
//! | [`types`], [`timing`], [`error`] | the consensus library's types, clocks and counts, and faults |
//!
//! Invariants: nothing is acknowledged before it is on this node's disk, and on a majority's; a node answers only members
//! of its own mesh; an entry's author is the member whose authenticated connection brought it; a mesh begins only by
//! [`Log::create`], or goes on by a person's [`Recovery`]; and a folder belongs to one member of one mesh until a person recovers
//! that mesh or sets its log aside.
//!
//! The log does not know what a connection is, or which members are up: the caller says so where it matters
//! ([`Log::reconcile`]).

mod admission;
mod admission_cache;
mod async_runtime;
mod election;
mod elections;
mod error;
mod folder;
mod handle;
mod local;
mod network;
mod propose;
mod recall;
mod recover;
mod rpc;
mod serve;
pub(crate) mod simulated;
mod sled_log;
mod standing;
mod state_machine;
mod timing;
mod types;
mod voters;

pub use error::{DamagedLog, LogError};
pub use handle::Log;
pub use network::{Transport, Unreachable};
pub use propose::ProposeError;
pub use recover::Recovery;
pub use rpc::{RPC_BYTES_MAX, RpcRefusal};
pub use standing::{Mark, Progress, Standing};
pub use timing::Timing;
pub use voters::{Presence, VOTERS_MAX, majority, voters, voters_among};

#[cfg(test)]
mod tests;
