//! The encoder that defines the format: one weight after the other.

use super::{ASIDE, Block, EIGHT_WEIGHT, EncodeError, EncodeErrorKind, LEAST_SPAN, PLACES, SCALES};
use crate::slices::{
    BASE_CELL, BLOCK_ROWS, GROUP, NIBBLES, REFINE_CELL,
    constants::{Constants, LOWEST_ZERO, SCALE_MOST, ZERO_MOST, ZERO_STEP},
};

pub(super) fn encode(
    block: Block<'_>,
    base: &mut [[u8; BASE_CELL]],
    refine: &mut [[u8; REFINE_CELL]],
) -> Result<(), EncodeError> {
    let rows = block.rows();
    let mut weights = [[0.0; GROUP]; BLOCK_ROWS];
    for (group, (base, refine)) in base.iter_mut().zip(refine).enumerate() {
        base.fill(0);
        refine.fill(0);
        block.widen(group, &mut weights);
        for (row, weights) in weights[..rows].iter().enumerate() {
            let error = |column: usize, kind| EncodeError { row, column: group * GROUP + column, kind };
            if let Some(column) = weights.iter().position(|w| !w.is_finite()) {
                return Err(error(column, EncodeErrorKind::NotFinite));
            }
            let constants = constants(weights).map_err(|kind| error(0, kind))?;
            for (column, w) in weights.iter().enumerate() {
                let q = level(*w, constants);
                let at = 64 * (column / 8) + 4 * row + column % 4;
                let shift = if column % 8 < 4 { 0 } else { 4 };
                base[at] |= (q >> 4) << shift;
                refine[at] |= (q & 15) << shift;
            }
            base[NIBBLES + 2 * row..][..2].copy_from_slice(&constants.0.to_le_bytes());
        }
    }
    Ok(())
}

/// The constants of a group of finite weights.
fn constants(weights: &[f32; GROUP]) -> Result<Constants, EncodeErrorKind> {
    // Adding 0.0 turns -0.0 into 0.0 and leaves every other number alone.
    let first = weights[0] + 0.0;
    let (mut min, mut max) = (first, first);
    for w in weights {
        let w = w + 0.0;
        min = if w < min { w } else { min };
        max = if w > max { w } else { max };
    }
    let span = max.max(0.0) - min.min(0.0);
    if span < LEAST_SPAN {
        return Ok(Constants::default());
    }
    let least = Constants::scale_code(span / 256.0);
    if least > SCALE_MOST {
        return Err(EncodeErrorKind::Range { min, max });
    }
    let range = max - min;
    let per_range = if range > 0.0 { PLACES / range } else { 0.0 };
    let places = weights.map(|w| ((w - min) * per_range).round_ties_even() as u16);
    let (mut lowest, mut best) = (f32::INFINITY, Constants::default());
    for scale in least..least + SCALES {
        if scale > SCALE_MOST {
            break;
        }
        let s = Constants::new(scale, 0).scale();
        let (low, wide) = (min / s, range / s);
        let middle = (((255.0 - wide) * 0.5 - low - LOWEST_ZERO) / ZERO_STEP).round_ties_even();
        for aside in -ASIDE..=ASIDE {
            let zero = (middle + aside as f32).clamp(0.0, ZERO_MOST as f32) as i32;
            let constants = Constants::new(scale, zero);
            let cost = cost(&places, low, wide, constants);
            if cost < lowest {
                (lowest, best) = (cost, constants);
            }
        }
    }
    Ok(best)
}

/// The weighted error at four and eight bits, where the minimum and the range of the group are `low` and `wide` levels.
fn cost(places: &[u16; GROUP], low: f32, wide: f32, constants: Constants) -> f32 {
    let (at, span) = ((low + constants.zero()) * 256.0, wide * 256.0);
    let below = (-128.0 - at).max(0.0);
    let above = (at + span - 65408.0).max(0.0);
    let rounded = |value: f32, least: f32, most: f32| value.clamp(least, most).round_ties_even() as i32;
    let [four, eight] = energies(places, rounded(span, 0.0, 65535.0) as u16, rounded(at, -30000.0, 90000.0));
    let inside = (four + EIGHT_WEIGHT * eight) as f32;
    (inside + outside(below) + outside(above)) * (constants.scale() * constants.scale())
}

/// The error that the extreme weight adds by lying `beyond` the reach of the last level.
fn outside(beyond: f32) -> f32 {
    beyond * (EIGHT_WEIGHT as f32 * (beyond + 512.0) + 8192.0)
}

/// Sums of the squared distances to the nearest 4-bit and 8-bit level, in 256ths of an 8-bit step, where the minimum is
/// at `at` and the maximum at `at + span`. Levels have no end here: positions wrap, and so 16 bits of them will do, which
/// compilers turn into the widest instructions there are.
fn energies(places: &[u16; GROUP], span: u16, at: i32) -> [i32; 2] {
    let at = (at + 128) as u16;
    let (mut four, mut eight) = (0, 0);
    for place in places {
        let at = (((u32::from(*place) * u32::from(span)) >> 16) as u16).wrapping_add(at);
        let (coarse, fine) = ((at & 4095) as i16 - 2048, (at & 255) as i16 - 128);
        four += i32::from(coarse) * i32::from(coarse);
        eight += i32::from(fine) * i32::from(fine);
    }
    [four, eight]
}

fn level(w: f32, constants: Constants) -> u8 {
    match constants.scale() {
        0.0 => 0,
        s => ((w - constants.offset()) / s).round_ties_even().clamp(0.0, 255.0) as u8,
    }
}
