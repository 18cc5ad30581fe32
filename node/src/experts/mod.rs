//! Experts across nodes: one token's rows to the hosts that hold its experts, and back.
//!
//! [`dispatch`] decides who computes what from what [`hosts`] remembers (both pure), [`wire`] says it in bytes (pure), [`caller`] is the home's side and
//! [`host`] the other one. The decoder knows none of this: it asked for experts and gets their outputs.
//!
//! Invariants:
//! - one frame per (layer, host) and direction, and each row once per host;
//! - a host computes only experts it holds, in bytes it has checked;
//! - a call ends: with every output, or with an error that names the missing experts and who should have had them.

pub mod caller;
pub mod dispatch;
pub mod host;
pub mod hosts;
pub mod wire;
