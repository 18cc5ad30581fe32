//! The pure half: what is known of the members, and what follows from it.
//!
//! | module | idea |
//! |---|---|
//! | [`state`] | adverts and anti-entropy: what this node says, hears and repairs |
//! | [`liveness`] | the failure detector |
//! | [`addresses`] | where members may be found |
//! | [`process`] | the processes of one node, and the proof that two of them live |
//! | [`status`] | 16 bits of load, and when they are worth a message |
//! | [`message`] | what nodes say to one another, and its bytes |
//! | [`measure`] | round-trip time and throughput |
//! | [`view`] | a member as the rest of the node sees it |
//!
//! Invariant: nothing here does I/O, reads a clock or draws a random number. `now` and the generator are arguments, effects
//! are returned as values.

pub mod addresses;
pub mod liveness;
pub mod measure;
pub mod message;
pub mod process;
pub mod state;
pub mod status;
pub mod view;
