//! Which experts have a copy in a GPU's memory while the others are in host memory: decisions only.
//!
//! Owns [`DeviceCache`], the synchronous policy on top of a [`Cache`]. The driver names the experts that a layer of a
//! batch needs, and for how many rows; the policy answers with the experts to promote and to demote, and the driver
//! does so at once. Two reasons promote an expert. Either moving it costs less than computing it on the CPU for that
//! many rows, as for prompts; or it is used much more than those it displaces ([`MARGIN`]). Promotions of the second
//! kind are few in a layer ([`SWAPS_MAX`]), so that moving never starves computing.
//!
//! Invariants: bytes on the device never exceed the capacity; no expert that a layer needs is demoted for another one
//! that the layer needs; the experts that are used most end up on the device. Nothing here knows devices or weights, or
//! a clock other than its ticks.

use super::costs::Costs;
use crate::offload::{
    cache::{Admission, Cache},
    score::Score,
};
use coel_weights::layout::ExpertId;

/// How many times as much as its victims an expert must be used.
const MARGIN: f64 = 2.0;
/// Experts promoted in one layer although moving them costs more than computing them on the CPU.
const SWAPS_MAX: usize = 2;

/// An expert that a layer needs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Need {
    pub(crate) id: ExpertId,
    pub(crate) rows: usize,
    /// `rows` as a share of all rows of the batch.
    pub(crate) share: f64,
}

/// What the driver has to do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Move {
    /// Free the expert's memory on the device.
    Demote(ExpertId),
    /// Copy the expert to the device.
    Promote(ExpertId),
}

/// How often an expert that a layer needed was in each place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Uses {
    /// On the device already.
    pub(crate) hits: u64,
    /// Promoted for the layer.
    pub(crate) promoted: u64,
    /// Computed by the CPU.
    pub(crate) on_cpu: u64,
}

#[derive(Debug)]
pub(super) struct DeviceCache {
    cache: Cache<ExpertId>,
    uses: Uses,
}

impl DeviceCache {
    /// An empty cache of `capacity` bytes on the device.
    pub(super) fn new(capacity: u64) -> Self {
        Self { cache: Cache::new(capacity), uses: Uses::default() }
    }

    pub(super) fn capacity(&self) -> u64 {
        self.cache.capacity()
    }

    /// Bytes of the experts on the device.
    pub(super) fn used(&self) -> u64 {
        self.cache.used()
    }

    /// How many experts are on the device.
    pub(super) fn promoted_count(&self) -> usize {
        self.cache.resident_count()
    }

    pub(super) fn uses(&self) -> Uses {
        self.uses
    }

    /// Bytes that an expert takes on the device.
    pub(super) fn bytes(&self, id: ExpertId) -> u64 {
        self.cache.bytes(id).unwrap_or(0)
    }

    pub(super) fn is_promoted(&self, id: ExpertId) -> bool {
        self.cache.is_resident(id)
    }

    /// Adds an expert in host memory that takes `bytes` on the device. It replaces another one of this id.
    pub(super) fn add(&mut self, id: ExpertId, bytes: u64) {
        self.cache.insert(id, bytes);
    }

    /// Forgets an expert, wherever it is.
    pub(super) fn remove(&mut self, id: ExpertId) {
        self.cache.remove(id);
    }

    /// Promotes an expert if there is free space for it; whether there was.
    pub(super) fn promote_if_free(&mut self, id: ExpertId) -> bool {
        self.cache.admit_if_free(id)
    }

    /// Promotes experts for which `in_memory` holds into free space, those with the highest score first. The device
    /// stays full, and host memory holds only the rest.
    pub(super) fn fill(&mut self, in_memory: impl Fn(ExpertId) -> bool) -> Vec<Move> {
        let mut absent: Vec<(ExpertId, Score)> = self.cache.absent().filter(|(id, _)| in_memory(*id)).collect();
        absent.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        absent.retain(|(id, _)| self.promote_if_free(*id));
        absent.into_iter().map(|(id, _)| Move::Promote(id)).collect()
    }

    /// A batch begins.
    pub(super) fn tick(&mut self) {
        self.cache.tick();
    }

    /// A layer needs these experts, each of which is on the device or in host memory.
    pub(super) fn need(&mut self, needs: &[Need], costs: &Costs) -> Vec<Move> {
        let mut on_cpu = Vec::new();
        for need in needs {
            let Some(score) = self.cache.touch(need.id, need.share) else { continue };
            self.cache.pin(need.id);
            match self.cache.is_resident(need.id) {
                true => self.uses.hits += 1,
                false => on_cpu.push((*need, score)),
            }
        }
        on_cpu.sort_by(|(a, score), (b, higher)| higher.total_cmp(score).then(a.id.cmp(&b.id)));
        let (mut moves, mut swaps) = (Vec::new(), 0);
        for (need, score) in on_cpu {
            if self.is_promoted(need.id) {
                continue; // named twice
            }
            let pays = costs.moving_pays(need.rows);
            let admission = if pays { Admission::Required } else { Admission::IfWorth(score.divided_by(MARGIN)) };
            let may_move = pays || swaps < SWAPS_MAX;
            if may_move && self.promote(need.id, admission, &mut moves) {
                swaps += usize::from(!pays);
                self.uses.promoted += 1;
            } else {
                self.uses.on_cpu += 1;
            }
        }
        for need in needs {
            self.cache.unpin(need.id);
        }
        moves
    }

    /// These experts, which are in host memory, are predicted to be needed next, the likeliest first. Each counts as if
    /// it had been used once more.
    pub(super) fn prefetch(&mut self, ids: &[ExpertId]) -> Vec<Move> {
        for id in ids {
            self.cache.predict(*id);
        }
        let (mut moves, mut swaps) = (Vec::new(), 0);
        for id in ids {
            let Some(score) = self.cache.score_if_used(*id, 1.0).filter(|_| !self.is_promoted(*id)) else { continue };
            let admission = Admission::IfWorth(score.divided_by(MARGIN));
            if swaps < SWAPS_MAX && self.promote(*id, admission, &mut moves) {
                swaps += 1;
            }
        }
        for id in ids {
            self.cache.unpredict(*id);
        }
        moves
    }

    fn promote(&mut self, id: ExpertId, admission: Admission, moves: &mut Vec<Move>) -> bool {
        let Some(demoted) = self.cache.admit(id, admission) else { return false };
        moves.extend(demoted.into_iter().map(Move::Demote));
        moves.push(Move::Promote(id));
        true
    }
}

#[cfg(test)]
mod tests;
