//! How an expert's weights get from files into a buffer.
//!
//! Owns [`ReadPlan`]: the runs of bytes to read, their places in the buffer, and the tensors that are in a filled
//! buffer. Runs start and end at whole pages of both the file and the buffer, so that they can bypass the page cache.
//! Tensors that lie near each other in a file share a run. The invariant: the tensors in a filled buffer have the same
//! bytes as those that the plan was made of, or filling it returned an error that names the file. Nothing here knows
//! when to read.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use coel_weights::{
    memory::{Buffer, PAGE, ReadError, WeightBytes},
    tensors::Tensors,
};

/// Tensors closer than this in a file share a run, which reads the gap as well.
const GAP: u64 = 64 << 10;
/// Bytes of one read: enough for a disk's full speed, few enough that an abandoned load ends soon.
const READ_BYTES: usize = 4 << 20;

/// Consecutive bytes of one file, and their place in the buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    file: PathBuf,
    /// A multiple of [`PAGE`], as is `at`.
    offset: u64,
    /// Up to the end of the last tensor.
    bytes: u64,
    /// Where they begin in the buffer.
    at: usize,
}

impl Run {
    /// Where the next run may begin in the buffer.
    fn end(&self) -> usize {
        (self.at + self.bytes as usize).next_multiple_of(PAGE)
    }
}

/// How to read an expert's tensors.
#[derive(Clone, Debug)]
pub(super) struct ReadPlan {
    runs: Vec<Run>,
    /// The tensors, without their bytes.
    tensors: Tensors,
    /// Where each range of bytes begins and ends in the buffer, in the order of [`Tensors::moved`].
    ranges: Vec<(usize, usize)>,
}

impl ReadPlan {
    /// Plans to read `tensors`, all of which must lie in files.
    pub(super) fn of(tensors: &Tensors) -> Result<Self, ReadError> {
        let mut places = Vec::new();
        let empty = WeightBytes::from(Vec::new());
        let bare = tensors.moved(|name, bytes| {
            let place = bytes.place().ok_or_else(|| ReadError::NotInAFile { tensor: name.to_owned() })?;
            places.push((place.file.to_owned(), place.offset, place.offset + place.bytes));
            Ok(empty.clone())
        })?;
        let mut order: Vec<usize> = (0..places.len()).collect();
        order.sort_by(|a, b| places[*a].cmp(&places[*b]));
        let mut runs: Vec<Run> = Vec::new();
        let mut ranges = vec![(0, 0); places.len()];
        for index in order {
            let (file, start, end) = &places[index];
            let near = |run: &&mut Run| run.file == *file && *start <= run.offset + run.bytes + GAP;
            let run = match runs.last_mut().filter(near) {
                Some(run) => run,
                None => {
                    let at = runs.last().map_or(0, Run::end);
                    let offset = start / PAGE as u64 * PAGE as u64;
                    runs.push(Run { file: file.clone(), offset, bytes: 0, at });
                    runs.last_mut().expect("pushed just now")
                }
            };
            run.bytes = run.bytes.max(end - run.offset);
            let first = run.at + (start - run.offset) as usize;
            ranges[index] = (first, first + (end - start) as usize);
        }
        Ok(Self { runs, tensors: bare, ranges })
    }

    /// Bytes of the buffer that the plan fills: whole pages.
    pub(super) fn buffer_bytes(&self) -> u64 {
        self.runs.last().map_or(PAGE, Run::end).max(PAGE) as u64
    }

    /// Reads everything, unless `abandoned` becomes true. The number of bytes read.
    pub(super) fn fill(&self, buffer: &mut Buffer, abandoned: &AtomicBool) -> Result<u64, ReadError> {
        let mut total = 0;
        for run in &self.runs {
            let into = &mut buffer.as_mut_slice()[run.at..run.end()];
            total += Reading::open(&run.file).and_then(|reading| reading.read(run, into, abandoned))?;
        }
        Ok(total)
    }

    /// The tensors in a filled buffer.
    pub(super) fn tensors(&self, buffer: &Arc<Buffer>) -> Tensors {
        let whole = WeightBytes::from(buffer.clone());
        let mut ranges = self.ranges.iter();
        let moved = self.tensors.moved(|_, _| {
            let (start, end) = *ranges.next().expect("one for each range of bytes");
            Ok::<_, std::convert::Infallible>(whole.slice(start..end).expect("runs are inside the buffer"))
        });
        moved.unwrap_or_else(|never| match never {})
    }
}

/// An open file.
struct Reading<'a> {
    path: &'a Path,
    file: File,
    /// Whether reads bypass the page cache.
    direct: bool,
}

impl<'a> Reading<'a> {
    /// Opens a file for reads that bypass the page cache, where the file system allows it.
    fn open(path: &'a Path) -> Result<Self, ReadError> {
        #[cfg(target_os = "linux")]
        {
            use std::os::unix::fs::OpenOptionsExt;
            let opened = File::options().read(true).custom_flags(libc::O_DIRECT).open(path);
            if let Ok(file) = opened {
                return Ok(Self { path, file, direct: true });
            }
        }
        Self::open_cached(path)
    }

