//! Slices of a whole model into a folder, resumably.
//!
//! Owns [`slice_checkpoint`] and [`write_slices`], the [`SliceSink`] that is a folder, and the two files that are there
//! until the folder is complete: `slicing.json` says what is being sliced, `slicing.sums` lists the checksums of finished
//! files. A file is written under a temporary name, synced and renamed, and `slices.json` comes last. The invariant: a
//! folder is complete or is not a model yet, whatever happens in between. Finished files are not written again, a folder
//! that was begun from something else is refused, and in a complete folder only what is damaged is made again.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{
    checksums::checksum_of_file,
    part_slices::part_bytes,
    sliced_folder::{PartFiles, SLICES, SliceFile, SlicesFile, file_name},
    source::{ReadAt, SourceError, SourceFiles},
    writer::{Kept, Made, PartError, SliceSink, slice_parts},
};
use crate::{
    atomic_file::{TemporaryFile, write_file},
    checkpoint::Checkpoint,
    error::LoadError,
    parts::{Part, PartKind, parts},
    slices::{FORMAT, SliceError},
};

/// What is being sliced; there until the folder is complete.
const MARKER: &str = "slicing.json";
/// Finished files, a line for each: BLAKE3 and name; there as long.
const CHECKSUMS: &str = "slicing.sums";

/// Why a model was not sliced, or not to the end.
#[derive(Debug, thiserror::Error)]
pub enum SlicingError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("{part}: {source}")]
    Slice { part: PartKind, source: SliceError },
    #[error("{file}: {source}")]
    Io { file: String, source: io::Error },
    #[error(
        "the disk is full: {file} could not be written ({done} of {total} parts are finished); make room and run the \
         same command again, it goes on from there"
    )]
    Full { file: String, done: usize, total: usize },
    #[error("{dir} holds another model already; name a folder that does not exist yet, or remove this one")]
    Occupied { dir: String },
    #[error("{dir} was begun from something else (see {MARKER} there); name another folder, or remove this one")]
    Other { dir: String },
}

/// What is sliced: parts, where their bytes are, and the files that go with them.
pub struct Material<'a, S: ?Sized> {
    pub parts: &'a [Part],
    pub source: &'a S,
    /// Files other than weights: name and contents.
    pub files: Vec<(String, Vec<u8>)>,
    /// Identifies the material: a folder that was begun with another origin is refused.
    pub origin: Value,
}

/// Slices the checkpoint `dir` into the folder `out`. `progress` gets bytes of weights done, and of how many.
///
/// # Errors
/// [`SlicingError`]; after one, the same call goes on where it stopped.
pub fn slice_checkpoint(dir: &Path, out: &Path, progress: impl FnMut(u64, u64)) -> Result<(), SlicingError> {
    // Open maps the weights, but only their headers are read through the mapping.
    let checkpoint = Checkpoint::open(dir)?;
    let source = SourceFiles::open(checkpoint.weight_files())?;
    let read = |(name, path): (String, PathBuf)| Ok((name, fs::read(&path).map_err(io_error(&path))?));
    let files = checkpoint.files().into_iter().map(read).collect::<Result<_, SlicingError>>()?;
    let (parts, origin) = (parts(&checkpoint), source.origin());
    write_slices(&Material { parts: &parts, source: &source, files, origin }, out, progress)
}

/// Slices `material` into the folder `out`, which is created if it does not exist, and mended if it holds these slices
/// already. See [`slice_checkpoint`].
pub fn write_slices<S: ReadAt + ?Sized>(
    material: &Material<'_, S>,
    out: &Path,
    mut progress: impl FnMut(u64, u64),
) -> Result<(), SlicingError> {
    fs::create_dir_all(out).map_err(io_error(out))?;
    let (mut folder, missing) = match begin(material, out)? {
        Begun::New => (FolderSink::resume(material.parts, out)?, material.files.iter().collect()),
        Begun::Complete => FolderSink::mend(material, out)?,
    };
    slice_parts(material.parts, material.source, &mut folder, |done, total| {
        progress(done, total);
        Ok(())
    })?;
    folder.complete(missing)
}

/// How far a folder is.
enum Begun {
    /// Its parts are being written, perhaps since an earlier call.
    New,
    /// It was complete once.
    Complete,
}

