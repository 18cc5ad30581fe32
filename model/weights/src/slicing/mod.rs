//! Slices of a whole model into a folder, part by part, resumably.
//!
//! Owns [`slice_checkpoint`] and [`write_slices`]. A file is written under a temporary name, synced and renamed, and
//! `slices.json` comes last: so a folder is complete or is not a model yet, whatever happens in between, and what is
//! finished is not written again; of a complete folder only what is damaged is made again. `slicing.json` says meanwhile what is being sliced, and `slicing.sums` what the
//! finished files should contain; a folder that was begun from something else is refused. The invariant: memory does not grow with the model; weights are read from their files in
//! blocks and never mapped.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use serde_json::{Value, json};

use self::{
    checksums::sum_of_file,
    part_slices::{ReadAt, part_bytes, write_part},
    sliced_folder::{PartFiles, SLICES, SliceFile, SlicesFile},
};
use crate::{
    atomic_file::{TemporaryFile, write_file},
    checkpoint::Checkpoint,
    error::LoadError,
    parts::{Part, parts},
    slices::{FORMAT, Slice, SliceError},
};

pub mod checksums;
pub mod part_slices;
pub mod sliced_folder;

/// What is being sliced; there until the folder is complete.
const MARKER: &str = "slicing.json";
/// Finished files, a line for each: BLAKE3 and name; there as long.
const SUMS: &str = "slicing.sums";

/// Why a model was not sliced, or not to the end.
#[derive(Debug, thiserror::Error)]
pub enum SlicingError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("{part}: {source}")]
    Slice { part: String, source: SliceError },
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

/// What is sliced: its parts, where their bytes are, and the files that go with them.
pub struct Material<'a, S: ?Sized> {
    pub parts: &'a [Part],
    pub source: &'a S,
    /// Files other than weights: name and contents.
    pub files: Vec<(String, Vec<u8>)>,
    /// Tells this material from any other; a folder begun with another origin is not gone on with.
    pub origin: Value,
}

/// Slices the checkpoint `dir` into the folder `out`. `progress` gets bytes of weights done, and of how many.
///
/// # Errors
/// [`SlicingError`]; after one, the same call goes on where it stopped.
pub fn slice_checkpoint(dir: &Path, out: &Path, progress: impl FnMut(u64, u64)) -> Result<(), SlicingError> {
    // Open maps the weights, but only their headers are read through the mapping.
    let checkpoint = Checkpoint::open(dir)?;
    let (mut weights, mut origin) = (Vec::new(), Vec::new());
    for path in checkpoint.weight_files() {
        let file = File::open(path).map_err(named(path))?;
        let metadata = file.metadata().map_err(named(path))?;
        let changed = metadata.modified().map_err(named(path))?.duration_since(UNIX_EPOCH).unwrap_or_default();
        let path = fs::canonicalize(path).map_err(named(path))?;
        origin.push(json!({"file": path, "bytes": metadata.len(), "modified_ns": changed.as_nanos().to_string()}));
        weights.push(file);
    }
    let read = |(name, path): (String, PathBuf)| Ok((name, fs::read(&path).map_err(named(&path))?));
    let files = checkpoint.files().into_iter().map(read).collect::<Result<_, SlicingError>>()?;
    let parts = parts(&checkpoint);
    let material = Material { parts: &parts, source: weights.as_slice(), files, origin: origin.into() };
    write_slices(&material, out, progress)
}

