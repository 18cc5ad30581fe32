//! What the mesh agreed on, and what a node keeps.
//!
//! Two halves, which meet only in ids:
//!
//! - **The placement log.** Members, invites, models and the placement of every expert are one
//!   replicated value, [`State`], moved by [`Command`]s through one pure function, [`apply`]. [`Log`]
//!   drives Raft beneath it: on disk in sled, to other members over a [`Transport`] that somebody
//!   else implements.
//! - **The weights.** A [`Manifest`] lists every blob of a model with its hashes; [`Blobs`] keeps
//!   them as content-addressed files, or as references into a checkpoint that is already on this
//!   disk, and gives nothing out as verified that it has not just hashed.
//!
//! Three rules hold throughout. Deciding is pure: [`apply()`], [`voters`] and the manifest's checks
//! see no clock and no disk. Acknowledged means on the disk: one writer thread per database flushes
//! and calls `fdatasync` before anyone is told. And nothing that arrives from outside is trusted for
//! its length, its shape or its content before each was checked, in this order.
//!
//! What is deliberately absent: networks (peers are opaque bytes), tensors (blobs are opaque bytes),
//! load and liveness (those are gossiped), and any opinion on where an expert should live.

pub mod apply;
pub mod blobs;
pub mod cbor;
pub mod command;
mod disk;
pub mod ids;
pub mod log;
pub mod manifest;
pub mod precision;
pub mod state;

pub use apply::apply;
pub use blobs::{BlobError, BlobReader, Blobs, Draft, NewPart, NewSlices, PartKey, Partial, Segment, Usage};
pub use cbor::CborError;
pub use command::{Assignment, Command, Outcome, Refusal};
pub use disk::{DiskError, OpenError};
pub use ids::{BlobId, Epoch, ExpertId, MeshId, ModelId, NodeId, ParseIdError, Peer, TokenHash};
pub use log::{
    Log, LogError, ProposeError, RPC_BYTES_MAX, RpcRefusal, Timing, Transport, Unreachable, VOTERS_MAX, voters,
};
pub use manifest::{BlobEntry, BlobHasher, CHUNK_BYTES, FileEntry, Manifest, ManifestError, PartEntry, Slice, Slices};
pub use precision::{Bounds, Precision};
pub use state::{Invite, Loss, Member, MemberInfo, Model, Placement, Replica, State};
