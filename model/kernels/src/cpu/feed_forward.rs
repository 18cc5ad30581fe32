//! Gated feed-forward blocks, many at once.
//!
//! Owns [`experts`]: each expert over its rows of a batch, in two regions of the pool whatever the number of experts.
//! The first computes `silu(gate(x)) * up(x)` in pieces of [`GROUP`] hidden columns. That is also the group of a
//! sliced `down`, so each piece quantizes its own output. The second computes `down`. An output depends on its own row and
//! expert alone.

use std::cmp::Reverse;

use super::{
    activations::{Quantized, Slots},
    isa::Isa,
    primitives,
    product::{Batch, ROWS_HELD, ROWS_HELD_FEW, block, blocks, columns, is_sliced},
    threads::{Pool, Shares},
};
use coel_weights::slices::{BLOCK_ROWS, GROUP, Weight};

use crate::ExpertWork;

/// What the two regions exchange; kept between calls.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    input: Quantized,
    hidden: Vec<Hidden>,
}

/// The hidden rows of one expert: f32 for an exact `down`, int8 for a sliced one.
#[derive(Debug, Default)]
struct Hidden {
    /// `[rows, width]`
    values: Vec<f32>,
    quantized: Quantized,
}

/// One expert's part of the work.
#[derive(Clone, Copy)]
struct Item<'a> {
    work: ExpertWork<'a, Weight>,
    values: Shares<'a, f32>,
    slots: Slots<'a>,
}

/// Every expert of `work` over its rows of `x [n, d]`: `[sum of rows, d]`, in order of work, then rows.
pub(super) fn experts(
    pool: &mut Pool,
    isa: Isa,
    scratch: &mut Scratch,
    x: &[f32],
    work: &[ExpertWork<'_, Weight>],
) -> Vec<f32> {
    let Some(first) = work.first() else {
        return Vec::new();
    };
    let d = first.expert.gate.cols();
    assert!(x.len().is_multiple_of(d));
    let most = work.iter().map(|work| work.rows.len()).max().unwrap_or(0);
    let slots: usize = work.iter().map(|work| work.rows.len()).sum();
    let Scratch { input, hidden } = scratch;
    match work.iter().any(|work| is_sliced(&work.expert.gate) || is_sliced(&work.expert.up)) {
        true => input.fill(pool, isa, x, d),
        false => input.reset(0, 0),
    }
    let batch = Batch { x, quantized: input.view() };
    hidden.resize_with(hidden.len().max(work.len()), Hidden::default);

    // The largest need gets the first buffer, so that the memory kept does not depend on where a call's largest expert stood.
    let mut by_need: Vec<usize> = (0..work.len()).collect();
    by_need.sort_by_key(|index| Reverse(work[*index].rows.len() * work[*index].expert.gate.rows()));
    let mut places = vec![0; work.len()];
    by_need.iter().zip(0..).for_each(|(index, place)| places[*index] = place);
    let mut free: Vec<_> = hidden.iter_mut().map(Some).collect();

    let mut items = Vec::with_capacity(work.len());
    let mut pieces = Vec::new();
    for (index, work) in work.iter().enumerate() {
        let hidden = free[places[index]].take().expect("places are different");
        let (expert, rows, width) = (work.expert, work.rows.len(), work.expert.gate.rows());
        assert!(expert.gate.cols() == d && expert.up.cols() == d && expert.down.rows() == d);
        assert!(expert.up.rows() == width && expert.down.cols() == width);
        match is_sliced(&expert.down) {
            true => (hidden.quantized.reset(rows, width), hidden.values.clear()),
            false => (hidden.quantized.reset(0, 0), hidden.values.resize(rows * width, 0.0)),
        };
        let Hidden { values, quantized } = hidden;
        items.push(Item { work: *work, values: Shares::of(values), slots: quantized.slots() });
        if rows > 0 {
            pieces.extend((0..width.div_ceil(GROUP)).map(|piece| (index, piece)));
        }
    }
    pool.each(pieces.len(), 1, |_, piece| {
        let (index, group) = pieces[piece];
        // SAFETY: no two pieces are the same group of the same expert, so nobody else touches these columns.
        unsafe {
            match items[index].work.rows.len() {
                ..=ROWS_HELD_FEW => gate_up::<ROWS_HELD_FEW>(isa, items[index], group, batch),
                _ => gate_up::<ROWS_HELD>(isa, items[index], group, batch),
            }
        }
    });

    let mut output = vec![0.0; slots * d];
    let mut rest = output.as_mut_slice();
    let mut parts = Vec::with_capacity(work.len());
    pieces.clear();
    for (index, work) in work.iter().enumerate() {
        let (own, others) = rest.split_at_mut(work.rows.len() * d);
        parts.push(Shares::of(own));
        rest = others;
        if !work.rows.is_empty() {
            pieces.extend((0..blocks(&work.expert.down)).map(|block| (index, block)));
        }
    }
    let rows: Vec<u32> = (0..most as u32).collect();
    drop(free);
    let hidden = &*hidden;
    pool.each(pieces.len(), 1, |_, piece| {
        let (index, block) = pieces[piece];
        let (down, rows) = ((&work[index].expert.down, None), &rows[..work[index].rows.len()]);
        let batch = Batch { x: &hidden[places[index]].values, quantized: hidden[places[index]].quantized.view() };
        // SAFETY: no two pieces are the same block of the same expert, so nobody else touches these columns.
        unsafe {
            match rows.len() {
                ..=ROWS_HELD_FEW => columns::<ROWS_HELD_FEW>(isa, down, block, batch, rows, parts[index]),
                _ => columns::<ROWS_HELD>(isa, down, block, batch, rows, parts[index]),
            }
        }
    });
    output
}

/// The hidden columns `32 * group..` of one expert for all of its rows.
///
/// # Safety
/// Nobody else reads or writes them meanwhile.
unsafe fn gate_up<const HELD: usize>(isa: Isa, item: Item<'_>, group: usize, batch: Batch<'_>) {
    const HALVES: usize = GROUP / BLOCK_ROWS;
    let expert = item.work.expert;
    let width = expert.gate.rows();
    let mut gate = [[[0.0; BLOCK_ROWS]; HALVES]; HELD];
    let mut sums = [[[0.0; BLOCK_ROWS]; HELD]; 2];
    for (part, rows) in item.work.rows.chunks(HELD).enumerate() {
        for half in 0..HALVES.min((width - group * GROUP).div_ceil(BLOCK_ROWS)) {
            let index = group * HALVES + half;
            let [gates, ups] = &mut sums;
            let (gates, ups) = (&mut gates[..rows.len()], &mut ups[..rows.len()]);
            block(isa, &expert.gate, index, batch, rows, gates);
            block(isa, &expert.up, index, batch, rows, ups);
            primitives::silu_times(isa, gates.as_flattened_mut(), ups.as_flattened());
            for (to, from) in gate.iter_mut().zip(gates) {
                to[half] = *from;
            }
        }
        for (row, values) in gate[..rows.len()].iter().enumerate() {
            let row = part * HELD + row;
            let values = values.as_flattened();
            // SAFETY: nobody else reads or writes these hidden columns meanwhile, as the caller promises.
            unsafe {
                match is_sliced(&expert.down) {
                    true => item.slots.put(isa, group, row, values.try_into().expect("a whole group")),
                    false => {
                        let len = GROUP.min(width - group * GROUP);
                        item.values.part(row * width + group * GROUP, len).copy_from_slice(&values[..len]);
                    }
                }
            }
        }
    }
}
