//! The host's driver of expert calls: computes experts that are loaded here for the rows of other nodes.
//!
//! Owns the streams that homes opened. The invariant: a frame gets one reply, in order, and nothing is computed from bytes that
//! were not checked. It does not know homes or placements: an expert's weights never change within a model.

use std::sync::Arc;

use coel_gossip::{Frame, FrameStream, Incoming, PeerId};
use coel_model::serve::engine::{Computed, EngineError};
use coel_store::ExpertId;
use tokio::sync::Semaphore;
use tracing::{debug, debug_span, warn};

use super::class;
use super::wire::{CallHeader, ReplyHeader, decode_call, encode_reply, pairs};
use crate::hosting::Loaded;
use crate::ids;
use crate::metrics::Metrics;

/// Streams served at once, each with at most one call in memory. A home uses a few. Streams beyond that are dropped, and their
/// homes ask a replica.
const STREAMS_MAX: usize = 64;

/// What a host needs of its node.
#[derive(Clone)]
pub struct HostHandles {
    /// The model that is loaded, with its engine, and the experts held in it.
    pub loaded: Loaded,
    /// Counts the rows that were served.
    pub metrics: Arc<Metrics>,
}

/// Serves expert calls until the swarm stops. The calls of one stream are answered in order.
pub async fn serve(mut incoming: Incoming, handles: HostHandles) {
    let permits = Arc::new(Semaphore::new(STREAMS_MAX));
    while let Some((peer, stream)) = incoming.next().await {
        let Ok(permit) = permits.clone().try_acquire_owned() else { continue };
        let handles = handles.clone();
        tokio::spawn(async move {
            let _permit = permit;
            if let Err(error) = answer(peer, stream, &handles).await {
                debug!(%peer, error, "an expert stream ended");
            }
        });
    }
}

async fn answer(peer: PeerId, mut stream: FrameStream, handles: &HostHandles) -> Result<(), String> {
    while let Some(frame) = stream.recv().await.map_err(|error| error.to_string())? {
        let (reply, rows) = compute(peer, &frame, handles).await;
        stream.send(&encode_reply(&reply, &rows)).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

async fn compute(peer: PeerId, frame: &Frame, handles: &HostHandles) -> (ReplyHeader, Vec<f32>) {
    let (header, rows) = match decode_call(frame) {
        Ok(call) => call,
        Err(error) => {
            warn!(%peer, %error, "a malformed expert call");
            return (ReplyHeader::Refused(error.to_string()), Vec::new());
        }
    };
    let CallHeader { model, epoch, layer, hidden_size, work, .. } = header;
    let span = debug_span!("experts", %peer, %epoch, layer);
    let id = |expert: u16| ExpertId { layer, index: expert };
    let all = || work.iter().map(|work| id(work.expert)).collect();
    let Some(serving) = handles.loaded.model().filter(|loaded| loaded.meta.id == model) else {
        return (ReplyHeader::NotHeld(all()), Vec::new());
    };
    if hidden_size as usize != serving.meta.config.hidden_size {
        let expected = serving.meta.config.hidden_size;
        return (
            ReplyHeader::Refused(format!("rows of {hidden_size} values; this model has rows of {expected}")),
            Vec::new(),
        );
    }
    let held = handles.loaded.held();
    let missing: Vec<_> = work.iter().map(|work| id(work.expert)).filter(|expert| !held.contains_key(expert)).collect();
    if !missing.is_empty() {
        return (ReplyHeader::NotHeld(missing), Vec::new());
    }
    let served = pairs(&work) as u64;
    let class = serving.class(&work.iter().map(|work| held[&id(work.expert)]).collect());
    let calls =
        work.into_iter().map(|work| (work.expert, work.rows.into_iter().map(u32::from).collect::<Vec<_>>())).collect();
    match serving.engine.compute_experts(layer, rows, calls).await {
        Ok(Computed { outputs, cpu_class }) => {
            let class = cpu_class.map_or(class.clone(), |cpu_class| format!("{class}{}{cpu_class}", class::AND));
            // A device names itself; homes take nothing but short, printable names.
            let class = class::printable(&class, class::CLASS_BYTES_MAX);
            handles.metrics.rows_served.inc_by(served);
            span.in_scope(|| debug!(served, "computed"));
            (ReplyHeader::Done { class }, outputs)
        }
        Err(EngineError::NotHeld(expert)) => (ReplyHeader::NotHeld(vec![ids::to_store(expert)]), Vec::new()),
        Err(error) => (ReplyHeader::Refused(error.to_string()), Vec::new()),
    }
}
