//! The gossip protocol as a state machine: what this node says, what it knows of the others, and what it sends.
//!
//! Owns: one record per member, merged by (incarnation, version), and this node's own record.
//! Invariants: only records of members are kept; a record never goes back to an older stamp; only this node raises the
//! versions of its own record.
//! Deliberately does not know: connections, liveness, time sources or randomness. `now` and the generator are
//! arguments, effects are returned.
//!
//! News is pushed straight to every linked member, because members keep connections to each other. Anti-entropy repairs
//! what a push misses (a full queue, a lost connection, two members that cannot reach each other): now and then a random
//! member gets a digest of all stamps, answers with what is newer and asks for what it lacks. Digests grow with the mesh,
//! and so does their period, which bounds their cost per second.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use libp2p::PeerId;
use rand::Rng;
use rand::seq::IteratorRandom;

use super::message::{
    Advert, DELTA_BYTES_SOFT_MAX, DIGEST_ENTRIES_MAX, DIGEST_ENTRY_BYTES, Message, Stamp, Versioned, advert_bytes,
};
use super::status::{self, Policy, Publisher, Status};

/// Bytes per second one node spends on digests, at most.
const DIGEST_BYTES_PER_S: f64 = 4096.0;
/// Bytes of a whole round per byte of its digest: one digest each way, and records about as large.
const DIGEST_ROUND_FACTOR: f64 = 6.0;
const ANTI_ENTROPY_PERIOD_MIN: Duration = Duration::from_secs(1);

/// What is known of one origin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Record {
    pub incarnation: u64,
    pub status: Option<Versioned<Status>>,
    pub facts: Option<Versioned<Bytes>>,
}

#[derive(Clone, Debug)]
pub(crate) enum Input {
    SetStatus(Status),
    SetFacts(Bytes),
    SetMembers(BTreeSet<PeerId>),
    /// Messages to this peer are carried from now on.
    Linked(PeerId),
    Unlinked(PeerId),
    Received(PeerId, Message),
    Tick,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    Send {
        to: PeerId,
        message: Message,
    },
    /// The record of this member changed.
    Changed(PeerId),
    /// This member itself said that it is leaving.
    Left(PeerId),
}

#[derive(Debug)]
pub(crate) struct State {
    me: PeerId,
    own: Record,
    publisher: Publisher,
    /// Set when the facts changed and were not yet pushed.
    facts_unsent: bool,
    facts_sent: Option<Instant>,
    gap: Duration,
    members: BTreeSet<PeerId>,
    linked: BTreeSet<PeerId>,
    records: BTreeMap<PeerId, Record>,
    anti_entropy_at: Instant,
    out: Vec<Output>,
}

impl Record {
    fn stamp(&self) -> Stamp {
        Stamp {
            incarnation: self.incarnation,
            status: self.status.as_ref().map_or(0, |status| status.version),
            facts: self.facts.as_ref().map_or(0, |facts| facts.version),
        }
    }

    /// The part of this record that a node lacks whose stamp of it is `known`.
    fn newer_than(&self, origin: PeerId, known: Stamp) -> Option<Advert> {
        let known = match self.incarnation.cmp(&known.incarnation) {
            std::cmp::Ordering::Less => return None,
            std::cmp::Ordering::Equal => known,
            std::cmp::Ordering::Greater => Stamp::default(),
        };
        let status = self.status.clone().filter(|status| status.version > known.status);
        let facts = self.facts.clone().filter(|facts| facts.version > known.facts);
        let restarted = self.incarnation > known.incarnation;
        (restarted || status.is_some() || facts.is_some()).then_some(Advert {
            origin,
            incarnation: self.incarnation,
            status,
            facts,
        })
    }

    /// Takes over what is newer in `advert`; returns whether anything was.
    fn merge(&mut self, advert: Advert) -> bool {
        if advert.incarnation < self.incarnation {
            return false;
        }
        let mut changed = false;
        if advert.incarnation > self.incarnation {
            *self = Record { incarnation: advert.incarnation, status: None, facts: None };
            changed = true;
        }
        let known = self.stamp();
        if let Some(status) = advert.status.filter(|status| status.version > known.status) {
            self.status = Some(status);
            changed = true;
        }
        if let Some(facts) = advert.facts.filter(|facts| facts.version > known.facts) {
            self.facts = Some(facts);
            changed = true;
        }
        changed
    }
}