/// Slices `material` into the folder `out`, which is made if it is not there, and mended if it holds these slices already. See
/// [`slice_checkpoint`].
pub fn write_slices<S: ReadAt + ?Sized>(
    material: &Material<'_, S>,
    out: &Path,
    mut progress: impl FnMut(u64, u64),
) -> Result<(), SlicingError> {
    let dir = || out.display().to_string();
    fs::create_dir_all(out).map_err(named(out))?;
    let marker = out.join(MARKER);
    // Another version of coel may make other slices of the same origin: a folder is of one kind.
    let origin = json!({"format": FORMAT, "of": material.origin});
    match fs::read(&marker) {
        Ok(begun) if serde_json::from_slice::<Value>(&begun).ok().as_ref() != Some(&origin) => {
            return Err(SlicingError::Other { dir: dir() });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if out.join(SLICES).exists() {
                return mend(material, out, progress);
            }
            if out.join("config.json").exists() {
                return Err(SlicingError::Occupied { dir: dir() });
            }
            write_file(out, MARKER, |file| file.write_all(origin.to_string().as_bytes()))
                .map_err(|error| failed(&marker, error, 0, material.parts.len()))?;
        }
        Err(source) => return Err(named(&marker)(source)),
    }
    let sizes = material.parts.iter().map(|part| Ok(PartFiles::new(&part.kind, in_part(part, part_bytes(part))?)));
    let mut listed = sizes.collect::<Result<Vec<_>, SlicingError>>()?;
    let noted_in = out.join(SUMS);
    let noted = sums(&noted_in).map_err(named(&noted_in))?;
    let mut notes = File::options().append(true).create(true).open(&noted_in).map_err(named(&noted_in))?;
    let (mut done, total) = (0, material.parts.iter().map(Part::data_bytes).sum());
    for (index, (part, files)) in material.parts.iter().zip(&mut listed).enumerate() {
        progress(done, total);
        if !(finished(out, &mut files.base, &noted) && finished(out, &mut files.refine, &noted)) {
            write_pair(out, part, files, material.source, index, material.parts.len())?;
            let note = [&files.base, &files.refine].map(|slice| format!("{} {}\n", slice.blake3, slice.file));
            notes
                .write_all(note.concat().as_bytes())
                .map_err(|error| failed(&noted_in, error, index, material.parts.len()))?;
        }
        done += part.data_bytes();
    }
    progress(total, total);
    let at_end = |file: &Path, error| failed(file, error, material.parts.len(), material.parts.len());
    for (name, contents) in &material.files {
        write_file(out, name, |file| file.write_all(contents)).map_err(|error| at_end(&out.join(name), error))?;
    }
    let slices = SlicesFile { format: FORMAT.to_owned(), parts: listed };
    let slices = serde_json::to_vec_pretty(&slices).expect("strings and numbers");
    write_file(out, SLICES, |file| file.write_all(&slices)).map_err(|error| at_end(&out.join(SLICES), error))?;
    fs::remove_file(&noted_in).map_err(named(&noted_in))?;
    fs::remove_file(&marker).map_err(named(&marker))
}

/// Makes again what is damaged or missing of a folder that was complete. What its list says of the files has to come out, of one
/// expert at least, before anything is changed: so slices of another checkpoint of this shape are left alone.
fn mend<S: ReadAt + ?Sized>(
    material: &Material<'_, S>,
    out: &Path,
    mut progress: impl FnMut(u64, u64),
) -> Result<(), SlicingError> {
    let occupied = || SlicingError::Occupied { dir: out.display().to_string() };
    let listed = fs::read(out.join(SLICES)).map_err(named(&out.join(SLICES)))?;
    let listed: SlicesFile = serde_json::from_slice(&listed).map_err(|_| occupied())?;
    let mut files = Vec::new();
    for part in material.parts {
        let wanted = PartFiles::new(&part.kind, in_part(part, part_bytes(part))?);
        let found = listed.parts.iter().find(|found| found.part == wanted.part).ok_or_else(occupied)?;
        let same = |found: &SliceFile, wanted: &SliceFile| {
            (&found.file, found.bytes) == (&wanted.file, wanted.bytes) && !found.blake3.is_empty()
        };
        if !same(&found.base, &wanted.base) || !same(&found.refine, &wanted.refine) {
            return Err(occupied());
        }
        files.push(found.clone());
    }
    let mut missing = Vec::new();
    for (name, contents) in &material.files {
        match fs::read(out.join(name)) {
            Ok(found) if found == *contents => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push((name, contents)),
            Ok(_) => return Err(occupied()),
            Err(source) => return Err(named(&out.join(name))(source)),
        }
    }
    if listed.format != FORMAT || files.len() != listed.parts.len() {
        return Err(occupied());
    }
    let sums = files.iter().flat_map(|part| [&part.base, &part.refine]);
    let noted = sums.map(|slice| (slice.file.clone(), slice.blake3.clone())).collect();
    let probe = material.parts.iter().rposition(|part| part.expert().is_some()).unwrap_or_default();
    let order = std::iter::once(probe).chain((0..files.len()).filter(|index| *index != probe));
    let (mut done, total) = (0, material.parts.iter().map(Part::data_bytes).sum());
    for (count, index) in order.enumerate() {
        let (part, files) = (&material.parts[index], &mut files[index]);
        progress(done, total);
        let whole = finished(out, &mut files.base, &noted) && finished(out, &mut files.refine, &noted);
        if !whole || index == probe {
            write_pair(out, part, files, material.source, count, material.parts.len())?;
        }
        done += part.data_bytes();
    }
    progress(total, total);
    for (name, contents) in missing {
        let written = write_file(out, name, |file| file.write_all(contents));
        written.map_err(|error| failed(&out.join(name), error, material.parts.len(), material.parts.len()))?;
    }
    Ok(())
}

