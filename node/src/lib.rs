//! A coel node: joins the mesh, hosts experts, serves chats. A library, and the thin binary `coel`.
//!
//! The three leaves do the work and never meet: [`coel_gossip`] knows who is here and carries bytes, [`coel_model`] turns
//! tokens into tokens, [`coel_store`] knows what was agreed and keeps the weights. This crate wires them.
//!
//! | room | what it decides or does |
//! |---|---|
//! | [`admission`], [`mesh`] | who gets in; the log's transport; the leader's duties |
//! | [`placement`], [`policies`] | pure: which node holds which expert, how exactly; other rules to compare that with |
//! | [`hosting`], [`weights`], [`library`] | gets, verifies, loads and reports what the placement assigned |
//! | [`experts`] | one layer's rows to their hosts and back; failover |
//! | [`generation`], [`service`], [`http`] | a prompt to an answer, and OpenAI's words for it |
//! | [`runtime`], [`shared`] | one node: its tasks and what they share |
//! | [`cli`], [`config`], [`control`], [`commands`], [`status`] | people and their commands |
//!
//! Invariant: consensus is off the token's path. The log decides who holds experts; no token waits for it.

pub mod admission;
pub mod cli;
pub mod commands;
pub mod config;
pub mod control;
pub mod experts;
pub mod generation;
pub mod hosting;
pub mod http;
pub mod ids;
pub mod import;
pub mod library;
pub mod mesh;
pub mod metrics;
pub mod placement;
pub mod policies;
pub mod report;
pub mod runtime;
pub mod service;
pub mod shared;
pub mod size;
pub mod status;
pub mod telemetry;
pub mod weights;
