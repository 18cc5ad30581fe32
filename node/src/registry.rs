//! The models that this node knows, apart from their tensors: manifest, configuration, tokenizer, chat template.
//!
//! Owns [`ModelRegistry`]. Every member gets these files, small as they are: the leader plans with them, and every node can be a home.
//! Invariants: what the registry hands out was verified against the model id; a model's entry is complete or absent. It does not
//! know what a node loads or how much room it has.

use std::collections::BTreeMap;
use std::sync::Arc;

use coel_model::text::model::TextModel;
use coel_model::weights::config::ModelConfig;
use coel_store::manifest::MANIFEST_BYTES_MAX;
use coel_store::{BlobEntry, BlobId, Blobs, CHUNK_BYTES, Manifest, Model, ModelId, Precision};
use tokio::sync::watch;

use crate::budget::ModelSizes;
use crate::system::run_blocking;
use crate::weights::fetch::{FetchError, Fetcher};
use crate::weights::sources::BlobSource;

/// A model without its tensors.
pub struct ModelMeta {
    /// The hash of the manifest.
    pub id: ModelId,
    /// The blobs.
    pub manifest: Arc<Manifest>,
    /// Length of the encoded manifest.
    pub manifest_bytes: u64,
    /// What it takes on a node.
    pub sizes: Arc<ModelSizes>,
    /// `config.json`.
    pub config: Arc<ModelConfig>,
    /// Tokenizer and chat template.
    pub text: TextModel,
    /// Bytes of the longest token: a text of more than the context times this cannot fit.
    pub token_bytes_max: usize,
}

/// Why a model is not known here yet.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Its files have to come from peers, and have not. Retryable.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// Its files are as registered, and cannot be run. Fatal for this version of coel.
    #[error("the registered model cannot be run: {0}")]
    Unusable(String),
}

impl ModelMeta {
    /// Puts together what was read of a model.
    ///
    /// # Errors
    /// In words, where the files do not make a model that runs.
    pub fn new(
        id: ModelId,
        manifest: Manifest,
        manifest_bytes: u64,
        files: &BTreeMap<String, Vec<u8>>,
    ) -> Result<Self, String> {
        let text = files.get("config.json").ok_or("it has no config.json")?;
        let text = std::str::from_utf8(text).map_err(|_| "config.json is not UTF-8")?;
        let config = ModelConfig::parse(text).map_err(|error| error.to_string())?;
        let text = TextModel::from_files(&config, files).map_err(|error| error.to_string())?;
        let tokens = 0..text.tokenizer.vocab_size() as u32;
        let token_bytes_max = tokens.map(|token| text.tokenizer.token_bytes(token).len()).max().unwrap_or(1);
        let sizes = Arc::new(ModelSizes::of_manifest(&manifest, manifest_bytes, &config));
        let (manifest, config) = (Arc::new(manifest), Arc::new(config));
        Ok(Self { id, manifest, manifest_bytes, sizes, config, text, token_bytes_max })
    }

    /// The blobs that every node keeps, whatever experts it hosts: files, and the trunk at this precision. The manifest is not among
    /// them.
    pub fn fixed_blobs(&self, trunk: Precision) -> impl Iterator<Item = &BlobEntry> {
        let files = self.manifest.files.iter().map(|file| &file.blob);
        let trunk = self.manifest.trunk.iter().flat_map(move |part| {
            let precision = part.slices.nearest(trunk).0;
            part.slices.at(precision).into_iter().flatten().map(|(_, blob)| blob)
        });
        files.chain(trunk)
    }
}

/// The models that this node knows. Cloning is cheap; all clones are the same registry.
#[derive(Clone)]
pub struct ModelRegistry {
    fetcher: Fetcher,
    blobs: Arc<Blobs>,
    models: Arc<watch::Sender<BTreeMap<ModelId, Arc<ModelMeta>>>>,
}

impl ModelRegistry {
    /// An empty registry, which reads `blobs` and fetches what is not there.
    pub fn new(fetcher: Fetcher, blobs: Arc<Blobs>) -> Self {
        Self { fetcher, blobs, models: Arc::default() }
    }

    /// The model, if it is known already.
    pub fn get(&self, id: ModelId) -> Option<Arc<ModelMeta>> {
        self.models.borrow().get(&id).cloned()
    }

    /// Tells when a model becomes known.
    pub fn subscribe(&self) -> watch::Receiver<BTreeMap<ModelId, Arc<ModelMeta>>> {
        self.models.subscribe()
    }

    /// Adds a model.
    pub fn insert(&self, meta: ModelMeta) -> Arc<ModelMeta> {
        let meta = Arc::new(meta);
        self.models.send_modify(|models| {
            models.insert(meta.id, meta.clone());
        });
        meta
    }

    /// The model, from this node's blobs or else from `sources`.
    ///
    /// # Errors
    /// [`RegistryError`]; fetched files are kept.
    pub async fn obtain(
        &self,
        id: ModelId,
        registered: &Model,
        sources: &[BlobSource],
    ) -> Result<Arc<ModelMeta>, RegistryError> {
        if let Some(meta) = self.get(id) {
            return Ok(meta);
        }
        let blobs = self.blobs.clone();
        let bytes = match run_blocking(move || held_manifest(&blobs, id)).await {
            Some(bytes) => bytes,
            None => self.fetcher.fetch_manifest(BlobId(id.0), registered.manifest_bytes, sources).await?,
        };
        let manifest_bytes = bytes.len() as u64;
        let manifest = Manifest::decode_as(&bytes, id).map_err(|error| RegistryError::Unusable(error.to_string()))?;
        let mut files = BTreeMap::new();
        for file in &manifest.files {
            let what = format!("the file {}", file.name);
            let read = self.fetcher.obtain(&what, &file.blob, sources).await?;
            files.insert(file.name.clone(), read);
        }
        let meta = ModelMeta::new(id, manifest, manifest_bytes, &files).map_err(RegistryError::Unusable)?;
        Ok(self.insert(meta))
    }
}

/// The manifest from this node's disk, if it is there and undamaged.
fn held_manifest(blobs: &Blobs, id: ModelId) -> Option<Vec<u8>> {
    let blob = BlobId(id.0);
    let bytes = blobs.bytes(&blob).ok().filter(|&bytes| bytes <= MANIFEST_BYTES_MAX as u64)?;
    let mut encoded = Vec::with_capacity(bytes as usize);
    for chunk in 0..bytes.div_ceil(CHUNK_BYTES as u64) {
        encoded.extend(blobs.read_chunk(&blob, chunk as u32).ok()?);
    }
    (BlobId::of(&encoded) == blob).then_some(encoded)
}
