//! Packed matrices and vectors where the device computes with them.
//!
//! Owns [`GpuMatrix`] and [`GpuVector`]. A matrix lies in the arena as it lies in its blob or checkpoint, packed, base
//! slice and refine slice one behind the other; rows of an exact one are padded to sixteen columns where they are not a multiple
//! already. One that is larger than a place is cut between blocks of rows. No other copy of a weight exists on the device.

use cubecl::Runtime;

use crate::{
    arena::{Arena, SlabRange},
    device::exact,
    ranges::ALIGNED,
};
use coel_weights::{
    matrix::{DType, Matrix},
    memory::Buffer,
    slices::{BASE_CELL, BLOCK_ROWS, GROUP, REFINE_CELL, Sliced, Weight},
};

/// What a matrix's words mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Form {
    /// One of the types [`exact`] knows.
    Exact(u32),
    Sliced {
        refined: bool,
    },
}

/// A matrix on the device.
#[derive(Debug)]
pub struct GpuMatrix {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) form: Form,
    pub(crate) parts: Vec<MatrixPart>,
}

/// Whole blocks of a matrix's rows.
#[derive(Debug)]
pub(crate) struct MatrixPart {
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) place: SlabRange,
    /// Word 1 of a unit.
    pub(crate) second: u32,
    /// Word 2 of a unit.
    pub(crate) stride: u32,
}

impl GpuMatrix {
    pub(crate) fn new<R: Runtime>(arena: &mut Arena<R>, weight: &Weight) -> Self {
        match weight {
            Weight::Exact(matrix) => Self::exact(arena, matrix),
            Weight::Sliced(sliced) => Self::sliced(arena, sliced),
        }
    }

    pub(crate) fn is_sliced(&self) -> bool {
        matches!(self.form, Form::Sliced { .. })
    }

    /// Where row `row` of a dense input begins, as this matrix counts: in groups or in floats.
    pub(crate) fn unit_of_input(&self) -> usize {
        if self.is_sliced() { self.cols / GROUP } else { self.cols }
    }

    /// What it was made of, read back.
    pub(crate) fn weight<R: Runtime>(&self, arena: &Arena<R>) -> Weight {
        let Self { rows, cols, form, parts } = self;
        match form {
            Form::Sliced { refined } => {
                let cells = |rows: usize| rows.div_ceil(BLOCK_ROWS) * cols / GROUP;
                let mut base = buffer(cells(*rows) * BASE_CELL);
                let mut refine = refined.then(|| buffer(cells(*rows) * REFINE_CELL));
                for part in parts {
                    let bytes = [BASE_CELL, if *refined { REFINE_CELL } else { 0 }].map(|cell| cells(part.rows) * cell);
                    let found = arena.get(&part.place, bytes.iter().sum());
                    let (first, second) = found.split_at(bytes[0]);
                    let at = cells(part.first);
                    base.as_mut_slice()[at * BASE_CELL..][..bytes[0]].copy_from_slice(first);
                    if let Some(refine) = &mut refine {
                        refine.as_mut_slice()[at * REFINE_CELL..][..bytes[1]].copy_from_slice(second);
                    }
                }
                let sliced = Sliced::new(*rows, *cols, base.into(), refine.map(Into::into));
                Weight::Sliced(sliced.expect("the shape is the one that was put there"))
            }
            Form::Exact(kind) => {
                let dtype = match *kind {
                    exact::BF16 => DType::BF16,
                    exact::F16 => DType::F16,
                    _ => DType::F32,
                };
                let (row, padded) = (cols * dtype.size(), padded(*cols, dtype));
                let mut bytes = buffer(rows * row);
                for part in parts {
                    let found = arena.get(&part.place, part.rows * padded);
                    let into = bytes.as_mut_slice()[part.first * row..].chunks_exact_mut(row);
                    into.zip(found.chunks_exact(padded)).for_each(|(to, wide)| to.copy_from_slice(&wide[..row]));
                }
                let matrix = Matrix::new(bytes.into(), dtype, *rows, *cols);
                Weight::Exact(matrix.expect("the shape is the one that was put there"))
            }
        }
    }

