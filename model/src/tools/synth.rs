//! Checkpoints of a given shape with random weights, for measuring what does not hang on what a model says.
//!
//! Owns [`SynthSpec`]: a configuration, the text files that go with it and a seed. Weights are Gaussian with the deviation
//! models are initialised with, norms are 1, and any range of any tensor is made by itself ([`gauss`]): so a checkpoint
//! is streamed to disk, or straight into slices, without ever being in memory. The invariant: same shape and seed,
//! same bytes, whatever the number of layers or the way they are written.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use coel_weights::{
    atomic_file::write_file,
    checkpoint::files_beside,
    config::{ConfigError, ModelConfig},
    layout::TensorSpec,
    matrix::DType,
    parts::{Entry, Part, TensorRange, frame, kinds},
    slicing::{Material, ReadAt, SlicingError, write_slices},
};

mod gauss;

use gauss::Gauss;

/// Shapes known by name, with the `config.json` their authors published.
pub const NAMES: [&str; 1] = ["qwen1.5-moe-a2.7b"];

/// Largest weight file written; larger checkpoints are sharded.
const SHARD_BYTES_MAX: u64 = 4_000_000_000;
/// Weights made at once.
const PIECE_BYTES: usize = 1 << 18;
/// Deviation where the configuration does not say what it was initialised with.
const DEVIATION: f64 = 0.02;

/// Why a checkpoint was not made.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    #[error("'{0}' is neither a shape known by name ({names}) nor a folder with a config.json", names = NAMES.join(", "))]
    Unknown(String),
    #[error("{file}: {source}")]
    Io { file: String, source: io::Error },
    #[error("{file}: {source}")]
    Config { file: String, source: ConfigError },
    #[error("{dir} holds a model already; name a folder that does not exist yet")]
    Occupied { dir: String },
    #[error(transparent)]
    Slicing(#[from] SlicingError),
}

/// Files other than weights: name and contents.
type Files = Vec<(String, Vec<u8>)>;

/// What is to be made.
#[derive(Clone, Debug)]
pub struct SynthSpec {
    like: String,
    seed: u64,
    json: Value,
    config: ModelConfig,
    /// Files other than weights and `config.json`.
    files: Files,
}

impl SynthSpec {
    /// The shape `like`: one of [`NAMES`], or that of a checkpoint folder, which then also gives the tokenizer. With
    /// `layers` that many layers instead of its own.
    pub fn new(like: &str, layers: Option<usize>, seed: u64) -> Result<Self, SynthError> {
        let (mut json, files) = match NAMES.contains(&like) {
            true => (qwen(), bundled_files()),
            false => read_shape(like)?,
        };
        if let Some(layers) = layers {
            set_layers(&mut json, layers);
        }
        let parsed = ModelConfig::parse(&json.to_string());
        let config = parsed.map_err(|source| SynthError::Config { file: format!("{like}/config.json"), source })?;
        Ok(Self { like: like.to_owned(), seed, json, config, files })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> u64 {
        self.plan().0.iter().map(Part::data_bytes).sum()
    }

    /// Writes a checkpoint folder. `progress` gets bytes of weights done, and of how many.
    pub fn write(&self, out: &Path, mut progress: impl FnMut(u64, u64)) -> Result<(), SynthError> {
        let named = |path: &Path, source| SynthError::Io { file: path.display().to_string(), source };
        fs::create_dir_all(out).map_err(|source| named(out, source))?;
        if out.join("config.json").exists() {
            return Err(SynthError::Occupied { dir: out.display().to_string() });
        }
        let (parts, source) = self.plan();
        let (mut done, total) = (0, parts.iter().map(Part::data_bytes).sum());
        let shards = shards(parts);
        let mut map = Map::new();
        for (index, shard) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => "model.safetensors".to_owned(),
                count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            map.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(name))));
            let written = write_file(out, &name, |file| {
                let entries: Vec<_> = shard.iter().map(Entry::of).collect();
                file.write_all(&frame(Some(r#"{"format":"pt"}"#), &entries))?;
                let mut piece = vec![0; PIECE_BYTES];
                for tensor in shard {
                    for offset in (0..tensor.bytes).step_by(PIECE_BYTES) {
                        let piece = &mut piece[..(tensor.bytes - offset).min(PIECE_BYTES as u64) as usize];
                        source.read_at(tensor.file, offset, piece)?;
                        file.write_all(piece)?;
                    }
                    done += tensor.bytes;
                    progress(done, total);
                }
                Ok(())
            });
            written.map_err(|source| named(&out.join(&name), source))?;
        }
        let mut files = self.text_files();
        if shards.len() > 1 {
            let index = json!({"metadata": {"total_size": total}, "weight_map": map});
            files.insert(0, ("model.safetensors.index.json".to_owned(), pretty(&index)));
        }
        // config.json comes last: without it the folder is no checkpoint yet.
        for (name, contents) in files {
            let written = write_file(out, &name, |file| file.write_all(&contents));
            written.map_err(|source| named(&out.join(&name), source))?;
        }
        Ok(())
    }

    /// Writes the slices of the same weights, as slicing the checkpoint would.
    pub fn write_sliced(&self, out: &Path, progress: impl FnMut(u64, u64)) -> Result<(), SynthError> {
        let (parts, source) = self.plan();
        let origin = json!({"synth": self.like, "seed": self.seed, "config": self.json});
        let material = Material { parts: &parts, source: &source, files: self.text_files(), origin };
        Ok(write_slices(&material, out, progress)?)
    }

    /// The parts, each tensor a "file" of its own, and what reads them.
    fn plan(&self) -> (Vec<Part>, Weights) {
        let dtype = self.config.dtype;
        let deviation = self.json.get("initializer_range").and_then(Value::as_f64).unwrap_or(DEVIATION);
        let mut fills = Vec::new();
        let mut range = |TensorSpec { name, shape }| {
            fills.push(if name.contains("norm") { Fill::Ones } else { Fill::Gauss(gauss::key(self.seed, &name)) });
            let bytes = (shape.iter().product::<usize>() * dtype.size()) as u64;
            TensorRange { name, dtype, shape, file: fills.len() - 1, offset: 0, bytes }
        };
        let part = |(kind, specs): (_, Vec<_>)| Part { kind, tensors: specs.into_iter().map(&mut range).collect() };
        let parts = kinds(&self.config).into_iter().map(part).collect();
        (parts, Weights { dtype, gauss: Gauss::new(dtype, deviation), fills })
    }

    /// Everything but weights, `config.json` last.
    fn text_files(&self) -> Files {
        let mut files = self.files.clone();
        let text = format!(
            "# Random weights\n\nThe shape of `{}` with {} layers and Gaussian weights of seed {}: for measuring speed \
             and memory. What it writes\nmeans nothing. Its tokenizer has fewer tokens than the vocabulary; the rest \
             stand for no text.\n",
            self.like, self.config.num_hidden_layers, self.seed
        );
        files.push(("README.md".to_owned(), text.into_bytes()));
        files.push(("config.json".to_owned(), pretty(&self.json)));
        files
    }
}

