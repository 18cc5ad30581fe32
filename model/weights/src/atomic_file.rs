//! Files that appear whole or not at all.
//!
//! Owns [`TemporaryFile`], which is written under another name, synced, and renamed when it is kept. The invariant: a
//! file under its final name is complete and on disk, whatever happens meanwhile.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

/// Bytes gathered before a file is written to.
const BUFFER_BYTES: usize = 1 << 20;

/// A file that vanishes unless it is kept. What is written is summed on the way.
pub struct TemporaryFile {
    path: PathBuf,
    file: Option<BufWriter<File>>,
    hasher: blake3::Hasher,
}

impl TemporaryFile {
    pub fn new(dir: &Path, name: &str) -> io::Result<Self> {
        let path = dir.join(format!("{name}.partial"));
        let file = File::create(&path)?;
        Ok(Self { path, file: Some(BufWriter::with_capacity(BUFFER_BYTES, file)), hasher: blake3::Hasher::new() })
    }

    fn writer(&mut self) -> &mut BufWriter<File> {
        self.file.as_mut().expect("open until it is kept")
    }

    /// Of what was written.
    pub fn checksum(&self) -> String {
        self.hasher.finalize().to_string()
    }

    /// Puts it under its name, once all of it is on disk. Returns its sum.
    pub fn keep(mut self, name: &Path) -> io::Result<String> {
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
            // What is buffered goes nowhere: the file goes too. Should that fail, the next run overwrites it.
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
