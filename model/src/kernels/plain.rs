//! The portable class: burn's own operations on any backend, one row at a time.
//!
//! Owns [`Plain`]. Every operation sees shapes that depend on the model and the position only, never on the batch, so
//! a backend that is deterministic for one shape is exact here. Matrices stay packed on the device, exact or sliced, and
//! are widened block by block while they are used; activations stay f32. Products are summed by reduction, not by a
//! matrix multiply that might round to a shorter type. It is honest and slow: kernels of the device's own replace it operation by operation.

use burn::tensor::{
    DType as BurnDType, ElementConversion, FloatDType, Int, Tensor, TensorData, activation, backend::Backend,
};

use super::{CacheShape, ExpertWork, Kernels, Span};
use crate::{
    bytes::DType,
    rope::Angles,
    slices::{BASE_CELL, BLOCK_ROWS, GROUP, NIBBLES, Sliced, Weight},
};

/// Output rows of a matrix widened at a time: bounds the scratch memory of one product. Whole blocks of a sliced one.
const ROWS_WIDENED: usize = 64 * BLOCK_ROWS;

/// Burn's operations on one device of backend `B`.
#[derive(Debug)]
pub struct Plain<B: Backend> {
    device: B::Device,
}

impl<B: Backend> Plain<B> {
    pub fn new(device: B::Device) -> Self {
        Self { device }
    }

    fn product(&self, x: &Tensor<B, 2>, matrix: &PlainMatrix<B>) -> Tensor<B, 2> {
        let [n, _] = x.dims();
        let rows_out = matrix.rows();
        let mut rows = vec![Vec::new(); n];
        for first in (0..rows_out).step_by(ROWS_WIDENED) {
            let count = ROWS_WIDENED.min(rows_out - first);
            let block = matrix.widen(first, count);
            for (row, parts) in rows.iter_mut().enumerate() {
                let x = x.clone().narrow(0, row, 1);
                parts.push((block.clone() * x).sum_dim(1).reshape([1, count]));
            }
        }
        Tensor::cat(rows.into_iter().map(|parts| Tensor::cat(parts, 1)).collect(), 0)
    }

    /// The packed bytes `bytes` as a tensor of words.
    fn words(&self, bytes: Vec<u8>, shape: [usize; 3]) -> Tensor<B, 3, Int> {
        let data = TensorData::from_bytes_vec(bytes, shape, BurnDType::I32);
        Tensor::from_data(data, (&self.device, BurnDType::I32))
    }

    fn sliced(&self, sliced: &Sliced) -> PlainSliced<B> {
        let shape = [sliced.blocks(), sliced.groups(), NIBBLES / 4];
        let cells = sliced.base().as_chunks::<BASE_CELL>().0;
        let part = |range: std::ops::Range<usize>| cells.iter().flat_map(|cell| cell[range.clone()].to_vec()).collect();
        let constants =
            TensorData::from_bytes_vec(part(NIBBLES..BASE_CELL), [shape[0], shape[1], 2, BLOCK_ROWS], BurnDType::F16);
        PlainSliced {
            rows: sliced.rows(),
            base: self.words(part(0..NIBBLES), shape),
            refine: sliced.refine().map(|refine| self.words(refine.to_vec(), shape)),
            constants: Tensor::from_data(constants, (&self.device, BurnDType::F16)),
        }
    }
}

/// Applies `f` to each row of `x` as a `[1, width]` tensor.
fn each_row<B: Backend>(x: &Tensor<B, 2>, mut f: impl FnMut(usize, Tensor<B, 2>) -> Tensor<B, 2>) -> Tensor<B, 2> {
    let rows = (0..x.dims()[0]).map(|row| f(row, x.clone().narrow(0, row, 1))).collect();
    Tensor::cat(rows, 0)
}

/// A matrix on the device, packed.
#[derive(Debug)]
pub enum PlainMatrix<B: Backend> {
    /// In the checkpoint's type.
    Exact(Tensor<B, 2>),
    Sliced(PlainSliced<B>),
}

impl<B: Backend> PlainMatrix<B> {
    fn rows(&self) -> usize {
        match self {
            PlainMatrix::Exact(matrix) => matrix.dims()[0],
            PlainMatrix::Sliced(sliced) => sliced.rows,
        }
    }

    /// Rows `first..first + count` in f32; `first` begins a block.
    fn widen(&self, first: usize, count: usize) -> Tensor<B, 2> {
        match self {
            PlainMatrix::Exact(matrix) => matrix.clone().narrow(0, first, count).cast(FloatDType::F32),
            PlainMatrix::Sliced(sliced) => {
                sliced.widen(first / BLOCK_ROWS, count.div_ceil(BLOCK_ROWS)).narrow(0, 0, count)
            }
        }
    }
}

