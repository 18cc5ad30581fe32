//! Rows to int8, as `activations` says, and the gated activation before the second half of an expert.
//!
//! A group's values are stored as the multiplicands [`sliced`](super::sliced) wants: sixteen words, word `4 j + i` for
//! columns `8 j + c` and `8 j + c + 2`, `c` being 0, 4, 1, 5 for `i` = 0, 1, 2, 3. It is the value of the second column plus
//! 2^16 times that of the first. Beside them stand the scale and the scale times the sum. Groups follow one another:
//! `[groups, 16]` and `[groups, 2]`, whatever rows they belong to.

use cubecl::prelude::*;

use super::numbers::silu;

/// Values of a group.
const GROUP: usize = 32;
/// Threads of a cube, one for each value of eight groups.
pub const THREADS: usize = 256;
/// Groups of a cube.
pub const GROUPS: usize = THREADS / GROUP;
/// Words of a group's multiplicands.
pub const PAIRS: usize = GROUP / 2;
/// `activations::TINY`, as bits.
const TINY: u32 = 0x0554_AD2E;

/// Quantizes group `group` of `groups`, whose values the 32 threads of a group hold in order.
#[cube]
fn put(value: f32, group: usize, groups: usize, pairs: &mut Array<i32>, scales: &mut Array<f32>) {
    let mut magnitudes = SharedMemory::<u32>::new(THREADS);
    let mut values = SharedMemory::<i32>::new(THREADS);
    let at = UNIT_POS as usize;
    let lane = at % GROUP;
    let first = at - lane;
    magnitudes[at] = u32::reinterpret(value) & 0x7FFF_FFFFu32;
    sync_cube();
    // Magnitudes compare like their bits, infinity and NaN above everything else.
    let mut most = 0u32;
    for index in 0..GROUP {
        most = max(most, magnitudes[first + index]);
    }
    let usual = (most < 0x7F80_0000u32) && (most >= TINY);
    let magnitude = f32::reinterpret(most);
    let scale = 127.0f32 / select(usual, magnitude, 1.0f32);
    let whole = i32::cast_from(f32::round(select(usual, value, 0.0f32) * scale));
    values[at] = max(min(whole, 127i32), -127i32);
    sync_cube();
    if group < groups {
        if lane < PAIRS {
            let (j, i) = (lane / 4usize, lane % 4usize);
            let column = first + 8usize * j + 4usize * (i % 2usize) + i / 2usize;
            pairs[group * PAIRS + lane] = values[column + 2usize] + (values[column] << 16i32);
        }
        if lane == PAIRS {
            let mut sum = 0i32;
            for index in 0..GROUP {
                sum += values[first + index];
            }
            let step = select(most < TINY, 0.0f32, magnitude / 127.0f32);
            let product = step * f32::cast_from(sum);
            // Of infinity and of NaN, NaN: made of bits, since a compiler may hold that there are none.
            let none = most | 0x7FC0_0000u32;
            let finite = most < 0x7F80_0000u32;
            scales[2usize * group] = f32::reinterpret(select(finite, u32::reinterpret(step), none));
            scales[2usize * group + 1usize] = f32::reinterpret(select(finite, u32::reinterpret(product), none));
        }
    }
}

/// `x [groups, 32]` to `pairs` and `scales`.
#[cube(launch_unchecked)]
pub fn quantize(x: &Array<f32>, pairs: &mut Array<i32>, scales: &mut Array<f32>, groups: u32) {
    let groups = groups as usize;
    let group = CUBE_POS * GROUPS + UNIT_POS as usize / GROUP;
    let mut value = 0.0f32;
    if group < groups {
        value = x[group * GROUP + UNIT_POS as usize % GROUP];
    }
    put(value, group, groups, pairs, scales);
}

/// `silu(gate) * up`, with `gates_ups` the `groups * 32` gates and then as many ups: as f32 to `hidden` if `exact`, and
/// to `pairs` and `scales` if `sliced`.
#[cube(launch_unchecked)]
pub fn activate(
    gates_ups: &Array<f32>,
    hidden: &mut Array<f32>,
    pairs: &mut Array<i32>,
    scales: &mut Array<f32>,
    groups: u32,
    #[comptime] exact: bool,
    #[comptime] sliced: bool,
) {
    let groups = groups as usize;
    let group = CUBE_POS * GROUPS + UNIT_POS as usize / GROUP;
    let mut value = 0.0f32;
    if group < groups {
        let at = group * GROUP + UNIT_POS as usize % GROUP;
        value = silu(gates_ups[at]) * gates_ups[groups * GROUP + at];
        if comptime!(exact) {
            hidden[at] = value;
        }
    }
    if comptime!(sliced) {
        put(value, group, groups, pairs, scales);
    }
}
