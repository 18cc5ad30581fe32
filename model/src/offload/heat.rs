//! How much an expert is used.
//!
//! Owns [`Heat`], which every use adds to and which counts a use half [`HALF_LIFE`] ticks later. The invariant: heats of
//! any two experts compare now as they will at any later tick, if neither is used meanwhile; so nothing has to decay.

/// Ticks after which a use counts half.
pub(super) const HALF_LIFE: f64 = 64.0;

/// Logarithm, to base 2, of the uses so far, each weighed by 2^(tick / half-life).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Heat(f64);

impl Heat {
    /// Never used.
    pub(super) const NONE: Self = Self(f64::NEG_INFINITY);

    /// After one more use, at `tick`, by a share of rows.
    #[must_use]
    pub(super) fn after(self, tick: u64, share: f64) -> Self {
        let use_now = tick as f64 / HALF_LIFE + share.max(f64::MIN_POSITIVE).log2();
        let (low, high) = (self.0.min(use_now), self.0.max(use_now));
        Self(match low == f64::NEG_INFINITY {
            true => high,
            false => high + (low - high).exp2().ln_1p() / std::f64::consts::LN_2,
        })
    }

    /// As much as this, divided by `factor`.
    #[must_use]
    pub(super) fn over(self, factor: f64) -> Self {
        Self(self.0 - factor.log2())
    }

    pub(super) fn total_cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }

    pub(super) fn is_at_least(&self, other: &Self) -> bool {
        self.0 >= other.0
    }
}