/// How a tensor is filled.
enum Fill {
    Ones,
    Gauss(u64),
}

/// Weights that are made when they are read.
struct Weights {
    dtype: DType,
    gauss: Gauss,
    fills: Vec<Fill>,
}

impl ReadAt for Weights {
    fn read_at(&self, file: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let size = self.dtype.size();
        if !offset.is_multiple_of(size as u64) || !into.len().is_multiple_of(size) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match self.fills.get(file).ok_or(io::ErrorKind::NotFound)? {
            Fill::Ones => {
                let one = gauss::pack(self.dtype, 1.0);
                into.chunks_exact_mut(size).for_each(|element| element.copy_from_slice(&one[..size]));
            }
            Fill::Gauss(key) => self.gauss.fill(*key, offset / size as u64, into),
        }
        Ok(())
    }
}

/// Consecutive tensors that fit a file; one that is larger than a file has its own.
fn shards(parts: Vec<Part>) -> Vec<Vec<TensorRange>> {
    let mut shards: Vec<Vec<TensorRange>> = Vec::new();
    let mut room = 0;
    for tensor in parts.into_iter().flat_map(|part| part.tensors) {
        if tensor.bytes > room || shards.is_empty() {
            shards.push(Vec::new());
            room = SHARD_BYTES_MAX;
        }
        room = room.saturating_sub(tensor.bytes);
        shards.last_mut().expect("pushed above").push(tensor);
    }
    shards
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("a JSON value");
    text.push(b'\n');
    text
}

fn read_shape(like: &str) -> Result<(Value, Files), SynthError> {
    let dir = Path::new(like);
    let path = dir.join("config.json");
    let named = |path: &Path, source| SynthError::Io { file: path.display().to_string(), source };
    let text = fs::read(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => SynthError::Unknown(like.to_owned()),
        _ => named(&path, source),
    })?;
    let json = serde_json::from_slice(&text).map_err(|error| SynthError::Config {
        file: path.display().to_string(),
        source: ConfigError::Malformed(error),
    })?;
    let others = files_beside(dir).into_iter().filter(|(name, _)| name != "config.json");
    let read = |(name, path): (String, PathBuf)| Ok((name, fs::read(&path).map_err(|source| named(&path, source))?));
    let files = others.map(read).collect::<Result<_, SynthError>>()?;
    Ok((json, files))
}

/// Another number of layers, also where the configuration lists them.
fn set_layers(json: &mut Value, layers: usize) {
    json["num_hidden_layers"] = json!(layers);
    if let Some(Value::Array(types)) = json.get_mut("layer_types") {
        let last = types.last().cloned().unwrap_or(Value::Null);
        types.resize(layers, last);
    }
    if let Some(Value::Array(dense)) = json.get_mut("mlp_only_layers") {
        dense.retain(|layer| layer.as_u64().is_some_and(|layer| layer < layers as u64));
    }
}

/// The bundled tokenizer, in words that older readers know too.
fn bundled_files() -> Files {
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "model_max_length": 8192, "chat_template": include_str!("../../fixture/chat_template.jinja"),
    });
    vec![
        ("tokenizer.json".to_owned(), include_bytes!("../../fixture/tokenizer.json").to_vec()),
        ("tokenizer_config.json".to_owned(), pretty(&config)),
    ]
}

/// Qwen1.5-MoE-A2.7B, but for the tokens that begin and end a text: those are the bundled tokenizer's.
fn qwen() -> Value {
    json!({
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 2,
        "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": false,
        "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 16, "output_router_logits": false, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.39.0", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151_936,
    })
}
