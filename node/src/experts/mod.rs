//! Experts across nodes: the rows of one layer go to the hosts of their experts, and the outputs come back.
//!
//! A *home* has experts of other nodes computed; a *host* computes them.
//!
//! | module | role |
//! |---|---|
//! | [`call`] | the call of one layer's experts as a state machine: every decision, no I/O |
//! | [`dispatch`] | assigns (row, expert) pairs to hosts; pure |
//! | [`hosts`] | what a home has measured of its hosts: speed, queued rows, recent failures; pure |
//! | [`wire`] | calls and replies as frames; pure |
//! | [`class`] | kernel classes as text, and the bounds on it; pure |
//! | [`caller`] | the home's driver: sends, waits, and feeds the state machine |
//! | [`wait`](mod@wait) | how an answer waits for experts whose hosts are away |
//! | `watch` | who could compute some experts, as that changes |
//! | [`host`] | the host's driver: answers the calls of other nodes |
//!
//! The decoder knows none of this: it asks for experts and gets their outputs.
//!
//! Invariants:
//! - one attempt at a host is one frame in each direction, and carries each row once;
//! - a host computes only experts that it holds, from bytes that it has checked;
//! - a call ends exactly once: with every output, or with an error that names the missing experts and the nodes that should have them.

pub mod call;
pub mod caller;
pub mod class;
pub mod dispatch;
pub mod host;
pub mod hosts;
pub mod wait;
mod watch;
pub mod wire;
