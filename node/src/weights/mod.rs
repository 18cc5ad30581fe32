//! Weights between nodes: verified blobs over a stream protocol of their own, apart from expert calls.
//!
//! [`wire`] is the protocol, [`serve`] sends chunks to members, [`fetch`] gets whole blobs from members that have
//! them, and [`sources`] says in which order to ask.
//!
//! Invariants: a byte that does not match its chunk's hash in the manifest is neither kept nor used, and the error names who
//! sent it; what was received and verified is never asked for again, across restarts too.

pub mod fetch;
pub mod serve;
pub mod sources;
pub mod wire;
