//! What a home has measured of its hosts: how fast they compute, how many of its rows they still owe, and which failed.
//!
//! Owns [`HostTable`], which is pure: the time is an argument. Gossip declares a node down seconds after it died; this table
//! reacts within one late answer. It never declares a node down: a host that is *cooling down* is asked last.
//!
//! A *row* here is one token's row through one expert: the unit in which a host's work is counted.
//!
//! The invariant: the rows in flight at a host are those of the attempts that [`HostTable::sent`] announced and
//! [`HostTable::settled`] has not closed. What is kept of a host is bounded, whatever it sends.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coel_store::NodeId;

use super::class;

/// Weight of the newest answer in the running mean.
const NEWEST: f64 = 0.1;
/// A call may take this many times its estimate: hosts share their cores with other work.
const PATIENCE: f64 = 20.0;
/// Bounds of a deadline where another replica could take over. The lower bound is longer than a busy two-core machine lets
/// a thread wait; the upper bound is well below what a person takes for a hang.
const DEADLINE_MIN: Duration = Duration::from_millis(500);
const DEADLINE_MAX: Duration = Duration::from_secs(5);
/// The deadline where no other replica is left: slow is better than nothing.
const DEADLINE_LAST: Duration = Duration::from_secs(30);
/// How long a host that failed is asked last. Gossip has noticed by then.
const COOL_DOWN: Duration = Duration::from_secs(10);
/// A host is overloaded if its estimate exceeds this: half of the longest deadline, beyond which a call may well be given
/// up before it is answered.
const OVERLOADED_AFTER: Duration = DEADLINE_MAX.checked_div(2).expect("two is not zero");
/// Round trip to a host whose pings nobody has measured yet: an ordinary LAN's.
const ROUND_TRIP_PRIOR: Duration = Duration::from_millis(1);
/// Seconds per row where no host was measured yet: reading an expert of 17 MB from memory at 17 GB/s.
const ROW_SECONDS_PRIOR: f64 = 1e-3;
/// Kernel classes kept of one host. A host that computes on two devices at three precisions has at most 63.
const CLASSES_MAX: usize = 64;

/// One host, from this home's side.
#[derive(Debug, Clone, Default)]
struct HostRecord {
    rows_in_flight: usize,
    /// Running mean of the seconds per row, the round trip not counted; `None` before the first answer.
    row_s: Option<f64>,
    failed_at: Option<Instant>,
    classes: Vec<Arc<str>>,
}

/// A reply that brought the rows asked for, as far as speed is concerned.
#[derive(Debug, Clone, Copy)]
pub struct Answered {
    /// Rows of the call.
    pub rows: usize,
    /// Rows of this home that the host still owed when the call was sent.
    pub rows_ahead: usize,
    /// From the sending to the reply.
    pub took: Duration,
    /// Smoothed round trip of pings, where it was measured.
    pub round_trip: Option<Duration>,
}

/// All hosts that a home has asked.
#[derive(Debug, Default)]
pub struct HostTable(BTreeMap<NodeId, HostRecord>);

impl HostTable {
    /// A call of `rows` rows goes out.
    pub fn sent(&mut self, node: NodeId, rows: usize) {
        self.0.entry(node).or_default().rows_in_flight += rows;
    }

    /// A call of `rows` rows is over: answered, failed or given up.
    pub fn settled(&mut self, node: NodeId, rows: usize) {
        if let Some(host) = self.0.get_mut(&node) {
            host.rows_in_flight = host.rows_in_flight.saturating_sub(rows);
        }
    }

    /// The host answered with the rows asked for. What it took beyond the round trip is spread over all rows that the host
    /// owed this home at the time, so that rows which waited behind others do not make it look slow.
    pub fn answered(&mut self, node: NodeId, answered: Answered) {
        let Answered { rows, rows_ahead, took, round_trip } = answered;
        let computing = took.saturating_sub(round_trip.unwrap_or_default());
        let row_s = computing.as_secs_f64() / (rows_ahead + rows).max(1) as f64;
        let host = self.0.entry(node).or_default();
        host.row_s = Some(host.row_s.map_or(row_s, |mean| mean + NEWEST * (row_s - mean)));
        host.failed_at = None;
    }

    /// The host did not answer, or not with what was asked for.
    pub fn failed(&mut self, node: NodeId, now: Instant) {
        self.0.entry(node).or_default().failed_at = Some(now);
    }

    /// Rows that the host still owes this home.
    pub fn rows_in_flight(&self, node: NodeId) -> usize {
        self.0.get(&node).map_or(0, |host| host.rows_in_flight)
    }

