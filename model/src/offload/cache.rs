//! A cache whose entries take turns in a memory of bounded size: decisions only.
//!
//! Owns [`Cache`]. Each entry has a size, a [`Score`] that grows with use, pins by those who need it now, and
//! predictions that it will be needed next. The cache decides which entries are resident, and which of them make room
//! for another: the coldest first, and among equals the one used last, because a pass over all entries comes back to it
//! last. Entries that are not resident keep their score. Policies on top of it decide which entry to bring, and when.
//!
//! Invariants:
//! - no admission takes resident entries and reservations beyond the capacity; after the capacity was made smaller, they
//!   exceed it only while [`shrink`](Cache::shrink) finds nothing that it may evict;
//! - a pinned entry is never evicted to make room;
//! - an admission evicts as much as it needs, or nothing.
//!
//! Nothing here moves bytes or knows experts, disks, devices or a clock other than its ticks.

use std::collections::BTreeMap;

use super::score::Score;

/// What a new resident may displace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Admission {
    /// Any entry that is not pinned; predicted ones last.
    Required,
    /// Only entries with a lower score than this that are neither pinned nor predicted.
    IfWorth(Score),
}

/// Bytes set aside for an entry whose load is under way. It must be given back to the cache it came from.
#[derive(Debug)]
#[must_use]
pub(super) struct Reservation {
    bytes: u64,
}

#[derive(Debug)]
struct Entry {
    bytes: u64,
    resident: bool,
    score: Score,
    /// The sequence number of the last use or of the end of a load, whichever came later.
    last_used: u64,
    pins: u32,
    predictions: u32,
}

#[derive(Debug)]
pub(super) struct Cache<Id> {
    capacity: u64,
    resident_bytes: u64,
    reserved_bytes: u64,
    resident_count: usize,
    entries: BTreeMap<Id, Entry>,
    tick: u64,
    /// Counts uses and loads.
    sequence: u64,
}

impl<Id: Copy + Ord> Cache<Id> {
    /// An empty cache of `capacity` bytes.
    pub(super) fn new(capacity: u64) -> Self {
        Self {
            capacity,
            resident_bytes: 0,
            reserved_bytes: 0,
            resident_count: 0,
            entries: BTreeMap::new(),
            tick: 0,
            sequence: 0,
        }
    }

    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Sets the capacity. A smaller one takes effect with the next [`shrink`](Self::shrink).
    pub(super) fn set_capacity(&mut self, capacity: u64) {
        self.capacity = capacity;
    }

    /// Bytes that are resident or reserved.
    pub(super) fn used(&self) -> u64 {
        self.resident_bytes + self.reserved_bytes
    }

    pub(super) fn resident_count(&self) -> usize {
        self.resident_count
    }

    /// Whether there is an entry, resident or not.
    pub(super) fn contains(&self, id: Id) -> bool {
        self.entries.contains_key(&id)
    }

    /// Bytes that an entry takes while it is resident.
    pub(super) fn bytes(&self, id: Id) -> Option<u64> {
        self.entries.get(&id).map(|entry| entry.bytes)
    }

    pub(super) fn is_resident(&self, id: Id) -> bool {
        self.entries.get(&id).is_some_and(|entry| entry.resident)
    }

    /// Entries that are not resident, with their scores.
    pub(super) fn absent(&self) -> impl Iterator<Item = (Id, Score)> {
        self.entries.iter().filter(|(_, entry)| !entry.resident).map(|(id, entry)| (*id, entry.score))
    }

    /// Adds an entry that is not resident. One that replaces another keeps its score, pins and predictions.
    pub(super) fn insert(&mut self, id: Id, bytes: u64) {
        self.evict(id);
        let (score, pins, predictions) =
            self.entries.get(&id).map_or((Score::NONE, 0, 0), |old| (old.score, old.pins, old.predictions));
        self.entries.insert(id, Entry { bytes, resident: false, score, last_used: 0, pins, predictions });
    }

    /// Forgets an entry, with its pins and predictions.
    pub(super) fn remove(&mut self, id: Id) {
        self.evict(id);
        self.entries.remove(&id);
    }

    /// Begins the next tick.
    pub(super) fn tick(&mut self) {
        self.tick += 1;
    }

    /// Counts a use by a share of the rows. The new score, or nothing if there is no such entry.
    pub(super) fn touch(&mut self, id: Id, share: f64) -> Option<Score> {
        let entry = self.entries.get_mut(&id)?;
        self.sequence += 1;
        entry.score = entry.score.after_use(self.tick, share);
        entry.last_used = self.sequence;
        Some(entry.score)
    }

    /// The score that an entry would have after one more use.
    pub(super) fn score_if_used(&self, id: Id, share: f64) -> Option<Score> {
        self.entries.get(&id).map(|entry| entry.score.after_use(self.tick, share))
    }

