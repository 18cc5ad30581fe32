//! Every family that the decoder runs: tiny checkpoints against results that transformers computed from them, and the
//! tensor names of each family. `scripts/make_references.py` makes the checkpoints and the results.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use coel_model::{
    budget::footprint::Footprint,
    kernels::cpu::CpuKernels,
    nn::batch::Want,
    serve::{
        device::Device,
        engine::{Engine, EngineError, EngineOptions, block_on},
    },
    tools::{eval::eval_reference, generate::LocalModel, popularity::route_popularity},
    weights::{
        checkpoint::Checkpoint,
        config::ModelConfig,
        error::LoadError,
        layout::{self, ExpertId},
        matrix::DType,
        parts::{PartKind, parts},
        slices::Precision,
        tensors::{ElementType, Tensors},
    },
};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::{
    synth::{self, Stored},
    whole::Whole,
};

const FAMILIES: [&str; 9] = [
    "mixtral",
    "mixtral-wide-heads",
    "olmoe",
    "olmoe-clipped",
    "qwen2-moe-normed",
    "qwen2-moe-step-2",
    "qwen3-moe",
    "qwen3-moe-dense-first",
    "qwen3-moe-step-2",
];

fn family(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families").join(name)
}

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&family(name)).expect("the family's checkpoint opens")
}

#[test]
fn every_folder_is_tested() {
    let entries = fs::read_dir(family("")).unwrap().map(|entry| entry.unwrap());
    let mut folders: Vec<String> =
        entries.filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name().into_string().unwrap()).collect();
    folders.sort();
    assert_eq!(folders, FAMILIES);
}

#[track_caller]
fn check_family(name: &str) {
    let model = LocalModel::open(&family(name), Device::Cpu).unwrap();
    let report = eval_reference(&model, &family(name).join("reference.safetensors")).unwrap();
    let sparse = model.engine.config().sparse_layers().count();
    // float32 on both sides: only the order of additions differs.
    assert!(report.max_rel_logit_error <= 1e-5, "{name}: {report:?}");
    assert_eq!((report.greedy_equal, report.greedy_total), (48, 48), "{name}: {report:?}");
    assert_eq!((report.routes_equal, report.routes_total), (48 * sparse, 48 * sparse), "{name}: {report:?}");
    assert!(report.passed);
}

#[test]
fn logits_continuations_and_routes_are_those_of_transformers() {
    for name in FAMILIES {
        check_family(name);
    }
}

/// Shows that the check above sees a difference: with one field read wrongly, the reference is not met.
#[test]
fn a_field_read_wrongly_shows() {
    let change = |name: &str, key: &str, value: Value| {
        let dir = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            fs::copy(family(name).join(file), dir.path().join(file)).unwrap();
        }
        let path = dir.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        let model = LocalModel::open(dir.path(), Device::Cpu).unwrap();
        eval_reference(&model, &family(name).join("reference.safetensors")).unwrap()
    };
    for (name, key, value) in [
        ("mixtral", "rope_parameters", json!({"rope_type": "default", "rope_theta": 1e4})),
        ("olmoe", "clip_qkv", json!(0.8)),
        ("olmoe-clipped", "clip_qkv", Value::Null),
        ("olmoe-clipped", "norm_topk_prob", json!(false)),
        ("qwen3-moe", "norm_topk_prob", json!(false)),
        ("qwen3-moe-dense-first", "norm_topk_prob", json!(true)),
    ] {
        let report = change(name, key, value);
        assert!(report.max_rel_logit_error > 1e-3 && !report.passed, "{name} with another {key}: {report:?}");
    }
    let same = change("mixtral", "norm_topk_prob", json!(false));
    assert!(same.passed, "Mixtral has no such field: {same:?}");
}

/// Fields as the `config.json` of published checkpoints spells them, before transformers 5.
#[test]
fn published_spellings_mean_the_same() {
    for name in FAMILIES {
        let today = fs::read_to_string(family(name).join("config.json")).unwrap();
        let mut older: Value = serde_json::from_str(&today).unwrap();
        let keys = older.as_object_mut().unwrap();
        let rope = keys.remove("rope_parameters").unwrap();
        keys.insert("rope_theta".into(), rope["rope_theta"].clone());
        keys.insert("rope_scaling".into(), Value::Null);
        let dtype = keys.remove("dtype").unwrap();
        keys.insert("torch_dtype".into(), dtype);
        keys.remove("layer_types");
        let older = ModelConfig::parse(&older.to_string()).unwrap();
        assert_eq!(older, ModelConfig::parse(&today).unwrap(), "{name}");
    }
}