    /// Whether the host failed so recently that others are asked first.
    pub fn is_cooling_down(&self, node: NodeId, now: Instant) -> bool {
        let failed_at = self.0.get(&node).and_then(|host| host.failed_at);
        failed_at.is_some_and(|at| now.saturating_duration_since(at) < COOL_DOWN)
    }

    /// When the host would answer a call of `rows` rows that is sent now: a round trip, and the time that these rows and
    /// those in flight take at the measured pace. A host that was never measured counts as fast as the mean of the others.
    pub fn estimate(&self, node: NodeId, round_trip: Option<Duration>, rows: usize) -> Duration {
        let queued = self.rows_in_flight(node) + rows;
        let computing = Duration::try_from_secs_f64(queued as f64 * self.row_s(node)).unwrap_or(Duration::MAX);
        round_trip.unwrap_or(ROUND_TRIP_PRIOR).saturating_add(computing)
    }

    /// Whether a host of this [estimate](Self::estimate) is overloaded: then an available host of a lower precision is
    /// preferred. A host that owes this home nothing is not overloaded, however slow its last answer was: asked again, it is
    /// measured anew.
    pub fn is_overloaded(&self, node: NodeId, estimate: Duration) -> bool {
        self.rows_in_flight(node) > 0 && estimate > OVERLOADED_AFTER
    }

    /// How long to wait for `rows` rows that are sent now. `spare` says whether other replicas could compute them all.
    pub fn deadline(&self, node: NodeId, round_trip: Option<Duration>, rows: usize, spare: bool) -> Duration {
        if !spare {
            return DEADLINE_LAST;
        }
        if self.0.get(&node).is_none_or(|host| host.row_s.is_none()) {
            return DEADLINE_MAX;
        }
        let estimate = self.estimate(node, round_trip, rows);
        let patient = Duration::try_from_secs_f64(PATIENCE * estimate.as_secs_f64()).unwrap_or(DEADLINE_MAX);
        DEADLINE_MIN.saturating_add(patient).min(DEADLINE_MAX)
    }

    /// The kernel class that the host reports, from what is kept of it. Beyond 64 classes of one host the answer names
    /// the precisions only.
    pub fn intern_class(&mut self, node: NodeId, class: &str) -> Arc<str> {
        let classes = &mut self.0.entry(node).or_default().classes;
        if let Some(known) = classes.iter().find(|known| ***known == *class) {
            return known.clone();
        }
        if classes.len() == CLASSES_MAX {
            return class::unlisted(class).into();
        }
        let class: Arc<str> = class.into();
        classes.push(class.clone());
        class
    }

