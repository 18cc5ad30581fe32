//! Experts in and out of memory, within the budget.

use std::sync::Arc;

use coel_store::{ExpertId, NodeId, Precision, Replica, State};
use tracing::debug;

use super::blobs::Wanted;
use super::{Hosting, Setback};
use crate::ids;
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
        let known = &serving.known;
        let wanted = Wanted::expert(known, expert, precision)?;
        let load = |why: &dyn std::fmt::Display| Setback::Load { what: wanted.what.clone(), why: why.to_string() };
        let largest =
            Precision::ALL.into_iter().map(|precision| known.expert_bytes(expert, precision)).max().unwrap_or(0);
        let _tight = if self.disk_is_tight(largest) { Some(self.disk.lock().await) } else { None };
        if paging {
            return self.shelve(state, serving, &wanted).await;
        }
        // That takes long, and no memory: others may go on meanwhile.
        self.hold(&wanted, state, known.id).await?;
        let now = self.shared.held.borrow().get(&expert).copied();
        let bytes = known.expert_bytes(expert, precision);
        let pages = serving.engine.tiers().budget_bytes > 0;
        let exchanging = if now.is_some() || pages { Some(self.exchange.lock().await) } else { None };
        if pages {
            self.take_from_shelf(serving, bytes).await?;
        } else if now.is_some() {
            self.make_room(serving, expert, bytes).await?;
        }
        let (loading, budget) = (&self.shared.loading, known.memory_bytes(&self.shared.config, serving.trunk));
        let total = || serving.engine.memory().total() + bytes;
        let taken = match loading.take(bytes, |others| total() + others <= budget).await {
            Some(taken) => taken,
            None if exchanging.is_some() => loading.take_anyway(bytes),
            // The placement may be of a larger budget than this process was given.
            None => return Err(Setback::Room { what: wanted.what.clone(), total: total(), budget }),
        };
        let blobs = self.get(&wanted, state, known.id).await?;
        serving.engine.load_expert(ids::to_model(expert), blobs).await.map_err(|error| load(&error))?;
        drop(taken);
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
        if serving.engine.memory().total() + bytes <= serving.known.memory_bytes(&shared.config, serving.trunk) {
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
