//! The choice of voters, pure, and the leader's next step towards it.
//!
//! Every member replicates the log; an odd number of them vote. The choice prefers stability: a voter keeps its vote
//! unless it is lost and a member that is there can take over. So two members have one voter, three have three, and from
//! five members on there are five. Where two of five are lost and nobody can take over, the other three vote: they can
//! lose one more.
//!
//! Invariants: a vote is given only to a member that has been up for a while and has caught up; and no change is begun unless
//! a majority of the voters that it leads to is up.

use super::types::Metrics;
use crate::ids::NodeId;
use openraft::LogIdOptionExt;
use std::collections::BTreeSet;

/// Most voters; each write waits for a majority of them.
pub const VOTERS_MAX: usize = 5;
/// A learner at most this many entries behind the leader has caught up. A quorum would have to wait for the vote of one
/// that has not.
const LAG_MAX: u64 = 20;

/// Which members are there, as the leader sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Presence {
    /// Members that answer now.
    pub up: BTreeSet<NodeId>,
    /// Of these, the members that have answered for a while. Only they may be given a vote.
    pub steady: BTreeSet<NodeId>,
    /// Members that have been down for so long that others may take over their votes.
    pub lost: BTreeSet<NodeId>,
}

/// A majority of so many voters.
pub fn majority(voters: usize) -> usize {
    voters / 2 + 1
}

/// How many of so many members vote while all are there.
pub fn voters_among(members: usize) -> usize {
    let most = members.min(VOTERS_MAX);
    if most.is_multiple_of(2) { most.saturating_sub(1) } else { most }
}

/// The voters to have, of the members that may vote: an odd number, at most five. Preferred in this order: not lost, voting
/// already, up; lower ids first. Of these sets the one that can lose the most voters beside the lost ones, and of equal ones
/// the largest.
pub fn voters(eligible: &BTreeSet<NodeId>, current: &BTreeSet<NodeId>, presence: &Presence) -> BTreeSet<NodeId> {
    let Presence { up, lost, .. } = presence;
    let mut ranked: Vec<NodeId> = eligible.iter().copied().collect();
    ranked.sort_by_key(|node| (lost.contains(node), !current.contains(node), !up.contains(node), *node));
    let present = |size: usize| ranked[..size].iter().filter(|node| !lost.contains(node)).count();
    let sizes = (1..=voters_among(ranked.len())).step_by(2);
    let size = sizes.max_by_key(|&size| present(size) as isize - majority(size) as isize);
    ranked.truncate(size.unwrap_or(0));
    ranked.into_iter().collect()
}

/// One change of the consensus group at a time, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Replicate to these members.
    AddLearners(BTreeSet<NodeId>),
    /// Let exactly these vote.
    SetVoters(BTreeSet<NodeId>),
    /// Forget these; they are members no more.
    Remove(BTreeSet<NodeId>),
}

/// What the leader knows about the consensus group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Group {
    /// Everyone the log is replicated to.
    pub nodes: BTreeSet<NodeId>,
    /// Everyone whose vote counts, in a joint configuration of both halves.
    pub voters: BTreeSet<NodeId>,
    /// A change of voters was begun and not finished.
    pub joint: bool,
    /// Learners that have (nearly) the whole log.
    pub caught_up: BTreeSet<NodeId>,
}

impl Group {
    pub fn of(metrics: &Metrics) -> Self {
        let membership = metrics.membership_config.membership();
        let last = metrics.last_log_index.unwrap_or(0);
        let replication = metrics.replication.iter().flatten();
        let close = replication.filter(|(_, matched)| matched.index().is_some_and(|m| m + LAG_MAX >= last));
        Self {
            nodes: membership.nodes().map(|(node, _)| *node).collect(),
            voters: membership.voter_ids().collect(),
            joint: membership.get_joint_config().len() > 1,
            caught_up: close.map(|(node, _)| *node).collect(),
        }
    }

