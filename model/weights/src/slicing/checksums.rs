//! Whether files still have the content that was written: BLAKE3 checksums, and a note of verified files.
//!
//! Owns [`verify`] and the note, `verified.json`, which lies beside the files. Reading gigabytes at every start would
//! cost more than loading them. So a file that was verified once is not read again while its inode, length and time of
//! last change stay the same; a copied, restored or rewritten file differs in one of them. The invariant: without a
//! matching note every byte is read. The note is a convenience: where it cannot be written, files are read each time.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use serde::{Deserialize, Serialize};

use crate::{atomic_file::write_file, error::LoadError};

const NOTE: &str = "verified.json";
/// Longest note accepted.
const NOTE_BYTES_MAX: u64 = 64 << 20;
/// Bytes read at a time: a multiple of what BLAKE3 hashes in parallel.
const READ_BYTES: usize = 1 << 20;

/// How a file looked when it was verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Verified {
    blake3: String,
    inode: u64,
    bytes: u64,
    changed_ns: i128,
}

impl Verified {
    #[cfg(unix)]
    fn now(path: &Path, checksum: &str) -> io::Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let found = fs::metadata(path)?;
        // The time of change moves with every write and cannot be set back.
        let changed_ns = i128::from(found.ctime()) * 1_000_000_000 + i128::from(found.ctime_nsec());
        Ok(Self { blake3: checksum.to_owned(), inode: found.ino(), bytes: found.len(), changed_ns })
    }

    /// Without inodes a rewritten file cannot be told from an old one, so every file is read.
    #[cfg(not(unix))]
    fn now(_: &Path, _: &str) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Verifies files of `dir`, given as (name, BLAKE3 in hexadecimal), on all cores.
///
/// # Errors
/// [`LoadError::Corrupt`] names a file with another content; [`LoadError::Io`].
pub(super) fn verify(dir: &Path, files: Vec<(&str, &str)>) -> Result<(), LoadError> {
    let mut noted = read_note(dir);
    let known = |name: &str, checksum: &str| {
        noted.get(name).is_some_and(|seen| Verified::now(&dir.join(name), checksum).is_ok_and(|now| now == *seen))
    };
    let unknown: Vec<_> = files.into_iter().filter(|(name, checksum)| !known(name, checksum)).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Ok(Vec::new())));
    let lock = || found.lock().unwrap_or_else(PoisonError::into_inner);
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((name, checksum)) = unknown.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let checked = check(dir, name, checksum);
                    match (&mut *lock(), checked) {
                        (Ok(seen), Ok(now)) => seen.push(((*name).to_owned(), now)),
                        (whole, Err(error)) => {
                            *whole = Err(error);
                            return;
                        }
                        (Err(_), _) => return,
                    }
                }
            });
        }
    });
    let seen = found.into_inner().unwrap_or_else(PoisonError::into_inner)?;
    noted.extend(seen.into_iter().filter_map(|(name, seen)| Some((name, seen?))));
    let note = serde_json::to_vec(&noted).expect("strings and numbers");
    if let Err(error) = write_file(dir, NOTE, |file| file.write_all(&note)) {
        tracing::debug!(%error, "the note of verified files cannot be written; they are read again at the next start");
    }
    Ok(())
}

/// Reads one file. Returns how it looked before it was read, so that a change meanwhile is noticed the next time.
fn check(dir: &Path, name: &str, checksum: &str) -> Result<Option<Verified>, LoadError> {
    let path = dir.join(name);
    let file = path.display().to_string();
    let seen = Verified::now(&path, checksum).ok();
    match checksum_of_file(&path).map_err(|source| LoadError::Io { file: file.clone(), source })? == checksum {
        true => Ok(seen),
        false => Err(LoadError::Corrupt { file }),
    }
}

/// BLAKE3 of a file's content, in hexadecimal.
pub(super) fn checksum_of_file(path: &Path) -> io::Result<String> {
    let (mut file, mut hasher, mut piece) = (File::open(path)?, blake3::Hasher::new(), vec![0; READ_BYTES]);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hasher.finalize().to_string()),
            read => _ = hasher.update(&piece[..read]),
        }
    }
}

/// The note, empty if it cannot be read.
fn read_note(dir: &Path) -> BTreeMap<String, Verified> {
    let path = dir.join(NOTE);
    let short = fs::metadata(&path).is_ok_and(|found| found.len() <= NOTE_BYTES_MAX);
    let text = if short { fs::read(&path).ok() } else { None };
    text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_byte_is_found_also_after_the_file_was_verified() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, vec![7; READ_BYTES + 1]).unwrap();
        let checksum = checksum_of_file(&path).unwrap();
        let check = || verify(dir.path(), vec![("a", &checksum)]);
        check().unwrap();
        assert!(dir.path().join(NOTE).is_file());
        check().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes[READ_BYTES] ^= 1;
        fs::write(dir.path().join("b"), &bytes).unwrap();
        fs::rename(dir.path().join("b"), &path).unwrap();
        let error = check().unwrap_err();
        assert!(matches!(&error, LoadError::Corrupt { file } if file.ends_with('a')), "{error}");
    }

    #[test]
    fn a_note_of_another_checksum_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), b"bytes").unwrap();
        let checksum = checksum_of_file(&dir.path().join("a")).unwrap();
        verify(dir.path(), vec![("a", &checksum)]).unwrap();
        assert!(matches!(verify(dir.path(), vec![("a", "00")]), Err(LoadError::Corrupt { .. })));
    }
}
