//! Which experts are in memory, which come, and which must go: decisions only.
//!
//! Owns [`Residency`]. Those who compute make claims: experts that they need now, and experts that they foresee to need
//! next. From these it decides what to read and what to evict, and says so as [`Effect`]s, which a driver carries out;
//! the driver reports how each load ended. The clock is what it is told: one tick for each flight.
//!
//! Evicted is what was least worth having: every use of an expert adds to its [`Heat`], and a use counts half as much
//! some ticks later. A prompt's flight passes all experts once in order, so what it used once weighs next to
//! nothing, and what was hot before survives it.
//!
//! Invariants: bytes in memory and on their way never exceed the budget; what a claim needs is never evicted before it
//! was computed, and comes, or has failed; what is read ahead takes the place only of what is colder than what it brings.
//! The same type serves any two tiers; it knows neither disks nor weights.

use std::collections::{BTreeMap, BTreeSet};

use super::heat::{HALF_LIFE, Heat};
use coel_weights::layout::ExpertId;

/// Loads under way for those who wait. More would evict earlier than need be.
const URGENT_MAX: usize = 8;
/// Loads under way that nobody waits for yet.
const AHEAD_MAX: usize = 4;
/// How a foreseen use counts against uses that were: as those of an expert that is needed in so many of all ticks as
/// predictions come true.
const FORESEEN_WEIGHT: f64 = 0.9 * HALF_LIFE / std::f64::consts::LN_2;

/// One who computes with experts: a flight, or a duty for a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClaimId(pub u64);

/// One read under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LoadId(pub u64);

/// What the driver is to do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Let go of its memory.
    Evict(ExpertId),
    /// Read it into memory of so many bytes.
    Read { id: ExpertId, load: LoadId, urgent: bool },
    /// Somebody waits for it by now.
    Hurry(LoadId),
    /// It is not wanted any more; it still comes back.
    Abandon(LoadId),
}

/// What a load that came back is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It is in memory now.
    Kept(ExpertId),
    /// Nobody has a use for it; its memory is free.
    Discarded,
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Needed and in memory.
    pub hits: u64,
    /// Needed and not in memory.
    pub misses: u64,
    /// Read ahead, or begun to be.
    pub ahead: u64,
    /// Of these, needed before they were evicted.
    pub ahead_used: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    Disk,
    Coming { load: LoadId, urgent: bool, abandoned: bool },
    Memory,
}

#[derive(Clone, Debug)]
struct Entry {
    bytes: u64,
    at: Where,
    heat: Heat,
    /// Counts up: when it came, or was last computed.
    moved: u64,
    /// Read ahead and not used yet.
    ahead: bool,
    /// Claims that need it, and claims that foresee it.
    needed: u32,
    foreseen: u32,
}

#[derive(Clone, Debug, Default)]
struct Claim {
    /// In the order in which they are to come.
    needs: Vec<ExpertId>,
    /// The likeliest first.
    foresees: Vec<ExpertId>,
    failed: BTreeSet<ExpertId>,
}

#[derive(Clone, Debug)]
pub struct Residency {
    budget: u64,
    /// In memory and on their way.
    used: u64,
    entries: BTreeMap<ExpertId, Entry>,
    claims: BTreeMap<ClaimId, Claim>,
    /// What is on its way, also for experts that were dropped meanwhile.
    loads: BTreeMap<LoadId, (ExpertId, u64)>,
    next_load: u64,
    moves: u64,
    tick: u64,
    counts: Counts,
    effects: Vec<Effect>,
}

impl Residency {
    /// With memory for `budget` bytes.
    pub fn new(budget: u64) -> Self {
        Self {
            budget,
            used: 0,
            entries: BTreeMap::new(),
            claims: BTreeMap::new(),
            loads: BTreeMap::new(),
            next_load: 0,
            moves: 0,
            tick: 0,
            counts: Counts::default(),
            effects: Vec::new(),
        }
    }

    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// Another budget from now on. Where it is less than what is used, the coldest go at once, and what is needed now when it was
    /// computed; until then [`used`](Self::used) is more than the budget.
    pub fn set_budget(&mut self, budget: u64) {
        self.budget = budget;
        self.pump();
    }