/// Claims `out` for `material`, unless something else was begun there.
fn begin<S: ?Sized>(material: &Material<'_, S>, out: &Path) -> Result<Begun, SlicingError> {
    let dir = || out.display().to_string();
    let marker = out.join(MARKER);
    // Another version of coel may make other slices of the same origin: a folder is of one kind.
    let origin = json!({"format": FORMAT, "of": material.origin});
    match fs::read(&marker) {
        Ok(begun) if serde_json::from_slice::<Value>(&begun).ok().as_ref() == Some(&origin) => Ok(Begun::New),
        Ok(_) => Err(SlicingError::Other { dir: dir() }),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(&marker)(error)),
        Err(_) if out.join(SLICES).exists() => Ok(Begun::Complete),
        Err(_) if out.join("config.json").exists() => Err(SlicingError::Occupied { dir: dir() }),
        Err(_) => {
            write_file(out, MARKER, |file| file.write_all(origin.to_string().as_bytes()))
                .map_err(|error| write_error(&marker, error, 0, material.parts.len()))?;
            Ok(Begun::New)
        }
    }
}

/// A file that goes with the weights: name and contents.
type OtherFile = (String, Vec<u8>);

/// A folder that slices are written into.
struct FolderSink<'a> {
    out: &'a Path,
    /// The files of each part. A checksum that is known beforehand has to come out.
    listed: Vec<PartFiles>,
    /// Checksums of files that were finished before, by name.
    finished: BTreeMap<String, String>,
    /// Where checksums are noted; `None` where `slices.json` has them already.
    notes: Option<File>,
    /// The part that is made again whether it is kept or not, before anything else is changed.
    probe: Option<usize>,
    /// Parts that are done.
    done: usize,
}

impl<'a> FolderSink<'a> {
    /// A folder that is not complete yet.
    fn resume(parts: &[Part], out: &'a Path) -> Result<Self, SlicingError> {
        let listed = parts.iter().map(part_files).collect::<Result<_, _>>()?;
        let path = out.join(CHECKSUMS);
        let finished = noted_checksums(&path).map_err(io_error(&path))?;
        let notes = File::options().append(true).create(true).open(&path).map_err(io_error(&path))?;
        Ok(Self { out, listed, finished, notes: Some(notes), probe: None, done: 0 })
    }

    /// A folder that was complete, and those of the `material`'s other files that it lacks. The checksums that it lists have
    /// to come out, of one expert at least, before anything is changed: so slices of another checkpoint of this shape are
    /// left alone.
    fn mend<'m, S: ?Sized>(
        material: &'m Material<'_, S>,
        out: &'a Path,
    ) -> Result<(Self, Vec<&'m OtherFile>), SlicingError> {
        let occupied = || SlicingError::Occupied { dir: out.display().to_string() };
        let path = out.join(SLICES);
        let slices = fs::read(&path).map_err(io_error(&path))?;
        let slices: SlicesFile = serde_json::from_slice(&slices).map_err(|_| occupied())?;
        let mut listed = Vec::new();
        for part in material.parts {
            let wanted = part_files(part)?;
            let found = slices.parts.iter().find(|found| found.part == wanted.part).ok_or_else(occupied)?;
            let same = |found: &SliceFile, wanted: &SliceFile| {
                (&found.file, found.bytes) == (&wanted.file, wanted.bytes) && !found.blake3.is_empty()
            };
            if !same(&found.base, &wanted.base) || !same(&found.refine, &wanted.refine) {
                return Err(occupied());
            }
            listed.push(found.clone());
        }
        let mut missing = Vec::new();
        for file @ (name, contents) in &material.files {
            match fs::read(out.join(name)) {
                Ok(found) if found == *contents => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(file),
                Ok(_) => return Err(occupied()),
                Err(source) => return Err(io_error(&out.join(name))(source)),
            }
        }
        if slices.format != FORMAT || listed.len() != slices.parts.len() {
            return Err(occupied());
        }
        let files = listed.iter().flat_map(|part| [&part.base, &part.refine]);
        let finished = files.map(|slice| (slice.file.clone(), slice.blake3.clone())).collect();
        let probe = material.parts.iter().rposition(|part| part.expert().is_some()).unwrap_or_default();
        Ok((Self { out, listed, finished, notes: None, probe: Some(probe), done: 0 }, missing))
    }

    /// Writes what makes a folder of slices a model.
    fn complete(self, others: Vec<&OtherFile>) -> Result<(), SlicingError> {
        let failed = |file: &Path, error| write_error(file, error, self.done, self.listed.len());
        for (name, contents) in others {
            let written = write_file(self.out, name, |file| file.write_all(contents));
            written.map_err(|error| failed(&self.out.join(name), error))?;
        }
        if self.notes.is_none() {
            return Ok(());
        }
        let slices = SlicesFile { format: FORMAT.to_owned(), parts: self.listed.clone() };
        let slices = serde_json::to_vec_pretty(&slices).expect("strings and numbers");
        let written = write_file(self.out, SLICES, |file| file.write_all(&slices));
        written.map_err(|error| failed(&self.out.join(SLICES), error))?;
        [CHECKSUMS, MARKER]
            .map(|name| self.out.join(name))
            .iter()
            .try_for_each(|path| fs::remove_file(path).map_err(io_error(path)))
    }

    fn failed(&self, file: &str, error: io::Error) -> SlicingError {
        write_error(&self.out.join(file), error, self.done, self.listed.len())
    }
}

