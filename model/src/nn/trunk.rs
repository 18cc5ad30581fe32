//! The trunk's weights, where a device computes with them.
//!
//! Owns [`Trunk`] (everything but routed experts) and [`expert_weights`]. The invariant: a trunk that exists has every
//! tensor the configuration implies, in its shape, and took no others. The embedding table stays where it is and is
//! read row by row; all matrices stay packed. No arithmetic happens here.

use std::{collections::BTreeSet, sync::Arc};

use coel_kernels::{DeviceExpert, DeviceMatrix, DeviceVector, DynKernels, Gated};
use coel_weights::{
    config::ModelConfig,
    error::LoadError,
    layout::{self, ExpertId, LayerNames, TensorSpec},
    memory::ReadError,
    slices::Weight,
    tensors::Tensors,
};

use super::{embedding::Embedding, rope::Rope};

/// A matrix with its optional bias, and the norm of its output.
pub(crate) struct Projection {
    pub(crate) matrix: DeviceMatrix,
    pub(crate) bias: Option<DeviceVector>,
    /// Norms each run of as many values of a row as it has weights.
    pub(crate) norm: Option<DeviceVector>,
}

/// The expert every row passes, and the gate `[1, d]` its output is scaled by.
pub(crate) struct SharedExpert {
    pub(crate) expert: DeviceExpert,
    pub(crate) gate: DeviceMatrix,
}

/// What follows attention.
pub(crate) enum FeedForward {
    /// One block for every row.
    Dense(DeviceExpert),
    /// Routed experts, which are elsewhere, and perhaps a shared one.
    Sparse { router: DeviceMatrix, shared: Option<SharedExpert> },
}

pub(crate) struct Layer {
    pub(crate) input_norm: DeviceVector,
    pub(crate) post_attention_norm: DeviceVector,
    pub(crate) q: Projection,
    pub(crate) k: Projection,
    pub(crate) v: Projection,
    pub(crate) o: Projection,
    pub(crate) feed_forward: FeedForward,
}

/// All weights but the routed experts'.
pub struct Trunk {
    pub(crate) config: Arc<ModelConfig>,
    pub(crate) rope: Rope,
    pub(crate) embed: Embedding,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: DeviceVector,
    pub(crate) head: DeviceMatrix,
    bytes: u64,
}

impl Trunk {
    /// Takes the trunk from `tensors`, which must hold it and nothing else.
    pub fn load(kernels: &dyn DynKernels, config: Arc<ModelConfig>, tensors: &Tensors) -> Result<Self, LoadError> {
        let specs = layout::trunk(&config);
        refuse_unused(tensors, &specs)?;
        let loader = TensorLoader { kernels, tensors };
        let d = config.hidden_size;
        let embed = tensors.weight(layout::EMBED, [config.vocab_size, d])?;
        let layers =
            (0..config.num_hidden_layers).map(|layer| loader.layer(&config, layer)).collect::<Result<_, _>>()?;
        let norm = loader.vector(layout::NORM, d)?;
        let head = match config.tie_word_embeddings {
            true => kernels.matrix(embed.clone()),
            false => loader.matrix(layout::HEAD, [config.vocab_size, d])?,
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

/// Takes the weights of expert `id` from `tensors`, which must hold it and nothing else. In place: no byte is copied.
pub fn expert_weights(config: &ModelConfig, id: ExpertId, tensors: &Tensors) -> Result<Gated<Weight>, LoadError> {
    refuse_unused(tensors, &layout::expert(config, id))?;
    gated(tensors, LayerNames::new(config, usize::from(id.layer)).expert(config, id.index))
}

fn gated(tensors: &Tensors, [gate, up, down]: [TensorSpec; 3]) -> Result<Gated<Weight>, LoadError> {
    let load = |spec: TensorSpec| tensors.weight(&spec.name, [spec.shape[0], spec.shape[1]]);
    Ok(Gated { gate: load(gate)?, up: load(up)?, down: load(down)? })
}

fn refuse_unused(tensors: &Tensors, specs: &[TensorSpec]) -> Result<(), LoadError> {
    let names: BTreeSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    match tensors.iter().find(|(name, _)| !names.contains(name)) {
        None => Ok(()),
        Some((name, view)) => {
            let file = tensors.sources()[view.source].clone();
            Err(LoadError::Unused { file, tensor: name.to_owned() })
        }
    }
}

struct TensorLoader<'a> {
    kernels: &'a dyn DynKernels,
    tensors: &'a Tensors,
}

impl TensorLoader<'_> {
    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<DeviceMatrix, LoadError> {
        Ok(self.kernels.matrix(self.tensors.weight(name, shape)?))
    }

    fn vector(&self, name: &str, width: usize) -> Result<DeviceVector, LoadError> {
        let packed = self.tensors.matrix(name, &[width])?;
        let mut values = vec![0.0; width];
        packed.widen_row(0, &mut values);
        Ok(self.kernels.vector(values))
    }

    fn gated(&self, specs: [TensorSpec; 3]) -> Result<DeviceExpert, LoadError> {
        Ok(self.kernels.expert(gated(self.tensors, specs)?))
    }

    fn layer(&self, config: &ModelConfig, layer: usize) -> Result<Layer, LoadError> {
        let names = LayerNames::new(config, layer);
        let (d, q, kv) = (config.hidden_size, config.q_width(), config.kv_width());
        let projection = |name: &str, shape: [usize; 2], biased: bool| {
            let matrix = self.matrix(&names.attention(name, "weight"), shape)?;
            let bias = biased.then(|| self.vector(&names.attention(name, "bias"), shape[0])).transpose()?;
            Ok::<_, LoadError>(Projection { matrix, bias, norm: None })
        };
        let norm = |name: &str, projection: usize| {
            let width = layout::norm_width(config, projection);
            width.map(|width| self.vector(&names.attention(name, "weight"), width)).transpose()
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

    fn feed_forward(&self, config: &ModelConfig, layer: usize, names: &LayerNames) -> Result<FeedForward, LoadError> {
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
