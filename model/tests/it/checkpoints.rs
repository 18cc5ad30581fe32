//! Checkpoint folders: whole, sharded, old-fashioned and broken.

use std::{collections::BTreeMap, fs, path::Path};

use coel_model::{
    kernels::cpu::CpuKernels,
    nn::batch::Want,
    weights::{
        checkpoint::Checkpoint, config::ModelConfig, error::LoadError, layout, matrix::DType, tensors::ElementType,
    },
};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::{
    synth::{self, Stored},
    whole::{Whole, checkpoint, fixture},
};

/// Writes a small checkpoint with tensors that `change` has edited, and opens it.
fn open_changed(change: impl FnOnce(&mut Vec<Stored>)) -> Result<Checkpoint, LoadError> {
    let dir = tempfile::tempdir().unwrap();
    let json = synth::config(json!({}));
    fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    let mut tensors = synth::weights(&ModelConfig::parse(&json.to_string()).unwrap(), DType::BF16, 1);
    change(&mut tensors);
    synth::write_tensors(&dir.path().join("model.safetensors"), &tensors);
    Checkpoint::open(dir.path())
}

#[track_caller]
fn check_names(error: LoadError, words: &[&str]) {
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "{message:?} does not name {word:?}");
    }
}

const SOME: &str = "model.layers.1.mlp.experts.3.up_proj.weight";

fn some(tensors: &mut [Stored]) -> &mut Stored {
    tensors.iter_mut().find(|tensor| tensor.name == SOME).unwrap()
}

#[test]
fn a_whole_checkpoint_opens() {
    let checkpoint = open_changed(|_| {}).unwrap();
    assert_eq!(checkpoint.config().experts_total(), 10);
    assert_eq!(checkpoint.expert(layout::ExpertId { layer: 1, index: 3 }).len(), 3);
    assert_eq!(checkpoint.expert(layout::ExpertId { layer: 1, index: 5 }).len(), 0);
}

#[test]
fn broken_tensors_are_named() {
    let missing = open_changed(|tensors| tensors.retain(|tensor| tensor.name != SOME));
    check_names(missing.unwrap_err(), &["model.safetensors", SOME, "missing"]);

    let extra = open_changed(|tensors| {
        let mut twin = some(tensors).clone();
        twin.name = "model.layers.1.mlp.experts.5.up_proj.weight".into();
        tensors.push(twin);
    });
    check_names(extra.unwrap_err(), &["model.safetensors", "experts.5.up_proj.weight", "not part"]);

    let shape = open_changed(|tensors| some(tensors).shape.reverse());
    check_names(shape.unwrap_err(), &["model.safetensors", SOME, "[52, 19]", "[19, 52]"]);

    let dtype = open_changed(|tensors| some(tensors).dtype = Dtype::U16);
    check_names(dtype.unwrap_err(), &["model.safetensors", SOME, "U16", "BF16"]);

    let integers = open_changed(|tensors| {
        let tensor = some(tensors);
        (tensor.dtype, tensor.bytes) = (Dtype::I64, vec![0; tensor.bytes.len() * 4]);
    });
    check_names(integers.unwrap_err(), &[SOME, "I64"]);
}

#[test]
fn broken_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    check_names(Checkpoint::open(dir.path()).unwrap_err(), &["config.json", "folder"]);
    let config = synth::config(json!({}));
    synth::write_checkpoint(dir.path(), &config, DType::BF16, 1);
    let weights = dir.path().join("model.safetensors");
    let whole = fs::read(&weights).unwrap();
    for length in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&weights, &whole[..length]).unwrap();
        check_names(Checkpoint::open(dir.path()).unwrap_err(), &["model.safetensors", "truncated"]);
    }
    let mut damaged = whole.clone();
    damaged[20] = 0xff;
    fs::write(&weights, &damaged).unwrap();
    check_names(Checkpoint::open(dir.path()).unwrap_err(), &["model.safetensors", "malformed"]);
    fs::remove_file(&weights).unwrap();
    check_names(Checkpoint::open(dir.path()).unwrap_err(), &["no model.safetensors"]);

    fs::write(&weights, &whole).unwrap();
    fs::write(dir.path().join("config.json"), "{").unwrap();
    check_names(Checkpoint::open(dir.path()).unwrap_err(), &["config.json", "not valid"]);
    let stranger = synth::config(json!({"architectures": ["LlamaForCausalLM"]}));
    fs::write(dir.path().join("config.json"), stranger.to_string()).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    check_names(error, &["config.json", "LlamaForCausalLM", "Qwen2MoeForCausalLM"]);
}

#[test]
fn the_bundled_configuration_in_older_words() {
    let text = fs::read_to_string(fixture().join("config.json")).unwrap();
    let today = ModelConfig::parse(&text).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    let keys = config.as_object_mut().unwrap();
    keys.remove("rope_parameters");
    keys.insert("rope_theta".into(), json!(1_000_000.0));
    keys.insert("rope_scaling".into(), Value::Null);
    let dtype = keys.remove("dtype").unwrap();
    keys.insert("torch_dtype".into(), dtype);
    let experts = keys.remove("num_experts").unwrap();
    keys.insert("num_local_experts".into(), experts);
    keys.remove("layer_types");
    assert_eq!(ModelConfig::parse(&config.to_string()).unwrap(), today);
}

#[test]
fn shards_are_one_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let single = checkpoint();
    let mut shards: BTreeMap<String, Vec<Stored>> = BTreeMap::new();
    let mut map = serde_json::Map::new();
    for (index, (name, view)) in single.tensors().iter().enumerate() {
        assert_eq!(view.element, ElementType::Weight(DType::BF16));
        let shard = format!("model-{:05}-of-00003.safetensors", index % 3 + 1);
        map.insert(name.to_owned(), json!(shard));
        shards.entry(shard).or_default().push(Stored {
            name: name.to_owned(),
            dtype: Dtype::BF16,
            shape: view.shape.clone(),
            bytes: view.bytes.as_slice().to_vec(),
        });
    }
    for (name, tensors) in &shards {
        synth::write_tensors(&dir.path().join(name), tensors);
    }
    let index = dir.path().join("model.safetensors.index.json");
    fs::write(&index, json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
    fs::copy(fixture().join("config.json"), dir.path().join("config.json")).unwrap();

    let sharded = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(sharded.weight_files().len(), 3);
    let logits = |checkpoint: &Checkpoint| {
        let mut whole = Whole::new(CpuKernels::default(), checkpoint);
        let mut solo = whole.solo(8);
        whole.advance(&mut solo, &[1, 100, 2000], Want::Last, |_| {})
    };
    assert!(logits(&sharded) == logits(&single));

    let broken = |change: &dyn Fn(&Path)| {
        change(dir.path());
        Checkpoint::open(dir.path()).unwrap_err()
    };
    let shard = "model-00002-of-00003.safetensors";
    check_names(broken(&|dir| fs::remove_file(dir.join(shard)).unwrap()), &[shard]);
    let outside = json!({"weight_map": {"a": "../a.safetensors"}}).to_string();
    check_names(
        broken(&|dir| fs::write(dir.join("model.safetensors.index.json"), &outside).unwrap()),
        &["index.json", "leads out"],
    );
    check_names(broken(&|dir| fs::write(dir.join("model.safetensors.index.json"), "[]").unwrap()), &["weight_map"]);
}

#[test]
fn the_other_files_are_listed() {
    let names: Vec<String> = checkpoint().files().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]);
}
