//! Experts on disk: how a node begins to page them, and stops.
//!
//! A node that was given more than its memory holds pages all of it: the engine reads experts from disk into a cache that has all the
//! memory there is for experts, and hot experts stay there by themselves, whatever popularity said beforehand. Invariants: the cache and
//! the experts loaded for good never exceed the room for experts; a paged expert was verified on the disk just before; and no expert
//! stops being served on the way, except the few whose memory the cache begins with, until the compute thread has taken them over.

use std::time::Duration;

use coel_model::weights::memory::WeightBytes;
use coel_model::weights::tensors::Tensors;
use coel_store::{Blobs, ExpertId, Precision, Segment, State};
use tokio::time::timeout;
use tracing::info;

use super::blobs::WantedPart;
use super::{HeldExperts, Hosting, HostingError, LoadedModel};
use crate::config::Size;
use crate::ids;
use crate::placement::Popularity;
use crate::system::run_blocking;

/// How long to wait until the cache has given memory back: the batches that need the memory now are computed long before.
const SHRINK_DEADLINE: Duration = Duration::from_secs(10);

impl Hosting {
    /// Bytes of memory for experts.
    fn room(&self, model: &LoadedModel) -> u64 {
        model.meta.sizes.expert_room(&self.node.limits, model.trunk)
    }

    /// Bytes of memory for experts on disk, beside those that are loaded and `more` of them.
    fn paging_room(&self, model: &LoadedModel, more: u64) -> u64 {
        model.meta.sizes.paging_room(&self.node.limits, model.trunk, &model.engine.memory(), more)
    }

    /// Whether the node was given more than its memory holds.
    pub(super) fn must_page(&self, model: &LoadedModel, assigned: &HeldExperts) -> bool {
        let bytes: u64 = assigned.iter().map(|(expert, at)| model.meta.sizes.expert_bytes(*expert, *at)).sum();
        self.node.limits.disk_bytes.is_some() && bytes > self.room(model)
    }

    /// Gives the cache the memory it needs to begin with. Where there is too little, some of the coldest loaded experts go to disk at
    /// once.
    pub(super) async fn begin_paging(
        &self,
        state: &State,
        model: &LoadedModel,
        assigned: &HeldExperts,
    ) -> Result<(), HostingError> {
        let (held, paged) = (self.node.loaded.held(), self.node.loaded.paged());
        let sizes = &model.meta.sizes;
        let least = sizes.paging_bytes_min(assigned.values().copied().max().unwrap_or(Precision::Exact));
        let mut free = self.paging_room(model, 0);
        let popularity = state.models.get(&model.meta.id).map(|model| model.popularity.clone()).unwrap_or_default();
        let in_memory = held.keys().copied().filter(|expert| !paged.contains(expert));
        let mut coldest = Popularity::new(popularity).ranked(in_memory);
        let mut going = Vec::new();
        while free < least {
            let Some(expert) = coldest.pop() else { break };
            // At its own precision: another one may have to be fetched first.
            let precision = held[&expert];
            let wanted = WantedPart::expert(&model.meta, expert, precision)?;
            going.push((expert, precision, self.tensors_on_disk(state, model, &wanted).await?));
            free += sizes.expert_bytes(expert, precision);
        }
        if !going.is_empty() || paged.is_empty() {
            info!(assigned = assigned.len(), memory = %Size(self.room(model)), "experts are paged: not all fit in memory");
        }
        for (expert, ..) in &going {
            self.engine_drop(model, *expert).await?;
        }
        self.grow_cache(model).await?;
        for (expert, precision, tensors) in going {
            self.engine_page(model, expert, precision, tensors).await?;
        }
        Ok(())
    }

    /// Gets what is missing of the expert to the disk and pages it from there.
    pub(super) async fn page(
        &self,
        state: &State,
        model: &LoadedModel,
        wanted: &WantedPart<'_>,
    ) -> Result<(), HostingError> {
        let tensors = self.tensors_on_disk(state, model, wanted).await?;
        let Some(expert) = wanted.expert else { return Ok(()) };
        self.engine_page(model, expert, wanted.precision, tensors).await?;
        self.grow_cache(model).await
    }

    /// Takes memory for `bytes` more of loaded experts from the cache, as soon as no batch needs it.
    pub(super) async fn take_from_paging(&self, model: &LoadedModel, bytes: u64) -> Result<(), HostingError> {
        let rest = self.paging_room(model, bytes);
        match timeout(SHRINK_DEADLINE, self.resize_cache(model, rest)).await {
            Ok(resized) => resized,
            Err(_) => {
                let why = format!("the experts on disk need more than {rest} bytes of memory all the time");
                Err(HostingError::load("an expert that was on disk", why))
            }
        }
    }

