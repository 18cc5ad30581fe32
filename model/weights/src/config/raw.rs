//! `config.json` as it is written: every family's spelling, today's and older ones, side by side.
//!
//! Owns the translation of the text into a [`ModelConfig`] and refuses what the decoder does not compute. It follows the
//! reference implementation: a family reads its own fields and ignores those of other families, and a missing field has
//! the family's own default, if there is one. The caller checks whether the sizes make sense.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::{Architecture, ConfigError, ModelConfig, QkNorm, invalid};
use crate::matrix::DType;

/// What `architecture` calls the number of experts of a layer.
pub(super) const fn num_experts(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Mixtral => "num_local_experts",
        _ => "num_experts",
    }
}

/// What `architecture` calls the width of an expert.
pub(super) const fn expert_width(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Qwen2Moe | Architecture::Qwen3Moe => "moe_intermediate_size",
        Architecture::Mixtral | Architecture::Olmoe => "intermediate_size",
    }
}

/// Reads the text of a `config.json` and refuses what is not computed; sizes are not checked.
pub(super) fn parse(json: &str) -> Result<ModelConfig, ConfigError> {
    let raw: Raw = serde_json::from_str(json)?;
    let found = raw.architectures.iter().flatten().next().or(raw.model_type.as_ref());
    let found = found.cloned().ok_or(ConfigError::Missing("architectures"))?;
    let Some(architecture) = Architecture::parse(&found) else {
        return Err(ConfigError::Architecture { found });
    };
    raw.refuse_unsupported(architecture)?;
    raw.resolve(architecture)
}

/// Every field of every family; `null` counts as missing.
#[derive(Debug, Deserialize)]
struct Raw {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f32>,
    rope_theta: Option<f32>,
    rope_parameters: Option<BTreeMap<String, Value>>,
    rope_scaling: Option<BTreeMap<String, Value>>,
    qkv_bias: Option<bool>,
    attention_bias: Option<bool>,
    clip_qkv: Option<f32>,
    tie_word_embeddings: Option<bool>,
    num_experts: Option<usize>,
    num_local_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    intermediate_size: Option<usize>,
    moe_intermediate_size: Option<usize>,
    shared_expert_intermediate_size: Option<usize>,
    norm_topk_prob: Option<bool>,
    eos_token_id: Option<Value>,
    dtype: Option<String>,
    torch_dtype: Option<String>,
    hidden_act: Option<String>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    mlp_only_layers: Option<Vec<usize>>,
    decoder_sparse_step: Option<usize>,
    quantization_config: Option<Value>,
}

fn need<T>(value: Option<T>, field: &'static str) -> Result<T, ConfigError> {
    value.ok_or(ConfigError::Missing(field))
}

impl Raw {
    fn refuse_unsupported(&self, architecture: Architecture) -> Result<(), ConfigError> {
        let refuse = |field, value: String, supported| Err(ConfigError::Unsupported { field, value, supported });
        match self.hidden_act.as_deref() {
            None | Some("silu") => {}
            Some(other) => return refuse("hidden_act", other.into(), "it computes silu"),
        }
        match architecture {
            // These families say it twice, and set the size even where it is not used.
            Architecture::Qwen2Moe | Architecture::Qwen3Moe => {
                if self.use_sliding_window == Some(true) {
                    return refuse("use_sliding_window", "true".into(), "it computes full attention");
                }
            }
            // A window as wide as the context hides nothing.
            Architecture::Mixtral | Architecture::Olmoe => {
                if let Some(window) = self.sliding_window.filter(|window| Some(*window) < self.max_position_embeddings)
                {
                    return refuse("sliding_window", window.to_string(), "it computes full attention");
                }
            }
        }
        if let Some(other) = self.layer_types.iter().flatten().find(|kind| *kind != "full_attention") {
            return refuse("layer_types", other.clone(), "it computes full_attention");
        }
        if let Some(quantization) = &self.quantization_config {
            return refuse("quantization_config", quantization.to_string(), "it reads BF16, F16 and F32");
        }
        let scaling = [("rope_parameters", &self.rope_parameters), ("rope_scaling", &self.rope_scaling)];
        for (field, parameters) in scaling {
            let Some(parameters) = parameters else { continue };
            let kind = parameters.get("rope_type").or_else(|| parameters.get("type"));
            match kind.map(|kind| kind.as_str().unwrap_or_default()) {
                None | Some("default") => {}
                Some(other) => return refuse(field, other.into(), "it computes the default rotary form"),
            }
            if let Some(part) = parameters.get("partial_rotary_factor").filter(|part| part.as_f64() != Some(1.0)) {
                return refuse(field, format!("partial_rotary_factor {part}"), "it rotates whole heads");
            }
        }
        Ok(())
    }

