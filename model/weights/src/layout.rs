//! Which tensors a model has: their names, shapes and parts, from the configuration alone.
//!
//! Owns the mapping between the names in checkpoints and the blocks of the decoder. Another family is another set of names
//! here, not another decoder. The invariant: every tensor of a model belongs to exactly one part, and [`experts`] lists
//! exactly the experts that exist. No bytes are touched here.

use serde::{Deserialize, Serialize};

use crate::config::{Architecture, ModelConfig, QkNorm};

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

/// How most families name gate, up and down of a gated feed-forward block.
const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Tensor names of one layer, without shapes, as the model's family spells them.
#[derive(Clone, Debug)]
pub struct LayerNames {
    prefix: String,
    architecture: Architecture,
}

impl LayerNames {
    pub fn new(config: &ModelConfig, layer: usize) -> Self {
        Self { prefix: format!("model.layers.{layer}"), architecture: config.architecture }
    }

    pub fn of(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.prefix)
    }

    /// Weight or bias of one of attention's projections (`q_proj`) or norms (`q_norm`).
    pub fn attention(&self, what: &str, kind: &str) -> String {
        self.of(&format!("self_attn.{what}.{kind}"))
    }

    /// The router's matrix.
    pub fn router(&self) -> String {
        self.of(&format!("{}.gate.weight", self.sparse_block()))
    }

    fn sparse_block(&self) -> &'static str {
        match self.architecture {
            Architecture::Mixtral => "block_sparse_moe",
            Architecture::Qwen2Moe | Architecture::Qwen3Moe | Architecture::Olmoe => "mlp",
        }
    }

    /// gate, up and down of one routed expert, in that order.
    pub fn expert(&self, config: &ModelConfig, index: u16) -> [TensorSpec; 3] {
        let block = format!("{}.experts.{index}", self.sparse_block());
        let words = match self.architecture {
            Architecture::Mixtral => ["w1", "w3", "w2"],
            Architecture::Qwen2Moe | Architecture::Qwen3Moe | Architecture::Olmoe => PROJECTIONS,
        };
        self.gated(&block, words, config.hidden_size, config.moe_intermediate_size)
    }

    /// gate, up and down of the shared expert, which computes every row, in that order.
    pub fn shared_expert(&self, hidden: usize, width: usize) -> [TensorSpec; 3] {
        self.gated("mlp.shared_expert", PROJECTIONS, hidden, width)
    }

    /// gate, up and down of a layer without experts, in that order.
    pub fn dense(&self, hidden: usize, width: usize) -> [TensorSpec; 3] {
        self.gated("mlp", PROJECTIONS, hidden, width)
    }

    fn gated(&self, block: &str, words: [&str; 3], hidden: usize, width: usize) -> [TensorSpec; 3] {
        let [gate, up, down] = words.map(|word| self.of(&format!("{block}.{word}.weight")));
        [
            TensorSpec::new(gate, &[width, hidden]),
            TensorSpec::new(up, &[width, hidden]),
            TensorSpec::new(down, &[hidden, width]),
        ]
    }
}

pub const EMBED: &str = "model.embed_tokens.weight";
pub const NORM: &str = "model.norm.weight";
pub const HEAD: &str = "lm_head.weight";
/// Of a layer: the gate that scales the shared expert's output.
pub const SHARED_GATE: &str = "mlp.shared_expert_gate.weight";

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

/// The tensors that another tensor consists of, in order; generated lazily.
pub(crate) type Pieces<'a> = Box<dyn Iterator<Item = TensorSpec> + 'a>;