/// Whether `theirs` tells of anything that `ours` does not.
fn is_ahead(theirs: Stamp, ours: Stamp) -> bool {
    theirs.incarnation > ours.incarnation
        || theirs.incarnation == ours.incarnation && (theirs.status > ours.status || theirs.facts > ours.facts)
}

/// Time between two digests in a mesh of `members` (this node included).
fn anti_entropy_period(members: usize) -> Duration {
    let bytes = DIGEST_ROUND_FACTOR * members as f64 * DIGEST_ENTRY_BYTES as f64;
    Duration::from_secs_f64(bytes / DIGEST_BYTES_PER_S).max(ANTI_ENTROPY_PERIOD_MIN)
}

impl State {
    /// `incarnation`: when this process started, in milliseconds since the Unix epoch.
    pub fn new(me: PeerId, incarnation: u64, policy: Policy, now: Instant) -> State {
        State {
            me,
            own: Record { incarnation, status: None, facts: None },
            gap: policy.gap,
            publisher: Publisher::new(policy),
            facts_unsent: false,
            facts_sent: None,
            members: BTreeSet::new(),
            linked: BTreeSet::new(),
            records: BTreeMap::new(),
            anti_entropy_at: now + ANTI_ENTROPY_PERIOD_MIN,
            out: Vec::new(),
        }
    }

    pub fn record(&self, peer: &PeerId) -> Option<&Record> {
        self.records.get(peer)
    }

    pub fn incarnation(&self) -> u64 {
        self.own.incarnation
    }

    pub fn handle(&mut self, input: Input, now: Instant, rng: &mut impl Rng) -> Vec<Output> {
        match input {
            Input::SetStatus(status) => self.publish_status(status::Input::Set(status), now),
            Input::SetFacts(facts) => self.set_facts(facts, now),
            Input::SetMembers(members) => self.set_members(members),
            Input::Linked(peer) => self.greet(peer),
            Input::Unlinked(peer) => {
                self.linked.remove(&peer);
            }
            Input::Received(from, message) => self.receive(from, message),
            Input::Tick => {
                self.publish_status(status::Input::Tick, now);
                self.publish_facts(now);
                self.repair(now, rng);
            }
        }
        std::mem::take(&mut self.out)
    }

    fn publish_status(&mut self, input: status::Input, now: Instant) {
        let Some(value) = self.publisher.handle(input, now) else {
            return;
        };
        let version = self.own.stamp().status + 1;
        self.own.status = Some(Versioned { version, value });
        self.push(Advert { origin: self.me, facts: None, ..self.own_advert() });
    }

    fn set_facts(&mut self, facts: Bytes, now: Instant) {
        if self.own.facts.as_ref().is_some_and(|own| own.value == facts) {
            return;
        }
        let version = self.own.stamp().facts + 1;
        self.own.facts = Some(Versioned { version, value: facts });
        self.facts_unsent = true;
        self.publish_facts(now);
    }

    /// Facts are bulky, so they keep the same gap as the status.
    fn publish_facts(&mut self, now: Instant) {
        let early = self.facts_sent.is_some_and(|at| now.saturating_duration_since(at) < self.gap);
        if !self.facts_unsent || early {
            return;
        }
        self.facts_unsent = false;
        self.facts_sent = Some(now);
        self.push(Advert { status: None, ..self.own_advert() });
    }

    fn set_members(&mut self, mut members: BTreeSet<PeerId>) {
        members.remove(&self.me);
        self.records.retain(|peer, _| members.contains(peer));
        self.linked.retain(|peer| members.contains(peer));
        self.members = members;
    }

    fn own_advert(&self) -> Advert {
        let Record { incarnation, status, facts } = self.own.clone();
        Advert { origin: self.me, incarnation, status, facts }
    }

    fn send(&mut self, to: PeerId, message: Message) {
        self.out.push(Output::Send { to, message });
    }

    fn push(&mut self, advert: Advert) {
        for to in self.linked.clone() {
            self.send(to, Message::Delta(vec![advert.clone()]));
        }
    }

    /// Greets a fresh link: this node's own record, and a digest now instead of at the next period.
    fn greet(&mut self, peer: PeerId) {
        if !self.members.contains(&peer) {
            return;
        }
        self.linked.insert(peer);
        self.send(peer, Message::Delta(vec![self.own_advert()]));
        let digest = self.digest();
        self.send(peer, Message::Digest(digest));
    }