    fn resolve(self, architecture: Architecture) -> Result<ModelConfig, ConfigError> {
        use Architecture::{Mixtral, Olmoe, Qwen2Moe, Qwen3Moe};
        let hidden_size = need(self.hidden_size, "hidden_size")?;
        let num_hidden_layers = need(self.num_hidden_layers, "num_hidden_layers")?;
        let num_attention_heads = need(self.num_attention_heads, "num_attention_heads")?;
        let attention_bias = self.attention_bias.unwrap_or(false);
        let expert_width_given = match architecture {
            Qwen2Moe | Qwen3Moe => self.moe_intermediate_size,
            Mixtral | Olmoe => self.intermediate_size,
        };
        // Only Qwen's families may have layers without experts.
        let (mlp_only_layers, decoder_sparse_step) = match architecture {
            Qwen2Moe | Qwen3Moe => (self.mlp_only_layers.clone(), self.decoder_sparse_step),
            Mixtral | Olmoe => (None, None),
        };
        let mut mlp_only_layers = mlp_only_layers.unwrap_or_default();
        mlp_only_layers.retain(|layer| *layer < num_hidden_layers);
        let decoder_sparse_step = decoder_sparse_step.unwrap_or(1);
        let intermediate_size = match mlp_only_layers.is_empty() && decoder_sparse_step == 1 {
            true => None,
            false => Some(need(self.intermediate_size, "intermediate_size")?),
        };
        Ok(ModelConfig {
            architecture,
            vocab_size: need(self.vocab_size, "vocab_size")?,
            hidden_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or(num_attention_heads),
            head_dim: self.head_dim(hidden_size, num_attention_heads)?,
            max_position_embeddings: need(self.max_position_embeddings, "max_position_embeddings")?,
            rms_norm_eps: need(self.rms_norm_eps, "rms_norm_eps")?,
            rope_theta: self.rope_theta()?,
            qkv_bias: match architecture {
                Qwen2Moe => self.qkv_bias.unwrap_or(true),
                Qwen3Moe | Olmoe => attention_bias,
                Mixtral => false,
            },
            o_bias: matches!(architecture, Qwen3Moe | Olmoe) && attention_bias,
            qk_norm: match architecture {
                Qwen2Moe | Mixtral => None,
                Qwen3Moe => Some(QkNorm::Head),
                Olmoe => Some(QkNorm::Projection),
            },
            clip_qkv: self.clip_qkv.filter(|_| architecture == Olmoe),
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
            num_experts: need(self.num_experts.or(self.num_local_experts), num_experts(architecture))?,
            num_experts_per_tok: need(self.num_experts_per_tok, "num_experts_per_tok")?,
            moe_intermediate_size: need(expert_width_given, expert_width(architecture))?,
            shared_expert_intermediate_size: match architecture {
                Qwen2Moe => Some(need(self.shared_expert_intermediate_size, "shared_expert_intermediate_size")?),
                Qwen3Moe | Mixtral | Olmoe => None,
            },
            norm_topk_prob: match architecture {
                Qwen2Moe | Qwen3Moe | Olmoe => self.norm_topk_prob.unwrap_or(false),
                Mixtral => true,
            },
            intermediate_size,
            mlp_only_layers: mlp_only_layers.into_iter().collect(),
            decoder_sparse_step,
            eos_token_id: self.eos_token_ids()?,
            dtype: self.dtype()?,
        })
    }

    fn head_dim(&self, hidden_size: usize, num_attention_heads: usize) -> Result<usize, ConfigError> {
        match self.head_dim {
            Some(head_dim) => Ok(head_dim),
            None if num_attention_heads == 0 || !hidden_size.is_multiple_of(num_attention_heads) => {
                let why = "without head_dim it must divide hidden_size";
                Err(invalid("num_attention_heads", num_attention_heads, why))
            }
            None => Ok(hidden_size / num_attention_heads),
        }
    }

    fn rope_theta(&self) -> Result<f32, ConfigError> {
        let nested = self.rope_parameters.as_ref().and_then(|p| p.get("rope_theta")).and_then(Value::as_f64);
        need(nested.map(|theta| theta as f32).or(self.rope_theta), "rope_theta")
    }

    fn dtype(&self) -> Result<DType, ConfigError> {
        match self.dtype.as_deref().or(self.torch_dtype.as_deref()) {
            Some("bfloat16") | None => Ok(DType::BF16),
            Some("float16") => Ok(DType::F16),
            Some("float32") => Ok(DType::F32),
            Some(other) => {
                let supported = "it reads bfloat16, float16 and float32";
                Err(ConfigError::Unsupported { field: "dtype", value: other.into(), supported })
            }
        }
    }

    fn eos_token_ids(&self) -> Result<Vec<u32>, ConfigError> {
        match &self.eos_token_id {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(token_id).collect(),
            Some(id) => Ok(vec![token_id(id)?]),
        }
    }
}

fn token_id(value: &Value) -> Result<u32, ConfigError> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| invalid("eos_token_id", value, "it must be a token id or a list of them"))
}
