//! What a model takes on a node, in bytes, and what fits where.
//!
//! Owns [`ModelSizes`], the sizes of one model; [`Offer`], what a node tells the others that it can give; and [`Holdings`], which
//! expert blobs lie on its disk. Planner, hosting, import, `coel model inspect` and the testnet all count with these.
//!
//! Pure arithmetic. Invariant: a size is never less than what the engine or the blob store takes for the same thing. It does not
//! know which node holds what, nor what is free at the moment.

mod checks;
mod holdings;
mod offer;

use std::collections::BTreeMap;

use coel_model::budget::footprint::Footprint;
use coel_model::nn::batch::CHUNK_ROWS;
use coel_model::serve::engine::Ledger;
use coel_model::serve::pages::PAGE_TOKENS;
use coel_model::weights::config::ModelConfig;
use coel_model::weights::folder::ModelFolder;
use coel_model::weights::memory::PAGE;
use coel_model::weights::parts::{Part, PartKind, parts};
use coel_model::weights::slicing::part_slices::part_bytes;
use coel_store::{Bounds, ExpertId, Manifest, Precision, Slices};
use serde::Serialize;

use crate::config::Limits;
use crate::ids;

pub use checks::TooSmall;
pub use holdings::Holdings;
pub use offer::Offer;

/// Generations a node computes at once. A KV pool of more full contexts is never used.
pub const RUNNING_MAX: usize = 32;
/// Experts a node fetches and loads at once: enough to keep a link busy.
pub const LOADS_MAX: usize = 4;

/// Name of the trunk part that is the embedding table (`coel_model::weights::parts`). It stays in the machine's memory, also with a GPU.
const EMBEDDINGS: &str = "embeddings";

/// The experts of a model and their sizes.
pub type ExpertSizes = BTreeMap<ExpertId, SizeByPrecision>;

/// Bytes of a part of a model at each precision at which it can be held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SizeByPrecision {
    /// In the order of [`Precision::ALL`].
    bytes: [Option<u64>; 3],
}

impl SizeByPrecision {
    /// These bytes, in the order of [`Precision::ALL`].
    pub fn new(bytes: [Option<u64>; 3]) -> Self {
        Self { bytes }
    }

    /// The bytes of these blobs.
    pub fn of(slices: &Slices) -> Self {
        Self { bytes: Precision::ALL.map(|precision| slices.bytes(precision)) }
    }

    /// The bytes of a checkpoint's part once it is cut into blobs.
    fn of_part(part: &Part) -> Self {
        let exact = part.header().len() as u64 + part.data_bytes();
        let slices = part_bytes(part).ok();
        Self { bytes: [slices.map(|s| s.base), slices.map(|s| s.base + s.refine), Some(exact)] }
    }

    /// Without the precisions that are not to be `kept`.
    pub fn only(self, kept: impl Fn(Precision) -> bool) -> Self {
        Self { bytes: Precision::ALL.map(|precision| self.bytes(precision).filter(|_| kept(precision))) }
    }

    /// Bytes at this precision; `None` where there is no such form.
    pub fn bytes(&self, precision: Precision) -> Option<u64> {
        self.bytes[precision as usize]
    }

    /// Bytes at this precision, or of the exact form where there is none.
    pub fn nearest(&self, precision: Precision) -> u64 {
        self.bytes(precision).or(self.bytes(Precision::Exact)).unwrap_or(0)
    }

    /// The precisions that take fewer bytes than every higher one, ascending.
    pub fn sensible(self) -> impl Iterator<Item = Precision> {
        let fewer = move |precision: &Precision| {
            let higher = Precision::ALL.into_iter().filter(|higher| higher > precision);
            let mut higher = higher.filter_map(|higher| self.bytes(higher));
            self.bytes(*precision).is_some_and(|bytes| higher.all(|more| bytes < more))
        };
        Precision::ALL.into_iter().filter(fewer)
    }
}

