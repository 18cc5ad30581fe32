//! coel-testnet: a mesh of real node processes on one machine.
//!
//! Owns what a person would do by hand with three terminals: starting nodes with folders, identities and budgets of their
//! own ([`mesh`], [`node`], [`process`]), leading them from an import to an answer ([`job`], [`settle`], [`ask`]), damaging
//! what they keep ([`fault`]), and judging what came of it ([`report`], [`checks`]).
//!
//! The program executes itself again as a node: behind a hidden first argument it is the whole of `coel`, so one build is
//! enough and a test can hand in any program whose main function is [`main`].
//!
//! The invariant: nothing of a testnet outlives it, neither a process nor a folder. It deliberately does not know how a node
//! works: it sees what a
//! user sees (command line, control socket, HTTP, `/proc`), and the manifest that an import leaves ([`assigned`]).

pub mod ask;
pub mod assigned;
pub mod budget;
pub mod checks;
mod cli;
pub mod fault;
pub mod job;
pub mod mesh;
pub mod node;
pub mod process;
pub mod progress;
pub mod report;
pub mod settle;

use std::path::{Path, PathBuf};

pub use cli::main;

/// The model that lies in the repository.
pub fn bundled_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, |root| root.join("model/fixture"))
}
