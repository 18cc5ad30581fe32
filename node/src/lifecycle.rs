//! How a node's process ends: on request, after leaving the mesh, or by a fault.
//!
//! Owns [`Lifecycle`]. Invariants: a node that was asked to stop does not start again; of several faults the first counts. It does
//! not know who asks, nor what has to be stopped.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

/// The end of one node. Cloning is cheap; all clones are of the same node.
#[derive(Debug, Clone, Default)]
pub struct Lifecycle(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    stopping: CancellationToken,
    left: AtomicBool,
    fatal: Mutex<Option<String>>,
}

impl Lifecycle {
    /// Cancelled once the node is to stop.
    pub fn stopping(&self) -> &CancellationToken {
        &self.0.stopping
    }

    /// Asks every task to end.
    pub fn stop(&self) {
        self.0.stopping.cancel();
    }

    /// Stops the node with an error.
    pub fn fail(&self, why: String) {
        self.0.fatal.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.stop();
    }

    /// The first fatal fault.
    pub fn fatal(&self) -> Option<String> {
        self.0.fatal.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes that this node is no longer a member: its data folder forgets the mesh when it stops.
    pub fn set_left(&self) {
        self.0.left.store(true, Ordering::Release);
    }

    /// Whether this node has left the mesh.
    pub fn has_left(&self) -> bool {
        self.0.left.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_fault_counts_and_stops_the_node() {
        let lifecycle = Lifecycle::default();
        assert!(!lifecycle.stopping().is_cancelled());
        lifecycle.fail("the disk is gone".into());
        lifecycle.clone().fail("a task ended".into());
        assert!(lifecycle.stopping().is_cancelled());
        assert_eq!(lifecycle.fatal().as_deref(), Some("the disk is gone"));
        assert!(!lifecycle.has_left());
    }
}
