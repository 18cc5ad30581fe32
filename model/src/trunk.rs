//! The trunk's weights, ready for one kernel class.
//!
//! Owns [`Trunk`] (everything but routed experts) and [`load_expert`]. The invariant: a trunk that exists has every
//! tensor the configuration implies, in its shape, and took no others. The embedding table stays where it is and is
//! read row by row; all matrices stay packed. No arithmetic happens here.

use std::sync::Arc;

use crate::{
    config::ModelConfig,
    embedding::Embedding,
    kernels::{Gated, Kernels},
    layout::{self, ExpertId, LayerNames, TensorSpec},
    rope::Rope,
    tensors::{LoadError, Tensors},
    tiers::ReadError,
};

/// A matrix with its optional bias, and the norm of its output.
pub(crate) struct Projection<K: Kernels> {
    pub(crate) matrix: K::Matrix,
    pub(crate) bias: Option<K::Vector>,
    pub(crate) norm: Option<Norm<K>>,
}

/// A norm of each `width` values of a row by themselves.
pub(crate) struct Norm<K: Kernels> {
    pub(crate) weight: K::Vector,
    pub(crate) width: usize,
}

/// The expert every row passes, and the gate `[1, d]` its output is scaled by.
pub(crate) struct SharedExpert<K: Kernels> {
    pub(crate) expert: Gated<K::Matrix>,
    pub(crate) gate: K::Matrix,
}

/// What follows attention.
pub(crate) enum FeedForward<K: Kernels> {
    /// One block for every row.
    Dense(Gated<K::Matrix>),
    /// Routed experts, which are elsewhere, and perhaps a shared one.
    Sparse { router: K::Matrix, shared: Option<SharedExpert<K>> },
}

pub(crate) struct Layer<K: Kernels> {
    pub(crate) input_norm: K::Vector,
    pub(crate) post_attention_norm: K::Vector,
    pub(crate) q: Projection<K>,
    pub(crate) k: Projection<K>,
    pub(crate) v: Projection<K>,
    pub(crate) o: Projection<K>,
    pub(crate) feed_forward: FeedForward<K>,
}

/// All weights but the routed experts'.
pub struct Trunk<K: Kernels> {
    pub(crate) config: Arc<ModelConfig>,
    pub(crate) rope: Rope,
    pub(crate) embed: Embedding,
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
        let embed = tensors.weight(layout::EMBED, [config.vocab_size, d])?;
        let layers =
            (0..config.num_hidden_layers).map(|layer| source.layer(&config, layer)).collect::<Result<_, _>>()?;
        let norm = source.vector(layout::NORM, d)?;
        let head = match config.tie_word_embeddings {
            true => kernels.matrix(embed.clone()),
            false => source.matrix(layout::HEAD, [config.vocab_size, d])?,
        };
        let rope = Rope::new(&config);
        let embed = Embedding::InMemory(embed);
        Ok(Self { rope, embed, layers, norm, head, bytes: tensors.data_bytes(), config })
    }

    /// Leaves the embedding table in its files from now on, unless the output head is the same one; whether it does.
    pub fn embed_from_disk(&mut self) -> Result<bool, ReadError> {
        if let (Embedding::InMemory(weight), false) = (&self.embed, self.config.tie_word_embeddings) {
            let bytes = weight.bytes() as u64;
            self.embed = Embedding::on_disk(weight)?;
            self.bytes -= bytes;
        }
        Ok(matches!(self.embed, Embedding::OnDisk(_)))
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
    source.gated(LayerNames::new(config, usize::from(id.layer)).expert(config, id.index))
}

/// Refuses `tensors` if they are not expert `id` and nothing else. Touches no weights.
pub(crate) fn check_expert(config: &ModelConfig, id: ExpertId, tensors: &Tensors) -> Result<(), LoadError> {
    let specs = layout::expert(config, id);
    refuse_unused(tensors, &specs)?;
    for TensorSpec { name, shape } in specs {
        tensors.weight(&name, [shape[0], shape[1]])?;
    }
    Ok(())
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
    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<K::Matrix, LoadError> {
        Ok(self.kernels.matrix(self.tensors.weight(name, shape)?))
    }

    fn vector(&self, name: &str, width: usize) -> Result<K::Vector, LoadError> {
        let packed = self.tensors.matrix(name, &[width])?;
        let mut values = vec![0.0; width];
        packed.widen_row(0, &mut values);
        Ok(self.kernels.vector(values))
    }

    fn gated(&self, [gate, up, down]: [TensorSpec; 3]) -> Result<Gated<K::Matrix>, LoadError> {
        let load = |spec: TensorSpec| self.matrix(&spec.name, [spec.shape[0], spec.shape[1]]);
        Ok(Gated { gate: load(gate)?, up: load(up)?, down: load(down)? })
    }

    fn layer(&self, config: &ModelConfig, layer: usize) -> Result<Layer<K>, LoadError> {
        let names = LayerNames::new(config, layer);
        let (d, q, kv) = (config.hidden_size, config.q_width(), config.kv_width());
        let projection = |name: &str, shape: [usize; 2], biased: bool| {
            let matrix = self.matrix(&names.attention(name, "weight"), shape)?;
            let bias = biased.then(|| self.vector(&names.attention(name, "bias"), shape[0])).transpose()?;
            Ok::<_, LoadError>(Projection { matrix, bias, norm: None })
        };
        let norm = |name: &str, projection: usize| {
            let width = layout::norm_width(config, projection);
            let load = |width| Ok(Norm { weight: self.vector(&names.attention(name, "weight"), width)?, width });
            width.map(load).transpose()
        };
        Ok(Layer {
            input_norm: self.vector(&names.of("input_layernorm.weight"), d)?,
            post_attention_norm: self.vector(&names.of("post_attention_layernorm.weight"), d)?,
            q: Projection { norm: norm("q_norm", q)?, ..projection("q_proj", [q, d], config.qkv_bias)? },
            k: Projection { norm: norm("k_norm", kv)?, ..projection("k_proj", [kv, d], config.qkv_bias)? },
            v: projection("v_proj", [kv, d], config.qkv_bias)?,
            o: projection("o_proj", [d, q], config.o_bias)?,
            feed_forward: self.feed_forward(config, layer, &names)?,
        })
    }

    fn feed_forward(
        &self,
        config: &ModelConfig,
        layer: usize,
        names: &LayerNames,
    ) -> Result<FeedForward<K>, LoadError> {
        let d = config.hidden_size;
        if let Some(width) = layout::dense_width(config, layer) {
            return Ok(FeedForward::Dense(self.gated(names.dense(d, width))?));
        }
        let shared = match config.shared_expert_intermediate_size {
            Some(width) => Some(SharedExpert {
                expert: self.gated(names.shared_expert(d, width))?,
                gate: self.matrix(&names.of(layout::SHARED_GATE), [1, d])?,
            }),
            None => None,
        };
        Ok(FeedForward::Sparse { router: self.matrix(&names.router(), [config.num_experts, d])?, shared })
    }
}
