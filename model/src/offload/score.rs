//! How much an entry of a cache is used.
//!
//! Owns [`Score`]: the sum of an entry's uses, in which a use counts half after [`HALF_LIFE`] ticks. This is the
//! combined recency and frequency of LRFU (Lee et al., 2001), kept as a logarithm. The invariant: two scores compare
//! the same now and at any later tick, unless one of the entries is used in between. So nothing has to decay.

/// Ticks after which a use counts half.
pub(super) const HALF_LIFE: f64 = 64.0;

/// Base-2 logarithm of the sum of all uses, each weighted by 2^(tick / half-life).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Score(f64);

impl Score {
    /// The score of an entry that was never used.
    pub(super) const NONE: Self = Self(f64::NEG_INFINITY);

    /// The score after one more use, at `tick`, by a share of the rows.
    #[must_use]
    pub(super) fn after_use(self, tick: u64, share: f64) -> Self {
        let use_now = tick as f64 / HALF_LIFE + share.max(f64::MIN_POSITIVE).log2();
        let (low, high) = (self.0.min(use_now), self.0.max(use_now));
        Self(match low == f64::NEG_INFINITY {
            true => high,
            false => high + (low - high).exp2().ln_1p() / std::f64::consts::LN_2,
        })
    }

    /// The score of an entry that is used `factor` times less.
    #[must_use]
    pub(super) fn divided_by(self, factor: f64) -> Self {
        Self(self.0 - factor.log2())
    }

    pub(super) fn total_cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }

    pub(super) fn is_at_least(&self, other: &Self) -> bool {
        self.0 >= other.0
    }
}
