//! What a node tells the others about itself when it changes: capacity and what it can give.

use coel_gossip::PeerView;
use coel_store::{Bounds, ModelId, Precision, cbor};
use serde::{Deserialize, Serialize};

use super::holdings::Holdings;

/// Facts of one node, gossiped as opaque bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// What its ledger may reach.
    pub memory_bytes: u64,
    /// What the weights on its disk may reach, where that has a bound: then it may page experts. Older versions do not say.
    #[serde(default)]
    pub disk_bytes: Option<u64>,
    /// KV cache it keeps, in tokens.
    pub kv_tokens: u64,
    /// At which precisions it accepts experts.
    pub accepts: Bounds,
    /// At which precision it holds the trunk, once it knows a model.
    pub trunk: Option<Precision>,
    /// Models of which it has every blob: sources for newcomers.
    pub complete_models: Vec<ModelId>,
    /// What it has of the experts on its disk. Older versions do not say.
    #[serde(default)]
    pub holds: Option<Holdings>,
}

/// A node's facts are small; gossip bounds them too.
const BYTES_MAX: usize = 16 << 10;

impl Facts {
    /// For [`coel_gossip::Handle::set_facts`].
    pub fn encode(&self) -> bytes::Bytes {
        cbor::to_vec(self).expect("facts are plain data").into()
    }

    /// A peer's facts; `None` until it has told any that this version understands.
    pub fn of(view: &PeerView) -> Option<Self> {
        cbor::from_slice(view.facts.as_ref()?, BYTES_MAX).ok()
    }
}

#[cfg(test)]
mod tests {
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
        let read: Facts = cbor::from_slice(&cbor::to_vec(&before).unwrap(), BYTES_MAX).unwrap();
        assert_eq!((read.memory_bytes, read.disk_bytes, read.trunk), (7, None, Some(Precision::Q4)));
        let now = Facts { disk_bytes: Some(1 << 40), ..read };
        assert_eq!(cbor::from_slice::<Facts>(&now.encode(), BYTES_MAX).unwrap(), now);
        assert_eq!(cbor::from_slice::<Before>(&now.encode(), BYTES_MAX).unwrap(), before);
    }
}
