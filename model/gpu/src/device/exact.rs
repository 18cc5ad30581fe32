//! Matrices as in the checkpoint, times f32 rows: the arithmetic of `kernels::exact`.
//!
//! A cube computes one block of sixteen output rows over the few rows of a unit (the table is that of
//! [`sliced`](super::sliced)). Eight threads share an output; each has two of its sixteen partial sums, so that eight
//! neighbours read 32 bytes of 16-bit weights in a row. Rows of a matrix are padded in memory to a whole number of sixteen
//! columns; what a padded column is multiplied by is zero.

use cubecl::prelude::*;

use super::{NO_BIAS, UNIT, numbers::half_to_f32};

/// Outputs of a block, and partial sums of an output.
const BLOCK: usize = 16;
const LANES: usize = 16;
/// Distance of two outputs' partial sums in shared memory: not a multiple of the banks.
const STRIDE: usize = LANES + 1;
/// Threads of an output.
const SHARE: usize = LANES / 2;
/// Threads of a cube.
pub const THREADS: usize = BLOCK * SHARE;

/// What a word of weights holds: two of BF16, two of F16, one of F32.
pub const BF16: u32 = 0;
pub const F16: u32 = 1;
pub const F32: u32 = 2;

/// The fixed tree over sixteen partial sums at `at`, as `kernels::lanes` adds.
#[cube]
pub fn tree(lanes: &SharedMemory<f32>, at: usize) -> f32 {
    let mut quarters = Array::<f32>::new(4usize);
    #[unroll]
    for lane in 0..4usize {
        let even = lanes[at + lane] + lanes[at + lane + 8usize];
        let odd = lanes[at + lane + 4usize] + lanes[at + lane + 12usize];
        quarters[lane] = even + odd;
    }
    (quarters[0usize] + quarters[2usize]) + (quarters[1usize] + quarters[3usize])
}

/// The weight of column `column + which` of a row that begins at word `from`; `column` is even.
#[cube]
fn weight(slab: &Array<u32>, from: usize, column: usize, #[comptime] which: u32, #[comptime] kind: u32) -> f32 {
    if comptime!(kind == F32) {
        f32::reinterpret(slab[from + column + comptime!(which as usize)])
    } else if comptime!(kind == F16) {
        half_to_f32((slab[from + column / 2usize] >> comptime!(16 * which)) & 0xFFFFu32)
    } else if comptime!(which == 0) {
        f32::reinterpret(slab[from + column / 2usize] << 16u32)
    } else {
        f32::reinterpret(slab[from + column / 2usize] & 0xFFFF_0000u32)
    }
}

/// For each unit of `plan`: its matrix times its rows.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn exact(
    slab: &Array<u32>,
    biases: &Array<u32>,
    plan: &Array<u32>,
    x: &Array<f32>,
    out: &mut Array<f32>,
    #[comptime] kind: u32,
    #[comptime] tile: usize,
) {
    let unit = CUBE_POS_Y as usize * UNIT;
    let block = CUBE_POS_X as usize;
    let outputs = plan[unit + 3usize] as usize;
    if block * BLOCK < outputs {
        let mut lanes = SharedMemory::<f32>::new(comptime!(tile * BLOCK * STRIDE));
        let columns = plan[unit + 1usize] as usize;
        let words = plan[unit + 2usize] as usize;
        let places = plan[unit + 4usize] as usize;
        let rows = plan[unit + 5usize] as usize;

        let thread = UNIT_POS as usize;
        let share = thread % SHARE;
        let lane = thread / SHARE;
        let mut sums = Array::<f32>::new(comptime!(2 * tile));
        #[unroll]
        for index in 0..comptime!(2 * tile) {
            sums[index] = 0.0f32;
        }
        if block * BLOCK + lane < outputs {
            let from = plan[unit] as usize + (block * BLOCK + lane) * words;
            let mut column = 2usize * share;
            while column < columns {
                let first = weight(slab, from, column, 0u32, kind);
                let second = weight(slab, from, column, 1u32, kind);
                #[unroll]
                for row in 0..tile {
                    if row < rows {
                        let at = plan[places + row] as usize + column;
                        sums[2usize * row] = fma(x[at], first, sums[2usize * row]);
                        if column + 1usize < columns {
                            sums[2usize * row + 1usize] = fma(x[at + 1usize], second, sums[2usize * row + 1usize]);
                        }
                    }
                }
                column += LANES;
            }
        }
        #[unroll]
        for row in 0..tile {
            if row < rows {
                let at = (row * BLOCK + lane) * STRIDE + 2usize * share;
                lanes[at] = sums[2usize * row];
                lanes[at + 1usize] = sums[2usize * row + 1usize];
            }
        }
        sync_cube();
        let row = thread / BLOCK;
        let output = block * BLOCK + thread % BLOCK;
        if row < rows && output < outputs {
            let mut sum = tree(&lanes, (row * BLOCK + thread % BLOCK) * STRIDE);
            let bias = plan[unit + 7usize];
            if bias != NO_BIAS {
                sum += f32::reinterpret(biases[bias as usize + output]);
            }
            let to = plan[unit + 6usize] as usize + row * plan[unit + 8usize] as usize;
            out[to + output] = sum;
        }
    }
}