    fn open_cached(path: &'a Path) -> Result<Self, ReadError> {
        let file = File::open(path).map_err(|error| failed(path, &error))?;
        Ok(Self { path, file, direct: false })
    }

    fn read(self, run: &Run, into: &mut [u8], abandoned: &AtomicBool) -> Result<u64, ReadError> {
        let mut done = 0;
        while (done as u64) < run.bytes {
            if abandoned.load(Ordering::Relaxed) {
                return Err(ReadError::Abandoned);
            }
            let end = into.len().min(done + READ_BYTES);
            match self.read_some(run.offset + done as u64, &mut into[done..end]) {
                Ok(0) => {
                    let found = run.offset + done as u64;
                    return Err(ReadError::Truncated {
                        file: self.path.to_owned(),
                        expected: run.offset + run.bytes,
                        found,
                    });
                }
                // A file may end in the middle of a page; before its end, reads return whole pages.
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Some file systems accept the flag and then refuse to read.
                Err(error) if self.direct && error.kind() == io::ErrorKind::InvalidInput => {
                    return Self::open_cached(self.path)?.read(run, into, abandoned);
                }
                Err(error) => return Err(failed(self.path, &error)),
            }
        }
        if !self.direct {
            drop_cached(&self.file, run.offset, run.bytes);
        }
        Ok(done as u64)
    }

    #[cfg(unix)]
    fn read_some(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(&self.file, into, offset)
    }

    #[cfg(not(unix))]
    fn read_some(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        use std::io::{Read, Seek};
        let mut file = &self.file;
        file.seek(io::SeekFrom::Start(offset))?;
        file.read(into)
    }
}

fn failed(path: &Path, error: &io::Error) -> ReadError {
    ReadError::Io { file: path.to_owned(), why: error.to_string() }
}

/// Tells the system that it need not cache what was read of a file.
fn drop_cached(file: &File, offset: u64, bytes: u64) {
    // A file system that does not take the advice costs memory of the page cache only.
    #[cfg(target_os = "linux")]
    let _ = rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(bytes), rustix::fs::Advice::DontNeed);
    #[cfg(not(target_os = "linux"))]
    let _ = (file, offset, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use coel_weights::{layout::ExpertId, slices::Precision};

    fn tensors(dir: &Path, id: ExpertId) -> Tensors {
        coel_weights::folder::ModelFolder::open(dir).unwrap().expert(id, Precision::Exact).unwrap()
    }

    fn fixture() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fixture"))
    }

    fn same(a: &Tensors, b: &Tensors) {
        assert_eq!(a.len(), b.len());
        for ((name, a), (_, b)) in a.iter().zip(b.iter()) {
            assert_eq!((&a.shape, a.bytes.as_slice()), (&b.shape, b.bytes.as_slice()), "{name}");
        }
    }

    fn never() -> AtomicBool {
        AtomicBool::new(false)
    }

    #[test]
    fn a_filled_buffer_has_the_mapped_bytes() {
        for id in [ExpertId { layer: 0, index: 0 }, ExpertId { layer: 3, index: 17 }] {
            let mapped = tensors(fixture(), id);
            let plan = ReadPlan::of(&mapped).unwrap();
            let mut buffer = Buffer::new(plan.buffer_bytes() as usize).unwrap();
            let read = plan.fill(&mut buffer, &never()).unwrap();
            assert!(read >= mapped.data_bytes());
            same(&plan.tensors(&Arc::new(buffer)), &mapped);
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(fixture().join(name), dir.path().join(name)).unwrap();
        }
        let plan = ReadPlan::of(&tensors(dir.path(), ExpertId { layer: 5, index: 23 })).unwrap();
        let mut buffer = Buffer::new(plan.buffer_bytes() as usize).unwrap();
        assert_eq!(plan.fill(&mut buffer, &AtomicBool::new(true)), Err(ReadError::Abandoned));

        let path = dir.path().join("model.safetensors");
        File::options().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
        let error = plan.fill(&mut buffer, &never()).unwrap_err();
        assert!(matches!(&error, ReadError::Truncated { file, .. } if *file == path), "{error}");
        std::fs::remove_file(&path).unwrap();
        let error = plan.fill(&mut buffer, &never()).unwrap_err();
        assert!(matches!(&error, ReadError::Io { file, .. } if *file == path), "{error}");
    }

    #[test]
    fn weights_in_no_file_cannot_stay_on_disk() {
        let sliced = tensors(fixture(), ExpertId { layer: 0, index: 0 }).sliced(Precision::Q4).unwrap();
        assert!(matches!(ReadPlan::of(&sliced), Err(ReadError::NotInAFile { .. })));
    }
}
