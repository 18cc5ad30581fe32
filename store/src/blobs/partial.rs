//! A blob that is being received: chunks in any order, each checked before it counts, resumable.
//!
//! No record says which chunks are there: a chunk is there if it hashes right. So a crash at any point loses at most the
//! chunk that was being written. Invariant: a blob has one receiver at a time in this process.

use super::error::{BlobError, io};
use super::quota;
use super::segment::{Keep, Record};
use super::store::Blobs;
use crate::disk::Renames;
use crate::ids::BlobId;
use crate::manifest::{BlobEntry, BlobHasher, CHUNK_BYTES};
use crate::sync::lock;
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
    /// The file has left the folder of unfinished blobs.
    moved: bool,
}

impl std::fmt::Debug for Partial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Partial").field("id", &self.entry.id).field("have", &self.have).finish()
    }
}

/// Reserves the blob for one receiver; `false` if another one has it.
fn claim(blobs: &Blobs, id: BlobId) -> bool {
    lock(&blobs.0.receiving).insert(id)
}

fn release(blobs: &Blobs, id: &BlobId) {
    lock(&blobs.0.receiving).remove(id);
}

impl Partial {
    fn open(blobs: &Blobs, entry: &BlobEntry) -> Result<Self, BlobError> {
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
        // A blob that lies in a checkpoint may be received: the caller has seen that the checkpoint changed.
        if blobs.has_own(&entry.id) {
            return Err(BlobError::Held { id: entry.id });
        }
        let path = blobs.partial_path(&entry.id);
        let complete = blobs.path(&entry.id);
        if !path.exists() && complete.exists() {
            // The file got its name but no index record, or it was cut short: its chunks are checked again.
            fs::rename(&complete, &path).map_err(io(&complete))?;
        }
        // Its whole length is reserved: a blob that is begun can be completed.
        let there = quota::length(&path);
        if there < entry.bytes {
            blobs.0.room.check(entry.bytes - there)?;
        }
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
        self.blobs.0.room.check(bytes.len() as u64)?;
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
        let mut renames = Renames::default();
        self.blobs.rename(&mut renames, &self.path, &self.blobs.path(&id))?;
        self.moved = true;
        self.blobs.sync(renames)?;
        self.blobs.remember(&id, &Record { bytes: self.entry.bytes, keep: Keep::File })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.moved {
            // What has not arrived takes no room while nobody receives it.
            self.blobs.0.quota.give_back(self.entry.bytes.saturating_sub(quota::length(&self.path)));
        }
        release(&self.blobs, &self.entry.id);
    }
}

impl Blobs {
    /// Keeps `content` as a file; returns its entry. Content that is held already is not written
    /// again.
    pub fn put(&self, content: &[u8]) -> Result<BlobEntry, BlobError> {
        let entry = BlobEntry::of(content);
        if self.has(&entry.id) {
            return Ok(entry);
        }
        let mut partial = self.receive(&entry)?;
        for chunk in partial.missing() {
            let start = chunk as usize * CHUNK_BYTES;
            partial.write(chunk, &content[start..content.len().min(start + CHUNK_BYTES)])?;
        }
        partial.finish()?;
        Ok(entry)
    }

    /// Begins to receive a blob, or goes on where an earlier attempt ended.
    pub fn receive(&self, entry: &BlobEntry) -> Result<Partial, BlobError> {
        Partial::open(self, entry)
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
