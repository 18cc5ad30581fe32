//! The decoder, sans I/O: a batch of rows of several sessions on its way through the layers.
//!
//! Owns [`Flight`]: [`begin`](Flight::begin) takes pieces of sessions (tokens, and the pages their keys and values lie
//! on) and runs until experts are needed; `run` computes those that are given to it,
//! [`resume`](Flight::resume) takes the outputs of all and goes on, layer by layer, until there are logits. A layer
//! without experts is computed without stopping. Every weight is read once for all rows. A flight never knows where an
//! expert is, so latency, loss and replicas are tested with plain values; which rows fly together is the scheduler's
//! business.
//!
//! Exactness lives here: a row's expert outputs are weighted and added in ascending expert index, starting from zero,
//! then the gated shared expert, then the residual. No row's bits depend on the others aboard. A flight of at most
//! [`CHUNK_ROWS`] rows bounds buffers and frames. Misuse is an error that leaves everything as it was, and a flight that
//! is dropped has changed nothing but positions behind the `past` of its pieces.

use burn::tensor::Tensor;

use crate::{
    config::ModelConfig,
    experts::{ExpertCall, by_expert},
    kernels::{CacheShape, ExpertWork, Gated, Kernels, Rows, Span, download, math},
    rope::Angles,
    router::{Route, route},
    tiers::ReadError,
    trunk::{FeedForward, Layer, Projection, Trunk},
};

/// Most rows computed at once; a longer input is split, which bounds buffers and frames.
pub const CHUNK_ROWS: usize = 256;

/// The keys and values of all sessions of a device.
pub struct KvCache<K: Kernels> {
    shape: CacheShape,
    memory: K::Cache,
}

impl<K: Kernels> KvCache<K> {
    /// An empty cache of `pages` pages, all reserved now.
    pub fn new(kernels: &K, config: &ModelConfig, pages: usize, page_tokens: usize) -> Self {
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

/// A kernel class with the trunk it computes and its cache: what a flight borrows while it runs.
pub struct Core<'a, K: Kernels> {
    pub kernels: &'a mut K,
    pub trunk: &'a Trunk<K>,
    pub cache: &'a mut KvCache<K>,
}

/// Which rows of an input logits are wanted of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// None: the input goes on later.
    Nothing,
    /// The last: `[vocab]`.
    Last,
    /// All: `[n, vocab]`. The caller bounds n; the result takes 4 * n * vocab bytes.
    All,
}

/// Tokens of one session in a flight, at the positions `past..`. No two pieces of a flight, nor of flights that overlap,
/// may share a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub tokens: Vec<u32>,
    /// Tokens of the session whose keys and values are stored already.
    pub past: usize,
    /// Its pages, in the order of positions.
    pub pages: Vec<u32>,
    pub want: Want,
}

/// Outputs of the experts of a layer, as they come.
#[derive(Clone, Debug, PartialEq)]
pub struct Outputs {
    /// `[rows of output, d]`
    values: Vec<f32>,
    /// Of each slot, its row in `values`; [`MISSING`] until there is one.
    places: Vec<u32>,
    /// Where the shared expert's rows begin, if they are among them.
    shared: Option<u32>,
}

const MISSING: u32 = u32::MAX;

impl Outputs {
    /// The same without any of the layer's own: at most the shared expert's.
    pub(crate) fn shared_alone(&self) -> Self {
        Self { places: vec![MISSING; self.places.len()], ..self.clone() }
    }

    /// Outputs of all slots, `[slots, d]`.
    pub fn whole(values: Vec<f32>, d: usize) -> Self {
        let places = (0..(values.len() / d) as u32).collect();
        Self { values, places, shared: None }
    }

    /// Adds what others have.
    pub(crate) fn join(&mut self, others: Self, d: usize) {
        let first = (self.values.len() / d) as u32;
        self.values.extend(others.values);
        for (place, other) in self.places.iter_mut().zip(others.places).filter(|(_, other)| *other != MISSING) {
            *place = first + other;
        }
    }

    /// Adds `values [slots.len(), d]`.
    pub fn add(&mut self, slots: &[u32], values: &[f32]) {
        let d = values.len() / slots.len().max(1);
        let first = (self.values.len() / d.max(1)) as u32;
        self.values.extend_from_slice(values);
        for (slot, place) in slots.iter().zip(first..) {
            self.places[*slot as usize] = place;
        }
    }
}

/// Outputs that a device was told to compute.
pub(crate) struct Running<K: Kernels> {
    values: Option<Rows<K>>,
    places: Vec<u32>,
    shared: Option<u32>,
}

impl<K: Kernels> Running<K> {
    /// Waits for them.
    pub(crate) fn outputs(self) -> Outputs {
        let Self { values, places, shared } = self;
        Outputs { values: values.map_or_else(Vec::new, download), places, shared }
    }
}

