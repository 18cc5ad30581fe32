//! Where the leaves' own ids meet: the only place that converts between them.

use coel_gossip::PeerId;
use coel_store::Peer;

/// The store's opaque form of a peer id.
pub fn peer_key(peer: PeerId) -> Peer {
    Peer(peer.to_bytes())
}

/// The network's form of a replicated peer id; `None` if it never was one.
pub fn peer_id(peer: &Peer) -> Option<PeerId> {
    PeerId::from_bytes(&peer.0).ok()
}

/// The model's name for an expert of the placement.
pub fn to_model(expert: coel_store::ExpertId) -> coel_model::weights::layout::ExpertId {
    coel_model::weights::layout::ExpertId { layer: expert.layer, index: expert.index }
}

/// The placement's name for a precision of the model.
pub fn to_store_precision(precision: coel_model::weights::slices::Precision) -> coel_store::Precision {
    match precision {
        coel_model::weights::slices::Precision::Q4 => coel_store::Precision::Q4,
        coel_model::weights::slices::Precision::Q8 => coel_store::Precision::Q8,
        coel_model::weights::slices::Precision::Exact => coel_store::Precision::Exact,
    }
}

/// The placement's name for an expert of the model.
pub fn to_store(expert: coel_model::weights::layout::ExpertId) -> coel_store::ExpertId {
    coel_store::ExpertId { layer: expert.layer, index: expert.index }
}

/// The model's name for a precision of the placement.
pub fn to_model_precision(precision: coel_store::Precision) -> coel_model::weights::slices::Precision {
    match precision {
        coel_store::Precision::Q4 => coel_model::weights::slices::Precision::Q4,
        coel_store::Precision::Q8 => coel_model::weights::slices::Precision::Q8,
        coel_store::Precision::Exact => coel_model::weights::slices::Precision::Exact,
    }
}
