//! The tests that need more than one crate, in one program: real processes, real sockets, the bundled model.
//!
//! Each module is one promise to a user. The tests hold no clock to anything: every wait ends with an event, and time limits
//! are hang guards only. Those that start processes take turns (`support::turn`), because a mesh of three on two cores
//! beside another one would test the scheduler.

mod bad_input;
mod failover;
mod golden;
mod http_client;
mod import;
mod main_job;
mod membership;
mod paging;
mod policies;
mod precision;
mod strangers;
mod support;
mod tidy;
