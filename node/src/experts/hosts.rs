//! What a home has learnt of its hosts from their answers: how quick they are, how busy, and who has just failed.
//!
//! Pure: the time is an argument. Gossip says who is dead, seconds after it happened; this says within one late answer whom not
//! to wait for again. It never declares anybody dead: a host that is shunned is only asked last.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use coel_store::NodeId;

/// Weight of the newest answer in the running mean.
const NEWEST: f64 = 0.1;
/// A call may take this many times what its size took before: hosts share their cores with other work.
const PATIENCE: f64 = 20.0;
/// Bounds of a deadline where another replica could take over. The lower one is longer than a busy two-core machine lets a thread
/// wait; the upper one is well below what a person takes for a hang.
const DEADLINE_MIN: Duration = Duration::from_millis(500);
const DEADLINE_MAX: Duration = Duration::from_secs(5);
/// And where there is no other: slow is better than nothing.
const DEADLINE_LAST: Duration = Duration::from_secs(30);
/// How long a host that failed is asked only when nobody else is left. Gossip has found out by then.
const SHUNNED: Duration = Duration::from_secs(10);

/// One host, from this home's side.
#[derive(Debug, Clone, Copy, Default)]
struct Host {
    in_flight: u32,
    /// Seconds per (row, expert) pair, everything included; `None` before the first answer.
    pace: Option<f64>,
    failed: Option<Instant>,
}

/// All hosts a home has asked.
#[derive(Debug, Default)]
pub struct Hosts(BTreeMap<NodeId, Host>);

impl Hosts {
    /// A call goes out.
    pub fn asked(&mut self, node: NodeId) {
        self.0.entry(node).or_default().in_flight += 1;
    }

    /// A call is over, whichever way.
    pub fn over(&mut self, node: NodeId) {
        if let Some(host) = self.0.get_mut(&node) {
            host.in_flight = host.in_flight.saturating_sub(1);
        }
    }

    /// The host answered a call of `pairs` pairs after `took`.
    pub fn answered(&mut self, node: NodeId, pairs: usize, took: Duration) {
        let host = self.0.entry(node).or_default();
        let pace = took.as_secs_f64() / pairs.max(1) as f64;
        host.pace = Some(host.pace.map_or(pace, |mean| mean + NEWEST * (pace - mean)));
        host.failed = None;
    }

    /// The host did not answer, or not with what was asked for.
    pub fn failed(&mut self, node: NodeId, now: Instant) {
        self.0.entry(node).or_default().failed = Some(now);
    }

    /// Calls that the host has not answered yet.
    pub fn in_flight(&self, node: NodeId) -> u32 {
        self.0.get(&node).map_or(0, |host| host.in_flight)
    }

    /// Whether the host failed so recently that others are better asked first.
    pub fn shunned(&self, node: NodeId, now: Instant) -> bool {
        let failed = self.0.get(&node).and_then(|host| host.failed);
        failed.is_some_and(|at| now.saturating_duration_since(at) < SHUNNED)
    }

    /// How long to wait for `pairs` pairs; `spare` if another replica could compute them all.
    pub fn deadline(&self, node: NodeId, pairs: usize, spare: bool) -> Duration {
        if !spare {
            return DEADLINE_LAST;
        }
        let Some(pace) = self.0.get(&node).and_then(|host| host.pace) else {
            return DEADLINE_MAX;
        };
        let usual = Duration::try_from_secs_f64(PATIENCE * pace * pairs as f64).unwrap_or(DEADLINE_MAX);
        (DEADLINE_MIN + usual).min(DEADLINE_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: NodeId = NodeId(2);

    #[test]
    fn deadlines_follow_the_pace_within_their_bounds() {
        let mut hosts = Hosts::default();
        assert_eq!(hosts.deadline(HOST, 4, true), DEADLINE_MAX, "nothing is known yet");
        hosts.answered(HOST, 4, Duration::from_millis(4));
        assert_eq!(hosts.deadline(HOST, 4, true), DEADLINE_MIN + Duration::from_millis(80));
        assert_eq!(hosts.deadline(HOST, 1000, true), DEADLINE_MAX);
        assert_eq!(hosts.deadline(HOST, 4, false), DEADLINE_LAST, "nobody else could do it");
        hosts.answered(HOST, 4, Duration::from_millis(44));
        assert_eq!(hosts.deadline(HOST, 4, true), DEADLINE_MIN + Duration::from_millis(160));
    }

    #[test]
    fn a_failure_is_held_against_a_host_until_it_answers_or_time_passes() {
        let (mut hosts, start) = (Hosts::default(), Instant::now());
        assert!(!hosts.shunned(HOST, start));
        hosts.failed(HOST, start);
        assert!(hosts.shunned(HOST, start + SHUNNED / 2));
        assert!(!hosts.shunned(HOST, start + SHUNNED));
        hosts.answered(HOST, 1, Duration::from_millis(1));
        assert!(!hosts.shunned(HOST, start));
    }

    #[test]
    fn calls_in_flight_are_counted() {
        let mut hosts = Hosts::default();
        hosts.asked(HOST);
        hosts.asked(HOST);
        hosts.over(HOST);
        assert_eq!((hosts.in_flight(HOST), hosts.in_flight(NodeId(3))), (1, 0));
        hosts.over(HOST);
        hosts.over(HOST);
        assert_eq!(hosts.in_flight(HOST), 0);
    }
}
