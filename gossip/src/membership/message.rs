//! What nodes say to one another on the gossip protocol, and its bytes.
//!
//! Owns: [`Advert`], [`Stamp`], [`Message`] and their fixed little-endian encoding.
//! Invariant: decoding is total (any bytes give a message or an error, never a panic), allocates no more than
//! the input justifies, and accepts exactly what encoding produces.
//! Deliberately does not know: which adverts are worth keeping or sending (`state` decides).
//!
//! ```text
//! message := kind u8, body                     1 delta, 2 digest, 3 wanted, 4 bye
//! delta   := count u16, advert*                advert := peer, incarnation, flags u8, [version u64, status u16],
//!                                                        [version u64, length u32, facts], [process, signature]
//! digest  := count u16, entry*                 entry  := peer, incarnation, status version u64, facts version u64
//! bye     := incarnation                       peer   := length u8, multihash bytes
//! incarnation := rank u64, process             process := start u64, nonce u64
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};
use libp2p::PeerId;

use super::process::{Incarnation, Process, SIGNATURE_BYTES, Sighting};
use super::status::Status;

/// Largest opaque facts of one node, in bytes. All nodes must agree on it, so it is not configurable.
pub const FACTS_BYTES_MAX: usize = 64 * 1024;
/// Most entries of one digest; far beyond the dozens of machines of a mesh.
pub const DIGEST_ENTRIES_MAX: usize = 2048;
/// Adverts are packed into one delta until it has grown past this.
pub const DELTA_BYTES_SOFT_MAX: usize = 96 * 1024;
/// Bytes of a digest entry with an ed25519 peer id.
pub const DIGEST_ENTRY_BYTES: usize = 1 + 38 + 5 * 8;
/// Upper bound of every message this module encodes.
pub const MESSAGE_BYTES_MAX: usize = 256 * 1024;

const _: () = assert!(DELTA_BYTES_SOFT_MAX + FACTS_BYTES_MAX + 1024 < MESSAGE_BYTES_MAX);
const _: () = assert!(DIGEST_ENTRIES_MAX * (DIGEST_ENTRY_BYTES + 40) + 3 < MESSAGE_BYTES_MAX);

const HAS_STATUS: u8 = 1;
const HAS_FACTS: u8 = 2;
const HAS_SIGHTING: u8 = 4;

/// A value with the count of its changes within one incarnation; counts start at 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned<T> {
    pub version: u64,
    pub value: T,
}

/// What a node says about itself, or the part of it that the receiver lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advert {
    pub origin: PeerId,
    /// A restart outranks what went before.
    pub incarnation: Incarnation,
    /// The word of the origin's process about another one that it had to outrank.
    pub sighting: Option<Sighting>,
    pub status: Option<Versioned<Status>>,
    pub facts: Option<Versioned<Bytes>>,
}

/// How much a node knows of one origin; version 0 is "nothing".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    pub incarnation: Incarnation,
    pub status: u64,
    pub facts: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// News, to be merged.
    Delta(Vec<Advert>),
    /// Everything the sender knows, by stamp. The receiver answers with what is newer and asks for what it lacks.
    Digest(Vec<(PeerId, Stamp)>),
    /// What the sender knows of just these origins. The receiver answers with what is newer.
    Wanted(Vec<(PeerId, Stamp)>),
    /// The sender's process is ending.
    Bye { incarnation: Incarnation },
}

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("gossip message ends {missing} bytes early")]
    Short { missing: usize },
    #[error("gossip message has {extra} bytes too many")]
    Long { extra: usize },
    #[error("unknown gossip message kind {0}")]
    Kind(u8),
    #[error("unknown advert flags {0:#04x}")]
    Flags(u8),
    #[error("malformed peer id in a gossip message")]
    Peer,
    #[error("version 0 of a value that is present")]
    Version,
    #[error("facts of {bytes} bytes exceed the limit of {FACTS_BYTES_MAX}")]
    Facts { bytes: usize },
    #[error("digest of {entries} entries exceeds the limit of {DIGEST_ENTRIES_MAX}")]
    Entries { entries: usize },
}

