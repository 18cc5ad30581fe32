//! Which expert blobs lie on a node's disk.

use coel_store::{BlobId, Manifest, ModelId, Slice};
use serde::{Deserialize, Serialize};

/// Longest list that is gossiped. A model of more experts is taken to be obtainable everywhere.
const BITS_BYTES_MAX: usize = 8 << 10;
const SLICES: [Slice; 3] = [Slice::Exact, Slice::Base, Slice::Refine];

/// What a node has of a model's experts on its disk.
///
/// A blob that was found damaged counts as held: nobody gave it up, so it is a fault to report by name and no reason to plan
/// without it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holdings {
    model: ModelId,
    /// Three bits for each expert in the order of the manifest: exact, base, refine.
    #[serde(with = "serde_bytes")]
    bits: Vec<u8>,
}

impl Holdings {
    /// The holdings of a node that `has` these blobs; `None` where the list would be too long to gossip.
    pub fn of(model: ModelId, manifest: &Manifest, has: impl Fn(&BlobId) -> bool) -> Option<Self> {
        let mut bits = vec![0u8; (SLICES.len() * manifest.experts.len()).div_ceil(8)];
        if bits.len() > BITS_BYTES_MAX {
            return None;
        }
        for (index, slices) in manifest.experts.values().enumerate() {
            let blobs = [Some(&slices.exact), slices.base.as_ref(), slices.refine.as_ref()];
            for (slice, blob) in blobs.into_iter().enumerate() {
                let at = SLICES.len() * index + slice;
                bits[at / 8] |= u8::from(blob.is_some_and(|blob| has(&blob.id))) << (at % 8);
            }
        }
        Some(Self { model, bits })
    }

    /// The model whose experts these are.
    pub fn model(&self) -> ModelId {
        self.model
    }

    /// Whether the node holds this slice of the expert at `index` in the order of the manifest.
    pub fn has(&self, index: usize, slice: Slice) -> bool {
        let at = SLICES.len() * index + SLICES.iter().position(|one| *one == slice).unwrap_or(0);
        self.bits.get(at / 8).is_some_and(|byte| byte >> (at % 8) & 1 == 1)
    }
}