/// What is noted of finished files: BLAKE3 by name. A line that was cut short says nothing.
fn sums(noted: &Path) -> io::Result<BTreeMap<String, String>> {
    match fs::read_to_string(noted) {
        Ok(text) => {
            let lines = text.lines().filter_map(|line| line.split_once(' '));
            Ok(lines.map(|(sum, name)| (name.to_owned(), sum.to_owned())).collect())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) => Err(error),
    }
}

fn named(path: &Path) -> impl FnOnce(io::Error) -> SlicingError {
    let file = path.display().to_string();
    move |source| SlicingError::Io { file, source }
}

fn in_part<T>(part: &Part, result: Result<T, SliceError>) -> Result<T, SlicingError> {
    result.map_err(|source| SlicingError::Slice { part: part.kind.to_string(), source })
}

fn failed(path: &Path, source: io::Error, done: usize, total: usize) -> SlicingError {
    let file = path.display().to_string();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => SlicingError::Full { file, done, total },
        _ => SlicingError::Io { file, source },
    }
}

/// Whether the file is there as it was noted; takes over its sum.
fn finished(out: &Path, slice: &mut SliceFile, noted: &BTreeMap<String, String>) -> bool {
    let path = out.join(&slice.file);
    let whole = fs::metadata(&path).is_ok_and(|found| found.is_file() && found.len() == slice.bytes);
    match noted.get(&slice.file) {
        Some(sum) if whole && sum_of_file(&path).is_ok_and(|found| found == *sum) => {
            slice.blake3.clone_from(sum);
            true
        }
        _ => false,
    }
}

/// Makes both slices of a part. A sum that is known of one beforehand has to come out.
fn write_pair(
    out: &Path,
    part: &Part,
    files: &mut PartFiles,
    source: &(impl ReadAt + ?Sized),
    done: usize,
    total: usize,
) -> Result<(), SlicingError> {
    let paths = [out.join(&files.base.file), out.join(&files.refine.file)];
    let [base_path, refine_path] = &paths;
    let open = |slice: &SliceFile, path: &Path| {
        TemporaryFile::new(out, &slice.file).map_err(|error| failed(path, error, done, total))
    };
    let (mut base, mut refine) = (open(&files.base, base_path)?, open(&files.refine, refine_path)?);
    match write_part(part, source, &mut base, &mut refine) {
        Err(SliceError::Write { slice, source }) => {
            let path = if slice == Slice::Base { base_path } else { refine_path };
            return Err(failed(path, source, done, total));
        }
        other => in_part(part, other)?,
    }
    let is_other = |slice: &SliceFile, file: &TemporaryFile| !slice.blake3.is_empty() && slice.blake3 != file.sum();
    if is_other(&files.base, &base) || is_other(&files.refine, &refine) {
        return Err(SlicingError::Occupied { dir: out.display().to_string() });
    }
    for (file, path, slice) in [(base, base_path, &mut files.base), (refine, refine_path, &mut files.refine)] {
        slice.blake3 = file.keep(path).map_err(|error| failed(path, error, done, total))?;
    }
    Ok(())
}
