//! The arithmetic of sliced matrices in plain Rust: the reference for the other instruction sets.

use super::{Cells, Sums, View};
use coel_weights::slices::{BASE_CELL, BLOCK_ROWS, GROUP, NIBBLES, REFINE_CELL, constants::Constants};

/// Bytes of a cell that hold four (or, by nibble, eight) columns of its rows.
const QUAD: usize = 4 * BLOCK_ROWS;

/// A cell, unpacked.
struct Cell {
    /// By column, then row: compilers turn neighbouring rows into vectors.
    levels: [[i16; BLOCK_ROWS]; GROUP],
    scale: [f32; BLOCK_ROWS],
    offset: [f32; BLOCK_ROWS],
}

impl Cell {
    fn unpack(base: &[u8; BASE_CELL], refine: Option<&[u8; REFINE_CELL]>) -> Self {
        let mut levels = [[0; BLOCK_ROWS]; GROUP];
        for at in 0..NIBBLES {
            let (pair, row, column) = (at / QUAD, at % QUAD / 4, at % 4);
            let (high, low) = (base[at], refine.map_or(0, |refine| refine[at]));
            levels[8 * pair + column][row] = i16::from(high << 4 | low & 15);
            levels[8 * pair + 4 + column][row] = i16::from(high & 0xF0 | low >> 4);
        }
        let constants: [Constants; BLOCK_ROWS] =
            std::array::from_fn(|row| Constants::from_le_bytes([base[NIBBLES + 2 * row], base[NIBBLES + 2 * row + 1]]));
        let offset = match refine {
            Some(_) => constants.map(Constants::offset),
            None => constants.map(Constants::middle_offset),
        };
        let scale = constants.map(Constants::scale);
        Self { levels, scale, offset }
    }

    /// The integer dot product of each row with `x`.
    fn dot(&self, x: &[i8; GROUP]) -> [i32; BLOCK_ROWS] {
        let mut dots = [0; BLOCK_ROWS];
        for (levels, x) in self.levels.iter().zip(x) {
            let mut products = [0i16; BLOCK_ROWS];
            for (product, level) in products.iter_mut().zip(levels) {
                // At most 255 * 127, which 16 bits hold.
                *product = *level * i16::from(*x);
            }
            for (dot, product) in dots.iter_mut().zip(products) {
                *dot += i32::from(product);
            }
        }
        dots
    }
}

pub(super) fn block(cells: Cells<'_>, x: View<'_>, rows: &[u32], sums: &mut [Sums]) {
    sums.fill([0.0; BLOCK_ROWS]);
    let base = cells.base.as_chunks::<BASE_CELL>().0;
    let refine = cells.refine.map(|refine| refine.as_chunks::<REFINE_CELL>().0);
    for group in 0..cells.groups {
        let cell = Cell::unpack(&base[group], refine.map(|refine| &refine[group]));
        for (row, sums) in rows.iter().zip(sums.iter_mut()) {
            let (values, scale) = x.group(group, *row as usize);
            let dots = cell.dot(values);
            for (row, sum) in sums.iter_mut().enumerate() {
                *sum = (dots[row] as f32).mul_add(cell.scale[row] * scale.step, *sum);
                *sum = cell.offset[row].mul_add(scale.sum, *sum);
            }
        }
    }
}
