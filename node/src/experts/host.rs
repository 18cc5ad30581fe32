//! The host's side: computes experts that are loaded here for other nodes' rows.

use std::sync::Arc;

use coel_gossip::{Frame, FrameStream, Incoming, PeerId};
use coel_model::engine::Computed;
use coel_store::ExpertId;
use tokio::sync::Semaphore;
use tracing::{debug, debug_span, warn};

use super::wire::{CallHeader, ReplyHeader, decode_call, encode_reply, pairs};
use crate::hosting::Loaded;
use crate::metrics::Metrics;

/// Streams served at once, each with at most one call in memory. A home uses a few; more are dropped, and their homes ask a
/// replica.
const STREAMS_MAX: usize = 64;

/// Serves expert calls until the swarm stops. Calls of one stream are answered in order.
pub async fn serve(mut incoming: Incoming, loaded: Loaded, metrics: Arc<Metrics>) {
    let places = Arc::new(Semaphore::new(STREAMS_MAX));
    while let Some((peer, stream)) = incoming.next().await {
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let (loaded, metrics) = (loaded.clone(), metrics.clone());
        tokio::spawn(async move {
            let _place = place;
            if let Err(error) = answer(peer, stream, &loaded, &metrics).await {
                debug!(%peer, error, "expert stream ended");
            }
        });
    }
}

async fn answer(peer: PeerId, mut stream: FrameStream, loaded: &Loaded, metrics: &Metrics) -> Result<(), String> {
    while let Some(frame) = stream.recv().await.map_err(|error| error.to_string())? {
        let (reply, rows) = compute(peer, &frame, loaded, metrics).await;
        stream.send(&encode_reply(&reply, &rows)).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

async fn compute(peer: PeerId, frame: &Frame, loaded: &Loaded, metrics: &Metrics) -> (ReplyHeader, Vec<f32>) {
    let (header, rows) = match decode_call(frame) {
        Ok(call) => call,
        Err(error) => {
            warn!(%peer, %error, "an expert call is malformed");
            return (ReplyHeader::Refused(error.to_string()), Vec::new());
        }
    };
    let CallHeader { model, epoch, layer, hidden_size, work, .. } = header;
    let span = debug_span!("experts", %peer, %epoch, layer);
    let named = |expert: u16| ExpertId { layer, index: expert };
    let all = || work.iter().map(|work| named(work.expert)).collect();
    let Some(serving) = loaded.model().filter(|loaded| loaded.meta.id == model) else {
        return (ReplyHeader::NotHeld(all()), Vec::new());
    };
    if hidden_size as usize != serving.meta.config.hidden_size {
        let expected = serving.meta.config.hidden_size;
        return (ReplyHeader::Refused(format!("rows of {hidden_size}, this model has {expected}")), Vec::new());
    }
    let held = loaded.held();
    let missing: Vec<_> =
        work.iter().map(|work| named(work.expert)).filter(|expert| !held.contains_key(expert)).collect();
    if !missing.is_empty() {
        return (ReplyHeader::NotHeld(missing), Vec::new());
    }
    let served = pairs(&work) as u64;
    let class = serving.class(&work.iter().map(|work| held[&named(work.expert)]).collect());
    let calls =
        work.into_iter().map(|work| (work.expert, work.rows.into_iter().map(u32::from).collect::<Vec<_>>())).collect();
    match serving.engine.run_experts_telling(layer, rows, calls).await {
        Ok(Computed { outputs, by_host }) => {
            let class = by_host.map_or(class.clone(), |host| format!("{class} and {host}"));
            metrics.rows_served.inc_by(served);
            span.in_scope(|| debug!(served, "computed"));
            (ReplyHeader::Done { class }, outputs)
        }
        Err(coel_model::engine::EngineError::NotHeld(expert)) => {
            (ReplyHeader::NotHeld(vec![crate::ids::to_store(expert)]), Vec::new())
        }
        Err(error) => (ReplyHeader::Refused(error.to_string()), Vec::new()),
    }
}
