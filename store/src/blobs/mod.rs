//! What this node keeps of the weights: blobs by content, as files or as references into files that are on this disk
//! already.
//!
//! | in the data folder | what |
//! |---|---|
//! | `blobs/ab/abcd...` | a blob's content, named by its hash |
//! | `partial/abcd...` | a blob that is still arriving |
//! | `partial/draft-1` | a blob that is being made |
//! | `index/` | a sled database: which blobs are held, and how; which parts of which checkpoint they are |
//! | `damaged-index/` | the last index that could not be read, and was made anew from the files |
//!
//! Invariants: a blob enters the index only after its content is on the disk, and its content was hashed as a whole before
//! the file got its name. Content that is given out as verified was hashed chunk by chunk as it was read, because disks
//! flip bits and referenced files can change. Sizes are compared with what the disk really has before memory is taken.
//!
//! The store keeps within a budget of bytes where it was given one: it refuses what does not fit before a byte is
//! written, and its user says what is to go ([`Blobs::discard`]).
//!
//! All calls block on the disk. The module does not know what a blob means, or from whom it comes. [`store`] holds
//! the index and reads blobs, [`partial`] receives one, [`draft`] makes one; [`segment`] says where the bytes of a blob lie,
//! [`quota`] counts them, [`error`] names the faults.

mod draft;
mod error;
mod partial;
mod quota;
mod segment;
mod store;

pub use draft::{Draft, NewPart, NewSlices, PartKey};
pub use error::BlobError;
pub use partial::Partial;
pub use quota::Usage;
pub use segment::Segment;
pub use store::{BlobReader, Blobs};

#[cfg(test)]
mod tests;
