//! Bytes on their way into a slab.

use cubecl::prelude::*;

/// Writes the words of `from` to `to`, from word `at` on.
#[cube(launch_unchecked)]
pub fn copy(from: &Array<u32>, to: &mut Array<u32>, at: u32, words: u32) {
    let index = ABSOLUTE_POS;
    if index < words as usize {
        to[at as usize + index] = from[index];
    }
}
