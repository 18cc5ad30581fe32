//! A folder that holds a model as slices.
//!
//! Owns [`SlicedFolder`] and the form of `slices.json`, which lists every part with the files of its base and refine
//! slice. Those files lie beside it, and so do, unchanged, `config.json` and the tokenizer's files. The invariant: an open
//! folder lists exactly the parts its configuration implies, and each file has the length listed. A part's files are
//! mapped when the part is asked for and used in place; files of a precision that is not asked for are never touched.

use std::{
    collections::BTreeMap,
    fs,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{checksums, part_slices::PartBytes};
use crate::{
    checkpoint::{files_beside, read_config},
    config::ModelConfig,
    error::LoadError,
    layout::{self, ExpertId},
    memory::WeightBytes,
    parts::{PartKind, kinds},
    slices::{FORMAT, PartBlobs, Precision, Slice},
    tensors::Tensors,
};

/// The file whose presence makes a folder one of slices.
pub const SLICES: &str = "slices.json";

/// Longest `slices.json` accepted: about 200 bytes for each of the most parts a model has in practice.
const SLICES_BYTES_MAX: u64 = 64 << 20;

/// What `slices.json` says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SlicesFile {
    /// Version of the format, as in the metadata of blobs.
    pub(crate) format: String,
    pub(crate) parts: Vec<PartFiles>,
}

/// The files of one part.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PartFiles {
    pub(crate) part: String,
    pub(crate) base: SliceFile,
    pub(crate) refine: SliceFile,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SliceFile {
    pub(crate) file: String,
    pub(crate) bytes: u64,
    /// Of the file's content, in hexadecimal; missing in folders of format 1.
    #[serde(default)]
    pub(crate) blake3: String,
}

/// The name of a slice's file.
pub(super) fn file_name(kind: &PartKind, slice: Slice) -> String {
    format!("{kind}.{}.safetensors", slice.name())
}

impl PartFiles {
    pub(crate) fn new(kind: &PartKind, bytes: PartBytes) -> Self {
        let named = |slice, bytes| SliceFile { file: file_name(kind, slice), bytes, blake3: String::new() };
        let (base, refine) = (named(Slice::Base, bytes.base), named(Slice::Refine, bytes.refine));
        Self { part: kind.to_string(), base, refine }
    }
}

/// An open folder of slices.
#[derive(Clone, Debug)]
pub struct SlicedFolder {
    dir: PathBuf,
    config: Arc<ModelConfig>,
    parts: BTreeMap<PartKind, PartFiles>,
}

impl SlicedFolder {
    /// Whether `dir` claims to be a folder of slices.
    pub fn is_one(dir: &Path) -> bool {
        dir.join(SLICES).is_file()
    }

