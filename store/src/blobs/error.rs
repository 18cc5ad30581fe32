//! Why a blob cannot be read or kept, and what would help.

use crate::cbor::CborError;
use crate::disk::{DiskError, FullDisk, OpenError};
use crate::ids::BlobId;
use crate::manifest::ManifestError;
use std::path::{Path, PathBuf};

/// Why a blob cannot be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The index does not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The index cannot be read or written.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A record of the index is not readable, or cannot be written.
    #[error("the index of the weights: {0}")]
    Index(#[from] CborError),
    /// There is too little room for it on the disk.
    #[error(transparent)]
    Full(#[from] FullDisk),
    /// The system refused.
    #[error("{path}: {error}; check the folder")]
    Io {
        /// Which file or folder.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// It would be more than may be kept.
    #[error(
        "{wanted_bytes} more bytes of weights do not fit the disk budget of {budget_bytes} bytes, of which {used_bytes} are \
         used; raise --disk"
    )]
    OverBudget {
        /// How many bytes were to be added.
        wanted_bytes: u64,
        /// How many are kept.
        used_bytes: u64,
        /// How many may be.
        budget_bytes: u64,
    },
    /// This node does not hold it.
    #[error("blob {id} is not held here; fetch it from a peer that holds it")]
    Missing {
        /// Which blob.
        id: BlobId,
    },
    /// Bytes are not what the manifest says.
    #[error("blob {id}, chunk {chunk}: the bytes in {place} do not match the manifest's hash; fetch it again")]
    Corrupt {
        /// Which blob.
        id: BlobId,
        /// Which of its 1 MiB chunks.
        chunk: u32,
        /// Where the bytes are from.
        place: String,
    },
    /// All chunks match, but the blob they make has another hash: the manifest contradicts itself.
    #[error("blob {id}: the chunks that the manifest lists make blob {got}; import the model again")]
    OtherContent {
        /// What it should be.
        id: BlobId,
        /// What it is.
        got: BlobId,
    },
    /// What was made here to be a blob is another one.
    #[error(
        "what was made here in place of blob {id} is blob {got}: another version of coel sliced this model; fetch it"
    )]
    MadeOther {
        /// What it should be.
        id: BlobId,
        /// What it is.
        got: BlobId,
    },
    /// A file is shorter than it was.
    #[error("blob {id}: {path} has {found} bytes where {needed} are needed; fetch it again")]
    Truncated {
        /// Which blob.
        id: BlobId,
        /// Which file.
        path: PathBuf,
        /// How many bytes it needs to have.
        needed: u64,
        /// How many it has.
        found: u64,
    },
    /// The checkpoint that the blob lies in has changed since it was imported. It may change back: the blob stays in the
    /// index.
    #[error(
        "blob {id} lies in a checkpoint that was imported here and has changed: {what}; put it back as it was, or import it again \
         from where it is now: coel model import DIR"
    )]
    SourceChanged {
        /// Which blob.
        id: BlobId,
        /// The file, and its fault.
        what: String,
    },
    /// The blob is held with another length than the manifest says.
    #[error("blob {id} has {held} bytes here, but {wanted} in the manifest; remove it and fetch it again")]
    OtherLength {
        /// Which blob.
        id: BlobId,
        /// How long it is here.
        held: u64,
        /// How long it should be.
        wanted: u64,
    },
    /// There is no such chunk.
    #[error("blob {id} has no chunk {chunk}: it has {bytes} bytes")]
    NoSuchChunk {
        /// Which blob.
        id: BlobId,
        /// Which chunk.
        chunk: u32,
        /// The blob's length.
        bytes: u64,
    },
    /// It is complete already.
    #[error("blob {id} is held already")]
    Held {
        /// Which blob.
        id: BlobId,
    },
    /// It has a receiver already, in this process.
    #[error("blob {id} is being received already")]
    Busy {
        /// Which blob.
        id: BlobId,
    },
    /// Chunks are missing.
    #[error("blob {id} is not complete: {missing} chunks are missing")]
    Incomplete {
        /// Which blob.
        id: BlobId,
        /// How many.
        missing: usize,
    },
    /// The entry contradicts itself.
    #[error(transparent)]
    Entry(#[from] ManifestError),
    /// The segments of a reference do not make up the blob.
    #[error("blob {id}: {why}")]
    Reference {
        /// Which blob.
        id: BlobId,
        /// What is wrong.
        why: String,
    },
}

impl BlobError {
    /// Whether the bytes would have passed the budget.
    pub fn is_over_budget(&self) -> bool {
        matches!(self, Self::OverBudget { .. })
    }

    /// Whether the disk is full.
    pub fn is_full_disk(&self) -> bool {
        matches!(self, Self::Full(_) | Self::Disk(DiskError::Full(_)) | Self::Open(OpenError::Full(_)))
    }

    /// Whether the blob here is useless and a fresh copy would help.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Corrupt { .. }
            | Self::Truncated { .. }
            | Self::SourceChanged { .. }
            | Self::OtherLength { .. }
            | Self::Missing { .. } => true,
            Self::Io { error, .. } => error.kind() == std::io::ErrorKind::NotFound,
            _ => false,
        }
    }

    /// Whether the fault may mend itself: the checkpoint changed, not a file of this store.
    pub fn is_source_changed(&self) -> bool {
        matches!(self, Self::SourceChanged { .. })
    }
}

/// Names the file of a system's error.
pub(super) fn io(path: &Path) -> impl Fn(std::io::Error) -> BlobError + '_ {
    // A refusal of the store's own comes back through writers that only know errors of the system.
    move |error| {
        error.downcast().unwrap_or_else(|error| match FullDisk::of(path, &error) {
            Some(full) => full.into(),
            None => BlobError::Io { path: path.into(), error },
        })
    }
}
