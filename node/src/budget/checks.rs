//! Whether a node's limits hold a model at all, and what to do where they do not.

use coel_store::Precision;

use super::ModelSizes;
use crate::config::{Limits, Size};

/// A limit that a model does not fit. `Display` names both numbers and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TooSmall {
    /// Memory, for what every node holds.
    #[error(
        "the memory budget of {} ({budget_bytes} bytes) is too small for the trunk of model '{model}': trunk, KV cache of \
         {kv_tokens} tokens and buffers need {} ({needed_bytes} bytes); raise {flag} or lower --kv-tokens",
        Size(*.budget_bytes), Size(*.needed_bytes)
    )]
    Memory { model: String, flag: &'static str, budget_bytes: u64, needed_bytes: u64, kv_tokens: usize },
    /// Machine memory below a GPU, for experts that are read from disk.
    #[error(
        "--memory {} ({budget_bytes} bytes) below a GPU is too small to read experts from disk, which --disk asks for: that needs \
         {} ({needed_bytes} bytes); raise --memory or leave --disk out",
        Size(*.budget_bytes), Size(*.needed_bytes)
    )]
    Offload { budget_bytes: u64, needed_bytes: u64 },
    /// Disk, for what every node keeps.
    #[error(
        "the disk budget of {} ({budget_bytes} bytes) is too small for the trunk of model '{model}': its weights at {trunk} and its \
         files need {} ({needed_bytes} bytes); raise --disk, leave it out, or accept a lower precision with --trunk",
        Size(*.budget_bytes), Size(*.needed_bytes)
    )]
    Disk { model: String, trunk: Precision, budget_bytes: u64, needed_bytes: u64 },
}

impl ModelSizes {
    /// Checks that memory holds the fixed part of the model called `model`, with its trunk at the fewest bits accepted.
    ///
    /// # Errors
    /// [`TooSmall::Memory`].
    pub fn check_memory(&self, model: &str, limits: &Limits) -> Result<(), TooSmall> {
        let (flag, budget_bytes) = limits.fixed_budget();
        let needed_bytes = self.fixed_bytes(limits.kv_tokens, limits.trunk.lowest());
        if budget_bytes >= needed_bytes {
            return Ok(());
        }
        let (model, kv_tokens) = (model.to_owned(), self.kv_tokens(limits.kv_tokens));
        Err(TooSmall::Memory { model, flag, budget_bytes, needed_bytes, kv_tokens })
    }

    /// Checks that machine memory below a GPU has room for experts read from disk, where both were asked for.
    ///
    /// # Errors
    /// [`TooSmall::Offload`].
    pub fn check_offload(&self, limits: &Limits, trunk: Precision) -> Result<(), TooSmall> {
        let (Some(budget_bytes), Some(_)) = (limits.offload_bytes, limits.disk_bytes) else { return Ok(()) };
        let needed_bytes = self.offload_fixed_bytes(trunk) + self.paging_bytes_min(limits.experts.lowest());
        if budget_bytes >= needed_bytes { Ok(()) } else { Err(TooSmall::Offload { budget_bytes, needed_bytes }) }
    }

    /// Checks that `budget_bytes` of disk hold what every node keeps of the model called `model`, with its trunk at this precision.
    ///
    /// # Errors
    /// [`TooSmall::Disk`].
    pub fn check_disk(&self, model: &str, budget_bytes: u64, trunk: Precision) -> Result<(), TooSmall> {
        let needed_bytes = self.disk_fixed_bytes(trunk);
        if budget_bytes >= needed_bytes {
            return Ok(());
        }
        Err(TooSmall::Disk { model: model.to_owned(), trunk, budget_bytes, needed_bytes })
    }
}
