//! What is known of registered models apart from their tensors: manifest, configuration, tokenizer, chat template.
//!
//! Every member gets these, small as they are: the leader plans by them, every node can be a home. Invariant: what is
//! handed out was verified against the model id, and a model's entry is complete or absent.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use coel_model::config::ModelConfig;
use coel_model::decoder::CHUNK_ROWS;
use coel_model::footprint::Footprint;
use coel_model::pages::PAGE_TOKENS;
use coel_model::text::TextModel;
use coel_model::tiers::buffer::PAGE;
use coel_store::manifest::MANIFEST_BYTES_MAX;
use coel_store::{BlobEntry, BlobId, Blobs, Bounds, CHUNK_BYTES, ExpertId, Manifest, Model, ModelId, Precision};

use crate::config::Config;
use crate::experts::wire;
use crate::generation::RUNNING_MAX;
use crate::hosting::FETCHES;
use crate::mesh::facts::Facts;
use crate::weights::fetch::{FetchError, Fetcher, Source};

/// Name of the trunk part that is the embedding table (`coel_model::parts`).
const EMBEDDINGS: &str = "embeddings";

/// A model without its tensors.
pub struct Known {
    /// The hash of the manifest.
    pub id: ModelId,
    /// The blobs.
    pub manifest: Manifest,
    /// Length of the encoded manifest.
    pub manifest_bytes: u64,
    /// `config.json`.
    pub config: Arc<ModelConfig>,
    /// Tokenizer and chat template.
    pub text: TextModel,
    /// Bytes of the longest token: a text of more than the context times this cannot fit.
    pub token_bytes_max: usize,
    footprint: Footprint,
}

/// Why a model is not known here yet.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// It has to come from peers, and has not.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// It came as registered, and cannot be run.
    #[error("the registered model cannot be run: {0}")]
    Unusable(String),
}

