//! A batch of rows of several sessions on its way through the layers.
//!
//! Owns [`SequenceChunk`] (tokens of one session, and the pages their keys and values lie on) and [`Batch`], plain state
//! that [`forward`](super::forward) computes on. A batch of at most [`CHUNK_ROWS`] rows bounds buffers and frames. The
//! invariant: a batch that is dropped has changed nothing but cache positions behind the `past` of its chunks. It does
//! not know where an expert is, nor which sessions its chunks belong to.

use coel_kernels::{DeviceRows, angles::Angles, kv::Span};
use coel_weights::{config::ModelConfig, memory::ReadError};

use super::router::Route;

/// Most rows computed at once; a longer input is split, which bounds buffers and frames.
pub const CHUNK_ROWS: usize = 256;

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

/// Tokens of one session in a batch, at the positions `past..`. No two chunks of a batch, nor of batches that overlap,
/// may share a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceChunk {
    pub tokens: Vec<u32>,
    /// Tokens of the session whose keys and values are stored already.
    pub past: usize,
    /// Its pages, in the order of positions.
    pub pages: Vec<u32>,
    pub want: Want,
}

impl SequenceChunk {
    pub(super) fn span(&self) -> Span<'_> {
        Span { rows: self.tokens.len(), past: self.past, pages: &self.pages }
    }
}

/// What a batch needs or has.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// The outputs of the experts of [`Batch::routes`].
    NeedExperts,
    /// The batch has been through all layers: for each chunk its logits, as wanted.
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
    #[error("page {page} does not exist; the cache has {pages} pages")]
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
pub struct Batch {
    pub(super) chunks: Vec<SequenceChunk>,
    /// Of each row's position.
    pub(super) angles: Angles,
    pub(super) layer: usize,
    /// After attention: what the layer's output is added to, `[n, d]`.
    pub(super) residual: DeviceRows,
    /// The same, normed: what experts see, `[n, d]`.
    pub(super) normed: DeviceRows,
    /// Empty once the batch has been through all layers.
    pub(super) routes: Vec<Vec<Route>>,
}

impl Batch {
    /// The layer whose experts are awaited.
    pub fn layer(&self) -> u16 {
        self.layer as u16
    }

    /// For each row the experts it awaits, ascending; nothing once the batch has been through all layers.
    pub fn routes(&self) -> &[Vec<Route>] {
        &self.routes
    }

    /// The chunks, whose rows follow one another.
    pub fn chunks(&self) -> &[SequenceChunk] {
        &self.chunks
    }
}
