//! The decoder of one session, sans I/O.
//!
//! Owns [`Decoder`]: the KV cache of one token sequence and the point where its computation waits for experts.
//! [`advance`](Decoder::advance) takes tokens and runs until experts are needed; [`resume`](Decoder::resume) takes
//! their outputs and goes on, layer by layer, until there are logits. It never knows where an expert is, so latency,
//! loss and replicas are tested with plain values. A layer without experts is computed without stopping.
//!
//! Exactness lives here: a row's expert outputs are weighted and added in ascending expert index, starting from zero,
//! then the gated shared expert, then the residual. Input is computed in chunks of at most [`CHUNK_ROWS`] rows, whose
//! boundaries change no bit. Misuse is an error that leaves the decoder as it was.

use burn::tensor::Tensor;

use crate::{
    config::ModelConfig,
    experts::ExpertCall,
    kernels::{CacheShape, ExpertWork, Gated, Kernels, Rows, download, math},
    router::{Route, route},
    trunk::{FeedForward, Layer, Projection, Trunk},
};

/// Most rows computed at once; a longer input is split, which bounds buffers and frames.
pub const CHUNK_ROWS: usize = 256;

/// A kernel class with the trunk it computes: what a decoder borrows while it runs.
pub struct Core<'a, K: Kernels> {
    pub kernels: &'a mut K,
    pub trunk: &'a Trunk<K>,
}

/// Which rows of the input logits are wanted of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// The last: `[vocab]`.
    Last,
    /// All: `[n, vocab]`. The caller bounds n; the result takes 4 * n * vocab bytes.
    All,
}

/// What the decoder needs or has.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Outputs of these experts, for [`Decoder::resume`].
    NeedExperts(ExpertCall),
    /// Logits of the input, as wanted.
    Logits(Vec<f32>),
}

/// Misuse of a decoder. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("no tokens to advance by")]
    Empty,
    #[error("token {token} is outside the vocabulary of {vocab}")]
    Token { token: u32, vocab: usize },
    #[error("{wanted} more tokens do not fit: {used} of the {capacity} reserved are in use")]
    CacheFull { used: usize, wanted: usize, capacity: usize },
    #[error("experts of layer {layer} are still awaited")]
    Pending { layer: usize },
    #[error("no experts are awaited")]
    NotPending,
    #[error("{found} expert output values given, {expected} needed")]
    Outputs { expected: usize, found: usize },
    #[error("cannot go back to {wanted} tokens: only {used} are in use")]
    Truncate { wanted: usize, used: usize },
}

/// One chunk on its way through the layers.
struct InFlight<K: Kernels> {
    layer: usize,
    /// After attention: what the layer's output is added to, `[n, d]`.
    residual: Rows<K>,
    /// The same, normed: what experts see, `[n, d]`.
    normed: Rows<K>,
    routes: Vec<Vec<Route>>,
    /// Input after this chunk.
    rest: Vec<u32>,
    want: Want,
    /// Logits of earlier chunks, if all are wanted.
    logits: Vec<f32>,
}

/// One session's cache and state.
pub struct Decoder<K: Kernels> {
    cache: K::Cache,
    capacity: usize,
    used: usize,
    in_flight: Option<InFlight<K>>,
}

impl<K: Kernels> Decoder<K> {
    /// A session with room for `capacity` tokens, all reserved now.
    pub fn new(kernels: &K, trunk: &Trunk<K>, capacity: usize) -> Self {
        let config = trunk.config();
        let shape = CacheShape {
            layers: config.num_hidden_layers,
            capacity,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        };
        Self { cache: kernels.cache(shape), capacity, used: 0, in_flight: None }
    }

