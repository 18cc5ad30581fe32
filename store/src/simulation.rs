//! The log in a simulation: virtual time, simulated disks, one seed.
//!
//! The log runs as it is, the consensus library in it. A simulated network is a [`Transport`](crate::Transport).

pub use crate::disk::simulated::{DiskImage, SimulatedDisk};
pub use crate::log::simulated::{create, join, open, recover};
pub use crate::runtime::simulation::{Process, Simulation, Sleep};
