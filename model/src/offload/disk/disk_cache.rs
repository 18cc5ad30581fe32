//! Which experts on disk are in memory, which are being read, and which must go: decisions only.
//!
//! Owns [`DiskCache`], the asynchronous policy on top of a [`Cache`]. Whoever computes with experts holds a claim,
//! which names the experts needed now and those predicted to be needed next. From all claims the policy decides what to
//! read and what to evict, and says so as [`Effect`]s. A driver carries these out and reports how each load ended. Time
//! is counted in ticks, one for each batch.
//!
//! A use counts with the share of a batch's rows that it was for. So a prompt that passes all experts once, in order,
//! adds next to nothing to their scores, and experts that are used token after token stay.
//!
//! Invariants: bytes in memory and on their way never exceed the capacity; an expert that a claim needs is not evicted
//! before it is computed, and either arrives or fails; a prefetched expert displaces only experts with a lower score
//! that no claim predicts. Nothing here knows disks or weights.

use std::collections::{BTreeMap, BTreeSet};

use crate::offload::{
    cache::{Admission, Cache, Reservation},
    score::HALF_LIFE,
};
use coel_weights::layout::ExpertId;

/// Loads under way that a claim waits for. More would evict experts earlier than necessary.
const URGENT_MAX: usize = 8;
/// Loads under way that no claim waits for yet.
const PREFETCH_MAX: usize = 4;
/// The share with which a predicted use counts: the score of an expert that is needed in as many ticks as predictions
/// come true, in nine of ten.
const PREDICTED_SHARE: f64 = 0.9 * HALF_LIFE / std::f64::consts::LN_2;

/// One that computes with experts: a batch, or a call of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ClaimId(pub(super) u64);

/// One read under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct LoadId(pub(super) u64);

/// What the driver has to do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Free the expert's memory.
    Evict(ExpertId),
    /// Read the expert into memory, before all prefetches if it is urgent.
    Read { id: ExpertId, load: LoadId, urgent: bool },
    /// A claim now waits for a load that was a prefetch.
    Hurry(LoadId),
    /// No claim wants the load any more. It still comes back.
    Abandon(LoadId),
}

/// What a complete load is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// The expert is in memory now.
    Kept(ExpertId),
    /// The expert was removed or replaced. The load's memory is free.
    Discarded,
}

/// Counters that only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Experts that were in memory when a claim came to need them.
    pub(crate) hits: u64,
    /// Experts that were not.
    pub(crate) misses: u64,
    /// Prefetches that were begun.
    pub(crate) prefetched: u64,
    /// Of these, the ones whose expert was needed afterwards.
    pub(crate) prefetch_used: u64,
}

#[derive(Clone, Debug, Default)]
struct Claim {
    /// Pinned, in the order in which they are to be read.
    needs: Vec<ExpertId>,
    /// The likeliest first.
    predicted: Vec<ExpertId>,
    failed: BTreeSet<ExpertId>,
}

#[derive(Debug)]
struct Load {
    id: ExpertId,
    reservation: Reservation,
    urgent: bool,
    abandoned: bool,
}

#[derive(Debug)]
pub(crate) struct DiskCache {
    cache: Cache<ExpertId>,
    claims: BTreeMap<ClaimId, Claim>,
    /// All loads under way, also for experts that were removed or replaced in the meantime.
    loads: BTreeMap<LoadId, Load>,
    /// The load that brings an expert that is not in memory.
    coming: BTreeMap<ExpertId, LoadId>,
    next_load: u64,
    /// Experts that were prefetched and not needed since.
    unused_prefetches: BTreeSet<ExpertId>,
    counts: Counts,
    effects: Vec<Effect>,
}

impl DiskCache {
    /// An empty cache of `capacity` bytes of memory.
    pub(super) fn new(capacity: u64) -> Self {
        Self {
            cache: Cache::new(capacity),
            claims: BTreeMap::new(),
            loads: BTreeMap::new(),
            coming: BTreeMap::new(),
            next_load: 0,
            unused_prefetches: BTreeSet::new(),
            counts: Counts::default(),
            effects: Vec::new(),
        }
    }

    pub(super) fn capacity(&self) -> u64 {
        self.cache.capacity()
    }

    /// Sets the capacity. If it is less than what is used, the coldest experts are evicted at once, and needed ones
    /// after they were computed. Until then more is used than the capacity.
    pub(super) fn set_capacity(&mut self, capacity: u64) {
        self.cache.set_capacity(capacity);
        self.pump();
    }

