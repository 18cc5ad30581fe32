//! Getting blobs, and experts in and out of memory, within both budgets.

use std::sync::Arc;

use coel_model::bytes::WeightBytes;
use coel_model::slices::blob::PartBlobs;
use coel_store::{BlobEntry, ExpertId, ModelId, NodeId, Precision, Replica, Slice, Slices, State};
use tracing::debug;

use super::{Hosting, Setback};
use crate::ids;
use crate::library::run_blocking;
use crate::shared::{Held, Serving};

impl Hosting {
    /// Loads one expert at `precision`, or with `paging` holds it on disk, unless a newer placement has come since `state`, which may
    /// have other plans: what is under way is finished, the rest is left to the next pass.
    pub(super) async fn get_expert(
        &self,
        state: &State,
        serving: &Serving,
        expert: ExpertId,
        precision: Precision,
        paging: bool,
    ) -> Result<(), Setback> {
        if self.shared.state().epoch() != state.epoch() {
            return Ok(());
        }
        let what = format!("expert {expert}");
        let load = |why: &dyn std::fmt::Display| Setback::Load { what: what.clone(), why: why.to_string() };
        let known = &serving.known;
        let slices = known.manifest.experts.get(&expert).ok_or_else(|| load(&"the manifest does not have it"))?;
        let largest =
            Precision::ALL.into_iter().map(|precision| known.expert_bytes(expert, precision)).max().unwrap_or(0);
        let _tight = if self.disk_is_tight(largest) { Some(self.disk.lock().await) } else { None };
        if paging {
            return self.shelve(state, serving, expert, precision).await;
        }
        let now = self.shared.held.borrow().get(&expert).copied();
        let bytes = known.expert_bytes(expert, precision);
        let mut exchanging = None;
        if now.is_some() || serving.engine.tiers().budget_bytes > 0 {
            // Fetching takes long, and others may go on meanwhile.
            self.fetch(&what, slices, precision, state, known.id, expert).await?;
            exchanging = Some(self.exchange.lock().await);
        }
        if serving.engine.tiers().budget_bytes > 0 {
            self.take_from_shelf(serving, bytes).await?;
        } else if now.is_some() {
            self.make_room(serving, expert, bytes).await?;
        }
        let blobs = self.get(&what, slices, precision, state, known.id, Some(expert)).await?;
        if exchanging.is_none() {
            // The placement may be of a larger budget than this process was given.
            exchanging = Some(self.exchange.lock().await);
            let (total, budget) = (serving.engine.memory().total() + bytes, self.shared.config.memory_bytes);
            if total > budget {
                return Err(Setback::Room { what: what.clone(), total, budget });
            }
        }
        serving.engine.load_expert(ids::to_model(expert), blobs).await.map_err(|error| load(&error))?;
        self.shared.held.send_modify(|held| {
            Arc::make_mut(held).insert(expert, precision);
        });
        self.shared.shelved.send_modify(|shelved| {
            shelved.remove(&expert);
        });
        drop(exchanging);
        if let Some(now) = now {
            debug!(%expert, from = %now, to = %precision, "exchanged");
        }
        Ok(())
    }

    /// Where the old and the new form of a replica do not fit side by side, and another live node serves the expert too, the old
    /// one goes first. An only copy stays: then the budget is exceeded by one expert for as long as the exchange takes.
    async fn make_room(&self, serving: &Serving, expert: ExpertId, bytes: u64) -> Result<(), Setback> {
        let shared = &self.shared;
        if serving.engine.memory().total() + bytes <= shared.config.memory_bytes {
            return Ok(());
        }
        if self.another_stays(expert) {
            self.drop_expert(serving, expert).await?;
        }
        Ok(())
    }

    /// Whether a live node serves the expert and will go on: two that exchange the same one must not both let go of it.
    fn another_stays(&self, expert: ExpertId) -> bool {
        let (state, down, node) = (self.shared.state(), self.shared.down(), self.shared.log.node_id());
        let Some(replicas) = state.placement.as_ref().and_then(|placement| placement.replicas.get(&expert)) else {
            return false;
        };
        let stays = |host: NodeId, replica: &Replica| {
            replica.ready.is_some() && (host < node || replica.ready == Some(replica.precision))
        };
        replicas.iter().any(|(&host, replica)| host != node && !down.contains(&host) && stays(host, replica))
    }

    /// What is not here yet of an expert's slices, without reading the rest.
    async fn fetch(
        &self,
        what: &str,
        slices: &Slices,
        precision: Precision,
        state: &State,
        model: ModelId,
        expert: ExpertId,
    ) -> Result<(), Setback> {
        for (slice, blob) in slices.at(precision).into_iter().flatten() {
            let (blobs, id) = (self.shared.blobs.clone(), blob.id);
            if !run_blocking(move || blobs.has(&id)).await {
                self.obtain(what, blob, state, model, Some((expert, slice))).await?;
            }
        }
        Ok(())
    }

    /// The blobs of a part at this precision, verified.
    pub(super) async fn get(
        &self,
        what: &str,
        slices: &Slices,
        precision: Precision,
        state: &State,
        model: ModelId,
        expert: Option<ExpertId>,
    ) -> Result<PartBlobs, Setback> {
        let missing = || Setback::Load { what: what.into(), why: format!("the model has no slices for {precision}") };
        let mut blobs = Vec::new();
        for (slice, blob) in slices.at(precision).ok_or_else(missing)? {
            blobs.push(self.obtain(what, blob, state, model, expert.map(|expert| (expert, slice))).await?);
        }
        let mut blobs = blobs.into_iter();
        Ok(PartBlobs { main: blobs.next().ok_or_else(missing)?, refine: blobs.next() })
    }

    async fn obtain(
        &self,
        what: &str,
        entry: &BlobEntry,
        state: &State,
        model: ModelId,
        expert: Option<(ExpertId, Slice)>,
    ) -> Result<WeightBytes, Setback> {
        let (blobs, id) = (self.shared.blobs.clone(), entry.id);
        if let Some(known) = self.shared.library.cached(model)
            && self.disk_is_tight(entry.bytes)
            && !run_blocking(move || blobs.has(&id)).await
        {
            self.make_disk_room(&known, entry.bytes).await;
        }
        let sources = self.shared.sources(state, model, expert);
        Ok(self.shared.fetcher.obtain(what, entry, &sources).await?.into())
    }

    pub(super) async fn drop_all_but(&self, serving: &Serving, assigned: &Held) -> Result<(), Setback> {
        let held = self.shared.held.borrow().clone();
        for &expert in held.keys().filter(|expert| !assigned.contains_key(expert)) {
            self.drop_expert(serving, expert).await?;
        }
        Ok(())
    }

    pub(super) async fn drop_expert(&self, serving: &Serving, expert: ExpertId) -> Result<(), Setback> {
        self.shared.held.send_modify(|held| {
            Arc::make_mut(held).remove(&expert);
        });
        self.shared.shelved.send_modify(|shelved| {
            shelved.remove(&expert);
        });
        let dropped = serving.engine.drop_expert(ids::to_model(expert)).await;
        dropped.map(drop).map_err(|error| Setback::Load { what: format!("expert {expert}"), why: error.to_string() })
    }
}
