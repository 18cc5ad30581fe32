//! What an engine's weights, caches and buffers take.
//!
//! Owns [`Ledger`], plain numbers. The invariant: a byte is counted once, in whichever memory it is.

/// Bytes an engine accounts for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Ledger {
    pub trunk_bytes: u64,
    /// Of the experts that are in memory for good, each of them once, on a device or beneath.
    pub expert_bytes: u64,
    /// What experts on disk take by turns, all of it; 0 while none is there.
    pub tier_bytes_reserved: u64,
    /// Of those of them that are on a device, where there is host memory beneath it.
    pub tier_bytes_raised: u64,
    /// The whole pool, in use or not.
    pub kv_bytes_reserved: u64,
    pub buffer_bytes: u64,
    /// Of all these, what is in host memory beneath a device; nothing where all is in one memory.
    pub beneath_bytes: u64,
}

impl Ledger {
    /// In both memories, where there are two.
    pub fn total(&self) -> u64 {
        self.trunk_bytes
            + self.expert_bytes
            + self.tier_bytes_reserved
            + self.tier_bytes_raised
            + self.kv_bytes_reserved
            + self.buffer_bytes
    }
}
