//! Sums, bounds, selections, norms and rotary embeddings of rows, with the arithmetic of the CPU's kernels.

use cubecl::prelude::*;

use super::exact::tree;

/// Threads of a cube of [`rms_norm`], which computes one row.
pub const THREADS: usize = 256;
/// Values of a row in shared memory at a time: whole lanes.
const HELD: usize = 2048;
const LANES: usize = 16;

/// `weight * x / sqrt(mean(x^2) + eps)` for each row of `x [n, width]`; the weight begins at word `at` of `slab`.
#[cube(launch_unchecked)]
pub fn rms_norm(x: &Array<f32>, slab: &Array<u32>, out: &mut Array<f32>, at: u32, rows: u32, width: u32, eps: f32) {
    let row = CUBE_POS;
    if row < rows as usize {
        let mut held = SharedMemory::<f32>::new(HELD);
        let mut lanes = SharedMemory::<f32>::new(LANES);
        let width = width as usize;
        let thread = UNIT_POS as usize;
        let from = row * width;
        let mut sum = 0.0f32;
        let mut first = 0usize;
        while first < width {
            let count = min(HELD, width - first);
            let mut index = thread;
            while index < count {
                held[index] = x[from + first + index];
                index += THREADS;
            }
            sync_cube();
            if thread < LANES {
                let mut index = thread;
                while index < count {
                    sum = fma(held[index], held[index], sum);
                    index += LANES;
                }
            }
            sync_cube();
            first += HELD;
        }
        if thread < LANES {
            lanes[thread] = sum;
        }
        sync_cube();
        let squares = tree(&lanes, 0usize);
        let scale = 1.0f32 / f32::sqrt(squares / f32::cast_from(width as u32) + eps);
        let mut index = thread;
        while index < width {
            out[from + index] = f32::reinterpret(slab[at as usize + index]) * (x[from + index] * scale);
            index += THREADS;
        }
    }
}

/// `x [n, heads, 2 * half]` turned by `cos` and `sin`, `[n, half]` each.
#[cube(launch_unchecked)]
pub fn rotate(
    x: &Array<f32>,
    cos: &Array<f32>,
    sin: &Array<f32>,
    out: &mut Array<f32>,
    rows: u32,
    heads: u32,
    half: u32,
) {
    let (heads, half) = (heads as usize, half as usize);
    let index = ABSOLUTE_POS;
    if index < rows as usize * heads * half {
        let row = index / (heads * half);
        let angle = row * half + index % half;
        let first = index / half * 2usize * half + index % half;
        let second = first + half;
        out[first] = x[first] * cos[angle] - x[second] * sin[angle];
        out[second] = x[second] * cos[angle] + x[first] * sin[angle];
    }
}

/// `a + b`, elementwise.
#[cube(launch_unchecked)]
pub fn add(a: &Array<f32>, b: &Array<f32>, out: &mut Array<f32>, values: u32) {
    let index = ABSOLUTE_POS;
    if index < values as usize {
        out[index] = a[index] + b[index];
    }
}

/// Every value into `-limit..=limit`.
#[cube(launch_unchecked)]
pub fn clamped(x: &Array<f32>, out: &mut Array<f32>, values: u32, limit: f32) {
    let index = ABSOLUTE_POS;
    if index < values as usize {
        out[index] = clamp(x[index], -limit, limit);
    }
}

/// The rows of `x [n, width]` that `selected` names, in its order.
#[cube(launch_unchecked)]
pub fn select(x: &Array<f32>, selected: &Array<u32>, out: &mut Array<f32>, values: u32, width: u32) {
    let index = ABSOLUTE_POS;
    if index < values as usize {
        let width = width as usize;
        out[index] = x[selected[index / width] as usize * width + index % width];
    }
}
