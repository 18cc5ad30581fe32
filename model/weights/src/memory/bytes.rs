//! Weight bytes, mapped or owned.
//!
//! Owns [`WeightBytes`], a shared and immutable range of memory that is mapped or owned. The invariant: the bytes never
//! change, and slicing and cloning copy nothing. File formats, devices and the use of weights are not known here.

use std::{
    fmt,
    fs::File,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;

use super::Buffer;

/// A multiple of the page size of every machine coel runs on.
#[cfg(unix)]
const PAGE: usize = 1 << 16;

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

/// A range of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRange<'a> {
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
        // SAFETY: the mapping is read-only, and the file is not truncated while mapped: see the note above.
        let map = unsafe { Mmap::map(&file)? };
        let range = 0..map.len();
        Ok(Self { owner: Owner::Map(Arc::new(Mapped { map, path: path.to_owned() })), range })
    }

    /// Like [`map`](Self::map), for a file of which little will be read: the system is told not to read ahead.
    pub fn map_sparsely(path: &Path) -> io::Result<Self> {
        let bytes = Self::map(path)?;
        #[cfg(unix)]
        if let Owner::Map(mapped) = &bytes.owner {
            mapped.map.advise(memmap2::Advice::Random)?;
        }
        Ok(bytes)
    }

    /// The bytes `range` of these, or `None` if it is out of bounds.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let (start, end) = (self.range.start.checked_add(range.start)?, self.range.start.checked_add(range.end)?);
        (start <= end && end <= self.range.end).then(|| Self { owner: self.owner.clone(), range: start..end })
    }

    #[inline]
    pub fn as_slice(&self) -> &[u8] {
        match &self.owner {
            Owner::Map(mapped) => &mapped.map[self.range.clone()],
            Owner::Heap(bytes) => &bytes[self.range.clone()],
            Owner::Buffer(buffer) => &buffer.as_slice()[self.range.clone()],
        }
    }

    #[inline]
    pub fn len(&self) -> usize {
        self.range.len()
    }

    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Tells the system that this process will not read these bytes again soon. The pages of a mapped file that hold them
    /// (and their neighbours on those pages) leave this process's memory and come back from the file when they are read.
    pub fn release(&self) {
        #[cfg(unix)]
        if let Owner::Map(mapped) = &self.owner {
            // Rounded outwards: small weights share pages with others, and together they are not small.
            let start = self.range.start / PAGE * PAGE;
            let end = self.range.end.next_multiple_of(PAGE).min(mapped.map.len());
            if start < end {
                // SAFETY: the range is inside the mapping, which is read-only and backed by the file, so that dropped pages
                // come back with the bytes they had.
                let advised =
                    unsafe { mapped.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
                if let Err(error) = advised {
                    tracing::debug!("mapped weights stay in memory: {error}");
                }
            }
        }
    }

    /// A copy in this process's own memory, which the system cannot drop. Mapped bytes are then
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

    /// Whether the bytes lie in a mapped file, so that the system may drop and reread them.
    pub fn is_mapped(&self) -> bool {
        matches!(self.owner, Owner::Map(_))
    }

    /// The place of these bytes in a mapped file.
    pub fn place(&self) -> Option<FileRange<'_>> {
        match &self.owner {
            Owner::Map(mapped) => {
                Some(FileRange { file: &mapped.path, offset: self.range.start as u64, bytes: self.range.len() as u64 })
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
}
