//! What fits a memory budget.
//!
//! Pure arithmetic: [`Needs`] of a model on one machine, and the [`Fit`] that divides a budget among them. The invariant:
//! what it grants adds up to no more than the budget.

/// What a model takes, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// What the process has besides: code, tokenizer, threads.
    pub process: u64,
    /// Everything but routed experts, the embedding table included.
    pub trunk: u64,
    /// The embedding table, if it can stay on disk; else 0.
    pub embedding: u64,
    pub kv: u64,
    pub buffers: u64,
    /// All routed experts.
    pub experts: u64,
    /// The largest of them.
    pub expert: u64,
    /// How many must have room at once.
    pub experts_least: usize,
}

/// How a budget is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Everything is in memory.
    All,
    /// Experts take turns in `experts` bytes.
    Tiers { experts: u64, embedding_on_disk: bool },
}

/// Not even what must be in memory fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{budget} bytes of memory are too few: at least {least} are needed (trunk {trunk}, KV cache {kv}, room for \
     {experts} experts of {expert}, {rest} for everything else); give more (--memory), or hold the \
     weights less exactly where that can be (--precision)"
)]
pub struct TooSmall {
    pub budget: u64,
    /// The least that works.
    pub least: u64,
    pub trunk: u64,
    pub kv: u64,
    pub experts: usize,
    pub expert: u64,
    pub rest: u64,
}

impl Needs {
    /// Divides `budget` bytes.
    pub fn fit(&self, budget: u64) -> Result<Fit, TooSmall> {
        let fixed = self.process + self.trunk + self.kv + self.buffers;
        if fixed + self.experts <= budget {
            return Ok(Fit::All);
        }
        // One row of the table is read for each token: its memory is worth more as experts'.
        let fixed = fixed - self.embedding;
        let least = fixed + (self.expert * self.experts_least as u64).min(self.experts);
        if budget < least {
            let (trunk, kv, rest) = (self.trunk - self.embedding, self.kv, self.process + self.buffers);
            let (experts, expert) = (self.experts_least, self.expert);
            return Err(TooSmall { budget, least, trunk, kv, experts, expert, rest });
        }
        Ok(Fit::Tiers { experts: (budget - fixed).min(self.experts), embedding_on_disk: self.embedding > 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDS: Needs =
        Needs { process: 5, trunk: 100, embedding: 30, kv: 10, buffers: 5, experts: 200, expert: 8, experts_least: 4 };

    #[test]
    fn everything_or_by_turns_or_not_at_all() {
        assert_eq!(NEEDS.fit(320), Ok(Fit::All));
        assert_eq!(NEEDS.fit(319), Ok(Fit::Tiers { experts: 200, embedding_on_disk: true }));
        assert_eq!(NEEDS.fit(150), Ok(Fit::Tiers { experts: 60, embedding_on_disk: true }));
        assert_eq!(NEEDS.fit(122), Ok(Fit::Tiers { experts: 32, embedding_on_disk: true }));
        let short = NEEDS.fit(121).unwrap_err();
        assert_eq!((short.least, short.rest), (122, 10));
        assert!(short.to_string().contains("at least 122"), "{short}");
        let tied = Needs { embedding: 0, ..NEEDS };
        assert_eq!(tied.fit(152), Ok(Fit::Tiers { experts: 32, embedding_on_disk: false }));
        assert_eq!(tied.fit(151).unwrap_err().least, 152);
    }
}
