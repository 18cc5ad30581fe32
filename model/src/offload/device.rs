//! Which experts have a copy in a device's memory, the others being in host memory beneath it: decisions only.
//!
//! Owns [`DeviceRoom`]. For each layer of a flight it hears which experts are needed by how many rows, and says which are
//! brought up and which go down for them; a driver carries that out at once. An expert is brought up for one of two
//! reasons. Moving it costs less than computing it where it is, for so many rows: prompts. Or it is used much more than
//! what it takes the place of ([`MARGIN`]); of these there are few in a layer ([`SWAPS_MAX`]), so that moving never
//! starves computing.
//!
//! Invariants: bytes on the device never exceed the budget; what a layer needs never goes down for another that it needs;
//! what is used most comes to be on the device. It knows neither devices nor weights, and no clock but its ticks.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use super::{costs::Costs, heat::Heat};
use coel_weights::layout::ExpertId;

/// How many times as hot an expert must be as what it takes the place of.
const MARGIN: f64 = 2.0;
/// Experts brought up in one layer that would cost less where they are.
const SWAPS_MAX: usize = 2;

/// An expert that a layer needs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Need {
    pub id: ExpertId,
    pub rows: usize,
    /// Of all rows.
    pub share: f64,
}

/// What the driver is to do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// Give up its place on the device.
    Demote(ExpertId),
    /// Bring it to the device.
    Promote(ExpertId),
}

/// What became of what was needed so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// Experts needed by a layer that were on the device.
    pub there: u64,
    /// That were brought there for it.
    pub brought: u64,
    /// That were computed in host memory.
    pub beneath: u64,
}

#[derive(Clone, Debug)]
struct Entry {
    bytes: u64,
    up: bool,
    heat: Heat,
    /// Counts up: when it was last needed.
    moved: u64,
}

#[derive(Clone, Debug)]
pub struct DeviceRoom {
    budget: u64,
    used: u64,
    /// Experts that are up.
    count: usize,
    entries: BTreeMap<ExpertId, Entry>,
    tick: u64,
    moves: u64,
    uses: Uses,
}

impl DeviceRoom {
    /// With `budget` bytes on the device.
    pub fn new(budget: u64) -> Self {
        Self { budget, used: 0, count: 0, entries: BTreeMap::new(), tick: 0, moves: 0, uses: Uses::default() }
    }

    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// Bytes of the experts that are up.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// How many experts are up.
    pub fn up_count(&self) -> usize {
        self.count
    }

    pub fn uses(&self) -> Uses {
        self.uses
    }

    /// What an expert takes on the device.
    pub fn bytes(&self, id: ExpertId) -> u64 {
        self.entries.get(&id).map_or(0, |entry| entry.bytes)
    }

    pub fn is_up(&self, id: ExpertId) -> bool {
        self.entries.get(&id).is_some_and(|entry| entry.up)
    }

    /// An expert in host memory which takes `bytes` on the device, perhaps in the place of another of this id.
    pub fn add(&mut self, id: ExpertId, bytes: u64) {
        let old = self.remove(id);
        let heat = old.map_or(Heat::NONE, |old| old.heat);
        self.entries.insert(id, Entry { bytes, up: false, heat, moved: 0 });
    }

    /// Forgets an expert, wherever it is.
    pub fn forget(&mut self, id: ExpertId) {
        self.remove(id);
    }