/// The other way in which transformers stores a layer's experts and router: all gates and ups in one tensor, all downs in
/// another, and the router under the same name in every family.
pub(crate) fn fused(config: &ModelConfig, layer: usize) -> [(TensorSpec, Pieces<'_>); 3] {
    let names = LayerNames::new(config, layer);
    let (n, d, width) = (config.num_experts, config.hidden_size, config.moe_intermediate_size);
    let router = TensorSpec::new(names.router(), &[n, d]);
    let gates_and_ups = TensorSpec::new(names.of("mlp.experts.gate_up_proj"), &[n, 2 * width, d]);
    let downs = TensorSpec::new(names.of("mlp.experts.down_proj"), &[n, d, width]);
    let routers = TensorSpec::new(names.of("mlp.gate.weight"), &[n, d]);
    let experts = (0..n as u16).map(move |index| names.expert(config, index));
    [
        (gates_and_ups, Box::new(experts.clone().flat_map(|[gate, up, _]| [gate, up]))),
        (downs, Box::new(experts.map(|[_, _, down]| down))),
        (routers, Box::new(std::iter::once(router))),
    ]
}

/// The tensors of layer `layer`, except those of its routed experts.
pub fn layer(config: &ModelConfig, layer: usize) -> Vec<TensorSpec> {
    let names = LayerNames::new(config, layer);
    let d = config.hidden_size;
    let mut specs = vec![
        TensorSpec::new(names.of("input_layernorm.weight"), &[d]),
        TensorSpec::new(names.of("post_attention_layernorm.weight"), &[d]),
    ];
    specs.extend(attention(config, &names));
    match dense_width(config, layer) {
        Some(width) => specs.extend(names.dense(d, width)),
        None => {
            specs.push(TensorSpec::new(names.router(), &[config.num_experts, d]));
            if let Some(width) = config.shared_expert_intermediate_size {
                specs.extend(names.shared_expert(d, width));
                specs.push(TensorSpec::new(names.of(SHARED_GATE), &[1, d]));
            }
        }
    }
    specs
}

/// Projections, their biases and norms.
fn attention(config: &ModelConfig, names: &LayerNames) -> Vec<TensorSpec> {
    let (d, q, kv) = (config.hidden_size, config.q_width(), config.kv_width());
    let mut specs = vec![TensorSpec::new(names.attention("o_proj", "weight"), &[d, q])];
    if config.o_bias {
        specs.push(TensorSpec::new(names.attention("o_proj", "bias"), &[d]));
    }
    for (projection, width) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
        specs.push(TensorSpec::new(names.attention(projection, "weight"), &[width, d]));
        if config.qkv_bias {
            specs.push(TensorSpec::new(names.attention(projection, "bias"), &[width]));
        }
    }
    for (norm, width) in [("q_norm", q), ("k_norm", kv)] {
        if let Some(width) = norm_width(config, width) {
            specs.push(TensorSpec::new(names.attention(norm, "weight"), &[width]));
        }
    }
    specs
}

/// The width over which queries or keys are normed, which are `projection` wide in all.
pub fn norm_width(config: &ModelConfig, projection: usize) -> Option<usize> {
    config.qk_norm.map(|norm| match norm {
        QkNorm::Head => config.head_dim,
        QkNorm::Projection => projection,
    })
}

/// The width of the feed-forward block of a layer without experts; `None` for a layer with experts.
pub fn dense_width(config: &ModelConfig, layer: usize) -> Option<usize> {
    config.intermediate_size.filter(|_| !config.is_sparse(layer))
}

/// The three matrices of one routed expert: gate, up and down, in that order.
pub fn expert(config: &ModelConfig, id: ExpertId) -> Vec<TensorSpec> {
    LayerNames::new(config, usize::from(id.layer)).expert(config, id.index).into()
}

/// Every tensor that does not belong to a routed expert.
pub fn trunk(config: &ModelConfig) -> Vec<TensorSpec> {
    let layers = (0..config.num_hidden_layers).flat_map(|index| layer(config, index));
    embeddings(config).into_iter().chain(layers).chain(head(config)).collect()
}

/// All routed experts in ascending order.
pub fn experts(config: &ModelConfig) -> impl Iterator<Item = ExpertId> + use<> {
    let per_layer = config.num_experts as u16;
    let layers: Vec<u16> = config.sparse_layers().map(|layer| layer as u16).collect();
    layers.into_iter().flat_map(move |layer| (0..per_layer).map(move |index| ExpertId { layer, index }))
}

/// Whether the model has this routed expert.
pub fn has_expert(config: &ModelConfig, id: ExpertId) -> bool {
    config.is_sparse(usize::from(id.layer)) && usize::from(id.index) < config.num_experts
}
