//! When this node stands for election: the pre-vote, as a state machine.
//!
//! Owns [`Election`]. A voter that has heard of no leader for a while asks the other voters whether they have, and stands for
//! election only if a majority has not either. So a node that was cut off or stopped does not raise the term when it comes
//! back, and disturbs nobody (Ongaro, "Consensus: Bridging Theory and Practice", section 9.6). Word that the
//! leader's process is gone shortens the wait.
//!
//! Invariants: nobody stands for election without the word of a majority of each configuration; a node grants nothing while it
//! leads, while it hears a leader, or to one whose log is behind its own. Time and randomness are arguments. It does not
//! know how voters are asked, nor what an election is.

use crate::ids::NodeId;
use rand::Rng;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::voters::majority;

/// Pause before a voter asks, once the leader is said to be gone: at random, so that one of them is first.
const SUSPECTED_WITHIN: Duration = Duration::from_millis(150);
/// Pause before it asks again, since the others may not have heard yet that the leader is gone.
const SUSPECTED_AGAIN: Duration = Duration::from_millis(250);

/// What this node knows of the consensus group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Electorate {
    /// This node.
    pub node: NodeId,
    /// Whether it leads.
    pub leads: bool,
    /// Whether it may stand for election.
    pub may_stand: bool,
    /// The voters; two sets while they are being changed.
    pub voters: Vec<BTreeSet<NodeId>>,
}

impl Electorate {
    fn can_stand(&self) -> bool {
        self.may_stand && self.voters.iter().any(|voters| voters.contains(&self.node))
    }

    fn is_majority(&self, nodes: &BTreeSet<NodeId>) -> bool {
        self.voters.iter().all(|voters| voters.intersection(nodes).count() >= majority(voters.len()))
    }
}

/// What happens to the election.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// The leader was heard.
    LeaderHeard,
    /// The leader's process is said to be gone.
    LeaderSuspected,
    /// Time has passed.
    Tick,
    /// A voter answered in this round.
    Answer { round: u64, from: NodeId, granted: bool },
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Ask these whether they would vote for this node.
    Ask { round: u64, voters: BTreeSet<NodeId> },
    /// Stand for election.
    Stand,
}

/// The state of one node.
#[derive(Debug)]
pub(super) struct Election {
    wait: std::ops::Range<Duration>,
    heard: Instant,
    suspected: bool,
    due: Instant,
    round: u64,
    /// Who granted this round; nothing while none is open.
    granted: Option<BTreeSet<NodeId>>,
}

impl Election {
    /// A node that starts. It has heard of a leader just now, as far as it knows. Voters wait for a time in `wait`.
    pub fn new(wait: std::ops::Range<Duration>, now: Instant, rng: &mut impl Rng) -> Self {
        let due = now + rng.random_range(wait.clone());
        Self { wait, heard: now, suspected: false, due, round: 0, granted: None }
    }

    /// When the next [`Input::Tick`] is due.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Takes what happened, and says what to do.
    pub fn handle(&mut self, input: Input, group: &Electorate, now: Instant, rng: &mut impl Rng) -> Vec<Effect> {
        match input {
            Input::LeaderHeard => {
                (self.heard, self.suspected, self.granted) = (now, false, None);
                self.due = now + rng.random_range(self.wait.clone());
                Vec::new()
            }
            Input::LeaderSuspected => {
                self.suspected = true;
                self.due = self.due.min(now + rng.random_range(Duration::ZERO..SUSPECTED_WITHIN));
                Vec::new()
            }
            Input::Tick => self.tick(group, now, rng),
            Input::Answer { round, from, granted } => {
                if let Some(nodes) = self.granted.as_mut().filter(|_| round == self.round && granted) {
                    nodes.insert(from);
                }
                self.conclude(group, now, rng)
            }
        }
    }

    fn tick(&mut self, group: &Electorate, now: Instant, rng: &mut impl Rng) -> Vec<Effect> {
        // A single voter needs nobody's word and waits for nobody.
        let alone = group.can_stand() && !group.leads && group.voters.iter().all(|voters| voters.len() == 1);
        if now < self.due && !alone {
            return Vec::new();
        }
        self.due = now + rng.random_range(self.wait.clone());
        if group.leads || !group.can_stand() {
            self.granted = None;
            return Vec::new();
        }
        // Where the leader is said to be gone, the others may not have heard it yet. They are asked again soon, in the same round,
        // so that a late answer counts.
        if !(self.suspected && self.granted.is_some()) {
            self.round += 1;
            self.granted = Some(BTreeSet::from([group.node]));
        }
        let concluded = self.conclude(group, now, rng);
        if !concluded.is_empty() {
            return concluded;
        }
        if self.suspected {
            self.due = now + rng.random_range(SUSPECTED_AGAIN / 2..SUSPECTED_AGAIN);
        }
        let mut voters: BTreeSet<NodeId> = group.voters.iter().flatten().copied().collect();
        voters.retain(|voter| self.granted.as_ref().is_none_or(|granted| !granted.contains(voter)));
        vec![Effect::Ask { round: self.round, voters }]
    }

    /// Stands once a majority has granted it. The election then has time to end before anybody is asked again: standing anew would
    /// void the votes that are on their way.
    fn conclude(&mut self, group: &Electorate, now: Instant, rng: &mut impl Rng) -> Vec<Effect> {
        match &self.granted {
            Some(granted) if !group.leads && group.is_majority(granted) => {
                self.granted = None;
                self.due = now + rng.random_range(self.wait.clone());
                vec![Effect::Stand]
            }
            _ => Vec::new(),
        }
    }