/// What a flight needs or has.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// The outputs of the experts of [`Flight::routes`].
    NeedExperts,
    /// The flight has ended: for each piece its logits, as wanted.
    Logits(Vec<Vec<f32>>),
}

/// Misuse. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("no tokens to advance by")]
    Empty,
    #[error("token {token} is outside the vocabulary of {vocab}")]
    Token { token: u32, vocab: usize },
    #[error("{wanted} more tokens do not fit: {used} of the {capacity} reserved are in use")]
    CacheFull { used: usize, wanted: usize, capacity: usize },
    #[error("{rows} rows at once, at most {CHUNK_ROWS} are computed together")]
    Rows { rows: usize },
    #[error("page {page} is none of the {pages} there are")]
    Page { page: u32, pages: usize },
    #[error("no experts are awaited")]
    NotPending,
    #[error("{found} expert outputs given, {expected} needed")]
    Outputs { expected: usize, found: usize },
    #[error("cannot go back to {wanted} tokens: only {used} are in use")]
    Truncate { wanted: usize, used: usize },
    #[error("the embedding of token {token} cannot be read: {why}")]
    Embedding { token: u32, why: ReadError },
}

/// Whether a session of `capacity` tokens, `used` of which are in use, can be advanced by `tokens`.
pub fn check_tokens(config: &ModelConfig, used: usize, capacity: usize, tokens: &[u32]) -> Result<(), DecodeError> {
    let (wanted, vocab) = (tokens.len(), config.vocab_size);
    if tokens.is_empty() {
        return Err(DecodeError::Empty);
    }
    if wanted > capacity.saturating_sub(used) {
        return Err(DecodeError::CacheFull { used, wanted, capacity });
    }
    match tokens.iter().find(|token| **token as usize >= vocab) {
        Some(token) => Err(DecodeError::Token { token: *token, vocab }),
        None => Ok(()),
    }
}

/// Rows on their way through the layers.
pub struct Flight<K: Kernels> {
    pieces: Vec<Piece>,
    /// Of each row's position.
    angles: Angles,
    layer: usize,
    /// After attention: what the layer's output is added to, `[n, d]`.
    residual: Rows<K>,
    /// The same, normed: what experts see, `[n, d]`.
    normed: Rows<K>,
    /// Empty once the flight has ended.
    routes: Vec<Vec<Route>>,
}

impl<K: Kernels> Flight<K> {
    /// Takes off with `pieces` and computes until experts are needed.
    pub fn begin(core: &mut Core<'_, K>, pieces: Vec<Piece>) -> Result<(Self, Step), DecodeError> {
        check(core, &pieces)?;
        let d = core.trunk.config.hidden_size;
        let tokens = pieces.iter().flat_map(|piece| &piece.tokens);
        let mut rows = vec![0.0; tokens.clone().count() * d];
        for (token, row) in tokens.zip(rows.chunks_exact_mut(d)) {
            let read = core.trunk.embed.widen_row(*token as usize, row);
            read.map_err(|why| DecodeError::Embedding { token: *token, why })?;
        }
        let positions = pieces.iter().flat_map(|piece| piece.past..piece.past + piece.tokens.len());
        let angles = core.trunk.rope.angles(positions);
        let hidden = core.kernels.upload(rows, d);
        let mut flight =
            Self { pieces, angles, layer: 0, residual: hidden.clone(), normed: hidden, routes: Vec::new() };
        let step = flight.go_on(core);
        Ok((flight, step))
    }

    /// The layer whose experts are awaited.
    pub fn layer(&self) -> u16 {
        self.layer as u16
    }

    /// For each row the experts it awaits, ascending; nothing once the flight has ended.
    pub fn routes(&self) -> &[Vec<Route>] {
        &self.routes
    }

    /// The pieces aboard, whose rows follow one another.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// What the layer's output will be added to, `[n, d]`.
    pub(crate) fn residual(&self) -> Vec<f32> {
        download(self.residual.clone())
    }

    /// All that is awaited, as plain values.
    pub fn call(&self) -> ExpertCall {
        let rows = self.rows();
        ExpertCall { layer: self.layer(), hidden: self.normed.dims()[1], rows, routes: self.routes.clone() }
    }

    /// What experts see, `[n, d]`.
    pub(crate) fn rows(&self) -> Vec<f32> {
        download(self.normed.clone())
    }

