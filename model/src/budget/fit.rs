//! What fits a memory budget.
//!
//! Pure arithmetic: [`Needs`] of a model on one machine, and what divides a budget among them: [`Fit`] of one memory, or
//! [`Needs::fit_device`] and [`HostFit`] where a device has memory of its own. The invariant: what is granted adds up to no
//! more than the budget.

/// What a model takes, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// What the process has besides: code, tokenizer, threads.
    pub process: u64,
    /// Everything but routed experts, the embedding table included.
    pub trunk: u64,
    /// The embedding table, if it can stay on disk; else 0.
    pub embedding: u64,
    /// The same table, wherever it can be: beside a device it stays in host memory.
    pub table: u64,
    /// What of the trunk lies in the memory of a device that has its own.
    pub device_trunk: u64,
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
    DiskOffload { experts: u64, embedding_on_disk: bool },
}

/// How host memory is divided where a device has memory of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFit {
    /// Bytes that experts on disk take by turns, if not all of them fit both memories.
    pub disk_cache: Option<u64>,
    pub embedding_on_disk: bool,
}

/// Not even what must be in a device's memory fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{budget} bytes of the GPU's memory are too few: at least {least} are needed (trunk {trunk}, KV cache {kv}, buffers \
     {buffers}); give more (--vram), a shorter context, or hold the trunk less exactly (--trunk q4)"
)]
pub struct DeviceTooSmall {
    pub budget: u64,
    /// The least that works.
    pub least: u64,
    pub trunk: u64,
    pub kv: u64,
    pub buffers: u64,
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
        Ok(Fit::DiskOffload { experts: (budget - fixed).min(self.experts), embedding_on_disk: self.embedding > 0 })
    }

    /// Of `budget` bytes of a device's memory, those that are left for experts.
    pub fn fit_device(&self, budget: u64) -> Result<u64, DeviceTooSmall> {
        let Self { device_trunk: trunk, kv, buffers, .. } = *self;
        let least = trunk + kv + buffers;
        budget.checked_sub(least).ok_or(DeviceTooSmall { budget, least, trunk, kv, buffers })
    }

    /// Divides `budget` bytes of host memory, where so many bytes of a device's are left for experts.
    pub fn fit_host(&self, budget: u64, device: u64) -> Result<HostFit, TooSmall> {
        let experts = self.experts.saturating_sub(device);
        // Two that change places are both here for a moment.
        let exchange = if experts > 0 { self.expert } else { 0 };
        let fixed = self.process + self.table;
        if fixed + experts + exchange <= budget {
            return Ok(HostFit { disk_cache: None, embedding_on_disk: false });
        }
        let (fixed, embedding_on_disk) = (fixed - self.embedding, self.embedding > 0);
        if fixed + experts + exchange <= budget {
            return Ok(HostFit { disk_cache: None, embedding_on_disk });
        }
        let least = fixed + (self.expert * self.experts_least as u64).min(experts + exchange);
        if budget < least {
            let (trunk, kv, rest) = (self.table - self.embedding, 0, self.process);
            let (experts, expert) = (self.experts_least, self.expert);
            return Err(TooSmall { budget, least, trunk, kv, experts, expert, rest });
        }
        Ok(HostFit { disk_cache: Some((budget - fixed).min(self.experts)), embedding_on_disk })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDS: Needs = Needs {
        process: 5,
        trunk: 100,
        embedding: 30,
        table: 30,
        device_trunk: 70,
        kv: 10,
        buffers: 5,
        experts: 200,
        expert: 8,
        experts_least: 4,
    };

    #[test]
    fn two_memories_are_divided() {
        assert_eq!((NEEDS.fit_device(85), NEEDS.fit_device(385)), (Ok(0), Ok(300)));
        let short = NEEDS.fit_device(84).unwrap_err();
        assert_eq!(short.least, 85);
        assert!(short.to_string().contains("at least 85") && short.to_string().contains("--vram"), "{short}");

        let held = |embedding_on_disk| Ok(HostFit { disk_cache: None, embedding_on_disk });
        assert_eq!((NEEDS.fit_host(35, 200), NEEDS.fit_host(5, 300)), (held(false), held(true)), "all on the device");
        assert_eq!(NEEDS.fit_host(4, 300).unwrap_err().least, 5);
        assert_eq!((NEEDS.fit_host(143, 100), NEEDS.fit_host(113, 100)), (held(false), held(true)));
        let paged = |bytes| Ok(HostFit { disk_cache: Some(bytes), embedding_on_disk: true });
        assert_eq!((NEEDS.fit_host(112, 100), NEEDS.fit_host(37, 0)), (paged(107), paged(32)));
        let short = NEEDS.fit_host(36, 100).unwrap_err();
        assert_eq!(short.least, 37);
        let tied = Needs { embedding: 0, device_trunk: 100, ..NEEDS };
        assert_eq!((tied.fit_host(143, 100), tied.fit_host(66, 100).unwrap_err().least), (held(false), 67));
    }

    #[test]
    fn everything_or_by_turns_or_not_at_all() {
        assert_eq!(NEEDS.fit(320), Ok(Fit::All));
        assert_eq!(NEEDS.fit(319), Ok(Fit::DiskOffload { experts: 200, embedding_on_disk: true }));
        assert_eq!(NEEDS.fit(150), Ok(Fit::DiskOffload { experts: 60, embedding_on_disk: true }));
        assert_eq!(NEEDS.fit(122), Ok(Fit::DiskOffload { experts: 32, embedding_on_disk: true }));
        let short = NEEDS.fit(121).unwrap_err();
        assert_eq!((short.least, short.rest), (122, 10));
        assert!(short.to_string().contains("at least 122"), "{short}");
        let tied = Needs { embedding: 0, ..NEEDS };
        assert_eq!(tied.fit(152), Ok(Fit::DiskOffload { experts: 32, embedding_on_disk: false }));
        assert_eq!(tied.fit(151).unwrap_err().least, 152);
    }
}
