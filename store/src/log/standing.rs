//! Whether this node's log is still what it was: pure.
//!
//! A disk can be put back to an earlier state, from a backup or a snapshot of a virtual machine. Its node has then acknowledged
//! entries that it does not have any more, and given votes that it does not know of. If it voted now, the mesh could forget
//! what it has agreed on. Nobody but the other members can tell. So each member remembers how far the others had got
//! ([`Progress`], as they gossip it), and a node that starts asks them before it votes.
//!
//! Owns [`Standing`] and its two sources: [`Recall`], what the others remember of this node, and [`History`], what this node has
//! applied, by which two members that have parted find out. Invariants: a node votes only once a majority of the voters has told
//! what it remembers of it, and none remembers more than is there; what is kept of others is bounded.

use super::voters::majority;
use crate::ids::{NodeId, Peer};
use crate::state::Applied;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Applied entries whose digests are kept for comparison, 24 bytes each.
const HISTORY_MAX: usize = 4096;

/// How far a node says that it has got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What it has for good.
    pub mark: Mark,
    /// What it has applied. That may be more: an entry that a majority has is applied before this node's own disk has it.
    pub applied: Applied,
}

/// What a node has for good: neither number ever goes back on a disk that keeps its word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The term it has voted in, on its disk.
    pub term: u64,
    /// The index of an entry that the mesh has agreed on, and that is on its disk. Entries that are not agreed on may be replaced.
    pub index: u64,
}

impl Mark {
    /// What is known from both.
    pub fn max(self, other: Self) -> Self {
        Self { term: self.term.max(other.term), index: self.index.max(other.index) }
    }

    /// Whether a node that had got so far cannot be one that is at `now`.
    pub fn is_beyond(self, now: Self) -> bool {
        self.term > now.term || self.index > now.index
    }
}

/// Whether this node's log is what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// This node has not heard yet what the others remember of it. It does not vote.
    Unconfirmed,
    /// As far as the others remember, it is.
    Confirmed,
    /// It lacks what this node once had.
    WentBack {
        /// What another member remembers.
        remembered: Mark,
        /// What is there.
        found: Mark,
    },
    /// This node is a member under another id, and this log counts no more.
    Replaced {
        /// Its id now.
        by: NodeId,
    },
    /// The log of a majority of the voters is another one.
    Parted {
        /// The index of an entry up to which they differ.
        index: u64,
    },
}

impl Standing {
    /// Whether this node may vote, and stand for election.
    pub fn may_vote(self) -> bool {
        self == Self::Confirmed
    }

    /// Whether this node can be a member no more under the id that it has.
    pub fn is_lost(self) -> bool {
        matches!(self, Self::WentBack { .. } | Self::Replaced { .. } | Self::Parted { .. })
    }
}

/// Who votes, as far as a node knows: two sets while they are being changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Electors {
    /// The index of the entry that says so.
    pub index: u64,
    /// The voters.
    pub voters: Vec<BTreeSet<NodeId>>,
    /// How they are called.
    pub peers: BTreeMap<NodeId, Peer>,
}

/// What a member answers when it is asked what it remembers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// How far it remembers the log of the node to have got that was asked about.
    pub mark: Mark,
    /// Which node it takes the asking peer for, if for a member.
    pub known_as: Option<NodeId>,
    /// Whether the vote of the node that was asked about counts.
    pub votes: bool,
    /// Who votes.
    pub electors: Electors,
}

/// What the others remember of this node.
#[derive(Debug, Default)]
pub(super) struct Recall {
    /// Every member has had the time to answer.
    asked: bool,
    answered: BTreeSet<NodeId>,
    electors: Electors,
    /// The latest term that others remember this node to have voted in.
    term: u64,
    lost: Option<Standing>,
}