impl Message {
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        match self {
            Message::Delta(adverts) => {
                out.put_u8(1);
                out.put_u16_le(count(adverts.len()));
                adverts.iter().for_each(|advert| put_advert(&mut out, advert));
            }
            Message::Digest(entries) => put_entries(&mut out, 2, entries),
            Message::Wanted(entries) => put_entries(&mut out, 3, entries),
            Message::Bye { incarnation } => {
                out.put_u8(4);
                put_incarnation(&mut out, *incarnation);
            }
        }
        debug_assert!(out.len() <= MESSAGE_BYTES_MAX);
        out.freeze()
    }

    /// Facts in the result share the memory of `bytes`.
    pub fn decode(mut bytes: Bytes) -> Result<Message, DecodeError> {
        let message = match get(&mut bytes, 1, Buf::get_u8)? {
            1 => {
                let count = get(&mut bytes, 2, Buf::get_u16_le)?;
                // The vector grows with the adverts that are there: a count alone must not reserve memory.
                let mut adverts = Vec::new();
                for _ in 0..count {
                    adverts.push(get_advert(&mut bytes)?);
                }
                Message::Delta(adverts)
            }
            2 => Message::Digest(get_entries(&mut bytes)?),
            3 => Message::Wanted(get_entries(&mut bytes)?),
            4 => Message::Bye { incarnation: get_incarnation(&mut bytes)? },
            kind => return Err(DecodeError::Kind(kind)),
        };
        if bytes.has_remaining() {
            return Err(DecodeError::Long { extra: bytes.remaining() });
        }
        Ok(message)
    }
}

/// Bytes `advert` takes in a delta.
pub fn advert_bytes(advert: &Advert) -> usize {
    let facts = advert.facts.as_ref().map_or(0, |facts| 12 + facts.value.len());
    let status = if advert.status.is_some() { 10 } else { 0 };
    let sighting = if advert.sighting.is_some() { 16 + SIGNATURE_BYTES } else { 0 };
    1 + advert.origin.to_bytes().len() + 25 + status + facts + sighting
}

fn count(len: usize) -> u16 {
    u16::try_from(len).expect("the state bounds what goes into one message")
}

fn put_peer(out: &mut BytesMut, peer: &PeerId) {
    let bytes = peer.to_bytes();
    out.put_u8(bytes.len() as u8); // a peer id is a multihash of at most 64 bytes
    out.put_slice(&bytes);
}

fn put_process(out: &mut BytesMut, process: Process) {
    out.put_u64_le(process.started_ms);
    out.put_u64_le(process.nonce);
}

fn put_incarnation(out: &mut BytesMut, incarnation: Incarnation) {
    out.put_u64_le(incarnation.rank);
    put_process(out, incarnation.process);
}

fn put_advert(out: &mut BytesMut, advert: &Advert) {
    put_peer(out, &advert.origin);
    put_incarnation(out, advert.incarnation);
    let status = if advert.status.is_some() { HAS_STATUS } else { 0 };
    let facts = if advert.facts.is_some() { HAS_FACTS } else { 0 };
    let sighting = if advert.sighting.is_some() { HAS_SIGHTING } else { 0 };
    out.put_u8(status | facts | sighting);
    if let Some(status) = &advert.status {
        out.put_u64_le(status.version);
        out.put_u16_le(status.value.to_bits());
    }
    if let Some(facts) = &advert.facts {
        out.put_u64_le(facts.version);
        out.put_u32_le(facts.value.len() as u32); // bounded by FACTS_BYTES_MAX where facts are set
        out.put_slice(&facts.value);
    }
    if let Some(sighting) = &advert.sighting {
        put_process(out, sighting.of);
        out.put_slice(&sighting.signature);
    }
}

fn put_entries(out: &mut BytesMut, kind: u8, entries: &[(PeerId, Stamp)]) {
    out.put_u8(kind);
    out.put_u16_le(count(entries.len()));
    for (peer, stamp) in entries {
        put_peer(out, peer);
        put_incarnation(out, stamp.incarnation);
        out.put_u64_le(stamp.status);
        out.put_u64_le(stamp.facts);
    }
}

