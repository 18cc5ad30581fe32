//! Files that appear whole or not at all.
//!
//! Owns [`TemporaryFile`], which is written under a temporary name, synced, and renamed once it is complete. The
//! invariant: a file under its final name is complete and on disk, even after a crash.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

/// Bytes buffered before they are written.
const BUFFER_BYTES: usize = 1 << 20;

/// A file that is deleted on drop unless it is kept. Its content is hashed while it is written.
pub(crate) struct TemporaryFile {
    path: PathBuf,
    file: Option<BufWriter<File>>,
    hasher: blake3::Hasher,
}

impl TemporaryFile {
    /// Creates `name` in `dir`, under a temporary name.
    pub(crate) fn new(dir: &Path, name: &str) -> io::Result<Self> {
        let path = dir.join(format!("{name}.partial"));
        let file = File::create(&path)?;
        Ok(Self { path, file: Some(BufWriter::with_capacity(BUFFER_BYTES, file)), hasher: blake3::Hasher::new() })
    }

    fn writer(&mut self) -> &mut BufWriter<File> {
        self.file.as_mut().expect("open until it is kept")
    }

    /// BLAKE3 of what was written so far, in hexadecimal.
    pub(crate) fn checksum(&self) -> String {
        self.hasher.finalize().to_string()
    }

    /// Syncs the file and renames it to `name`. Returns its [`checksum`](Self::checksum).
    pub(crate) fn keep(mut self, name: &Path) -> io::Result<String> {
        self.writer().flush()?;
        self.writer().get_ref().sync_all()?;
        fs::rename(&self.path, name)?;
        self.file = None;
        if let Some(dir) = name.parent() {
            File::open(dir)?.sync_all()?;
        }
        Ok(self.checksum())
    }
}

impl Write for TemporaryFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.writer().write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer().flush()
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            // Buffered bytes are discarded with the file. If it cannot be deleted, the next run overwrites it.
            drop(file.into_parts());
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Writes a small file, whole or not at all.
pub fn write_file(dir: &Path, name: &str, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut temporary = TemporaryFile::new(dir, name)?;
    write(&mut temporary)?;
    temporary.keep(&dir.join(name)).map(drop)
}
