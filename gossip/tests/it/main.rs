//! Real nodes on loopback: every test starts its own, on ports the system picks, and waits for states, not for fixed
//! times.

mod bench;
mod copies;
mod failure;
mod membership;
mod requests;
mod starting;
