//! How much memory a node of the testnet is given.
//!
//! Owns the arithmetic only: trunk, KV cache and buffers whole, since every node runs the trunk, and a share of the expert
//! bytes. The invariant that makes the mesh worth having: below 100 % no node can hold every expert.

use std::path::Path;

use anyhow::{Context, Result};
use coel_model::checkpoint::Checkpoint;
use coel_model::footprint::Footprint;
use coel_model::parts::{Part, parts};
use coel_node::experts::wire;

/// KV cache of a testnet node, in tokens: one full context of the bundled model.
const KV_TOKENS: usize = 2048;

/// What a model takes on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Trunk, KV cache and buffers, in bytes.
    pub fixed_bytes: u64,
    /// KV cache that was counted, in tokens.
    pub kv_tokens: usize,
    /// The largest expert, in bytes.
    pub expert_bytes: u64,
    /// Experts of the model.
    pub experts: usize,
    /// (row, expert) pairs that one token costs over all layers.
    pub pairs_per_token: u64,
}

impl Budget {
    /// The model's, at the precision of the checkpoint.
    ///
    /// # Errors
    /// The checkpoint's own faults.
    pub fn of(dir: &Path) -> Result<Self> {
        let opened = Checkpoint::open(dir);
        let checkpoint = opened.with_context(|| format!("the model in {} cannot be opened", dir.display()))?;
        let config = checkpoint.config();
        let footprint = Footprint::of(config, config.dtype);
        let kv_tokens = KV_TOKENS.min(config.max_position_embeddings);
        let rows_max = wire::rows_max(config.hidden_size, config.num_experts_per_tok);
        // As blobs, since that is what nodes hold: a little more than the tensors.
        let (experts, trunk): (Vec<_>, Vec<_>) =
            parts(&checkpoint).into_iter().partition(|part| part.expert().is_some());
        let trunk_bytes: u64 = trunk.iter().map(blob_bytes).sum();
        let kv_bytes = kv_tokens as u64 * footprint.kv_bytes_per_token;
        Ok(Self {
            fixed_bytes: trunk_bytes + kv_bytes + footprint.buffer_bytes(rows_max),
            kv_tokens,
            expert_bytes: experts.iter().map(blob_bytes).max().unwrap_or(0),
            experts: experts.len(),
            pairs_per_token: (config.sparse_layers().count() * config.num_experts_per_tok) as u64,
        })
    }

    /// A node's memory with room for `percent` of the expert bytes.
    pub fn bytes(&self, percent: u64) -> u64 {
        self.fixed_bytes + self.expert_bytes * self.experts as u64 * percent / 100
    }

    /// Whole experts that fit into `bytes`.
    pub fn experts_in(&self, bytes: u64) -> usize {
        (bytes.saturating_sub(self.fixed_bytes) / self.expert_bytes.max(1)) as usize
    }

    /// The fewest replicas of an expert that `nodes` such nodes can come to: 2 where they hold everything twice.
    pub fn replicas_wanted(&self, nodes: usize, percent: u64) -> usize {
        let places = nodes * self.experts_in(self.bytes(percent)).min(self.experts);
        (places / self.experts.max(1)).min(2)
    }
}

/// Length of a part as a blob.
fn blob_bytes(part: &Part) -> u64 {
    part.header().len() as u64 + part.data_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: Budget =
        Budget { fixed_bytes: 1000, kv_tokens: 8, expert_bytes: 10, experts: 144, pairs_per_token: 24 };

    #[test]
    fn seventy_percent_hold_everything_twice_but_nobody_everything() {
        assert_eq!(TINY.bytes(70), 1000 + 1008);
        assert_eq!(TINY.experts_in(TINY.bytes(70)), 100);
        assert_eq!(TINY.replicas_wanted(3, 70), 2);
    }

    #[test]
    fn tighter_budgets_want_less() {
        assert_eq!(TINY.replicas_wanted(3, 50), 1);
        assert_eq!(TINY.replicas_wanted(3, 30), 0);
        assert_eq!(TINY.replicas_wanted(1, 200), 1);
        assert_eq!(TINY.experts_in(500), 0);
    }
}
