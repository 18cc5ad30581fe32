//! Where experts go: the leader's planner, pure.
//!
//! Owns the decision which node holds which expert. Its input is what the log and gossip say, as plain values; its output is
//! a complete table of replicas, or the reason why there can be none.
//!
//! Invariants, checked by the tests over random meshes:
//! - a node never gets more expert bytes than its budget leaves;
//! - nothing that is placed and still fits is moved (a move is a download);
//! - every expert is held once before any is held twice, and hot ones are held twice before cold ones;
//! - the same input gives the same plan on every node.
//!
//! It does not know how replicas get to their nodes, who is alive (the caller leaves the dead out), or what an expert computes.

mod handover;
mod planner;
mod popularity;

pub use handover::keep_until_replaced;
pub use planner::{Candidate, Plan, Shortfall, plan};
pub use popularity::Popularity;
