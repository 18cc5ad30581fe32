//! Sends members the chunks of blobs that are held here.

use std::sync::Arc;

use bytes::Bytes;
use coel_gossip::{FrameStream, Incoming, PeerId};
use coel_store::Blobs;
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use super::wire::{ChunkReply, ChunkRequest, decode, encode};
use crate::metrics::Metrics;

/// Streams served at once: enough for every member to fetch, few enough to leave the disk to the node itself.
const STREAMS_MAX: usize = 32;

/// Serves the weight protocol until the swarm stops.
pub async fn serve(mut incoming: Incoming, blobs: Arc<Blobs>, metrics: Arc<Metrics>) {
    let places = Arc::new(Semaphore::new(STREAMS_MAX));
    while let Some((peer, stream)) = incoming.next().await {
        // A stream beyond the bound is dropped; its owner tries another source.
        let Ok(place) = places.clone().try_acquire_owned() else {
            continue;
        };
        let (blobs, metrics) = (blobs.clone(), metrics.clone());
        tokio::spawn(async move {
            if let Err(error) = answer(peer, stream, &blobs, &metrics).await {
                debug!(%peer, error, "weight stream ended");
            }
            drop(place);
        });
    }
}

async fn answer(peer: PeerId, mut stream: FrameStream, blobs: &Arc<Blobs>, metrics: &Metrics) -> Result<(), String> {
    while let Some(frame) = stream.recv().await.map_err(|error| error.to_string())? {
        let request = match decode::<ChunkRequest>(&frame).and_then(|request| request.check().map(|()| request)) {
            Ok(request) => request,
            Err(reason) => {
                let refusal = encode(&ChunkReply::Refused(reason.clone()), Bytes::new());
                stream.send(&refusal).await.map_err(|error| error.to_string())?;
                return Err(reason);
            }
        };
        for chunk in request.first..request.first + request.count {
            let (blobs, blob) = (blobs.clone(), request.blob);
            let read = tokio::task::spawn_blocking(move || blobs.read_chunk(&blob, chunk)).await;
            let (reply, payload) = match read.map_err(|error| error.to_string())? {
                Ok(bytes) => (ChunkReply::Chunk(chunk), Bytes::from(bytes)),
                Err(error) => {
                    if should_be_here(&error) {
                        warn!(%peer, blob = %request.blob, chunk, %error, "a blob that should be here cannot be read");
                    }
                    (ChunkReply::NotHeld, Bytes::new())
                }
            };
            let (held, bytes) = (reply != ChunkReply::NotHeld, payload.len() as u64);
            stream.send(&encode(&reply, payload)).await.map_err(|error| error.to_string())?;
            metrics.bytes_sent.inc_by(bytes);
            if !held {
                break;
            }
        }
    }
    Ok(())
}

/// Whether the error is about bytes that the index says are here.
fn should_be_here(error: &coel_store::BlobError) -> bool {
    !matches!(error, coel_store::BlobError::Missing { .. })
}