    /// Opens `dir` and checks that the files of every part are there and have the lengths listed.
    pub fn open(dir: &Path) -> Result<Self, LoadError> {
        let config = Arc::new(read_config(dir)?);
        let path = dir.join(SLICES);
        let file = path.display().to_string();
        let io = |source| LoadError::Io { file: file.clone(), source };
        let wrong = |why: String| LoadError::SlicesFile { file: file.clone(), why };
        if fs::metadata(&path).map_err(io)?.len() > SLICES_BYTES_MAX {
            return Err(wrong(format!("it is longer than {SLICES_BYTES_MAX} bytes")));
        }
        let text = fs::read(&path).map_err(io)?;
        let listed: SlicesFile = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        if listed.format != FORMAT {
            return Err(LoadError::Format { file, found: listed.format });
        }
        // Checked before the parts are enumerated: a few bytes of configuration can imply more than memory holds.
        let experts = layout::experts(&config).take(listed.parts.len() + 1).count();
        if experts > listed.parts.len() {
            return Err(wrong(format!("its {} parts are fewer than the model's experts", listed.parts.len())));
        }
        let mut listed: BTreeMap<String, PartFiles> =
            listed.parts.into_iter().map(|part| (part.part.clone(), part)).collect();
        let mut parts = BTreeMap::new();
        for (kind, _) in kinds(&config) {
            let name = kind.to_string();
            let part = listed.remove(&name).ok_or_else(|| wrong(format!("it lacks the part {name}")))?;
            for slice in [&part.base, &part.refine] {
                check_file(dir, slice, &wrong)?;
            }
            parts.insert(kind, part);
        }
        match listed.keys().next() {
            Some(name) => Err(wrong(format!("this model has no part {name}"))),
            None => Ok(Self { dir: dir.to_owned(), config, parts }),
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn config(&self) -> &Arc<ModelConfig> {
        &self.config
    }

    /// The files other than weights, as (name, path).
    pub fn files(&self) -> Vec<(String, PathBuf)> {
        files_beside(&self.dir)
    }

    /// The parts, with the lengths of their files.
    pub fn parts(&self) -> impl Iterator<Item = (&PartKind, PartBytes)> {
        let bytes = |part: &PartFiles| PartBytes { base: part.base.bytes, refine: part.refine.bytes };
        self.parts.iter().map(move |(kind, part)| (kind, bytes(part)))
    }

    /// The trunk's tensors, in place.
    ///
    /// # Errors
    /// [`LoadError::NoExact`] for exact weights, which a folder of slices does not have.
    pub fn trunk(&self, precision: Precision) -> Result<Tensors, LoadError> {
        let trunk = self.parts.iter().filter(|(kind, _)| matches!(kind, PartKind::Trunk { .. }));
        let parts = trunk.map(|(_, files)| self.part(files, precision, WeightBytes::map));
        Tensors::merge(parts.collect::<Result<Vec<_>, _>>()?)
    }

    /// One expert's tensors, in place; none for an expert the model does not have.
    pub fn expert(&self, id: ExpertId, precision: Precision) -> Result<Tensors, LoadError> {
        match self.parts.get(&PartKind::Expert(id)) {
            Some(files) => self.part(files, precision, WeightBytes::map),
            None => Ok(Tensors::default()),
        }
    }

    /// Like [`expert`](Self::expert), for files that will not be read through the mapping.
    pub fn expert_on_disk(&self, id: ExpertId, precision: Precision) -> Result<Tensors, LoadError> {
        match self.parts.get(&PartKind::Expert(id)) {
            Some(files) => self.part(files, precision, WeightBytes::map_sparsely),
            None => Ok(Tensors::default()),
        }
    }

    /// Checks that the files of these precisions have the content that was written when the model was sliced. Files that were
    /// verified before and have not been touched since are not read again; see [`checksums`].
    ///
    /// # Errors
    /// [`LoadError::Corrupt`] names the first file that differs.
    pub fn verify(&self, trunk: Precision, experts: Precision) -> Result<(), LoadError> {
        let files = self.parts.iter().flat_map(|(kind, files)| {
            let precision = if matches!(kind, PartKind::Expert(_)) { experts } else { trunk };
            let refine = (precision == Precision::Q8).then_some(&files.refine);
            [Some(&files.base), refine].into_iter().flatten()
        });
        let listed = files.filter(|slice| !slice.blake3.is_empty());
        checksums::verify(&self.dir, listed.map(|slice| (slice.file.as_str(), slice.blake3.as_str())).collect())
    }

    fn part(
        &self,
        files: &PartFiles,
        precision: Precision,
        map: fn(&Path) -> std::io::Result<WeightBytes>,
    ) -> Result<Tensors, LoadError> {
        let map = |slice: &SliceFile| {
            let path = self.dir.join(&slice.file);
            map(&path).map_err(|source| LoadError::Io { file: path.display().to_string(), source })
        };
        let refine = match precision {
            Precision::Exact => return Err(LoadError::NoExact { dir: self.dir.display().to_string() }),
            Precision::Q8 => Some(map(&files.refine)?),
            Precision::Q4 => None,
        };
        let source = self.dir.join(&files.base.file).display().to_string();
        Tensors::parse_part(PartBlobs { main: map(&files.base)?, refine }, &source)
    }
}

/// Checks that a listed file is in the folder itself and has the length listed.
fn check_file(dir: &Path, listed: &SliceFile, wrong: &dyn Fn(String) -> LoadError) -> Result<(), LoadError> {
    let mut components = Path::new(&listed.file).components();
    if !matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) {
        return Err(wrong(format!("{:?} leads out of the folder", listed.file)));
    }
    let path = dir.join(&listed.file);
    let file = path.display().to_string();
    match fs::metadata(&path) {
        Ok(found) if found.len() == listed.bytes => Ok(()),
        Ok(found) => {
            let why = format!("it has {} bytes and should have {}", found.len(), listed.bytes);
            Err(LoadError::Damaged { file, why })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(LoadError::Damaged { file, why: "this slice is missing".into() })
        }
        Err(source) => Err(LoadError::Io { file, source }),
    }
}
