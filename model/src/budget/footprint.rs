//! How much memory a model takes: what a node's ledger counts before anything is loaded.
//!
//! Pure arithmetic over the configuration; the invariant is that it never counts less than the engine allocates for
//! the same thing. It does not know what else a process needs.

use coel_weights::{
    config::ModelConfig,
    layout::{self, TensorSpec},
    matrix::DType,
};

/// Byte counts of one model at one element type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// All weights but the routed experts'.
    pub trunk_bytes: u64,
    /// One routed expert.
    pub expert_bytes: u64,
    /// Keys and values (f32) of one token over all layers.
    pub kv_bytes_per_token: u64,
    /// f32 values held per row while a chunk is computed.
    row_values: u64,
    /// f32 values held once: one widened block of weight rows and one row of logits.
    fixed_values: u64,
}

impl Footprint {
    pub fn of(config: &ModelConfig, dtype: DType) -> Self {
        let bytes = |specs: Vec<TensorSpec>| {
            specs.iter().map(|spec| spec.shape.iter().product::<usize>() as u64).sum::<u64>() * dtype.size() as u64
        };
        let id = layout::ExpertId { layer: 0, index: 0 };
        let d = config.hidden_size as u64;
        let (q, kv) = (config.q_width() as u64, config.kv_width() as u64);
        let experts_per_row = config.num_experts_per_tok as u64;
        let shared = config.shared_expert_intermediate_size.unwrap_or(0) as u64;
        let dense = config.intermediate_size.unwrap_or(0) as u64;
        let widest = shared.max(dense).max(config.moe_intermediate_size as u64);
        let attention = 2 * d + 2 * q + 4 * kv + config.head_dim as u64;
        let experts = (4 + 2 * experts_per_row) * d + 3 * widest + config.num_experts as u64;
        Self {
            trunk_bytes: bytes(layout::trunk(config)),
            expert_bytes: bytes(layout::expert(config, id)),
            kv_bytes_per_token: 2 * kv * 4 * config.num_hidden_layers as u64,
            row_values: 2 * d + attention.max(experts),
            fixed_values: 8 * d.max(widest).max(q)
                + 2 * config.vocab_size as u64
                + config.max_position_embeddings as u64,
        }
    }

    /// Scratch memory for chunks of at most `rows_max` rows.
    pub fn buffer_bytes(&self, rows_max: usize) -> u64 {
        4 * (self.row_values * rows_max as u64 + self.fixed_values)
    }
}
