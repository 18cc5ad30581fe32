//! One layer of a batch.
//!
//! Experts in memory are computed at once, while others are read from disk or computed elsewhere; those follow as they
//! arrive. So a layer can need more experts than fit into memory. The experts of the next layer are predicted and
//! prefetched. The invariant: a layer ends when it has every output, and no result depends on the order in which
//! outputs arrived.

use std::collections::BTreeSet;

use coel_weights::layout::ExpertId;

use super::Executor;
use crate::{
    nn::{
        batch::{Batch, SequenceChunk, Step},
        expert_call::by_expert,
        outputs::LayerOutputs,
        router::Route,
    },
    offload::{cpu::CpuOffload, disk::ClaimId, meter::LayerRecall, predict::by_weight},
    serve::{
        batch::{InFlightBatch, PendingLayer, RemoteOutputs},
        error::EngineError,
        expert_source::{ExpertOutputs, ExpertRequest, SourceError},
    },
};

impl Executor {
    /// Begins a batch of `chunks` and computes until experts are needed.
    pub(crate) fn begin(&mut self, chunks: Vec<SequenceChunk>) -> Result<(Batch, Step), EngineError> {
        self.tick();
        self.compute(|executor| Ok(executor.context()?.begin(chunks)?))
    }

    /// Whether anything can be computed for a batch now.
    pub(crate) fn can_step(&self, batch: &InFlightBatch) -> bool {
        let comes_from_disk = || batch.claim.is_some_and(|claim| self.is_ready(claim));
        batch.can_step() || comes_from_disk()
    }

    /// Computes the layer's experts that are in memory. Once all outputs are there, goes on to the next layer's
    /// experts, or to the logits at the end.
    pub(crate) fn step(&mut self, batch: &mut InFlightBatch) -> Result<Option<Vec<Vec<f32>>>, EngineError> {
        let mut layer = match batch.layer.take() {
            None => self.begin_layer(batch)?,
            Some(layer) => layer,
        };
        self.take_outputs(batch, &mut layer)?;
        if layer.is_waiting() {
            batch.layer = Some(layer);
            return Ok(None);
        }
        let outputs = layer.outputs;
        match self.compute(|executor| Ok::<_, EngineError>(executor.context()?.resume(&mut batch.batch, outputs)?))? {
            Step::NeedExperts => Ok(None),
            Step::Logits(logits) => Ok(Some(logits)),
        }
    }

    /// Ends a batch: unpins its experts.
    pub(crate) fn end(&mut self, batch: &mut InFlightBatch) {
        if let Some(claim) = batch.claim.take() {
            self.release(claim);
        }
    }

    /// Asks for the layer's experts that are not in memory and computes those that are.
    fn begin_layer(&mut self, batch: &mut InFlightBatch) -> Result<PendingLayer, EngineError> {
        let layer = batch.batch.layer();
        let (absent, from_disk) = self.note_routes(batch);
        let remote = self.ask_elsewhere(&batch.batch, &absent)?;
        self.note_recall(batch);
        if !from_disk.is_empty() {
            batch.claim = batch.claim.or_else(|| self.claim());
        }
        if let Some(claim) = batch.claim {
            // Even if the batch needs none: this ends the predictions for this layer.
            self.need(claim, &from_disk.iter().copied().collect::<Vec<_>>());
        }
        let next = self.sparse_layer_from(usize::from(layer) + 1).filter(|_| self.predicts());
        if let Some(next) = next.filter(|_| self.needs_nearly_all(batch)) {
            let all = (0..self.state.config.num_experts as u16).collect::<Vec<_>>();
            self.prefetch(batch, next, &all);
        }
        self.promote_for_batch(batch, |_| true);
        let outputs = self.run_held(&batch.batch)?;
        let mut pending = PendingLayer { outputs, from_disk, remote };
        if let Some(claim) = batch.claim {
            let ready = self.ready(claim)?;
            self.note_computed(&batch.batch, &mut pending, claim, &ready);
        }
        if let Some(next) = next {
            self.predict_layer(batch, next, &pending)?;
        }
        Ok(pending)
    }

    /// Asks the source for the layer's experts that are not held here.
    fn ask_elsewhere(&mut self, batch: &Batch, absent: &BTreeSet<u16>) -> Result<Option<RemoteOutputs>, EngineError> {
        let Some(first) = absent.first() else { return Ok(None) };
        let missing = ExpertId { layer: batch.layer(), index: *first };
        let source = self.state.source().ok_or(EngineError::NotHeld(missing))?;
        let mut call = self.context()?.call(batch);
        let slots = call.retain(|expert| absent.contains(&expert));
        let (request, answer) = ExpertRequest::new(call);
        source.ask(request);
        Ok(Some(RemoteOutputs::new(slots, answer)))
    }

    /// Adds the outputs that have arrived since the last call.
    fn take_outputs(&mut self, batch: &mut InFlightBatch, layer: &mut PendingLayer) -> Result<(), EngineError> {
        if let Some(result) = layer.remote.as_mut().and_then(|remote| remote.result.take()) {
            let slots = layer.remote.take().map(|remote| remote.slots).unwrap_or_default();
            self.add_remote(batch, &result?, &slots, &mut layer.outputs)?;
        }
        if let Some(claim) = batch.claim.filter(|_| !layer.from_disk.is_empty()) {
            let ready = self.ready(claim)?;
            if !ready.is_empty() {
                self.promote_for_batch(batch, |id| ready.contains(&id));
                self.run_more(&batch.batch, &ready, &mut layer.outputs)?;
                self.note_computed(&batch.batch, layer, claim, &ready);
            }
        }
        Ok(())
    }

