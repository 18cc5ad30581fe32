//! Slices as files: written part by part, checked, read back.
//!
//! | room | what it owns |
//! |---|---|
//! | [`source`] | the weight files of a checkpoint, and what identifies their content |
//! | [`part_slices`] | the slices of one part, as bytes |
//! | `tee` | the hash of a part's exact blob, taken while the part is read |
//! | [`writer`] | the loop that writes the slices of all parts into a [`SliceSink`](writer::SliceSink), resumably |
//! | `checksums` | whether files still are what was written |
//! | [`sliced_folder`] | a folder that holds a model as slices |
//! | `folder_sink` | such a folder, written |
//!
//! Arrows point upwards in this table. Nothing here knows what a precision is good for.

mod checksums;
mod folder_sink;
pub mod part_slices;
pub mod sliced_folder;
pub mod source;
mod tee;
pub mod writer;

pub use self::{
    folder_sink::{Material, SlicingError, slice_checkpoint, write_slices},
    source::ReadAt,
    tee::Digest,
};
