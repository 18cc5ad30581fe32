//! The encoder as the format is defined: one weight after the other.

use half::f16;

use super::{Block, Fault, FaultKind};
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
    let s = (max - min) / 247.0;
    let m = min - 4.0 * s;
    let (s, m) = (f16::from_f32(s), f16::from_f32(m));
    if s.is_finite() && m.is_finite() { Ok((s, m)) } else { Err(FaultKind::Range { min, max }) }
}

fn level(w: f32, s: f32, m: f32) -> u8 {
    if s == 0.0 {
        return 0;
    }
    ((w - m) / s).round_ties_even().clamp(0.0, 255.0) as u8
}
