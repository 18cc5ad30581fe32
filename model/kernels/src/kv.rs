//! The shape of a KV cache, and where the rows of a batch lie in it.
//!
//! Owns [`CacheShape`] and [`Span`]. A cache lies on pages; a page holds keys and values of all layers for `page_tokens`
//! positions of one session. Which session has which page, the caller knows.

/// Shape of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    pub layers: usize,
    pub pages: usize,
    pub page_tokens: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// Consecutive rows of a batch which are the positions `past..past + rows` of one session, whose position `p` lies on
/// page `pages[p / page_tokens]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span<'a> {
    pub rows: usize,
    pub past: usize,
    pub pages: &'a [u32],
}
