use serde_json::{Value, json};

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
    check_refused(json!({"hidden_act": "gelu"}), &["hidden_act", "gelu"]);
    check_refused(json!({"dtype": "float8"}), &["dtype", "float8"]);
    check_refused(json!({"quantization_config": {"bits": 4}}), &["quantization_config"]);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    check_refused(json!({"mlp_only_layers": [0]}), &["lacks", "intermediate_size"]);
    check_refused(json!({"mlp_only_layers": [0, 1], "intermediate_size": 8}), &["mlp_only_layers", "no layer"]);
    check_refused(json!({"decoder_sparse_step": 3, "intermediate_size": 8}), &["decoder_sparse_step", "no layer"]);
    check_refused(json!({"decoder_sparse_step": 0, "intermediate_size": 8}), &["decoder_sparse_step"]);
    check_refused(json!({"decoder_sparse_step": 2, "intermediate_size": 0}), &["intermediate_size"]);
    check_refused(json!({"num_key_value_heads": 3}), &["num_attention_heads", "num_key_value_heads"]);
    check_refused(json!({"num_experts_per_tok": 5}), &["num_experts_per_tok"]);
    check_refused(json!({"hidden_size": null}), &["lacks", "hidden_size"]);
    check_refused(json!({"vocab_size": 0}), &["vocab_size"]);
    check_refused(json!({"head_dim": 7}), &["head_dim", "even"]);
    check_refused(json!({"num_hidden_layers": 1_000_000}), &["num_hidden_layers"]);
    check_refused(json!({"num_attention_heads": 0}), &["num_attention_heads"]);
    check_refused(json!({"eos_token_id": "x"}), &["eos_token_id"]);
}

/// What another family's file holds: `sample` with its own names.
fn family(architecture: &str, changes: Value) -> Result<ModelConfig, ConfigError> {
    let mut config = json!({"architectures": [architecture], "sliding_window": null});
    let mine: &[&str] = match architecture {
        "Qwen3MoeForCausalLM" => &["shared_expert_intermediate_size"],
        _ => &["shared_expert_intermediate_size", "moe_intermediate_size"],
    };
    for key in mine {
        config[key] = Value::Null;
    }
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    with(config)
}

#[test]
fn each_family_reads_its_own_fields() {
    let qwen2 = with(json!({"attention_bias": true, "clip_qkv": 1.0})).unwrap();
    assert_eq!((qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm, qwen2.clip_qkv), (true, false, None, None));
    assert_eq!((qwen2.norm_topk_prob, qwen2.shared_expert_intermediate_size), (false, Some(24)));

    let qwen3 =
        family("Qwen3MoeForCausalLM", json!({"head_dim": 16, "norm_topk_prob": true, "qkv_bias": true})).unwrap();
    assert_eq!((qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm), (false, false, Some(QkNorm::Head)));
    assert_eq!((qwen3.head_dim, qwen3.q_width(), qwen3.kv_width()), (16, 64, 32));
    assert_eq!((qwen3.norm_topk_prob, qwen3.shared_expert_intermediate_size), (true, None));
    let biased = family("Qwen3MoeForCausalLM", json!({"attention_bias": true})).unwrap();
    assert_eq!((biased.qkv_bias, biased.o_bias, biased.norm_topk_prob), (true, true, false));

    let words = json!({"intermediate_size": 40, "num_experts": null, "num_local_experts": 8,
        "head_dim": null, "mlp_only_layers": [0], "norm_topk_prob": false, "attention_bias": true, "clip_qkv": 1.0});
    let mixtral = family("MixtralForCausalLM", words).unwrap();
    assert_eq!((mixtral.num_experts, mixtral.moe_intermediate_size, mixtral.intermediate_size), (8, 40, None));
    assert_eq!((mixtral.qkv_bias, mixtral.o_bias, mixtral.qk_norm, mixtral.clip_qkv), (false, false, None, None));
    assert!(mixtral.norm_topk_prob && mixtral.is_sparse(0));

    let olmoe = family("OlmoeForCausalLM", json!({"intermediate_size": 40, "clip_qkv": 8.0})).unwrap();
    assert_eq!((olmoe.moe_intermediate_size, olmoe.qk_norm), (40, Some(QkNorm::Projection)));
    assert_eq!((olmoe.clip_qkv, olmoe.norm_topk_prob, olmoe.qkv_bias), (Some(8.0), false, false));
    let unclipped = family("OlmoeForCausalLM", json!({"intermediate_size": 40, "clip_qkv": null})).unwrap();
    assert_eq!(unclipped.clip_qkv, None);
}

