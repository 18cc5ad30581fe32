//! Which tensors a model has: their names, shapes and the part they belong to, from the configuration alone.
//!
//! Owns the mapping between the checkpoint's names and the decoder's block. Another family is another set of names
//! here, not another decoder. The invariant: every tensor of a model belongs to exactly one part. It touches no bytes.

use serde::{Deserialize, Serialize};

use crate::config::ModelConfig;

/// A routed expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExpertId {
    pub layer: u16,
    pub index: u16,
}

impl std::fmt::Display for ExpertId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "layer {} expert {}", self.layer, self.index)
    }
}

/// A tensor the model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    fn new(name: impl Into<String>, shape: &[usize]) -> Self {
        Self { name: name.into(), shape: shape.to_vec() }
    }
}

/// Tensor names of one layer, without shapes.
#[derive(Clone, Debug)]
pub(crate) struct LayerNames {
    prefix: String,
}

impl LayerNames {
    pub(crate) fn new(layer: usize) -> Self {
        Self { prefix: format!("model.layers.{layer}") }
    }

    pub(crate) fn of(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.prefix)
    }
}

pub(crate) const EMBED: &str = "model.embed_tokens.weight";
pub(crate) const NORM: &str = "model.norm.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// The embedding table, `[vocab_size, hidden_size]`.
pub fn embeddings(config: &ModelConfig) -> Vec<TensorSpec> {
    vec![TensorSpec::new(EMBED, &[config.vocab_size, config.hidden_size])]
}

/// The final norm and, unless tied to the embeddings, the output head.
pub fn head(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut specs = vec![TensorSpec::new(NORM, &[config.hidden_size])];
    if !config.tie_word_embeddings {
        specs.push(TensorSpec::new(HEAD, &[config.vocab_size, config.hidden_size]));
    }
    specs
}

/// Everything of layer `layer` but its routed experts.
pub fn layer(config: &ModelConfig, layer: usize) -> Vec<TensorSpec> {
    let names = LayerNames::new(layer);
    let d = config.hidden_size;
    let mut specs = vec![
        TensorSpec::new(names.of("input_layernorm.weight"), &[d]),
        TensorSpec::new(names.of("post_attention_layernorm.weight"), &[d]),
        TensorSpec::new(names.of("self_attn.o_proj.weight"), &[d, config.q_width()]),
        TensorSpec::new(names.of("mlp.gate.weight"), &[config.num_experts, d]),
    ];
    let projections = [("q_proj", config.q_width()), ("k_proj", config.kv_width()), ("v_proj", config.kv_width())];
    for (projection, width) in projections {
        specs.push(TensorSpec::new(names.of(&format!("self_attn.{projection}.weight")), &[width, d]));
        if config.qkv_bias {
            specs.push(TensorSpec::new(names.of(&format!("self_attn.{projection}.bias")), &[width]));
        }
    }
    if let Some(width) = config.shared_expert_intermediate_size {
        specs.extend(gated(&names.of("mlp.shared_expert"), d, width));
        specs.push(TensorSpec::new(names.of("mlp.shared_expert_gate.weight"), &[1, d]));
    }
    specs
}

/// The three matrices of one routed expert.
pub fn expert(config: &ModelConfig, id: ExpertId) -> Vec<TensorSpec> {
    gated(&expert_prefix(id), config.hidden_size, config.moe_intermediate_size).into()
}

/// Every tensor that is not a routed expert's.
pub fn trunk(config: &ModelConfig) -> Vec<TensorSpec> {
    let layers = (0..config.num_hidden_layers).flat_map(|index| layer(config, index));
    embeddings(config).into_iter().chain(layers).chain(head(config)).collect()
}

/// All routed experts in ascending order.
pub fn experts(config: &ModelConfig) -> impl Iterator<Item = ExpertId> + use<> {
    let (layers, per_layer) = (config.num_hidden_layers as u16, config.num_experts as u16);
    (0..layers).flat_map(move |layer| (0..per_layer).map(move |index| ExpertId { layer, index }))
}

pub(crate) fn expert_prefix(id: ExpertId) -> String {
    LayerNames::new(usize::from(id.layer)).of(&format!("mlp.experts.{}", id.index))
}

/// gate, up and down of a gated feed-forward block, in that order.
pub(crate) fn gated(prefix: &str, hidden: usize, width: usize) -> [TensorSpec; 3] {
    [
        TensorSpec::new(format!("{prefix}.gate_proj.weight"), &[width, hidden]),
        TensorSpec::new(format!("{prefix}.up_proj.weight"), &[width, hidden]),
        TensorSpec::new(format!("{prefix}.down_proj.weight"), &[hidden, width]),
    ]
}
