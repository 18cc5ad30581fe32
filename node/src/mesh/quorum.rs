//! Whether the voters of the log can agree on anything. Pure.
//!
//! Owns [`Quorum`]: the voters, and what gossip takes each of them for. The invariant: a quorum counts as lost only by gossip's
//! verdict, so that a change of leader, which takes a moment while the voters are there, is waited through; and a voter of whom
//! nothing is known yet is neither up nor down.

use std::collections::BTreeSet;

use coel_store::{NodeId, majority};

/// The voters of the log, those of them that can be reached, and those that are down.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Quorum {
    /// The members whose votes count.
    pub voters: BTreeSet<NodeId>,
    /// Of these, the ones that gossip knows and does not take for dead.
    pub up: BTreeSet<NodeId>,
    /// Of these, the ones that gossip takes for dead.
    pub down: BTreeSet<NodeId>,
}

impl Quorum {
    /// Voters that must be up for anything to be agreed.
    pub fn needed(&self) -> usize {
        majority(self.voters.len())
    }

    /// How many more voters may fail; `None` where too many have already.
    pub fn spare(&self) -> Option<usize> {
        self.up.len().checked_sub(self.needed())
    }

    /// Why nothing can be agreed at this moment, if so, and what to do.
    pub fn missing(&self) -> Option<String> {
        self.shortage(self.up.len())
    }

    /// Why nothing can be agreed until a voter comes back, if so, and what to do. Then no election can help, and there is nothing to
    /// wait for.
    pub fn lost(&self) -> Option<String> {
        self.shortage(self.voters.difference(&self.down).count())
    }

    fn shortage(&self, reached: usize) -> Option<String> {
        // A node that has just joined does not know the voters yet.
        let is_known = !self.voters.is_empty();
        (is_known && reached < self.needed()).then(|| {
            format!(
                "{reached} of {} voters can be reached, and {} must be; start the others, or name one with --peer if it has moved. If \
                 they are lost for good, stop this node and run `coel recover`",
                self.voters.len(),
                self.needed()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(ids: &[u64]) -> BTreeSet<NodeId> {
        ids.iter().copied().map(NodeId).collect()
    }

    /// Whether something is missing at this moment, and whether the quorum is lost.
    fn verdict(voters: u64, up: &[u64], down: &[u64]) -> (bool, bool) {
        let quorum = Quorum { voters: (1..=voters).map(NodeId).collect(), up: nodes(up), down: nodes(down) };
        (quorum.missing().is_some(), quorum.lost().is_some())
    }

    #[test]
    fn a_quorum_is_lost_once_a_majority_is_not_up_by_gossips_verdict() {
        assert_eq!(verdict(1, &[1], &[]), (false, false));
        assert_eq!(verdict(1, &[], &[1]), (true, true));
        assert_eq!(verdict(2, &[1], &[2]), (true, true));
        assert_eq!(verdict(3, &[1], &[2, 3]), (true, true));
        assert_eq!(verdict(5, &[1, 2], &[3, 4, 5]), (true, true));
    }

    #[test]
    fn a_dead_leader_whose_voters_are_there_is_waited_through() {
        assert_eq!(verdict(3, &[1, 2], &[3]), (false, false));
        assert_eq!(verdict(5, &[1, 2, 3], &[4, 5]), (false, false));
    }

    #[test]
    fn what_is_not_known_yet_is_waited_for() {
        assert_eq!(verdict(3, &[1], &[]), (true, false), "a node that has just started");
        assert_eq!(verdict(3, &[1], &[2]), (true, false));
        assert_eq!(verdict(0, &[], &[]), (false, false), "a node that has just joined");
    }

    #[test]
    fn a_loss_is_named_with_its_numbers_and_its_remedies() {
        let quorum = Quorum { voters: nodes(&[1, 2, 3]), up: nodes(&[1]), down: nodes(&[2, 3]) };
        let why = quorum.lost().unwrap();
        for part in ["1 of 3 voters can be reached, and 2 must be", "start the others", "coel recover"] {
            assert!(why.contains(part), "{why}");
        }
    }
}
