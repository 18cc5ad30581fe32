//! How a checkpoint is cut into parts, which other machines store as blobs.
//!
//! Owns [`Part`]: a piece of the trunk or an expert, and where each of its tensors lies in the checkpoint's files. A
//! part's [`header`](Part::header) followed by its tensors' bytes is an ordinary safetensors file. So one reader opens
//! shards and blobs alike, and weights are referenced in place, never copied. The invariant: parts cover every tensor
//! exactly once, the same checkpoint gives the same bytes on every machine, and a part can be read back from its exact
//! blob ([`Part::of_blob`]). Nothing is hashed and no file is read here.

use std::io;

use safetensors::{Dtype, tensor::Metadata};
use serde_json::Value;

use crate::{
    checkpoint::Checkpoint,
    config::ModelConfig,
    error::LoadError,
    layout::{self, ExpertId, TensorSpec},
    matrix::DType,
    tensors::{ElementType, HEADER_BYTES_MAX, TensorView},
};

/// Alignment of the data in a blob, bytes: mapped blobs stay aligned for vector loads.
const ALIGNMENT: usize = 64;

/// What a part holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PartKind {
    /// `embeddings`, `layer.N` or `head`.
    Trunk {
        name: String,
    },
    Expert(ExpertId),
}

impl std::fmt::Display for PartKind {
    /// `embeddings`, `layer.N`, `head` or `layer.N.expert.M`, as in file names.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PartKind::Trunk { name } => f.write_str(name),
            PartKind::Expert(id) => write!(f, "layer.{}.expert.{}", id.layer, id.index),
        }
    }
}

/// One tensor of a part and where its bytes lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorRange {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// Index into [`Checkpoint::weight_files`].
    pub file: usize,
    /// Offset in that file, bytes.
    pub offset: u64,
    pub bytes: u64,
}

/// Some tensors of a model, in a fixed order, which become one blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub kind: PartKind,
    pub tensors: Vec<TensorRange>,
}

impl Part {
    /// A safetensors header. The exact blob consists of this header and each tensor's bytes, in order.
    pub fn header(&self) -> Vec<u8> {
        frame(None, &self.tensors.iter().map(Entry::of).collect::<Vec<_>>())
    }

    /// The part of an exact blob of `bytes` bytes, which `read` gives from an offset on. The part's tensors lie in file 0, the
    /// blob. Only the header is read.
    ///
    /// # Errors
    /// [`LoadError`] if this is not the exact blob of a part, or cannot be read.
    pub fn of_blob(
        kind: PartKind,
        bytes: u64,
        read: impl Fn(u64, &mut [u8]) -> io::Result<()>,
    ) -> Result<Self, LoadError> {
        let file = kind.to_string();
        let malformed = |why: String| LoadError::Header { file: file.clone(), why };
        let read =
            |offset, into: &mut [u8]| read(offset, into).map_err(|source| LoadError::Io { file: file.clone(), source });
        let mut prefix = [0; 8];
        read(0, &mut prefix)?;
        let length = u64::from_le_bytes(prefix);
        if length > HEADER_BYTES_MAX as u64 || length > bytes.saturating_sub(8) {
            return Err(malformed(format!("it claims to be {length} bytes long")));
        }
        let mut header = prefix.to_vec();
        header.resize(8 + length as usize, 0);
        read(8, &mut header[8..])?;
        let metadata: Metadata = serde_json::from_slice(&header[8..]).map_err(|error| malformed(error.to_string()))?;
        let start = header.len() as u64;
        if start.checked_add(metadata.data_len() as u64) != Some(bytes) {
            return Err(malformed(format!("the length that it describes is not the blob's {bytes} bytes")));
        }
        let range = |name: String| {
            let info = metadata.info(&name)?;
            let dtype = match info.dtype {
                Dtype::BF16 => DType::BF16,
                Dtype::F16 => DType::F16,
                Dtype::F32 => DType::F32,
                _ => return None,
            };
            let (from, to) = info.data_offsets;
            let (offset, bytes) = (start + from as u64, (to - from) as u64);
            Some(TensorRange { name, dtype, shape: info.shape.clone(), file: 0, offset, bytes })
        };
        let tensors = metadata.offset_keys().into_iter().map(range).collect::<Option<Vec<_>>>();
        let part = tensors.map(|tensors| Self { kind, tensors });
        // An exact blob has the header that `header` writes, to the byte. Any other spelling is not an exact blob.
        part.filter(|part| part.header() == header)
            .ok_or_else(|| malformed("it is not the header of a part's exact weights".into()))
    }