impl SliceSink for FolderSink<'_> {
    type Writer = TemporaryFile;
    type Digest = Infallible;
    type Error = SlicingError;

    fn digest(&self) -> Option<Infallible> {
        None
    }

    fn first(&self) -> Option<usize> {
        self.probe
    }

    fn kept(&mut self, index: usize) -> Result<Kept, SlicingError> {
        let files = &mut self.listed[index];
        let is_finished = |slice| is_finished(self.out, slice, &self.finished);
        let whole = is_finished(&mut files.base) && is_finished(&mut files.refine);
        if !whole || self.probe == Some(index) {
            return Ok(Kept::Nothing);
        }
        self.done += 1;
        Ok(Kept::Whole)
    }

    fn begin(&mut self, index: usize) -> Result<Option<[TemporaryFile; 2]>, SlicingError> {
        let open = |slice: &SliceFile| {
            TemporaryFile::new(self.out, &slice.file).map_err(|error| self.failed(&slice.file, error))
        };
        let PartFiles { base, refine, .. } = &self.listed[index];
        Ok(Some([open(base)?, open(refine)?]))
    }

    fn finish(&mut self, index: usize, made: Made<TemporaryFile>, _: Option<Infallible>) -> Result<(), SlicingError> {
        let Made::Slices(written) = made else { unreachable!("a folder holds no part exactly") };
        let mut files = self.listed[index].clone();
        let is_other =
            |slice: &SliceFile, file: &TemporaryFile| !slice.blake3.is_empty() && slice.blake3 != file.checksum();
        if is_other(&files.base, &written[0]) || is_other(&files.refine, &written[1]) {
            return Err(SlicingError::Occupied { dir: self.out.display().to_string() });
        }
        for (file, slice) in written.into_iter().zip([&mut files.base, &mut files.refine]) {
            let kept = file.keep(&self.out.join(&slice.file));
            slice.blake3 = kept.map_err(|error| self.failed(&slice.file, error))?;
        }
        if let Some(notes) = &mut self.notes {
            let note = [&files.base, &files.refine].map(|slice| format!("{} {}\n", slice.blake3, slice.file));
            let noted = notes.write_all(note.concat().as_bytes());
            noted.map_err(|error| self.failed(CHECKSUMS, error))?;
        }
        self.listed[index] = files;
        self.done += 1;
        Ok(())
    }

    fn fail(&mut self, error: PartError<SlicingError>) -> SlicingError {
        match error {
            PartError::Slice { part, source: SliceError::Write { slice, source } } => {
                self.failed(&file_name(&part, slice), source)
            }
            PartError::Slice { part, source } => SlicingError::Slice { part, source },
            PartError::Source(error) => error.into(),
            PartError::Sink(error) => error,
        }
    }
}

/// The files of a part's slices, without checksums.
fn part_files(part: &Part) -> Result<PartFiles, SlicingError> {
    let bytes = part_bytes(part).map_err(|source| SlicingError::Slice { part: part.kind.clone(), source })?;
    Ok(PartFiles::new(&part.kind, bytes))
}

/// The checksums that are noted of finished files, by name. A line that was cut short says nothing.
fn noted_checksums(path: &Path) -> io::Result<BTreeMap<String, String>> {
    match fs::read_to_string(path) {
        Ok(text) => {
            let lines = text.lines().filter_map(|line| line.split_once(' '));
            Ok(lines.map(|(checksum, name)| (name.to_owned(), checksum.to_owned())).collect())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) => Err(error),
    }
}

/// Whether the file has the length and the checksum that are noted of it; takes over the checksum if so.
fn is_finished(out: &Path, slice: &mut SliceFile, noted: &BTreeMap<String, String>) -> bool {
    let path = out.join(&slice.file);
    let whole = fs::metadata(&path).is_ok_and(|found| found.is_file() && found.len() == slice.bytes);
    match noted.get(&slice.file) {
        Some(checksum) if whole && checksum_of_file(&path).is_ok_and(|found| found == *checksum) => {
            slice.blake3.clone_from(checksum);
            true
        }
        _ => false,
    }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> SlicingError {
    let file = path.display().to_string();
    move |source| SlicingError::Io { file, source }
}

fn write_error(path: &Path, source: io::Error, done: usize, total: usize) -> SlicingError {
    let file = path.display().to_string();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => SlicingError::Full { file, done, total },
        _ => SlicingError::Io { file, source },
    }
}