    fn repair(&mut self, now: Instant, rng: &mut impl Rng) {
        if now < self.anti_entropy_at {
            return;
        }
        // Jitter keeps nodes that started together from falling into step.
        self.anti_entropy_at = now + anti_entropy_period(self.members.len() + 1).mul_f64(rng.random_range(0.9..1.1));
        if let Some(&to) = self.linked.iter().choose(rng) {
            let digest = self.digest();
            self.send(to, Message::Digest(digest));
        }
    }

    fn digest(&self) -> Vec<(PeerId, Stamp)> {
        let own = (self.me, self.own.stamp());
        let others = self.records.iter().map(|(peer, record)| (*peer, record.stamp()));
        std::iter::once(own).chain(others).take(DIGEST_ENTRIES_MAX).collect()
    }

    fn receive(&mut self, from: PeerId, message: Message) {
        if !self.members.contains(&from) {
            return;
        }
        match message {
            Message::Delta(adverts) => adverts.into_iter().for_each(|advert| self.merge(advert)),
            Message::Digest(entries) => {
                let theirs: BTreeMap<PeerId, Stamp> = entries.iter().copied().collect();
                let known = |peer: &PeerId| theirs.get(peer).copied().unwrap_or_default();
                let mut news: Vec<Advert> = Vec::new();
                news.extend(self.own.newer_than(self.me, known(&self.me)));
                news.extend(self.records.iter().filter_map(|(peer, record)| record.newer_than(*peer, known(peer))));
                self.send_delta(from, news);
                self.ask_for_missing(from, &entries);
            }
            Message::Wanted(entries) => {
                let record = |peer: &PeerId| {
                    if *peer == self.me { Some(&self.own) } else { self.records.get(peer) }
                };
                let news = entries.iter().filter_map(|(peer, known)| record(peer)?.newer_than(*peer, *known));
                let news = news.collect();
                self.send_delta(from, news);
            }
            Message::Bye { incarnation } => {
                // A late farewell of an earlier process must not take down the present one.
                if self.records.get(&from).is_none_or(|record| record.incarnation <= incarnation) {
                    self.out.push(Output::Left(from));
                }
            }
        }
    }

    fn ask_for_missing(&mut self, from: PeerId, entries: &[(PeerId, Stamp)]) {
        let mut wanted = Vec::new();
        for (peer, theirs) in entries {
            if *peer == self.me {
                self.outrank(*theirs);
            } else if self.members.contains(peer) {
                let ours = self.records.get(peer).map(Record::stamp).unwrap_or_default();
                if is_ahead(*theirs, ours) {
                    wanted.push((*peer, ours));
                }
            }
        }
        if !wanted.is_empty() {
            self.send(from, Message::Wanted(wanted));
        }
    }

    fn send_delta(&mut self, to: PeerId, adverts: Vec<Advert>) {
        let mut chunk = Vec::new();
        let mut bytes = 0;
        for advert in adverts {
            bytes += advert_bytes(&advert);
            chunk.push(advert);
            if bytes > DELTA_BYTES_SOFT_MAX {
                self.send(to, Message::Delta(std::mem::take(&mut chunk)));
                bytes = 0;
            }
        }
        if !chunk.is_empty() {
            self.send(to, Message::Delta(chunk));
        }
    }

    fn merge(&mut self, advert: Advert) {
        let origin = advert.origin;
        if origin == self.me {
            let heard = Record { incarnation: advert.incarnation, status: advert.status, facts: advert.facts };
            return self.outrank(heard.stamp());
        }
        if !self.members.contains(&origin) {
            return;
        }
        if self.records.entry(origin).or_default().merge(advert) {
            self.out.push(Output::Changed(origin));
        }
    }

    /// A member remembers a later start of this node: the clock was set back between two starts. Its news would be taken for
    /// old, so the incarnation jumps ahead of the remembered one.
    fn outrank(&mut self, remembered: Stamp) {
        if !is_ahead(remembered, self.own.stamp()) {
            return;
        }
        // Nothing outranks the end of the range. Such a stamp is forged, and ignored.
        let Some(incarnation) = remembered.incarnation.checked_add(1) else {
            return;
        };
        tracing::warn!(
            ours = self.own.incarnation,
            remembered = remembered.incarnation,
            "the mesh remembers a later start of this node; was the clock set back?"
        );
        self.own.incarnation = incarnation;
        self.push(self.own_advert());
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