/// Reads `size` bytes with `read`, or says how many are missing.
fn get<T>(bytes: &mut Bytes, size: usize, read: impl FnOnce(&mut Bytes) -> T) -> Result<T, DecodeError> {
    match size.checked_sub(bytes.remaining()) {
        None | Some(0) => Ok(read(bytes)),
        Some(missing) => Err(DecodeError::Short { missing }),
    }
}

fn get_peer(bytes: &mut Bytes) -> Result<PeerId, DecodeError> {
    let length = usize::from(get(bytes, 1, Buf::get_u8)?);
    let raw = get(bytes, length, |bytes| bytes.split_to(length))?;
    let peer = PeerId::from_bytes(&raw).map_err(|_| DecodeError::Peer)?;
    // A multihash can spell the same id in more than one way; only the canonical one is accepted.
    if peer.to_bytes() == raw[..] { Ok(peer) } else { Err(DecodeError::Peer) }
}

fn get_process(bytes: &mut Bytes) -> Result<Process, DecodeError> {
    Ok(Process { started_ms: get(bytes, 8, Buf::get_u64_le)?, nonce: get(bytes, 8, Buf::get_u64_le)? })
}

fn get_incarnation(bytes: &mut Bytes) -> Result<Incarnation, DecodeError> {
    Ok(Incarnation { rank: get(bytes, 8, Buf::get_u64_le)?, process: get_process(bytes)? })
}

fn get_version(bytes: &mut Bytes) -> Result<u64, DecodeError> {
    match get(bytes, 8, Buf::get_u64_le)? {
        0 => Err(DecodeError::Version),
        version => Ok(version),
    }
}

fn get_advert(bytes: &mut Bytes) -> Result<Advert, DecodeError> {
    let origin = get_peer(bytes)?;
    let incarnation = get_incarnation(bytes)?;
    let flags = get(bytes, 1, Buf::get_u8)?;
    if flags & !(HAS_STATUS | HAS_FACTS | HAS_SIGHTING) != 0 {
        return Err(DecodeError::Flags(flags));
    }
    let mut advert = Advert { origin, incarnation, sighting: None, status: None, facts: None };
    if flags & HAS_STATUS != 0 {
        let version = get_version(bytes)?;
        let value = Status::from_bits(get(bytes, 2, Buf::get_u16_le)?);
        advert.status = Some(Versioned { version, value });
    }
    if flags & HAS_FACTS != 0 {
        let version = get_version(bytes)?;
        let length = get(bytes, 4, Buf::get_u32_le)? as usize;
        if length > FACTS_BYTES_MAX {
            return Err(DecodeError::Facts { bytes: length });
        }
        let value = get(bytes, length, |bytes| bytes.split_to(length))?;
        advert.facts = Some(Versioned { version, value });
    }
    if flags & HAS_SIGHTING != 0 {
        let of = get_process(bytes)?;
        let signature = get(bytes, SIGNATURE_BYTES, |bytes| {
            let mut signature = [0; SIGNATURE_BYTES];
            bytes.copy_to_slice(&mut signature);
            signature
        })?;
        advert.sighting = Some(Sighting { of, signature });
    }
    Ok(advert)
}

