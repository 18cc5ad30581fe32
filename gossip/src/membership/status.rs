//! The 16-bit status that a node gossips about its load, and when it is worth sending.
//!
//! Owns: the two headroom bytes of the paper's Hello message and the threshold policy over them.
//! Invariant: two sends are never closer together than [`Policy::gap`], and never further apart than
//! [`Policy::keepalive`] once there is a status at all.
//! Deliberately does not know: the receivers, or how the node measured its headroom.

use std::time::{Duration, Instant};

/// Headroom of one node, each as a share of 255: `0` is exhausted, `255` is idle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Status {
    /// Free share of the memory budget.
    pub memory: u8,
    /// Free share of compute.
    pub compute: u8,
}

impl Status {
    /// From shares in `0.0..=1.0`. Values outside are clamped, and not-a-number counts as exhausted.
    pub fn from_shares(memory: f64, compute: f64) -> Status {
        // `as` saturates and maps NaN to zero, which is the cautious reading of a failed measurement.
        let byte = |share: f64| (share.clamp(0.0, 1.0) * 255.0).round() as u8;
        Status { memory: byte(memory), compute: byte(compute) }
    }

    /// Memory in the high byte, compute in the low one.
    pub const fn to_bits(self) -> u16 {
        (self.memory as u16) << 8 | self.compute as u16
    }

    /// The inverse of [`Status::to_bits`]; every pattern is a status.
    pub const fn from_bits(bits: u16) -> Status {
        Status { memory: (bits >> 8) as u8, compute: bits as u8 }
    }
}

/// When a changed status is sent. Without the keepalive a threshold would hide death; without the gap a node that
/// fluctuates around a mark would flood the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Smallest change of either byte that is worth a message (of 255).
    pub threshold: u8,
    /// Memory headroom below this is low; crossing it either way is sent whatever the change.
    pub low_memory: u8,
    /// Shortest time between two sends.
    pub gap: Duration,
    /// Longest time between two sends.
    pub keepalive: Duration,
}

impl Default for Policy {
    /// 8/255 (about 3 %), low memory at 26/255 (about 10 %), gap 250 ms, keepalive 5 s.
    fn default() -> Policy {
        Policy { threshold: 8, low_memory: 26, gap: Duration::from_millis(250), keepalive: Duration::from_secs(5) }
    }
}

/// What can happen to a [`Publisher`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// The node measured its load.
    Set(Status),
    /// Time passed.
    Tick,
}

/// Remembers what was sent last and decides whether the current status is worth sending.
#[derive(Clone, Debug)]
pub struct Publisher {
    policy: Policy,
    current: Option<Status>,
    sent: Option<(Status, Instant)>,
}

impl Publisher {
    pub fn new(policy: Policy) -> Publisher {
        Publisher { policy, current: None, sent: None }
    }

    /// Returns the status to send now, if any; the caller sends it.
    pub fn handle(&mut self, input: Input, now: Instant) -> Option<Status> {
        if let Input::Set(status) = input {
            self.current = Some(status);
        }
        let current = self.current?;
        if !self.due(current, now) {
            return None;
        }
        self.sent = Some((current, now));
        Some(current)
    }

    fn due(&self, current: Status, now: Instant) -> bool {
        let Some((sent, at)) = self.sent else { return true };
        let quiet = now.saturating_duration_since(at);
        if quiet < self.policy.gap {
            return false;
        }
        let low = |status: Status| status.memory < self.policy.low_memory;
        quiet >= self.policy.keepalive
            || low(sent) != low(current)
            || sent.memory.abs_diff(current.memory) >= self.policy.threshold
            || sent.compute.abs_diff(current.compute) >= self.policy.threshold
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn status(memory: u8, compute: u8) -> Status {
        Status { memory, compute }
    }

    /// A publisher that has sent `first` at `now`.
    fn published(first: Status, now: Instant) -> Publisher {
        let mut publisher = Publisher::new(Policy::default());
        assert_eq!(publisher.handle(Input::Set(first), now), Some(first));
        publisher
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn sixteen_bits_survive_the_round_trip() {
        for bits in 0..=u16::MAX {
            assert_eq!(Status::from_bits(bits).to_bits(), bits);
        }
        assert_eq!(status(0x12, 0x34).to_bits(), 0x1234);
    }

    #[test]
    fn shares_are_clamped_and_nan_is_exhausted() {
        assert_eq!(Status::from_shares(0.5, 2.0), status(128, 255));
        assert_eq!(Status::from_shares(-1.0, f64::NAN), status(0, 0));
    }

    #[test]
    fn nothing_is_sent_before_there_is_a_status() {
        assert_eq!(Publisher::new(Policy::default()).handle(Input::Tick, Instant::now()), None);
    }

    #[test]
    fn a_small_change_is_suppressed_and_a_change_of_the_threshold_is_sent() {
        let now = Instant::now();
        let mut publisher = published(status(100, 100), now);
        assert_eq!(publisher.handle(Input::Set(status(107, 93)), now + SECOND), None);
        let moved = status(108, 93);
        assert_eq!(publisher.handle(Input::Set(moved), now + SECOND), Some(moved));
        let moved = status(108, 101);
        assert_eq!(publisher.handle(Input::Set(moved), now + 2 * SECOND), Some(moved));
    }

    #[test]
    fn small_steps_add_up_against_the_last_sent_value() {
        let now = Instant::now();
        let mut publisher = published(status(100, 100), now);
        assert_eq!(publisher.handle(Input::Set(status(104, 100)), now + SECOND), None);
        assert_eq!(publisher.handle(Input::Set(status(108, 100)), now + SECOND), Some(status(108, 100)));
    }

    #[test]
    fn crossing_the_low_memory_mark_is_sent_either_way() {
        let now = Instant::now();
        let mut publisher = published(status(26, 100), now);
        assert_eq!(publisher.handle(Input::Set(status(25, 100)), now + SECOND), Some(status(25, 100)));
        assert_eq!(publisher.handle(Input::Set(status(26, 100)), now + 2 * SECOND), Some(status(26, 100)));
        assert_eq!(publisher.handle(Input::Set(status(27, 100)), now + 3 * SECOND), None);
    }

    #[test]
    fn the_gap_holds_back_even_a_crossing_and_the_tick_after_it_sends_the_latest() {
        let now = Instant::now();
        let mut publisher = published(status(200, 200), now);
        let gap = Policy::default().gap;
        let early = now + gap - Duration::from_millis(1);
        assert_eq!(publisher.handle(Input::Set(status(10, 200)), early), None);
        assert_eq!(publisher.handle(Input::Set(status(12, 200)), early), None);
        assert_eq!(publisher.handle(Input::Tick, now + gap), Some(status(12, 200)));
        assert_eq!(publisher.handle(Input::Tick, now + gap * 2), None);
    }

    #[test]
    fn a_quiet_status_is_kept_alive() {
        let now = Instant::now();
        let mut publisher = published(status(1, 2), now);
        let keepalive = Policy::default().keepalive;
        assert_eq!(publisher.handle(Input::Tick, now + keepalive - Duration::from_millis(1)), None);
        assert_eq!(publisher.handle(Input::Tick, now + keepalive), Some(status(1, 2)));
        assert_eq!(publisher.handle(Input::Tick, now + keepalive + SECOND), None);
    }
}
