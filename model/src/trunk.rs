//! The trunk's weights, ready for one kernel class.
//!
//! Owns [`Trunk`] (everything but routed experts) and [`load_expert`]. The invariant: a trunk that exists has every
//! tensor the configuration implies, in its shape, and took no others. The embedding table stays where it is and is
//! read row by row; all matrices stay packed. No arithmetic happens here.

use std::sync::Arc;

use crate::{
    config::ModelConfig,
    kernels::{Gated, Kernels},
    layout::{self, ExpertId, LayerNames, TensorSpec},
    rope::Rope,
    tensors::{LoadError, Tensors},
};

/// A matrix with its optional bias.
pub(crate) struct Projection<K: Kernels> {
    pub(crate) matrix: K::Matrix,
    pub(crate) bias: Option<K::Vector>,
}

/// The expert every row passes, and the gate `[1, d]` its output is scaled by.
pub(crate) struct SharedExpert<K: Kernels> {
    pub(crate) expert: Gated<K::Matrix>,
    pub(crate) gate: K::Matrix,
}

pub(crate) struct Layer<K: Kernels> {
    pub(crate) input_norm: K::Vector,
    pub(crate) post_attention_norm: K::Vector,
    pub(crate) q: Projection<K>,
    pub(crate) k: Projection<K>,
    pub(crate) v: Projection<K>,
    pub(crate) o: K::Matrix,
    pub(crate) router: K::Matrix,
    pub(crate) shared: Option<SharedExpert<K>>,
}

/// All weights but the routed experts'.
pub struct Trunk<K: Kernels> {
    pub(crate) config: Arc<ModelConfig>,
    pub(crate) rope: Rope,
    pub(crate) embed: crate::bytes::Matrix,
    pub(crate) layers: Vec<Layer<K>>,
    pub(crate) norm: K::Vector,
    pub(crate) head: K::Matrix,
    bytes: u64,
}

impl<K: Kernels> Trunk<K> {
    /// Takes the trunk from `tensors`, which must hold it and nothing else.
    pub fn load(kernels: &K, config: Arc<ModelConfig>, tensors: &Tensors) -> Result<Self, LoadError> {
        let specs = layout::trunk(&config);
        refuse_unused(tensors, &specs)?;
        let source = Source { kernels, tensors };
        let d = config.hidden_size;
        let embed = tensors.matrix(layout::EMBED, &[config.vocab_size, d])?;
        let layers =
            (0..config.num_hidden_layers).map(|layer| source.layer(&config, layer)).collect::<Result<_, _>>()?;
        let norm = source.vector(layout::NORM, d)?;
        let head = match config.tie_word_embeddings {
            true => kernels.matrix(embed.clone().into()),
            false => source.matrix(layout::HEAD, &[config.vocab_size, d])?,
        };
        let rope = Rope::new(&config);
        Ok(Self { rope, embed, layers, norm, head, bytes: tensors.data_bytes(), config })
    }

    /// Bytes of the tensors as stored.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn config(&self) -> &Arc<ModelConfig> {
        &self.config
    }
}

/// Takes expert `id` from `tensors`, which must hold it and nothing else.
pub fn load_expert<K: Kernels>(
    kernels: &K,
    config: &ModelConfig,
    id: ExpertId,
    tensors: &Tensors,
) -> Result<Gated<K::Matrix>, LoadError> {
    refuse_unused(tensors, &layout::expert(config, id))?;
    let source = Source { kernels, tensors };
    source.gated(&layout::expert_prefix(id), config.hidden_size, config.moe_intermediate_size)
}

fn refuse_unused(tensors: &Tensors, specs: &[TensorSpec]) -> Result<(), LoadError> {
    let names: std::collections::BTreeSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    match tensors.iter().find(|(name, _)| !names.contains(name)) {
        None => Ok(()),
        Some((name, view)) => {
            let file = tensors.sources()[view.source].clone();
            Err(LoadError::Unused { file, tensor: name.to_owned() })
        }
    }
}

struct Source<'a, K> {
    kernels: &'a K,
    tensors: &'a Tensors,
}

impl<K: Kernels> Source<'_, K> {
    fn matrix(&self, name: &str, shape: &[usize]) -> Result<K::Matrix, LoadError> {
        Ok(self.kernels.matrix(self.tensors.matrix(name, shape)?.into()))
    }

    fn vector(&self, name: &str, width: usize) -> Result<K::Vector, LoadError> {
        let packed = self.tensors.matrix(name, &[width])?;
        let mut values = vec![0.0; width];
        packed.widen_row(0, &mut values);
        Ok(self.kernels.vector(values))
    }

    fn gated(&self, prefix: &str, hidden: usize, width: usize) -> Result<Gated<K::Matrix>, LoadError> {
        let [gate, up, down] = layout::gated(prefix, hidden, width);
        let load = |spec: TensorSpec| self.matrix(&spec.name, &spec.shape);
        Ok(Gated { gate: load(gate)?, up: load(up)?, down: load(down)? })
    }

    fn layer(&self, config: &ModelConfig, layer: usize) -> Result<Layer<K>, LoadError> {
        let names = LayerNames::new(layer);
        let d = config.hidden_size;
        let projection = |name: &str, width: usize| {
            let matrix = self.matrix(&names.of(&format!("self_attn.{name}.weight")), &[width, d])?;
            let bias = match config.qkv_bias {
                true => Some(self.vector(&names.of(&format!("self_attn.{name}.bias")), width)?),
                false => None,
            };
            Ok(Projection { matrix, bias })
        };
        let shared = match config.shared_expert_intermediate_size {
            Some(width) => Some(SharedExpert {
                expert: self.gated(&names.of("mlp.shared_expert"), d, width)?,
                gate: self.matrix(&names.of("mlp.shared_expert_gate.weight"), &[1, d])?,
            }),
            None => None,
        };
        Ok(Layer {
            input_norm: self.vector(&names.of("input_layernorm.weight"), d)?,
            post_attention_norm: self.vector(&names.of("post_attention_layernorm.weight"), d)?,
            q: projection("q_proj", config.q_width())?,
            k: projection("k_proj", config.kv_width())?,
            v: projection("v_proj", config.kv_width())?,
            o: self.matrix(&names.of("self_attn.o_proj.weight"), &[d, config.q_width()])?,
            router: self.matrix(&names.of("mlp.gate.weight"), &[config.num_experts, d])?,
            shared,
        })
    }
}