    /// Makes the coldest go until what is used is within the budget, or nothing more may go.
    fn shrink(&mut self) {
        while self.used > self.budget {
            self.abandon_ahead();
            let may_go = self.entries.iter().filter(|(_, entry)| entry.at == Where::Memory && entry.needed == 0);
            let coldest = may_go.min_by(|(_, a), (_, b)| a.heat.total_cmp(&b.heat).then(b.moved.cmp(&a.moved)));
            let Some((&id, _)) = coldest else { return };
            self.leave(id);
        }
    }

    /// Bytes in memory and on their way.
    pub fn used(&self) -> u64 {
        self.used
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// A new expert on disk, which takes `bytes` in memory; whether it could ever fit. In the place of another of this
    /// id, it is needed by those who need that one.
    pub fn add(&mut self, id: ExpertId, bytes: u64) -> bool {
        if bytes > self.budget {
            return false;
        }
        let old = self.entries.get(&id).cloned();
        if old.is_some() {
            self.leave(id);
        }
        let (heat, needed, foreseen) = old.map_or((Heat::NONE, 0, 0), |old| (old.heat, old.needed, old.foreseen));
        let entry = Entry { bytes, at: Where::Disk, heat, moved: 0, ahead: false, needed, foreseen };
        self.entries.insert(id, entry);
        self.pump();
        true
    }

    /// Forgets an expert. Those who need it find it failed.
    pub fn remove(&mut self, id: ExpertId) {
        self.leave(id);
        self.entries.remove(&id);
        for claim in self.claims.values_mut() {
            claim.foresees.retain(|foreseen| *foreseen != id);
            if claim.needs.contains(&id) {
                claim.needs.retain(|need| *need != id);
                claim.failed.insert(id);
            }
        }
        self.pump();
    }

    /// Gives up what memory an expert has or is to have.
    fn leave(&mut self, id: ExpertId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        match entry.at {
            Where::Disk => {}
            Where::Memory => {
                self.used -= entry.bytes;
                self.effects.push(Effect::Evict(id));
            }
            Where::Coming { load, abandoned, .. } => {
                if !abandoned {
                    self.effects.push(Effect::Abandon(load));
                }
            }
        }
        entry.at = Where::Disk;
    }

    /// A flight has begun.
    pub fn tick(&mut self) {
        self.tick += 1;
    }

    /// `claim` needs these now, in this order. What it foresaw is over: that was for now.
    pub fn need(&mut self, claim: ClaimId, ids: impl IntoIterator<Item = ExpertId>) {
        for id in ids {
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            let claim = self.claims.entry(claim).or_default();
            if claim.needs.contains(&id) {
                continue;
            }
            claim.failed.remove(&id);
            claim.needs.push(id);
            entry.needed += 1;
            self.counts.ahead_used += u64::from(entry.ahead);
            entry.ahead = false;
            match &mut entry.at {
                Where::Memory => self.counts.hits += 1,
                Where::Coming { load, urgent, abandoned } => {
                    self.counts.misses += 1;
                    if !*urgent && !*abandoned {
                        *urgent = true;
                        self.effects.push(Effect::Hurry(*load));
                    }
                }
                Where::Disk => self.counts.misses += 1,
            }
        }
        self.prefetch(claim, []);
    }

    /// `claim` will need these next, it seems, the first most likely; what it foresaw before is forgotten.
    pub fn prefetch(&mut self, claim: ClaimId, ids: impl IntoIterator<Item = ExpertId>) {
        let mut new: Vec<ExpertId> = Vec::new();
        for id in ids {
            if self.entries.contains_key(&id) && !new.contains(&id) {
                new.push(id);
            }
        }
        let old = match self.claims.get_mut(&claim) {
            Some(claim) => std::mem::replace(&mut claim.foresees, new.clone()),
            None if new.is_empty() => return self.pump(),
            None => {
                self.claims.entry(claim).or_default().foresees = new.clone();
                Vec::new()
            }
        };
        for id in &new {
            self.entries.get_mut(id).expect("filtered above").foreseen += 1;
        }
        for id in old {
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            entry.foreseen -= 1;
            self.unwanted(id);
        }
        self.pump();
    }

    /// Stops reading ahead what nobody foresees or needs any more.
    fn unwanted(&mut self, id: ExpertId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if let Where::Coming { load, abandoned: abandoned @ false, .. } = &mut entry.at
            && entry.needed == 0
            && entry.foreseen == 0
        {
            *abandoned = true;
            self.effects.push(Effect::Abandon(*load));
        }
    }

    /// What `claim` needs and can compute now; also what has failed.
    pub fn ready(&self, claim: ClaimId) -> Vec<ExpertId> {
        let Some(claim) = self.claims.get(&claim) else { return Vec::new() };
        let here = claim.needs.iter().filter(|id| self.entries[*id].at == Where::Memory);
        here.chain(&claim.failed).copied().collect()
    }

    /// `claim` has computed `id` for the given share of its rows.
    pub fn computed(&mut self, claim: ClaimId, id: ExpertId, share: f64) {
        let Some(claim) = self.claims.get_mut(&claim) else { return };
        claim.failed.remove(&id);
        let before = claim.needs.len();
        claim.needs.retain(|need| *need != id);
        if claim.needs.len() == before {
            return;
        }
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.needed -= 1;
        entry.heat = entry.heat.after(self.tick, share);
        self.moves += 1;
        entry.moved = self.moves;
        self.pump();
    }

    /// `claim` needs nothing any more.
    pub fn release(&mut self, claim: ClaimId) {
        let Some(claim) = self.claims.remove(&claim) else { return };
        for id in claim.needs {
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.needed -= 1;
                self.unwanted(id);
            }
        }
        for id in claim.foresees {
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.foreseen -= 1;
                self.unwanted(id);
            }
        }
        self.pump();
    }

    /// A load has come, whole.
    pub fn arrived(&mut self, load: LoadId) -> Arrival {
        let Some((id, bytes)) = self.loads.remove(&load) else { return Arrival::Discarded };
        self.moves += 1;
        let moves = self.moves;
        let arrival = match self.entries.get_mut(&id) {
            // Also one that was abandoned a moment too late: it is here now.
            Some(entry) if matches!(entry.at, Where::Coming { load: mine, .. } if mine == load) => {
                entry.at = Where::Memory;
                entry.moved = moves;
                Arrival::Kept(id)
            }
            _ => {
                self.used -= bytes;
                Arrival::Discarded
            }
        };
        self.pump();
        arrival
    }

    /// A load has come back without its bytes: abandoned, or failed, in which case the claims that need the expert are
    /// returned and need it no more.
    pub fn came_back(&mut self, load: LoadId, failed: bool) -> Vec<ClaimId> {
        let Some((id, bytes)) = self.loads.remove(&load) else { return Vec::new() };
        self.used -= bytes;
        let mut losers = Vec::new();
        if let Some(entry) = self.entries.get_mut(&id)
            && matches!(entry.at, Where::Coming { load: mine, .. } if mine == load)
        {
            entry.at = Where::Disk;
            entry.ahead = false;
            if failed {
                for (loser, claim) in &mut self.claims {
                    // Nor is it read ahead again at once.
                    if claim.foresees.contains(&id) {
                        claim.foresees.retain(|foreseen| *foreseen != id);
                        entry.foreseen -= 1;
                    }
                    if claim.needs.contains(&id) {
                        claim.needs.retain(|need| *need != id);
                        claim.failed.insert(id);
                        entry.needed -= 1;
                        losers.push(*loser);
                    }
                }
            }
        }
        self.pump();
        losers
    }

    /// What there is to do.
    pub fn effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// Begins what can begin.
    fn pump(&mut self) {
        self.shrink();
        let (mut urgent, mut ahead) = (0, 0);
        for (id, _) in self.loads.values() {
            match self.entries.get(id).map(|entry| entry.at) {
                Some(Where::Coming { urgent: true, abandoned: false, .. }) => urgent += 1,
                _ => ahead += 1,
            }
        }
        let needed: Vec<ExpertId> = self.claims.values().flat_map(|claim| &claim.needs).copied().collect();
        for id in needed {
            if self.entries[&id].at != Where::Disk {
                continue;
            }
            if urgent >= URGENT_MAX || !self.make_room(self.entries[&id].bytes, None) {
                // What is read ahead must not take what little there is.
                return;
            }
            self.begin(id, true);
            urgent += 1;
        }
        let foreseen: Vec<ExpertId> = self.claims.values().flat_map(|claim| &claim.foresees).copied().collect();
        for id in foreseen {
            let Entry { bytes, at, heat, .. } = self.entries[&id];
            if at != Where::Disk {
                continue;
            }
            let worth = heat.after(self.tick, FORESEEN_WEIGHT);
            if ahead >= AHEAD_MAX || !self.make_room(bytes, Some(worth)) {
                return;
            }
            self.begin(id, false);
            ahead += 1;
        }
    }

    fn begin(&mut self, id: ExpertId, urgent: bool) {
        let load = LoadId(self.next_load);
        self.next_load += 1;
        let entry = self.entries.get_mut(&id).expect("it was looked up just now");
        entry.at = Where::Coming { load, urgent, abandoned: false };
        entry.ahead = !urgent;
        self.counts.ahead += u64::from(!urgent);
        self.used += entry.bytes;
        self.loads.insert(load, (id, entry.bytes));
        self.effects.push(Effect::Read { id, load, urgent });
    }

    /// Evicts the coldest until `bytes` more fit, or nothing at all. What is read ahead must be worth more than what
    /// goes, and spares what others have foreseen.
    fn make_room(&mut self, bytes: u64, worth: Option<Heat>) -> bool {
        let mut over = (self.used + bytes).saturating_sub(self.budget);
        if over == 0 {
            return true;
        }
        let may_go = |entry: &Entry| {
            let spared = worth.is_some_and(|worth| entry.foreseen > 0 || entry.heat.is_at_least(&worth));
            entry.at == Where::Memory && entry.needed == 0 && !spared
        };
        let mut victims: Vec<_> = self.entries.iter().filter(|(_, entry)| may_go(entry)).collect();
        // Among equals what was computed last: a pass over all experts comes back to it last.
        victims.sort_by(|(_, a), (_, b)| {
            let foreseen = (a.foreseen > 0).cmp(&(b.foreseen > 0));
            foreseen.then(a.heat.total_cmp(&b.heat)).then(b.moved.cmp(&a.moved))
        });
        let mut going = Vec::new();
        for (id, entry) in victims {
            going.push(*id);
            over = over.saturating_sub(entry.bytes);
            if over == 0 {
                break;
            }
        }
        if over > 0 {
            if worth.is_none() {
                self.abandon_ahead();
            }
            return false;
        }
        for id in going {
            self.leave(id);
        }
        true
    }

    /// Gives up what is read ahead, for the sake of those who wait.
    fn abandon_ahead(&mut self) {
        for entry in self.entries.values_mut() {
            if let Where::Coming { load, urgent: false, abandoned: abandoned @ false } = &mut entry.at
                && entry.needed == 0
            {
                *abandoned = true;
                self.effects.push(Effect::Abandon(*load));
            }
        }
    }
}

#[cfg(test)]
mod tests;
