//! What computes a batch: one layer after the other, until experts are needed.
//!
//! Owns [`ForwardContext`], the kernels, trunk and KV cache that a batch borrows while it runs:
//! [`begin`](ForwardContext::begin) takes chunks and computes until experts are needed;
//! [`run_experts`](ForwardContext::run_experts) computes those that are given to it;
//! [`resume`](ForwardContext::resume) takes the outputs of all and goes on, layer by layer, until there are logits. A
//! layer without experts is computed without stopping. Every weight is read once for all rows. Experts come in as plain
//! values, so latency, loss and replicas are tested without a network.
//!
//! Exactness lives here: a row's expert outputs are weighted and added in ascending expert index, starting from zero,
//! then the gated shared expert, then the residual. No row's bits depend on the others of its batch. Misuse is an error
//! that leaves everything as it was.

use coel_kernels::{
    DeviceCache, DeviceExpert, DeviceRows, DeviceWork, DynKernels,
    kv::{CacheShape, Span},
    math,
};
use coel_weights::config::ModelConfig;

use super::{
    batch::{Batch, CHUNK_ROWS, DecodeError, SequenceChunk, Step, Want, check_tokens},
    expert_call::{ExpertCall, by_expert},
    outputs::{LayerOutputs, PendingOutputs},
    router::{Route, route},
    trunk::{FeedForward, Layer, Projection, Trunk},
};

/// The keys and values of all sessions of a device.
pub struct KvCache {
    shape: CacheShape,
    memory: DeviceCache,
}

impl KvCache {
    /// An empty cache of `pages` pages, all reserved now.
    pub fn new(kernels: &dyn DynKernels, config: &ModelConfig, pages: usize, page_tokens: usize) -> Self {
        let shape = CacheShape {
            layers: config.num_hidden_layers,
            pages,
            page_tokens,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        };
        Self { shape, memory: kernels.cache(shape) }
    }
}

/// Kernels with the trunk they compute and its cache.
pub struct ForwardContext<'a> {
    pub kernels: &'a mut dyn DynKernels,
    pub trunk: &'a Trunk,
    pub cache: &'a mut KvCache,
}

