//! What members say of themselves: how gossip carries it, and what this node says.
//!
//! Owns [`OwnOffer`]. Hosting and import set what changes; gossip and the planner read the whole.

use std::sync::Arc;

use coel_gossip::{Handle, PeerView};
use coel_store::{Log, MeshId, ModelId, NodeId, Precision, Progress, cbor};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::warn;

use crate::budget::{Holdings, Offer};
use crate::config::Limits;

/// What a member says of itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Facts {
    offer: Offer,
    /// How far its log has got; of which mesh, and which node's it is.
    #[serde(default)]
    log: Option<(MeshId, NodeId, Progress)>,
}

/// Longest encoded facts of a peer that is read; gossip has a bound of its own.
const BYTES_MAX: usize = 16 << 10;

/// A member's facts as gossip carries them.
fn encode(facts: &Facts) -> bytes::Bytes {
    cbor::to_vec(facts).expect("facts are plain data").into()
}

fn decode(view: &PeerView) -> Option<Facts> {
    cbor::from_slice(view.facts.as_ref()?, BYTES_MAX).ok()
}

/// A peer's offer; `None` until it has made one that this version understands.
pub fn offer_of(view: &PeerView) -> Option<Offer> {
    decode(view).map(|facts| facts.offer)
}

/// Which node's log a peer has, and how far it has got; `None` until it has said so.
pub fn log_of(view: &PeerView) -> Option<(MeshId, NodeId, Progress)> {
    decode(view)?.log
}

/// What this node offers. Cloning is cheap; all clones are the same offer.
#[derive(Debug, Clone)]
pub struct OwnOffer(Arc<watch::Sender<Arc<Offer>>>);

impl OwnOffer {
    /// The offer of a node that knows no model yet.
    pub fn new(limits: &Limits) -> Self {
        let offer = Offer {
            memory_bytes: limits.memory_bytes,
            disk_bytes: limits.disk_bytes,
            kv_tokens: limits.kv_tokens as u64,
            accepts: limits.experts,
            ..Offer::default()
        };
        Self(Arc::new(watch::Sender::new(Arc::new(offer))))
    }

    /// The offer now.
    pub fn get(&self) -> Arc<Offer> {
        self.0.borrow().clone()
    }

    /// Tells when the offer changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Offer>> {
        self.0.subscribe()
    }

    /// At which precision this node holds the trunk, once it has decided.
    pub fn trunk(&self) -> Option<Precision> {
        self.0.borrow().trunk
    }

    /// Sets that precision.
    pub fn set_trunk(&self, trunk: Precision) {
        self.change(|offer| offer.trunk = Some(trunk));
    }

    /// Sets what the ledger may reach, in bytes.
    pub fn set_memory(&self, memory_bytes: u64) {
        self.change(|offer| offer.memory_bytes = memory_bytes);
    }

    /// Sets what of a model lies here, and whether that is all of it.
    pub fn set_inventory(&self, model: ModelId, complete: bool, holds: Option<Holdings>) {
        self.change(|offer| {
            offer.holds = holds;
            offer.complete_models.retain(|id| *id != model);
            offer.complete_models.extend(complete.then_some(model));
        });
    }

    fn change(&self, change: impl FnOnce(&mut Offer)) {
        self.0.send_if_modified(|offer| {
            let mut changed = Offer::clone(offer);
            change(&mut changed);
            let news = changed != **offer;
            *offer = Arc::new(changed);
            news
        });
    }
}

/// Tells gossip this node's offer, and how far its log has got, whenever they change.
pub async fn publish(gossip: Handle, offer: OwnOffer, log: Log) {
    let (mut changes, mut state) = (offer.subscribe(), log.state());
    loop {
        state.mark_unchanged();
        let offer = Offer::clone(&changes.borrow_and_update());
        let encoded = encode(&Facts { offer, log: Some((log.mesh_id(), log.node_id(), log.progress())) });
        if let Err(error) = gossip.set_facts(encoded) {
            warn!(%error, "what this node says of itself is too long to be gossiped");
        }
        let changed = tokio::select! {
            changed = changes.changed() => changed,
            changed = state.changed() => changed,
        };
        if changed.is_err() {
            return std::future::pending().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use coel_store::Bounds;

    use super::*;

    #[test]
    fn facts_are_read_as_they_were_told_and_what_is_not_understood_says_nothing() {
        let offer =
            Offer { memory_bytes: 7, disk_bytes: Some(1 << 40), trunk: Some(Precision::Q4), ..Offer::default() };
        let facts = Facts { offer, log: Some((MeshId([1; 16]), NodeId(3), Progress::default())) };
        assert_eq!(cbor::from_slice::<Facts>(&encode(&facts), BYTES_MAX).unwrap(), facts);
        assert!(cbor::from_slice::<Facts>(b"nonsense", BYTES_MAX).is_err());
    }

    #[test]
    fn only_a_change_of_the_offer_is_told() {
        let limits = Limits {
            memory_bytes: 100,
            vram_bytes: None,
            offload_bytes: None,
            disk_bytes: Some(50),
            kv_tokens: 16,
            experts: Bounds::AUTO,
            trunk: Bounds::AUTO,
        };
        let own = OwnOffer::new(&limits);
        let mut changes = own.subscribe();
        own.set_memory(100);
        own.set_inventory(ModelId([3; 32]), false, None);
        assert!(!changes.has_changed().unwrap());
        own.set_inventory(ModelId([3; 32]), true, None);
        own.set_trunk(Precision::Q8);
        assert!(changes.has_changed().unwrap());
        let offer = changes.borrow_and_update().clone();
        assert!(offer.has_all_of(ModelId([3; 32])) && offer.trunk == Some(Precision::Q8), "{offer:?}");
        assert_eq!((offer.memory_bytes, offer.disk_bytes, offer.kv_tokens), (100, Some(50), 16));
    }
}
