//! Expert calls as frames: a small CBOR header and raw little-endian f32 rows. Tensors are never CBOR.
//!
//! Wire mode `exact`: f32 rows out, and one f32 row per (row, expert) pair back, which the home adds up.
//!
//! The invariant: a peer's bytes never panic this node, and what is decoded from them is bounded by sizes that were checked
//! first. Text that may be kept (a class, a refusal) is short and printable. This module does not know who computes what.

use bytes::Bytes;
use coel_gossip::{Frame, Protocol};
use coel_store::{Epoch, ExpertId, ModelId, cbor};
use serde::{Deserialize, Serialize};

use super::class;

/// The protocol version in every header; a call of another version is refused by number.
pub const VERSION: u32 = 1;
/// Largest frame: [`ROW_BYTES_MAX`] of rows and the longest header.
pub const PROTOCOL: Protocol = Protocol::new("/coel/expert/1", (ROW_BYTES_MAX + HEADER_BYTES_MAX + 64) as u32);
/// Rows of one call or reply, in bytes. The home cuts a prompt so that its replies fit.
pub const ROW_BYTES_MAX: usize = 16 << 20;
/// A header lists at most every (row, expert) pair of a call.
pub const HEADER_BYTES_MAX: usize = 60 << 10;
/// What is kept of a refusal's reason, in bytes.
const REASON_BYTES_MAX: usize = 256;

/// One expert of a call and the rows that it gets, as indices into the call's rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// Expert index within the layer.
    pub expert: u16,
    /// Row indices, ascending.
    pub rows: Vec<u16>,
}

/// What a home asks of a host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CallHeader {
    /// [`VERSION`].
    pub version: u32,
    /// The model whose experts are called.
    pub model: ModelId,
    /// The placement that the home goes by. It serves the host's log only: an expert's weights never change within a model.
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
    /// The payload holds one row per (row, expert) pair, in the call's order.
    Done {
        /// The [kernel class](super::class) that computed them.
        class: String,
    },
    /// These experts are not held here, any more or yet; nothing was computed.
    NotHeld(Vec<ExpertId>),
    /// The call is at fault; the same bytes would be refused again.
    Refused(String),
}

/// Why bytes are no expert call or reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The header does not decode.
    #[error("malformed header: {0}")]
    Header(String),
    /// The peer speaks another version.
    #[error("expert protocol version {0}; this node speaks version {VERSION}: run the same coel on both")]
    Version(u32),
    /// The payload does not hold the rows that the header announces.
    #[error("the payload has {actual} bytes, but the header announces {expected}")]
    Payload { expected: usize, actual: usize },
    /// A value of the header that no coel node sends.
    #[error("{0}")]
    Invalid(&'static str),
}

/// Rows of f32 as bytes.
pub fn encode_rows(rows: &[f32]) -> Bytes {
    let mut bytes = Vec::with_capacity(rows.len() * 4);
    for value in rows {
        bytes.extend(value.to_le_bytes());
    }
    bytes.into()
}

/// Bytes as rows of f32. [`decode_call`] and [`decode_reply`] have checked that the length is a multiple of four.
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

/// A frame as a call, checked: sizes agree and every index is in range. The rows are `[n, hidden_size]`.
///
/// # Errors
/// [`WireError`]; then nothing of the frame was used.
pub fn decode_call(frame: &Frame) -> Result<(CallHeader, Vec<f32>), WireError> {
    let header: CallHeader =
        cbor::from_slice(&frame.header, HEADER_BYTES_MAX).map_err(|error| WireError::Header(error.to_string()))?;
    if header.version != VERSION {
        return Err(WireError::Version(header.version));
    }
    let row_bytes = (header.hidden_size as usize).checked_mul(4).filter(|&bytes| bytes > 0 && bytes <= ROW_BYTES_MAX);
    let row_bytes = row_bytes.ok_or(WireError::Invalid("a row has no values, or more than a frame can carry"))?;
    let rows = frame.payload.len() / row_bytes;
    if rows == 0 || rows * row_bytes != frame.payload.len() {
        return Err(WireError::Payload { expected: rows.max(1) * row_bytes, actual: frame.payload.len() });
    }
    if header.work.iter().flat_map(|work| &work.rows).any(|&row| usize::from(row) >= rows) {
        return Err(WireError::Invalid("a row index exceeds the rows sent"));
    }
    if pairs(&header.work).checked_mul(row_bytes).is_none_or(|bytes| bytes == 0 || bytes > ROW_BYTES_MAX) {
        return Err(WireError::Invalid("the call has no work, or more than one reply can carry"));
    }
    Ok((header, decode_rows(&frame.payload)))
}

