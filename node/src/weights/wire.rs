//! The weight stream: a request names a blob, a first chunk and a count; the answer is one frame per chunk, in order. Pure.

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
pub struct ChunkRequest {
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
pub enum ChunkReply {
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

impl ChunkRequest {
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
    use proptest::sample::Index;

    use super::*;

    #[test]
    fn requests_beyond_the_bounds_are_refused() {
        let request = |version, first, count| ChunkRequest { version, blob: BlobId([1; 32]), first, count }.check();
        assert_eq!(request(VERSION, 3, CHUNKS_MAX), Ok(()));
        assert!(request(2, 0, 1).unwrap_err().contains("version 2"));
        assert!(request(VERSION, 0, 0).is_err());
        assert!(request(VERSION, 0, CHUNKS_MAX + 1).is_err());
        assert!(request(VERSION, u32::MAX, 1).is_err());
    }

    fn requests() -> impl Strategy<Value = ChunkRequest> {
        let count = prop_oneof![1..=CHUNKS_MAX, any::<u32>()];
        (any::<[u8; 32]>(), any::<u32>(), count).prop_map(|(blob, first, count)| ChunkRequest {
            version: VERSION,
            blob: BlobId(blob),
            first,
            count,
        })
    }

    fn replies() -> impl Strategy<Value = ChunkReply> {
        prop_oneof![
            any::<u32>().prop_map(ChunkReply::Chunk),
            Just(ChunkReply::NotHeld),
            "[a-z ]{0,40}".prop_map(ChunkReply::Refused)
        ]
    }

    /// A change of a valid header.
    #[derive(Debug, Clone)]
    enum Mutation {
        Flip(Index, u8),
        Insert(Index, u8),
        Remove(Index),
        Truncate(Index),
    }

    fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
        let one = prop_oneof![
            (any::<Index>(), 1u8..).prop_map(|(at, bits)| Mutation::Flip(at, bits)),
            (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Mutation::Insert(at, byte)),
            any::<Index>().prop_map(Mutation::Remove),
            any::<Index>().prop_map(Mutation::Truncate),
        ];
        proptest::collection::vec(one, 1..4)
    }

    fn mutated(header: &impl Serialize, mutations: &[Mutation]) -> Frame {
        let mut bytes = encode(header, Bytes::new()).header.to_vec();
        for mutation in mutations {
            let length = bytes.len();
            match mutation {
                _ if length == 0 => break,
                Mutation::Flip(at, bits) => bytes[at.index(length)] ^= bits,
                Mutation::Insert(at, byte) => bytes.insert(at.index(length), *byte),
                Mutation::Remove(at) => drop(bytes.remove(at.index(length))),
                Mutation::Truncate(at) => bytes.truncate(at.index(length)),
            }
        }
        Frame { header: bytes.into(), payload: Bytes::new() }
    }

    proptest! {
        #[test]
        fn headers_arrive_as_they_were_sent(request in requests(), reply in replies()) {
            prop_assert_eq!(decode::<ChunkRequest>(&encode(&request, Bytes::new())), Ok(request));
            prop_assert_eq!(decode::<ChunkReply>(&encode(&reply, Bytes::new())), Ok(reply));
        }

        #[test]
        fn a_damaged_request_is_refused_or_asks_for_chunks_within_the_bounds(
            request in requests(),
            mutations in mutations(),
        ) {
            let frame = mutated(&request, &mutations);
            if let Ok(read) = decode::<ChunkRequest>(&frame) {
                prop_assert_eq!(decode::<ChunkRequest>(&encode(&read, Bytes::new())), Ok(read.clone()));
                if read.check().is_ok() {
                    prop_assert!(read.version == VERSION && (1..=CHUNKS_MAX).contains(&read.count));
                    prop_assert!(read.first.checked_add(read.count).is_some());
                }
            }
        }

        #[test]
        fn a_damaged_reply_is_refused_or_is_another_reply(reply in replies(), mutations in mutations()) {
            let frame = mutated(&reply, &mutations);
            if let Ok(read) = decode::<ChunkReply>(&frame) {
                prop_assert_eq!(decode::<ChunkReply>(&encode(&read, Bytes::new())), Ok(read.clone()));
            }
        }
    }
}
