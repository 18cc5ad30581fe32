//! A coel node: joins the mesh, hosts experts, serves chats. A library, and the thin binary `coel`.
//!
//! The three leaves do the work and never meet: [`coel_gossip`] knows who is here and carries bytes, [`coel_model`] turns
//! tokens into tokens, [`coel_store`] knows what was agreed and keeps the weights. This crate wires them.
//!
//! Rooms from the bottom to the top; a room imports only rooms above it in this table:
//!
//! | room | what it decides or does |
//! |---|---|
//! | [`ids`], [`system`], [`metrics`], [`lifecycle`] | conversions between the leaves' ids; the operating system; counters; how a node ends |
//! | [`service`], [`http`] | what a node offers its users, and OpenAI's words for it |
//! | [`config`] | flags, file and environment, checked once |
//! | [`budget`] | pure: what a model takes in bytes, what fits, what a node can offer |
//! | [`placement`] | pure: which node holds which expert, how exactly; the leader's decisions |
//! | [`weights`], [`registry`] | verified blobs from peers; the models this node knows |
//! | [`mesh`] | the log's network, admission, the mesh as this node sees it, the leader's driver |
//! | [`import`] | a checkpoint becomes a registered model |
//! | [`hosting`] | gets, verifies, loads and reports the experts that the placement assigned |
//! | [`experts`] | one layer's rows to their hosts and back; failover |
//! | [`status`] | the status document, and whether a request would be served |
//! | [`generation`] | a prompt to an answer |
//! | [`control`] | commands on this machine |
//! | [`runtime`] | one node: its tasks and the handles each of them gets |
//! | [`cli`] | the commands of `coel` |
//!
//! Invariant: consensus is off the token's path. The log decides who holds experts; no token waits for it.

pub mod budget;
pub mod cli;
pub mod config;
pub mod control;
pub mod experts;
pub mod generation;
pub mod hosting;
pub mod http;
pub mod ids;
pub mod import;
pub mod lifecycle;
pub mod mesh;
pub mod metrics;
pub mod placement;
pub mod registry;
pub mod runtime;
pub mod service;
pub mod status;
pub mod system;
pub mod weights;
