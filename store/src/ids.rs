//! Ids, as plain values: of nodes (`NodeId`, `Peer`, `MeshId`), of content (`ModelId`, `BlobId`, `ExpertId`), of versions
//! (`Epoch`).
//!
//! Every byte-array id has one spelling for people (lower-case hex) and one for the disk and the wire (a CBOR byte string);
//! a human-readable serializer gets the first. Integers are wrapped because a node, an epoch and a layer swap silently.
//!
//! The module does not know what a peer's bytes mean: the node crate turns them into a network identity.

use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// A member of the mesh, as its log numbers it: allocated by the log, never reused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub u64);

impl From<u64> for NodeId {
    fn from(number: u64) -> Self {
        Self(number)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The version of a placement; it only grows. Zero is "nothing placed yet".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A text that does not spell an id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not a {what}: {expected}")]
pub struct ParseIdError {
    /// Which id was wanted.
    pub what: &'static str,
    /// What was given (cut to 80 characters).
    pub text: String,
    /// What it should look like.
    pub expected: String,
}

impl ParseIdError {
    pub(crate) fn new(what: &'static str, text: &str, expected: impl Into<String>) -> Self {
        Self { what, text: text.chars().take(80).collect(), expected: expected.into() }
    }
}

/// Lower-case hex of `bytes`.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(DIGITS[usize::from(byte >> 4)] as char);
        text.push(DIGITS[usize::from(byte & 15)] as char);
    }
    text
}

/// The bytes that `text` spells in hex (either case), if it does.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |c: u8| char::from(c).to_digit(16).map(|d| d as u8);
    let text = text.as_bytes();
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

/// Accepts a byte string, or hex from a format made for people.
struct BytesVisitor;

impl Visitor<'_> for BytesVisitor {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bytes, or their hex")
    }

    fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
        Ok(bytes.to_vec())
    }

    fn visit_byte_buf<E: serde::de::Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
        Ok(bytes)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Vec<u8>, E> {
        unhex(text).ok_or_else(|| E::custom("not hex"))
    }
}

fn serialize_bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    if serializer.is_human_readable() {
        serializer.serialize_str(&hex(bytes))
    } else {
        serializer.serialize_bytes(bytes)
    }
}

fn deserialize_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    if deserializer.is_human_readable() {
        deserializer.deserialize_str(BytesVisitor)
    } else {
        deserializer.deserialize_byte_buf(BytesVisitor)
    }
}

macro_rules! bytes_id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                unhex(text).and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or_else(|| {
                    ParseIdError::new(stringify!($name), text, format!("{} hex digits", $len * 2))
                })
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serialize_bytes(&self.0, serializer)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let bytes = deserialize_bytes(deserializer)?;
                let len = bytes.len();
                bytes.try_into().map(Self).map_err(|_| {
                    D::Error::custom(format!("a {} has {} bytes, not {len}", stringify!($name), $len))
                })
            }
        }
    };
}

bytes_id!(
    /// One mesh, drawn at random when it is created.
    MeshId,
    16
);
bytes_id!(
    /// The BLAKE3 hash of a blob's content.
    BlobId,
    32
);
bytes_id!(
    /// The BLAKE3 hash of a model's encoded manifest.
    ModelId,
    32
);
bytes_id!(
    /// The BLAKE3 hash of an invite's secret token; the log never sees the token itself.
    TokenHash,
    32
);

impl BlobId {
    /// The id of a blob that has this content.
    pub fn of(content: &[u8]) -> Self {
        Self(*blake3::hash(content).as_bytes())
    }
}

impl TokenHash {
    /// The hash under which the log keeps `token`.
    pub fn of(token: &[u8]) -> Self {
        Self(*blake3::hash(token).as_bytes())
    }
}

/// A peer's network identity, opaque here.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer(pub Vec<u8>);

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Peer({self})")
    }
}

impl Serialize for Peer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_bytes(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for Peer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize_bytes(deserializer).map(Self)
    }
}

/// One routed expert, written `layer.index` for people and packed into one integer otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpertId {
    /// The decoder layer.
    pub layer: u16,
    /// The expert's index in that layer.
    pub index: u16,
}

impl ExpertId {
    /// Expert `index` of `layer`.
    pub fn new(layer: u16, index: u16) -> Self {
        Self { layer, index }
    }
}

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.layer, self.index)
    }
}

impl FromStr for ExpertId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        text.split_once('.')
            .and_then(|(layer, index)| Some(Self::new(layer.parse().ok()?, index.parse().ok()?)))
            .ok_or_else(|| ParseIdError::new("ExpertId", text, "layer.index, such as 3.17"))
    }
}

impl Serialize for ExpertId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            serializer.serialize_u32(u32::from(self.layer) << 16 | u32::from(self.index))
        }
    }
}

impl<'de> Deserialize<'de> for ExpertId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
        } else {
            let packed = u32::deserialize(deserializer)?;
            Ok(Self::new((packed >> 16) as u16, packed as u16))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cbor;

    #[test]
    fn ids_read_back_what_they_print() {
        let mesh = MeshId([0xab; 16]);
        assert_eq!(mesh.to_string(), "ab".repeat(16));
        assert_eq!(mesh.to_string().parse(), Ok(mesh));
        assert!("ab".parse::<MeshId>().unwrap_err().to_string().contains("32 hex digits"));
        assert!("zz".repeat(16).parse::<MeshId>().is_err());
        assert_eq!("3.17".parse(), Ok(ExpertId::new(3, 17)));
        assert_eq!(ExpertId::new(3, 17).to_string(), "3.17");
        assert!("3".parse::<ExpertId>().is_err());
    }

    #[test]
    fn ids_are_short_on_the_wire() {
        assert_eq!(cbor::to_vec(&MeshId([7; 16])).unwrap().len(), 17);
        assert_eq!(cbor::to_vec(&BlobId([7; 32])).unwrap().len(), 34);
        assert_eq!(cbor::to_vec(&Peer(vec![7; 38])).unwrap().len(), 40);
        assert_eq!(cbor::to_vec(&ExpertId::new(0, 17)).unwrap(), [17]);
        assert_eq!(cbor::to_vec(&ExpertId::new(1, 2)).unwrap(), [0x1a, 0, 1, 0, 2]);
        let id: ExpertId = cbor::from_slice(&[0x1a, 0, 1, 0, 2], 16).unwrap();
        assert_eq!(id, ExpertId::new(1, 2));
        let short = cbor::to_vec(&BlobId([7; 32])).unwrap();
        assert!(cbor::from_slice::<MeshId>(&short, 64).unwrap_err().to_string().contains("16 bytes, not 32"));
    }
}