/// A reply as a frame; `rows` is empty unless it is [`ReplyHeader::Done`].
pub fn encode_reply(header: &ReplyHeader, rows: &[f32]) -> Frame {
    Frame { header: encode_header(header), payload: encode_rows(rows) }
}

/// A frame as a reply to a call for `pairs` rows of `hidden_size`, checked. The rows are `[pairs, hidden_size]` for
/// [`ReplyHeader::Done`], else empty. A refusal's reason is cut to what may be kept.
///
/// # Errors
/// [`WireError`]: among others where the rows are more or fewer than were asked for, where the class is long or not printable,
/// and where more experts are not held than were asked for.
pub fn decode_reply(frame: &Frame, pairs: usize, hidden_size: usize) -> Result<(ReplyHeader, Vec<f32>), WireError> {
    let mut header: ReplyHeader =
        cbor::from_slice(&frame.header, HEADER_BYTES_MAX).map_err(|error| WireError::Header(error.to_string()))?;
    let rows_bytes = || pairs.checked_mul(hidden_size).and_then(|values| values.checked_mul(4)).unwrap_or(usize::MAX);
    let expected = if matches!(header, ReplyHeader::Done { .. }) { rows_bytes() } else { 0 };
    if frame.payload.len() != expected {
        return Err(WireError::Payload { expected, actual: frame.payload.len() });
    }
    match &mut header {
        ReplyHeader::Done { class } if !class::check(class) => {
            return Err(WireError::Invalid("the kernel class is too long, not printable, or names no precision"));
        }
        ReplyHeader::NotHeld(experts) if experts.is_empty() || experts.len() > pairs => {
            return Err(WireError::Invalid("the list of experts that are not held is empty or longer than the call"));
        }
        ReplyHeader::Refused(reason) => *reason = class::printable(reason, REASON_BYTES_MAX),
        ReplyHeader::Done { .. } | ReplyHeader::NotHeld(_) => {}
    }
    Ok((header, decode_rows(&frame.payload)))
}

/// The number of (row, expert) pairs of some work.
pub fn pairs(work: &[Work]) -> usize {
    work.iter().map(|work| work.rows.len()).sum()
}