    /// Ends paging once no expert is paged any more.
    pub(super) async fn end_paging(&self, model: &LoadedModel) -> Result<(), HostingError> {
        if model.engine.offload_stats().budget_bytes > 0 && self.node.loaded.paged().is_empty() {
            self.resize_cache(model, 0).await?;
            info!("every expert is in memory again");
        }
        Ok(())
    }

    /// Drops paged experts whose files are gone, so that they are fetched again.
    pub(super) async fn drop_missing(&self, model: &LoadedModel) -> Result<(), HostingError> {
        let (held, paged) = (self.node.loaded.held(), self.node.loaded.paged());
        let (blobs, manifest) = (self.node.blobs.clone(), model.meta.manifest.clone());
        let is_gone = move |expert: &ExpertId| {
            let slices = manifest.experts.get(expert).zip(held.get(expert));
            let needed = slices.and_then(|(slices, precision)| slices.at(*precision)).into_iter().flatten();
            needed.into_iter().any(|(_, blob)| !blobs.has(&blob.id))
        };
        let gone: Vec<_> = run_blocking(move || paged.iter().copied().filter(is_gone).collect()).await;
        for expert in gone {
            self.drop_expert(model, expert).await?;
        }
        Ok(())
    }

    /// Gives the cache the memory that is left.
    async fn grow_cache(&self, model: &LoadedModel) -> Result<(), HostingError> {
        let rest = self.paging_room(model, 0);
        self.resize_cache(model, rest).await
    }

    async fn resize_cache(&self, model: &LoadedModel, bytes: u64) -> Result<(), HostingError> {
        let resized = model.engine.set_disk_cache_bytes(bytes).await;
        resized.map_err(|error| HostingError::load("the cache of experts on disk", error))
    }

    async fn engine_page(
        &self,
        model: &LoadedModel,
        expert: ExpertId,
        precision: Precision,
        tensors: Tensors,
    ) -> Result<(), HostingError> {
        let paged = model.engine.load_expert_tensors_on_disk(ids::to_model(expert), tensors).await;
        paged.map_err(|error| HostingError::load(format!("expert {expert}"), error))?;
        self.node.loaded.add_paged(expert, precision);
        Ok(())
    }

    async fn engine_drop(&self, model: &LoadedModel, expert: ExpertId) -> Result<(), HostingError> {
        let dropped = model.engine.drop_expert(ids::to_model(expert)).await;
        dropped.map(drop).map_err(|error| HostingError::load(format!("expert {expert}"), error))
    }

    /// The expert's tensors where they lie in files: every byte of them was verified, none is in memory.
    async fn tensors_on_disk(
        &self,
        state: &State,
        model: &LoadedModel,
        wanted: &WantedPart<'_>,
    ) -> Result<Tensors, HostingError> {
        let load = |why: String| HostingError::load(&wanted.what, why);
        self.checked(wanted, state, &model.meta, Blobs::verify).await?;
        let blobs = wanted.blobs()?;
        let mut lying = Vec::new();
        for (_, entry) in blobs {
            let segments = self.node.blobs.lies_in(entry).map_err(|error| load(error.to_string()))?;
            let pieces = mapped(segments).map_err(load)?;
            lying.push(Tensors::parse_pieces(&pieces, &wanted.what).map_err(|error| load(error.to_string()))?);
        }
        let mut lying = lying.into_iter();
        let main = lying.next().ok_or_else(|| load("it has no blobs".into()))?;
        let tensors = lying.next().map_or(Ok(main.clone()), |refine| main.with_refine(refine));
        tensors.map_err(|error| load(error.to_string()))
    }
}

/// The pieces of a blob: mapped where they lie in files.
fn mapped(segments: Vec<Segment>) -> Result<Vec<WeightBytes>, String> {
    let piece = |segment| match segment {
        Segment::Inline(bytes) => Ok(WeightBytes::from(bytes)),
        Segment::File { path, offset, bytes } => {
            let file = WeightBytes::map_sparsely(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            let (from, to) = (offset as usize, offset.saturating_add(bytes) as usize);
            file.slice(from..to).ok_or_else(|| format!("{} has become shorter", path.display()))
        }
    };
    segments.into_iter().map(piece).collect()
}
