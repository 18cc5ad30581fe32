//! What a model consists of, by content: the document whose hash is the model's id.
//!
//! A manifest lists every blob (the files that describe the model, and the slices of every part of the trunk and of every
//! expert) with its length and one BLAKE3 per 1 MiB chunk, so that a chunk from any peer, or from this disk, can be checked
//! by itself. The id is enough to check the manifest, and the manifest to check every byte.
//!
//! Invariant: a decoded manifest is sound. Its sizes add up, every blob has the hashes that its length calls for, names are
//! names and not paths, no expert is listed twice, a refine slice comes with its base, and encoding it again gives the same
//! bytes.
//!
//! The module does not know what the bytes of a blob mean. A model's name and what was measured on it are not part of a
//! manifest: two machines that import the same checkpoint must come to the same id.

use crate::cbor::{self, CborError};
use crate::ids::{BlobId, ExpertId, ModelId};
use crate::precision::Precision;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The format written and read here.
pub const FORMAT: u32 = 3;
/// Bytes of a chunk; the last one of a blob may be shorter.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Longest encoded manifest. A model of 700 GB has 22 MB of chunk hashes.
pub const MANIFEST_BYTES_MAX: usize = 64 << 20;
/// Longest blob. An expert is megabytes; a trunk part or a tokenizer may be a few gigabytes.
pub const BLOB_BYTES_MAX: u64 = 1 << 38;
/// Longest name, in bytes.
const NAME_BYTES_MAX: usize = 256;

/// Everything a model consists of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// The architecture as its configuration names it.
    pub architecture: String,
    /// `config.json`, `tokenizer.json` and what else describes the model.
    pub files: Vec<FileEntry>,
    /// The weights outside the experts, in parts.
    pub trunk: Vec<PartEntry>,
    /// The routed experts.
    pub experts: BTreeMap<ExpertId, Slices>,
}

/// A file of the model, kept whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name, without any folder.
    pub name: String,
    /// Its content.
    pub blob: BlobEntry,
}

/// A part of the trunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartEntry {
    /// What the part is called.
    pub name: String,
    /// Its content.
    pub slices: Slices,
}

/// One of the blobs that an expert or a part of the trunk has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slice {
    /// As in the checkpoint.
    Exact,
    /// The first 4 bits.
    Base,
    /// 4 more.
    Refine,
}

impl Slice {
    /// Whether a node that holds this precision has this slice.
    pub fn is_part_of(self, precision: Precision) -> bool {
        match self {
            Self::Exact => precision == Precision::Exact,
            Self::Base => precision != Precision::Exact,
            Self::Refine => precision == Precision::Q8,
        }
    }
}

/// The slices of one expert, or of one part of the trunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slices {
    /// As in the checkpoint.
    pub exact: BlobEntry,
    /// The first 4 bits of each weight. Absent where the weights have no slices.
    pub base: Option<BlobEntry>,
    /// 4 more bits of each; comes with the base.
    pub refine: Option<BlobEntry>,
}

impl Slices {
    /// Slices of weights that are only there exactly.
    pub fn exact_only(exact: BlobEntry) -> Self {
        Self { exact, base: None, refine: None }
    }

    /// The blobs that make up this precision, the base before its refine slice; `None` where there is no such precision.
    pub fn at(&self, precision: Precision) -> Option<Vec<(Slice, &BlobEntry)>> {
        match precision {
            Precision::Q4 => Some(vec![(Slice::Base, self.base.as_ref()?)]),
            Precision::Q8 => Some(vec![(Slice::Base, self.base.as_ref()?), (Slice::Refine, self.refine.as_ref()?)]),
            Precision::Exact => Some(vec![(Slice::Exact, &self.exact)]),
        }
    }

    /// Bytes at this precision.
    pub fn bytes(&self, precision: Precision) -> Option<u64> {
        Some(self.at(precision)?.into_iter().map(|(_, blob)| blob.bytes).sum())
    }

    /// This precision, or exact where there is no other, and its bytes.
    pub fn nearest(&self, precision: Precision) -> (Precision, u64) {
        match self.bytes(precision) {
            Some(bytes) => (precision, bytes),
            None => (Precision::Exact, self.exact.bytes),
        }
    }

    /// All blobs.
    pub fn blobs(&self) -> impl Iterator<Item = &BlobEntry> {
        std::iter::once(&self.exact).chain(&self.base).chain(&self.refine)
    }
}

/// One blob: its id, its length, and the hashes that check it piece by piece.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobEntry {
    /// The hash of the whole content.
    pub id: BlobId,
    /// Its length in bytes.
    pub bytes: u64,
    /// The hash of each chunk, in order. On the wire one byte string of 32 bytes each.
    #[serde(with = "hashes")]
    pub chunks: Vec<[u8; 32]>,
}

