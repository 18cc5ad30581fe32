//! The store itself: the index, the files, and reading what is held.

use super::error::{BlobError, io};
use super::quota::{self, Quota, Usage};
use super::segment::{self, Keep, Record, Segment};
use crate::cbor::{self, CborError};
use crate::disk::{
    Disk, DiskError, FullDisk, OpenError, Renames, Room, WEIGHTS_RESERVE_BYTES, WriteBatch, sync_folder,
};
use crate::ids::{BlobId, hex};
use crate::manifest::{BlobEntry, CHUNK_BYTES};
use crate::sync::lock;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Longest index record: a reference has a handful of segments.
pub(super) const RECORD_BYTES_MAX: usize = 1 << 20;

/// Names of drafts in the folder of unfinished blobs begin with this.
pub(super) const DRAFT_PREFIX: &str = "draft-";

/// The blobs of one node; cloning the handle is cheap, and all calls may run at once.
#[derive(Clone)]
pub struct Blobs(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub index: Disk,
    files: PathBuf,
    pub partial: PathBuf,
    /// The blobs that have a receiver.
    pub receiving: Mutex<BTreeSet<BlobId>>,
    pub quota: Quota,
    pub room: Room,
}

impl Inner {
    /// Names and lengths of all files, of whole blobs and of others.
    fn all_files(&self) -> Result<Vec<(String, u64)>, BlobError> {
        let mut all = quota::files(&self.partial)?;
        for folder in fs::read_dir(&self.files).map_err(io(&self.files))? {
            all.extend(quota::files(&folder.map_err(io(&self.files))?.path())?);
        }
        Ok(all)
    }
}

pub(super) fn index_key(id: &BlobId) -> Vec<u8> {
    [b"B".as_slice(), &id.0].concat()
}

pub(super) fn put_record(
    batch: &mut WriteBatch,
    key: &[u8],
    value: &impl Serialize,
    limit: usize,
) -> Result<(), BlobError> {
    let bytes = cbor::to_vec(value)?;
    if bytes.len() > limit {
        return Err(CborError::TooLong { bytes: bytes.len(), limit }.into());
    }
    batch.put(key, &bytes);
    Ok(())
}

/// Deletes the drafts that a crash left behind.
fn sweep(partial: &Path) -> Result<(), BlobError> {
    for (name, _) in quota::files(partial)? {
        if name.starts_with(DRAFT_PREFIX) {
            let path = partial.join(name);
            fs::remove_file(&path).map_err(io(&path))?;
        }
    }
    Ok(())
}

/// Creates a folder so that it survives a power cut.
fn make_folder(path: &Path) -> Result<(), BlobError> {
    if !path.is_dir() {
        fs::create_dir_all(path).map_err(io(path))?;
        if let Some(parent) = path.parent() {
            sync_folder(parent).map_err(io(parent))?;
        }
    }
    Ok(())
}

/// Opens or creates the index in the data folder `dir`; a damaged one is set aside. Returns whether that was done.
fn open_index(dir: &Path) -> Result<(Disk, bool), BlobError> {
    let path = dir.join("index");
    match Disk::open(&path, None) {
        Err(OpenError::Damaged { path: file, error }) => {
            let kept = dir.join("damaged-index");
            if kept.exists() {
                fs::remove_dir_all(&kept).map_err(io(&kept))?;
            }
            fs::rename(&path, &kept).map_err(io(&path))?;
            sync_folder(dir).map_err(io(dir))?;
            let (file, kept) = (file.display(), kept.display());
            tracing::warn!(%file, error, %kept, "the index of the weights is damaged; it is set aside and made anew from the files");
            Ok((Disk::open(&path, None)?, true))
        }
        opened => Ok((opened?, false)),
    }
}

impl Blobs {
    /// Bytes of the disk that weights leave free.
    pub const RESERVE_BYTES: u64 = WEIGHTS_RESERVE_BYTES;