    /// Bytes in memory and on their way.
    #[cfg(test)]
    pub(super) fn used(&self) -> u64 {
        self.cache.used()
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    /// Adds an expert on disk that takes `bytes` in memory; whether it could ever fit. If it replaces another one of
    /// this id, the claims on that one hold for it.
    pub(super) fn add(&mut self, id: ExpertId, bytes: u64) -> bool {
        if bytes > self.cache.capacity() {
            return false;
        }
        self.leave(id);
        self.unused_prefetches.remove(&id);
        self.cache.insert(id, bytes);
        self.pump();
        true
    }

    /// Forgets an expert. To claims that need it, it has failed.
    pub(super) fn remove(&mut self, id: ExpertId) {
        self.leave(id);
        self.unused_prefetches.remove(&id);
        self.cache.remove(id);
        for claim in self.claims.values_mut() {
            claim.predicted.retain(|predicted| *predicted != id);
            if claim.needs.contains(&id) {
                claim.needs.retain(|need| *need != id);
                claim.failed.insert(id);
            }
        }
        self.pump();
    }

    /// Evicts an expert that is in memory; abandons the load of one that is coming and takes no notice of its end.
    fn leave(&mut self, id: ExpertId) {
        if self.cache.evict(id) {
            self.effects.push(Effect::Evict(id));
        }
        self.abandon(id);
        self.coming.remove(&id);
    }

    /// A batch begins.
    pub(super) fn tick(&mut self) {
        self.cache.tick();
    }

    /// `claim` needs these experts now, in this order. Its predictions were for now, and end.
    pub(super) fn need(&mut self, claim: ClaimId, ids: impl IntoIterator<Item = ExpertId>) {
        for id in ids {
            if !self.cache.contains(id) {
                continue;
            }
            let claim = self.claims.entry(claim).or_default();
            if claim.needs.contains(&id) {
                continue;
            }
            claim.failed.remove(&id);
            claim.needs.push(id);
            self.cache.pin(id);
            self.counts.prefetch_used += u64::from(self.unused_prefetches.remove(&id));
            if self.cache.is_resident(id) {
                self.counts.hits += 1;
                continue;
            }
            self.counts.misses += 1;
            if let Some((load_id, load)) = self.current_load(id)
                && !load.urgent
                && !load.abandoned
            {
                load.urgent = true;
                self.effects.push(Effect::Hurry(load_id));
            }
        }
        self.prefetch(claim, []);
    }

    /// `claim` will probably need these experts next, the likeliest first. They replace its former predictions.
    pub(super) fn prefetch(&mut self, claim: ClaimId, ids: impl IntoIterator<Item = ExpertId>) {
        let mut new: Vec<ExpertId> = Vec::new();
        for id in ids {
            if self.cache.contains(id) && !new.contains(&id) {
                new.push(id);
            }
        }
        for id in &new {
            self.cache.predict(*id);
        }
        let old = match self.claims.get_mut(&claim) {
            Some(claim) => std::mem::replace(&mut claim.predicted, new),
            None if new.is_empty() => Vec::new(),
            None => {
                self.claims.insert(claim, Claim { predicted: new, ..Claim::default() });
                Vec::new()
            }
        };
        for id in old {
            self.cache.unpredict(id);
            self.abandon_if_unwanted(id);
        }
        self.pump();
    }

    /// The experts that `claim` needs and can compute now, and those that have failed.
    pub(super) fn ready(&self, claim: ClaimId) -> Vec<ExpertId> {
        let Some(claim) = self.claims.get(&claim) else { return Vec::new() };
        let in_memory = claim.needs.iter().filter(|id| self.cache.is_resident(**id));
        in_memory.chain(&claim.failed).copied().collect()
    }

    /// `claim` has computed `id` for the given share of its rows, and needs it no more.
    pub(super) fn computed(&mut self, claim: ClaimId, id: ExpertId, share: f64) {
        let Some(claim) = self.claims.get_mut(&claim) else { return };
        claim.failed.remove(&id);
        let before = claim.needs.len();
        claim.needs.retain(|need| *need != id);
        if claim.needs.len() == before {
            return;
        }
        self.cache.unpin(id);
        self.cache.touch(id, share);
        self.pump();
    }

    /// Ends `claim`.
    pub(super) fn release(&mut self, claim: ClaimId) {
        let Some(claim) = self.claims.remove(&claim) else { return };
        for id in claim.needs {
            self.cache.unpin(id);
            self.abandon_if_unwanted(id);
        }
        for id in claim.predicted {
            self.cache.unpredict(id);
            self.abandon_if_unwanted(id);
        }
        self.pump();
    }

    /// Claims that are not released.
    pub(super) fn claims(&self) -> Vec<ClaimId> {
        self.claims.keys().copied().collect()
    }

    /// A load has ended and has read everything.
    pub(super) fn arrived(&mut self, load_id: LoadId) -> Arrival {
        let Some((Load { id, reservation, .. }, is_current)) = self.end_load(load_id) else {
            return Arrival::Discarded;
        };
        let arrival = if is_current {
            // Perhaps it was abandoned a moment too late.
            self.cache.fulfil(id, reservation);
            Arrival::Kept(id)
        } else {
            self.cache.cancel(reservation);
            Arrival::Discarded
        };
        self.pump();
        arrival
    }

    /// A load has ended in vain: it was abandoned, or it failed. After a failure no claim needs the expert any more;
    /// the claims that did are returned.
    pub(super) fn came_back(&mut self, load_id: LoadId, failed: bool) -> Vec<ClaimId> {
        let Some((Load { id, reservation, .. }, is_current)) = self.end_load(load_id) else { return Vec::new() };
        self.cache.cancel(reservation);
        let mut losers = Vec::new();
        if is_current {
            self.unused_prefetches.remove(&id);
            if failed {
                losers = self.fail(id);
            }
        }
        self.pump();
        losers
    }

    /// Takes a load off the list, and whether it was the one that its expert waited for.
    fn end_load(&mut self, load_id: LoadId) -> Option<(Load, bool)> {
        let load = self.loads.remove(&load_id)?;
        let is_current = self.coming.get(&load.id) == Some(&load_id);
        if is_current {
            self.coming.remove(&load.id);
        }
        Some((load, is_current))
    }

    /// Takes an expert that could not be read out of all claims. Those that needed it.
    fn fail(&mut self, id: ExpertId) -> Vec<ClaimId> {
        let mut losers = Vec::new();
        for (loser, claim) in &mut self.claims {
            // Another prefetch would fail again.
            if claim.predicted.contains(&id) {
                claim.predicted.retain(|predicted| *predicted != id);
                self.cache.unpredict(id);
            }
            if claim.needs.contains(&id) {
                claim.needs.retain(|need| *need != id);
                claim.failed.insert(id);
                self.cache.unpin(id);
                losers.push(*loser);
            }
        }
        losers
    }

    /// Takes the effects that were decided since the last call.
    pub(super) fn effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// Evicts what exceeds the capacity, then begins the loads that can begin: needed experts first.
    fn pump(&mut self) {
        if self.cache.used() > self.cache.capacity() {
            self.abandon_prefetches();
            let evicted = self.cache.shrink();
            self.effects.extend(evicted.into_iter().map(Effect::Evict));
        }
        let current = self.loads.values().map(|load| self.coming.get(&load.id).map(|current| &self.loads[current]));
        let mut urgent = current.flatten().filter(|load| load.urgent && !load.abandoned).count();
        let mut prefetches = self.loads.len() - urgent;
        let needed: Vec<ExpertId> = self.claims.values().flat_map(|claim| &claim.needs).copied().collect();
        for id in needed {
            if !self.is_on_disk_only(id) {
                continue;
            }
            if urgent >= URGENT_MAX {
                return;
            }
            if !self.begin_load(id, true) {
                self.abandon_prefetches();
                // Prefetches must not take what little memory there is.
                return;
            }
            urgent += 1;
        }
        let predicted: Vec<ExpertId> = self.claims.values().flat_map(|claim| &claim.predicted).copied().collect();
        for id in predicted {
            if !self.is_on_disk_only(id) {
                continue;
            }
            if prefetches >= PREFETCH_MAX || !self.begin_load(id, false) {
                return;
            }
            prefetches += 1;
        }
    }

    /// Whether an expert is neither in memory nor coming.
    fn is_on_disk_only(&self, id: ExpertId) -> bool {
        !self.cache.is_resident(id) && !self.coming.contains_key(&id)
    }

    /// Begins to read an expert if there is room for it, or room can be made; whether it did.
    fn begin_load(&mut self, id: ExpertId, urgent: bool) -> bool {
        let admission = match urgent {
            true => Some(Admission::Required),
            false => self.cache.score_if_used(id, PREDICTED_SHARE).map(Admission::IfWorth),
        };
        let reserved = admission.and_then(|admission| self.cache.reserve(id, admission));
        let Some((reservation, evicted)) = reserved else { return false };
        self.effects.extend(evicted.into_iter().map(Effect::Evict));
        let load = LoadId(self.next_load);
        self.next_load += 1;
        self.loads.insert(load, Load { id, reservation, urgent, abandoned: false });
        self.coming.insert(id, load);
        if urgent {
            self.unused_prefetches.remove(&id);
        } else {
            self.unused_prefetches.insert(id);
            self.counts.prefetched += 1;
        }
        self.effects.push(Effect::Read { id, load, urgent });
        true
    }

    fn current_load(&mut self, id: ExpertId) -> Option<(LoadId, &mut Load)> {
        let load_id = *self.coming.get(&id)?;
        self.loads.get_mut(&load_id).map(|load| (load_id, load))
    }

    /// Abandons the load of an expert, if there is one.
    fn abandon(&mut self, id: ExpertId) {
        if let Some((load_id, load)) = self.current_load(id)
            && !load.abandoned
        {
            load.abandoned = true;
            self.effects.push(Effect::Abandon(load_id));
        }
    }

    /// Abandons the load of an expert that no claim needs or predicts any more.
    fn abandon_if_unwanted(&mut self, id: ExpertId) {
        if !self.cache.is_pinned(id) && !self.cache.is_predicted(id) {
            self.abandon(id);
        }
    }

    /// Abandons all prefetches in favour of claims that wait.
    fn abandon_prefetches(&mut self) {
        let coming = self.coming.iter().filter(|(id, load)| !self.loads[load].urgent && !self.cache.is_pinned(**id));
        for id in coming.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.abandon(id);
        }
    }
}

#[cfg(test)]
mod tests;