impl ForwardContext<'_> {
    /// Begins a batch of `chunks` and computes until experts are needed.
    pub fn begin(&mut self, chunks: Vec<SequenceChunk>) -> Result<(Batch, Step), DecodeError> {
        self.check(&chunks)?;
        let d = self.trunk.config.hidden_size;
        let tokens = chunks.iter().flat_map(|chunk| &chunk.tokens);
        let mut rows = vec![0.0; tokens.clone().count() * d];
        for (token, row) in tokens.zip(rows.chunks_exact_mut(d)) {
            let read = self.trunk.embed.widen_row(*token as usize, row);
            read.map_err(|why| DecodeError::Embedding { token: *token, why })?;
        }
        let positions = chunks.iter().flat_map(|chunk| chunk.past..chunk.past + chunk.tokens.len());
        let angles = self.trunk.rope.angles(positions);
        let hidden = self.kernels.upload(rows, d);
        let mut batch =
            Batch { chunks, angles, layer: 0, residual: hidden.clone(), normed: hidden, routes: Vec::new() };
        let step = self.compute_layers(&mut batch);
        Ok((batch, step))
    }

    /// What the layer's output will be added to, `[n, d]`.
    pub(crate) fn residual(&self, batch: &Batch) -> Vec<f32> {
        self.kernels.download(batch.residual.clone())
    }

    /// All experts that `batch` awaits, as plain values.
    pub fn call(&self, batch: &Batch) -> ExpertCall {
        let hidden = batch.normed.dims()[1];
        ExpertCall { layer: batch.layer(), hidden, rows: self.rows(batch), routes: batch.routes.clone() }
    }

    /// What experts see, `[n, d]`.
    pub(crate) fn rows(&self, batch: &Batch) -> Vec<f32> {
        self.kernels.download(batch.normed.clone())
    }

    /// Computes those of the awaited experts that `held` has, and if so wanted the shared one with them. The device is
    /// told, and not waited for.
    pub(crate) fn run_experts<'e>(
        &mut self,
        batch: &Batch,
        held: impl Fn(u16) -> Option<&'e DeviceExpert>,
        shared: bool,
    ) -> PendingOutputs {
        let shared = match self.trunk.layers.get(batch.layer).map(|layer| &layer.feed_forward) {
            Some(FeedForward::Sparse { shared: Some(expert), .. }) if shared => Some(&expert.expert),
            _ => None,
        };
        let pairs = by_expert(&batch.routes);
        let held: Vec<_> = pairs.iter().filter_map(|(index, pairs)| Some((held(*index)?, pairs))).collect();
        let rows: Vec<Vec<u32>> = held.iter().map(|(_, pairs)| pairs.iter().map(|pair| pair.row).collect()).collect();
        let all: Vec<u32> = (0..batch.routes.len() as u32).collect();
        let work = held.iter().zip(&rows).map(|((expert, _), rows)| DeviceWork { expert, rows });
        let work: Vec<_> = work.chain(shared.map(|expert| DeviceWork { expert, rows: &all })).collect();
        let slots: Vec<u32> = held.iter().flat_map(|(_, pairs)| *pairs).map(|pair| pair.slot).collect();
        let values = (!work.is_empty()).then(|| self.kernels.experts(&batch.normed, &work));
        PendingOutputs::new(values, &slots, batch.routes.iter().map(Vec::len).sum(), shared.is_some())
    }

    /// What the next layer with experts would choose for each row if the awaited experts had no other outputs than
    /// `known`; nothing if there is no such layer. A batch of its own goes there, through the very attention that this
    /// one will: it leaves keys and values where this one will write its own before it reads them.
    pub(crate) fn routes_ahead(&mut self, batch: &Batch, known: &LayerOutputs) -> Vec<Vec<Route>> {
        let chunk = |chunk: &SequenceChunk| SequenceChunk { want: Want::Nothing, ..chunk.clone() };
        let mut ahead = Batch {
            chunks: batch.chunks.iter().map(chunk).collect(),
            angles: batch.angles.clone(),
            layer: batch.layer + 1,
            residual: self.finish_layer(batch, known),
            normed: batch.normed.clone(),
            routes: Vec::new(),
        };
        self.compute_layers(&mut ahead);
        ahead.routes
    }

    /// Takes the outputs of all awaited experts and computes on.
    pub fn resume(&mut self, batch: &mut Batch, outputs: LayerOutputs) -> Result<Step, DecodeError> {
        if batch.routes.is_empty() {
            return Err(DecodeError::NotPending);
        }
        let (expected, d) = (batch.routes.iter().map(Vec::len).sum(), self.trunk.config.hidden_size);
        let found = outputs.found(d);
        if found != expected || outputs.slots() != expected || !outputs.values.len().is_multiple_of(d) {
            return Err(DecodeError::Outputs { expected, found });
        }
        batch.residual = self.finish_layer(batch, &outputs);
        batch.layer += 1;
        Ok(self.compute_layers(batch))
    }

    /// Layer after layer over the residual, until one needs experts or all are done.
    fn compute_layers(&mut self, batch: &mut Batch) -> Step {
        let trunk = self.trunk;
        let config = &trunk.config;
        let eps = config.rms_norm_eps;
        while let Some(layer) = trunk.layers.get(batch.layer) {
            let attended = self.attend(batch, layer);
            let residual = self.kernels.add(batch.residual.clone(), attended);
            batch.normed = self.kernels.rms_norm(&residual, &layer.post_attention_norm, eps);
            match &layer.feed_forward {
                FeedForward::Dense(block) => {
                    let output = self.every_row(&batch.normed, block);
                    batch.residual = self.kernels.add(residual, output);
                    batch.layer += 1;
                }
                FeedForward::Sparse { router, .. } => {
                    batch.residual = residual;
                    let scores = self.kernels.linear(&batch.normed, router, None);
                    batch.routes = routes(config, self.kernels.download(scores));
                    return Step::NeedExperts;
                }
            }
        }
        batch.routes.clear();
        Step::Logits(self.logits(batch))
    }

    fn attend(&mut self, batch: &Batch, layer: &Layer) -> DeviceRows {
        let Self { kernels, trunk, cache } = self;
        let config = &trunk.config;
        let x = kernels.rms_norm(&batch.residual, &layer.input_norm, config.rms_norm_eps);
        let projections = [&layer.q, &layer.k, &layer.v];
        let rows = kernels.linears(&x, &projections.map(|p| (&p.matrix, p.bias.as_ref())));
        let mut rows = projections.into_iter().zip(rows).map(|(p, rows)| finish_projection(*kernels, config, p, rows));
        let [q, k, v] = std::array::from_fn(|_| rows.next().expect("one output for each matrix"));
        let (q, k) = (kernels.rotate(q, &batch.angles), kernels.rotate(k, &batch.angles));
        let spans: Vec<Span<'_>> = batch.chunks.iter().map(SequenceChunk::span).collect();
        kernels.append(&mut cache.memory, batch.layer, &spans, k, v);
        let mixed = kernels.attention(q, &cache.memory, batch.layer, &spans);
        kernels.linear(&mixed, &layer.o.matrix, layer.o.bias.as_ref())
    }

    /// `residual + (sum of weighted expert outputs, ascending) + shared expert`, `[n, d]`; a missing output adds nothing.
    fn finish_layer(&mut self, batch: &Batch, outputs: &LayerOutputs) -> DeviceRows {
        let trunk = self.trunk;
        let d = trunk.config.hidden_size;
        let mut mixed = vec![0.0; batch.routes.len() * d];
        let mut rows = outputs.rows(d);
        for (routes, mixed) in batch.routes.iter().zip(mixed.chunks_exact_mut(d)) {
            for (route, output) in routes.iter().zip(&mut rows) {
                for (mixed, value) in mixed.iter_mut().zip(output.unwrap_or_default()) {
                    *mixed += route.weight * value;
                }
            }
        }
        if let FeedForward::Sparse { shared: Some(shared), .. } = &trunk.layers[batch.layer].feed_forward {
            let computed = match outputs.shared {
                Some(_) => None,
                None => {
                    let rows = self.every_row(&batch.normed, &shared.expert);
                    Some(self.kernels.download(rows))
                }
            };
            let output = match &computed {
                Some(output) => output,
                None => &outputs.values[outputs.shared.unwrap_or(0) as usize * d..],
            };
            let gate = self.kernels.linear(&batch.normed, &shared.gate, None);
            let gate = self.kernels.download(gate);
            for ((mixed, output), gate) in mixed.chunks_exact_mut(d).zip(output.chunks_exact(d)).zip(gate) {
                let gate = math::sigmoid(gate);
                for (mixed, value) in mixed.iter_mut().zip(output) {
                    *mixed += value * gate;
                }
            }
        }
        let mixed = self.kernels.upload(mixed, d);
        self.kernels.add(batch.residual.clone(), mixed)
    }

    /// After the last layer: the wanted logits of each chunk.
    fn logits(&mut self, batch: &Batch) -> Vec<Vec<f32>> {
        let Self { kernels, trunk, .. } = self;
        let config = &trunk.config;
        let mut first = 0;
        let wanted = batch.chunks.iter().map(|chunk| {
            let rows = chunk.tokens.len();
            first += rows;
            match chunk.want {
                Want::Nothing => (first, 0),
                Want::Last => (first - 1, 1),
                Want::All => (first - rows, rows),
            }
        });
        let wanted: Vec<(usize, usize)> = wanted.collect();
        let ranges: Vec<_> = wanted.iter().copied().filter(|(_, count)| *count > 0).collect();
        if ranges.is_empty() {
            return vec![Vec::new(); wanted.len()];
        }
        let hidden = kernels.select(&batch.residual, &ranges);
        let normed = kernels.rms_norm(&hidden, &trunk.norm, config.rms_norm_eps);
        let logits = kernels.linear(&normed, &trunk.head, None);
        let values = kernels.download(logits);
        let mut values = values.as_slice();
        let split = wanted.iter().map(|(_, count)| {
            let (mine, rest) = values.split_at(count * config.vocab_size);
            values = rest;
            mine.to_vec()
        });
        split.collect()
    }

    /// A gated block over every row of `x`.
    fn every_row(&mut self, x: &DeviceRows, block: &DeviceExpert) -> DeviceRows {
        let rows: Vec<u32> = (0..x.dims()[0] as u32).collect();
        self.kernels.experts(x, &[DeviceWork { expert: block, rows: &rows }])
    }

    fn check(&self, chunks: &[SequenceChunk]) -> Result<(), DecodeError> {
        let shape = self.cache.shape;
        let rows = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        if rows == 0 {
            return Err(DecodeError::Empty);
        }
        if rows > CHUNK_ROWS {
            return Err(DecodeError::Rows { rows });
        }
        for chunk in chunks {
            let capacity = chunk.pages.len() * shape.page_tokens;
            check_tokens(&self.trunk.config, chunk.past, capacity, &chunk.tokens)?;
            if let Some(page) = chunk.pages.iter().find(|page| **page as usize >= shape.pages) {
                return Err(DecodeError::Page { page: *page, pages: shape.pages });
            }
        }
        Ok(())
    }
}

/// Routes of rows with these `scores`, `[n, num_experts]`.
fn routes(config: &ModelConfig, mut scores: Vec<f32>) -> Vec<Vec<Route>> {
    let rows = scores.chunks_exact_mut(config.num_experts);
    rows.map(|scores| route(scores, config.num_experts_per_tok, config.norm_topk_prob)).collect()
}

/// What follows a projection of queries, keys or values `[n, width]`: norm and clipping, where the family has them.
fn finish_projection(
    kernels: &mut dyn DynKernels,
    config: &ModelConfig,
    projection: &Projection,
    mut rows: DeviceRows,
) -> DeviceRows {
    if let Some(norm) = &projection.norm {
        rows = kernels.rms_norm(&rows, norm, config.rms_norm_eps);
    }
    match config.clip_qkv {
        Some(limit) => kernels.clamp(rows, limit),
        None => rows,
    }
}
