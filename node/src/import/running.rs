//! Which import runs on this node, and how far it is.
//!
//! Owns [`Imports`]. Invariant: at most one import runs at a time, and it is shown from its beginning to its end.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, OwnedMutexGuard, watch};

/// How far an import is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportProgress {
    /// The checkpoint.
    pub dir: PathBuf,
    /// What is being done: what is counted, how many are done, of how many.
    pub what: String,
    pub done: u64,
    pub total: u64,
}

/// `/models/a: cutting weights, 45 %`.
impl std::fmt::Display for ImportProgress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = self.what.split(',').next().unwrap_or_default();
        write!(f, "{}: {what}", self.dir.display())?;
        match self.total {
            0 => Ok(()),
            total => write!(f, ", {} %", u128::from(self.done) * 100 / u128::from(total)),
        }
    }
}

/// The imports of one node. Cloning is cheap; all clones are the same node's.
#[derive(Debug, Clone, Default)]
pub struct Imports(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    turn: Arc<Mutex<()>>,
    running: watch::Sender<Option<ImportProgress>>,
}

/// The import that runs; over when dropped.
#[derive(Debug)]
pub(super) struct ImportGuard {
    imports: Imports,
    _turn: OwnedMutexGuard<()>,
}

impl Imports {
    /// Whether an import runs.
    pub fn is_running(&self) -> bool {
        self.0.turn.try_lock().is_err()
    }

    /// How far the running import is.
    pub fn progress(&self) -> Option<ImportProgress> {
        self.0.running.borrow().clone()
    }

    /// Begins an import of `dir`. An import of the same directory that runs already is waited for and `shown`: the next one finds
    /// what it has done.
    ///
    /// # Errors
    /// In words, where an import of another directory runs.
    pub(super) async fn begin(
        &self,
        dir: &Path,
        mut shown: impl FnMut(&ImportProgress),
    ) -> Result<ImportGuard, String> {
        let mut running = self.0.running.subscribe();
        loop {
            let now = running.borrow_and_update().clone();
            match now {
                Some(other) if other.dir != dir => {
                    return Err(format!("this node is importing another model ({other}); wait until that is done"));
                }
                Some(same) => shown(&same),
                None => {}
            }
            tokio::select! {
                turn = self.0.turn.clone().lock_owned() => {
                    let (dir, what) = (dir.to_owned(), "reading the checkpoint's headers".to_owned());
                    self.0.running.send_replace(Some(ImportProgress { dir, what, done: 0, total: 0 }));
                    return Ok(ImportGuard { imports: self.clone(), _turn: turn });
                }
                changed = running.changed() => changed.map_err(|error| error.to_string())?,
            }
        }
    }

    /// Shows how far the running import is.
    pub(super) fn set(&self, what: &str, done: u64, total: u64) {
        self.0.running.send_if_modified(|import| {
            let Some(import) = import else { return false };
            (import.what, import.done, import.total) = (what.to_owned(), done, total);
            true
        });
    }
}

impl Drop for ImportGuard {
    fn drop(&mut self) {
        self.imports.0.running.send_replace(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_import_says_how_far_it_is() {
        let importing = |done, total| {
            let (dir, what) = (PathBuf::from("/models/a"), "cutting weights, bytes".to_owned());
            ImportProgress { dir, what, done, total }.to_string()
        };
        assert_eq!(importing(1 << 62, 1 << 63), "/models/a: cutting weights, 50 %");
        assert_eq!(importing(0, 0), "/models/a: cutting weights");
    }

    #[tokio::test]
    async fn one_import_runs_at_a_time_and_the_same_directory_waits_for_its_turn() {
        let imports = Imports::default();
        let guard = imports.begin(Path::new("/models/a"), |_| ()).await.unwrap();
        imports.set("cutting weights, bytes", 1, 4);
        assert!(imports.is_running());
        let other = imports.begin(Path::new("/models/b"), |_| ()).await.unwrap_err();
        assert!(other.contains("/models/a: cutting weights, 25 %"), "{other}");
        let mut seen = Vec::new();
        {
            let again = imports.begin(Path::new("/models/a"), |progress| seen.push(progress.done));
            tokio::pin!(again);
            assert!(futures::poll!(&mut again).is_pending());
            drop(guard);
            drop(again.await.unwrap());
        }
        assert_eq!(seen.first(), Some(&1));
        assert!(!imports.is_running() && imports.progress().is_none());
    }
}
