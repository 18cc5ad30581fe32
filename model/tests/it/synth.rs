//! Small checkpoints of any shape, with weights from a seed, written as folders.

use std::{fs, path::Path};

use coel_model::weights::{
    config::ModelConfig,
    layout::{self, TensorSpec},
    matrix::DType,
};
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

/// A tensor to be written.
#[derive(Clone)]
pub struct Stored {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A configuration whose sizes divide nothing nicely; `changes` replaces keys.
pub fn config(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["Qwen2MoeForCausalLM"], "vocab_size": 83, "hidden_size": 52, "head_dim": 14,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "max_position_embeddings": 600, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "num_experts": 5,
        "num_experts_per_tok": 2, "moe_intermediate_size": 19, "shared_expert_intermediate_size": 37,
        "norm_topk_prob": true, "eos_token_id": 2, "torch_dtype": "bfloat16",
    });
    for (key, value) in changes.as_object().expect("an object") {
        config[key] = value.clone();
    }
    config
}

/// Weights for a configuration, from a seed.
pub fn weights(config: &ModelConfig, dtype: DType, seed: u64) -> Vec<Stored> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let experts = layout::experts(config).flat_map(|id| layout::expert(config, id));
    layout::trunk(config).into_iter().chain(experts).map(|spec| stored(spec, dtype, &mut random)).collect()
}

fn stored(spec: TensorSpec, dtype: DType, random: &mut ChaCha8Rng) -> Stored {
    let count = spec.shape.iter().product::<usize>();
    let scale = 1.0 / (*spec.shape.last().expect("no scalars") as f32).sqrt();
    let centre = if spec.name.contains("norm") { 1.0 } else { 0.0 };
    let value = |random: &mut ChaCha8Rng| centre + random.random_range(-1.7f32..1.7) * scale;
    let (kind, bytes): (_, Vec<u8>) = match dtype {
        DType::BF16 => (Dtype::BF16, (0..count).flat_map(|_| bf16::from_f32(value(random)).to_le_bytes()).collect()),
        DType::F16 => (Dtype::F16, (0..count).flat_map(|_| f16::from_f32(value(random)).to_le_bytes()).collect()),
        DType::F32 => (Dtype::F32, (0..count).flat_map(|_| value(random).to_le_bytes()).collect()),
    };
    Stored { name: spec.name, dtype: kind, shape: spec.shape, bytes }
}

/// Writes tensors as one safetensors file.
pub fn write_tensors<'a>(path: &Path, tensors: impl IntoIterator<Item = &'a Stored>) {
    let views = tensors.into_iter().map(|tensor| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).expect("consistent");
        (tensor.name.clone(), view)
    });
    let bytes = safetensors::serialize(views.collect::<Vec<_>>(), None).expect("serializes");
    fs::write(path, bytes).expect("a writable folder");
}

/// Writes a whole checkpoint folder.
pub fn write_checkpoint(dir: &Path, config: &Value, dtype: DType, seed: u64) {
    let parsed = ModelConfig::parse(&config.to_string()).expect("a valid configuration");
    fs::write(dir.join("config.json"), config.to_string()).expect("a writable folder");
    write_tensors(&dir.join("model.safetensors"), &weights(&parsed, dtype, seed));
}
