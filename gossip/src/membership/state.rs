//! The gossip protocol as a state machine: what this node says, what it knows of the others, and what it sends.
//!
//! Owns: one record per member, merged by (incarnation, version), and this node's own record.
//! Invariants: only records of members are kept; a record never goes back to an older stamp; only this node raises the
//! versions of its own record; of several live processes of this node that hear of one another, all but the earliest end.
//! Deliberately does not know: connections, liveness, time sources or randomness. `now` and the generator are
//! arguments, effects are returned.
//!
//! News is pushed straight to every linked member, because members keep connections to each other. Anti-entropy repairs
//! what a push misses (a full queue, a lost connection, two members that cannot reach each other): now and then a random
//! member gets a digest of all stamps, answers with what is newer and asks for what it lacks. Digests grow with the mesh,
//! and so does their period, which bounds their cost per second.
//!
//! # Two processes of one node
//!
//! A process that hears of a newer record of its own node outranks it: the clock may have been set back between two starts, and
//! its news would be taken for old. Since the newer record may also be that of a live process (a copied data folder), the
//! one that outranks it signs whom it has seen. A process that meets a sighting of itself by an *earlier* process of its
//! node knows that this one is alive, because nobody else can sign, and nobody could name its nonce before it had started.
//! It then says nothing more, and the driver ends. The earliest process never meets such a sighting, so one goes on.
//!
//! Both must be told, though the others take them for one peer: what is sent to a member reaches one of its processes, whichever
//! has the stream. But every process opens a stream of its own to each member. Against all of them goes what is known of the
//! member itself: in answer to a digest of it, and when its record passes to another process.
//!
//! A process has been heard once a member repeats it. It is *confirmed* when no sighting followed within [`GRACE`], or when no
//! member was found within [`PATIENCE`]. Sightings count after that too.
//!
//! No alarm: a restart draws another nonce, so what was said of the process before does not concern it; neither does
//! news that is late or comes twice, nor a process that was stopped and goes on.
//!
//! A hostile member can forge newer records of any node, as it always could: the node outranks them, and others may believe for a
//! moment what was forged, or that the node has two processes. It can keep a sighting back from those that only it can reach.
//! It cannot end a process, because it cannot sign. Not noticed: two processes without a common neighbour, and a machine that
//! was cloned with its memory, nonce included.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use libp2p::PeerId;
use rand::Rng;
use rand::seq::IteratorRandom;

use super::message::{
    Advert, DELTA_BYTES_SOFT_MAX, DIGEST_ENTRIES_MAX, DIGEST_ENTRY_BYTES, Message, Stamp, Versioned, advert_bytes,
};
use super::process::{Incarnation, Process, Sighting};
use super::status::{self, Policy, Publisher, Status};
use crate::identity::Identity;

/// Bytes per second one node spends on digests, at most.
const DIGEST_BYTES_PER_S: f64 = 4096.0;
/// Bytes of a whole round per byte of its digest: one digest each way, and records about as large.
const DIGEST_ROUND_FACTOR: f64 = 6.0;
const ANTI_ENTROPY_PERIOD_MIN: Duration = Duration::from_secs(1);
/// How long an earlier process of this node has for its sighting, once a member has heard of this one: two round trips on a
/// busy machine.
const GRACE: Duration = Duration::from_millis(250);
/// How long this process waits for a member that has heard of it.
const PATIENCE: Duration = Duration::from_secs(1);
/// Time between two records that this node outranks, or two processes would do so as fast as messages travel. With a tick it is
/// well below [`GRACE`].
const OUTRANK_GAP: Duration = Duration::from_millis(50);
/// How long after the last sign of it a member counts as having two processes.
const ALTERNATION_SHOWN: Duration = Duration::from_secs(60);

/// What is known of one origin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    pub incarnation: Incarnation,
    pub sighting: Option<Sighting>,
    pub status: Option<Versioned<Status>>,
    pub facts: Option<Versioned<Bytes>>,
}