    /// Tokens whose keys and values are stored.
    pub fn used(&self) -> usize {
        self.used
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all but the first `used` tokens, and any awaited experts.
    pub fn truncate(&mut self, used: usize) -> Result<(), DecodeError> {
        if used > self.used {
            return Err(DecodeError::Truncate { wanted: used, used: self.used });
        }
        (self.used, self.in_flight) = (used, None);
        Ok(())
    }

    /// Appends `tokens` and computes until experts are needed.
    pub fn advance(&mut self, core: &mut Core<'_, K>, tokens: &[u32], want: Want) -> Result<Step, DecodeError> {
        let vocab = core.trunk.config.vocab_size;
        if let Some(in_flight) = &self.in_flight {
            return Err(DecodeError::Pending { layer: in_flight.layer });
        }
        if tokens.is_empty() {
            return Err(DecodeError::Empty);
        }
        if tokens.len() > self.capacity - self.used {
            let (used, wanted, capacity) = (self.used, tokens.len(), self.capacity);
            return Err(DecodeError::CacheFull { used, wanted, capacity });
        }
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab) {
            return Err(DecodeError::Token { token: *token, vocab });
        }
        Ok(self.begin_chunk(core, tokens, want, Vec::new()))
    }

    /// Takes the outputs of the awaited experts, `[slots, d]` in route order, and computes on.
    pub fn resume(&mut self, core: &mut Core<'_, K>, outputs: &[f32]) -> Result<Step, DecodeError> {
        let in_flight = self.in_flight.as_ref().ok_or(DecodeError::NotPending)?;
        let slots: usize = in_flight.routes.iter().map(Vec::len).sum();
        let expected = slots * core.trunk.config.hidden_size;
        if outputs.len() != expected {
            return Err(DecodeError::Outputs { expected, found: outputs.len() });
        }
        let mut in_flight = self.in_flight.take().expect("seen above");
        in_flight.residual = in_flight.finish_layer(core, outputs);
        in_flight.layer += 1;
        Ok(self.compute(core, in_flight))
    }

    fn begin_chunk(&mut self, core: &mut Core<'_, K>, tokens: &[u32], want: Want, logits: Vec<f32>) -> Step {
        let (chunk, rest) = tokens.split_at(tokens.len().min(CHUNK_ROWS));
        let d = core.trunk.config.hidden_size;
        let mut rows = vec![0.0; chunk.len() * d];
        for (token, row) in chunk.iter().zip(rows.chunks_exact_mut(d)) {
            core.trunk.embed.widen_row(*token as usize, row);
        }
        let hidden = core.kernels.upload(rows, d);
        let in_flight = InFlight {
            layer: 0,
            residual: hidden.clone(),
            normed: hidden,
            routes: Vec::new(),
            rest: rest.to_vec(),
            want,
            logits,
        };
        self.compute(core, in_flight)
    }

    /// Layer after layer over `in_flight.residual`, until one needs experts or all are done.
    fn compute(&mut self, core: &mut Core<'_, K>, mut in_flight: InFlight<K>) -> Step {
        let Core { kernels, trunk } = core;
        let config = &trunk.config;
        while let Some(layer) = trunk.layers.get(in_flight.layer) {
            let attended = self.attend(kernels, trunk, layer, &in_flight);
            let residual = in_flight.residual + attended;
            let normed = kernels.rms_norm(&residual, &layer.post_attention_norm, config.rms_norm_eps);
            match &layer.feed_forward {
                FeedForward::Dense(block) => {
                    in_flight.residual = residual + feed_forward(*kernels, &normed, block);
                    in_flight.layer += 1;
                }
                FeedForward::Sparse { router, .. } => {
                    let mut scores = download(kernels.linear(&normed, router, None));
                    let routes = scores
                        .chunks_exact_mut(config.num_experts)
                        .map(|scores| route(scores, config.num_experts_per_tok, config.norm_topk_prob))
                        .collect::<Vec<_>>();
                    let call = ExpertCall {
                        layer: in_flight.layer as u16,
                        hidden: config.hidden_size,
                        rows: download(normed.clone()),
                        routes: routes.clone(),
                    };
                    (in_flight.residual, in_flight.normed, in_flight.routes) = (residual, normed, routes);
                    self.in_flight = Some(in_flight);
                    return Step::NeedExperts(call);
                }
            }
        }
        self.finish_chunk(core, in_flight)
    }

