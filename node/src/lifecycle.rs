//! How a node ends: on request, after leaving the mesh, by a fault, or to be started anew.
//!
//! Owns [`Lifecycle`]. Invariants: of several faults the first counts. It does
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
    leaving: AtomicBool,
    left: AtomicBool,
    restarting: AtomicBool,
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

    /// Stops the node, to be started anew in this process.
    pub fn restart(&self) {
        self.0.restarting.store(true, Ordering::Release);
        self.stop();
    }

    /// Whether the node is to be started anew, since nothing else has ended it.
    pub fn is_restarting(&self) -> bool {
        self.0.restarting.load(Ordering::Acquire)
    }

    /// Notes that this node is about to say that it leaves, or stays after all.
    pub fn set_leaving(&self, leaving: bool) {
        self.0.leaving.store(leaving, Ordering::Release);
    }

    /// Whether it is by this node's own word if it is no member any more.
    pub fn is_leaving(&self) -> bool {
        self.0.leaving.load(Ordering::Acquire)
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