fn get_entries(bytes: &mut Bytes) -> Result<Vec<(PeerId, Stamp)>, DecodeError> {
    let entries = usize::from(get(bytes, 2, Buf::get_u16_le)?);
    if entries > DIGEST_ENTRIES_MAX {
        return Err(DecodeError::Entries { entries });
    }
    let mut digest = Vec::new();
    for _ in 0..entries {
        let peer = get_peer(bytes)?;
        let incarnation = get_incarnation(bytes)?;
        let status = get(bytes, 8, Buf::get_u64_le)?;
        let facts = get(bytes, 8, Buf::get_u64_le)?;
        digest.push((peer, Stamp { incarnation, status, facts }));
    }
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn peer() -> impl Strategy<Value = PeerId> {
        any::<[u8; 32]>().prop_map(|seed| {
            libp2p::identity::Keypair::ed25519_from_bytes(seed).expect("any 32 bytes are a seed").public().into()
        })
    }

    fn versioned<T: std::fmt::Debug>(value: impl Strategy<Value = T>) -> impl Strategy<Value = Option<Versioned<T>>> {
        proptest::option::of((1u64.., value).prop_map(|(version, value)| Versioned { version, value }))
    }

    fn process() -> impl Strategy<Value = Process> {
        any::<(u64, u64)>().prop_map(|(started_ms, nonce)| Process { started_ms, nonce })
    }

    fn incarnation() -> impl Strategy<Value = Incarnation> {
        (any::<u64>(), process()).prop_map(|(rank, process)| Incarnation { rank, process })
    }

    fn advert() -> impl Strategy<Value = Advert> {
        let status = versioned(any::<u16>().prop_map(Status::from_bits));
        let facts = versioned(proptest::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from));
        let sighting = proptest::option::of(
            (process(), any::<u8>()).prop_map(|(of, byte)| Sighting { of, signature: [byte; SIGNATURE_BYTES] }),
        );
        (peer(), incarnation(), sighting, status, facts).prop_map(|(origin, incarnation, sighting, status, facts)| {
            Advert { origin, incarnation, sighting, status, facts }
        })
    }

    fn entries() -> impl Strategy<Value = Vec<(PeerId, Stamp)>> {
        let stamp = (incarnation(), any::<u64>(), any::<u64>()).prop_map(|(incarnation, status, facts)| Stamp {
            incarnation,
            status,
            facts,
        });
        proptest::collection::vec((peer(), stamp), 0..4)
    }

    fn message() -> impl Strategy<Value = Message> {
        prop_oneof![
            proptest::collection::vec(advert(), 0..4).prop_map(Message::Delta),
            entries().prop_map(Message::Digest),
            entries().prop_map(Message::Wanted),
            incarnation().prop_map(|incarnation| Message::Bye { incarnation }),
        ]
    }

    proptest! {
        #[test]
        fn messages_survive_the_round_trip(message in message()) {
            prop_assert_eq!(Message::decode(message.encode()), Ok(message));
        }

        #[test]
        fn arbitrary_bytes_are_a_canonical_message_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            let bytes = Bytes::from(bytes);
            if let Ok(message) = Message::decode(bytes.clone()) {
                prop_assert_eq!(message.encode(), bytes);
            }
        }

        #[test]
        fn a_damaged_message_never_panics(message in message(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
            let mut bytes = message.encode().to_vec();
            let at = at.index(bytes.len());
            bytes[at] = to;
            let _ = Message::decode(bytes.clone().into());
            bytes.truncate(at);
            prop_assert!(Message::decode(bytes.into()).is_err());
        }

        #[test]
        fn the_size_of_an_advert_is_known_before_it_is_encoded(advert in advert()) {
            let alone = Message::Delta(vec![advert.clone()]).encode().len();
            prop_assert_eq!(advert_bytes(&advert), alone - 3);
        }
    }

    #[test]
    fn oversized_counts_are_refused_before_anything_is_read() {
        let digest = Bytes::from_static(&[2, 0xff, 0xff]);
        assert_eq!(Message::decode(digest), Err(DecodeError::Entries { entries: 0xffff }));
        let mut facts = BytesMut::new();
        facts.put_u8(1);
        facts.put_u16_le(1);
        put_peer(&mut facts, &PeerId::random());
        put_incarnation(&mut facts, Incarnation::default());
        facts.put_u8(HAS_FACTS);
        facts.put_u64_le(1);
        facts.put_u32_le(u32::MAX);
        assert_eq!(Message::decode(facts.freeze()), Err(DecodeError::Facts { bytes: u32::MAX as usize }));
    }

    #[test]
    fn a_digest_entry_has_the_size_the_anti_entropy_period_counts_with() {
        let peer = libp2p::identity::Keypair::generate_ed25519().public().to_peer_id();
        let one = Message::Digest(vec![(peer, Stamp::default())]).encode();
        assert_eq!(one.len(), 3 + DIGEST_ENTRY_BYTES);
    }
}
