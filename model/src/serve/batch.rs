//! A batch in flight: plain state.
//!
//! Owns [`InFlightBatch`]: a batch of rows, the requests its chunks belong to, and what its layer waits for; and
//! [`BatchEntry`], what one request has come to since the batch began. The executor computes on it and the queue of
//! batches keeps it; it knows neither. The invariant: rows belong to entries in their order, and no output depends on
//! when it came.

use std::{
    collections::BTreeSet,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use coel_weights::layout::ExpertId;
use tokio::sync::oneshot;

use super::{
    expert_source::{ExpertOutputs, SourceError},
    jobs::{Advanced, Lease, Routes},
    scheduler::ScheduledChunk,
};
use crate::{
    nn::{batch::Batch, outputs::LayerOutputs, router::Route},
    offload::{disk::ClaimId, meter::LayerRecall, predict::Prediction},
};

/// One chunk of a batch: what it has come to since the batch began. Dropped if the batch fails.
pub(super) struct BatchEntry {
    pub(super) chunk: ScheduledChunk,
    /// Held here too: the session may have gone.
    _lease: Arc<Lease>,
    watch: bool,
    pub(super) advanced: Advanced,
    pub(super) routes: Routes,
}

impl BatchEntry {
    pub(super) fn new(chunk: ScheduledChunk, lease: Arc<Lease>, watch: bool) -> Self {
        Self { chunk, _lease: lease, watch, advanced: Advanced::default(), routes: Routes::new() }
    }
}

/// A batch on its way through the layers.
pub(super) struct InFlightBatch {
    pub(super) batch: Batch,
    pub(super) entries: Vec<BatchEntry>,
    pub(super) since: Instant,
    /// Outputs of the layer that have come, while others have not; `None` before the layer's experts were begun.
    pub(super) layer: Option<PendingLayer>,
    /// Pins experts that are on disk, once one was needed.
    pub(super) claim: Option<ClaimId>,
    pub(super) prediction: Prediction,
}

/// A layer some of whose experts were begun.
pub(super) struct PendingLayer {
    pub(super) outputs: LayerOutputs,
    /// Experts on disk that are not computed yet.
    pub(super) from_disk: BTreeSet<ExpertId>,
    pub(super) remote: Option<RemoteOutputs>,
}

/// Experts that are computed elsewhere.
pub(super) struct RemoteOutputs {
    pub(super) slots: Vec<u32>,
    answer: oneshot::Receiver<Result<ExpertOutputs, SourceError>>,
    /// The answer, once it has come.
    pub(super) result: Option<Result<ExpertOutputs, SourceError>>,
}

impl RemoteOutputs {
    pub(super) fn new(slots: Vec<u32>, answer: oneshot::Receiver<Result<ExpertOutputs, SourceError>>) -> Self {
        Self { slots, answer, result: None }
    }
}

impl PendingLayer {
    /// Whether outputs are missing.
    pub(super) fn is_waiting(&self) -> bool {
        !self.from_disk.is_empty() || self.remote.is_some()
    }

    fn has_answer(&self) -> bool {
        self.remote.as_ref().is_some_and(|remote| remote.result.is_some())
    }
}

impl InFlightBatch {
    pub(super) fn new(batch: Batch, entries: Vec<BatchEntry>, since: Instant) -> Self {
        Self { batch, entries, since, layer: None, claim: None, prediction: Prediction::default() }
    }

    /// Ready when an answer from elsewhere has come.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(PendingLayer { remote: Some(remote), .. }) = &mut self.layer else { return Poll::Pending };
        if remote.result.is_none() {
            let Poll::Ready(result) = Pin::new(&mut remote.answer).poll(context) else { return Poll::Pending };
            let unanswered = |_| Err(SourceError::Failed("the request for them was dropped".into()));
            remote.result = Some(result.unwrap_or_else(unanswered));
        }
        Poll::Ready(())
    }

    /// Whether there is something to compute without anything that only the executor knows of.
    pub(super) fn can_step(&self) -> bool {
        self.layer.as_ref().is_none_or(PendingLayer::has_answer)
    }

    pub(super) fn waits_for_disk(&self) -> bool {
        self.layer.as_ref().is_some_and(|layer| !layer.from_disk.is_empty())
    }

    pub(super) fn rows(&self) -> usize {
        self.entries.iter().map(|entry| entry.chunk.rows).sum()
    }

    pub(super) fn chunks(&self) -> Vec<ScheduledChunk> {
        self.entries.iter().map(|entry| entry.chunk).collect()
    }

    /// Every (row, expert) pair of the layer, with the entry its row belongs to.
    pub(super) fn each_route(&mut self, mut each: impl FnMut(&mut BatchEntry, &Route)) {
        let mut rows = self.batch.routes().iter();
        for entry in &mut self.entries {
            for route in rows.by_ref().take(entry.chunk.rows).flatten() {
                each(entry, route);
            }
        }
    }

    /// Shows the layer's routes to those who watch.
    pub(super) fn show_routes(&mut self) {
        let layer = usize::from(self.batch.layer());
        let mut rows = self.batch.routes().iter();
        for entry in &mut self.entries {
            let rows = rows.by_ref().take(entry.chunk.rows);
            if entry.watch {
                entry.routes.resize(layer + 1, Vec::new());
                entry.routes[layer] = rows.cloned().collect();
            } else {
                rows.for_each(drop);
            }
        }
    }

    /// How much of the layer's routes had been predicted: for rows that decode, since prompts need most experts anyway,
    /// or for all rows.
    pub(super) fn take_recall(&mut self, all_rows: bool) -> LayerRecall {
        let prediction = std::mem::take(&mut self.prediction);
        let rows = self.entries.iter().map(|entry| entry.chunk.rows);
        let decoding: Vec<bool> = rows.flat_map(|rows| std::iter::repeat_n(rows == 1, rows)).collect();
        prediction.recall(usize::from(self.batch.layer()), self.batch.routes(), |row| all_rows || decoding[row])
    }

    /// Counts the pairs that were computed elsewhere for the entries they belong to.
    pub(super) fn note_remote(&mut self, outputs: &ExpertOutputs, slots: &[u32]) {
        let mut ends = Vec::new();
        let (mut slot, mut rows) = (0, self.batch.routes().iter());
        for entry in &self.entries {
            slot += rows.by_ref().take(entry.chunk.rows).map(|routes| routes.len() as u32).sum::<u32>();
            ends.push(slot);
        }
        for share in &outputs.shares {
            let Some(class) = &share.elsewhere else { continue };
            for slot in share.slots.iter().filter_map(|index| slots.get(*index as usize)) {
                let advanced = &mut self.entries[ends.partition_point(|end| end <= slot)].advanced;
                advanced.pairs_here = advanced.pairs_here.saturating_sub(1);
                advanced.pairs_elsewhere += 1;
                advanced.note_class(class.clone());
            }
        }
    }
}
