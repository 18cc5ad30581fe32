//! Connections and streams: the half of the crate that knows libp2p.
//!
//! | module | idea |
//! |---|---|
//! | [`swarm`] | the libp2p swarm: transports, behaviours, listening |
//! | [`frame`] | frames over any byte stream |
//! | [`link`] | what the streams of one peer share |
//! | [`endpoint`] | what this node's streams share: members, links, the way into the swarm |
//! | [`stream`] | streams of frames: opened, accepted, used |
//! | [`pool`] | idle streams, kept for the next request |
//!
//! Each module imports only those above it.

pub(crate) mod endpoint;
pub(crate) mod frame;
pub(crate) mod link;
pub(crate) mod pool;
pub(crate) mod stream;
pub(crate) mod swarm;