    fn sliced<R: Runtime>(arena: &mut Arena<R>, sliced: &Sliced) -> Self {
        let groups = sliced.groups();
        let refined = sliced.refine().is_some();
        let cell = BASE_CELL + if refined { REFINE_CELL } else { 0 };
        let parts = cut(sliced.rows(), BLOCK_ROWS, groups * cell, arena.place_most());
        let parts = parts.into_iter().map(|(first, rows)| {
            let cells = first / BLOCK_ROWS * groups..(first + rows).div_ceil(BLOCK_ROWS) * groups;
            let base = &sliced.base()[cells.start * BASE_CELL..cells.end * BASE_CELL];
            let refine = sliced.refine().map(|refine| &refine[cells.start * REFINE_CELL..cells.end * REFINE_CELL]);
            let place = arena.put(&[base, refine.unwrap_or_default()]);
            let second = place.at() + (base.len() / 4) as u32;
            MatrixPart { first, rows, place, second, stride: groups as u32 }
        });
        let parts = parts.collect();
        Self { rows: sliced.rows(), cols: sliced.cols(), form: Form::Sliced { refined }, parts }
    }

    fn exact<R: Runtime>(arena: &mut Arena<R>, matrix: &Matrix) -> Self {
        let (kind, size) = match matrix.dtype() {
            DType::BF16 => (exact::BF16, 2),
            DType::F16 => (exact::F16, 2),
            DType::F32 => (exact::F32, 4),
        };
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let padded = padded(cols, matrix.dtype());
        let parts = cut(rows, BLOCK_ROWS, BLOCK_ROWS * padded, arena.place_most());
        let parts = parts.into_iter().map(|(first, rows)| {
            let bytes = matrix.rows_bytes(first..first + rows);
            let place = match padded == cols * size {
                true => arena.put(&[bytes]),
                false => {
                    let mut wide = vec![0; rows * padded];
                    for (to, from) in wide.chunks_exact_mut(padded).zip(bytes.chunks_exact(cols * size)) {
                        to[..from.len()].copy_from_slice(from);
                    }
                    arena.put(&[&wide])
                }
            };
            MatrixPart { first, rows, place, second: cols as u32, stride: (padded / 4) as u32 }
        });
        let parts = parts.collect();
        Self { rows, cols, form: Form::Exact(kind), parts }
    }
}

/// Bytes of a row of an exact matrix.
fn padded(cols: usize, dtype: DType) -> usize {
    cols.next_multiple_of(BLOCK_ROWS) * dtype.size()
}

/// Bytes that a matrix takes, in one place.
pub(crate) fn bytes(weight: &Weight) -> u64 {
    let bytes = match weight {
        Weight::Exact(matrix) => matrix.rows() * padded(matrix.cols(), matrix.dtype()),
        Weight::Sliced(_) => weight.bytes(),
    };
    bytes.next_multiple_of(4 * ALIGNED as usize) as u64
}

/// Memory to read back into, which goes back to the system when it is dropped.
fn buffer(bytes: usize) -> Buffer {
    Buffer::new(bytes).expect("this much was given up when it went to the device")
}

/// Cuts `rows` rows, in blocks of `block` rows which take `bytes` bytes, into parts of at most `most` bytes.
fn cut(rows: usize, block: usize, bytes: usize, most: usize) -> Vec<(usize, usize)> {
    assert!(bytes <= most, "a block of {bytes} bytes is more than this device binds");
    let step = most / bytes.max(1) * block;
    (0..rows).step_by(step).map(|first| (first, step.min(rows - first))).collect()
}

/// A small f32 vector on the device.
#[derive(Debug)]
pub struct GpuVector {
    pub(crate) len: usize,
    pub(crate) place: SlabRange,
}

impl GpuVector {
    pub(crate) fn new<R: Runtime>(arena: &mut Arena<R>, values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        Self { len: values.len(), place: arena.put(&[&bytes]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_matrices_are_cut_between_blocks() {
        assert_eq!(cut(40, 16, 100, 1000), [(0, 40)]);
        assert_eq!(cut(40, 16, 100, 299), [(0, 32), (32, 8)]);
        assert_eq!(cut(40, 16, 100, 100), [(0, 16), (16, 16), (32, 8)]);
        assert_eq!(cut(0, 16, 100, 100), []);
    }
}