    /// Opens or creates the store in the data folder `dir`.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, BlobError> {
        Self::open_within(dir, None)
    }

    /// The same, with a budget for the bytes of its files.
    pub fn open_within(dir: impl AsRef<Path>, budget_bytes: Option<u64>) -> Result<Self, BlobError> {
        let dir = dir.as_ref();
        make_folder(dir)?;
        let (index, is_anew) = open_index(dir)?;
        let (files, partial) = (dir.join("blobs"), dir.join("partial"));
        make_folder(&files)?;
        make_folder(&partial)?;
        sweep(&partial)?;
        let receiving = Mutex::default();
        let room = Room::of(dir, WEIGHTS_RESERVE_BYTES);
        let mut blobs = Inner { index, files, partial, receiving, quota: Quota::default(), room };
        let used_bytes = blobs.all_files()?.iter().map(|(_, bytes)| bytes).sum();
        blobs.quota = Quota::new(Usage { used_bytes, budget_bytes });
        let blobs = Self(Arc::new(blobs));
        if is_anew {
            blobs.index_files()?;
        }
        Ok(blobs)
    }

    /// Fills an empty index with the blobs that have files of their own: a file gets a blob's name only once its content is whole.
    fn index_files(&self) -> Result<(), BlobError> {
        let mut batch = WriteBatch::default();
        for (id, bytes) in self.files()? {
            if self.path(&id).exists() {
                put_record(&mut batch, &index_key(&id), &Record { bytes, keep: Keep::File }, RECORD_BYTES_MAX)?;
            }
        }
        Ok(self.0.index.write_blocking(batch)?)
    }

    /// Whether the disk is too full for more weights.
    pub fn full_disk(&self) -> Option<FullDisk> {
        self.0.room.check(0).err()
    }

    /// Bytes kept, and how many may be kept.
    pub fn usage(&self) -> Usage {
        self.0.quota.read()
    }

    /// The blobs that have files of their own, complete or being received, with the bytes of these files.
    pub fn files(&self) -> Result<Vec<(BlobId, u64)>, BlobError> {
        let mut files: BTreeMap<BlobId, u64> = BTreeMap::new();
        for (name, bytes) in self.0.all_files()? {
            if let Ok(id) = name.parse() {
                *files.entry(id).or_default() += bytes;
            }
        }
        Ok(files.into_iter().collect())
    }

    pub(super) fn path(&self, id: &BlobId) -> PathBuf {
        let name = id.to_string();
        self.0.files.join(hex(&id.0[..1])).join(name)
    }

    pub(super) fn partial_path(&self, id: &BlobId) -> PathBuf {
        self.0.partial.join(id.to_string())
    }

    fn record(&self, id: &BlobId) -> Result<Record, BlobError> {
        let bytes = self.0.index.get(&index_key(id))?.ok_or(BlobError::Missing { id: *id })?;
        Ok(cbor::from_slice(&bytes, RECORD_BYTES_MAX)?)
    }

    /// The record, if the blob is held with the length that `entry` says.
    pub(super) fn record_of(&self, entry: &BlobEntry) -> Result<Record, BlobError> {
        entry.check()?;
        let record = self.record(&entry.id)?;
        if record.bytes != entry.bytes {
            return Err(BlobError::OtherLength { id: entry.id, held: record.bytes, wanted: entry.bytes });
        }
        Ok(record)
    }

    fn segments(&self, id: &BlobId, record: &Record) -> Vec<Segment> {
        match &record.keep {
            Keep::File => vec![Segment::File { path: self.path(id), offset: 0, bytes: record.bytes }],
            Keep::Reference(segments) => segments.clone(),
        }
    }

    /// Where the bytes of a held blob are, piece by piece.
    pub fn lies_in(&self, entry: &BlobEntry) -> Result<Vec<Segment>, BlobError> {
        let record = self.record_of(entry)?;
        let segments = self.segments(&entry.id, &record);
        segment::check(&entry.id, entry.bytes, &segments).map_err(record.keep.fault())?;
        Ok(segments)
    }

    pub(super) fn remember(&self, id: &BlobId, record: &Record) -> Result<(), BlobError> {
        let mut batch = WriteBatch::default();
        put_record(&mut batch, &index_key(id), record, RECORD_BYTES_MAX)?;
        Ok(self.0.index.write_blocking(batch)?)
    }

    /// Whether the blob is held as a file of this store's own that is as long as it should be.
    pub(super) fn has_own(&self, id: &BlobId) -> bool {
        self.record(id).is_ok_and(|record| matches!(record.keep, Keep::File)) && self.has(id)
    }

    /// Whether the blob is held, by a look at the files: indexed, and as long as it should be. Reading it checks the content.
    pub fn has(&self, id: &BlobId) -> bool {
        self.record(id).is_ok_and(|record| segment::check(id, record.bytes, &self.segments(id, &record)).is_ok())
    }

    /// The length of a held blob in bytes.
    pub fn bytes(&self, id: &BlobId) -> Result<u64, BlobError> {
        Ok(self.record(id)?.bytes)
    }

    /// Every blob in the index with its length in bytes, in the order of their ids.
    pub fn list(&self) -> Result<Vec<(BlobId, u64)>, BlobError> {
        let mut held = Vec::new();
        for key in self.0.index.keys(b"B", b"C") {
            let key = key?;
            if let Some(id) = key.strip_prefix(b"B").and_then(|id| id.try_into().ok()).map(BlobId) {
                held.push((id, self.record(&id)?.bytes));
            }
        }
        Ok(held)
    }

    /// Forgets a blob, and deletes its file if it has one of its own. Returns whether it was held.
    pub fn remove(&self, id: &BlobId) -> Result<bool, BlobError> {
        let held = self.0.index.get(&index_key(id))?.is_some();
        if held {
            let mut batch = WriteBatch::default();
            let key = index_key(id);
            batch.remove_range(&key, &[&key, [0xff; 5].as_slice()].concat());
            match self.0.index.write_blocking(batch) {
                // The record goes with a later write: without its file the blob is not held.
                Err(DiskError::Full(_)) if self.delete(&self.path(id))? => return Ok(true),
                written => written?,
            }
        }
        Ok(self.delete(&self.path(id))? || held)
    }

    /// Forgets a blob, and what has arrived of it, to make room. Refused while it is being received.
    pub fn discard(&self, id: &BlobId) -> Result<(), BlobError> {
        // The lock is held while the files go, so that no receiver begins in between.
        let receiving = lock(&self.0.receiving);
        if receiving.contains(id) {
            return Err(BlobError::Busy { id: *id });
        }
        self.remove(id)?;
        self.delete(&self.partial_path(id)).map(drop)
    }

    /// Deletes a file. Returns whether it was there.
    pub(super) fn delete(&self, path: &Path) -> Result<bool, BlobError> {
        let bytes = quota::length(path);
        match fs::remove_file(path) {
            Ok(()) => {
                self.0.quota.give_back(bytes);
                Ok(true)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(io(path)(error)),
        }
    }

    /// Renames a file to the name of a blob, and makes the folder where it is missing.
    pub(super) fn rename(&self, renames: &mut Renames, from: &Path, to: &Path) -> Result<(), BlobError> {
        if let Some(folder) = to.parent() {
            make_folder(folder)?;
        }
        let replaced = quota::length(to);
        renames.rename(from, to).map_err(io(to))?;
        self.0.quota.give_back(replaced);
        Ok(())
    }

    /// Makes renames durable.
    pub(super) fn sync(&self, renames: Renames) -> Result<(), BlobError> {
        renames.sync().map_err(io(&self.0.files))
    }

    /// The raw bytes of one chunk, for a peer, which checks them. Only their length is checked here.
    pub fn read_chunk(&self, id: &BlobId, chunk: u32) -> Result<Vec<u8>, BlobError> {
        let record = self.record(id)?;
        let start = u64::from(chunk) * CHUNK_BYTES as u64;
        if start >= record.bytes {
            return Err(BlobError::NoSuchChunk { id: *id, chunk, bytes: record.bytes });
        }
        let mut bytes = vec![0; (record.bytes - start).min(CHUNK_BYTES as u64) as usize];
        segment::Reader::new(*id, self.segments(id, &record)).read_at(start, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads chunk after chunk into `buffer` and checks each. In a buffer as long as the blob they lie one behind the other, in
    /// one as long as a chunk each overwrites the one before.
    fn check_chunks(&self, entry: &BlobEntry, segments: Vec<Segment>, buffer: &mut [u8]) -> Result<(), BlobError> {
        let mut reader = segment::Reader::new(entry.id, segments);
        for chunk in 0..entry.chunks.len() as u32 {
            let start = u64::from(chunk) * CHUNK_BYTES as u64;
            let at = (start % buffer.len() as u64) as usize;
            let bytes = &mut buffer[at..at + entry.chunk_bytes(chunk).unwrap_or(0)];
            reader.read_at(start, bytes)?;
            if !entry.chunk_matches(chunk, bytes) {
                let place = reader.place(start, bytes.len());
                return Err(BlobError::Corrupt { id: entry.id, chunk, place });
            }
        }
        Ok(())
    }

    /// The whole content, every chunk of it checked against `entry`.
    pub fn read_verified(&self, entry: &BlobEntry) -> Result<Vec<u8>, BlobError> {
        self.read_verified_into(entry, |bytes| Ok(vec![0; bytes]))
    }

    /// The same, read into the memory that `room` returns for that many bytes.
    pub fn read_verified_into<B: AsMut<[u8]>>(
        &self,
        entry: &BlobEntry,
        room: impl FnOnce(usize) -> std::io::Result<B>,
    ) -> Result<B, BlobError> {
        let keep = self.record_of(entry)?.keep;
        // The files are known to be this long before memory is allocated for them.
        let segments = self.lies_in(entry)?;
        let mut content = room(entry.bytes as usize).map_err(io(&self.0.files))?;
        self.check_chunks(entry, segments, &mut content.as_mut()[..entry.bytes as usize]).map_err(keep.fault())?;
        Ok(content)
    }

    /// Opens a held blob, to read it piece by piece. The bytes are not verified: the caller checks them, or what it makes of
    /// them.
    pub fn reader(&self, entry: &BlobEntry) -> Result<BlobReader, BlobError> {
        Ok(BlobReader(segment::Reader::new(entry.id, self.lies_in(entry)?)))
    }

    /// Checks every chunk without keeping the content.
    pub fn verify(&self, entry: &BlobEntry) -> Result<(), BlobError> {
        let keep = self.record_of(entry)?.keep;
        let mut buffer = vec![0; entry.bytes.min(CHUNK_BYTES as u64) as usize];
        self.check_chunks(entry, self.lies_in(entry)?, &mut buffer).map_err(keep.fault())
    }
}

/// A held blob, opened by [`Blobs::reader`].
pub struct BlobReader(segment::Reader);

impl BlobReader {
    /// Fills `buffer` with the bytes from `start` on.
    pub fn read_at(&mut self, start: u64, buffer: &mut [u8]) -> Result<(), BlobError> {
        self.0.read_at(start, buffer)
    }
}
