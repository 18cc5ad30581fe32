//! The encoder as the format is defined: one weight after the other.

use half::f16;

use super::{Block, EIGHT_WEIGHT, Fault, FaultKind, HIGHS, LOWS, NEAR, PLACES};
use crate::slices::{BASE_CELL, BLOCK_ROWS, GROUP, NIBBLES, REFINE_CELL};

pub(super) fn encode(
    block: Block<'_>,
    base: &mut [[u8; BASE_CELL]],
    refine: &mut [[u8; REFINE_CELL]],
) -> Result<(), Fault> {
    let rows = block.rows();
    let mut weights = [[0.0; GROUP]; BLOCK_ROWS];
    for (group, (base, refine)) in base.iter_mut().zip(refine).enumerate() {
        base.fill(0);
        refine.fill(0);
        block.widen(group, &mut weights);
        for (row, weights) in weights[..rows].iter().enumerate() {
            let fault = |column: usize, kind| Fault { row, column: group * GROUP + column, kind };
            if let Some(column) = weights.iter().position(|w| !w.is_finite()) {
                return Err(fault(column, FaultKind::NotFinite));
            }
            let (s, m) = constants(weights).map_err(|kind| fault(0, kind))?;
            for (column, w) in weights.iter().enumerate() {
                let q = level(*w, s.to_f32(), m.to_f32());
                let at = 64 * (column / 8) + 4 * row + column % 4;
                let shift = if column % 8 < 4 { 0 } else { 4 };
                base[at] |= (q >> 4) << shift;
                refine[at] |= (q & 15) << shift;
            }
            base[NIBBLES + 2 * row..][..2].copy_from_slice(&s.to_le_bytes());
            base[NIBBLES + 2 * BLOCK_ROWS + 2 * row..][..2].copy_from_slice(&m.to_le_bytes());
        }
    }
    Ok(())
}

/// Scale and offset of a group of finite weights.
fn constants(weights: &[f32; GROUP]) -> Result<(f16, f16), FaultKind> {
    // Adding 0.0 turns -0.0 into 0.0 and leaves every other number alone.
    let first = weights[0] + 0.0;
    let (mut min, mut max) = (first, first);
    for w in weights {
        let w = w + 0.0;
        min = if w < min { w } else { min };
        max = if w > max { w } else { max };
    }
    let range = max - min;
    let s = range / 247.0;
    let m = min - 4.0 * s;
    let (s, m) = (f16::from_f32(s), f16::from_f32(m));
    if !s.is_finite() || !m.is_finite() {
        return Err(FaultKind::Range { min, max });
    }
    if s == f16::ZERO {
        return Ok((s, m));
    }
    let per_range = PLACES / range;
    let places = weights.map(|w| ((w - min) * per_range).round_ties_even() as u16);
    let (low, high) = coarse(&places);
    Ok(fine(&places, min, range, [low, high], (s, m)))
}

/// The levels of minimum and maximum at which four bits err least.
fn coarse(places: &[u16; GROUP]) -> (f32, f32) {
    let (mut least, mut best) = (f32::INFINITY, (0.0, 0.0));
    for low in LOWS {
        for high in HIGHS {
            let (span, at) = (high - low, 256 * low);
            let [four, _] = energies(places, (256 * span) as u16, at);
            let cost = four as f32 / (span * span) as f32;
            if cost < least {
                (least, best) = (cost, (low as f32, high as f32));
            }
        }
    }
    best
}

/// The scale and the offset, as they will be read, with which four and eight bits together err least, minimum and
/// maximum being near the levels `ends`; `first` where nothing is better.
fn fine(places: &[u16; GROUP], min: f32, range: f32, ends: [f32; 2], first: (f16, f16)) -> (f16, f16) {
    let cost = |(s, m): (f16, f16)| {
        let (s, m) = (s.to_f32(), m.to_f32());
        if !(s > 0.0 && s.is_finite() && m.is_finite()) {
            return f32::INFINITY;
        }
        let (at, span) = ((min - m) / s * 256.0, range / s * 256.0);
        let below = (-128.0 - at).max(0.0);
        let above = (at + span - 65408.0).max(0.0);
        let rounded = |value: f32, least: f32, most: f32| value.clamp(least, most).round_ties_even() as i32;
        let [four, eight] = energies(places, rounded(span, 0.0, 65535.0) as u16, rounded(at, -30000.0, 30000.0));
        let inside = (four + EIGHT_WEIGHT * eight) as f32;
        (inside + outside(below) + outside(above)) * (s * s)
    };
    let (mut least, mut best) = (cost(first), first);
    for lower in NEAR {
        for upper in NEAR {
            let (low, high) = (ends[0] + lower, ends[1] + upper);
            let s = range / (high - low);
            let m = min - low * s;
            let found = (f16::from_f32(s), f16::from_f32(m));
            let cost = cost(found);
            if cost < least {
                (least, best) = (cost, found);
            }
        }
    }
    best
}

/// What the extreme weight adds by lying `beyond` the last level's reach.
fn outside(beyond: f32) -> f32 {
    beyond * (32.0 * (beyond + 768.0))
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

fn level(w: f32, s: f32, m: f32) -> u8 {
    if s == 0.0 {
        return 0;
    }
    ((w - m) / s).round_ties_even().clamp(0.0, 255.0) as u8
}
