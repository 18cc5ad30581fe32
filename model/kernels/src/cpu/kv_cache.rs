//! The KV cache in host memory.
//!
//! Owns [`CpuCache`]. A page holds, for each layer, keys then values, and for each head `[page_tokens, head_dim]`, so that
//! attention reads a head's page in one go. The invariant: the place of a position depends on its session's pages
//! alone.

use crate::kv::{CacheShape, Span};

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    Keys,
    Values,
}

/// A cache in host memory. Pages that were never written take none.
#[derive(Debug)]
pub struct CpuCache {
    shape: CacheShape,
    values: Vec<f32>,
}

impl CpuCache {
    pub fn new(shape: CacheShape) -> Self {
        let page = 2 * shape.layers * shape.kv_heads * shape.page_tokens * shape.head_dim;
        Self { shape, values: vec![0.0; shape.pages * page] }
    }

    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Index of the first position of a head on a page.
    fn at(&self, page: u32, layer: usize, half: Half, head: usize) -> usize {
        let CacheShape { layers, kv_heads, page_tokens, head_dim, .. } = self.shape;
        let place = (page as usize * layers + layer) * 2 + usize::from(half == Half::Values);
        (place * kv_heads + head) * page_tokens * head_dim
    }

    /// One head of a page, `[page_tokens, head_dim]`.
    pub fn head(&self, page: u32, layer: usize, half: Half, head: usize) -> &[f32] {
        let at = self.at(page, layer, half, head);
        &self.values[at..at + self.shape.page_tokens * self.shape.head_dim]
    }

    /// Stores `rows [n, kv_heads * head_dim]`, the rows of `spans`.
    pub fn store(&mut self, layer: usize, half: Half, spans: &[Span<'_>], rows: &[f32]) {
        let CacheShape { kv_heads, page_tokens, head_dim, .. } = self.shape;
        let mut rows = rows.chunks_exact(kv_heads * head_dim);
        for span in spans {
            for (position, row) in (span.past..span.past + span.rows).zip(&mut rows) {
                let page = span.pages[position / page_tokens];
                for (head, values) in row.chunks_exact(head_dim).enumerate() {
                    let at = self.at(page, layer, half, head) + position % page_tokens * head_dim;
                    self.values[at..at + head_dim].copy_from_slice(values);
                }
            }
        }
    }
}
