//! What an engine's weights, caches and buffers take.
//!
//! Owns [`Ledger`], plain numbers. The invariant: a byte is counted once, in whichever memory it is.

/// Bytes an engine accounts for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Ledger {
    pub trunk_bytes: u64,
    /// Of the experts that are in memory for good, each of them once, on a GPU or in host memory.
    pub expert_bytes: u64,
    /// All memory that experts on disk take by turns; 0 while none is on disk.
    pub disk_cache_bytes_reserved: u64,
    /// Of experts on disk, the copies that are on a GPU.
    pub disk_cache_bytes_promoted: u64,
    /// The whole KV pool, in use or not.
    pub kv_bytes_reserved: u64,
    pub buffer_bytes: u64,
    /// Of all these, what is in host memory while the device is a GPU; 0 where everything is in one memory.
    pub cpu_offload_bytes: u64,
}

impl Ledger {
    /// In both memories, where there are two.
    pub fn total(&self) -> u64 {
        self.trunk_bytes
            + self.expert_bytes
            + self.disk_cache_bytes_reserved
            + self.disk_cache_bytes_promoted
            + self.kv_bytes_reserved
            + self.buffer_bytes
    }
}