mod hashes {
    use serde::de::Error;
    use serde::{Deserializer, Serializer};

    pub fn serialize<S: Serializer>(hashes: &[[u8; 32]], serializer: S) -> Result<S::Ok, S::Error> {
        serde_bytes::serialize(hashes.as_flattened(), serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<[u8; 32]>, D::Error> {
        let bytes: Vec<u8> = serde_bytes::deserialize(deserializer)?;
        let (hashes, rest) = bytes.as_chunks::<32>();
        if !rest.is_empty() {
            return Err(D::Error::custom("chunk hashes have 32 bytes each"));
        }
        Ok(hashes.to_vec())
    }
}

/// Why bytes are not a manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Too long, or not CBOR of this shape.
    #[error("not a manifest: {0}")]
    Cbor(#[from] CborError),
    /// A newer or foreign format.
    #[error("manifest format {0} is not known here, only {FORMAT}; run a release that knows it")]
    Format(u32),
    /// The bytes are not the model that was asked for.
    #[error("the manifest is of model {got}, not {wanted}; fetch it again")]
    OtherModel {
        /// Whose it should be.
        wanted: ModelId,
        /// Whose it is.
        got: ModelId,
    },
    /// A part contradicts another one.
    #[error("the manifest is unsound: {0}")]
    Unsound(String),
}

/// How many chunks a blob of `bytes` bytes has.
pub fn chunk_count(bytes: u64) -> u64 {
    bytes.div_ceil(CHUNK_BYTES as u64)
}

impl BlobEntry {
    /// The entry of this content.
    pub fn of(content: &[u8]) -> Self {
        let mut hasher = BlobHasher::default();
        hasher.update(content);
        hasher.finish()
    }

    /// The length of chunk `index` in bytes, if there is such a chunk.
    pub fn chunk_bytes(&self, index: u32) -> Option<usize> {
        let start = u64::from(index) * CHUNK_BYTES as u64;
        (start < self.bytes).then(|| (self.bytes - start).min(CHUNK_BYTES as u64) as usize)
    }

    /// Whether `bytes` is chunk `index` of this blob.
    pub fn chunk_matches(&self, index: u32, bytes: &[u8]) -> bool {
        self.chunk_bytes(index) == Some(bytes.len())
            && self.chunks.get(index as usize) == Some(blake3::hash(bytes).as_bytes())
    }

    /// Refuses an entry whose parts contradict each other.
    pub fn check(&self) -> Result<(), ManifestError> {
        let unsound = |why: String| ManifestError::Unsound(format!("blob {}: {why}", self.id));
        if self.bytes > BLOB_BYTES_MAX {
            return Err(unsound(format!("{} bytes are more than {BLOB_BYTES_MAX}", self.bytes)));
        }
        let wanted = chunk_count(self.bytes);
        if self.chunks.len() as u64 != wanted {
            let (bytes, hashes) = (self.bytes, self.chunks.len());
            return Err(unsound(format!("{bytes} bytes have {wanted} chunks, but {hashes} hashes are listed")));
        }
        if self.chunks.len() == 1 && self.chunks[0] != self.id.0 {
            return Err(unsound("its only chunk has another hash".into()));
        }
        Ok(())
    }
}

/// Computes a blob's entry while its content streams by.
#[derive(Default)]
pub struct BlobHasher {
    whole: blake3::Hasher,
    chunk: blake3::Hasher,
    bytes: u64,
    chunks: Vec<[u8; 32]>,
}

impl BlobHasher {
    /// A hasher that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes of the content.
    pub fn update(&mut self, mut content: &[u8]) {
        self.whole.update(content);
        while !content.is_empty() {
            let used = (self.bytes % CHUNK_BYTES as u64) as usize;
            let (now, later) = content.split_at(content.len().min(CHUNK_BYTES - used));
            self.chunk.update(now);
            self.bytes += now.len() as u64;
            if self.bytes.is_multiple_of(CHUNK_BYTES as u64) {
                self.close_chunk();
            }
            content = later;
        }
    }

    fn close_chunk(&mut self) {
        self.chunks.push(*self.chunk.finalize().as_bytes());
        self.chunk.reset();
    }

    /// The entry of everything seen.
    pub fn finish(mut self) -> BlobEntry {
        if !self.bytes.is_multiple_of(CHUNK_BYTES as u64) {
            self.close_chunk();
        }
        BlobEntry { id: BlobId(*self.whole.finalize().as_bytes()), bytes: self.bytes, chunks: self.chunks }
    }
}

fn check_name(what: &str, name: &str) -> Result<(), ManifestError> {
    let is_path = name.contains(['/', '\\', '\0']) || name == "." || name == "..";
    if name.is_empty() || name.len() > NAME_BYTES_MAX || is_path {
        let shown: String = name.chars().take(80).collect();
        return Err(ManifestError::Unsound(format!("\"{shown}\" is not a name for a {what}")));
    }
    Ok(())
}

/// The format alone, read before the rest so that a newer format is refused by its number.
#[derive(Deserialize)]
struct Head {
    format: u32,
}

impl Manifest {
    /// The canonical bytes, and the model id that they hash to.
    pub fn encode(&self) -> Result<(Vec<u8>, ModelId), ManifestError> {
        self.check()?;
        let bytes = cbor::to_vec(self)?;
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(CborError::TooLong { bytes: bytes.len(), limit: MANIFEST_BYTES_MAX }.into());
        }
        let id = ModelId(*blake3::hash(&bytes).as_bytes());
        Ok((bytes, id))
    }

    /// The manifest in `bytes`, if it is a sound one.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let head: Head = cbor::from_slice(bytes, MANIFEST_BYTES_MAX)?;
        if head.format != FORMAT {
            return Err(ManifestError::Format(head.format));
        }
        let manifest: Self = cbor::from_slice(bytes, MANIFEST_BYTES_MAX)?;
        manifest.check()?;
        // Two spellings of one manifest would be two ids of one model.
        if cbor::to_vec(&manifest)? != bytes {
            return Err(ManifestError::Unsound("it is not in the canonical encoding".into()));
        }
        Ok(manifest)
    }