    fn remove(&mut self, id: ExpertId) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        if entry.up {
            self.used -= entry.bytes;
            self.count -= 1;
        }
        Some(entry)
    }

    /// Whether there is a free place for an expert, which is then its own.
    pub fn settle(&mut self, id: ExpertId) -> bool {
        let free = self.entries.get(&id).is_some_and(|entry| !entry.up && self.used + entry.bytes <= self.budget);
        if free {
            self.up(id, &mut Vec::new());
        }
        free
    }

    /// Gives places that have become free to those in host memory, the hottest first: so the device stays full, and host
    /// memory has no more than the rest.
    pub fn fill(&mut self, in_memory: impl Fn(ExpertId) -> bool) -> Vec<Move> {
        let down = self.entries.iter().filter(|(id, entry)| !entry.up && in_memory(**id));
        let mut down: Vec<(ExpertId, Heat)> = down.map(|(id, entry)| (*id, entry.heat)).collect();
        down.sort_by(|(_, hot), (_, hotter)| hotter.total_cmp(hot));
        down.retain(|(id, _)| self.settle(*id));
        down.into_iter().map(|(id, _)| Move::Promote(id)).collect()
    }

    /// A flight has begun.
    pub fn tick(&mut self) {
        self.tick += 1;
    }

    /// A layer needs these, all of which are on the device or in host memory.
    pub fn need(&mut self, needs: &[Need], costs: &Costs) -> Vec<Move> {
        let needed: BTreeSet<ExpertId> = needs.iter().map(|need| need.id).collect();
        let mut down = Vec::new();
        for need in needs {
            let Some(entry) = self.entries.get_mut(&need.id) else { continue };
            self.moves += 1;
            (entry.heat, entry.moved) = (entry.heat.after(self.tick, need.share), self.moves);
            match entry.up {
                true => self.uses.there += 1,
                false => down.push((*need, entry.heat)),
            }
        }
        down.sort_by(|(a, hot), (b, hotter)| hotter.total_cmp(hot).then(a.id.cmp(&b.id)));
        let (mut moves, mut swaps) = (Vec::new(), 0);
        for (need, heat) in down {
            if self.is_up(need.id) {
                continue; // it was named twice
            }
            let pays = costs.moving_pays(need.rows);
            let worth = (!pays).then(|| heat.over(MARGIN));
            let may_move = pays || swaps < SWAPS_MAX;
            if may_move && self.make_room(need.id, worth, &needed, &mut moves) {
                self.up(need.id, &mut moves);
                swaps += usize::from(!pays);
                self.uses.brought += 1;
            } else {
                self.uses.beneath += 1;
            }
        }
        moves
    }

    /// These, which are in host memory, will be needed next, it seems, the first most likely: as if they had been used
    /// once more.
    pub fn prefetch(&mut self, ids: &[ExpertId]) -> Vec<Move> {
        let (foreseen, mut moves) = (ids.iter().copied().collect(), Vec::new());
        let mut swaps = 0;
        for id in ids {
            let Some(entry) = self.entries.get(id).filter(|entry| !entry.up) else { continue };
            let worth = entry.heat.after(self.tick, 1.0).over(MARGIN);
            if swaps < SWAPS_MAX && self.make_room(*id, Some(worth), &foreseen, &mut moves) {
                self.up(*id, &mut moves);
                swaps += 1;
            }
        }
        moves
    }

    fn up(&mut self, id: ExpertId, moves: &mut Vec<Move>) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.up = true;
        self.used += entry.bytes;
        self.count += 1;
        moves.push(Move::Promote(id));
    }

    /// Makes the coldest go down until the expert has a place, or nothing at all: none that is `kept`, and none that is
    /// as hot as it is worth.
    fn make_room(
        &mut self,
        id: ExpertId,
        worth: Option<Heat>,
        kept: &BTreeSet<ExpertId>,
        moves: &mut Vec<Move>,
    ) -> bool {
        let Some(bytes) = self.entries.get(&id).map(|entry| entry.bytes) else { return false };
        let mut over = (self.used + bytes).saturating_sub(self.budget);
        if over == 0 {
            return true;
        }
        if bytes > self.budget {
            return false;
        }
        let may_go = |(id, entry): &(&ExpertId, &Entry)| {
            entry.up && !kept.contains(id) && worth.is_none_or(|worth| !entry.heat.is_at_least(&worth))
        };
        let mut victims: Vec<_> = self.entries.iter().filter(may_go).collect();
        // Among equals what was needed last: a pass over all experts comes back to it last.
        victims.sort_by(|(_, a), (_, b)| a.heat.total_cmp(&b.heat).then(Reverse(a.moved).cmp(&Reverse(b.moved))));
        let mut going = Vec::new();
        for (id, entry) in victims {
            if over == 0 {
                break;
            }
            going.push(*id);
            over = over.saturating_sub(entry.bytes);
        }
        if over > 0 {
            return false;
        }
        for id in going {
            let entry = self.entries.get_mut(&id).expect("it was found just now");
            entry.up = false;
            self.used -= entry.bytes;
            self.count -= 1;
            moves.push(Move::Demote(id));
        }
        true
    }
}

#[cfg(test)]
mod tests;
