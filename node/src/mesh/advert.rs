//! Offers between members: how gossip carries one, and this node's own.
//!
//! Owns [`OwnOffer`]. Hosting and import set what changes; gossip and the planner read the whole.

use std::sync::Arc;

use coel_gossip::{Handle, PeerView};
use coel_store::{ModelId, Precision, cbor};
use tokio::sync::watch;
use tracing::warn;

use crate::budget::{Holdings, Offer};
use crate::config::Limits;

/// Longest encoded offer of a peer that is read; gossip has a bound of its own.
const BYTES_MAX: usize = 16 << 10;

/// An offer as gossip's facts.
fn encode(offer: &Offer) -> bytes::Bytes {
    cbor::to_vec(offer).expect("offers are plain data").into()
}

/// A peer's offer; `None` until it has made one that this version understands.
pub fn offer_of(view: &PeerView) -> Option<Offer> {
    cbor::from_slice(view.facts.as_ref()?, BYTES_MAX).ok()
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

/// Tells gossip this node's offer whenever it changes.
pub async fn publish(gossip: Handle, offer: OwnOffer) {
    let mut changes = offer.subscribe();
    loop {
        let encoded = encode(&changes.borrow_and_update());
        if let Err(error) = gossip.set_facts(encoded) {
            warn!(%error, "this node's offer is too long to be gossiped");
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use coel_store::Bounds;
    use serde::{Deserialize, Serialize};

    use super::*;

    /// As told by versions that knew no disk.
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Before {
        memory_bytes: u64,
        kv_tokens: u64,
        accepts: Bounds,
        trunk: Option<Precision>,
        complete_models: Vec<ModelId>,
    }

    #[test]
    fn versions_that_know_a_disk_and_those_that_do_not_understand_each_other() {
        let before = Before {
            memory_bytes: 7,
            kv_tokens: 9,
            accepts: Bounds::only(Precision::Q8),
            trunk: Some(Precision::Q4),
            complete_models: vec![ModelId([3; 32])],
        };
        let read: Offer = cbor::from_slice(&cbor::to_vec(&before).unwrap(), BYTES_MAX).unwrap();
        assert_eq!((read.memory_bytes, read.disk_bytes, read.trunk), (7, None, Some(Precision::Q4)));
        let now = Offer { disk_bytes: Some(1 << 40), ..read };
        assert_eq!(cbor::from_slice::<Offer>(&encode(&now), BYTES_MAX).unwrap(), now);
        assert_eq!(cbor::from_slice::<Before>(&encode(&now), BYTES_MAX).unwrap(), before);
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