#[derive(Clone, Debug)]
pub enum Input {
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
pub enum Output {
    Send {
        to: PeerId,
        message: Message,
    },
    /// The record of this member changed.
    Changed(PeerId),
    /// This member itself said that it is leaving.
    Left(PeerId),
    /// To be carried by every stream that this member has opened: each of its processes has one of its own.
    Reflect {
        to: PeerId,
        message: Message,
    },
    /// Two processes of this member were heard in turn.
    Alternates(PeerId),
    /// Members were asked, and no earlier process of this node was heard of.
    Confirmed,
    /// An earlier process of this node is alive: this one has to end.
    Duplicate(Process),
}

/// Whether members know of other processes of this node.
#[derive(Clone, Copy, Debug)]
enum Inquiry {
    /// There are no members that could be asked.
    Unasked,
    Asked {
        since: Instant,
    },
    /// A member has heard of this process.
    Heard {
        since: Instant,
    },
    Confirmed,
    Duplicate,
}

/// The processes that a member's records came from.
#[derive(Debug)]
struct Processes {
    /// The one before the present one.
    former: Process,
    /// When a former one was last heard again.
    alternated: Option<Instant>,
}

#[derive(Debug)]
pub struct State {
    identity: Identity,
    me: PeerId,
    own: Record,
    inquiry: Inquiry,
    /// When a record of this node's was last outranked.
    outranked: Option<Instant>,
    /// A record of this node's that is to be outranked once [`OUTRANK_GAP`] has passed.
    to_outrank: Option<Incarnation>,
    publisher: Publisher,
    /// Set when the facts changed and were not yet pushed.
    facts_unsent: bool,
    facts_sent: Option<Instant>,
    gap: Duration,
    members: BTreeSet<PeerId>,
    linked: BTreeSet<PeerId>,
    records: BTreeMap<PeerId, Record>,
    /// Of members that have restarted since this process started.
    processes: BTreeMap<PeerId, Processes>,
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
            sighting: self.sighting,
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
            *self = Record { incarnation: advert.incarnation, sighting: advert.sighting, status: None, facts: None };
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
    /// The state of `process`, whose nonce no other process has.
    pub fn new(identity: Identity, process: Process, policy: Policy, now: Instant) -> State {
        State {
            me: identity.peer_id(),
            identity,
            own: Record { incarnation: Incarnation::first(process), ..Record::default() },
            inquiry: Inquiry::Unasked,
            outranked: None,
            to_outrank: None,
            gap: policy.gap,
            publisher: Publisher::new(policy),
            facts_unsent: false,
            facts_sent: None,
            members: BTreeSet::new(),
            linked: BTreeSet::new(),
            records: BTreeMap::new(),
            processes: BTreeMap::new(),
            anti_entropy_at: now + ANTI_ENTROPY_PERIOD_MIN,
            out: Vec::new(),
        }
    }

    pub fn record(&self, peer: &PeerId) -> Option<&Record> {
        self.records.get(peer)
    }

    /// Whether two processes of this member were heard in turn, a short while ago.
    pub fn alternates(&self, peer: &PeerId, now: Instant) -> bool {
        let last = self.processes.get(peer).and_then(|processes| processes.alternated);
        last.is_some_and(|last| now.saturating_duration_since(last) < ALTERNATION_SHOWN)
    }

    /// What this process says when it ends.
    pub fn farewell(&self) -> Message {
        Message::Bye { incarnation: self.own.incarnation }
    }