    /// Adds outputs for `slots` that were computed elsewhere.
    fn add_remote(
        &mut self,
        batch: &mut InFlightBatch,
        remote: &ExpertOutputs,
        slots: &[u32],
        outputs: &mut LayerOutputs,
    ) -> Result<(), EngineError> {
        let hidden = self.state.config.hidden_size;
        if remote.values.len() != slots.len() * hidden {
            let why = format!("{} values for {} expert outputs of {hidden}", remote.values.len(), slots.len());
            return Err(SourceError::Failed(why).into());
        }
        outputs.add(slots, &remote.values);
        batch.note_remote(remote, slots);
        Ok(())
    }

    /// Promotes to the GPU the `wanted` experts in host memory that are worth it, and names the CPU's kernel class in
    /// the entries whose rows the CPU will compute.
    fn promote_for_batch(&mut self, batch: &mut InFlightBatch, wanted: impl Fn(ExpertId) -> bool) {
        if !self.has_cpu_offload() {
            return;
        }
        let layer = batch.batch.layer();
        let pairs = by_expert(batch.batch.routes()).into_iter();
        let needs = pairs.map(|(index, pairs)| (ExpertId { layer, index }, pairs.len()));
        let needs: Vec<_> = needs.filter(|(id, _)| wanted(*id)).collect();
        let on_cpu = self.promote(&needs, batch.batch.routes().len());
        batch.each_route(|entry, route| {
            let id = ExpertId { layer, index: route.expert };
            if let Some(precision) = self.precision(id).filter(|_| on_cpu.contains(&id)) {
                entry.advanced.note_class(format!("{}/{precision}", CpuOffload::class()));
            }
        });
    }

    /// Notes that experts from disk were computed, so that they may be evicted.
    fn note_computed(&mut self, batch: &Batch, layer: &mut PendingLayer, claim: ClaimId, ids: &[ExpertId]) {
        let pairs = by_expert(batch.routes());
        let rows = batch.routes().len() as f64;
        let share = |id: &ExpertId| pairs.get(&id.index).map_or(0.0, |pairs| pairs.len() as f64 / rows);
        self.computed(claim, &ids.iter().map(|id| (*id, share(id))).collect::<Vec<_>>());
        for id in ids {
            layer.from_disk.remove(id);
        }
    }

    /// Predicts which experts layer `next` will need, and prefetches them, while this layer waits for its own. A layer
    /// that does not wait predicts nothing: the next layer's router decides as soon.
    fn predict_layer(
        &mut self,
        batch: &mut InFlightBatch,
        next: usize,
        layer: &PendingLayer,
    ) -> Result<(), EngineError> {
        let measured = self.state.options.measure_recall;
        let (waits, nearly_all) = (layer.is_waiting() && self.predicts(), self.needs_nearly_all(batch));
        batch.prediction.layer = next;
        if measured {
            batch.prediction.early = self.predict(&batch.batch, &layer.outputs.shared_alone())?;
        }
        if waits && (measured || !nearly_all) {
            batch.prediction.late = self.predict(&batch.batch, &layer.outputs)?;
            if !nearly_all {
                let experts = by_weight(&batch.prediction.late);
                self.prefetch(batch, next, &experts);
                self.promote_predicted(&ids(next, &experts));
            }
        }
        Ok(())
    }

    /// Predicts from the `known` outputs of this layer which experts a batch's rows will need in the next layer with
    /// experts.
    fn predict(&mut self, batch: &Batch, known: &LayerOutputs) -> Result<Vec<Vec<Route>>, EngineError> {
        let predictor = self.state.options.predictor;
        self.compute(|executor| Ok(predictor.predict(&mut executor.context()?, batch, known)))
    }

    fn prefetch(&mut self, batch: &mut InFlightBatch, layer: usize, experts: &[u16]) {
        if let Some(claim) = batch.claim.or_else(|| self.claim()) {
            batch.claim = Some(claim);
            self.prefetch_from_disk(claim, &ids(layer, experts));
        }
    }

    /// Whether a batch has so many rows that they will be routed to most experts of any layer.
    fn needs_nearly_all(&self, batch: &InFlightBatch) -> bool {
        let config = &self.state.config;
        batch.rows() * config.num_experts_per_tok >= 2 * config.num_experts
    }

    /// Counts how many of the layer's routes had been predicted.
    fn note_recall(&self, batch: &mut InFlightBatch) {
        let layer = usize::from(batch.batch.layer());
        let recall = batch.take_recall(self.state.options.measure_recall);
        if recall != LayerRecall::default() {
            self.state.meter.update(|stats| {
                stats.recall.resize(stats.recall.len().max(layer + 1), Default::default());
                stats.recall[layer].add(&recall);
            });
        }
    }

    /// Counts the layer's pairs as computed here and shows its routes to the entries that watch them. The experts that
    /// are not held here, and those that come from disk.
    fn note_routes(&self, batch: &mut InFlightBatch) -> (BTreeSet<u16>, BTreeSet<ExpertId>) {
        let layer = batch.batch.layer();
        let (mut absent, mut from_disk) = (BTreeSet::new(), BTreeSet::new());
        batch.each_route(|entry, route| {
            let id = ExpertId { layer, index: route.expert };
            match self.precision(id) {
                Some(precision) => _ = entry.advanced.precisions.insert(precision),
                None => _ = absent.insert(route.expert),
            }
            if self.comes_from_disk(id) {
                from_disk.insert(id);
            }
            entry.advanced.pairs_here += 1;
        });
        batch.show_routes();
        (absent, from_disk)
    }
}

fn ids(layer: usize, experts: &[u16]) -> Vec<ExpertId> {
    experts.iter().map(|index| ExpertId { layer: layer as u16, index: *index }).collect()
}
