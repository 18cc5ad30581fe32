//! What a node tells the others that it can give.

use coel_store::{Bounds, ModelId, Precision};
use serde::{Deserialize, Serialize};

use super::Holdings;

/// What one node offers the mesh. It is gossiped as it is here, so fields are only ever added, with a default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Bytes that its ledger may reach.
    pub memory_bytes: u64,
    /// Bytes of weights it may keep on disk. A node with such a bound may page experts. Older versions do not say.
    #[serde(default)]
    pub disk_bytes: Option<u64>,
    /// Tokens of KV cache it keeps.
    pub kv_tokens: u64,
    /// At which precisions it accepts experts.
    pub accepts: Bounds,
    /// At which precision it holds the trunk, once it knows a model.
    pub trunk: Option<Precision>,
    /// Models of which it has every blob: sources for newcomers.
    pub complete_models: Vec<ModelId>,
    /// Which expert blobs lie on its disk. Older versions do not say.
    #[serde(default)]
    pub holds: Option<Holdings>,
}

impl Offer {
    /// Whether the node has every blob of the model.
    pub fn has_all_of(&self, model: ModelId) -> bool {
        self.complete_models.contains(&model)
    }
}
