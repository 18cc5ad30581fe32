//! Memory that holds weights.
//!
//! Owns [`WeightBytes`], a range of weight bytes in a mapped file or in memory of this process; [`Buffer`] and
//! [`Buffers`], page-aligned memory that weights are read into; and [`ReadError`], why bytes of a file cannot be read.
//! The meaning of the bytes is not known here.

use std::path::PathBuf;

pub use self::{
    buffer::{Buffer, Buffers, PAGE},
    bytes::{FileRange, WeightBytes},
};

mod buffer;
mod bytes;

/// Why weights cannot stay on disk or cannot be read from it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error("tensor {tensor} lies in no file; only weights that do can stay on disk")]
    NotInAFile { tensor: String },
    #[error("{file}: {why}", file = file.display())]
    Io { file: PathBuf, why: String },
    #[error("{file}: truncated: bytes up to {expected} are wanted, it has {found}; fetch it again", file = file.display())]
    Truncated { file: PathBuf, expected: u64, found: u64 },
    #[error("the read was cancelled")]
    Abandoned,
}
