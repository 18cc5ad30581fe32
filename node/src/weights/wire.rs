//! The weight stream: `(blob, first chunk, count)` asked, chunks answered one frame each, in order.

use bytes::Bytes;
use coel_gossip::{Frame, Protocol};
use coel_store::{BlobId, cbor};
use serde::{Deserialize, Serialize};

/// The protocol version in every request; another one is refused by number.
pub const VERSION: u32 = 1;
/// A frame carries one chunk of at most 1 MiB and a small header.
pub const PROTOCOL: Protocol = Protocol::new("/coel/weights/1", (1 << 20) + 4096);
/// Most chunks answered to one request, so that a stream is never busy for long with one of them.
pub const CHUNKS_MAX: u32 = 64;
const HEADER_BYTES_MAX: usize = 1024;

/// Asks for `count` chunks of a blob, from `first` on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// Which blob.
    pub blob: BlobId,
    /// First chunk.
    pub first: u32,
    /// How many, 1 to [`CHUNKS_MAX`].
    pub count: u32,
}

/// One frame of the answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The payload is this chunk.
    Chunk(u32),
    /// The blob, or this part of it, is not here.
    NotHeld,
    /// The request is at fault.
    Refused(String),
}

/// A header as a frame.
pub fn encode(header: &impl Serialize, payload: Bytes) -> Frame {
    Frame { header: cbor::to_vec(header).expect("headers are plain data").into(), payload }
}

/// A frame's header.
///
/// # Errors
/// In words, when it is none.
pub fn decode<T: serde::de::DeserializeOwned>(frame: &Frame) -> Result<T, String> {
    cbor::from_slice(&frame.header, HEADER_BYTES_MAX).map_err(|error| format!("malformed header: {error}"))
}

impl Request {
    /// Whether this node can answer it at all.
    ///
    /// # Errors
    /// In words, for the one who asked.
    pub fn check(&self) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!("weight protocol version {}; this node speaks version {VERSION}", self.version));
        }
        if self.count == 0 || self.count > CHUNKS_MAX || self.first.checked_add(self.count).is_none() {
            return Err(format!("{} chunks from {}: ask for 1 to {CHUNKS_MAX}", self.count, self.first));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_beyond_the_bounds_are_refused() {
        let request = |version, first, count| Request { version, blob: BlobId([1; 32]), first, count }.check();
        assert_eq!(request(VERSION, 3, CHUNKS_MAX), Ok(()));
        assert!(request(2, 0, 1).unwrap_err().contains("version 2"));
        assert!(request(VERSION, 0, 0).is_err());
        assert!(request(VERSION, 0, CHUNKS_MAX + 1).is_err());
        assert!(request(VERSION, u32::MAX, 1).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(header in proptest::collection::vec(any::<u8>(), 0..200)) {
            let frame = Frame { header: header.into(), payload: Bytes::new() };
            let _ = decode::<Request>(&frame);
            let _ = decode::<Reply>(&frame);
        }
    }
}
