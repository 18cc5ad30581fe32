//! Round-trip time and throughput of a link, from its real traffic.
//!
//! Owns: the running figures for round-trip time and throughput of one neighbour.
//! Invariant: figures are finite and positive, and recent samples outweigh old ones.
//! Deliberately does not know: clocks and streams; durations are arguments.

use std::time::Duration;

/// Weight of a new round-trip sample.
const RTT_WEIGHT: f64 = 0.2;
/// How much of the past remains with each new transfer.
const TRANSFER_KEPT: f64 = 0.8;
/// Smallest payload whose transfer tells throughput; the time of a smaller one is mostly latency.
pub(crate) const TRANSFER_BYTES_MIN: usize = 64 * 1024;

/// Round-trip times of one neighbour. The smoothed figure rises while bulk data shares the connection and the least one does
/// not, so both are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rtt {
    /// Exponentially weighted mean.
    pub smoothed: Duration,
    /// Least ever measured.
    pub least: Duration,
}

impl Rtt {
    /// The figures after one more `sample`.
    pub(crate) fn after(before: Option<Rtt>, sample: Duration) -> Rtt {
        let Some(before) = before else {
            return Rtt { smoothed: sample, least: sample };
        };
        let smoothed = before.smoothed.mul_f64(1.0 - RTT_WEIGHT) + sample.mul_f64(RTT_WEIGHT);
        Rtt { smoothed, least: before.least.min(sample) }
    }
}

/// Bytes over seconds of recent transfers, decayed alike. A burst that had waited in a buffer seems to take no time at all:
/// it counts for its bytes, but cannot inflate the rate for long.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Throughput {
    bytes: f64,
    seconds: f64,
}

impl Throughput {
    pub fn add(&mut self, bytes: usize, took: Duration) {
        self.bytes = self.bytes * TRANSFER_KEPT + bytes as f64;
        self.seconds = self.seconds * TRANSFER_KEPT + took.as_secs_f64();
    }

    pub fn bytes_per_s(&self) -> Option<f64> {
        (self.seconds > 0.0).then(|| self.bytes / self.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_round_trip_is_smoothed_and_its_least_kept() {
        let first = Rtt::after(None, 10 * MS);
        assert_eq!(first, Rtt { smoothed: 10 * MS, least: 10 * MS });
        let second = Rtt::after(Some(first), 20 * MS);
        assert_eq!(second, Rtt { smoothed: 12 * MS, least: 10 * MS });
    }

    #[test]
    fn throughput_follows_what_is_seen() {
        let mut throughput = Throughput::default();
        assert_eq!(throughput.bytes_per_s(), None);
        throughput.add(1_000_000, 1000 * MS);
        assert_eq!(throughput.bytes_per_s(), Some(1e6));
        for _ in 0..50 {
            throughput.add(1_000_000, 100 * MS);
        }
        let rate = throughput.bytes_per_s().expect("there were transfers");
        assert!((rate / 1e7 - 1.0).abs() < 0.01, "{rate}");
    }

    #[test]
    fn a_burst_out_of_a_buffer_does_not_make_the_link_infinite() {
        let mut throughput = Throughput::default();
        throughput.add(1_000_000, Duration::ZERO);
        assert_eq!(throughput.bytes_per_s(), None);
        throughput.add(1_000_000, 1000 * MS);
        throughput.add(1_000_000, Duration::ZERO);
        let rate = throughput.bytes_per_s().expect("one transfer took time");
        assert!(rate < 4e6, "{rate}");
    }
}