impl Known {
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
        let footprint = Footprint::of(&config, config.dtype);
        let tokens = 0..text.tokenizer.vocab_size() as u32;
        let token_bytes_max = tokens.map(|token| text.tokenizer.token_bytes(token).len()).max().unwrap_or(1);
        Ok(Self { id, manifest, manifest_bytes, config: Arc::new(config), text, token_bytes_max, footprint })
    }

    /// Bytes of an expert at this precision; 0 for one that there is not.
    pub fn expert_bytes(&self, expert: ExpertId, precision: Precision) -> u64 {
        self.manifest.experts.get(&expert).and_then(|slices| slices.bytes(precision)).unwrap_or(0)
    }

    /// The KV pool of a node that was given `wanted` tokens for it: whole pages.
    pub fn kv_tokens(&self, wanted: usize) -> usize {
        wanted.min(MAX_CONTEXTS * self.config.max_position_embeddings).next_multiple_of(PAGE_TOKENS)
    }

    /// Most rows that go through the decoder at once.
    pub fn rows_max(&self) -> usize {
        wire::rows_max(self.config.hidden_size, self.config.num_experts_per_tok)
    }

    /// Bytes a node needs besides experts: trunk, KV cache, buffers.
    pub fn fixed_bytes(&self, kv_tokens: usize, trunk: Precision) -> u64 {
        let kv = self.footprint.kv_bytes_per_token * self.kv_tokens(kv_tokens) as u64;
        self.manifest.trunk_bytes(trunk) + kv + self.footprint.buffer_bytes(self.rows_max().max(CHUNK_ROWS))
    }

    /// At which precision a node holds the trunk: the most exact one accepted that fits where it must be and leaves room in all of
    /// its memory, and on a disk that is to get it, for its share of the experts at the fewest bits, or else the least.
    pub fn trunk_precision(
        &self,
        accepted: Bounds,
        (fixed_bytes, memory_bytes): (u64, u64),
        disk_bytes: Option<u64>,
        kv_tokens: usize,
        nodes: usize,
    ) -> Precision {
        let share = self.manifest.experts_bytes(Precision::Q4) / nodes.max(1) as u64;
        let mut choices = Precision::ALL.into_iter().rev().filter(|precision| accepted.has(*precision));
        let on_disk = |precision| self.disk_fixed_bytes(precision) + self.largest_expert_bytes() + share;
        let chosen = choices.find(|&precision| {
            let fixed = self.fixed_bytes(kv_tokens, precision);
            fixed <= fixed_bytes
                && fixed + share <= memory_bytes
                && disk_bytes.is_none_or(|disk| on_disk(precision) <= disk)
        });
        let chosen = chosen.unwrap_or(accepted.lowest());
        let sliced = self.manifest.trunk.iter().any(|part| part.slices.at(chosen).is_some());
        if sliced { chosen } else { Precision::Exact }
    }

    /// Bytes of experts that a node with these facts may hold; `None` until it has said how it holds the trunk.
    pub fn room_for_experts(&self, facts: &Facts) -> Option<u64> {
        Some(facts.memory_bytes.saturating_sub(self.fixed_bytes(facts.kv_tokens as usize, facts.trunk?)))
    }

    /// Bytes of expert blobs that a node with these facts may keep on its disk, where that has a bound; `None` for one without
    /// bound, which never pages. One that has every blob already needs no more room; another keeps some for an exchange, during
    /// which an expert is there twice.
    pub fn disk_for_experts(&self, facts: &Facts) -> Option<u64> {
        let (budget, all) = (facts.disk_bytes?, self.manifest.experts_bytes(Precision::Exact));
        if facts.complete_models.contains(&self.id) {
            return Some(all);
        }
        let fixed = facts.trunk.map_or(0, |trunk| self.disk_fixed_bytes(trunk));
        Some(budget.saturating_sub(fixed + self.largest_expert_bytes()))
    }

    /// What host memory beneath a GPU holds besides experts that lie there: the embedding table, experts on their way, and two of an exchange.
    pub fn host_bytes(&self, trunk: Precision) -> u64 {
        let table = self.manifest.trunk.iter().find(|part| part.name == EMBEDDINGS);
        let table = table.map_or(0, |part| part.slices.nearest(trunk).1);
        table + (FETCHES as u64 + 2) * self.largest_expert_bytes()
    }

    /// What a node's ledger may reach.
    pub fn memory_bytes(&self, config: &Config, trunk: Precision) -> u64 {
        let beneath = config.beneath_bytes.map_or(0, |beneath| beneath.min(self.host_bytes(trunk)));
        config.memory_bytes - beneath
    }

    /// Bytes of the largest expert as in the checkpoint.
    fn largest_expert_bytes(&self) -> u64 {
        self.manifest.experts.values().map(|slices| slices.exact.bytes).max().unwrap_or(0)
    }

    /// Bytes of the blobs every node keeps, the manifest among them.
    pub fn disk_fixed_bytes(&self, trunk: Precision) -> u64 {
        self.manifest_bytes + self.fixed_blobs(trunk).map(|blob| blob.bytes).sum::<u64>()
    }

    /// Bytes of memory without which a node does not have experts in memory by turns: for twice those of one row, so that some can
    /// come while others are computed. They are read in whole pages.
    pub fn least_to_page(&self, precision: Precision) -> u64 {
        let bytes = self.manifest.experts.values().map(|slices| slices.nearest(precision).1);
        let largest = bytes.max().unwrap_or(0).next_multiple_of(PAGE as u64) + 2 * PAGE as u64;
        2 * self.config.num_experts_per_tok as u64 * largest
    }

    /// The blobs every node gets, whatever experts it hosts: files, and the trunk at this precision; the manifest aside.
    pub fn fixed_blobs(&self, trunk: Precision) -> impl Iterator<Item = &BlobEntry> {
        let files = self.manifest.files.iter().map(|file| &file.blob);
        let trunk = self.manifest.trunk.iter().flat_map(move |part| {
            let precision = part.slices.nearest(trunk).0;
            part.slices.at(precision).into_iter().flatten().map(|(_, blob)| blob)
        });
        files.chain(trunk)
    }
}

/// A pool of more full contexts than this is never used by the requests a node runs at once.
const MAX_CONTEXTS: usize = RUNNING_MAX;

/// The models this node knows.
#[derive(Default)]
pub struct Library {
    known: Mutex<BTreeMap<ModelId, Arc<Known>>>,
}

impl Library {
    /// The model, if it is known already.
    pub fn cached(&self, id: ModelId) -> Option<Arc<Known>> {
        self.known.lock().expect("no panic while held").get(&id).cloned()
    }

    /// Adds a model that was just imported.
    pub fn insert(&self, known: Known) -> Arc<Known> {
        let known = Arc::new(known);
        self.known.lock().expect("no panic while held").insert(known.id, known.clone());
        known
    }

