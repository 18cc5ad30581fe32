//! Weight bytes: where they lie, and what one matrix of them looks like.
//!
//! Owns [`WeightBytes`] (a shared, immutable range of memory, mapped or owned), [`DType`] (the three element types a
//! checkpoint may use) and [`Matrix`] (a packed matrix in the checkpoint's own type). The invariant: bytes are never
//! changed and never copied by slicing, and a `Matrix` always has exactly `rows * cols` elements. Nothing here knows
//! file formats, devices or what a weight is for.

use std::{
    fmt,
    fs::File,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use half::f16;
use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use serde::{Deserialize, Serialize};

use crate::tiers::buffer::Buffer;

/// A multiple of the page size of every machine coel runs on.
#[cfg(unix)]
const PAGE: usize = 1 << 16;

/// Element type of a stored weight. Stored little-endian, as safetensors does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum DType {
    BF16,
    F16,
    F32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::BF16 | DType::F16 => 2,
            DType::F32 => 4,
        }
    }

    /// The name safetensors headers use.
    pub const fn name(self) -> &'static str {
        match self {
            DType::BF16 => "BF16",
            DType::F16 => "F16",
            DType::F32 => "F32",
        }
    }

    /// Converts `bytes` (a whole number of elements) to f32, exactly. `out` holds one value per element.
    // Always inlined, so that a kernel compiled for a wider instruction set widens with it.
    #[inline(always)]
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        debug_assert_eq!(bytes.len(), out.len() * self.size());
        match self {
            DType::BF16 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f32::from_bits((u16::from_le_bytes(*raw) as u32) << 16);
                }
            }
            DType::F16 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f16::from_le_bytes(*raw).to_f32();
                }
            }
            DType::F32 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*raw);
                }
            }
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

struct Mapped {
    map: Mmap,
    path: PathBuf,
}

#[derive(Clone)]
enum Owner {
    Map(Arc<Mapped>),
    Heap(Arc<Vec<u8>>),
    Buffer(Arc<Buffer>),
}

/// Where bytes lie in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    pub file: &'a Path,
    pub offset: u64,
    pub bytes: u64,
}

/// A shared, immutable range of bytes: memory-mapped or owned. Cloning and slicing copy nothing.
#[derive(Clone)]
pub struct WeightBytes {
    owner: Owner,
    range: Range<usize>,
}

impl WeightBytes {
    /// Maps a whole file. An empty file gives an empty range.
    ///
    /// The file must not be truncated while mapped; coel only maps files it wrote under their hash, and checkpoints.
    pub fn map(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(Vec::new().into());
        }
        // SAFETY: the mapping is private and read-only; see the note on truncation above.
        let map = unsafe { Mmap::map(&file)? };
        let range = 0..map.len();
        Ok(Self { owner: Owner::Map(Arc::new(Mapped { map, path: path.to_owned() })), range })
    }

    /// Like [`map`](Self::map), for a file of which little will be read: the system does not read ahead.
    pub fn map_sparsely(path: &Path) -> io::Result<Self> {
        let bytes = Self::map(path)?;
        #[cfg(unix)]
        if let Owner::Map(mapped) = &bytes.owner {
            mapped.map.advise(memmap2::Advice::Random)?;
        }
        Ok(bytes)
    }

    /// The part `range` of these bytes, or `None` if it is not inside.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let (start, end) = (self.range.start.checked_add(range.start)?, self.range.start.checked_add(range.end)?);
        (start <= end && end <= self.range.end).then(|| Self { owner: self.owner.clone(), range: start..end })
    }

    pub fn as_slice(&self) -> &[u8] {
        match &self.owner {
            Owner::Map(mapped) => &mapped.map[self.range.clone()],
            Owner::Heap(bytes) => &bytes[self.range.clone()],
            Owner::Buffer(buffer) => &buffer.as_slice()[self.range.clone()],
        }
    }

    pub fn len(&self) -> usize {
        self.range.len()
    }

    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Tells the system that this process will not soon read these bytes again. The pages of a mapped file that they lie on are
    /// dropped from its memory and come back from the file when read, as do their neighbours'; nothing else changes.
    pub fn release(&self) {
        #[cfg(unix)]
        if let Owner::Map(mapped) = &self.owner {
            // Outwards: small weights lie on pages with others, and all of those together are not small.
            let start = self.range.start / PAGE * PAGE;
            let end = self.range.end.next_multiple_of(PAGE).min(mapped.map.len());
            if start < end {
                // SAFETY: the mapping is shared with the file and read-only, so dropped pages come back as they were.
                let advised =
                    unsafe { mapped.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
                if let Err(error) = advised {
                    tracing::debug!("mapped weights stay in memory: {error}");
                }
            }
        }
    }

    /// The same bytes in memory of this process's own, which the system cannot drop; the mapped ones are
    /// [released](Self::release).
    pub fn owned(&self) -> io::Result<Self> {
        if !self.is_mapped() || self.is_empty() {
            return Ok(self.clone());
        }
        let mut buffer = Buffer::new(self.len())?;
        buffer.as_mut_slice().copy_from_slice(self.as_slice());
        self.release();
        Ok(Arc::new(buffer).into())
    }

    /// Whether the bytes lie in a mapped file, so that the system may drop and re-read them.
    pub fn is_mapped(&self) -> bool {
        matches!(self.owner, Owner::Map(_))
    }

    /// Where a mapped file has these bytes.
    pub fn place(&self) -> Option<Place<'_>> {
        match &self.owner {
            Owner::Map(mapped) => {
                Some(Place { file: &mapped.path, offset: self.range.start as u64, bytes: self.range.len() as u64 })
            }
            Owner::Heap(_) | Owner::Buffer(_) => None,
        }
    }
}

