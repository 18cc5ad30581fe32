//! The errors of the crate, and whether trying again can help.
//!
//! Owns: the errors of the driver half. Invariant: each names the peer, protocol or address it is about, and
//! `is_retryable` tells callers what they may do without reading text.

use std::io;
use std::time::Duration;

use libp2p::{Multiaddr, PeerId};

use crate::membership::message::FACTS_BYTES_MAX;

/// Why a node could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("no address to listen on was given")]
    NoListenAddress,
    #[error("cannot listen on {address}: the port is in use; stop the process that holds it, or choose another port")]
    PortInUse { address: Multiaddr },
    #[error("cannot listen on {address}: {cause}")]
    Listen { address: Multiaddr, cause: io::Error },
    #[error("cannot listen on {address}: use /ip4/IP/tcp/PORT or /ip4/IP/udp/PORT/quic-v1 (or ip6)")]
    Unsupported { address: Multiaddr },
    #[error("cannot listen on {address}: no usable address appeared within {after:?}")]
    NoAddress { address: Multiaddr, after: Duration },
    #[error("cannot set up the transports: {cause}")]
    Transport { cause: String },
}

/// Why no address led to a peer.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("no address to dial was given")]
    NoAddress,
    #[error("no peer was reached: {}", causes.join("; "))]
    Failed {
        /// One line per address.
        causes: Vec<String>,
    },
    #[error("no peer was reached within {after:?}")]
    TimedOut { after: Duration },
    #[error("this node has shut down")]
    ShutDown,
}

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Down, or its connection was lost meanwhile.
    #[error("{peer} is unreachable")]
    Unreachable { peer: PeerId },
    #[error("{peer} did not accept a stream for {protocol} within {after:?}")]
    TimedOut { peer: PeerId, protocol: &'static str, after: Duration },
    /// It has not registered the protocol: another version of the software, or still starting.
    #[error("{peer} does not speak {protocol} (yet)")]
    Unsupported { peer: PeerId, protocol: &'static str },
    #[error("cannot open a stream for {protocol} to {peer}: {cause}")]
    Io { peer: PeerId, protocol: &'static str, cause: io::Error },
    /// It closed every stream before accepting it: this node is no member there, or holds as many streams of the protocol
    /// as a peer may.
    #[error("{peer} refuses {protocol} to this node, which is not among its members or has too many streams open")]
    Refused { peer: PeerId, protocol: &'static str },
    /// Neither a member nor connected.
    #[error("{peer} is neither a member nor connected")]
    UnknownPeer { peer: PeerId },
}

impl OpenError {
    /// Whether the same call can succeed later or, for the caller's purpose, at another peer.
    pub fn is_retryable(&self) -> bool {
        !matches!(self, OpenError::Refused { .. } | OpenError::UnknownPeer { .. })
    }
}

/// Why a stream failed.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer went down, or its last connection closed.
    #[error("{peer} was lost during {protocol}")]
    PeerLost { peer: PeerId, protocol: &'static str },
    /// The peer closed the stream where a frame was due, or within one.
    #[error("{peer} closed a stream of {protocol} early")]
    Closed { peer: PeerId, protocol: &'static str },
    #[error("a stream of {protocol} with {peer} failed: {cause}")]
    Io { peer: PeerId, protocol: &'static str, cause: io::Error },
    /// Ours or theirs; the other side of the stream never saw it whole.
    #[error("a frame of {bytes} bytes with {peer} exceeds the limit of {protocol}, {max}")]
    FrameTooLarge { peer: PeerId, protocol: &'static str, bytes: u64, max: u32 },
    #[error("a frame header of {bytes} bytes exceeds the limit of 65535")]
    HeaderTooLarge { bytes: usize },
    #[error("{peer} sent a malformed frame on {protocol}: its header is longer than itself")]
    Malformed { peer: PeerId, protocol: &'static str },
    /// A send was dropped half way, so the stream holds half a frame.
    #[error("the stream of {protocol} with {peer} holds half a frame: an earlier send was abandoned")]
    Torn { peer: PeerId, protocol: &'static str },
}

impl StreamError {
    /// Whether the same frame may be tried again, on another stream or at another peer.
    pub fn is_retryable(&self) -> bool {
        match self {
            StreamError::PeerLost { .. }
            | StreamError::Closed { .. }
            | StreamError::Io { .. }
            | StreamError::Torn { .. } => true,
            StreamError::FrameTooLarge { .. } | StreamError::HeaderTooLarge { .. } | StreamError::Malformed { .. } => {
                false
            }
        }
    }
}

/// Why a request has no reply.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("{peer} did not answer on {protocol} within {after:?}")]
    TimedOut { peer: PeerId, protocol: &'static str, after: Duration },
}

impl RequestError {
    /// Whether the request may be tried again, now or later, here or at another peer.
    pub fn is_retryable(&self) -> bool {
        match self {
            RequestError::Open(error) => error.is_retryable(),
            RequestError::Stream(error) => error.is_retryable(),
            RequestError::TimedOut { .. } => true,
        }
    }
}

/// An earlier process with this node's identity is alive, so this one has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another process with the identity of this node, {peer}, is running and started earlier")]
pub struct Duplicate {
    pub peer: PeerId,
    /// When the earlier one started, in milliseconds since the Unix epoch, by its own clock.
    pub earlier_ms: u64,
}

/// The protocol has a server already.
#[derive(Debug, thiserror::Error)]
#[error("{protocol} is served already")]
pub struct ServeError {
    pub protocol: &'static str,
}

/// The facts exceed what travels.
#[derive(Debug, thiserror::Error)]
#[error("facts of {bytes} bytes exceed the limit of {FACTS_BYTES_MAX}")]
pub struct FactsTooLarge {
    pub bytes: usize,
}
