//! Experts on disk: the way there, and back.
//!
//! A node that was given more than its memory holds has all of it on the engine's shelf, and the shelf has all the memory there is for
//! experts: what is hot stays there by itself, whatever popularity said beforehand. The invariants: the shelf's memory and the
//! experts loaded for good are never more than the room for experts; what is shelved was verified on the disk just before; and
//! no expert stops being served on the way, but for the few whose memory the shelf begins with, for as long as it takes the
//! compute thread to take them over.

use std::sync::Arc;
use std::time::Duration;

use coel_model::bytes::WeightBytes;
use coel_model::tensors::Tensors;
use coel_store::{Blobs, ExpertId, Precision, Segment, State};
use tracing::info;

use super::blobs::Wanted;
use super::{Hosting, Setback};
use crate::ids;
use crate::library::run_blocking;
use crate::placement::Popularity;
use crate::shared::{Held, Serving};
use crate::size::Size;

/// How often it is looked whether the shelf has let go of memory.
const LOOK: Duration = Duration::from_millis(2);
/// How often at most: what flights need now is computed long before.
const LOOKS_MAX: u32 = 5000;

impl Hosting {
    /// Bytes of memory for experts.
    fn room(&self, serving: &Serving) -> u64 {
        let config = &self.shared.config;
        let memory = serving.known.memory_bytes(config, serving.trunk);
        memory.saturating_sub(serving.known.fixed_bytes(config.kv_tokens, serving.trunk))
    }

    /// Bytes of memory for experts on disk, beside those that are loaded and `more` of them. Where host memory lies beneath a GPU's,
    /// the shelf has to do with that.
    fn room_for_shelf(&self, serving: &Serving, more: u64) -> u64 {
        let ledger = serving.engine.memory();
        let rest = self.room(serving).saturating_sub(ledger.expert_bytes + more);
        let loaded_beneath = ledger.beneath_bytes.saturating_sub(ledger.tier_bytes_reserved);
        match self.shared.config.beneath_bytes {
            Some(beneath) => {
                let host = serving.known.host_bytes(serving.trunk);
                rest.min(beneath.saturating_sub(host + loaded_beneath + more))
            }
            None => rest,
        }
    }

    /// Whether the node was given more than its memory holds.
    pub(super) fn must_page(&self, serving: &Serving, assigned: &Held) -> bool {
        let bytes: u64 = assigned.iter().map(|(expert, at)| serving.known.expert_bytes(*expert, *at)).sum();
        self.shared.config.disk_bytes.is_some() && bytes > self.room(serving)
    }

    /// Whether the expert is held on disk.
    pub(super) fn is_shelved(&self, expert: ExpertId) -> bool {
        self.shared.shelved.borrow().contains(&expert)
    }

    /// Gives the shelf what memory it needs to begin with: some of the coldest experts that are loaded go there at once, where
    /// else there would be none for it.
    pub(super) async fn begin_shelf(&self, state: &State, serving: &Serving, assigned: &Held) -> Result<(), Setback> {
        let loaded = |expert: &ExpertId| !self.is_shelved(*expert);
        let held = self.shared.held.borrow().clone();
        let least = serving.known.least_to_page(assigned.values().copied().max().unwrap_or(Precision::Exact));
        let mut free = self.room_for_shelf(serving, 0);
        let popularity = state.models.get(&serving.known.id).map(|model| model.popularity.clone()).unwrap_or_default();
        let mut coldest = Popularity::new(popularity).ranked(held.keys().copied().filter(loaded));
        let mut going = Vec::new();
        while free < least {
            let Some(expert) = coldest.pop() else { break };
            // At its own precision: another one may have to be fetched first.
            let precision = held[&expert];
            let wanted = Wanted::expert(&serving.known, expert, precision)?;
            going.push((expert, self.tensors_on_disk(state, serving, &wanted).await?));
            free += serving.known.expert_bytes(expert, precision);
        }
        if !going.is_empty() || self.shared.shelved.borrow().is_empty() {
            info!(assigned = assigned.len(), memory = %Size(self.room(serving)), "experts are had in memory by turns");
        }
        for (expert, _) in &going {
            self.engine_drop(serving, *expert).await?;
        }
        self.give_shelf_the_rest(serving).await?;
        for (expert, tensors) in going {
            self.engine_shelve(serving, expert, tensors).await?;
        }
        Ok(())
    }

