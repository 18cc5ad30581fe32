//! A blob on its way in: chunks in any order, each checked before it counts, resumable.
//!
//! Which chunks are there is not written down anywhere: it is what hashes right. So a crash at any
//! point loses at most the chunk that was being written.

use super::segment::{Keep, Record};
use super::{BlobError, Blobs, io, make_folder, quota};
use crate::disk::sync_folder;
use crate::ids::BlobId;
use crate::manifest::{BlobEntry, BlobHasher, CHUNK_BYTES};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A blob that is being received. Dropping it keeps what has arrived for the next attempt.
pub struct Partial {
    blobs: Blobs,
    entry: BlobEntry,
    path: PathBuf,
    file: File,
    have: Vec<bool>,
    /// It is not where it was received any more.
    moved: bool,
}

impl std::fmt::Debug for Partial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Partial").field("id", &self.entry.id).field("have", &self.have).finish()
    }
}

/// Takes the blob for one receiver; `false` if another one has it.
fn claim(blobs: &Blobs, id: BlobId) -> bool {
    blobs.0.receiving.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(id)
}

fn release(blobs: &Blobs, id: &BlobId) {
    blobs.0.receiving.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).remove(id);
}

impl Partial {
    pub(super) fn open(blobs: &Blobs, entry: &BlobEntry) -> Result<Self, BlobError> {
        entry.check()?;
        if !claim(blobs, entry.id) {
            return Err(BlobError::Busy { id: entry.id });
        }
        let opened = Self::open_claimed(blobs, entry);
        if opened.is_err() {
            release(blobs, &entry.id);
        }
        opened
    }

    fn open_claimed(blobs: &Blobs, entry: &BlobEntry) -> Result<Self, BlobError> {
        // What lies in a checkpoint may be received: who asks for it has seen that it is not what it was.
        if blobs.has_own(&entry.id) {
            return Err(BlobError::Held { id: entry.id });
        }
        let path = blobs.partial_path(&entry.id);
        let complete = blobs.path(&entry.id);
        if !path.exists() && complete.exists() {
            // It got its name but not its place in the index, or it was cut short: look again.
            fs::rename(&complete, &path).map_err(io(&complete))?;
        }
        // Taken whole: a blob that is begun can be ended.
        let there = quota::length(&path);
        blobs.0.quota.resize(there, entry.bytes)?;
        let opened = Self::open_file(&path, entry);
        if opened.is_err() {
            blobs.0.quota.give_back(entry.bytes.saturating_sub(quota::length(&path)));
        }
        let (file, have) = opened.map_err(io(&path))?;
        if have.iter().any(|have| *have) {
            let chunks = have.iter().filter(|have| **have).count();
            tracing::debug!(id = %entry.id, chunks, of = have.len(), "resuming a blob");
        }
        Ok(Self { blobs: blobs.clone(), entry: entry.clone(), path, file, have, moved: false })
    }

    fn open_file(path: &Path, entry: &BlobEntry) -> std::io::Result<(File, Vec<bool>)> {
        let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        if file.metadata()?.len() > entry.bytes {
            file.set_len(entry.bytes)?;
        }
        let have = present(&mut file, entry)?;
        Ok((file, have))
    }

    /// Which blob this is.
    pub fn entry(&self) -> &BlobEntry {
        &self.entry
    }

    /// The chunks that are still to come, in ascending order.
    pub fn missing(&self) -> Vec<u32> {
        (0u32..).zip(&self.have).filter(|(_, have)| !**have).map(|(chunk, _)| chunk).collect()
    }

    /// Bytes that are here and verified.
    pub fn bytes_held(&self) -> u64 {
        let held = (0u32..).zip(&self.have).filter(|(_, have)| **have);
        held.filter_map(|(chunk, _)| self.entry.chunk_bytes(chunk)).map(|bytes| bytes as u64).sum()
    }

    /// Takes a chunk, if it is what the manifest says: anything else is refused as corrupt, and not
    /// written.
    pub fn write(&mut self, chunk: u32, bytes: &[u8]) -> Result<(), BlobError> {
        let id = self.entry.id;
        if self.entry.chunk_bytes(chunk).is_none() {
            return Err(BlobError::NoSuchChunk { id, chunk, bytes: self.entry.bytes });
        }
        if !self.entry.chunk_matches(chunk, bytes) {
            return Err(BlobError::Corrupt { id, chunk, place: "the received data".into() });
        }
        let start = u64::from(chunk) * CHUNK_BYTES as u64;
        let mut write = || {
            self.file.seek(SeekFrom::Start(start))?;
            self.file.write_all(bytes)
        };
        write().map_err(io(&self.path))?;
        self.have[chunk as usize] = true;
        Ok(())
    }

    /// Makes the complete blob part of the store: read once more and hashed as a whole, fsynced,
    /// renamed, and only then indexed.
    pub fn finish(mut self) -> Result<(), BlobError> {
        let id = self.entry.id;
        let missing = self.missing().len();
        if missing > 0 {
            return Err(BlobError::Incomplete { id, missing });
        }
        let finish = |this: &mut Self| {
            this.file.set_len(this.entry.bytes)?;
            this.file.sync_all()?;
            hash_all(&mut this.file)
        };
        let found = finish(&mut self).map_err(io(&self.path))?;
        if found.id != id {
            // Either the disk changed a chunk, or the manifest's hashes do not belong together.
            let differs =
                (0u32..).zip(&found.chunks).find(|(c, hash)| self.entry.chunks.get(*c as usize) != Some(*hash));
            fs::remove_file(&self.path).map_err(io(&self.path))?;
            return Err(match differs {
                Some((chunk, _)) => BlobError::Corrupt { id, chunk, place: self.path.display().to_string() },
                None => BlobError::OtherContent { id, got: found.id },
            });
        }
        let path = self.blobs.path(&id);
        if let Some(folder) = path.parent() {
            make_folder(folder)?;
            self.blobs.rename(&self.path, &path)?;
            self.moved = true;
            sync_folder(folder).map_err(io(folder))?;
        }
        self.blobs.remember(&id, &Record { bytes: self.entry.bytes, keep: Keep::File })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.moved {
            // What has not come takes no room while nobody receives it.
            self.blobs.0.quota.give_back(self.entry.bytes.saturating_sub(quota::length(&self.path)));
        }
        release(&self.blobs, &self.entry.id);
    }
}

fn read_full(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Which chunks of `entry` the file already has.
fn present(file: &mut File, entry: &BlobEntry) -> std::io::Result<Vec<bool>> {
    let mut have = vec![false; entry.chunks.len()];
    let mut buffer = vec![0; entry.bytes.min(CHUNK_BYTES as u64).min(file.metadata()?.len()) as usize];
    if buffer.is_empty() {
        return Ok(have);
    }
    file.seek(SeekFrom::Start(0))?;
    for (chunk, have) in (0u32..).zip(&mut have) {
        let wanted = entry.chunk_bytes(chunk).unwrap_or(0).min(buffer.len());
        let filled = read_full(file, &mut buffer[..wanted])?;
        *have = entry.chunk_matches(chunk, &buffer[..filled]);
        if filled < wanted {
            break;
        }
    }
    Ok(have)
}

/// The entry of the file's content as the disk has it.
fn hash_all(file: &mut File) -> std::io::Result<BlobEntry> {
    let mut hasher = BlobHasher::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    file.seek(SeekFrom::Start(0))?;
    loop {
        match read_full(file, &mut buffer)? {
            0 => return Ok(hasher.finish()),
            filled => hasher.update(&buffer[..filled]),
        }
    }
}
