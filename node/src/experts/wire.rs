//! Expert calls as frames: a small CBOR header and raw little-endian f32 rows. Tensors are never CBOR.
//!
//! Wire mode `exact`: f32 rows out, one f32 row per (row, expert) back, added up at the home.

use bytes::Bytes;
use coel_gossip::{Frame, Protocol};
use coel_store::{Epoch, ExpertId, ModelId, cbor};
use serde::{Deserialize, Serialize};

/// The protocol version in every header; another one is refused by number.
pub const VERSION: u32 = 1;
/// Largest frame: [`ROW_BYTES_MAX`] of rows and the longest header.
pub const PROTOCOL: Protocol = Protocol::new("/coel/expert/1", (ROW_BYTES_MAX + HEADER_BYTES_MAX + 64) as u32);
/// Rows of one call or reply, in bytes. The home cuts a prompt so that its replies fit.
pub const ROW_BYTES_MAX: usize = 16 << 20;
/// A header lists at most every (row, expert) pair of a call.
pub const HEADER_BYTES_MAX: usize = 60 << 10;

/// One expert of a call, and the rows it is to compute, as indices into the call's rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// Expert index within the layer.
    pub expert: u16,
    /// Rows, ascending.
    pub rows: Vec<u16>,
}

/// What a home asks of a host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CallHeader {
    /// [`VERSION`].
    pub version: u32,
    /// Whose experts.
    pub model: ModelId,
    /// The placement the home goes by; for the host's log only, since an expert's weights never change within a model.
    pub epoch: Epoch,
    /// Decoder layer.
    pub layer: u16,
    /// Floats per row.
    pub hidden_size: u32,
    /// Experts and their rows.
    pub work: Vec<Work>,
}

/// What a host answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ReplyHeader {
    /// The payload holds one row per (expert, row) pair, in the call's order.
    Done {
        /// Kernel class and precision that computed them, e.g. `avx512/bf16`.
        class: String,
    },
    /// These experts are not held here (any more, or yet); nothing was computed.
    NotHeld(Vec<ExpertId>),
    /// The call is at fault; the same bytes would be refused again.
    Refused(String),
}

/// Bytes that are no expert call or reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The header does not decode.
    #[error("malformed header: {0}")]
    Header(String),
    /// The peer speaks another version.
    #[error("expert protocol version {0}; this node speaks version {VERSION}: run the same coel on both")]
    Version(u32),
    /// The payload is not the rows which the header announces.
    #[error("payload of {actual} bytes, the header announces {expected}")]
    Payload { expected: usize, actual: usize },
    /// An impossible header: no rows, a row index out of range, an absurd size.
    #[error("{0}")]
    Nonsense(&'static str),
}

/// Rows of f32 as bytes.
pub fn encode_rows(rows: &[f32]) -> Bytes {
    let mut bytes = Vec::with_capacity(rows.len() * 4);
    for value in rows {
        bytes.extend(value.to_le_bytes());
    }
    bytes.into()
}

/// Bytes as rows of f32. The length must be a multiple of four, which [`decode_call`] and [`decode_reply`] have checked.
fn decode_rows(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("chunks of four"))).collect()
}

fn encode_header(header: &impl Serialize) -> Bytes {
    cbor::to_vec(header).expect("headers are plain data").into()
}

/// A call as a frame. `rows` is `[n, hidden_size]`.
pub fn encode_call(header: &CallHeader, rows: &[f32]) -> Frame {
    Frame { header: encode_header(header), payload: encode_rows(rows) }
}

/// A frame as a call, checked: sizes agree, every index is in range.
///
/// # Errors
/// [`WireError`]; nothing of the frame was used.
pub fn decode_call(frame: &Frame) -> Result<(CallHeader, Vec<f32>), WireError> {
    let header: CallHeader =
        cbor::from_slice(&frame.header, HEADER_BYTES_MAX).map_err(|error| WireError::Header(error.to_string()))?;
    if header.version != VERSION {
        return Err(WireError::Version(header.version));
    }
    let row_bytes = (header.hidden_size as usize).checked_mul(4).filter(|&bytes| bytes > 0 && bytes <= ROW_BYTES_MAX);
    let row_bytes = row_bytes.ok_or(WireError::Nonsense("a row size of zero or beyond all bounds"))?;
    let rows = frame.payload.len() / row_bytes;
    if rows == 0 || rows * row_bytes != frame.payload.len() {
        return Err(WireError::Payload { expected: rows.max(1) * row_bytes, actual: frame.payload.len() });
    }
    if header.work.iter().flat_map(|work| &work.rows).any(|&row| usize::from(row) >= rows) {
        return Err(WireError::Nonsense("a row index beyond the rows sent"));
    }
    if pairs(&header.work).checked_mul(row_bytes).is_none_or(|bytes| bytes == 0 || bytes > ROW_BYTES_MAX) {
        return Err(WireError::Nonsense("no work, or more than one reply can carry"));
    }
    Ok((header, decode_rows(&frame.payload)))
}

