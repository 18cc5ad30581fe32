//! How much memory a node of the testnet is given.
//!
//! Owns the shares: trunk, KV cache and buffers whole, since every node runs the trunk, and a part of the expert bytes. What a model
//! takes, `coel_node::budget` says. The invariant that makes the mesh worth having: below 100 % no node can hold every expert.

use std::path::Path;

use anyhow::{Context, Result};
use coel_model::weights::folder::ModelFolder;
use coel_node::budget::ModelSizes;
use coel_store::Precision;

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
        let opened = ModelFolder::open(dir);
        let folder = opened.with_context(|| format!("the model in {} cannot be opened", dir.display()))?;
        let kv_tokens = KV_TOKENS.min(folder.config().max_position_embeddings);
        let sizes = ModelSizes::of_folder(&folder);
        Ok(Self {
            fixed_bytes: sizes.fixed_bytes(kv_tokens, Precision::Exact),
            kv_tokens,
            expert_bytes: sizes.largest_expert_bytes(Precision::Exact),
            experts: sizes.experts().len(),
            pairs_per_token: sizes.pairs_per_token(),
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
