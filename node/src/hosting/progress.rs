//! How far loading is, for people and for the metrics.

use coel_store::Precision;

use super::{HeldExperts, Hosting};
use crate::registry::ModelMeta;

impl Hosting {
    /// Notes how far the node is. Experts count once they are loaded as wanted; files and trunk, few as they are, once they lie here.
    pub(super) fn count(&self, meta: &ModelMeta, assigned: &HeldExperts) {
        let (loaded, held) = (&self.node.loaded, self.node.loaded.held());
        // The manifest is here, or nothing of this would be known.
        let (mut all, mut here) = (meta.manifest_bytes, meta.manifest_bytes);
        let serves = loaded.model().is_some();
        for blob in meta.fixed_blobs(self.node.offer.trunk().unwrap_or(Precision::Exact)) {
            all += blob.bytes;
            here += if serves || self.node.blobs.has(&blob.id) { blob.bytes } else { 0 };
        }
        for (expert, precision) in assigned {
            let bytes = meta.sizes.expert_bytes(*expert, *precision);
            all += bytes;
            here += if held.get(expert) == Some(precision) { bytes } else { 0 };
        }
        loaded.set_bytes(all, here);
        let each = held.iter().map(|(&expert, &precision)| (precision, meta.sizes.expert_bytes(expert, precision)));
        self.node.metrics.note_experts(each);
    }
}