    /// Gets what is missing of the expert to the disk and holds it there.
    pub(super) async fn shelve(&self, state: &State, serving: &Serving, wanted: &Wanted<'_>) -> Result<(), Setback> {
        let tensors = self.tensors_on_disk(state, serving, wanted).await?;
        let Some(expert) = wanted.expert else { return Ok(()) };
        self.engine_shelve(serving, expert, tensors).await?;
        self.shared.held.send_modify(|held| {
            Arc::make_mut(held).insert(expert, wanted.precision);
        });
        self.give_shelf_the_rest(serving).await
    }

    /// Takes memory for `bytes` more of loaded experts from the shelf, as soon as it is not needed there at the moment.
    pub(super) async fn take_from_shelf(&self, serving: &Serving, bytes: u64) -> Result<(), Setback> {
        let rest = self.room_for_shelf(serving, bytes);
        for _ in 0..LOOKS_MAX {
            self.resize_shelf(serving, rest).await?;
            if serving.engine.tiers().bytes_in_memory <= rest {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
        let why = format!("experts on disk need more than {rest} bytes of memory all the time");
        Err(Setback::Load { what: "an expert that was on disk".into(), why })
    }

    /// Ends the shelf when nothing is on it any more.
    pub(super) async fn end_shelf(&self, serving: &Serving) -> Result<(), Setback> {
        if serving.engine.tiers().budget_bytes > 0 && self.shared.shelved.borrow().is_empty() {
            self.resize_shelf(serving, 0).await?;
            info!("every expert is in memory again");
        }
        Ok(())
    }

    /// Forgets shelved experts whose files are gone, so that they are fetched anew.
    pub(super) async fn drop_what_is_gone(&self, serving: &Serving) -> Result<(), Setback> {
        let (held, shelved) = (self.shared.held.borrow().clone(), self.shared.shelved.borrow().clone());
        let (blobs, known) = (self.shared.blobs.clone(), serving.known.clone());
        let is_gone = move |expert: &ExpertId| {
            let slices = known.manifest.experts.get(expert).zip(held.get(expert));
            let needed = slices.and_then(|(slices, precision)| slices.at(*precision)).into_iter().flatten();
            needed.into_iter().any(|(_, blob)| !blobs.has(&blob.id))
        };
        let gone: Vec<_> = run_blocking(move || shelved.into_iter().filter(is_gone).collect()).await;
        for expert in gone {
            self.drop_expert(serving, expert).await?;
        }
        Ok(())
    }

    /// The shelf has what memory is left.
    async fn give_shelf_the_rest(&self, serving: &Serving) -> Result<(), Setback> {
        let rest = self.room_for_shelf(serving, 0);
        self.resize_shelf(serving, rest).await
    }

    async fn resize_shelf(&self, serving: &Serving, bytes: u64) -> Result<(), Setback> {
        let load = |why: String| Setback::Load { what: "the shelf of experts on disk".into(), why };
        serving.engine.set_tier_bytes(bytes).await.map_err(|error| load(error.to_string()))
    }

    async fn engine_shelve(&self, serving: &Serving, expert: ExpertId, tensors: Tensors) -> Result<(), Setback> {
        let load = |why: String| Setback::Load { what: format!("expert {expert}"), why };
        let shelved = serving.engine.shelve_expert_tensors(ids::to_model(expert), tensors).await;
        shelved.map_err(|error| load(error.to_string()))?;
        self.shared.shelved.send_modify(|shelved| {
            shelved.insert(expert);
        });
        Ok(())
    }

    async fn engine_drop(&self, serving: &Serving, expert: ExpertId) -> Result<(), Setback> {
        let load = |why: String| Setback::Load { what: format!("expert {expert}"), why };
        serving.engine.drop_expert(ids::to_model(expert)).await.map(drop).map_err(|error| load(error.to_string()))
    }

    /// The expert's tensors where they lie in files: every byte of them was verified, none is in memory.
    async fn tensors_on_disk(&self, state: &State, serving: &Serving, wanted: &Wanted<'_>) -> Result<Tensors, Setback> {
        let load = |why: String| Setback::Load { what: wanted.what.clone(), why };
        self.checked(wanted, state, serving.known.id, Blobs::verify).await?;
        let blobs = wanted.blobs()?;
        let mut lying = Vec::new();
        for (_, entry) in blobs {
            let segments = self.shared.blobs.lies_in(entry).map_err(|error| load(error.to_string()))?;
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