    pub fn handle(&mut self, input: Input, now: Instant, rng: &mut impl Rng) -> Vec<Output> {
        if matches!(self.inquiry, Inquiry::Duplicate) {
            return Vec::new();
        }
        match input {
            Input::SetStatus(status) => self.publish_status(status::Input::Set(status), now),
            Input::SetFacts(facts) => self.set_facts(facts, now),
            Input::SetMembers(members) => self.set_members(members, now),
            Input::Linked(peer) => self.greet(peer),
            Input::Unlinked(peer) => {
                self.linked.remove(&peer);
            }
            Input::Received(from, message) => self.receive(from, message, now),
            Input::Tick => {
                self.publish_status(status::Input::Tick, now);
                self.publish_facts(now);
                self.repair(now, rng);
                if let Some(remembered) = self.to_outrank.take_if(|remembered| *remembered > self.own.incarnation) {
                    self.outrank(remembered, now);
                }
                self.confirm(now);
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

    fn set_members(&mut self, mut members: BTreeSet<PeerId>, now: Instant) {
        members.remove(&self.me);
        match self.inquiry {
            Inquiry::Unasked if members.is_empty() => {
                self.inquiry = Inquiry::Confirmed;
                self.out.push(Output::Confirmed);
            }
            Inquiry::Unasked => self.inquiry = Inquiry::Asked { since: now },
            _ => {}
        }
        self.records.retain(|peer, _| members.contains(peer));
        self.processes.retain(|peer, _| members.contains(peer));
        self.linked.retain(|peer| members.contains(peer));
        self.members = members;
    }

    fn own_advert(&self) -> Advert {
        let Record { incarnation, sighting, status, facts } = self.own.clone();
        Advert { origin: self.me, incarnation, sighting, status, facts }
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

    /// Tells every process of a member what is known of it.
    fn reflect(&mut self, to: PeerId) {
        if let Some(record) = self.records.get(&to) {
            let (incarnation, sighting) = (record.incarnation, record.sighting);
            let known = Advert { origin: to, incarnation, sighting, status: None, facts: None };
            self.out.push(Output::Reflect { to, message: Message::Delta(vec![known]) });
        }
    }

    fn receive(&mut self, from: PeerId, message: Message, now: Instant) {
        if !self.members.contains(&from) {
            return;
        }
        match message {
            Message::Delta(adverts) => adverts.into_iter().for_each(|advert| self.merge(advert, now)),
            Message::Digest(entries) => {
                self.reflect(from);
                let theirs: BTreeMap<PeerId, Stamp> = entries.iter().copied().collect();
                let known = |peer: &PeerId| theirs.get(peer).copied().unwrap_or_default();
                let mut news: Vec<Advert> = Vec::new();
                news.extend(self.own.newer_than(self.me, known(&self.me)));
                news.extend(self.records.iter().filter_map(|(peer, record)| record.newer_than(*peer, known(peer))));
                self.send_delta(from, news);
                self.ask_for_missing(from, &entries, now);
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

    fn ask_for_missing(&mut self, from: PeerId, entries: &[(PeerId, Stamp)], now: Instant) {
        let mut wanted = Vec::new();
        for (peer, theirs) in entries {
            if *peer == self.me {
                self.heard_of_own(*theirs, None, now);
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

    fn merge(&mut self, advert: Advert, now: Instant) {
        let origin = advert.origin;
        if origin == self.me {
            let Advert { incarnation, sighting, status, facts, .. } = advert;
            let stamp = Record { incarnation, sighting, status, facts }.stamp();
            return self.heard_of_own(stamp, sighting, now);
        }
        if !self.members.contains(&origin) {
            return;
        }
        let record = self.records.entry(origin).or_default();
        let before = record.incarnation.process;
        if !record.merge(advert) {
            return;
        }
        let process = record.incarnation.process;
        self.out.push(Output::Changed(origin));
        if before != Process::default() && before != process {
            self.reflect(origin);
            self.passed_on(origin, before, process, now);
        }
    }

    /// A member's record passed from one process to another. Once is a restart; there and back is two live processes.
    fn passed_on(&mut self, member: PeerId, before: Process, process: Process, now: Instant) {
        let is_known = self.alternates(&member, now);
        let processes = self.processes.entry(member).or_insert(Processes { former: before, alternated: None });
        if std::mem::replace(&mut processes.former, before) == process {
            processes.alternated = Some(now);
            if !is_known {
                self.out.push(Output::Alternates(member));
            }
        }
    }

    /// A record of this node, as others have it.
    fn heard_of_own(&mut self, heard: Stamp, sighting: Option<Sighting>, now: Instant) {
        let (by, own) = (heard.incarnation.process, self.own.incarnation.process);
        if by == own && matches!(self.inquiry, Inquiry::Asked { .. }) {
            self.inquiry = Inquiry::Heard { since: now };
        }
        let seen = sighting.filter(|sighting| sighting.of == own && by < own);
        if seen.is_some_and(|sighting| sighting.is_of(&self.identity.keypair().public(), by)) {
            self.inquiry = Inquiry::Duplicate;
            self.out.push(Output::Duplicate(by));
        } else if is_ahead(heard, self.own.stamp()) {
            self.outrank(heard.incarnation, now);
        }
    }

    /// A member remembers a newer record of this node. Its news would be taken for old, so the incarnation jumps ahead.
    fn outrank(&mut self, remembered: Incarnation, now: Instant) {
        if self.outranked.is_some_and(|at| now.saturating_duration_since(at) < OUTRANK_GAP) {
            self.to_outrank = self.to_outrank.max(Some(remembered));
            return;
        }
        let (other, own) = (remembered.process, self.own.incarnation.process);
        // Nothing outranks the end of the range. Such a record is forged, and ignored.
        let Some(incarnation) = remembered.outranked_by(own) else {
            return;
        };
        tracing::warn!(
            started_ms = own.started_ms,
            remembered_ms = other.started_ms,
            "the mesh knows another process of this node; was the clock set back, or the data folder copied?"
        );
        self.outranked = Some(now);
        self.own.incarnation = incarnation;
        if other != own {
            self.own.sighting = Some(Sighting::sign(&self.identity, own, other));
        }
        self.push(self.own_advert());
    }

    fn confirm(&mut self, now: Instant) {
        let is_due = |since: Instant, wait| now.saturating_duration_since(since) >= wait;
        let confirmed = match self.inquiry {
            Inquiry::Asked { since } => is_due(since, PATIENCE),
            Inquiry::Heard { since } => is_due(since, GRACE),
            Inquiry::Unasked | Inquiry::Confirmed | Inquiry::Duplicate => false,
        };
        if confirmed {
            self.inquiry = Inquiry::Confirmed;
            self.out.push(Output::Confirmed);
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "process_tests.rs"]
mod process_tests;
