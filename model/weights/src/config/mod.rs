//! `config.json`: what a checkpoint says it is.
//!
//! Owns [`ModelConfig`], whose field names are the checkpoint's, and what differs between the [`Architecture`]s. A
//! feature that the decoder does not compute is refused by name, because a model computed wrongly looks like a bad
//! model. The invariant: the decoder runs every `ModelConfig` that exists, all its sizes are positive, products of two do
//! not overflow, and at least one layer has experts. Where weights lie is not known here; `raw` knows how checkpoints of
//! each family and age spell their fields.

mod raw;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use crate::matrix::DType;

/// Largest value accepted for a size in `config.json`: above every known model, and products of two fit u64.
const SIZE_MAX: usize = 1 << 24;

/// The families that the decoder runs. All differences in what they compute are in [`ModelConfig`]; beyond that a family
/// is a spelling of fields (`raw`) and of tensors (`layout`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Qwen1.5-MoE and Qwen2-MoE: biased projections, a gated shared expert.
    Qwen2Moe,
    /// Qwen3-MoE: each head's query and key normed.
    Qwen3Moe,
    /// Mixtral: plain attention, weights of the chosen experts always normalised.
    Mixtral,
    /// OLMoE: queries and keys normed over all heads together, perhaps clipped.
    Olmoe,
}

impl Architecture {
    const ALL: [Self; 4] = [Self::Qwen2Moe, Self::Qwen3Moe, Self::Mixtral, Self::Olmoe];

    /// The names in `config.json` of the families that the decoder runs.
    pub const NAMES: [&str; 4] = [Self::ALL[0].name(), Self::ALL[1].name(), Self::ALL[2].name(), Self::ALL[3].name()];

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|architecture| architecture.name() == name)
    }

    pub const fn name(self) -> &'static str {
        match self {
            Architecture::Qwen2Moe => "Qwen2MoeForCausalLM",
            Architecture::Qwen3Moe => "Qwen3MoeForCausalLM",
            Architecture::Mixtral => "MixtralForCausalLM",
            Architecture::Olmoe => "OlmoeForCausalLM",
        }
    }
}

/// Over what queries and keys are normed before they are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head by itself: weights `[head_dim]`.
    Head,
    /// All heads together: weights as wide as the projection.
    Projection,
}

/// Why a `config.json` is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("config.json is not valid: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error("config.json lacks `{0}`")]
    Missing(&'static str),
    #[error("architecture {found} is not run here; coel runs {runs}", runs = Architecture::NAMES.join(", "))]
    Architecture { found: String },
    #[error("config.json sets {field} = {value}, which coel does not compute ({supported})")]
    Unsupported { field: &'static str, value: String, supported: &'static str },
    #[error("config.json sets {field} = {value}: {why}")]
    Invalid { field: &'static str, value: String, why: &'static str },
}

/// Shape and constants of a model, named as in the checkpoint (where families differ, as in Qwen's).
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    /// Context length, tokens.
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub rope_theta: f32,
    /// Whether the projections to queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the projection after attention has a bias too (`attention_bias`, which means all four).
    pub o_bias: bool,
    pub qk_norm: Option<QkNorm>,
    /// Queries, keys and values are cut to `-clip_qkv..=clip_qkv`, after the norm.
    pub clip_qkv: Option<f32>,
    pub tie_word_embeddings: bool,
    /// Experts of a sparse layer.
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    pub moe_intermediate_size: usize,
    /// Width of the shared expert, which computes every row; `None` for families without one.
    pub shared_expert_intermediate_size: Option<usize>,
    pub norm_topk_prob: bool,
    /// Width of the feed-forward block in layers without experts; `None` where every layer has experts.
    pub intermediate_size: Option<usize>,
    /// Layers without experts, whatever `decoder_sparse_step` says.
    pub mlp_only_layers: BTreeSet<usize>,
    /// Every so many layers, the last one has experts.
    pub decoder_sparse_step: usize,
    /// Tokens that end a text, from `config.json`.
    pub eos_token_id: Vec<u32>,
    /// The element type according to the checkpoint.
    pub dtype: DType,
}

impl ModelConfig {
    /// Reads and validates the text of a `config.json`.
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        let config = raw::parse(json)?;
        config.validate()?;
        Ok(config)
    }

    /// Width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Whether layer `layer` exists and has routed experts; a layer without them has one feed-forward block instead.
    pub fn is_sparse(&self, layer: usize) -> bool {
        layer < self.num_hidden_layers
            && !self.mlp_only_layers.contains(&layer)
            && (layer + 1).is_multiple_of(self.decoder_sparse_step)
    }

    /// The layers with routed experts, ascending; never empty.
    pub fn sparse_layers(&self) -> impl DoubleEndedIterator<Item = usize> + '_ {
        (0..self.num_hidden_layers).filter(|layer| self.is_sparse(*layer))
    }

    /// All experts of all layers.
    pub fn experts_total(&self) -> usize {
        self.sparse_layers().count() * self.num_experts
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
            (raw::num_experts(self.architecture), self.num_experts),
            ("num_experts_per_tok", self.num_experts_per_tok),
            (raw::expert_width(self.architecture), self.moe_intermediate_size),
            ("shared_expert_intermediate_size", self.shared_expert_intermediate_size.unwrap_or(1)),
            ("intermediate_size", self.intermediate_size.unwrap_or(1)),
            ("decoder_sparse_step", self.decoder_sparse_step),
        ];
        for (field, value) in sizes {
            if value == 0 || value > SIZE_MAX {
                return Err(invalid(field, value, "it must be between 1 and 2^24"));
            }
        }
        // Experts are addressed by two u16.
        let addressed =
            [("num_hidden_layers", self.num_hidden_layers), (raw::num_experts(self.architecture), self.num_experts)];
        for (field, value) in addressed {
            if value > usize::from(u16::MAX) {
                return Err(invalid(field, value, "at most 65535 are addressable"));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let why = "it must be a multiple of num_key_value_heads";
            return Err(invalid("num_attention_heads", self.num_attention_heads, why));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(invalid("head_dim", self.head_dim, "rotary embeddings need an even one"));
        }
        if self.num_attention_heads * self.head_dim > SIZE_MAX {
            return Err(invalid("head_dim", self.head_dim, "heads times head_dim exceeds 2^24"));
        }
        if self.num_experts_per_tok > self.num_experts {
            return Err(invalid("num_experts_per_tok", self.num_experts_per_tok, "there are fewer experts"));
        }
        if self.sparse_layers().next().is_none() {
            let why = "no layer of the model has experts";
            return Err(match self.decoder_sparse_step > self.num_hidden_layers {
                true => invalid("decoder_sparse_step", self.decoder_sparse_step, why),
                false => invalid("mlp_only_layers", format!("{:?}", self.mlp_only_layers), why),
            });
        }
        let positive = [
            ("rms_norm_eps", Some(self.rms_norm_eps), 0.0, "it must be positive"),
            ("rope_theta", Some(self.rope_theta), 1.0, "it must be above 1"),
            ("clip_qkv", self.clip_qkv, 0.0, "it must be positive"),
        ];
        for (field, value, above, why) in positive {
            if let Some(value) = value.filter(|value| !(*value > above && value.is_finite())) {
                return Err(invalid(field, value, why));
            }
        }
        Ok(())
    }
}

fn invalid(field: &'static str, value: impl ToString, why: &'static str) -> ConfigError {
    ConfigError::Invalid { field, value: value.to_string(), why }
}
