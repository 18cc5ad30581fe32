//! Why weights could not be loaded.

use crate::{
    config::ConfigError,
    slices::{FORMAT, SliceError},
};

/// Why bytes or a checkpoint could not be loaded. Every message names the file (or blob) and the tensor.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{file}: {source}")]
    Io { file: String, source: std::io::Error },
    #[error("{file}: {source}")]
    Config { file: String, source: ConfigError },
    #[error("{dir}: no {file} here; a checkpoint folder needs config.json and model.safetensors (or its shards)")]
    NotACheckpoint { dir: String, file: &'static str },
    #[error("{file}: the safetensors header is malformed: {why}; fetch the file again")]
    Header { file: String, why: String },
    #[error("{file}: truncated or padded: its header describes {expected} bytes, the file has {found}; fetch it again")]
    Length { file: String, expected: u64, found: u64 },
    #[error(
        "{file}: its content is not what was written when the model was sliced; slice the checkpoint again into this folder \
         (coel model slice): only damaged files are written again"
    )]
    Corrupt { file: String },
    #[error(
        "{file}: {why}; slice the checkpoint again into this folder (coel model slice): only damaged files are written again"
    )]
    Damaged { file: String, why: String },
    #[error("{file}: tensor {tensor} is missing")]
    Missing { file: String, tensor: String },
    #[error("{file}: tensor {tensor} is not part of this model; does config.json belong to this checkpoint?")]
    Unused { file: String, tensor: String },
    #[error("{file}: tensor {tensor} appears twice (also in {other})")]
    Duplicate { file: String, tensor: String, other: String },
    #[error("{file}: tensor {tensor} has shape {found:?}, config.json implies {expected:?}")]
    Shape { file: String, tensor: String, expected: Vec<usize>, found: Vec<usize> },
    #[error("{file}: tensor {tensor} has type {found}; coel reads {accepted}")]
    Type { file: String, tensor: String, found: String, accepted: &'static str },
    #[error("{file} is missing, but the shard index (model.safetensors.index.json) names it; fetch it again")]
    NoShard { file: String },
    #[error("{file}: the shard index is malformed: {why}")]
    Index { file: String, why: String },
    #[error("{file}: its slices have format {found:?}; this coel reads {FORMAT}: slice the checkpoint again")]
    Format { file: String, found: String },
    #[error("{file}: the refine slice does not go with {base}: {why}; fetch both from the same model")]
    Refine { file: String, base: String, why: String },
    #[error("{file}: {why}; remove that folder and slice the checkpoint again (coel model slice)")]
    SlicesFile { file: String, why: String },
    #[error(
        "{dir} holds slices, not the exact weights; compute with q4 or q8 (--precision q8), or name the checkpoint that \
         was sliced"
    )]
    NoExact { dir: String },
    #[error("{file}: {source}")]
    Slice { file: String, source: SliceError },
}