/// What fits a budget with the trunk at one precision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fit {
    /// The trunk's precision.
    pub trunk: Precision,
    /// Trunk, KV cache and buffers.
    pub fixed_bytes: u64,
    /// Experts that fit beside them at Q4, Q8 and exact; `None` where the folder cannot give that form, or where the trunk alone is
    /// too much.
    pub experts: [Option<usize>; 3],
}

/// The sizes of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSizes {
    /// Manifest and files: what every node keeps besides weights.
    files_bytes: u64,
    trunk: Vec<SizeByPrecision>,
    embeddings: SizeByPrecision,
    experts: ExpertSizes,
    context_tokens: usize,
    experts_per_token: usize,
    sparse_layers: usize,
    footprint: Footprint,
}

impl ModelSizes {
    /// The sizes of a registered model, whose encoded manifest has `manifest_bytes`.
    pub fn of_manifest(manifest: &Manifest, manifest_bytes: u64, config: &ModelConfig) -> Self {
        let files: u64 = manifest.files.iter().map(|file| file.blob.bytes).sum();
        let mut sizes = Self::empty(config);
        sizes.files_bytes = manifest_bytes + files;
        for part in &manifest.trunk {
            sizes.add_trunk(&part.name, SizeByPrecision::of(&part.slices));
        }
        sizes.experts = manifest.experts.iter().map(|(&id, slices)| (id, SizeByPrecision::of(slices))).collect();
        sizes
    }

    /// The sizes of a model folder, as its parts would be registered; its files do not count.
    pub fn of_folder(folder: &ModelFolder) -> Self {
        let mut sizes = Self::empty(folder.config());
        let parts: Vec<(PartKind, SizeByPrecision)> = match folder {
            ModelFolder::Checkpoint(checkpoint) => {
                parts(checkpoint).iter().map(|part| (part.kind.clone(), SizeByPrecision::of_part(part))).collect()
            }
            ModelFolder::Sliced(sliced) => {
                let each = sliced.parts().map(|(kind, bytes)| {
                    let forms = [Some(bytes.base), Some(bytes.base + bytes.refine), None];
                    (kind.clone(), SizeByPrecision::new(forms))
                });
                each.collect()
            }
        };
        for (kind, bytes) in parts {
            match kind {
                PartKind::Trunk { name } => sizes.add_trunk(&name, bytes),
                PartKind::Expert(expert) => {
                    sizes.experts.insert(ids::to_store(expert), bytes);
                }
            }
        }
        sizes
    }

    fn empty(config: &ModelConfig) -> Self {
        Self {
            files_bytes: 0,
            trunk: Vec::new(),
            embeddings: SizeByPrecision::default(),
            experts: ExpertSizes::new(),
            context_tokens: config.max_position_embeddings,
            experts_per_token: config.num_experts_per_tok,
            sparse_layers: config.sparse_layers().count(),
            footprint: Footprint::of(config, config.dtype),
        }
    }

    fn add_trunk(&mut self, name: &str, bytes: SizeByPrecision) {
        if name == EMBEDDINGS {
            self.embeddings = bytes;
        }
        self.trunk.push(bytes);
    }

    /// Every expert with its sizes.
    pub fn experts(&self) -> &ExpertSizes {
        &self.experts
    }

    /// Bytes of an expert at this precision; 0 for one that does not exist.
    pub fn expert_bytes(&self, expert: ExpertId, precision: Precision) -> u64 {
        self.experts.get(&expert).and_then(|bytes| bytes.bytes(precision)).unwrap_or(0)
    }

    /// Bytes of the largest expert at this precision, or exact where it has no such form.
    pub fn largest_expert_bytes(&self, precision: Precision) -> u64 {
        self.experts.values().map(|bytes| bytes.nearest(precision)).max().unwrap_or(0)
    }

