//! `config.json`: what a checkpoint says it is.
//!
//! Owns [`ModelConfig`], whose field names are the checkpoint's. Today's and older spellings are read; a feature that
//! the decoder does not compute is refused by name, because a model computed wrongly looks like a bad model. The
//! invariant: a `ModelConfig` that exists is one the decoder runs, all its sizes are positive, and products of them do
//! not overflow. It does not know where weights lie.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::bytes::DType;

/// Largest value accepted for any single size in `config.json`; above every known model, and products of two fit u64.
const SIZE_MAX: usize = 1 << 24;

/// The families the decoder runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Qwen2Moe,
}

impl Architecture {
    /// The names, as `config.json` gives them, that run here.
    pub const NAMES: [&str; 1] = ["Qwen2MoeForCausalLM"];

    fn parse(name: &str) -> Option<Self> {
        (name == Self::NAMES[0]).then_some(Self::Qwen2Moe)
    }

    pub const fn name(self) -> &'static str {
        match self {
            Architecture::Qwen2Moe => Self::NAMES[0],
        }
    }
}

/// Why a `config.json` is not run.
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

/// Shape and constants of a model, named as in the checkpoint.
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
    pub qkv_bias: bool,
    pub tie_word_embeddings: bool,
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    pub moe_intermediate_size: usize,
    /// Width of the expert every row passes; `None` for families without one.
    pub shared_expert_intermediate_size: Option<usize>,
    pub norm_topk_prob: bool,
    /// Tokens that end a text, from `config.json`.
    pub eos_token_id: Vec<u32>,
    /// The element type the checkpoint says it has.
    pub dtype: DType,
}

impl ModelConfig {
    /// Reads and validates the text of a `config.json`.
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        let raw: Raw = serde_json::from_str(json)?;
        let found = raw.architectures.first().cloned().or_else(|| raw.model_type.clone());
        let found = found.ok_or(ConfigError::Missing("architectures"))?;
        let Some(architecture) = Architecture::parse(&found) else {
            return Err(ConfigError::Architecture { found });
        };
        raw.refuse_unsupported()?;
        let config = raw.resolve(architecture)?;
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

    /// All experts of all layers.
    pub fn experts_total(&self) -> usize {
        self.num_hidden_layers * self.num_experts
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
            ("num_experts", self.num_experts),
            ("num_experts_per_tok", self.num_experts_per_tok),
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("shared_expert_intermediate_size", self.shared_expert_intermediate_size.unwrap_or(1)),
        ];
        for (field, value) in sizes {
            if value == 0 || value > SIZE_MAX {
                return Err(invalid(field, value, "it must be between 1 and 2^24"));
            }
        }
        // Experts are addressed by two u16.
        for (field, value) in [("num_hidden_layers", self.num_hidden_layers), ("num_experts", self.num_experts)] {
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
            return Err(invalid("num_experts_per_tok", self.num_experts_per_tok, "it exceeds num_experts"));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps.is_finite()) {
            return Err(invalid("rms_norm_eps", self.rms_norm_eps, "it must be positive"));
        }
        if !(self.rope_theta > 1.0 && self.rope_theta.is_finite()) {
            return Err(invalid("rope_theta", self.rope_theta, "it must be above 1"));
        }
        Ok(())
    }
}

fn invalid(field: &'static str, value: impl ToString, why: &'static str) -> ConfigError {
    ConfigError::Invalid { field, value: value.to_string(), why }
}

/// `config.json` as written: everything optional, both spellings side by side.
#[derive(Debug, Deserialize)]
struct Raw {
    #[serde(default)]
    architectures: Vec<String>,
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
    tie_word_embeddings: Option<bool>,
    num_experts: Option<usize>,
    num_local_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    moe_intermediate_size: Option<usize>,
    shared_expert_intermediate_size: Option<usize>,
    norm_topk_prob: Option<bool>,
    eos_token_id: Option<Value>,
    dtype: Option<String>,
    torch_dtype: Option<String>,
    hidden_act: Option<String>,
    use_sliding_window: Option<bool>,
    #[serde(default)]
    layer_types: Vec<String>,
    #[serde(default)]
    mlp_only_layers: Vec<usize>,
    decoder_sparse_step: Option<usize>,
    quantization_config: Option<Value>,
}