    /// Computes those of the awaited experts that `held` has, and if so wanted the shared one with them. The device is
    /// told, and not waited for.
    pub(crate) fn run<'e>(
        &self,
        core: &mut Core<'_, K>,
        held: impl Fn(u16) -> Option<&'e Gated<K::Matrix>>,
        shared: bool,
    ) -> Running<K> {
        let shared = match core.trunk.layers.get(self.layer).map(|layer| &layer.feed_forward) {
            Some(FeedForward::Sparse { shared: Some(expert), .. }) if shared => Some(&expert.expert),
            _ => None,
        };
        let pairs = by_expert(&self.routes);
        let held: Vec<_> = pairs.iter().filter_map(|(index, pairs)| Some((held(*index)?, pairs))).collect();
        let rows: Vec<Vec<u32>> = held.iter().map(|(_, pairs)| pairs.iter().map(|pair| pair.row).collect()).collect();
        let all: Vec<u32> = (0..self.routes.len() as u32).collect();
        let work = held.iter().zip(&rows).map(|((expert, _), rows)| ExpertWork { expert: *expert, rows });
        let work: Vec<_> = work.chain(shared.map(|expert| ExpertWork { expert, rows: &all })).collect();
        let slots: Vec<u32> = held.iter().flat_map(|(_, pairs)| *pairs).map(|pair| pair.slot).collect();
        let mut places = vec![MISSING; self.routes.iter().map(Vec::len).sum()];
        for (slot, place) in slots.iter().zip(0..) {
            places[*slot as usize] = place;
        }
        let values = (!work.is_empty()).then(|| core.kernels.experts(&self.normed, &work));
        Running { values, places, shared: shared.map(|_| slots.len() as u32) }
    }

    /// What the next layer with experts would choose for each row if the awaited experts had no other outputs than
    /// `known`; nothing if there is no such layer. A flight of its own goes there, through the very attention that this
    /// one will: it leaves keys and values where this one will write its own before it reads them.
    pub(crate) fn routes_ahead(&self, core: &mut Core<'_, K>, known: &Outputs) -> Vec<Vec<Route>> {
        let mut ahead = Self {
            pieces: self.pieces.iter().map(|piece| Piece { want: Want::Nothing, ..piece.clone() }).collect(),
            angles: self.angles.clone(),
            layer: self.layer + 1,
            residual: self.finish_layer(core, known),
            normed: self.normed.clone(),
            routes: Vec::new(),
        };
        ahead.go_on(core);
        ahead.routes
    }

    /// Takes the outputs of all awaited experts and computes on.
    pub fn resume(&mut self, core: &mut Core<'_, K>, outputs: Outputs) -> Result<Step, DecodeError> {
        if self.routes.is_empty() {
            return Err(DecodeError::NotPending);
        }
        let (expected, d) = (self.routes.iter().map(Vec::len).sum(), core.trunk.config.hidden_size);
        let rows = outputs.values.len() / d;
        let found = outputs.places.iter().filter(|place| (**place as usize) < rows).count();
        if found != expected || outputs.places.len() != expected || outputs.values.len() != rows * d {
            return Err(DecodeError::Outputs { expected, found });
        }
        self.residual = self.finish_layer(core, &outputs);
        self.layer += 1;
        Ok(self.go_on(core))
    }

    /// Layer after layer over `residual`, until one needs experts or all are done.
    fn go_on(&mut self, core: &mut Core<'_, K>) -> Step {
        let trunk = core.trunk;
        let config = &trunk.config;
        while let Some(layer) = trunk.layers.get(self.layer) {
            let residual = self.residual.clone() + self.attend(core, layer);
            self.normed = core.kernels.rms_norm(&residual, &layer.post_attention_norm, config.rms_norm_eps);
            match &layer.feed_forward {
                FeedForward::Dense(block) => {
                    self.residual = residual + every_row(core.kernels, &self.normed, block);
                    self.layer += 1;
                }
                FeedForward::Sparse { router, .. } => {
                    self.residual = residual;
                    self.routes = routes(config, download(core.kernels.linear(&self.normed, router, None)));
                    return Step::NeedExperts;
                }
            }
        }
        self.routes.clear();
        Step::Logits(self.logits(core))
    }

    fn attend(&self, core: &mut Core<'_, K>, layer: &Layer<K>) -> Rows<K> {
        let Core { kernels, trunk, cache } = core;
        let config = &trunk.config;
        let x = kernels.rms_norm(&self.residual, &layer.input_norm, config.rms_norm_eps);
        let projections = [&layer.q, &layer.k, &layer.v];
        let rows = kernels.linears(&x, &projections.map(|p| (&p.matrix, p.bias.as_ref())));
        let mut rows = projections.into_iter().zip(rows).map(|(p, rows)| finish_projection(*kernels, config, p, rows));
        let [q, k, v] = std::array::from_fn(|_| rows.next().expect("one output for each matrix"));
        let (q, k) = (kernels.rotate(q, &self.angles), kernels.rotate(k, &self.angles));
        let spans: Vec<Span<'_>> = self.pieces.iter().map(Piece::span).collect();
        kernels.append(&mut cache.memory, self.layer, &spans, k, v);
        let mixed = kernels.attention(q, &cache.memory, self.layer, &spans);
        kernels.linear(&mixed, &layer.o.matrix, layer.o.bias.as_ref())
    }

    /// `residual + (sum of weighted expert outputs, ascending) + shared expert`, `[n, d]`, where missing outputs are none.
    fn finish_layer(&self, core: &mut Core<'_, K>, outputs: &Outputs) -> Rows<K> {
        let Core { kernels, trunk, .. } = core;
        let d = trunk.config.hidden_size;
        let Outputs { values, places, shared: shared_rows } = outputs;
        let mut mixed = vec![0.0; self.routes.len() * d];
        let mut places = places.iter();
        for (routes, mixed) in self.routes.iter().zip(mixed.chunks_exact_mut(d)) {
            for (route, place) in routes.iter().zip(&mut places).filter(|(_, place)| **place != MISSING) {
                for (mixed, value) in mixed.iter_mut().zip(&values[*place as usize * d..]) {
                    *mixed += route.weight * value;
                }
            }
        }
        if let FeedForward::Sparse { shared: Some(shared), .. } = &trunk.layers[self.layer].feed_forward {
            let alone = shared_rows.is_none().then(|| download(every_row(*kernels, &self.normed, &shared.expert)));
            let output = match &alone {
                Some(output) => output,
                None => &values[shared_rows.unwrap_or(0) as usize * d..],
            };
            let gate = download(kernels.linear(&self.normed, &shared.gate, None));
            for ((mixed, output), gate) in mixed.chunks_exact_mut(d).zip(output.chunks_exact(d)).zip(gate) {
                let gate = math::sigmoid(gate);
                for (mixed, value) in mixed.iter_mut().zip(output) {
                    *mixed += value * gate;
                }
            }
        }
        self.residual.clone() + kernels.upload(mixed, d)
    }

    /// After the last layer: the wanted logits of each piece.
    fn logits(&self, core: &mut Core<'_, K>) -> Vec<Vec<f32>> {
        let Core { kernels, trunk, .. } = core;
        let mut first = 0;
        let wanted = self.pieces.iter().map(|piece| {
            let rows = piece.tokens.len();
            first += rows;
            match piece.want {
                Want::Nothing => (first, 0),
                Want::Last => (first - 1, 1),
                Want::All => (first - rows, rows),
            }
        });
        let wanted: Vec<(usize, usize)> = wanted.collect();
        let rows: Vec<_> = wanted.iter().filter(|(_, count)| *count > 0).collect();
        if rows.is_empty() {
            return vec![Vec::new(); wanted.len()];
        }
        let rows = rows.into_iter().map(|(first, count)| self.residual.clone().narrow(0, *first, *count));
        let hidden = Tensor::cat(rows.collect(), 0);
        let normed = kernels.rms_norm(&hidden, &trunk.norm, trunk.config.rms_norm_eps);
        let values = download(kernels.linear(&normed, &trunk.head, None));
        let mut values = values.as_slice();
        let split = wanted.iter().map(|(_, count)| {
            let (mine, rest) = values.split_at(count * trunk.config.vocab_size);
            values = rest;
            mine.to_vec()
        });
        split.collect()
    }
}