/// Most rows of a prompt that may go through the decoder at once, so that the calls and replies of one layer fit their frames.
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
        assert!(matches!(refused(|h| h.hidden_size = 0, &rows), WireError::Invalid(_)));
        assert!(matches!(refused(|h| h.hidden_size = u32::MAX, &rows), WireError::Invalid(_)));
        assert!(matches!(refused(|h| h.work[0].rows[1] = 3, &rows), WireError::Invalid(_)));
        assert!(matches!(refused(|h| h.work.clear(), &rows), WireError::Invalid(_)));
    }

    #[test]
    fn a_reply_brings_exactly_the_rows_asked_for() {
        let done = ReplyHeader::Done { class: "cpu-avx2/exact".into() };
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

    #[test]
    fn what_may_be_kept_of_a_reply_is_bounded() {
        let class = |class: String| decode_reply(&encode_reply(&ReplyHeader::Done { class }, &[1.0]), 1, 1);
        assert!(class("cpu-avx2/q4+q8".into()).is_ok());
        let long = |bytes| format!("{}/exact", "x".repeat(bytes));
        for bad in
            [String::new(), long(class::CLASS_BYTES_MAX), long(60_000), "cpu\nfake log/exact".into(), "cpu".into()]
        {
            assert!(matches!(class(bad), Err(WireError::Invalid(_))));
        }
        let refused = encode_reply(&ReplyHeader::Refused("\u{1b}[31m".repeat(10_000)), &[]);
        let Ok((ReplyHeader::Refused(reason), _)) = decode_reply(&refused, 1, 1) else { panic!("a refusal") };
        assert!(reason.len() == REASON_BYTES_MAX && reason.starts_with("?[31m"), "{reason}");
        let not_held = |count| {
            let experts = (0..count).map(|index| ExpertId { layer: 5, index }).collect();
            decode_reply(&encode_reply(&ReplyHeader::NotHeld(experts), &[]), 2, 1)
        };
        assert!(not_held(2).is_ok());
        assert!(matches!(not_held(0), Err(WireError::Invalid(_))));
        assert!(matches!(not_held(3), Err(WireError::Invalid(_))));
    }

    /// A change of one part of a frame.
    #[derive(Debug, Clone)]
    enum Mutation {
        /// Flips a bit.
        Flip { at: usize, bit: u8 },
        /// Drops the end.
        Truncate { at: usize },
        /// Inserts bytes.
        Insert { at: usize, bytes: Vec<u8> },
        /// Copies a range over another place, so that fields stand where others belong.
        Splice { from: usize, bytes: usize, at: usize },
        /// Puts a CBOR head of any kind with a count of eight bytes where a value begins or not.
        Count { at: usize, kind: u8, count: u64 },
    }

    impl Mutation {
        fn apply(&self, bytes: &mut Vec<u8>) {
            let length = bytes.len();
            let place = |at: usize| at % length.max(1);
            match self {
                Self::Flip { at, bit } if length > 0 => bytes[place(*at)] ^= 1 << bit,
                Self::Flip { .. } => {}
                Self::Truncate { at } => bytes.truncate(place(*at)),
                Self::Insert { at, bytes: new } => {
                    let at = (*at).min(length);
                    bytes.splice(at..at, new.iter().copied());
                }
                Self::Splice { from, bytes: count, at } => {
                    let range = place(*from)..(place(*from) + count).min(length);
                    let copied = bytes[range].to_vec();
                    let at = place(*at);
                    let end = (at + copied.len()).min(length);
                    bytes.splice(at..end, copied);
                }
                Self::Count { at, kind, count } => {
                    let at = place(*at);
                    let head = std::iter::once((kind << 5) | 27).chain(count.to_be_bytes());
                    bytes.splice(at..(at + 1).min(length), head);
                }
            }
        }
    }

    fn mutation() -> impl Strategy<Value = Mutation> {
        let at = || prop_oneof![0..200usize, any::<usize>()];
        let counts = prop_oneof![0..70_000u64, any::<u64>(), Just(u64::MAX), Just(1 << 63), Just(u64::from(u32::MAX))];
        prop_oneof![
            (at(), 0..8u8).prop_map(|(at, bit)| Mutation::Flip { at, bit }),
            at().prop_map(|at| Mutation::Truncate { at }),
            (at(), proptest::collection::vec(any::<u8>(), 1..12))
                .prop_map(|(at, bytes)| Mutation::Insert { at, bytes }),
            (at(), 1..40usize, at()).prop_map(|(from, bytes, at)| Mutation::Splice { from, bytes, at }),
            (at(), 0..8u8, counts).prop_map(|(at, kind, count)| Mutation::Count { at, kind, count }),
        ]
    }

    /// A valid call: header and rows that agree.
    fn valid_call() -> impl Strategy<Value = (CallHeader, Vec<f32>)> {
        (1..5usize, 1..4u32).prop_flat_map(|(rows, hidden_size)| {
            let indices = proptest::collection::btree_set(0..rows as u16, 1..=rows);
            let work = proptest::collection::btree_map(0..60u16, indices, 1..6);
            let values = proptest::collection::vec(-8.0..8.0f32, rows * hidden_size as usize);
            (work, values).prop_map(move |(work, values)| {
                let each = work.into_iter().map(|(expert, rows)| Work { expert, rows: rows.into_iter().collect() });
                (CallHeader { hidden_size, work: each.collect(), ..call().0 }, values)
            })
        })
    }

    fn valid_reply() -> impl Strategy<Value = ReplyHeader> {
        let experts = (any::<u16>(), any::<u16>()).prop_map(|(layer, index)| ExpertId { layer, index });
        prop_oneof![
            "[ -~]{0,64}/(exact|q4|q4[+]q8)".prop_map(|class| ReplyHeader::Done { class }),
            proptest::collection::vec(experts, 1..3).prop_map(ReplyHeader::NotHeld),
            "[ -~]{0,64}".prop_map(ReplyHeader::Refused),
        ]
    }

    /// The frame with the mutations applied, each to its header or to its payload.
    fn mutated(frame: &Frame, mutations: &[(bool, Mutation)]) -> Frame {
        let (mut header, mut payload) = (frame.header.to_vec(), frame.payload.to_vec());
        for (in_header, mutation) in mutations {
            mutation.apply(if *in_header { &mut header } else { &mut payload });
        }
        Frame::new(header, payload)
    }

    /// Mostly the header is changed: the payload has no structure but its length.
    fn mutations() -> impl Strategy<Value = Vec<(bool, Mutation)>> {
        proptest::collection::vec((proptest::bool::weighted(0.8), mutation()), 1..4)
    }

    /// What a decoded call promises to those that compute it.
    fn check_call(frame: &Frame) -> Result<(), TestCaseError> {
        let Ok((header, rows)) = decode_call(frame) else { return Ok(()) };
        prop_assert_eq!(header.version, VERSION);
        prop_assert_eq!(rows.len() * 4, frame.payload.len());
        let hidden = header.hidden_size as usize;
        prop_assert!(hidden > 0 && rows.len().is_multiple_of(hidden));
        let indices = header.work.iter().flat_map(|work| &work.rows);
        prop_assert!(indices.into_iter().all(|&row| usize::from(row) < rows.len() / hidden));
        prop_assert!((1..=ROW_BYTES_MAX / 4 / hidden).contains(&pairs(&header.work)));
        prop_assert!(pairs(&header.work) <= frame.header.len(), "every index takes a byte of the header");
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1024))]

        #[test]
        fn a_mutated_call_is_refused_or_still_a_valid_call((header, rows) in valid_call(), mutations in mutations()) {
            let frame = encode_call(&header, &rows);
            prop_assert_eq!(decode_call(&frame), Ok((header, rows)));
            check_call(&mutated(&frame, &mutations))?;
        }

        #[test]
        fn a_call_of_mutated_values_is_refused_or_still_a_valid_call(
            (mut header, rows) in valid_call(),
            hidden_size in prop_oneof![0..9u32, any::<u32>()],
            row in any::<u16>(),
            experts in proptest::collection::vec(any::<u16>(), 0..9),
            copies in 0..400usize,
        ) {
            let original = header.clone();
            header.hidden_size = hidden_size;
            check_call(&encode_call(&header, &rows))?;
            header = original.clone();
            header.work[0].rows.push(row);
            check_call(&encode_call(&header, &rows))?;
            header = original;
            header.work.extend(experts.into_iter().map(|expert| Work { expert, rows: vec![0; copies] }));
            check_call(&encode_call(&header, &rows))?;
        }

        #[test]
        fn a_mutated_reply_is_refused_or_still_a_valid_reply(
            header in valid_reply(),
            mutations in mutations(),
            pairs in 2..5usize,
            hidden in 1..4usize,
        ) {
            let values = if matches!(header, ReplyHeader::Done { .. }) { pairs * hidden } else { 0 };
            let frame = encode_reply(&header, &vec![0.5; values]);
            prop_assert_eq!(decode_reply(&frame, pairs, hidden), Ok((header, vec![0.5; values])));
            let frame = mutated(&frame, &mutations);
            let Ok((header, rows)) = decode_reply(&frame, pairs, hidden) else { return Ok(()) };
            prop_assert_eq!(rows.len() * 4, frame.payload.len());
            match header {
                ReplyHeader::Done { class } => prop_assert!(rows.len() == pairs * hidden && class::check(&class)),
                ReplyHeader::NotHeld(experts) => prop_assert!(rows.is_empty() && (1..=pairs).contains(&experts.len())),
                ReplyHeader::Refused(reason) => prop_assert!(rows.is_empty() && reason.len() <= REASON_BYTES_MAX),
            }
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(header in proptest::collection::vec(any::<u8>(), 0..200), payload in proptest::collection::vec(any::<u8>(), 0..64)) {
            let frame = Frame { header: header.into(), payload: payload.into() };
            check_call(&frame)?;
            let _ = decode_reply(&frame, 1, 2);
        }
    }
}