#[test]
fn whatever_counts_experts_counts_those_there_are() {
    for name in FAMILIES {
        let checkpoint = open(name);
        let config = checkpoint.config();
        let experts: Vec<ExpertId> = layout::experts(config).collect();
        assert_eq!(experts.len(), config.experts_total(), "{name}");
        let parts = parts(&checkpoint);
        let listed: Vec<ExpertId> = parts.iter().filter_map(|part| part.expert()).collect();
        assert_eq!(listed, experts, "{name}");
        let tensors: usize = parts.iter().map(|part| part.tensors.len()).sum();
        assert_eq!(tensors, checkpoint.tensors().len(), "{name}: parts cover every tensor once");

        let footprint = Footprint::of(config, config.dtype);
        let trunk = parts.iter().filter(|part| matches!(part.kind, PartKind::Trunk { .. }));
        assert_eq!(trunk.map(|part| part.data_bytes()).sum::<u64>(), footprint.trunk_bytes, "{name}");
        let mut each = parts.iter().filter(|part| part.expert().is_some());
        assert!(each.all(|part| part.data_bytes() == footprint.expert_bytes), "{name}");
    }
}

#[test]
fn a_dense_layer_has_no_experts_to_load_or_count() {
    let checkpoint = open("qwen3-moe-step-2");
    let options = EngineOptions { kv_tokens: 64, ..EngineOptions::default() };
    let engine = Engine::start(Device::Cpu, checkpoint.config().clone(), options).unwrap();
    block_on(engine.load_checkpoint(&checkpoint)).unwrap();
    assert_eq!(engine.held().len(), 12);
    let d = checkpoint.config().hidden_size;
    let refused = block_on(engine.run_experts(2, vec![0.0; d], vec![(0, vec![0])])).unwrap_err();
    assert!(matches!(refused, EngineError::NoSuchExpert(ExpertId { layer: 2, index: 0 })), "{refused}");
    assert_eq!(checkpoint.expert(ExpertId { layer: 2, index: 0 }).len(), 0);
    let tokens: Vec<u32> = (3..50).collect();
    let counts = block_on(route_popularity(&engine, "numbers", &tokens)).unwrap().counts;
    let shape: Vec<(usize, u64)> = counts.iter().map(|layer| (layer.len(), layer.iter().sum())).collect();
    assert_eq!(shape, [(0, 0), (6, 2 * 47), (0, 0), (6, 2 * 47), (0, 0)]);
}

/// The root mean square error of the logits of a few tokens, relative to exact weights.
fn error_at(checkpoint: &Checkpoint, precision: Precision) -> f64 {
    let logits = |precision| {
        let sliced = |tensors: Tensors| tensors.sliced(precision).expect("widths are whole groups");
        let trunk = sliced(checkpoint.trunk());
        let mut whole =
            Whole::from_tensors(CpuKernels::default(), checkpoint, trunk, |id| sliced(checkpoint.expert(id)));
        let mut solo = whole.solo(24);
        let tokens: Vec<u32> = (0..24).map(|index| index * 13 + 3).collect();
        whole.advance(&mut solo, &tokens, Want::All, |_| {})
    };
    let (exact, found) = (logits(Precision::Exact), logits(precision));
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
    let wrong = squares(&mut exact.iter().zip(&found).map(|(a, b)| a - b));
    (wrong / squares(&mut exact.iter().copied())).sqrt()
}

#[test]
fn every_familys_matrices_can_be_sliced() {
    for name in FAMILIES {
        let checkpoint = open(name);
        let [four, eight] = [Precision::Q4, Precision::Q8].map(|precision| error_at(&checkpoint, precision));
        assert!(0.0 < eight && eight < 0.3 && eight < four / 2.0, "{name}: {four} at Q4, {eight} at Q8");
    }
}

