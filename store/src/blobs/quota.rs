//! How many bytes of files the store may have.
//!
//! Owns [`Quota`]. A writer takes bytes before a file grows, and gives back what it did not use. Invariant: the bytes taken
//! never pass the budget. A folder that is over its budget when it is opened keeps what it has and gets nothing more. Only
//! files count: what is referenced in place is not the store's, and the index is small.

use super::error::{BlobError, io};
use crate::sync::lock;
use std::fs;
use std::path::Path;
use std::sync::Mutex;

/// Bytes kept, and how many may be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of whole blobs and of blobs on their way in, which count whole from their first chunk on.
    pub used_bytes: u64,
    /// The most they may be; `None` is no bound.
    pub budget_bytes: Option<u64>,
}

impl Usage {
    /// Bytes that may still be kept; `None` is no bound.
    pub fn room_bytes(&self) -> Option<u64> {
        Some(self.budget_bytes?.saturating_sub(self.used_bytes))
    }
}

#[derive(Debug, Default)]
pub(super) struct Quota(Mutex<Usage>);

impl Quota {
    pub fn new(usage: Usage) -> Self {
        Self(Mutex::new(usage))
    }

    pub fn read(&self) -> Usage {
        *lock(&self.0)
    }

    /// Takes the bytes for a file that is about to go from `from` to `to` bytes.
    pub fn resize(&self, from: u64, to: u64) -> Result<(), BlobError> {
        let mut usage = lock(&self.0);
        let used_bytes = usage.used_bytes.saturating_sub(from).saturating_add(to);
        if let Some(budget_bytes) = usage.budget_bytes.filter(|&budget| to > from && used_bytes > budget) {
            let (wanted_bytes, used_bytes) = (to - from, usage.used_bytes);
            return Err(BlobError::OverBudget { wanted_bytes, used_bytes, budget_bytes });
        }
        usage.used_bytes = used_bytes;
        Ok(())
    }

    /// Gives bytes back: a file became that much shorter, or is gone.
    pub fn give_back(&self, bytes: u64) {
        let mut usage = lock(&self.0);
        usage.used_bytes = usage.used_bytes.saturating_sub(bytes);
    }
}

/// The file's length; 0 where there is none.
pub(super) fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// The files in a folder, not those in folders below it; none where there is no such folder.
pub(super) fn files(folder: &Path) -> Result<Vec<(String, u64)>, BlobError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io(folder))?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io(folder))?;
        let metadata = match entry.metadata() {
            // It was deleted meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            metadata => metadata.map_err(io(&entry.path()))?,
        };
        if metadata.is_file() {
            files.push((entry.file_name().to_string_lossy().into_owned(), metadata.len()));
        }
    }
    Ok(files)
}