    /// The next change towards `members`, or none if all is as it should be, or nothing can be done about it now.
    pub fn next(&self, members: &BTreeSet<NodeId>, presence: &Presence) -> Option<Change> {
        let new: BTreeSet<NodeId> = members.difference(&self.nodes).copied().collect();
        if !new.is_empty() {
            return Some(Change::AddLearners(new));
        }
        let able = |node: &&NodeId| {
            self.voters.contains(node) || (self.caught_up.contains(node) && presence.steady.contains(node))
        };
        let eligible: BTreeSet<NodeId> = members.iter().filter(able).copied().collect();
        let target = voters(&eligible, &self.voters, presence);
        let has_quorum = target.intersection(&presence.up).count() >= majority(target.len());
        if has_quorum && (self.joint || target != self.voters) {
            return Some(Change::SetVoters(target));
        }
        let gone: BTreeSet<NodeId> =
            self.nodes.iter().filter(|node| !members.contains(node) && !self.voters.contains(node)).copied().collect();
        (!gone.is_empty()).then_some(Change::Remove(gone))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(ids: &[u64]) -> BTreeSet<NodeId> {
        ids.iter().copied().map(NodeId).collect()
    }

    /// Members of which `lost` are lost, and all others have been up for long.
    fn without(members: &[u64], lost: &[u64]) -> Presence {
        let (members, lost) = (set(members), set(lost));
        let up: BTreeSet<_> = members.difference(&lost).copied().collect();
        Presence { steady: up.clone(), up, lost }
    }

    #[track_caller]
    fn check(members: &[u64], current: &[u64], lost: &[u64], expected: &[u64]) {
        assert_eq!(voters(&set(members), &set(current), &without(members, lost)), set(expected));
    }

    #[test]
    fn the_largest_odd_number_up_to_five() {
        check(&[1], &[1], &[], &[1]);
        check(&[1, 2], &[1], &[], &[1]);
        check(&[1, 2, 3], &[1], &[], &[1, 2, 3]);
        check(&[1, 2, 3, 4], &[1, 2, 3], &[], &[1, 2, 3]);
        check(&[1, 2, 3, 4, 5, 6, 7], &[], &[], &[1, 2, 3, 4, 5]);
        check(&[], &[], &[], &[]);
    }

    #[test]
    fn voters_stay_while_nobody_can_replace_them() {
        check(&[1, 2, 3], &[1, 2, 3], &[3], &[1, 2, 3]);
        check(&[1, 2, 3, 4], &[1, 2, 4], &[], &[1, 2, 4]);
        check(&[1, 2, 3, 4], &[1, 2, 3], &[3], &[1, 2, 4]);
        check(&[1, 2], &[1, 2, 3], &[1], &[2]);
    }

    #[test]
    fn fewer_vote_where_they_can_lose_more() {
        check(&[1, 2, 3, 4, 5], &[1, 2, 3, 4, 5], &[2], &[1, 2, 3, 4, 5]);
        check(&[1, 2, 3, 4, 5], &[1, 2, 3, 4, 5], &[2, 4], &[1, 3, 5]);
        check(&[1, 2, 3, 4, 5], &[1, 3, 5], &[2, 4], &[1, 3, 5]);
        check(&[1, 2, 3, 4, 5], &[1, 3, 5], &[], &[1, 2, 3, 4, 5]);
    }

    fn group(nodes: &[u64], voters: &[u64], caught_up: &[u64]) -> Group {
        Group { nodes: set(nodes), voters: set(voters), joint: false, caught_up: set(caught_up) }
    }

    #[test]
    fn newcomers_learn_before_they_vote() {
        let all = set(&[1, 2, 3]);
        let everyone = without(&[1, 2, 3], &[]);
        assert_eq!(group(&[1], &[1], &[1]).next(&all, &everyone), Some(Change::AddLearners(set(&[2, 3]))));
        assert_eq!(group(&[1, 2, 3], &[1], &[1, 2]).next(&all, &everyone), None, "3 has not caught up");
        let ready = group(&[1, 2, 3], &[1], &[1, 2, 3]);
        assert_eq!(ready.next(&all, &everyone), Some(Change::SetVoters(all.clone())));
        assert_eq!(group(&[1, 2, 3], &[1, 2, 3], &[1, 2, 3]).next(&all, &without(&[1, 2, 3], &[2])), None);
    }

    #[test]
    fn a_newcomer_that_has_just_come_or_just_gone_is_not_promoted() {
        let all = set(&[1, 2, 3]);
        let ready = group(&[1, 2, 3], &[1], &[1, 2, 3]);
        assert_eq!(ready.next(&all, &without(&[1, 2, 3], &[3])), None, "it is lost");
        let (up, steady) = (set(&[1, 2, 3]), set(&[1, 2]));
        assert_eq!(ready.next(&all, &Presence { up, steady, lost: set(&[]) }), None, "it has just come");
        let only_one = Presence { up: set(&[1]), steady: set(&[1]), lost: set(&[]) };
        assert_eq!(ready.next(&all, &only_one), None, "both are down, and not for long");
    }

    #[test]
    fn who_left_loses_the_vote_first() {
        let (members, there) = (set(&[2, 3]), without(&[2, 3], &[]));
        let left = group(&[1, 2, 3], &[1, 2, 3], &[1, 2, 3]);
        assert_eq!(left.next(&members, &there), Some(Change::SetVoters(set(&[2]))));
        let after = group(&[1, 2, 3], &[2], &[1, 2, 3]);
        assert_eq!(after.next(&members, &there), Some(Change::Remove(set(&[1]))));
        assert_eq!(group(&[2, 3], &[2], &[2, 3]).next(&members, &there), None);
    }

    #[test]
    fn the_vote_of_a_mesh_that_shrinks_goes_to_a_member_that_is_up() {
        let left = group(&[1, 2, 3], &[1, 2, 3], &[1, 2, 3]);
        let two_is_silent = Presence { up: set(&[3]), steady: set(&[3]), lost: set(&[]) };
        assert_eq!(left.next(&set(&[2, 3]), &two_is_silent), Some(Change::SetVoters(set(&[3]))));
        let four = group(&[1, 2, 3, 4], &[1, 2, 3], &[1, 2, 3, 4]);
        let nobody = Presence { up: set(&[4]), steady: set(&[4]), lost: set(&[]) };
        assert_eq!(four.next(&set(&[1, 2, 4]), &nobody), None, "two of the three would be down");
    }

    #[test]
    fn a_half_done_change_is_finished() {
        let joint = Group { joint: true, ..group(&[1, 2, 3], &[1, 2, 3], &[1, 2, 3]) };
        let everyone = without(&[1, 2, 3], &[]);
        assert_eq!(joint.next(&set(&[1, 2, 3]), &everyone), Some(Change::SetVoters(set(&[1, 2, 3]))));
    }

    fn any_set() -> impl Strategy<Value = BTreeSet<NodeId>> {
        prop::collection::btree_set((0u64..9).prop_map(NodeId), 0..9)
    }

    fn any_presence() -> impl Strategy<Value = Presence> {
        (any_set(), any_set(), any_set()).prop_map(|(up, steady, lost)| Presence {
            steady: steady.intersection(&up).copied().collect(),
            lost: lost.difference(&up).copied().collect(),
            up,
        })
    }

    proptest! {
        #[test]
        fn any_choice_is_odd_and_stable(members in any_set(), current in any_set(), presence in any_presence()) {
            let lost = &presence.lost;
            let chosen = voters(&members, &current, &presence);
            prop_assert!(chosen.is_subset(&members));
            prop_assert!(chosen.len() <= VOTERS_MAX);
            prop_assert_eq!(chosen.len() % 2, usize::from(!members.is_empty()));
            prop_assert_eq!(&voters(&members, &chosen, &presence), &chosen, "asking again changes nothing");
            // A voter that is not lost gives way only to other voters that are not.
            let gave_way = current.iter().any(|n| members.contains(n) && !lost.contains(n) && !chosen.contains(n));
            if gave_way {
                prop_assert!(chosen.iter().all(|n| current.contains(n) && !lost.contains(n)));
            }
        }

        #[test]
        fn no_change_costs_the_quorum(
            members in any_set(),
            voting in any_set(),
            caught_up in any_set(),
            joint: bool,
            presence in any_presence(),
        ) {
            let nodes = members.union(&voting).copied().collect();
            let group = Group { nodes, voters: voting.clone(), joint, caught_up };
            if let Some(Change::SetVoters(target)) = group.next(&members, &presence) {
                let there = target.intersection(&presence.up).count();
                prop_assert!(there >= majority(target.len()), "{target:?} of {presence:?}");
                let promoted = target.difference(&voting);
                prop_assert!(promoted.into_iter().all(|node| presence.steady.contains(node)));
            }
        }
    }
}