    /// Bytes of all experts, each once, at this precision.
    pub fn experts_bytes(&self, precision: Precision) -> u64 {
        self.experts.values().map(|bytes| bytes.nearest(precision)).sum()
    }

    /// (row, expert) pairs that one token costs over all layers.
    pub fn pairs_per_token(&self) -> u64 {
        (self.sparse_layers * self.experts_per_token) as u64
    }

    /// Bytes of the trunk at this precision.
    pub fn trunk_bytes(&self, precision: Precision) -> u64 {
        self.trunk.iter().map(|part| part.nearest(precision)).sum()
    }

    /// The KV pool of a node that was given `wanted` tokens for it: whole pages.
    pub fn kv_tokens(&self, wanted: usize) -> usize {
        wanted.min(RUNNING_MAX * self.context_tokens).next_multiple_of(PAGE_TOKENS)
    }

    /// Bytes a node needs besides experts: trunk, KV cache, buffers.
    pub fn fixed_bytes(&self, kv_tokens: usize, trunk: Precision) -> u64 {
        let kv = self.footprint.kv_bytes_per_token * self.kv_tokens(kv_tokens) as u64;
        self.trunk_bytes(trunk) + kv + self.footprint.buffer_bytes(CHUNK_ROWS)
    }

    /// What fits `memory_bytes` beside a KV cache of `kv_tokens`, for each precision the trunk may have.
    pub fn fits(&self, memory_bytes: u64, kv_tokens: usize) -> Vec<Fit> {
        let trunks = Precision::ALL.into_iter().filter(|p| self.trunk.iter().any(|part| part.bytes(*p).is_some()));
        let fit = |trunk| {
            let fixed_bytes = self.fixed_bytes(kv_tokens, trunk);
            let experts = Precision::ALL.map(|precision| {
                let room = memory_bytes.checked_sub(fixed_bytes)?;
                self.experts.values().any(|bytes| bytes.bytes(precision).is_some()).then_some(())?;
                let each = self.largest_expert_bytes(precision).max(1);
                Some(usize::try_from(room / each).unwrap_or(usize::MAX).min(self.experts.len()))
            });
            Fit { trunk, fixed_bytes, experts }
        };
        trunks.map(fit).collect()
    }

    /// The precision at which a node holds the trunk: the most exact one accepted with which the fixed part fits where it must be,
    /// and leaves room for the node's share of the experts at the fewest bits, in memory and on a disk that is to receive it; else
    /// the least exact one accepted. `disk_bytes` is `None` where the disk has no bound or holds the model already.
    pub fn trunk_precision(&self, limits: &Limits, disk_bytes: Option<u64>, nodes: usize) -> Precision {
        let (fixed_budget, memory_bytes) = (limits.fixed_budget().1, limits.memory_bytes);
        let share = self.experts_bytes(Precision::Q4) / nodes.max(1) as u64;
        let fits = |&precision: &Precision| {
            let fixed = self.fixed_bytes(limits.kv_tokens, precision);
            let on_disk = self.disk_fixed_bytes(precision) + self.largest_expert_bytes(Precision::Exact) + share;
            fixed <= fixed_budget
                && fixed + share <= memory_bytes
                && disk_bytes.is_none_or(|disk_bytes| on_disk <= disk_bytes)
        };
        let mut accepted = Precision::ALL.into_iter().rev().filter(|precision| limits.trunk.has(*precision));
        let chosen = accepted.find(fits).unwrap_or(limits.trunk.lowest());
        let sliced = self.trunk.iter().any(|part| part.bytes(chosen).is_some());
        if sliced { chosen } else { Precision::Exact }
    }

    /// Bytes that machine memory below a GPU holds besides experts that lie there: the embedding table, experts being loaded, and
    /// two for an exchange.
    pub fn offload_fixed_bytes(&self, trunk: Precision) -> u64 {
        self.embeddings.nearest(trunk) + (LOADS_MAX as u64 + 2) * self.largest_expert_bytes(Precision::Exact)
    }