impl Recall {
    /// A member has told what it remembers of `node`, which is this one. Now its log has got to `found`.
    pub fn answer(&mut self, from: NodeId, node: NodeId, found: Mark, memory: Memory) {
        let Memory { mark: remembered, known_as, electors, .. } = memory;
        self.answered.insert(from);
        self.term = self.term.max(remembered.term);
        self.learn(electors);
        // Ids only grow.
        let replaced = known_as.filter(|by| *by > node).map(|by| Standing::Replaced { by });
        let went_back = remembered.is_beyond(found).then_some(Standing::WentBack { remembered, found });
        self.lost = replaced.or(self.lost).or(went_back);
    }

    /// Who votes may have changed since this node heard of it last. A majority of the voters of then knows who votes now, or knows
    /// those that voted next; so the latest word counts.
    pub fn learn(&mut self, electors: Electors) {
        if electors.index > self.electors.index || self.electors.voters.is_empty() {
            self.electors = electors;
        }
    }

    /// Those that have not been heard yet, of the members and of the voters, but `node`.
    pub fn open(&self, node: NodeId, members: BTreeMap<NodeId, Peer>) -> BTreeMap<NodeId, Peer> {
        let mut open = self.electors.peers.clone();
        open.extend(members);
        open.retain(|other, _| *other != node && !self.answered.contains(other));
        open
    }

    /// All have been asked; who has not answered is not there.
    pub fn asked(&mut self) {
        self.asked = true;
    }

    /// Whether a majority of the voters has told `node` what it remembers. A node that votes alone needs nobody's word, but asks first all
    /// the same.
    fn has_quorum(&self, node: NodeId) -> bool {
        let voters = &self.electors.voters;
        let heard = |other: &&NodeId| **other == node || self.answered.contains(other);
        let is_majority = |voters: &BTreeSet<NodeId>| voters.iter().filter(heard).count() >= majority(voters.len());
        let is_alone = voters.iter().all(|voters| voters.len() == 1);
        !voters.is_empty() && voters.iter().all(is_majority) && (self.asked || !is_alone)
    }

    /// What follows for `node`.
    pub fn standing(&self, node: NodeId) -> Standing {
        match self.lost {
            Some(lost) => lost,
            None if self.has_quorum(node) => Standing::Confirmed,
            None => Standing::Unconfirmed,
        }
    }

    /// Whether `node` may acknowledge entries of a leader of this term. One that has forgotten a later term, in which it voted for another,
    /// would give a majority to a leader that is none any more. A log that is empty has nothing to ask by.
    pub fn may_follow(&self, node: NodeId, term: u64) -> bool {
        self.electors.voters.is_empty() || (self.has_quorum(node) && term >= self.term)
    }
}

/// The last entries that this node has applied.
#[derive(Debug, Default)]
pub(super) struct History(VecDeque<Applied>);

impl History {
    pub fn push(&mut self, applied: Applied) {
        // A snapshot was installed: what is between is not known.
        if self.0.back().is_some_and(|last| last.index + 1 != applied.index) {
            self.0.clear();
        }
        if self.0.len() == HISTORY_MAX {
            self.0.pop_front();
        }
        self.0.push_back(applied);
    }

    /// Whether another node that has applied so much has applied something else; no, as long as that is not known.
    pub fn differs(&self, other: Applied) -> bool {
        if other == Applied::default() {
            return false;
        }
        let first = self.0.front().map_or(0, |first| first.index);
        let at = other.index.checked_sub(first).and_then(|at| self.0.get(at as usize));
        at.is_some_and(|own| *own != other)
    }
}

/// What this node knows of the others' progress.
#[derive(Debug, Default)]
pub(super) struct Others {
    marks: BTreeMap<NodeId, Mark>,
    parted: BTreeMap<NodeId, u64>,
}

impl Others {
    /// What was remembered before.
    pub fn new(marks: BTreeMap<NodeId, Mark>) -> Self {
        Self { marks, parted: BTreeMap::new() }
    }

    /// What is remembered of all.
    pub fn marks(&self) -> &BTreeMap<NodeId, Mark> {
        &self.marks
    }

