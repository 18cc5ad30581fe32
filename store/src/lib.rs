//! What the mesh agreed on, and what a node keeps.
//!
//! Two halves, which meet only in ids:
//!
//! - **The placement log.** Members, invites, models and the placement of every expert are one replicated value,
//!   [`State`], moved by [`Command`]s through one pure function, [`apply`]. [`Log`] drives Raft beneath it: on disk in
//!   sled, and to other members over a [`Transport`] that the node crate implements.
//! - **The weights.** A [`Manifest`] lists every blob of a model with its hashes. [`Blobs`] keeps them as
//!   content-addressed files, or as references into a checkpoint that is on this disk already, and calls nothing verified
//!   that it has not just hashed.
//!
//! | module | what it is | it imports |
//! |---|---|---|
//! | [`blobs`] | the weights on this disk | manifest, disk, cbor, ids |
//! | [`log`] | Raft: the log on disk, its messages, its members | state, disk, runtime, cbor, ids |
//! | [`simulation`] | the log in virtual time, on simulated disks | log, disk, runtime |
//! | [`state`] | the replicated value, its commands, and the pure step between them | precision, ids |
//! | [`manifest`] | what a model consists of | precision, cbor, ids |
//! | [`precision`], [`ids`], [`cbor`] | values, and their bytes | |
//! | `disk`, `sync` | databases, in sled or simulated; files that survive a power cut; locks | runtime |
//! | `runtime` | tasks, time and randomness: tokio's, or a simulation's | |
//!
//! Three rules hold throughout. Deciding is pure: [`apply()`], [`voters`] and the manifest's checks see no clock and no
//! disk. Acknowledged means on the disk: one writer thread per database flushes and calls `fdatasync` before anyone hears
//! of a write. And the length, the shape and the content of what arrives from outside are checked, in this order, before
//! anything relies on them.
//!
//! Deliberately absent: networks (peers are opaque bytes), tensors (blobs are opaque bytes), load and liveness (they are
//! gossiped), and any opinion on where an expert should live.

pub mod blobs;
pub mod cbor;
mod disk;
pub mod ids;
pub mod log;
pub mod manifest;
pub mod precision;
mod runtime;
pub mod simulation;
pub mod state;
mod sync;

pub use blobs::{BlobError, BlobReader, Blobs, Draft, NewPart, NewSlices, PartKey, Partial, Segment, Usage};
pub use cbor::CborError;
pub use disk::{DiskError, FullDisk, OpenError, free_disk_bytes, replace_file, replace_secret_file};
pub use ids::{BlobId, Epoch, ExpertId, MeshId, ModelId, NodeId, ParseIdError, Peer, TokenHash};
pub use log::{
    DamagedLog, Log, LogError, Mark, Presence, Progress, ProposeError, RPC_BYTES_MAX, Recovery, RpcRefusal, Standing,
    Timing, Transport, Unreachable, VOTERS_MAX, majority, voters, voters_among,
};
pub use manifest::{BlobEntry, BlobHasher, CHUNK_BYTES, FileEntry, Manifest, ManifestError, PartEntry, Slice, Slices};
pub use precision::{Bounds, Precision};
pub use state::apply::apply;
pub use state::command::{Assignment, Command, Origin, Outcome, Refusal};
pub use state::{Applied, FormerMesh, Invite, Loss, Member, MemberInfo, Model, Placement, Replica, State};
