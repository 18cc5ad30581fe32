//! The tests that need more than one crate, in one program: real processes, real sockets, the bundled model.
//!
//! Each module is one promise to a user. The tests measure no time: every wait ends with an event, and time limits are
//! only hang guards. Tests that start processes take turns (`support::turn`), because two meshes of three on two cores
//! would test the scheduler.

mod bad_input;
mod copies;
mod failover;
mod full_disk;
mod golden;
mod http_client;
mod import;
mod main_job;
mod membership;
mod paging;
mod policies;
mod power_cut;
mod precision;
mod recovery;
mod strangers;
mod support;
mod tidy;
