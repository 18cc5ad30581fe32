//! Sliced matrices times int8 rows: the arithmetic of `kernels::sliced`.
//!
//! A cube computes one block of sixteen output rows over the few rows of a *unit*. Its threads are sixteen rows by sixteen
//! groups: for sixteen groups at a time each thread unpacks two constants and four (or eight) words of a cell, and multiplies them by the unit's rows, exactly, in integers. Then one thread for each output adds the
//! groups in ascending order, with the two fused operations of a group. So the integers run wide and the floats in the
//! order that every other kernel class has.
//!
//! A word holds eight nibbles of one row; masked with `0x000F000F` at four shifts it is two nibbles 16 bits apart, `a` and
//! `b`. Times a word of [`quantize`](super::quantize), which is `y + 2^16 x`, it is `a y + 2^16 (a x + b y)` modulo 2^32: the
//! high half is two products, and the low half, which must be taken off, is known from the sum's low 16 bits, being less
//! than 2^15 in magnitude over eight words, as the high half is over sixteen columns. So a multiplication does two columns.
//!
//! The table of a launch, `plan`, begins with a unit for each `CUBE_POS_Y`:
//!
//! | word | what |
//! |---|---|
//! | 0 | where the matrix begins in its slab, in words |
//! | 1 | where its refine slice does, if it has one (exact matrices: columns) |
//! | 2 | groups of a row (exact matrices: words of a row) |
//! | 3 | outputs, all of which this launch computes |
//! | 4 | where in `plan` the places of its rows are |
//! | 5 | how many rows |
//! | 6 | where the output of its first row goes, in floats |
//! | 7 | where its bias begins in the slab of biases, or [`NO_BIAS`](super::NO_BIAS) |
//! | 8 | how far apart the outputs of two rows lie, in floats |
//!
//! A row's place is its first group in `pairs` and `scales` (exact matrices: its first float).

use cubecl::prelude::*;

use super::{NO_BIAS, UNIT};

/// Outputs of a block.
const BLOCK: usize = 16;
/// Groups at a time.
const GROUPS: usize = 16;
/// Threads of a cube.
pub const THREADS: usize = BLOCK * GROUPS;
/// Words of a base and of a refine cell.
const BASE: usize = 72;
const REFINE: usize = 64;
/// Words of a group of a row.
const PAIRS: usize = 16;

/// The dot product of 32 nibbles, four words of one row, with a group at `at`.
#[cube]
fn dot(nibbles: &Array<u32>, x: &SharedMemory<i32>, at: usize, #[comptime] first: usize) -> i32 {
    let mut low = 0i32;
    let mut high = 0i32;
    #[unroll]
    for index in 0..8usize {
        low += i32::cast_from(nibbles[first + index]) * x[at + index];
        high += i32::cast_from(nibbles[first + 8usize + index]) * x[at + 8usize + index];
    }
    ((low - ((low << 16i32) >> 16i32)) >> 16i32) + ((high - ((high << 16i32) >> 16i32)) >> 16i32)
}

/// The scale of a group's constants (`slices::constants`).
#[cube]
fn scale_of(constants: u32) -> f32 {
    let code = constants >> 7u32;
    let bits = (code << 19u32) + 0x3280_0000u32;
    f32::reinterpret(select(code == 0u32, 0u32, bits))
}

