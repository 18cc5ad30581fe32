//! Where a blob's bytes are: in its own file, or in pieces of files that are on this disk already.
//!
//! Invariant: a read covers exactly the range it was asked for, or fails. Content is not checked here.

use super::error::{BlobError, io};
use crate::ids::BlobId;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

/// A piece of a referenced blob.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Segment {
    /// Bytes kept in the index itself: a few, such as a header.
    Inline(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Bytes of a file.
    File {
        /// Which file.
        path: PathBuf,
        /// Where they begin.
        offset: u64,
        /// How many they are.
        bytes: u64,
    },
}

impl Segment {
    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Inline(bytes) => bytes.len() as u64,
            Self::File { bytes, .. } => *bytes,
        }
    }

    /// The same piece whatever the working folder is.
    pub(super) fn absolute(self) -> Result<Self, BlobError> {
        match self {
            Self::File { path, offset, bytes } => {
                let path = std::path::absolute(&path).map_err(io(&path))?;
                Ok(Self::File { path, offset, bytes })
            }
            inline => Ok(inline),
        }
    }
}

/// How a blob is kept.
#[derive(Serialize, Deserialize)]
pub(super) enum Keep {
    /// As a file under its own name.
    File,
    /// In place.
    Reference(Vec<Segment>),
}

impl Keep {
    /// What a fault of the files means: in a checkpoint's file, that the checkpoint has changed.
    pub fn fault(&self) -> impl Fn(BlobError) -> BlobError + use<> {
        let own = matches!(self, Self::File);
        move |error| match error {
            error if own => error,
            BlobError::Truncated { id, path, found: 0, .. } if !path.exists() => {
                BlobError::SourceChanged { id, what: format!("{} is not there", path.display()) }
            }
            BlobError::Truncated { id, path, needed, found } => BlobError::SourceChanged {
                id,
                what: format!("{} has {found} bytes where {needed} are needed", path.display()),
            },
            BlobError::Corrupt { id, place, .. } => {
                let place = place.strip_prefix("the index and ").unwrap_or(&place);
                BlobError::SourceChanged { id, what: format!("{place} has other bytes than those that were imported") }
            }
            error => error,
        }
    }
}

/// What the index says about a blob.
#[derive(Serialize, Deserialize)]
pub(super) struct Record {
    pub bytes: u64,
    pub keep: Keep,
}

/// Refuses segments that do not add up to `bytes`, or whose files are too short or gone.
pub(super) fn check(id: &BlobId, bytes: u64, segments: &[Segment]) -> Result<(), BlobError> {
    let mut total = 0u64;
    for segment in segments {
        total = total.saturating_add(segment.bytes());
        if let Segment::File { path, offset, bytes } = segment {
            let found = match fs::metadata(path) {
                Ok(metadata) => metadata.len(),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
                Err(error) => return Err(io(path)(error)),
            };
            let needed = offset.saturating_add(*bytes);
            if found < needed || !path.exists() {
                return Err(BlobError::Truncated { id: *id, path: path.clone(), needed, found });
            }
        }
    }
    if total != bytes {
        let why = format!("its segments have {total} bytes, but it has {bytes}");
        return Err(BlobError::Reference { id: *id, why });
    }
    Ok(())
}

/// Reads a blob piece by piece, keeping the last file open.
pub(super) struct Reader {
    id: BlobId,
    segments: Vec<Segment>,
    open: Option<(PathBuf, File)>,
}

impl Reader {
    pub fn new(id: BlobId, segments: Vec<Segment>) -> Self {
        Self { id, segments, open: None }
    }

    /// The pieces of `[start, start + len)`: segment index, where in the segment, where in the
    /// range, length.
    fn pieces(&self, start: u64, len: usize) -> Vec<(usize, u64, usize, usize)> {
        let end = start + len as u64;
        let mut pieces = Vec::new();
        let mut at = 0u64;
        for (index, segment) in self.segments.iter().enumerate() {
            let (from, to) = (at.max(start), (at + segment.bytes()).min(end));
            if from < to {
                pieces.push((index, from - at, (from - start) as usize, (to - from) as usize));
            }
            at += segment.bytes();
        }
        pieces
    }

    /// Fills `buffer` with the blob's bytes from `start` on.
    pub fn read_at(&mut self, start: u64, buffer: &mut [u8]) -> Result<(), BlobError> {
        let pieces = self.pieces(start, buffer.len());
        let covered: usize = pieces.iter().map(|piece| piece.3).sum();
        if covered != buffer.len() {
            let why = format!("its segments end before byte {}", start + buffer.len() as u64);
            return Err(BlobError::Reference { id: self.id, why });
        }
        for (index, skip, at, len) in pieces {
            let target = &mut buffer[at..at + len];
            match &self.segments[index] {
                Segment::Inline(bytes) => target.copy_from_slice(&bytes[skip as usize..skip as usize + len]),
                Segment::File { path, offset, .. } => {
                    let (path, offset) = (path.clone(), offset + skip);
                    self.read_file(path, offset, target)?;
                }
            }
        }
        Ok(())
    }

    fn read_file(&mut self, path: PathBuf, offset: u64, target: &mut [u8]) -> Result<(), BlobError> {
        if self.open.as_ref().is_none_or(|(open, _)| *open != path) {
            let file = File::open(&path).map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => BlobError::Truncated {
                    id: self.id,
                    path: path.clone(),
                    needed: offset + target.len() as u64,
                    found: 0,
                },
                _ => io(&path)(error),
            })?;
            self.open = Some((path.clone(), file));
        }
        let Some((_, file)) = &mut self.open else {
            return Ok(());
        };
        file.seek(SeekFrom::Start(offset)).map_err(io(&path))?;
        match file.read_exact(target) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                let found = file.metadata().map_err(io(&path))?.len();
                Err(BlobError::Truncated { id: self.id, path, needed: offset + target.len() as u64, found })
            }
            Err(error) => Err(io(&path)(error)),
        }
    }

    /// The files that a range lies in, for people.
    pub fn place(&self, start: u64, len: usize) -> String {
        let pieces = self.pieces(start, len);
        let name = |(index, ..): &(usize, u64, usize, usize)| match &self.segments[*index] {
            Segment::Inline(_) => "the index".to_string(),
            Segment::File { path, .. } => path.display().to_string(),
        };
        let mut names: Vec<String> = pieces.iter().map(name).collect();
        names.dedup();
        names.join(" and ")
    }
}