    /// Adds one pin: somebody needs the entry now.
    pub(super) fn pin(&mut self, id: Id) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.pins += 1;
        }
    }

    /// Takes one pin back.
    pub(super) fn unpin(&mut self, id: Id) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.pins -= 1;
        }
    }

    /// Adds one prediction: somebody will probably need the entry next.
    pub(super) fn predict(&mut self, id: Id) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.predictions += 1;
        }
    }

    /// Takes one prediction back.
    pub(super) fn unpredict(&mut self, id: Id) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.predictions -= 1;
        }
    }

    pub(super) fn is_pinned(&self, id: Id) -> bool {
        self.entries.get(&id).is_some_and(|entry| entry.pins > 0)
    }

    pub(super) fn is_predicted(&self, id: Id) -> bool {
        self.entries.get(&id).is_some_and(|entry| entry.predictions > 0)
    }

    /// Makes an absent entry resident. The entries that were evicted for it, or nothing if it was not admitted.
    pub(super) fn admit(&mut self, id: Id, admission: Admission) -> Option<Vec<Id>> {
        let bytes = self.absent_bytes(id)?;
        let evicted = self.make_room(bytes, admission)?;
        self.set_resident(id);
        Some(evicted)
    }

    /// Makes an absent entry resident if that evicts nothing; whether it did.
    pub(super) fn admit_if_free(&mut self, id: Id) -> bool {
        let free = self.absent_bytes(id).is_some_and(|bytes| self.used() + bytes <= self.capacity);
        if free {
            self.set_resident(id);
        }
        free
    }

    /// Sets bytes aside for the load of an absent entry, with the entries that were evicted for it; or nothing.
    pub(super) fn reserve(&mut self, id: Id, admission: Admission) -> Option<(Reservation, Vec<Id>)> {
        let bytes = self.absent_bytes(id)?;
        let evicted = self.make_room(bytes, admission)?;
        self.reserved_bytes += bytes;
        Some((Reservation { bytes }, evicted))
    }

    /// Makes an entry resident in the bytes that were reserved for it: its load has ended.
    pub(super) fn fulfil(&mut self, id: Id, reservation: Reservation) {
        debug_assert_eq!(self.absent_bytes(id), Some(reservation.bytes), "reserved for another entry");
        self.cancel(reservation);
        self.set_resident(id);
        if let Some(entry) = self.entries.get_mut(&id) {
            self.sequence += 1;
            entry.last_used = self.sequence;
        }
    }

    /// Frees reserved bytes: their load has ended in vain.
    pub(super) fn cancel(&mut self, reservation: Reservation) {
        self.reserved_bytes -= reservation.bytes;
    }

    /// Evicts an entry, pinned or not; whether it was resident.
    pub(super) fn evict(&mut self, id: Id) -> bool {
        let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.resident) else { return false };
        entry.resident = false;
        self.resident_bytes -= entry.bytes;
        self.resident_count -= 1;
        true
    }

    /// Evicts entries that are not pinned, predicted or not, until what is used is within the capacity or nothing more
    /// may be evicted. The evicted entries.
    pub(super) fn shrink(&mut self) -> Vec<Id> {
        let excess = self.used().saturating_sub(self.capacity);
        let (victims, _) = self.victims(excess, |entry| entry.pins == 0, |_| false);
        self.evict_all(victims)
    }

    /// Evicts entries until `bytes` fit; nothing if they cannot.
    fn make_room(&mut self, bytes: u64, admission: Admission) -> Option<Vec<Id>> {
        let excess = (self.used() + bytes).saturating_sub(self.capacity);
        let may_go = |entry: &Entry| match admission {
            Admission::Required => entry.pins == 0,
            Admission::IfWorth(worth) => entry.pins == 0 && entry.predictions == 0 && !entry.score.is_at_least(&worth),
        };
        let (victims, enough) = self.victims(excess, may_go, |entry| entry.predictions > 0);
        enough.then(|| self.evict_all(victims))
    }

    /// The residents that `may_go` to free `bytes`, in order of eviction, those that `go_last` after all others; and
    /// whether they free as much.
    fn victims(
        &self,
        bytes: u64,
        may_go: impl Fn(&Entry) -> bool,
        go_last: impl Fn(&Entry) -> bool,
    ) -> (Vec<Id>, bool) {
        if bytes == 0 {
            return (Vec::new(), true);
        }
        let residents = self.entries.iter().filter(|(_, entry)| entry.resident && may_go(entry));
        let mut residents: Vec<(&Id, &Entry)> = residents.collect();
        residents.sort_by(|(_, a), (_, b)| {
            let last = go_last(a).cmp(&go_last(b));
            last.then(a.score.total_cmp(&b.score)).then(b.last_used.cmp(&a.last_used))
        });
        let (mut victims, mut freed) = (Vec::new(), 0);
        for (id, entry) in residents {
            if freed >= bytes {
                break;
            }
            victims.push(*id);
            freed += entry.bytes;
        }
        (victims, freed >= bytes)
    }

    fn evict_all(&mut self, ids: Vec<Id>) -> Vec<Id> {
        for id in &ids {
            self.evict(*id);
        }
        ids
    }

    fn absent_bytes(&self, id: Id) -> Option<u64> {
        self.entries.get(&id).filter(|entry| !entry.resident).map(|entry| entry.bytes)
    }

    fn set_resident(&mut self, id: Id) {
        let Some(entry) = self.entries.get_mut(&id).filter(|entry| !entry.resident) else { return };
        entry.resident = true;
        self.resident_bytes += entry.bytes;
        self.resident_count += 1;
    }
}

#[cfg(test)]
mod tests;
