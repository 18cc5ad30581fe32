//! CBOR in and out: the only module of this crate that knows the encoder.
//!
//! serde_cbor is no longer maintained, so it stays behind two functions. Invariant: a stranger's bytes never panic, never
//! allocate more than their own length justifies, and never pass with something left over. The length is compared with the
//! caller's limit before anything is decoded; the decoder itself bounds nesting (128 deep).
//!
//! Encoding is deterministic for the types of this project: structs in field order, maps of `BTreeMap` in key order, every
//! length definite. Hashes of encoded values rely on that.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why bytes are not the value that was asked for, or a value cannot be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CborError {
    /// Refused by length, before decoding.
    #[error("{bytes} bytes are more than the {limit} allowed here")]
    TooLong {
        /// How long the input is.
        bytes: usize,
        /// How long it may be.
        limit: usize,
    },
    /// Not the expected value, or not CBOR at all.
    #[error("malformed CBOR: {0}")]
    Malformed(String),
    /// The value cannot be encoded.
    #[error("not encodable as CBOR: {0}")]
    Unencodable(String),
}

/// `value` as CBOR.
pub fn to_vec<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, CborError> {
    serde_cbor::to_vec(&value).map_err(|error| CborError::Unencodable(error.to_string()))
}

/// The value that exactly these bytes encode; `limit` is the most bytes to accept.
pub fn from_slice<T: DeserializeOwned>(bytes: &[u8], limit: usize) -> Result<T, CborError> {
    if bytes.len() > limit {
        return Err(CborError::TooLong { bytes: bytes.len(), limit });
    }
    decode(bytes).map_err(|error| CborError::Malformed(error.to_string()))
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, erased_serde::Error> {
    let mut decoder = serde_cbor::Deserializer::from_slice(bytes);
    // The decoder is compiled once, not once for each type and each of its fields: that took two thirds of this crate's build.
    let value = erased_serde::deserialize(&mut <dyn erased_serde::Deserializer>::erase(&mut decoder))?;
    decoder.end().map_err(serde::de::Error::custom)?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_leftovers_are_refused() {
        let bytes = to_vec(&7u32).unwrap();
        assert_eq!(from_slice::<u32>(&bytes, 1), Ok(7));
        assert_eq!(from_slice::<u32>(&[0, 0], 1), Err(CborError::TooLong { bytes: 2, limit: 1 }));
        assert!(matches!(from_slice::<u32>(&[0, 0], 2), Err(CborError::Malformed(_))));
        assert!(matches!(from_slice::<u32>(&[], 2), Err(CborError::Malformed(_))));
    }

    #[test]
    fn a_huge_declared_length_is_an_error_not_an_allocation() {
        // An array, a byte string and a text that claim 2^63 elements.
        for head in [0x9b, 0x5b, 0x7b] {
            let mut bytes = vec![head];
            bytes.extend((1u64 << 63).to_be_bytes());
            assert!(from_slice::<Vec<u64>>(&bytes, 64).is_err());
            assert!(from_slice::<String>(&bytes, 64).is_err());
            assert!(from_slice::<crate::Peer>(&bytes, 64).is_err());
        }
    }

    #[test]
    fn deep_nesting_is_an_error_not_a_stack_overflow() {
        #[derive(Debug, serde::Serialize, serde::Deserialize)]
        struct Nest(Vec<Nest>);
        assert!(from_slice::<Nest>(&vec![0x81; 100_000], 1 << 20).is_err());
    }
}
