//! The slices of a part as bytes.
//!
//! Owns [`write_part`], which turns a part of a checkpoint into its base and refine blobs. A slice blob is an ordinary
//! safetensors file whose metadata says which slice it is. Matrices come first, as U8 cells, the first of them at a
//! multiple of 64 bytes of the file; in the base blob alone every other tensor follows as the checkpoint has it.
//!
//! The invariant: the bytes depend on nothing but the part and its weights, and their number is known beforehand. At
//! no time are more than sixteen rows of a matrix in memory. It does not hash, and it does not know where bytes come from
//! or go to.

use std::io::Write;

use super::source::ReadAt;
use crate::{
    parts::{Entry, Part, TensorRange, frame},
    slices::{
        BASE_CELL, BLOCK_ROWS, FORMAT, FORMAT_KEY, GROUP, REFINE_CELL, SLICE_KEY, Slice, SliceError,
        encode::{Encoder, first_not_finite},
        is_sliced,
    },
};

/// Bytes of an unsliced tensor that are copied at once.
const COPY_BYTES: usize = 1 << 16;

/// Lengths of a part's blobs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PartBytes {
    pub base: u64,
    pub refine: u64,
}

/// How long the blobs of `part` will be, headers included.
///
/// # Errors
/// [`SliceError::Columns`], the only thing that can be wrong with a shape.
pub fn part_bytes(part: &Part) -> Result<PartBytes, SliceError> {
    let [base, refine] = Slice::ALL.map(|slice| {
        let entries = entries(part, slice)?;
        let data: u64 = entries.iter().map(|entry| entry.bytes).sum();
        Ok(header(&entries, slice).len() as u64 + data)
    });
    Ok(PartBytes { base: base?, refine: refine? })
}

/// Writes the base and the refine blob of `part`. They have exactly the lengths [`part_bytes`] gives.
///
/// # Errors
/// [`SliceError`]; what was written before it is of no use.
pub fn write_part(
    part: &Part,
    source: &(impl ReadAt + ?Sized),
    base: &mut impl Write,
    refine: &mut impl Write,
) -> Result<(), SliceError> {
    put(base, Slice::Base, &header(&entries(part, Slice::Base)?, Slice::Base))?;
    put(refine, Slice::Refine, &header(&entries(part, Slice::Refine)?, Slice::Refine))?;
    for tensor in part.tensors.iter().filter(|tensor| is_sliced(&tensor.name, &tensor.shape)) {
        write_matrix(tensor, source, base, refine)?;
    }
    for tensor in part.tensors.iter().filter(|tensor| !is_sliced(&tensor.name, &tensor.shape)) {
        copy(tensor, source, base)?;
    }
    Ok(())
}

/// The tensors of one slice of a part, in file order.
fn entries(part: &Part, slice: Slice) -> Result<Vec<Entry<'_>>, SliceError> {
    let mut entries = Vec::with_capacity(part.tensors.len());
    for tensor in part.tensors.iter().filter(|tensor| is_sliced(&tensor.name, &tensor.shape)) {
        let [rows, cols] = sides(tensor);
        if !cols.is_multiple_of(GROUP) {
            return Err(SliceError::Columns { tensor: tensor.name.clone(), cols });
        }
        let shape = slice.shape(rows, cols);
        let bytes = shape.iter().map(|side| *side as u64).product();
        entries.push(Entry { name: &tensor.name, dtype: "U8", shape: shape.into(), bytes });
    }
    if slice == Slice::Base {
        let rest = part.tensors.iter().filter(|tensor| !is_sliced(&tensor.name, &tensor.shape));
        entries.extend(rest.map(Entry::of));
    }
    Ok(entries)
}

fn header(entries: &[Entry<'_>], slice: Slice) -> Vec<u8> {
    let metadata = format!("{{\"{FORMAT_KEY}\":\"{FORMAT}\",\"{SLICE_KEY}\":\"{}\"}}", slice.name());
    frame(Some(&metadata), entries)
}

fn sides(tensor: &TensorRange) -> [usize; 2] {
    tensor.shape.as_slice().try_into().expect("only matrices are sliced")
}

fn put(into: &mut impl Write, slice: Slice, bytes: &[u8]) -> Result<(), SliceError> {
    into.write_all(bytes).map_err(|source| SliceError::Write { slice, source })
}

fn read(source: &(impl ReadAt + ?Sized), tensor: &TensorRange, offset: u64, into: &mut [u8]) -> Result<(), SliceError> {
    let read = source.read_at(tensor.file, tensor.offset + offset, into);
    read.map_err(|source| SliceError::Read { tensor: tensor.name.clone(), source })
}

fn write_matrix(
    tensor: &TensorRange,
    source: &(impl ReadAt + ?Sized),
    base: &mut impl Write,
    refine: &mut impl Write,
) -> Result<(), SliceError> {
    let [rows, cols] = sides(tensor);
    let (groups, row_bytes) = (cols / GROUP, cols * tensor.dtype.size());
    let mut weights = vec![0; BLOCK_ROWS.min(rows) * row_bytes];
    let (mut base_cells, mut refine_cells) = (vec![0; groups * BASE_CELL], vec![0; groups * REFINE_CELL]);
    for first in (0..rows).step_by(BLOCK_ROWS) {
        let weights = &mut weights[..BLOCK_ROWS.min(rows - first) * row_bytes];
        read(source, tensor, (first * row_bytes) as u64, weights)?;
        let encoded = Encoder::best().block(tensor.dtype, weights, cols, &mut base_cells, &mut refine_cells);
        encoded.map_err(|error| SliceError::at(&tensor.name, first, error))?;
        put(base, Slice::Base, &base_cells)?;
        put(refine, Slice::Refine, &refine_cells)?;
    }
    Ok(())
}

/// Copies a tensor unchanged, a piece at a time.
fn copy(tensor: &TensorRange, source: &(impl ReadAt + ?Sized), into: &mut impl Write) -> Result<(), SliceError> {
    let mut buffer = vec![0; COPY_BYTES.min(tensor.bytes as usize)];
    let mut done = 0;
    while done < tensor.bytes {
        let piece = (tensor.bytes - done).min(COPY_BYTES as u64) as usize;
        read(source, tensor, done, &mut buffer[..piece])?;
        check_finite(tensor, done, &buffer[..piece])?;
        put(into, Slice::Base, &buffer[..piece])?;
        done += piece as u64;
    }
    Ok(())
}

/// Refuses weights that are not finite among `bytes`, which lie `offset` bytes into `tensor`.
pub(super) fn check_finite(tensor: &TensorRange, offset: u64, bytes: &[u8]) -> Result<(), SliceError> {
    let Some(index) = first_not_finite(tensor.dtype, bytes) else { return Ok(()) };
    let index = offset as usize / tensor.dtype.size() + index;
    let columns = tensor.shape.last().copied().unwrap_or(1).max(1);
    Err(SliceError::NotFinite { tensor: tensor.name.clone(), row: index / columns, column: index % columns })
}