    /// The manifest of model `id` in `bytes`.
    pub fn decode_as(bytes: &[u8], id: ModelId) -> Result<Self, ManifestError> {
        let got = ModelId(*blake3::hash(bytes).as_bytes());
        if got != id {
            return Err(ManifestError::OtherModel { wanted: id, got });
        }
        Self::decode(bytes)
    }

    /// Refuses a manifest that contradicts itself.
    pub fn check(&self) -> Result<(), ManifestError> {
        if self.format != FORMAT {
            return Err(ManifestError::Format(self.format));
        }
        check_name("architecture", &self.architecture)?;
        let files = self.files.iter().map(|file| ("file", &file.name));
        let parts = self.trunk.iter().map(|part| ("trunk part", &part.name));
        let mut seen = std::collections::BTreeSet::new();
        for (what, name) in files.chain(parts) {
            check_name(what, name)?;
            if !seen.insert((what, name)) {
                return Err(ManifestError::Unsound(format!("{what} \"{name}\" is listed twice")));
            }
        }
        if let Some(torn) = self.slices().find(|slices| slices.base.is_some() != slices.refine.is_some()) {
            let exact = torn.exact.id;
            return Err(ManifestError::Unsound(format!(
                "blob {exact} has a base slice or a refine slice, but not both"
            )));
        }
        let mut lengths: BTreeMap<BlobId, u64> = BTreeMap::new();
        for blob in self.blobs() {
            blob.check()?;
            if *lengths.entry(blob.id).or_insert(blob.bytes) != blob.bytes {
                return Err(ManifestError::Unsound(format!("blob {} has two lengths", blob.id)));
            }
        }
        Ok(())
    }

    /// Every blob, in the order of the manifest. Equal contents are listed as often as they are used.
    pub fn blobs(&self) -> impl Iterator<Item = &BlobEntry> {
        self.files.iter().map(|file| &file.blob).chain(self.slices().flat_map(Slices::blobs))
    }

    /// The slices of every part of the trunk, then of every expert.
    fn slices(&self) -> impl Iterator<Item = &Slices> {
        self.trunk.iter().map(|part| &part.slices).chain(self.experts.values())
    }

    /// A file by name.
    pub fn file(&self, name: &str) -> Option<&BlobEntry> {
        self.files.iter().find(|file| file.name == name).map(|file| &file.blob)
    }

    /// The blob of that id, wherever it is used.
    pub fn blob(&self, id: &BlobId) -> Option<&BlobEntry> {
        self.blobs().find(|blob| blob.id == *id)
    }

    /// Bytes of the trunk at this precision.
    pub fn trunk_bytes(&self, precision: Precision) -> u64 {
        self.trunk.iter().map(|part| part.slices.nearest(precision).1).sum()
    }

    /// Bytes of all experts, each once, at this precision.
    pub fn experts_bytes(&self, precision: Precision) -> u64 {
        self.experts.values().map(|slices| slices.nearest(precision).1).sum()
    }

    /// Bytes of everything, files included.
    pub fn total_bytes(&self) -> u64 {
        self.blobs().map(|blob| blob.bytes).sum()
    }
}

#[cfg(test)]
mod tests;
