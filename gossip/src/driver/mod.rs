//! The driver: feeds the pure half with what happens, and carries out what it returns.
//!
//! | module | idea |
//! |---|---|
//! | [`task`] | the one task that owns the swarm |
//! | [`connections`], [`dials`] | its tables: what is connected, and what is being dialled (plain values) |
//! | [`neighbours`] | the tasks that carry gossip to and from members |

mod connections;
mod dials;
pub(crate) mod neighbours;
mod task;

pub(crate) use task::{Command, DesiredState, Driver};