impl Raw {
    fn refuse_unsupported(&self) -> Result<(), ConfigError> {
        let refuse = |field, value: String, supported| Err(ConfigError::Unsupported { field, value, supported });
        match self.hidden_act.as_deref() {
            None | Some("silu") => {}
            Some(other) => return refuse("hidden_act", other.into(), "it computes silu"),
        }
        if self.use_sliding_window == Some(true) {
            return refuse("use_sliding_window", "true".into(), "it computes full attention");
        }
        if let Some(other) = self.layer_types.iter().find(|kind| *kind != "full_attention") {
            return refuse("layer_types", other.clone(), "it computes full_attention");
        }
        if !self.mlp_only_layers.is_empty() {
            let value = format!("{:?}", self.mlp_only_layers);
            return refuse("mlp_only_layers", value, "every layer must have experts");
        }
        if let Some(step) = self.decoder_sparse_step.filter(|step| *step != 1) {
            return refuse("decoder_sparse_step", step.to_string(), "every layer must have experts: 1");
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
        fn need<T>(value: Option<T>, field: &'static str) -> Result<T, ConfigError> {
            value.ok_or(ConfigError::Missing(field))
        }
        let hidden_size = need(self.hidden_size, "hidden_size")?;
        let num_attention_heads = need(self.num_attention_heads, "num_attention_heads")?;
        let head_dim = match self.head_dim {
            Some(head_dim) => head_dim,
            None if num_attention_heads == 0 || !hidden_size.is_multiple_of(num_attention_heads) => {
                let why = "without head_dim it must divide hidden_size";
                return Err(invalid("num_attention_heads", num_attention_heads, why));
            }
            None => hidden_size / num_attention_heads,
        };
        let nested_theta = self.rope_parameters.as_ref().and_then(|p| p.get("rope_theta")).and_then(Value::as_f64);
        let dtype = match self.dtype.as_deref().or(self.torch_dtype.as_deref()) {
            Some("bfloat16") | None => DType::BF16,
            Some("float16") => DType::F16,
            Some("float32") => DType::F32,
            Some(other) => {
                let supported = "it reads bfloat16, float16 and float32";
                return Err(ConfigError::Unsupported { field: "dtype", value: other.into(), supported });
            }
        };
        let eos_token_id = match &self.eos_token_id {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(ids)) => ids.iter().map(token_id).collect::<Result<_, _>>()?,
            Some(id) => vec![token_id(id)?],
        };
        Ok(ModelConfig {
            architecture,
            vocab_size: need(self.vocab_size, "vocab_size")?,
            hidden_size,
            num_hidden_layers: need(self.num_hidden_layers, "num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or(num_attention_heads),
            head_dim,
            max_position_embeddings: need(self.max_position_embeddings, "max_position_embeddings")?,
            rms_norm_eps: need(self.rms_norm_eps, "rms_norm_eps")?,
            rope_theta: need(nested_theta.map(|theta| theta as f32).or(self.rope_theta), "rope_theta")?,
            qkv_bias: self.qkv_bias.unwrap_or(true),
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
            num_experts: need(self.num_experts.or(self.num_local_experts), "num_experts")?,
            num_experts_per_tok: need(self.num_experts_per_tok, "num_experts_per_tok")?,
            moe_intermediate_size: need(self.moe_intermediate_size, "moe_intermediate_size")?,
            shared_expert_intermediate_size: Some(need(
                self.shared_expert_intermediate_size,
                "shared_expert_intermediate_size",
            )?),
            norm_topk_prob: self.norm_topk_prob.unwrap_or(false),
            eos_token_id,
            dtype,
        })
    }
}

fn token_id(value: &Value) -> Result<u32, ConfigError> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| invalid("eos_token_id", value, "it must be a token id or a list of them"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sample() -> Value {
        json!({
            "architectures": ["Qwen2MoeForCausalLM"], "vocab_size": 64, "hidden_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
            "eos_token_id": [2, 3], "dtype": "bfloat16", "sliding_window": 0, "use_sliding_window": false
        })
    }

    fn with(changes: Value) -> Result<ModelConfig, ConfigError> {
        let mut config = sample();
        for (key, value) in changes.as_object().unwrap() {
            if value.is_null() {
                config.as_object_mut().unwrap().remove(key);
            } else {
                config[key] = value.clone();
            }
        }
        ModelConfig::parse(&config.to_string())
    }

    #[test]
    fn both_spellings_mean_the_same() {
        let today = with(json!({})).unwrap();
        let older = with(json!({
            "rope_parameters": null, "rope_theta": 10000.0, "dtype": null, "torch_dtype": "bfloat16",
            "num_experts": null, "num_local_experts": 4
        }));
        assert_eq!(today, older.unwrap());
        assert_eq!((today.head_dim, today.eos_token_id.as_slice()), (8, &[2, 3][..]));
        assert_eq!(with(json!({"head_dim": 16})).unwrap().q_width(), 64);
        assert_eq!(with(json!({"eos_token_id": 7})).unwrap().eos_token_id, [7]);
    }

    #[track_caller]
    fn check_refused(changes: Value, words: &[&str]) {
        let message = with(changes).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{message:?} does not name {word:?}");
        }
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        check_refused(json!({"architectures": ["LlamaForCausalLM"]}), &["LlamaForCausalLM", "Qwen2MoeForCausalLM"]);
        check_refused(json!({"use_sliding_window": true}), &["use_sliding_window"]);
        check_refused(json!({"layer_types": ["sliding_attention"]}), &["layer_types", "sliding_attention"]);
        check_refused(json!({"rope_scaling": {"type": "yarn"}}), &["rope_scaling", "yarn"]);
        check_refused(json!({"mlp_only_layers": [0]}), &["mlp_only_layers"]);
        check_refused(json!({"decoder_sparse_step": 2}), &["decoder_sparse_step"]);
        check_refused(json!({"hidden_act": "gelu"}), &["hidden_act", "gelu"]);
        check_refused(json!({"dtype": "float8"}), &["dtype", "float8"]);
        check_refused(json!({"quantization_config": {"bits": 4}}), &["quantization_config"]);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        check_refused(json!({"num_key_value_heads": 3}), &["num_attention_heads", "num_key_value_heads"]);
        check_refused(json!({"num_experts_per_tok": 5}), &["num_experts_per_tok"]);
        check_refused(json!({"hidden_size": null}), &["lacks", "hidden_size"]);
        check_refused(json!({"vocab_size": 0}), &["vocab_size"]);
        check_refused(json!({"head_dim": 7}), &["head_dim", "even"]);
        check_refused(json!({"num_hidden_layers": 1_000_000}), &["num_hidden_layers"]);
        check_refused(json!({"num_attention_heads": 0}), &["num_attention_heads"]);
        check_refused(json!({"eos_token_id": "x"}), &["eos_token_id"]);
    }
}