/// A reply as a frame; `rows` is empty unless it is [`ReplyHeader::Done`].
pub fn encode_reply(header: &ReplyHeader, rows: &[f32]) -> Frame {
    Frame { header: encode_header(header), payload: encode_rows(rows) }
}

/// A frame as a reply to a call for `pairs` rows of `hidden_size`.
///
/// # Errors
/// [`WireError`], also when a [`ReplyHeader::Done`] brings more or fewer rows than were asked for.
pub fn decode_reply(frame: &Frame, pairs: usize, hidden_size: usize) -> Result<(ReplyHeader, Vec<f32>), WireError> {
    let header: ReplyHeader =
        cbor::from_slice(&frame.header, HEADER_BYTES_MAX).map_err(|error| WireError::Header(error.to_string()))?;
    let expected = if matches!(header, ReplyHeader::Done { .. }) { pairs * hidden_size * 4 } else { 0 };
    if frame.payload.len() != expected {
        return Err(WireError::Payload { expected, actual: frame.payload.len() });
    }
    Ok((header, decode_rows(&frame.payload)))
}

/// (row, expert) pairs of some work.
pub fn pairs(work: &[Work]) -> usize {
    work.iter().map(|work| work.rows.len()).sum()
}

/// Most rows of a prompt that go through the decoder at once, so that one layer's reply fits a frame and its header too.
pub fn rows_max(hidden_size: usize, experts_per_token: usize) -> usize {
    let per_row = experts_per_token.max(1);
    (ROW_BYTES_MAX / (per_row * hidden_size.max(1) * 4)).min(HEADER_BYTES_MAX / (8 * per_row)).clamp(1, 256)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn call() -> (CallHeader, Vec<f32>) {
        let work = vec![Work { expert: 3, rows: vec![0, 2] }, Work { expert: 9, rows: vec![1] }];
        let header =
            CallHeader { version: VERSION, model: ModelId([4; 32]), epoch: Epoch(7), layer: 5, hidden_size: 2, work };
        (header, vec![1.0, -0.0, f32::MIN_POSITIVE, 2.5, f32::MAX, 1e-40])
    }

    #[test]
    fn a_call_arrives_bit_for_bit() {
        let (header, rows) = call();
        let (header_back, rows_back) = decode_call(&encode_call(&header, &rows)).unwrap();
        assert_eq!(header_back, header);
        let bits = |rows: &[f32]| rows.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&rows_back), bits(&rows));
    }

    #[test]
    fn calls_that_do_not_add_up_are_refused() {
        let (header, rows) = call();
        let refused = |change: fn(&mut CallHeader), rows: &[f32]| {
            let mut header = header.clone();
            change(&mut header);
            decode_call(&encode_call(&header, rows)).unwrap_err()
        };
        assert_eq!(refused(|h| h.version = 2, &rows), WireError::Version(2));
        assert!(matches!(refused(|_| (), &rows[..5]), WireError::Payload { .. }));
        assert!(matches!(refused(|_| (), &[]), WireError::Payload { .. }));
        assert!(matches!(refused(|h| h.hidden_size = 0, &rows), WireError::Nonsense(_)));
        assert!(matches!(refused(|h| h.hidden_size = u32::MAX, &rows), WireError::Nonsense(_)));
        assert!(matches!(refused(|h| h.work[0].rows[1] = 3, &rows), WireError::Nonsense(_)));
        assert!(matches!(refused(|h| h.work.clear(), &rows), WireError::Nonsense(_)));
    }

    #[test]
    fn a_reply_brings_exactly_the_rows_asked_for() {
        let done = ReplyHeader::Done { class: "avx2/bf16".into() };
        let frame = encode_reply(&done, &[1.0, 2.0]);
        assert_eq!(decode_reply(&frame, 1, 2), Ok((done, vec![1.0, 2.0])));
        assert!(matches!(decode_reply(&frame, 2, 2), Err(WireError::Payload { .. })));
        let missing = ReplyHeader::NotHeld(vec![ExpertId { layer: 5, index: 3 }]);
        assert_eq!(decode_reply(&encode_reply(&missing, &[]), 2, 2), Ok((missing, vec![])));
    }

    #[test]
    fn a_full_chunk_fits_its_frames() {
        for (hidden, k) in [(256, 4), (2048, 4), (2048, 8), (4096, 2), (8192, 8)] {
            let rows = rows_max(hidden, k);
            assert!(rows * k * hidden * 4 <= ROW_BYTES_MAX, "{hidden} {k}");
            let rows = rows as u16;
            let work = (0..k as u16).map(|expert| Work { expert, rows: (0..rows).collect() }).collect();
            let (mut header, _) = call();
            header.work = work;
            assert!(encode_header(&header).len() <= HEADER_BYTES_MAX, "{hidden} {k}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(header in proptest::collection::vec(any::<u8>(), 0..200), payload in proptest::collection::vec(any::<u8>(), 0..64)) {
            let frame = Frame { header: header.into(), payload: payload.into() };
            let _ = decode_call(&frame);
            let _ = decode_reply(&frame, 1, 2);
        }
    }
}
