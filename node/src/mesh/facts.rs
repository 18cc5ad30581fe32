//! What a node tells the others about itself when it changes: capacity and what it can give.

use coel_gossip::PeerView;
use coel_store::{Bounds, ModelId, Precision, cbor};
use serde::{Deserialize, Serialize};

/// Facts of one node, gossiped as opaque bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// What its ledger may reach.
    pub memory_bytes: u64,
    /// KV cache it keeps, in tokens.
    pub kv_tokens: u64,
    /// At which precisions it accepts experts.
    pub accepts: Bounds,
    /// At which precision it holds the trunk, once it knows a model.
    pub trunk: Option<Precision>,
    /// Models of which it has every blob: sources for newcomers.
    pub complete_models: Vec<ModelId>,
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
