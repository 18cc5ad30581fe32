//! The KV cache on the device, and attention over it.
//!
//! Owns [`GpuCache`]: for each layer a buffer of keys and one of values, `[pages, kv_heads, page_tokens, head_dim]`, all
//! reserved when it is made. Attention is two launches, the runs of all rows and their combination; rows are taken a
//! bounded number at a time, so that what lies between the two is bounded.

use cubecl::{CubeCount, CubeDim, Runtime, client::ComputeClient, prelude::ArrayArg, server::Handle};

use crate::{THREADS, cubes, device::attention};
use coel_kernels::kv::{CacheShape, Span};

/// Most floats between the two launches of attention.
const PARTS_MOST: usize = 16 << 20;

/// Keys and values of all sessions on one device.
#[derive(Debug)]
pub struct GpuCache {
    shape: CacheShape,
    layers: Vec<[Handle; 2]>,
}

/// For each row how many positions it sees and where its pages are, then the pages of all sessions.
pub(crate) fn table(spans: &[Span<'_>]) -> Vec<u32> {
    let rows: usize = spans.iter().map(|span| span.rows).sum();
    let (mut table, mut pages) = (Vec::with_capacity(2 * rows), Vec::new());
    for span in spans {
        let first = (2 * rows + pages.len()) as u32;
        table.extend((span.past..span.past + span.rows).flat_map(|position| [position as u32 + 1, first]));
        pages.extend_from_slice(span.pages);
    }
    table.extend(pages);
    table
}

impl GpuCache {
    pub(crate) fn new<R: Runtime>(client: &ComputeClient<R>, shape: CacheShape) -> Self {
        let layer = |_| {
            let bytes = 4 * Self::floats(shape).max(1);
            let half = || client.memory_persistent_allocation((), |()| client.empty(bytes));
            [half(), half()].map(|half| half.expect("an allocation is only asked for here"))
        };
        Self { shape, layers: (0..shape.layers).map(layer).collect() }
    }

    /// Of a layer's keys, or values.
    fn floats(shape: CacheShape) -> usize {
        shape.pages * shape.kv_heads * shape.page_tokens * shape.head_dim
    }

    /// Stores `n` rows of keys and values at the last position each sees.
    pub(crate) fn append<R: Runtime>(
        &mut self,
        client: &ComputeClient<R>,
        layer: usize,
        (k, v): (Handle, Handle),
        n: usize,
        (spans, words): (Handle, usize),
    ) {
        let CacheShape { kv_heads, head_dim, page_tokens, .. } = self.shape;
        let floats = n * kv_heads * head_dim;
        let [keys, values] = &self.layers[layer];
        // SAFETY: pages of spans are pages of this cache, which the caller has checked.
        unsafe {
            attention::append::launch_unchecked::<R>(
                client,
                cubes(floats.div_ceil(THREADS as usize)),
                CubeDim::new_1d(THREADS),
                ArrayArg::from_raw_parts(k, floats),
                ArrayArg::from_raw_parts(v, floats),
                ArrayArg::from_raw_parts(spans, words),
                ArrayArg::from_raw_parts(keys.clone(), Self::floats(self.shape)),
                ArrayArg::from_raw_parts(values.clone(), Self::floats(self.shape)),
                n as u32,
                kv_heads as u32,
                page_tokens as u32,
                head_dim as u32,
            );
        }
    }

    /// Attention of `n` rows of `q`, none of which sees more than `runs` runs of positions, to `out`.
    pub(crate) fn attend<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        layer: usize,
        (q, out): (Handle, Handle),
        n: usize,
        runs: usize,
        (spans, words): (Handle, usize),
    ) {
        let CacheShape { heads, kv_heads, head_dim, page_tokens, .. } = self.shape;
        let [keys, values] = &self.layers[layer];
        let row = heads * runs;
        let together = (PARTS_MOST / (row * head_dim)).clamp(1, n);
        let (parts, marks) = (client.empty(4 * together * row * head_dim), client.empty(8 * together * row));
        for first in (0..n).step_by(together) {
            let rows = together.min(n - first);
            // SAFETY: pages of spans are pages of this cache, which the caller has checked.
            unsafe {
                let array = |handle: &Handle, n| ArrayArg::from_raw_parts(handle.clone(), n);
                attention::run::launch_unchecked::<R>(
                    client,
                    CubeCount::Static(runs as u32, heads as u32, rows as u32),
                    CubeDim::new_1d(attention::RUN as u32),
                    array(&q, n * heads * head_dim),
                    array(keys, Self::floats(self.shape)),
                    array(values, Self::floats(self.shape)),
                    array(&spans, words),
                    array(&parts, together * row * head_dim),
                    array(&marks, 2 * together * row),
                    first as u32,
                    kv_heads as u32,
                    page_tokens as u32,
                    1.0 / (head_dim as f32).sqrt(),
                    head_dim,
                );
                attention::combine::launch_unchecked::<R>(
                    client,
                    CubeCount::Static(heads as u32, rows as u32, 1),
                    CubeDim::new_1d(head_dim.clamp(1, THREADS as usize) as u32),
                    array(&parts, together * row * head_dim),
                    array(&marks, 2 * together * row),
                    array(&spans, words),
                    array(&out, n * heads * head_dim),
                    first as u32,
                    runs as u32,
                    head_dim,
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_tells_every_row_what_it_sees() {
        let spans = [Span { rows: 2, past: 3, pages: &[7, 9] }, Span { rows: 1, past: 0, pages: &[4] }];
        assert_eq!(table(&spans), [4, 6, 5, 6, 1, 8, 7, 9, 4]);
    }
}