/// Slices on the device: the bytes of the cells, nibbles and constants apart.
#[derive(Debug)]
pub struct PlainSliced<B: Backend> {
    rows: usize,
    /// High nibbles, `[blocks, groups, 64]`: a word is eight columns of a row, as `slices` says.
    base: Tensor<B, 3, Int>,
    refine: Option<Tensor<B, 3, Int>>,
    /// Scales and offsets, `[blocks, groups, 2, 16]`, f16.
    constants: Tensor<B, 4>,
}

impl<B: Backend> PlainSliced<B> {
    /// Blocks `first..first + count` in f32: `[16 * count, cols]`, padding included.
    fn widen(&self, first: usize, count: usize) -> Tensor<B, 2> {
        let [_, groups, _] = self.base.dims();
        let levels = |words: &Tensor<B, 3, Int>| {
            let words = words.clone().narrow(0, first, count).reshape([count, groups, 4, BLOCK_ROWS, 1]);
            let nibbles = (0..8).map(|column| {
                let shift = 8 * (column % 4) + 4 * (column / 4);
                words.clone().bitwise_right_shift_scalar(shift.elem()).bitwise_and_scalar(15.elem())
            });
            let levels = Tensor::cat(nibbles.collect(), 4).permute([0, 3, 1, 2, 4]);
            levels.reshape([count, BLOCK_ROWS, groups, GROUP]).float().cast(FloatDType::F32)
        };
        let high = levels(&self.base) * 16.0;
        let levels = match &self.refine {
            Some(refine) => high + levels(refine),
            None => high + 7.5,
        };
        let constants = self.constants.clone().narrow(0, first, count).cast(FloatDType::F32);
        let [scale, offset] = [0, 1].map(|which| {
            let rows = constants.clone().narrow(2, which, 1).permute([0, 3, 1, 2]);
            rows.reshape([count, BLOCK_ROWS, groups, 1])
        });
        (levels * scale + offset).reshape([count * BLOCK_ROWS, groups * GROUP])
    }
}

/// Keys and values of each page and layer, `[kv_heads, page_tokens, head_dim]`. A slot is empty only while it is being
/// written.
#[derive(Debug)]
pub struct PlainCache<B: Backend> {
    shape: CacheShape,
    /// `[pages * layers]`
    slots: Vec<[Option<Tensor<B, 3>>; 2]>,
}

impl<B: Backend> PlainCache<B> {
    fn slot(&self, page: u32, layer: usize) -> usize {
        page as usize * self.shape.layers + layer
    }

    /// The first `seen` positions of a session, in one piece: the same tensor whatever the size of a page.
    fn seen(&self, layer: usize, which: usize, pages: &[u32], seen: usize) -> Tensor<B, 4> {
        let CacheShape { kv_heads, head_dim, page_tokens, .. } = self.shape;
        let pages = pages[..seen.div_ceil(page_tokens)].iter();
        let slots =
            pages.map(|page| self.slots[self.slot(*page, layer)][which].clone().expect("no write is under way"));
        let all = Tensor::cat(slots.collect(), 1);
        all.slice([0..kv_heads, 0..seen, 0..head_dim]).reshape([kv_heads, 1, seen, head_dim])
    }
}

impl<B: Backend> Kernels for Plain<B> {
    type Backend = B;
    type Matrix = PlainMatrix<B>;
    type Vector = Tensor<B, 2>;
    type Cache = PlainCache<B>;

    fn class(&self) -> String {
        format!("plain-{}", B::name(&self.device))
    }

    fn matrix(&self, weight: Weight) -> PlainMatrix<B> {
        let matrix = match weight {
            Weight::Exact(matrix) => matrix,
            Weight::Sliced(sliced) => return PlainMatrix::Sliced(self.sliced(&sliced)),
        };
        let dtype = match matrix.dtype() {
            DType::BF16 => BurnDType::BF16,
            DType::F16 => BurnDType::F16,
            DType::F32 => BurnDType::F32,
        };
        let data = TensorData::from_bytes_vec(matrix.bytes().to_vec(), [matrix.rows(), matrix.cols()], dtype);
        PlainMatrix::Exact(Tensor::from_data(data, (&self.device, dtype)))
    }

    fn vector(&self, values: Vec<f32>) -> Tensor<B, 2> {
        let width = values.len();
        self.upload(values, width)
    }

    fn upload(&self, values: Vec<f32>, width: usize) -> Tensor<B, 2> {
        let rows = values.len() / width;
        Tensor::from_data(TensorData::new(values, [rows, width]), (&self.device, BurnDType::F32))
    }

