//! Causal attention over a paged cache: the arithmetic of `kernels::attention`, cut into runs of positions.
//!
//! Keys and values of a layer lie apart, each `[pages, kv_heads, page_tokens, dim]`. The table of a call, `spans`, begins with
//! two words for each row of the batch: how many positions it sees (itself the last), and where in `spans` the pages of its
//! session are. Runs of [`RUN`] positions, counted from a session's first, are computed by cubes of their own and put
//! together in ascending order by [`combine`]: so many cubes work on one row of a long session, and what a row's sum is made
//! of depends on its position alone.

use cubecl::prelude::*;

use super::{exact::tree, numbers::exp};

/// Positions of a run, and threads of a cube.
pub const RUN: usize = 256;
const LANES: usize = 16;
/// Distance of two positions' partial sums in shared memory.
const STRIDE: usize = LANES + 1;

/// Where `position` of a session lies in a cache, in floats.
#[cube]
fn place(
    spans: &Array<u32>,
    table: usize,
    position: usize,
    head: usize,
    heads: usize,
    tokens: usize,
    dim: usize,
) -> usize {
    let page = spans[table + position / tokens] as usize;
    ((page * heads + head) * tokens + position % tokens) * dim
}

/// Stores `k` and `v`, `[n, kv_heads, dim]`, at the last position that each row sees.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn append(
    k: &Array<f32>,
    v: &Array<f32>,
    spans: &Array<u32>,
    keys: &mut Array<f32>,
    values: &mut Array<f32>,
    rows: u32,
    kv_heads: u32,
    page_tokens: u32,
    dim: u32,
) {
    let (heads, dim) = (kv_heads as usize, dim as usize);
    let index = ABSOLUTE_POS;
    if index < rows as usize * heads * dim {
        let row = index / (heads * dim);
        let head = index / dim % heads;
        let position = spans[2usize * row] as usize - 1usize;
        let table = spans[2usize * row + 1usize] as usize;
        let to = place(spans, table, position, head, heads, page_tokens as usize, dim) + index % dim;
        keys[to] = k[index];
        values[to] = v[index];
    }
}

/// For each run (`CUBE_POS_X`), head (`CUBE_POS_Y`) and row (`CUBE_POS_Z`, from row `first` on) the values mixed by the
/// exponentials of scores, unscaled, to `parts [n, heads, runs, dim]`, and the highest score and the sum of exponentials
/// to `marks [n, heads, runs, 2]`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn run(
    q: &Array<f32>,
    keys: &Array<f32>,
    values: &Array<f32>,
    spans: &Array<u32>,
    parts: &mut Array<f32>,
    marks: &mut Array<f32>,
    first: u32,
    kv_heads: u32,
    page_tokens: u32,
    scale: f32,
    #[comptime] dim: usize,
) {
    let row = CUBE_POS_Z as usize;
    let head = CUBE_POS_Y as usize;
    let (runs, heads) = (CUBE_COUNT_X as usize, CUBE_COUNT_Y as usize);
    let from = first as usize + row;
    let seen = spans[2usize * from] as usize;
    let start = CUBE_POS_X as usize * RUN;
    if start < seen {
        let mut query = SharedMemory::<f32>::new(dim);
        let mut lanes = SharedMemory::<f32>::new(RUN * STRIDE);
        let mut weights = SharedMemory::<f32>::new(RUN);
        let mut highest = SharedMemory::<f32>::new(LANES);
        let table = spans[2usize * from + 1usize] as usize;
        let (kv_heads, tokens) = (kv_heads as usize, page_tokens as usize);
        let kv_head = head * kv_heads / heads;
        let count = min(RUN, seen - start);
        let thread = UNIT_POS as usize;
        let mut index = thread;
        while index < dim {
            query[index] = q[(from * heads + head) * dim + index];
            index += RUN;
        }
        sync_cube();
        // Sixteen threads to a position.
        let lane = thread % LANES;
        let mut position = thread / LANES;
        while position < count {
            let key = place(spans, table, start + position, kv_head, kv_heads, tokens, dim);
            let mut sum = 0.0f32;
            let mut index = lane;
            while index < dim {
                sum = fma(query[index], keys[key + index], sum);
                index += LANES;
            }
            lanes[position * STRIDE + lane] = sum;
            position += RUN / LANES;
        }
        sync_cube();
        if thread < count {
            weights[thread] = tree(&lanes, thread * STRIDE) * scale;
        }
        sync_cube();
        if thread < LANES {
            let mut most = weights[0usize];
            let mut index = thread;
            while index < count {
                most = max(most, weights[index]);
                index += LANES;
            }
            highest[thread] = most;
        }
        sync_cube();
        let mut most = highest[0usize];
        for index in 1..LANES {
            most = max(most, highest[index]);
        }
        if thread < count {
            weights[thread] = exp(weights[thread] - most);
        }
        sync_cube();
        if thread < LANES {
            let mut sum = 0.0f32;
            let mut index = thread;
            while index < count {
                sum += weights[index];
                index += LANES;
            }
            lanes[thread] = sum;
        }
        let to = (row * heads + head) * runs + CUBE_POS_X as usize;
        let mut index = thread;
        while index < dim {
            let mut sum = 0.0f32;
            for position in 0..count {
                let value = place(spans, table, start + position, kv_head, kv_heads, tokens, dim);
                sum = fma(weights[position], values[value + index], sum);
            }
            parts[to * dim + index] = sum;
            index += RUN;
        }
        sync_cube();
        if thread == 0usize {
            marks[2usize * to] = most;
            marks[2usize * to + 1usize] = tree(&lanes, 0usize);
        }
    }
}

/// Puts the runs of each row (`CUBE_POS_Y`, from row `first` on) and head (`CUBE_POS_X`) together, in ascending order.
#[cube(launch_unchecked)]
pub fn combine(
    parts: &Array<f32>,
    marks: &Array<f32>,
    spans: &Array<u32>,
    out: &mut Array<f32>,
    first: u32,
    runs: u32,
    #[comptime] dim: usize,
) {
    let head = CUBE_POS_X as usize;
    let heads = CUBE_COUNT_X as usize;
    let from = first as usize + CUBE_POS_Y as usize;
    let own = (spans[2usize * from] as usize + (RUN - 1)) / RUN;
    let at = (CUBE_POS_Y as usize * heads + head) * runs as usize;
    let mut most = marks[2usize * at];
    for run in 1..own {
        most = max(most, marks[2usize * (at + run)]);
    }
    let mut sum = 0.0f32;
    for run in 0..own {
        sum = fma(marks[2usize * (at + run) + 1usize], exp(marks[2usize * (at + run)] - most), sum);
    }
    let scale = 1.0f32 / sum;
    let mut index = UNIT_POS as usize;
    while index < dim {
        let mut mixed = 0.0f32;
        for run in 0..own {
            mixed = fma(exp(marks[2usize * (at + run)] - most), parts[(at + run) * dim + index], mixed);
        }
        out[(from * heads + head) * dim + index] = mixed * scale;
        index += CUBE_DIM as usize;
    }
}