    /// Bytes that a node's ledger may reach: its memory, less what of the offload memory [is not for
    /// experts](Self::offload_fixed_bytes).
    pub fn memory_bytes(&self, limits: &Limits, trunk: Precision) -> u64 {
        let offload = limits.offload_bytes.map_or(0, |bytes| bytes.min(self.offload_fixed_bytes(trunk)));
        limits.memory_bytes - offload
    }

    /// Bytes of memory for experts on a node that holds the trunk at this precision.
    pub fn expert_room(&self, limits: &Limits, trunk: Precision) -> u64 {
        self.memory_bytes(limits, trunk).saturating_sub(self.fixed_bytes(limits.kv_tokens, trunk))
    }

    /// Bytes of memory for experts on disk, beside those that are loaded by `ledger` and `more` of them. Where a GPU has offload
    /// memory below it, that alone is for them.
    pub fn paging_room(&self, limits: &Limits, trunk: Precision, ledger: &Ledger, more: u64) -> u64 {
        let rest = self.expert_room(limits, trunk).saturating_sub(ledger.expert_bytes + more);
        let offloaded = ledger.cpu_offload_bytes.saturating_sub(ledger.disk_cache_bytes_reserved);
        match limits.offload_bytes {
            Some(bytes) => rest.min(bytes.saturating_sub(self.offload_fixed_bytes(trunk) + offloaded + more)),
            None => rest,
        }
    }

    /// Fewest bytes of memory with which a node pages experts: room for twice those of one row, so that some are read while others
    /// are computed. Experts are read in whole pages.
    pub fn paging_bytes_min(&self, precision: Precision) -> u64 {
        let largest = self.largest_expert_bytes(precision).next_multiple_of(PAGE as u64) + 2 * PAGE as u64;
        2 * self.experts_per_token as u64 * largest
    }

    /// Bytes of the blobs that every node keeps, the manifest among them.
    pub fn disk_fixed_bytes(&self, trunk: Precision) -> u64 {
        self.files_bytes + self.trunk_bytes(trunk)
    }

    /// Bytes of experts that a node with this offer may hold in memory; `None` until it has said how it holds the trunk.
    pub fn offered_memory(&self, offer: &Offer) -> Option<u64> {
        Some(offer.memory_bytes.saturating_sub(self.fixed_bytes(offer.kv_tokens as usize, offer.trunk?)))
    }

    /// Bytes of expert blobs that a node with this offer may keep on its disk; `None` for a disk without bound, whose node never
    /// pages. A node that `has_all` blobs needs no more room. Another one keeps some free for an exchange, during which an expert is
    /// there twice.
    pub fn offered_disk(&self, offer: &Offer, has_all: bool) -> Option<u64> {
        let disk_bytes = offer.disk_bytes?;
        if has_all {
            return Some(self.experts_bytes(Precision::Exact));
        }
        let fixed = offer.trunk.map_or(0, |trunk| self.disk_fixed_bytes(trunk));
        Some(disk_bytes.saturating_sub(fixed + self.largest_expert_bytes(Precision::Exact)))
    }

    /// Bytes of experts that a node with this offer may hold in memory, and bytes that it may be given if it pages (0 where it
    /// cannot), while the mesh wants these precisions. What the mesh wants and the node does not accept, the node has no room for.
    pub fn offered_room(&self, offer: &Offer, has_all: bool, wanted: Bounds) -> (u64, u64) {
        let Some(accepts) = offer.accepts.and(wanted) else { return (0, 0) };
        let (memory, disk) = (self.offered_memory(offer).unwrap_or(0), self.offered_disk(offer, has_all));
        // What is in memory is on the disk too.
        let in_memory = disk.map_or(memory, |disk| memory.min(disk));
        let pages = memory >= self.paging_bytes_min(accepts.lowest());
        (in_memory, disk.filter(|_| pages).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests;
