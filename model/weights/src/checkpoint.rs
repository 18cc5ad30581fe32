//! A Hugging Face checkpoint folder, opened in place.
//!
//! Owns [`Checkpoint`]: the configuration and the memory-mapped tensors of one `model.safetensors`, or of the shards
//! that an index names. A tensor that the experts of a layer share is cut into one per expert. The invariant: an open
//! checkpoint has exactly the tensors its configuration implies, each of the right shape and of a type the kernels read.
//! The tokenizer and the chat template are not interpreted here; a checkpoint only says which files there are.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::Value;

use crate::{
    config::ModelConfig,
    error::LoadError,
    layout::{self, ExpertId},
    memory::WeightBytes,
    tensors::Tensors,
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The files beside the weights that belong to a model, if present, in this order.
const FILES: [&str; 5] =
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

/// An open checkpoint folder.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Arc<ModelConfig>,
    weight_files: Vec<PathBuf>,
    tensors: Tensors,
}

impl Checkpoint {
    /// Opens `dir`, maps its weight files and checks every tensor against `config.json`.
    pub fn open(dir: &Path) -> Result<Self, LoadError> {
        let config = Arc::new(read_config(dir)?);
        let names = weight_files(dir)?;
        let mut parts = Vec::new();
        for name in &names {
            let path = dir.join(name);
            let file = path.display().to_string();
            let bytes = WeightBytes::map(&path).map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => LoadError::NoShard { file: file.clone() },
                _ => LoadError::Io { file: file.clone(), source },
            })?;
            parts.push(Tensors::parse(bytes, &file)?);
        }
        let mut tensors = Tensors::merge(parts)?;
        for (whole, pieces) in config.sparse_layers().flat_map(|layer| layout::fused(&config, layer)) {
            tensors.cut(&whole, pieces)?;
        }
        let weight_files = names.iter().map(|name| dir.join(name)).collect();
        let checkpoint = Self { dir: dir.to_owned(), config, weight_files, tensors };
        checkpoint.check_complete()?;
        Ok(checkpoint)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn config(&self) -> &Arc<ModelConfig> {
        &self.config
    }

    /// All tensors, in place.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// The safetensors files; a tensor's `source` is an index into them.
    pub fn weight_files(&self) -> &[PathBuf] {
        &self.weight_files
    }

    /// The trunk's tensors, in place.
    pub fn trunk(&self) -> Tensors {
        let specs = layout::trunk(&self.config);
        self.tensors.select(specs.iter().map(|spec| spec.name.as_str()))
    }

    /// One expert's tensors, in place; empty for an expert the model does not have.
    pub fn expert(&self, id: ExpertId) -> Tensors {
        let specs = layout::expert(&self.config, id);
        self.tensors.select(specs.iter().map(|spec| spec.name.as_str()))
    }

    /// The files other than weights, as (name, path): `config.json` and those of the tokenizer's files that exist.
    pub fn files(&self) -> Vec<(String, PathBuf)> {
        files_beside(&self.dir)
    }

    /// Checks that the tensors are those the configuration implies, each in its shape.
    fn check_complete(&self) -> Result<(), LoadError> {
        let mut expected = BTreeSet::new();
        let experts = layout::experts(&self.config).flat_map(|id| layout::expert(&self.config, id));
        for spec in layout::trunk(&self.config).into_iter().chain(experts) {
            let view = self.tensors.get(&spec.name).ok_or_else(|| self.tensors.missing(&spec.name))?;
            self.tensors.check(&spec.name, view, &spec.shape)?;
            expected.insert(spec.name);
        }
        if let Some((name, view)) = self.tensors.iter().find(|(name, _)| !expected.contains(*name)) {
            let file = self.tensors.sources()[view.source].clone();
            return Err(LoadError::Unused { file, tensor: name.to_owned() });
        }
        Ok(())
    }
}

/// The files of `dir` that belong to a model beside its weights, as (name, path).
pub fn files_beside(dir: &Path) -> Vec<(String, PathBuf)> {
    let present = FILES.iter().map(|name| (name.to_string(), dir.join(name)));
    present.filter(|(_, path)| path.is_file()).collect()
}

/// Reads and validates `config.json` of a folder.
pub(crate) fn read_config(dir: &Path) -> Result<ModelConfig, LoadError> {
    let path = dir.join("config.json");
    let file = path.display().to_string();
    let text = fs::read_to_string(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => LoadError::NotACheckpoint { dir: dir.display().to_string(), file: "config.json" },
        _ => LoadError::Io { file: file.clone(), source },
    })?;
    ModelConfig::parse(&text).map_err(|source| LoadError::Config { file, source })
}

/// The names of the weight files: the single one, or the shards of the index in name order.
fn weight_files(dir: &Path) -> Result<Vec<String>, LoadError> {
    if dir.join(SINGLE).is_file() {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let path = dir.join(INDEX);
    let file = path.display().to_string();
    if !path.is_file() {
        return Err(LoadError::NotACheckpoint { dir: dir.display().to_string(), file: SINGLE });
    }
    let text = fs::read_to_string(&path).map_err(|source| LoadError::Io { file: file.clone(), source })?;
    let malformed = |why: String| LoadError::Index { file: file.clone(), why };
    let index: Value = serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| malformed("it has no weight_map".into()))?;
    let mut names = BTreeSet::new();
    for name in map.values() {
        let name = name
            .as_str()
            .ok_or_else(|| malformed("weight_map maps a tensor to something that is not a file name".into()))?;
        if Path::new(name).components().count() != 1 || name == ".." {
            return Err(malformed(format!("{name:?} leads out of the folder")));
        }
        names.insert(name.to_owned());
    }
    Ok(names.into_iter().collect())
}