    /// Whether this node would vote for another, whose log ends `behind` this node's or not.
    pub fn grants(&self, group: &Electorate, behind: bool, now: Instant) -> bool {
        let hears = !self.suspected && now.saturating_duration_since(self.heard) < self.wait.start;
        !group.leads && !hears && !behind
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    const WAIT: std::ops::Range<Duration> = Duration::from_millis(1000)..Duration::from_millis(2000);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn set(ids: &[u64]) -> BTreeSet<NodeId> {
        ids.iter().copied().map(NodeId).collect()
    }

    struct World {
        election: Election,
        group: Electorate,
        start: Instant,
        rng: SmallRng,
    }

    impl World {
        fn new(voters: &[&[u64]]) -> Self {
            let (start, mut rng) = (Instant::now(), SmallRng::seed_from_u64(7));
            let voters = voters.iter().map(|voters| set(voters)).collect();
            let group = Electorate { node: NodeId(1), leads: false, may_stand: true, voters };
            Self { election: Election::new(WAIT, start, &mut rng), group, start, rng }
        }

        fn at(&mut self, millis: u64, input: Input) -> Vec<Effect> {
            self.election.handle(input, &self.group, self.start + ms(millis), &mut self.rng)
        }

        fn grants(&self, millis: u64, behind: bool) -> bool {
            self.election.grants(&self.group, behind, self.start + ms(millis))
        }
    }

    fn answer(round: u64, from: u64, granted: bool) -> Input {
        Input::Answer { round, from: NodeId(from), granted }
    }

    #[test]
    fn a_voter_that_hears_no_leader_asks_the_others_and_stands_with_a_majority() {
        let mut world = World::new(&[&[1, 2, 3]]);
        assert_eq!(world.at(999, Input::Tick), []);
        assert_eq!(world.at(2000, Input::Tick), [Effect::Ask { round: 1, voters: set(&[2, 3]) }]);
        assert_eq!(world.at(2001, answer(1, 2, false)), []);
        assert_eq!(world.at(2002, answer(1, 3, true)), [Effect::Stand]);
        assert_eq!(world.at(2003, answer(1, 2, true)), [], "it stands once");
        assert_eq!(world.at(2500, Input::Tick), [], "and then waits for the outcome");
        assert_eq!(world.at(4500, Input::Tick), [Effect::Ask { round: 2, voters: set(&[2, 3]) }]);
        assert_eq!(world.at(4501, answer(1, 2, true)), [], "of another round");
    }

    #[test]
    fn a_node_that_was_cut_off_raises_no_term_and_is_quiet_once_it_hears_the_leader() {
        let mut world = World::new(&[&[1, 2, 3]]);
        for (round, at) in (1..20).zip((2000..).step_by(2000)) {
            assert_eq!(world.at(at, Input::Tick), [Effect::Ask { round, voters: set(&[2, 3]) }]);
            // Stopped for so long, it asks first; the others hear a leader.
            assert_eq!(world.at(at + 1, answer(round, 2, false)), []);
        }
        assert_eq!(world.at(40_000, Input::LeaderHeard), []);
        assert_eq!((world.at(40_001, answer(19, 3, true)), world.at(40_999, Input::Tick)), (vec![], vec![]));
    }

    #[test]
    fn a_leader_that_is_gone_is_replaced_at_once() {
        let mut world = World::new(&[&[1, 2, 3]]);
        world.at(500, Input::LeaderHeard);
        assert!(!world.grants(510, false), "a leader was heard a moment ago");
        world.at(520, Input::LeaderSuspected);
        assert!(world.grants(520, false) && !world.grants(520, true), "not to a log that is behind");
        assert_eq!(world.at(670, Input::Tick), [Effect::Ask { round: 1, voters: set(&[2, 3]) }]);
        assert_eq!(world.at(671, answer(1, 2, false)), [], "it has not noticed yet");
        assert_eq!(world.at(920, Input::Tick), [Effect::Ask { round: 1, voters: set(&[2, 3]) }]);
        assert_eq!(world.at(925, answer(1, 3, true)), [Effect::Stand], "a late answer counts");
        assert_eq!(world.at(1900, Input::Tick), [], "the election has time to end");
        world.at(1930, Input::LeaderHeard);
        assert!(!world.grants(1931, false), "there is a leader again");
    }

    #[test]
    fn only_voters_stand_and_leaders_grant_nothing() {
        let mut learner = World::new(&[&[2, 3, 4]]);
        assert_eq!(learner.at(5000, Input::Tick), []);
        let mut leader = World::new(&[&[1, 2, 3]]);
        leader.group.leads = true;
        assert_eq!(leader.at(5000, Input::Tick), []);
        assert!(!leader.grants(9000, false));
        let mut alone = World::new(&[&[1]]);
        assert_eq!(alone.at(0, Input::Tick), [Effect::Stand], "it needs nobody's word");
    }

    #[test]
    fn who_may_not_stand_does_not_and_then_does() {
        let mut world = World::new(&[&[1, 2, 3]]);
        world.group.may_stand = false;
        assert_eq!((world.at(2000, Input::Tick), world.at(4000, Input::Tick)), (vec![], vec![]));
        world.group.may_stand = true;
        assert_eq!(world.at(6000, Input::Tick), [Effect::Ask { round: 1, voters: set(&[2, 3]) }]);
    }

    #[test]
    fn while_voters_are_changed_both_majorities_are_needed() {
        let mut world = World::new(&[&[1, 2, 3], &[1, 4, 5]]);
        assert_eq!(world.at(2000, Input::Tick), [Effect::Ask { round: 1, voters: set(&[2, 3, 4, 5]) }]);
        assert_eq!((world.at(2001, answer(1, 2, true)), world.at(2002, answer(1, 3, true))), (vec![], vec![]));
        assert_eq!(world.at(2003, answer(1, 5, true)), [Effect::Stand]);
    }
}