/// For each unit of `plan`: its matrix times its rows.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn sliced(
    slab: &Array<u32>,
    biases: &Array<u32>,
    plan: &Array<u32>,
    pairs: &Array<i32>,
    scales: &Array<f32>,
    out: &mut Array<f32>,
    #[comptime] refined: bool,
    #[comptime] tile: usize,
) {
    let unit = CUBE_POS_Y as usize * UNIT;
    let block = CUBE_POS_X as usize;
    let outputs = plan[unit + 3usize] as usize;
    if block * BLOCK < outputs {
        let mut x = SharedMemory::<i32>::new(comptime!(tile * GROUPS * PAIRS));
        let mut steps = SharedMemory::<f32>::new(comptime!(tile * GROUPS * 2));
        let mut constants = SharedMemory::<f32>::new(2usize * THREADS);
        let mut dots = SharedMemory::<f32>::new(comptime!(tile * THREADS));
        let base = plan[unit] as usize;
        let refine = plan[unit + 1usize] as usize;
        let groups = plan[unit + 2usize] as usize;
        let places = plan[unit + 4usize] as usize;
        let rows = plan[unit + 5usize] as usize;

        let thread = UNIT_POS as usize;
        let lane = thread % BLOCK;
        let column = thread / BLOCK;
        let mut sum = 0.0f32;
        let mut first = 0usize;
        while first < groups {
            let group = first + column;
            let mut nibbles = Array::<u32>::new(comptime!(if refined { 32usize } else { 16usize }));
            let mut scale = 0.0f32;
            let mut offset = 0.0f32;
            if group < groups {
                let cell = base + (block * groups + group) * BASE;
                let other = refine + (block * groups + group) * REFINE;
                let shift = 16u32 * (lane as u32 % 2u32);
                let both = (slab[cell + 64usize + lane / 2usize] >> shift) & 0xFFFFu32;
                scale = scale_of(both);
                // Exact: no order of operations shows.
                let zero = comptime!(if refined { 16.0f32 } else { 23.5f32 });
                offset = scale * (zero - 2.25f32 * f32::cast_from(both & 127u32));
                #[unroll]
                for j in 0..4usize {
                    let word = slab[cell + 16usize * j + lane];
                    #[unroll]
                    for i in 0..4usize {
                        nibbles[4usize * j + i] = (word >> comptime!(4 * i as u32)) & 0x000F_000Fu32;
                    }
                    if comptime!(refined) {
                        let word = slab[other + 16usize * j + lane];
                        #[unroll]
                        for i in 0..4usize {
                            nibbles[16usize + 4usize * j + i] = (word >> comptime!(4 * i as u32)) & 0x000F_000Fu32;
                        }
                    }
                }
            }
            // Nobody reads x any more: dots were waited for.
            for row in 0..rows {
                if group < groups {
                    x[row * THREADS + thread] = pairs[(plan[places + row] as usize + first) * PAIRS + thread];
                }
            }
            sync_cube();
            if group < groups {
                constants[2usize * thread] = scale;
                constants[2usize * thread + 1usize] = offset;
                for row in 0..rows {
                    let at = row * THREADS + column * PAIRS;
                    let mut whole = 16i32 * dot(&nibbles, &x, at, 0usize);
                    if comptime!(refined) {
                        whole += dot(&nibbles, &x, at, 16usize);
                    }
                    dots[row * THREADS + thread] = f32::cast_from(whole);
                }
            }
            if thread < 2usize * GROUPS * rows {
                let row = thread / (2usize * GROUPS);
                let index = thread % (2usize * GROUPS);
                if first + index / 2usize < groups {
                    steps[thread] = scales[(plan[places + row] as usize + first) * 2usize + index];
                }
            }
            sync_cube();
            // The row that this thread adds up, and not the group it multiplied.
            if column < rows {
                let count = min(GROUPS, groups - first);
                for index in 0..count {
                    let constant = 2usize * (index * BLOCK + lane);
                    let step = 2usize * (column * GROUPS + index);
                    let dot = dots[column * THREADS + index * BLOCK + lane];
                    sum = fma(dot, constants[constant] * steps[step], sum);
                    sum = fma(constants[constant + 1usize], steps[step + 1usize], sum);
                }
            }
            first += GROUPS;
        }
        let output = block * BLOCK + lane;
        if column < rows && output < outputs {
            let bias = plan[unit + 7usize];
            if bias != NO_BIAS {
                sum += f32::reinterpret(biases[bias as usize + output]);
            }
            let to = plan[unit + 6usize] as usize + column * plan[unit + 8usize] as usize;
            out[to + output] = sum;
        }
    }
}
