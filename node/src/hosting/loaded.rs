//! The model that is loaded on this node: its engine, the experts it holds, the memory being loaded, and how far that is.
//!
//! Owns [`Loaded`]. Hosting alone changes it; everybody else reads. Invariants: an expert is among the held ones only while the engine
//! has it; experts on disk are among the held ones too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use coel_model::serve::engine::Engine;
use coel_store::{ExpertId, Precision};
use tokio::sync::watch;

use super::reservations::Reservations;
use crate::registry::ModelMeta;

/// A model with its engine: the trunk is loaded, experts come and go.
#[derive(Clone)]
pub struct LoadedModel {
    /// The model.
    pub meta: Arc<ModelMeta>,
    /// Where it computes.
    pub engine: Engine,
    /// At which precision the trunk is loaded.
    pub trunk: Precision,
}

impl LoadedModel {
    /// Kernel class and precisions of what is computed here, as told to other homes: `cpu/avx512/exact`, or
    /// `cpu/avx512/q4+q8` where experts of both took part.
    pub fn class(&self, precisions: &BTreeSet<Precision>) -> String {
        let names: Vec<_> = precisions.iter().map(|precision| precision.name()).collect();
        format!("{}/{}", self.engine.class(), names.join("+"))
    }
}

/// Experts that are held, and at which precision.
pub type HeldExperts = BTreeMap<ExpertId, Precision>;

/// How far this node is with what it was assigned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of the assigned blobs.
    pub bytes_assigned: u64,
    /// Of them, bytes held and verified.
    pub bytes_held: u64,
    /// A fault that waiting alone does not mend.
    pub problem: Option<String>,
}

/// What is loaded here. Cloning is cheap; all clones are the same node's.
#[derive(Clone, Default)]
pub struct Loaded(Arc<Inner>);

/// A [`Loaded`] that does not keep the engine alive. What the engine itself calls has one of these.
#[derive(Clone)]
pub struct WeakLoaded(Weak<Inner>);

#[derive(Default)]
struct Inner {
    model: watch::Sender<Option<LoadedModel>>,
    held: watch::Sender<Arc<HeldExperts>>,
    /// Of the held experts, those on disk, which are in memory by turns.
    paged: watch::Sender<Arc<BTreeSet<ExpertId>>>,
    reservations: Reservations,
    progress: watch::Sender<LoadProgress>,
}

impl WeakLoaded {
    /// What is loaded; `None` once the node is ending.
    pub fn upgrade(&self) -> Option<Loaded> {
        self.0.upgrade().map(Loaded)
    }
}

impl Loaded {
    /// A handle that does not keep the engine alive.
    pub fn downgrade(&self) -> WeakLoaded {
        WeakLoaded(Arc::downgrade(&self.0))
    }

    /// The model, once its trunk is loaded.
    pub fn model(&self) -> Option<LoadedModel> {
        self.0.model.borrow().clone()
    }

    /// The experts held in the engine, in memory or on disk.
    pub fn held(&self) -> Arc<HeldExperts> {
        self.0.held.borrow().clone()
    }

    /// Changes of the model.
    pub fn model_changes(&self) -> watch::Receiver<Option<LoadedModel>> {
        self.0.model.subscribe()
    }

    /// Changes of the held experts.
    pub fn held_changes(&self) -> watch::Receiver<Arc<HeldExperts>> {
        self.0.held.subscribe()
    }

    /// The experts held on disk.
    pub fn paged(&self) -> Arc<BTreeSet<ExpertId>> {
        self.0.paged.borrow().clone()
    }

    /// How far the node is.
    pub fn progress(&self) -> LoadProgress {
        self.0.progress.borrow().clone()
    }

    /// Bytes of this node's budget that its models take, loaded or being loaded.
    pub fn ledger_bytes(&self) -> u64 {
        let loaded = self.model().map_or(0, |model| model.engine.memory().total());
        loaded + self.0.reservations.bytes()
    }

    /// Memory of weights that are being loaded.
    pub(super) fn reservations(&self) -> &Reservations {
        &self.0.reservations
    }

    /// The trunk is loaded.
    pub(super) fn set_model(&self, model: LoadedModel) {
        self.0.model.send_replace(Some(model));
    }

    /// The engine holds the expert in memory.
    pub(super) fn add(&self, expert: ExpertId, precision: Precision) {
        self.0.held.send_modify(|held| {
            Arc::make_mut(held).insert(expert, precision);
        });
        self.set_paged(expert, false);
    }

    /// The engine holds the expert on disk.
    pub(super) fn add_paged(&self, expert: ExpertId, precision: Precision) {
        self.set_paged(expert, true);
        self.0.held.send_modify(|held| {
            Arc::make_mut(held).insert(expert, precision);
        });
    }

    /// The engine no longer holds the expert, or is about to drop it.
    pub(super) fn remove(&self, expert: ExpertId) {
        self.0.held.send_modify(|held| {
            Arc::make_mut(held).remove(&expert);
        });
        self.set_paged(expert, false);
    }

    fn set_paged(&self, expert: ExpertId, paged: bool) {
        self.0.paged.send_modify(|all| {
            let all = Arc::make_mut(all);
            if paged {
                all.insert(expert)
            } else {
                all.remove(&expert)
            };
        });
    }

    /// Bytes assigned to this node, and bytes of them held.
    pub(super) fn set_bytes(&self, assigned: u64, held: u64) {
        self.0.progress.send_modify(|progress| (progress.bytes_assigned, progress.bytes_held) = (assigned, held));
    }

    /// The fault that waiting alone does not mend; `None` where there is none.
    pub(super) fn set_problem(&self, problem: Option<String>) {
        self.0.progress.send_if_modified(|progress| {
            let news = progress.problem != problem;
            progress.problem = problem;
            news
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_on_disk_is_held_until_it_is_dropped_and_one_in_memory_is_not_paged() {
        let loaded = Loaded::default();
        let (one, two) = (ExpertId::new(0, 1), ExpertId::new(0, 2));
        loaded.add_paged(one, Precision::Q4);
        loaded.add(two, Precision::Q8);
        assert_eq!(*loaded.held(), HeldExperts::from([(one, Precision::Q4), (two, Precision::Q8)]));
        assert_eq!(*loaded.paged(), BTreeSet::from([one]));
        loaded.add(one, Precision::Q8);
        assert!(loaded.paged().is_empty(), "it came to memory");
        loaded.remove(two);
        assert_eq!(*loaded.held(), HeldExperts::from([(one, Precision::Q8)]));
        let weak = loaded.downgrade();
        drop(loaded);
        assert!(weak.upgrade().is_none());
    }
}
