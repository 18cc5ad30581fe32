//! Experts in and out of memory, within the budget.

use coel_store::{ExpertId, NodeId, Precision, Replica, State};
use tracing::debug;

use super::blobs::WantedPart;
use super::{HeldExperts, Hosting, HostingError, LoadedModel};
use crate::ids;

impl Hosting {
    /// Loads one expert at `precision`, or holds it on disk if `paging`. Does nothing where a newer placement than `state` has come, which
    /// may want something else: what is under way is finished, and the rest is left to the next pass.
    pub(super) async fn get_expert(
        &self,
        state: &State,
        model: &LoadedModel,
        expert: ExpertId,
        precision: Precision,
        paging: bool,
    ) -> Result<(), HostingError> {
        if self.node.view.state().epoch() != state.epoch() {
            return Ok(());
        }
        let (meta, loaded) = (&model.meta, &self.node.loaded);
        let wanted = WantedPart::expert(meta, expert, precision)?;
        let size = |precision| meta.sizes.expert_bytes(expert, precision);
        let largest = Precision::ALL.into_iter().map(size).max().unwrap_or(0);
        let _tight = if self.disk_is_tight(largest) { Some(self.disk.lock().await) } else { None };
        if paging {
            return self.page(state, model, &wanted).await;
        }
        // That takes long, and no memory: others may go on meanwhile.
        self.hold(&wanted, state, meta).await?;
        let now = loaded.held().get(&expert).copied();
        let bytes = size(precision);
        let pages = model.engine.offload_stats().budget_bytes > 0;
        let exchanging = if now.is_some() || pages { Some(self.exchange.lock().await) } else { None };
        if pages {
            self.take_from_paging(model, bytes).await?;
        } else if now.is_some() {
            self.make_room(model, expert, bytes).await?;
        }
        let budget = meta.sizes.memory_bytes(&self.node.limits, model.trunk);
        let total = || model.engine.memory().total() + bytes;
        let reserved = match loaded.reservations().take(bytes, |others| total() + others <= budget).await {
            Some(reserved) => reserved,
            None if exchanging.is_some() => loaded.reservations().take_anyway(bytes),
            // The placement may be of a larger budget than this process was given.
            None => return Err(HostingError::Room { what: wanted.what.clone(), total: total(), budget }),
        };
        let blobs = self.get(&wanted, state, meta).await?;
        let done = model.engine.load_expert(ids::to_model(expert), blobs).await;
        done.map_err(|error| HostingError::load(&wanted.what, error))?;
        drop(reserved);
        loaded.add(expert, precision);
        drop(exchanging);
        if let Some(now) = now {
            debug!(%expert, from = %now, to = %precision, "exchanged");
        }
        Ok(())
    }

    /// Drops the old form of a replica where both forms do not fit side by side and another live node serves the expert too. An only
    /// copy stays: then the budget is exceeded by one expert for as long as the exchange takes.
    async fn make_room(&self, model: &LoadedModel, expert: ExpertId, bytes: u64) -> Result<(), HostingError> {
        let budget = model.meta.sizes.memory_bytes(&self.node.limits, model.trunk);
        if model.engine.memory().total() + bytes > budget && self.another_stays(expert) {
            self.drop_expert(model, expert).await?;
        }
        Ok(())
    }

    /// Whether another live node serves the expert and keeps it: two nodes that exchange the same expert must not both drop it.
    fn another_stays(&self, expert: ExpertId) -> bool {
        let view = &self.node.view;
        let (state, down, node) = (view.state(), view.down(), view.node());
        let Some(replicas) = state.placement.as_ref().and_then(|placement| placement.replicas.get(&expert)) else {
            return false;
        };
        let stays = |host: NodeId, replica: &Replica| {
            replica.ready.is_some() && (host < node || replica.ready == Some(replica.precision))
        };
        replicas.iter().any(|(&host, replica)| host != node && !down.contains(&host) && stays(host, replica))
    }

    /// Drops experts that were not assigned.
    pub(super) async fn drop_all_but(&self, model: &LoadedModel, assigned: &HeldExperts) -> Result<(), HostingError> {
        let held = self.node.loaded.held();
        for &expert in held.keys().filter(|expert| !assigned.contains_key(expert)) {
            self.drop_expert(model, expert).await?;
        }
        Ok(())
    }

    /// Drops one expert: nobody is told that it is here before the engine forgets it.
    pub(super) async fn drop_expert(&self, model: &LoadedModel, expert: ExpertId) -> Result<(), HostingError> {
        self.node.loaded.remove(expert);
        let dropped = model.engine.drop_expert(ids::to_model(expert)).await;
        dropped.map(drop).map_err(|error| HostingError::load(format!("expert {expert}"), error))
    }
}