    /// Takes note of what a member says. Whether it has parted from this node is news, and returned, once.
    pub fn heard(&mut self, node: NodeId, progress: Progress, history: &History) -> bool {
        let known = self.marks.entry(node).or_default();
        *known = known.max(progress.mark);
        history.differs(progress.applied) && self.parted.insert(node, progress.applied.index).is_none()
    }

    /// What is remembered of a member.
    pub fn mark(&self, node: NodeId) -> Mark {
        self.marks.get(&node).copied().unwrap_or_default()
    }

    /// What follows from that, where these vote (two sets while they are being changed): a majority is right.
    pub fn standing(&self, voters: &[BTreeSet<NodeId>]) -> Option<Standing> {
        let others = |voters: &BTreeSet<NodeId>| voters.iter().filter(|node| self.parted.contains_key(node)).count();
        let is_odd = voters.iter().any(|voters| others(voters) >= majority(voters.len()));
        let index = self.parted.values().max().copied()?;
        is_odd.then_some(Standing::Parted { index })
    }

    /// The members that have parted from this node, each with an entry up to which they differ.
    pub fn parted(&self) -> &BTreeMap<NodeId, u64> {
        &self.parted
    }

    /// Forgets all but these.
    pub fn retain(&mut self, members: impl Fn(&NodeId) -> bool) {
        self.marks.retain(|node, _| members(node));
        self.parted.retain(|node, _| members(node));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ids: &[u64]) -> BTreeSet<NodeId> {
        ids.iter().copied().map(NodeId).collect()
    }

    fn applied(index: u64, what: u8) -> Applied {
        Applied { index, digest: [what; 16] }
    }

    const FOUND: Mark = Mark { term: 3, index: 40 };

    /// A node that knows that these vote.
    fn recall(voters: &[&[u64]]) -> Recall {
        let mut recall = Recall::default();
        recall.learn(electors(7, voters));
        recall
    }

    fn electors(index: u64, voters: &[&[u64]]) -> Electors {
        let voters: Vec<_> = voters.iter().map(|voters| set(voters)).collect();
        let peers = voters.iter().flatten().map(|node| (*node, Peer(vec![node.0 as u8]))).collect();
        Electors { index, voters, peers }
    }

    fn says(recall: &mut Recall, from: u64, mark: Mark) {
        recall.answer(NodeId(from), NodeId(1), FOUND, Memory { mark, ..Memory::default() });
    }

    #[track_caller]
    fn check(recall: &Recall, expected: Standing) {
        assert_eq!(recall.standing(NodeId(1)), expected);
    }

    #[test]
    fn a_node_votes_once_a_majority_has_told_what_it_remembers() {
        let mut recall = recall(&[&[1, 2, 3]]);
        check(&recall, Standing::Unconfirmed);
        let open = |recall: &Recall| {
            let members = [2, 4].map(|node| (NodeId(node), Peer(vec![node as u8])));
            recall.open(NodeId(1), members.into()).into_keys().collect::<BTreeSet<_>>()
        };
        assert_eq!(open(&recall), set(&[2, 3, 4]));
        says(&mut recall, 2, FOUND);
        check(&recall, Standing::Confirmed);
        assert_eq!(open(&recall), set(&[3, 4]));
        // A late word counts too.
        let remembered = Mark { term: 3, index: 41 };
        says(&mut recall, 3, remembered);
        check(&recall, Standing::WentBack { remembered, found: FOUND });
    }

    #[test]
    fn a_vote_that_is_not_there_any_more_counts_as_much_as_an_entry() {
        let mut recall = recall(&[&[1, 2, 3]]);
        let remembered = Mark { term: 4, index: 2 };
        says(&mut recall, 2, remembered);
        check(&recall, Standing::WentBack { remembered, found: FOUND });
    }

    #[test]
    fn who_votes_now_is_learnt_from_those_that_voted_then() {
        let mut recall = recall(&[&[1, 2, 3]]);
        let memory = Memory { electors: electors(9, &[&[1, 2, 3], &[3, 4, 5]]), ..Memory::default() };
        recall.answer(NodeId(2), NodeId(1), FOUND, memory);
        check(&recall, Standing::Unconfirmed);
        says(&mut recall, 3, FOUND);
        check(&recall, Standing::Unconfirmed);
        says(&mut recall, 5, FOUND);
        check(&recall, Standing::Confirmed);
    }