#[test]
fn what_a_family_lacks_or_uses_is_named_in_its_words() {
    #[track_caller]
    fn check(architecture: &str, changes: Value, words: &[&str]) {
        let message = family(architecture, changes).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{message:?} does not name {word:?}");
        }
    }
    check("MixtralForCausalLM", json!({}), &["lacks `intermediate_size`"]);
    let words = json!({"intermediate_size": 8, "num_experts": null});
    check("MixtralForCausalLM", words, &["lacks `num_local_experts`"]);
    check("OlmoeForCausalLM", json!({"intermediate_size": 8, "num_experts": null}), &["lacks `num_experts`"]);
    check("OlmoeForCausalLM", json!({"intermediate_size": 8, "num_experts": 70000}), &["num_experts = 70000"]);
    check("OlmoeForCausalLM", json!({"intermediate_size": 0}), &["intermediate_size = 0"]);
    check("OlmoeForCausalLM", json!({"intermediate_size": 8, "clip_qkv": 0.0}), &["clip_qkv", "positive"]);
    check("Qwen3MoeForCausalLM", json!({"moe_intermediate_size": null}), &["lacks `moe_intermediate_size`"]);
    check("Qwen3MoeForCausalLM", json!({"use_sliding_window": true}), &["use_sliding_window"]);
    check("Qwen3MoeForCausalLM", json!({"rope_scaling": {"rope_type": "yarn"}}), &["rope_scaling", "yarn"]);
    // The sample's context is 128 tokens; a window as wide as that hides nothing.
    let windowed = |window| json!({"intermediate_size": 8, "sliding_window": window});
    check("MixtralForCausalLM", windowed(127), &["sliding_window = 127", "full attention"]);
    assert!(family("MixtralForCausalLM", windowed(128)).is_ok());
    assert!(family("Qwen3MoeForCausalLM", json!({"sliding_window": 4})).is_ok(), "not in use");
}

#[test]
fn layers_without_experts_are_where_the_reference_puts_them() {
    let sparse = |changes: Value| {
        let mut changes = changes;
        changes["num_hidden_layers"] = json!(6);
        changes["intermediate_size"] = json!(8);
        let config = with(changes).unwrap();
        let layers: Vec<usize> = config.sparse_layers().collect();
        assert_eq!(config.experts_total(), 4 * layers.len());
        assert!(!config.is_sparse(6));
        (layers, config.intermediate_size)
    };
    assert_eq!(sparse(json!({})), (vec![0, 1, 2, 3, 4, 5], None));
    assert_eq!(sparse(json!({"mlp_only_layers": [9], "decoder_sparse_step": 1})).1, None);
    assert_eq!(sparse(json!({"mlp_only_layers": [0, 3]})), (vec![1, 2, 4, 5], Some(8)));
    assert_eq!(sparse(json!({"decoder_sparse_step": 2})), (vec![1, 3, 5], Some(8)));
    assert_eq!(sparse(json!({"decoder_sparse_step": 2, "mlp_only_layers": [3]})), (vec![1, 5], Some(8)));
    assert_eq!(sparse(json!({"decoder_sparse_step": 4})), (vec![3], Some(8)));
}