/// A small checkpoint of a family, changed before it is opened.
fn open_changed(changes: &Value, change: impl FnOnce(&mut Vec<Stored>)) -> Result<Checkpoint, LoadError> {
    let dir = tempfile::tempdir().unwrap();
    let json = synth::config(changes.clone());
    fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    let mut tensors = synth::weights(&ModelConfig::parse(&json.to_string()).unwrap(), DType::BF16, 1);
    change(&mut tensors);
    synth::write_tensors(&dir.path().join("model.safetensors"), &tensors);
    Checkpoint::open(dir.path())
}

/// Checks that each tensor is needed, and that an extra one with a suffix to its name is refused.
#[track_caller]
fn check_spelling(changes: Value, needed: &[&str]) {
    open_changed(&changes, |_| {}).unwrap();
    for name in needed {
        let missing = open_changed(&changes, |tensors| {
            let before = tensors.len();
            tensors.retain(|tensor| tensor.name != *name);
            assert_eq!(tensors.len(), before - 1, "{name} is not written");
        });
        let message = missing.unwrap_err().to_string();
        assert!(message.contains(name) && message.contains("missing"), "{message}");
        let other = format!("{name}_2");
        let unused = open_changed(&changes, |tensors| {
            let mut twin = tensors.iter().find(|tensor| tensor.name == *name).unwrap().clone();
            twin.name.clone_from(&other);
            tensors.push(twin);
        });
        let message = unused.unwrap_err().to_string();
        assert!(message.contains(&other) && message.contains("not part"), "{message}");
    }
}

#[test]
fn missing_and_unused_tensors_are_named_as_the_family_spells_them() {
    check_spelling(
        json!({"architectures": ["MixtralForCausalLM"], "intermediate_size": 32}),
        &[
            "model.layers.0.block_sparse_moe.gate.weight",
            "model.layers.1.block_sparse_moe.experts.3.w1.weight",
            "model.layers.1.block_sparse_moe.experts.3.w2.weight",
            "model.layers.1.block_sparse_moe.experts.3.w3.weight",
            "model.layers.0.self_attn.o_proj.weight",
        ],
    );
    check_spelling(
        json!({"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": true}),
        &[
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.1.self_attn.k_norm.weight",
            "model.layers.1.self_attn.o_proj.bias",
            "model.layers.1.self_attn.v_proj.bias",
            "model.layers.1.mlp.gate.weight",
        ],
    );
    check_spelling(
        json!({"architectures": ["OlmoeForCausalLM"], "intermediate_size": 32}),
        &["model.layers.0.self_attn.q_norm.weight", "model.layers.1.mlp.experts.4.down_proj.weight"],
    );
    check_spelling(
        json!({"mlp_only_layers": [0], "intermediate_size": 48}),
        &["model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.shared_expert_gate.weight"],
    );
}

#[test]
fn another_familys_tensors_are_refused() {
    // Qwen3 normalises each head, OLMoE the whole projection: the same name, another shape.
    let qwen3 = json!({"architectures": ["Qwen3MoeForCausalLM"], "intermediate_size": 19});
    let error = open_changed(&json!({"architectures": ["OlmoeForCausalLM"], "intermediate_size": 19}), |tensors| {
        *tensors = synth::weights(&ModelConfig::parse(&synth::config(qwen3).to_string()).unwrap(), DType::BF16, 1);
    });
    let message = error.unwrap_err().to_string();
    assert!(message.contains("q_norm.weight") && message.contains("[14]") && message.contains("[84]"), "{message}");
    // A layer with experts in the file, but none in the configuration.
    let dense = json!({"mlp_only_layers": [0], "intermediate_size": 48});
    let extra = open_changed(&dense, |tensors| {
        let name = "model.layers.1.mlp.experts.0.up_proj.weight";
        let mut twin = tensors.iter().find(|tensor| tensor.name == name).unwrap().clone();
        twin.name = "model.layers.0.mlp.experts.0.up_proj.weight".into();
        tensors.push(twin);
    });
    let message = extra.unwrap_err().to_string();
    assert!(message.contains("layers.0.mlp.experts.0.up_proj") && message.contains("not part"), "{message}");
}