    fn row_s(&self, node: NodeId) -> f64 {
        let measured = |host: &HostRecord| host.row_s;
        self.0.get(&node).and_then(measured).unwrap_or_else(|| {
            let (count, sum) = self.0.values().filter_map(measured).fold((0, 0.0), |(n, sum), s| (n + 1, sum + s));
            if count == 0 { ROW_SECONDS_PRIOR } else { sum / f64::from(count) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: NodeId = NodeId(2);
    const OTHER: NodeId = NodeId(3);
    const NO_DISTANCE: Option<Duration> = Some(Duration::ZERO);

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn answer(hosts: &mut HostTable, node: NodeId, rows: usize, took_ms: u64) {
        hosts.answered(node, Answered { rows, rows_ahead: 0, took: ms(took_ms), round_trip: NO_DISTANCE });
    }

    #[test]
    fn deadlines_follow_the_estimate_within_their_bounds() {
        let mut hosts = HostTable::default();
        let deadline = |hosts: &HostTable, rows, spare| hosts.deadline(HOST, NO_DISTANCE, rows, spare);
        assert_eq!(deadline(&hosts, 4, true), DEADLINE_MAX, "nothing is known yet");
        answer(&mut hosts, HOST, 4, 4);
        assert_eq!(deadline(&hosts, 4, true), DEADLINE_MIN + ms(80));
        assert_eq!(deadline(&hosts, 1000, true), DEADLINE_MAX);
        assert_eq!(deadline(&hosts, 4, false), DEADLINE_LAST, "no other host could do it");
        assert_eq!(hosts.deadline(HOST, Some(ms(10)), 4, true), DEADLINE_MIN + ms(280), "the round trip counts");
        answer(&mut hosts, HOST, 4, 44);
        assert_eq!(deadline(&hosts, 4, true), DEADLINE_MIN + ms(160));
        hosts.sent(HOST, 4);
        assert_eq!(deadline(&hosts, 4, true), DEADLINE_MIN + ms(320), "queued rows count");
    }

    #[test]
    fn a_failed_host_cools_down_until_it_answers_or_time_passes() {
        let (mut hosts, start) = (HostTable::default(), Instant::now());
        assert!(!hosts.is_cooling_down(HOST, start));
        hosts.failed(HOST, start);
        assert!(hosts.is_cooling_down(HOST, start + COOL_DOWN / 2));
        assert!(!hosts.is_cooling_down(HOST, start + COOL_DOWN));
        answer(&mut hosts, HOST, 1, 1);
        assert!(!hosts.is_cooling_down(HOST, start));
    }

    #[test]
    fn rows_in_flight_are_counted() {
        let mut hosts = HostTable::default();
        hosts.sent(HOST, 3);
        hosts.sent(HOST, 4);
        hosts.settled(HOST, 3);
        assert_eq!((hosts.rows_in_flight(HOST), hosts.rows_in_flight(OTHER)), (4, 0));
        hosts.settled(HOST, 4);
        hosts.settled(HOST, 4);
        assert_eq!(hosts.rows_in_flight(HOST), 0);
    }

    #[test]
    fn the_estimate_is_the_round_trip_and_the_rows_queued_before_and_with_the_call() {
        let mut hosts = HostTable::default();
        answer(&mut hosts, HOST, 4, 8);
        assert_eq!(hosts.estimate(HOST, Some(ms(5)), 3), ms(5 + 3 * 2));
        hosts.sent(HOST, 10);
        assert_eq!(hosts.estimate(HOST, Some(ms(5)), 3), ms(5 + 13 * 2));
    }

    #[test]
    fn load_counts_before_anything_was_measured() {
        let mut hosts = HostTable::default();
        let idle = hosts.estimate(HOST, None, 2);
        assert_eq!(idle, ROUND_TRIP_PRIOR + Duration::from_secs_f64(2.0 * ROW_SECONDS_PRIOR));
        hosts.sent(HOST, 100);
        assert!(hosts.estimate(HOST, None, 2) > hosts.estimate(OTHER, None, 2));
    }

    #[test]
    fn an_unmeasured_host_counts_as_the_mean_of_the_measured_ones() {
        let mut hosts = HostTable::default();
        answer(&mut hosts, OTHER, 1, 2);
        answer(&mut hosts, NodeId(4), 1, 4);
        assert_eq!(hosts.estimate(HOST, NO_DISTANCE, 2), ms(6));
    }

    #[test]
    fn neither_the_round_trip_nor_the_rows_ahead_make_a_host_look_slow() {
        let mut hosts = HostTable::default();
        hosts.answered(HOST, Answered { rows: 2, rows_ahead: 8, took: ms(30), round_trip: Some(ms(10)) });
        assert_eq!(hosts.estimate(HOST, NO_DISTANCE, 1), ms(2));
        let instant = Answered { rows: 1, rows_ahead: 0, took: ms(1), round_trip: Some(ms(50)) };
        hosts.answered(OTHER, instant);
        assert_eq!(
            hosts.estimate(OTHER, NO_DISTANCE, 1000),
            Duration::ZERO,
            "a reply faster than a ping costs nothing"
        );
    }

    #[test]
    fn overload_begins_at_half_the_longest_deadline() {
        let (mut hosts, node) = (HostTable::default(), NodeId(1));
        assert!(!hosts.is_overloaded(node, DEADLINE_MAX), "it owes nothing");
        hosts.sent(node, 1);
        assert!(!hosts.is_overloaded(node, DEADLINE_MAX / 2));
        assert!(hosts.is_overloaded(node, DEADLINE_MAX / 2 + ms(1)));
    }

    #[test]
    fn what_is_kept_of_a_hosts_classes_is_bounded() {
        let mut hosts = HostTable::default();
        let first = hosts.intern_class(HOST, "cpu-avx2/exact");
        assert!(Arc::ptr_eq(&first, &hosts.intern_class(HOST, "cpu-avx2/exact")), "kept once");
        for number in 0..1000 {
            hosts.intern_class(HOST, &format!("class {number}/q4"));
        }
        assert_eq!(hosts.0[&HOST].classes.len(), CLASSES_MAX);
        assert_eq!(&*hosts.intern_class(HOST, "class 999/q4"), "unlisted/q4");
        assert_eq!(hosts.intern_class(HOST, "cpu-avx2/exact"), first, "what was known before stays");
        assert_eq!(&*hosts.intern_class(OTHER, "class 999/q4"), "class 999/q4", "another host has its own");
    }
}