    fn attend(&mut self, kernels: &mut K, trunk: &Trunk<K>, layer: &Layer<K>, in_flight: &InFlight<K>) -> Rows<K> {
        let config = &trunk.config;
        let x = kernels.rms_norm(&in_flight.residual, &layer.input_norm, config.rms_norm_eps);
        let angles = trunk.rope.angles(self.used, x.dims()[0]);
        let projections = [&layer.q, &layer.k, &layer.v];
        let rows = kernels.linears(&x, &projections.map(|p| (&p.matrix, p.bias.as_ref())));
        let mut rows = projections.into_iter().zip(rows).map(|(p, rows)| finish_projection(kernels, config, p, rows));
        let [q, k, v] = std::array::from_fn(|_| rows.next().expect("one output for each matrix"));
        let (q, k) = (kernels.rotate(q, &angles), kernels.rotate(k, &angles));
        kernels.append(&mut self.cache, in_flight.layer, self.used, k, v);
        let mixed = kernels.attention(q, &self.cache, in_flight.layer, self.used);
        kernels.linear(&mixed, &layer.o.matrix, layer.o.bias.as_ref())
    }

    /// After the last layer: the wanted logits, and the next chunk if there is one.
    fn finish_chunk(&mut self, core: &mut Core<'_, K>, in_flight: InFlight<K>) -> Step {
        let InFlight { residual: hidden, rest, want, mut logits, .. } = in_flight;
        let n = hidden.dims()[0];
        self.used += n;
        let wanted = match want {
            Want::All => Some(hidden),
            Want::Last if rest.is_empty() => Some(hidden.narrow(0, n - 1, 1)),
            Want::Last => None,
        };
        if let Some(hidden) = wanted {
            let Core { kernels, trunk } = core;
            let normed = kernels.rms_norm(&hidden, &trunk.norm, trunk.config.rms_norm_eps);
            let values = download(kernels.linear(&normed, &trunk.head, None));
            match logits.is_empty() {
                true => logits = values,
                false => logits.extend_from_slice(&values),
            }
        }
        match rest.is_empty() {
            true => Step::Logits(logits),
            false => self.begin_chunk(core, &rest, want, logits),
        }
    }
}

/// What follows a projection of queries, keys or values `[n, width]`: norm and clipping, where the family has them.
fn finish_projection<K: Kernels>(
    kernels: &mut K,
    config: &ModelConfig,
    projection: &Projection<K>,
    mut rows: Rows<K>,
) -> Rows<K> {
    if let Some(norm) = &projection.norm {
        let [n, width] = rows.dims();
        let parts = rows.reshape([n * width / norm.width, norm.width]);
        rows = kernels.rms_norm(&parts, &norm.weight, config.rms_norm_eps).reshape([n, width]);
    }
    match config.clip_qkv {
        Some(limit) => rows.clamp(-limit, limit),
        None => rows,
    }
}

/// A gated block over every row.
fn feed_forward<K: Kernels>(kernels: &mut K, x: &Rows<K>, expert: &Gated<K::Matrix>) -> Rows<K> {
    let rows: Vec<u32> = (0..x.dims()[0] as u32).collect();
    kernels.experts(x, &[ExpertWork { expert, rows: &rows }])
}

impl<K: Kernels> InFlight<K> {
    /// `residual + (sum of weighted expert outputs, ascending) + shared expert`, `[n, d]`.
    fn finish_layer(&self, core: &mut Core<'_, K>, outputs: &[f32]) -> Rows<K> {
        let Core { kernels, trunk } = core;
        let d = trunk.config.hidden_size;
        let mut mixed = vec![0.0; self.routes.len() * d];
        let mut outputs = outputs.chunks_exact(d);
        for (routes, mixed) in self.routes.iter().zip(mixed.chunks_exact_mut(d)) {
            for (route, output) in routes.iter().zip(&mut outputs) {
                for (mixed, value) in mixed.iter_mut().zip(output) {
                    *mixed += route.weight * value;
                }
            }
        }
        let mut mixed = kernels.upload(mixed, d);
        if let FeedForward::Sparse { shared: Some(shared), .. } = &trunk.layers[self.layer].feed_forward {
            let output = feed_forward(*kernels, &self.normed, &shared.expert);
            let mut gate = download(kernels.linear(&self.normed, &shared.gate, None));
            gate.iter_mut().for_each(|value| *value = math::sigmoid(*value));
            let gate: Tensor<K::Backend, 2> = kernels.upload(gate, 1);
            mixed = mixed + output * gate;
        }
        self.residual.clone() + mixed
    }
}