/// Routes of rows with these `scores`, `[n, num_experts]`.
fn routes(config: &ModelConfig, mut scores: Vec<f32>) -> Vec<Vec<Route>> {
    let rows = scores.chunks_exact_mut(config.num_experts);
    rows.map(|scores| route(scores, config.num_experts_per_tok, config.norm_topk_prob)).collect()
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

/// A gated block over every row of `x`.
fn every_row<K: Kernels>(kernels: &mut K, x: &Rows<K>, block: &Gated<K::Matrix>) -> Rows<K> {
    let rows: Vec<u32> = (0..x.dims()[0] as u32).collect();
    kernels.experts(x, &[ExpertWork { expert: block, rows: &rows }])
}

impl Piece {
    fn span(&self) -> Span<'_> {
        Span { rows: self.tokens.len(), past: self.past, pages: &self.pages }
    }
}

fn check<K: Kernels>(core: &Core<'_, K>, pieces: &[Piece]) -> Result<(), DecodeError> {
    let shape = core.cache.shape;
    let rows = pieces.iter().map(|piece| piece.tokens.len()).sum();
    if rows == 0 {
        return Err(DecodeError::Empty);
    }
    if rows > CHUNK_ROWS {
        return Err(DecodeError::Rows { rows });
    }
    for piece in pieces {
        let capacity = piece.pages.len() * shape.page_tokens;
        check_tokens(&core.trunk.config, piece.past, capacity, &piece.tokens)?;
        if let Some(page) = piece.pages.iter().find(|page| **page as usize >= shape.pages) {
            return Err(DecodeError::Page { page: *page, pages: shape.pages });
        }
    }
    Ok(())
}
