//! The one policy for a poisoned lock.
//!
//! A lock is poisoned when a thread panics while it holds it. In this crate nothing that runs under a lock can leave a
//! value half changed, so the value is taken as it is.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, whether it is poisoned or not.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