/// The tensors of a checkpoint as `save_pretrained(save_original_format=False)` writes them.
fn fused(checkpoint: &Checkpoint) -> Vec<Stored> {
    let config = checkpoint.config();
    let stored = |name: &str, shape: Vec<usize>, bytes: Vec<u8>| Stored {
        name: name.to_owned(),
        dtype: Dtype::BF16,
        shape,
        bytes,
    };
    let mut wholes: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut rest: BTreeMap<&str, _> = checkpoint.tensors().iter().collect();
    for id in layout::experts(config) {
        let block = format!("model.layers.{}.mlp.experts", id.layer);
        for (spec, whole) in layout::expert(config, id).iter().zip(["gate_up_proj", "gate_up_proj", "down_proj"]) {
            let view = rest.remove(spec.name.as_str()).unwrap();
            wholes.entry(format!("{block}.{whole}")).or_default().extend_from_slice(view.bytes.as_slice());
        }
    }
    let (n, d, width) = (config.num_experts, config.hidden_size, config.moe_intermediate_size);
    let wholes = wholes.into_iter().map(|(name, bytes)| {
        let shape = if name.ends_with("down_proj") { vec![n, d, width] } else { vec![n, 2 * width, d] };
        stored(&name, shape, bytes)
    });
    let rest = rest.into_iter().map(|(name, view)| {
        assert_eq!(view.element, ElementType::Weight(DType::BF16));
        stored(&name.replace("block_sparse_moe.", "mlp."), view.shape.clone(), view.bytes.as_slice().to_vec())
    });
    wholes.chain(rest).collect()
}

#[test]
fn experts_in_one_tensor_are_cut_in_place() {
    for name in FAMILIES {
        let single = open(name);
        let dir = tempfile::tempdir().unwrap();
        fs::copy(family(name).join("config.json"), dir.path().join("config.json")).unwrap();
        let file = dir.path().join("model.safetensors");
        let tensors = fused(&single);
        let experts = (3 * single.config().experts_total(), 2 * single.config().sparse_layers().count());
        assert_eq!(tensors.len() + experts.0, single.tensors().len() + experts.1, "{name}");
        synth::write_tensors(&file, &tensors);
        let cut = Checkpoint::open(dir.path()).unwrap();
        let logits = |checkpoint: &Checkpoint| {
            let mut whole = Whole::new(CpuKernels::default(), checkpoint);
            let mut solo = whole.solo(8);
            whole.advance(&mut solo, &[5, 100, 300], Want::All, |_| {})
        };
        assert!(logits(&cut) == logits(&single), "{name}");
        let file = fs::read(&file).unwrap();
        for (a, b) in parts(&cut).iter().zip(parts(&single)) {
            assert_eq!((&a.kind, a.header()), (&b.kind, b.header()), "{name}: the same blobs");
            for tensor in &a.tensors {
                let bytes = &file[tensor.offset as usize..(tensor.offset + tensor.bytes) as usize];
                assert!(bytes == single.tensors().get(&tensor.name).unwrap().bytes.as_slice(), "{}", tensor.name);
            }
        }
    }
    let refused = |change: &dyn Fn(&mut Vec<Stored>)| {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(family("mixtral").join("config.json"), dir.path().join("config.json")).unwrap();
        let mut tensors = fused(&open("mixtral"));
        change(&mut tensors);
        synth::write_tensors(&dir.path().join("model.safetensors"), &tensors);
        Checkpoint::open(dir.path()).unwrap_err().to_string()
    };
    let message = refused(&|tensors| tensors.iter_mut().for_each(|tensor| tensor.shape.reverse()));
    assert!(message.contains("experts.gate_up_proj") && message.contains("[64, 64, 8]"), "{message}");
    let message = refused(&|tensors| {
        let mut twin = tensors.iter().find(|tensor| tensor.name.ends_with("0.mlp.experts.down_proj")).unwrap().clone();
        twin.name = "model.layers.0.block_sparse_moe.experts.2.w2.weight".into();
        (twin.shape, twin.bytes) = (vec![64, 32], twin.bytes[..64 * 32 * 2].to_vec());
        tensors.push(twin);
    });
    assert!(message.contains("layers.0.block_sparse_moe.experts.2.w2.weight appears twice"), "{message}");
    let message = refused(&|tensors| tensors.retain(|tensor| !tensor.name.ends_with("1.mlp.experts.down_proj")));
    assert!(message.contains("layers.1.block_sparse_moe.experts.0.w2.weight is missing"), "{message}");
}