impl From<Buffer> for WeightBytes {
    fn from(buffer: Buffer) -> Self {
        Arc::new(buffer).into()
    }
}

impl From<Arc<Buffer>> for WeightBytes {
    fn from(buffer: Arc<Buffer>) -> Self {
        let range = 0..buffer.as_slice().len();
        Self { owner: Owner::Buffer(buffer), range }
    }
}

impl From<Vec<u8>> for WeightBytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Owner::Heap(Arc::new(bytes)), range }
    }
}

impl fmt::Debug for WeightBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_mapped() { "mapped" } else { "owned" };
        write!(f, "WeightBytes({kind}, {} bytes)", self.len())
    }
}

/// A packed matrix `[rows (out), cols (in)]`, row-major, in the checkpoint's own type.
#[derive(Clone, Debug)]
pub struct Matrix {
    bytes: WeightBytes,
    dtype: DType,
    rows: usize,
    cols: usize,
}

impl Matrix {
    /// `None` unless `bytes` holds exactly `rows * cols` elements.
    pub fn new(bytes: WeightBytes, dtype: DType, rows: usize, cols: usize) -> Option<Self> {
        let expected = rows.checked_mul(cols)?.checked_mul(dtype.size())?;
        (bytes.len() == expected).then_some(Self { bytes, dtype, rows, cols })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// Where a mapped file has it.
    pub fn place(&self) -> Option<Place<'_>> {
        self.bytes.place()
    }

    /// The memory it lies in.
    pub fn memory(&self) -> &WeightBytes {
        &self.bytes
    }

    /// The packed bytes of rows `range`.
    pub fn rows_bytes(&self, range: Range<usize>) -> &[u8] {
        let row_bytes = self.cols * self.dtype.size();
        &self.bytes.as_slice()[range.start * row_bytes..range.end * row_bytes]
    }

    /// Writes row `row` as f32 into `out` (`cols` values).
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        self.dtype.widen(self.rows_bytes(row..row + 1), out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_stay_inside() {
        let bytes = WeightBytes::from(vec![1, 2, 3, 4]);
        let inner = bytes.slice(1..3).unwrap();
        assert_eq!(inner.as_slice(), [2, 3]);
        assert_eq!(inner.slice(1..2).unwrap().as_slice(), [3]);
        assert!(inner.slice(0..3).is_none());
        assert!(inner.slice(usize::MAX..usize::MAX).is_none());
    }

    #[test]
    fn widening_is_exact() {
        let mut out = [0.0; 2];
        let raw: Vec<u8> = [1.5f32, -0.0].iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        DType::BF16.widen(&raw, &mut out);
        assert_eq!(out.map(f32::to_bits), [1.5f32, -0.0].map(f32::to_bits));
        let raw: Vec<u8> = [0.25f32, 65504.0].iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        DType::F16.widen(&raw, &mut out);
        assert_eq!(out, [0.25, 65504.0]);
    }

    #[test]
    fn a_matrix_has_all_its_elements() {
        assert!(Matrix::new(vec![0; 12].into(), DType::BF16, 2, 3).is_some());
        assert!(Matrix::new(vec![0; 11].into(), DType::BF16, 2, 3).is_none());
        assert!(Matrix::new(Vec::new().into(), DType::F32, usize::MAX, 2).is_none());
    }
}