    /// The model, from this node's blobs or else from `sources`.
    ///
    /// # Errors
    /// [`LibraryError`]; what was fetched is kept.
    pub async fn get(
        &self,
        id: ModelId,
        registered: &Model,
        fetcher: &Fetcher,
        blobs: &Arc<Blobs>,
        sources: &[Source],
    ) -> Result<Arc<Known>, LibraryError> {
        if let Some(known) = self.cached(id) {
            return Ok(known);
        }
        let held = blobs.clone();
        let bytes = match run_blocking(move || held_manifest(&held, id)).await {
            Some(bytes) => bytes,
            None => fetcher.fetch_manifest(BlobId(id.0), registered.manifest_bytes, sources).await?,
        };
        let manifest_bytes = bytes.len() as u64;
        let manifest = Manifest::decode_as(&bytes, id).map_err(|error| LibraryError::Unusable(error.to_string()))?;
        let mut files = BTreeMap::new();
        for file in &manifest.files {
            let what = format!("the file {}", file.name);
            let read = fetcher.obtain(&what, &file.blob, sources).await?;
            files.insert(file.name.clone(), read);
        }
        let known = Known::new(id, manifest, manifest_bytes, &files).map_err(LibraryError::Unusable)?;
        Ok(self.insert(known))
    }
}

/// The manifest as it lies here, if it does and is undamaged.
fn held_manifest(blobs: &Blobs, id: ModelId) -> Option<Vec<u8>> {
    let blob = BlobId(id.0);
    let bytes = blobs.bytes(&blob).ok().filter(|&bytes| bytes <= MANIFEST_BYTES_MAX as u64)?;
    let mut encoded = Vec::with_capacity(bytes as usize);
    for chunk in 0..bytes.div_ceil(CHUNK_BYTES as u64) {
        encoded.extend(blobs.read_chunk(&blob, chunk as u32).ok()?);
    }
    (BlobId::of(&encoded) == blob).then_some(encoded)
}

/// File work off the async threads.
pub async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use coel_store::manifest::FORMAT;
    use coel_store::{PartEntry, Slices};

    use super::*;

    /// A model of four experts beside a trunk of 1000 bytes, with the texts of the bundled one.
    fn known() -> Known {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/fixture");
        let names = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
        let files = names.map(|name| (name.to_owned(), std::fs::read(dir.join(name)).unwrap()));
        let blob = |bytes| BlobEntry { bytes, ..BlobEntry::default() };
        let slices =
            |exact, base, refine| Slices { exact: blob(exact), base: Some(blob(base)), refine: Some(blob(refine)) };
        let manifest = Manifest {
            format: FORMAT,
            architecture: "Test".into(),
            files: Vec::new(),
            trunk: vec![PartEntry { name: "head".into(), slices: slices(1000, 300, 200) }],
            experts: (0..4).map(|index| (ExpertId::new(0, index), slices(160, 50, 40))).collect(),
        };
        Known::new(ModelId([7; 32]), manifest, 10, &files.into()).unwrap()
    }

    fn facts(disk_bytes: Option<u64>, trunk: Precision) -> Facts {
        Facts { disk_bytes, trunk: Some(trunk), ..Facts::default() }
    }

    #[test]
    fn a_disk_holds_what_everybody_keeps_and_room_for_an_exchange_before_experts() {
        let known = known();
        assert_eq!(known.disk_for_experts(&facts(None, Precision::Q4)), None, "no bound, and no paging");
        assert_eq!(known.disk_for_experts(&facts(Some(1000), Precision::Q4)), Some(1000 - 10 - 300 - 160));
        assert_eq!(known.disk_for_experts(&facts(Some(1000), Precision::Exact)), Some(0));
        let complete = Facts { complete_models: vec![known.id], ..facts(Some(1000), Precision::Exact) };
        assert_eq!(known.disk_for_experts(&complete), Some(4 * 160), "it has them already");
    }

    #[test]
    fn a_small_disk_takes_the_trunk_at_fewer_bits() {
        let known = known();
        let chosen = |disk: Option<u64>| known.trunk_precision(Bounds::AUTO, (u64::MAX, u64::MAX), disk, 16, 1);
        // Beside the manifest, the experts at Q4 and an exchange.
        let beside = 10 + 4 * 50 + 160;
        let least = [(None, Precision::Exact), (Some(1000), Precision::Exact), (Some(999), Precision::Q8)];
        for (trunk, precision) in least.into_iter().chain([(Some(500), Precision::Q8), (Some(499), Precision::Q4)]) {
            assert_eq!(chosen(trunk.map(|trunk: u64| trunk + beside)), precision, "{trunk:?}");
        }
    }
}