    #[test]
    fn a_leader_of_a_term_that_was_voted_out_is_not_followed() {
        let mut lost = recall(&[&[1, 2, 3]]);
        assert!(!lost.may_follow(NodeId(1), 9), "it does not know yet in which term it voted");
        says(&mut lost, 2, Mark { term: 5, index: 0 });
        assert!(!lost.may_follow(NodeId(1), 4) && lost.may_follow(NodeId(1), 5));
        assert!(Recall::default().may_follow(NodeId(1), 1), "an empty log knows nobody to ask");
    }

    #[test]
    fn a_node_that_was_readmitted_is_not_what_its_log_says() {
        let mut recall = recall(&[&[1, 2, 3]]);
        let known_as = |id| Memory { mark: FOUND, known_as: Some(NodeId(id)), ..Memory::default() };
        recall.answer(NodeId(2), NodeId(1), FOUND, known_as(1));
        check(&recall, Standing::Confirmed);
        recall.answer(NodeId(3), NodeId(1), FOUND, known_as(7));
        check(&recall, Standing::Replaced { by: NodeId(7) });
    }

    #[test]
    fn who_votes_alone_asks_those_that_may_remember_all_the_same() {
        let mut alone = recall(&[&[1]]);
        check(&alone, Standing::Unconfirmed);
        alone.asked();
        check(&alone, Standing::Confirmed);
        let mut empty = Recall::default();
        empty.asked();
        check(&empty, Standing::Unconfirmed);
    }

    #[test]
    fn histories_differ_where_both_are_known() {
        let mut history = History::default();
        assert!(!history.differs(applied(3, 9)));
        (3..6).for_each(|index| history.push(applied(index, 1)));
        for (other, expected) in
            [(applied(2, 9), false), (applied(4, 1), false), (applied(4, 9), true), (applied(6, 9), false)]
        {
            assert_eq!(history.differs(other), expected, "{other:?}");
        }
        let mut first = History::default();
        first.push(applied(0, 1));
        assert!(!first.differs(Applied::default()), "it has not applied anything");
        history.push(applied(90, 1));
        assert!(!history.differs(applied(4, 9)), "a snapshot was installed");
        (91..91 + HISTORY_MAX as u64).for_each(|index| history.push(applied(index, 1)));
        assert_eq!(history.0.len(), HISTORY_MAX);
        assert!(history.differs(applied(91, 2)) && !history.differs(applied(90, 2)));
    }

    #[test]
    fn what_a_member_said_once_is_remembered_when_it_says_less() {
        let (mut others, mut history) = (Others::default(), History::default());
        history.push(applied(40, 1));
        let said = |term, index, what| Progress { mark: Mark { term, index }, applied: applied(index, what) };
        assert!(!others.heard(NodeId(2), said(3, 40, 1), &history));
        assert!(!others.heard(NodeId(2), said(2, 17, 1), &history));
        assert_eq!(others.mark(NodeId(2)), Mark { term: 3, index: 40 });
        assert!(
            others.heard(NodeId(2), said(3, 40, 2), &history) && !others.heard(NodeId(2), said(3, 40, 2), &history)
        );
        assert_eq!(others.parted(), &BTreeMap::from([(NodeId(2), 40)]));
        assert_eq!(others.standing(&[set(&[1, 2, 3])]), None, "the others may agree with this node");
        assert_eq!(others.standing(&[set(&[2])]), Some(Standing::Parted { index: 40 }));
        others.heard(NodeId(3), said(3, 40, 2), &history);
        assert_eq!(others.standing(&[set(&[1, 2, 3])]), Some(Standing::Parted { index: 40 }));
        others.retain(|_| false);
        assert_eq!((others.mark(NodeId(2)), others.parted().len()), (Mark::default(), 0));
    }
}