    /// Bytes of the tensors, without the header.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// The expert's id, if this part is an expert.
    pub fn expert(&self) -> Option<ExpertId> {
        match self.kind {
            PartKind::Expert(id) => Some(id),
            PartKind::Trunk { .. } => None,
        }
    }
}

/// A tensor as a header describes it.
pub struct Entry<'a> {
    pub name: &'a str,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: u64,
}

impl<'a> Entry<'a> {
    /// The tensor in the checkpoint's own type and shape.
    pub fn of(tensor: &'a TensorRange) -> Self {
        let (name, dtype, shape) = (tensor.name.as_str(), tensor.dtype.name(), tensor.shape.clone());
        Self { name, dtype, shape, bytes: tensor.bytes }
    }
}

/// The header of a safetensors file with these tensors one after the other, padded to [`ALIGNMENT`]. `metadata` is a
/// JSON object.
// Written by hand: the bytes are hashed, so their order must not depend on a JSON library.
pub fn frame(metadata: Option<&str>, entries: &[Entry<'_>]) -> Vec<u8> {
    let mut fields: Vec<String> = metadata.map(|metadata| format!("\"__metadata__\":{metadata}")).into_iter().collect();
    let mut start = 0;
    for entry in entries {
        let shape = entry.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let (name, dtype, end) = (Value::from(entry.name), entry.dtype, start + entry.bytes);
        fields.push(format!("{name}:{{\"dtype\":\"{dtype}\",\"shape\":[{shape}],\"data_offsets\":[{start},{end}]}}"));
        start = end;
    }
    let mut json = format!("{{{}}}", fields.join(",")).into_bytes();
    json.resize((8 + json.len()).next_multiple_of(ALIGNMENT) - 8, b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}

/// The parts of a model and the tensors each has: embeddings, one per layer, the head, then every expert in ascending
/// order.
pub fn kinds(config: &ModelConfig) -> Vec<(PartKind, Vec<TensorSpec>)> {
    let trunk = |name: String, specs: Vec<TensorSpec>| (PartKind::Trunk { name }, specs);
    let mut kinds = vec![trunk("embeddings".into(), layout::embeddings(config))];
    for layer in 0..config.num_hidden_layers {
        kinds.push(trunk(format!("layer.{layer}"), layout::layer(config, layer)));
    }
    kinds.push(trunk("head".into(), layout::head(config)));
    kinds.extend(layout::experts(config).map(|id| (PartKind::Expert(id), layout::expert(config, id))));
    kinds
}

/// Cuts a checkpoint into the parts of [`kinds`].
pub fn parts(checkpoint: &Checkpoint) -> Vec<Part> {
    let range = |spec: TensorSpec| {
        let view = checkpoint.tensors().get(&spec.name).expect("an open checkpoint is complete");
        tensor_range(spec, view)
    };
    let kinds = kinds(checkpoint.config()).into_iter();
    kinds.map(|(kind, specs)| Part { kind, tensors: specs.into_iter().map(range).collect() }).collect()
}

fn tensor_range(spec: TensorSpec, view: &TensorView) -> TensorRange {
    let ElementType::Weight(dtype) = view.element else {
        unreachable!("an open checkpoint holds weights only");
    };
    TensorRange {
        name: spec.name,
        dtype,
        shape: spec.shape,
        file: view.source,
        offset: view.offset,
        bytes: view.bytes.len() as u64,
    }
}
