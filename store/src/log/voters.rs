//! The choice of voters, pure, and the leader's next step towards it.
//!
//! Every member replicates the log; an odd number of them vote. The choice prefers stability: a voter keeps its vote
//! unless it is down and a member that is up can take over. So two members have one voter, three have three, and from five
//! members on there are five.

use super::types::Metrics;
use crate::ids::NodeId;
use openraft::LogIdOptionExt;
use std::collections::BTreeSet;

/// Most voters; each write waits for a majority of them.
pub const VOTERS_MAX: usize = 5;
/// A learner at most this many entries behind the leader has caught up. A quorum would have to wait for the vote of one
/// that has not.
const LAG_MAX: u64 = 20;

/// The voters to have: the largest odd number up to min(5, members). Preferred in this order: up
/// and voting already, up, voting already, the rest; lower ids first.
pub fn voters(members: &BTreeSet<NodeId>, current: &BTreeSet<NodeId>, down: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
    let size = members.len().min(VOTERS_MAX);
    let size = if size.is_multiple_of(2) { size.saturating_sub(1) } else { size };
    let mut ranked: Vec<NodeId> = members.iter().copied().collect();
    ranked.sort_by_key(|node| (down.contains(node), !current.contains(node), *node));
    ranked.truncate(size);
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

    /// The next change towards `members`, or none if all is as it should be.
    pub fn next(&self, members: &BTreeSet<NodeId>, down: &BTreeSet<NodeId>) -> Option<Change> {
        let new: BTreeSet<NodeId> = members.difference(&self.nodes).copied().collect();
        if !new.is_empty() {
            return Some(Change::AddLearners(new));
        }
        let able =
            |node: &&NodeId| self.voters.contains(node) || (self.caught_up.contains(node) && !down.contains(node));
        let eligible: BTreeSet<NodeId> = members.iter().filter(able).copied().collect();
        let target = voters(&eligible, &self.voters, down);
        if !target.is_empty() && (self.joint || target != self.voters) {
            return Some(Change::SetVoters(target));
        }
        let gone: BTreeSet<NodeId> = self.nodes.difference(members).copied().collect();
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

    #[track_caller]
    fn check(members: &[u64], current: &[u64], down: &[u64], expected: &[u64]) {
        assert_eq!(voters(&set(members), &set(current), &set(down)), set(expected));
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

    fn group(nodes: &[u64], voters: &[u64], caught_up: &[u64]) -> Group {
        Group { nodes: set(nodes), voters: set(voters), joint: false, caught_up: set(caught_up) }
    }

    #[test]
    fn newcomers_learn_before_they_vote() {
        let all = set(&[1, 2, 3]);
        let none = set(&[]);
        assert_eq!(group(&[1], &[1], &[1]).next(&all, &none), Some(Change::AddLearners(set(&[2, 3]))));
        assert_eq!(group(&[1, 2, 3], &[1], &[1, 2]).next(&all, &none), None, "3 has not caught up");
        let ready = group(&[1, 2, 3], &[1], &[1, 2, 3]);
        assert_eq!(ready.next(&all, &none), Some(Change::SetVoters(all.clone())));
        assert_eq!(ready.next(&all, &set(&[3])), None, "3 caught up once, but is down");
        assert_eq!(group(&[1, 2, 3], &[1, 2, 3], &[1, 2, 3]).next(&all, &set(&[2])), None);
    }

    #[test]
    fn who_left_loses_the_vote_first() {
        let left = group(&[1, 2, 3], &[1, 2, 3], &[1, 2, 3]);
        assert_eq!(left.next(&set(&[2, 3]), &set(&[])), Some(Change::SetVoters(set(&[2]))));
        let after = group(&[1, 2, 3], &[2], &[1, 2, 3]);
        assert_eq!(after.next(&set(&[2, 3]), &set(&[])), Some(Change::Remove(set(&[1]))));
        assert_eq!(group(&[2, 3], &[2], &[2, 3]).next(&set(&[2, 3]), &set(&[])), None);
    }

    #[test]
    fn a_half_done_change_is_finished() {
        let joint = Group { joint: true, ..group(&[1, 2, 3], &[1, 2, 3], &[1, 2, 3]) };
        assert_eq!(joint.next(&set(&[1, 2, 3]), &set(&[])), Some(Change::SetVoters(set(&[1, 2, 3]))));
    }

    fn any_set() -> impl Strategy<Value = BTreeSet<NodeId>> {
        prop::collection::btree_set((0u64..9).prop_map(NodeId), 0..9)
    }

    proptest! {
        #[test]
        fn any_choice_is_odd_and_stable(members in any_set(), current in any_set(), down in any_set()) {
            let chosen = voters(&members, &current, &down);
            prop_assert!(chosen.is_subset(&members));
            prop_assert!(chosen.len() <= VOTERS_MAX);
            prop_assert_eq!(chosen.len() % 2, usize::from(!members.is_empty()));
            prop_assert_eq!(&voters(&members, &chosen, &down), &chosen, "asking again changes nothing");
            // A voter that is up gives way only to other voters that are up.
            let gave_way = current.iter().any(|n| members.contains(n) && !down.contains(n) && !chosen.contains(n));
            if gave_way {
                prop_assert!(chosen.iter().all(|n| current.contains(n) && !down.contains(n)));
            }
        }
    }
}
