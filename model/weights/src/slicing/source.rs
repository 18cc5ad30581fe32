//! The weight files of a checkpoint, as slicing reads them.
//!
//! Owns [`ReadAt`], where a part's bytes come from, and [`SourceFiles`], open files together with what identifies their
//! content: path, length and time of last change. The invariant: what is noted for these files holds only as long as
//! all three stay the same, and [`ReadAt::check_unchanged`] notices when they do not. It does not know what was made of
//! the files.

use std::{
    fs::{File, Metadata},
    io,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use serde_json::{Value, json};

use crate::{memory::WeightBytes, parts::Part, slices::FORMAT};

/// Why a weight file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("{}: {source}", .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} changed while it was being sliced; leave the checkpoint alone and run the same command again", .path.display())]
    Changed { path: PathBuf },
}

/// The weight files of a checkpoint, by [`TensorRange::file`](crate::parts::TensorRange::file).
pub trait ReadAt {
    /// Fills `into` from `offset` on.
    fn read_at(&self, file: usize, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Checks that `file` still has the content it had when it was opened. Sources that cannot change need no check.
    fn check_unchanged(&self, _file: usize) -> Result<(), SourceError> {
        Ok(())
    }
}

/// Whole files in memory, such as mapped ones.
impl ReadAt for [WeightBytes] {
    fn read_at(&self, file: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).ok();
        let bytes = self.get(file).zip(from).and_then(|(bytes, from)| bytes.as_slice().get(from..)?.get(..into.len()));
        into.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Opened files, read where they lie and not kept in this process's memory.
#[cfg(unix)]
impl ReadAt for [File] {
    fn read_at(&self, file: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let file = self.get(file).ok_or(io::ErrorKind::NotFound)?;
        std::os::unix::fs::FileExt::read_exact_at(file, into, offset)
    }
}

/// Opened weight files, and what identifies their content.
#[derive(Debug)]
pub struct SourceFiles {
    files: Vec<File>,
    identities: Vec<Identity>,
}

/// A file's content is taken for the same as long as these are.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    /// Canonical.
    path: PathBuf,
    bytes: u64,
    modified_ns: u128,
}

impl Identity {
    fn new(path: &Path, metadata: &Metadata) -> io::Result<Self> {
        let modified = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Self { path: path.to_owned(), bytes: metadata.len(), modified_ns: modified.as_nanos() })
    }
}

impl SourceFiles {
    /// Opens the weight files of a checkpoint, in order.
    ///
    /// # Errors
    /// [`SourceError::Io`].
    pub fn open(paths: &[PathBuf]) -> Result<Self, SourceError> {
        let mut opened = Self { files: Vec::new(), identities: Vec::new() };
        for path in paths {
            let open = || {
                let file = File::open(path)?;
                let identity = Identity::new(&path.canonicalize()?, &file.metadata()?)?;
                Ok((file, identity))
            };
            let (file, identity) = open().map_err(|source| SourceError::Io { path: path.clone(), source })?;
            opened.files.push(file);
            opened.identities.push(identity);
        }
        Ok(opened)
    }

    /// What identifies these files, as a folder of slices notes it while it is being written.
    pub fn origin(&self) -> Value {
        let each = self
            .identities
            .iter()
            .map(|file| json!({"file": file.path, "bytes": file.bytes, "modified_ns": file.modified_ns.to_string()}));
        each.collect::<Vec<_>>().into()
    }

    /// Identifies the slices of each part of these very files, in the present format.
    pub fn part_keys<'a>(&self, parts: impl IntoIterator<Item = &'a Part>) -> Vec<[u8; 32]> {
        let mut files = blake3::Hasher::new();
        files.update(FORMAT.as_bytes());
        for Identity { path, bytes, modified_ns } in &self.identities {
            files.update(format!("\0{}\0{bytes}\0{modified_ns}", path.display()).as_bytes());
        }
        let key = |part: &Part| {
            let mut key = files.clone();
            key.update(format!("\0{}\0", part.kind).as_bytes()).update(&part.header());
            *key.finalize().as_bytes()
        };
        parts.into_iter().map(key).collect()
    }
}

#[cfg(unix)]
impl ReadAt for SourceFiles {
    fn read_at(&self, file: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.files[..].read_at(file, offset, into)
    }

    fn check_unchanged(&self, file: usize) -> Result<(), SourceError> {
        let (Some(file), Some(identity)) = (self.files.get(file), self.identities.get(file)) else { return Ok(()) };
        let path = &identity.path;
        let now = file.metadata().and_then(|metadata| Identity::new(path, &metadata));
        match now {
            Ok(now) if now == *identity => Ok(()),
            Ok(_) => Err(SourceError::Changed { path: path.clone() }),
            Err(source) => Err(SourceError::Io { path: path.clone(), source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_written_to_is_not_the_one_that_was_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        std::fs::write(&path, b"weights").unwrap();
        let files = SourceFiles::open(std::slice::from_ref(&path)).unwrap();
        files.check_unchanged(0).unwrap();
        let mut bytes = [0; 3];
        files.read_at(0, 2, &mut bytes).unwrap();
        assert_eq!(&bytes, b"igh");
        std::fs::write(&path, b"other weights").unwrap();
        let changed = files.check_unchanged(0).unwrap_err();
        assert!(matches!(&changed, SourceError::Changed { path } if path.ends_with("weights")), "{changed}");
        let again = SourceFiles::open(&[path]).unwrap();
        assert_ne!(files.origin(), again.origin());
    }
}