    fn linears(
        &mut self,
        x: &Tensor<B, 2>,
        matrices: &[(&PlainMatrix<B>, Option<&Tensor<B, 2>>)],
    ) -> Vec<Tensor<B, 2>> {
        let output = |(matrix, bias): &(&PlainMatrix<B>, Option<&Tensor<B, 2>>)| {
            let out = self.product(x, matrix);
            match bias {
                Some(bias) => out + (*bias).clone(),
                None => out,
            }
        };
        matrices.iter().map(output).collect()
    }

    fn rms_norm(&mut self, x: &Tensor<B, 2>, weight: &Tensor<B, 2>, eps: f32) -> Tensor<B, 2> {
        each_row(x, |_, row| {
            let mean = (row.clone() * row.clone()).sum_dim(1) / x.dims()[1] as f32;
            row / (mean + eps).sqrt() * weight.clone()
        })
    }

    fn rotate(&mut self, x: Tensor<B, 2>, angles: &Angles) -> Tensor<B, 2> {
        let [n, width] = x.dims();
        let half = angles.half();
        let heads = width / (2 * half);
        let [cos, sin] =
            [angles.cos(), angles.sin()].map(|table| self.upload(table.to_vec(), half).reshape([n, 1, half]));
        let x = x.reshape([n, heads, 2 * half]);
        let first = x.clone().slice([0..n, 0..heads, 0..half]);
        let second = x.slice([0..n, 0..heads, half..2 * half]);
        let turned = vec![first.clone() * cos.clone() - second.clone() * sin.clone(), second * cos + first * sin];
        Tensor::cat(turned, 2).reshape([n, width])
    }

    fn cache(&self, shape: CacheShape) -> PlainCache<B> {
        let empty = || {
            let dims = [shape.kv_heads, shape.page_tokens, shape.head_dim];
            Some(Tensor::zeros(dims, (&self.device, BurnDType::F32)))
        };
        PlainCache { shape, slots: (0..shape.pages * shape.layers).map(|_| [empty(), empty()]).collect() }
    }

    fn append(
        &mut self,
        cache: &mut PlainCache<B>,
        layer: usize,
        spans: &[Span<'_>],
        k: Tensor<B, 2>,
        v: Tensor<B, 2>,
    ) {
        let CacheShape { kv_heads, head_dim, page_tokens, .. } = cache.shape;
        let n = k.dims()[0];
        let rows = [k, v].map(|rows| rows.reshape([n, kv_heads, head_dim]).permute([1, 0, 2]));
        let mut first = 0;
        for span in spans {
            let end = span.past + span.rows;
            let mut at = span.past;
            while at < end {
                let on_page = at % page_tokens;
                let count = (end - at).min(page_tokens - on_page);
                let slot = cache.slot(span.pages[at / page_tokens], layer);
                for (slot, rows) in cache.slots[slot].iter_mut().zip(&rows) {
                    let rows = rows.clone().slice([0..kv_heads, first..first + count, 0..head_dim]);
                    let stored = slot.take().expect("no write is under way");
                    *slot = Some(stored.slice_assign([0..kv_heads, on_page..on_page + count, 0..head_dim], rows));
                }
                (at, first) = (at + count, first + count);
            }
        }
    }

    fn attention(&mut self, q: Tensor<B, 2>, cache: &PlainCache<B>, layer: usize, spans: &[Span<'_>]) -> Tensor<B, 2> {
        let CacheShape { heads, kv_heads, head_dim, .. } = cache.shape;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mut rows = Vec::new();
        for span in spans {
            let [keys, values] = [0, 1].map(|which| cache.seen(layer, which, span.pages, span.past + span.rows));
            for row in 0..span.rows {
                let seen = |half: &Tensor<B, 4>| half.clone().narrow(2, 0, span.past + row + 1);
                let q = q.clone().narrow(0, rows.len(), 1).reshape([kv_heads, heads / kv_heads, 1, head_dim]);
                let scores = (seen(&keys) * q).sum_dim(3) * scale;
                let weights = activation::softmax(scores, 2);
                rows.push((seen(&values) * weights).sum_dim(2).reshape([1, heads * head_dim]));
            }
        }
        Tensor::cat(rows, 0)
    }

    fn experts(&mut self, x: &Tensor<B, 2>, work: &[ExpertWork<'_, PlainMatrix<B>>]) -> Tensor<B, 2> {
        let outputs = work.iter().filter(|work| !work.rows.is_empty()).map(|ExpertWork { expert, rows }| {
            let x = Tensor::cat(rows.iter().map(|row| x.clone().narrow(0, *row as usize, 1)).collect(), 0);
            let gate = self.product(&x, &expert.gate);
            let gate = each_row(&gate, |_, row| activation::silu(row));
            let up = self.product(&x, &expert.up);
            self.product(&(gate * up), &expert.down)
        });
        Tensor::cat(outputs.collect(), 0)
    }
}
