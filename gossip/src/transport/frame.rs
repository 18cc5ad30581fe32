//! Frames: a small header and a raw payload, length first.
//!
//! Owns: [`Frame`], [`Protocol`] and the codec over any byte stream.
//! Invariants: a length is checked against the protocol's limit before memory is set aside for it; memory grows
//! with the bytes that arrive, not with the bytes that were promised; [`Framed::recv`] may be dropped at any
//! await point without losing a byte.
//! Deliberately does not know: what headers and payloads mean, or which peer the stream belongs to.
//!
//! ```text
//! frame := length u32 LE (of all that follows), header length u16 LE, header, payload
//! ```

use std::io;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// A frame up to this size is read into one allocation of its promised length; a larger one must deliver this much first.
const TRUSTED_BYTES: usize = 1024 * 1024;
/// A payload up to this size is copied behind its header, so that the frame leaves in one write.
const JOINED_BYTES: usize = 16 * 1024;
const HEADER_LENGTH_BYTES: usize = 2;

/// A named stream protocol and the largest frame it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Protocol {
    /// Name on the wire, with a leading slash and a version: `/coel/expert/1`.
    pub name: &'static str,
    /// Largest frame, header and payload and the two bytes between length and header.
    pub frame_bytes_max: u32,
}

impl Protocol {
    pub const fn new(name: &'static str, frame_bytes_max: u32) -> Protocol {
        assert!(!name.is_empty() && name.as_bytes()[0] == b'/', "a protocol name begins with a slash");
        Protocol { name, frame_bytes_max }
    }
}

/// One message of a stream. Cloning is cheap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// At most 65535 bytes.
    pub header: Bytes,
    pub payload: Bytes,
}

impl Frame {
    pub fn new(header: impl Into<Bytes>, payload: impl Into<Bytes>) -> Frame {
        Frame { header: header.into(), payload: payload.into() }
    }

    fn wire_bytes(&self) -> usize {
        HEADER_LENGTH_BYTES + self.header.len() + self.payload.len()
    }
}

/// Why a frame was not sent or received.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("a frame of {bytes} bytes exceeds the limit of {max}")]
    TooLarge { bytes: u64, max: u32 },
    #[error("a header of {bytes} bytes exceeds the limit of 65535")]
    HeaderTooLarge { bytes: usize },
    #[error("a header of {header} bytes does not fit a frame of {frame}")]
    Malformed { header: usize, frame: usize },
    #[error("the stream ended within a frame")]
    Truncated,
    #[error("an earlier send was abandoned half way")]
    Torn,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A received frame and how long its body took from the first byte to the last.
#[derive(Debug)]
pub(crate) struct Received {
    pub frame: Frame,
    pub took: Duration,
}

/// The codec. It keeps what was read of an unfinished frame, so that the future which reads it may be dropped.
#[derive(Debug)]
pub(crate) struct Framed<S> {
    io: S,
    max: u32,
    length: [u8; 4],
    length_read: usize,
    body: Option<Body>,
    sending: bool,
}

#[derive(Debug)]
struct Body {
    /// Promised length.
    length: usize,
    /// Bytes read; the buffer is longer.
    read: usize,
    buffer: BytesMut,
    since: Instant,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Framed<S> {
    pub fn new(io: S, max: u32) -> Framed<S> {
        Framed { io, max, length: [0; 4], length_read: 0, body: None, sending: false }
    }

    pub fn io(&mut self) -> &mut S {
        &mut self.io
    }

    /// Whether a frame has begun to arrive.
    pub fn is_receiving(&self) -> bool {
        self.length_read > 0 || self.body.is_some()
    }

    /// Sends and flushes. If dropped half way, the stream is torn and every later send says so.
    pub async fn send(&mut self, frame: &Frame) -> Result<(), FrameError> {
        if self.sending {
            return Err(FrameError::Torn);
        }
        let bytes = frame.wire_bytes();
        let length = u32::try_from(bytes).ok().filter(|length| *length <= self.max);
        let Some(length) = length else {
            return Err(FrameError::TooLarge { bytes: bytes as u64, max: self.max });
        };
        let Ok(header_length) = u16::try_from(frame.header.len()) else {
            return Err(FrameError::HeaderTooLarge { bytes: frame.header.len() });
        };
        let joined = frame.payload.len() <= JOINED_BYTES;
        let room = if joined { 4 + bytes } else { 4 + HEADER_LENGTH_BYTES + frame.header.len() };
        let mut head = BytesMut::with_capacity(room);
        head.put_u32_le(length);
        head.put_u16_le(header_length);
        head.put_slice(&frame.header);
        if joined {
            head.put_slice(&frame.payload);
        }
        self.sending = true;
        self.io.write_all(&head).await?;
        if !joined {
            self.io.write_all(&frame.payload).await?;
        }
        self.io.flush().await?;
        self.sending = false;
        Ok(())
    }

    /// The next frame, or nothing if the peer closed its side between two frames.
    pub async fn recv(&mut self) -> Result<Option<Received>, FrameError> {
        if self.body.is_none() && !self.begin().await? {
            return Ok(None);
        }
        let body = self.body.as_mut().expect("begun above");
        while body.read < body.length {
            if body.read == body.buffer.len() {
                let grown = body.length.min(TRUSTED_BYTES.max(2 * body.read));
                body.buffer.resize(grown, 0);
            }
            match self.io.read(&mut body.buffer[body.read..]).await? {
                0 => return Err(FrameError::Truncated),
                read => body.read += read,
            }
        }
        let Body { length, buffer, since, .. } = self.body.take().expect("begun above");
        self.length_read = 0;
        let mut rest = buffer.freeze();
        let header = usize::from(rest.get_u16_le());
        if header > rest.len() {
            return Err(FrameError::Malformed { header, frame: length });
        }
        let header = rest.split_to(header);
        Ok(Some(Received { frame: Frame { header, payload: rest }, took: since.elapsed() }))
    }

    /// Reads and judges the length. Returns false at the end of the stream.
    async fn begin(&mut self) -> Result<bool, FrameError> {
        while self.length_read < self.length.len() {
            match self.io.read(&mut self.length[self.length_read..]).await? {
                0 if self.length_read == 0 => return Ok(false),
                0 => return Err(FrameError::Truncated),
                read => self.length_read += read,
            }
        }
        let length = u32::from_le_bytes(self.length);
        if length > self.max {
            return Err(FrameError::TooLarge { bytes: length.into(), max: self.max });
        }
        let length = length as usize;
        if length < HEADER_LENGTH_BYTES {
            return Err(FrameError::Malformed { header: 0, frame: length });
        }
        self.body = Some(Body { length, read: 0, buffer: BytesMut::new(), since: Instant::now() });
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use futures::io::Cursor;
    use proptest::prelude::*;

    use super::*;

    fn written(frames: &[Frame]) -> Vec<u8> {
        let mut framed = Framed::new(Cursor::new(Vec::new()), u32::MAX);
        for frame in frames {
            framed.send(frame).now_or_never().expect("memory does not wait").expect("fits");
        }
        framed.io.into_inner()
    }

    fn read(bytes: Vec<u8>, max: u32) -> Result<Option<Frame>, FrameError> {
        let mut framed = Framed::new(Cursor::new(bytes), max);
        let received = framed.recv().now_or_never().expect("memory does not wait")?;
        Ok(received.map(|received| received.frame))
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let bytes = |most| proptest::collection::vec(any::<u8>(), 0..most);
        (bytes(300), bytes(40_000)).prop_map(|(header, payload)| Frame::new(header, payload))
    }

    proptest! {
        #[test]
        fn frames_survive_the_round_trip(frames in proptest::collection::vec(frame(), 0..4)) {
            let mut framed = Framed::new(Cursor::new(written(&frames)), u32::MAX);
            for frame in frames {
                let received = framed.recv().now_or_never().expect("memory does not wait");
                prop_assert_eq!(received.expect("well formed").map(|received| received.frame), Some(frame));
            }
            let end = framed.recv().now_or_never().expect("memory does not wait");
            prop_assert!(end.expect("a clean end").is_none());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100), max in any::<u32>()) {
            let _ = read(bytes, max);
        }

        #[test]
        fn a_frame_cut_short_is_an_error_that_says_so(frame in frame(), cut in any::<prop::sample::Index>()) {
            let bytes = written(&[frame]);
            let cut = 1 + cut.index(bytes.len() - 1);
            prop_assert!(matches!(read(bytes[..cut].to_vec(), u32::MAX), Err(FrameError::Truncated)));
        }
    }

    #[test]
    fn the_wire_is_as_documented() {
        let bytes = written(&[Frame::new("ab", "xyz")]);
        assert_eq!(bytes, [7, 0, 0, 0, 2, 0, b'a', b'b', b'x', b'y', b'z']);
    }

    #[test]
    fn a_promise_beyond_the_limit_is_refused_before_memory_is_set_aside() {
        let mut framed = Framed::new(Cursor::new(u32::MAX.to_le_bytes().to_vec()), 1000);
        let refused = framed.recv().now_or_never().expect("memory does not wait");
        assert!(matches!(refused, Err(FrameError::TooLarge { bytes: 0xffff_ffff, max: 1000 })));
        assert!(framed.body.is_none());
    }

    #[test]
    fn a_promise_within_the_limit_costs_little_until_it_is_kept() {
        let mut bytes = u32::MAX.to_le_bytes().to_vec();
        bytes.extend([0; 10]);
        let mut framed = Framed::new(Cursor::new(bytes), u32::MAX);
        let cut = framed.recv().now_or_never().expect("memory does not wait");
        assert!(matches!(cut, Err(FrameError::Truncated)));
        assert_eq!(framed.body.expect("begun").buffer.len(), TRUSTED_BYTES);
    }

    #[test]
    fn a_header_that_does_not_fit_its_frame_is_refused() {
        assert!(matches!(read(vec![3, 0, 0, 0, 2, 0, 1], 100), Err(FrameError::Malformed { header: 2, frame: 3 })));
        assert!(matches!(read(vec![1, 0, 0, 0, 9], 100), Err(FrameError::Malformed { header: 0, frame: 1 })));
    }

    #[test]
    fn too_large_a_frame_is_not_sent_and_leaves_the_stream_intact() {
        let mut framed = Framed::new(Cursor::new(Vec::new()), 100);
        let large = Frame::new("", vec![0; 99]);
        let refused = framed.send(&large).now_or_never().expect("memory does not wait");
        assert!(matches!(refused, Err(FrameError::TooLarge { bytes: 101, max: 100 })));
        let fits = framed.send(&Frame::new("", vec![0; 98])).now_or_never().expect("memory does not wait");
        assert!(fits.is_ok());
        let long = Frame::new(vec![0; 65_536], "");
        let mut framed = Framed::new(Cursor::new(Vec::new()), u32::MAX);
        let refused = framed.send(&long).now_or_never().expect("memory does not wait");
        assert!(matches!(refused, Err(FrameError::HeaderTooLarge { bytes: 65_536 })));
    }

    #[tokio::test]
    async fn a_dropped_receive_loses_nothing() {
        use tokio_util::compat::TokioAsyncReadCompatExt;
        let (near, far) = tokio::io::duplex(64);
        let (mut near, mut far) = (Framed::new(near.compat(), 1000), far.compat());
        let bytes = written(&[Frame::new("head", vec![7; 50])]);
        for part in bytes.chunks(3) {
            assert!(near.recv().now_or_never().is_none());
            far.write_all(part).await.expect("the pipe has room");
        }
        let received = near.recv().await.expect("well formed").expect("a frame");
        assert_eq!(received.frame, Frame::new("head", vec![7; 50]));
    }

    #[tokio::test]
    async fn a_send_abandoned_half_way_tears_the_stream() {
        use tokio_util::compat::TokioAsyncReadCompatExt;
        let (near, _far) = tokio::io::duplex(8);
        let mut near = Framed::new(near.compat(), 1000);
        assert!(near.send(&Frame::new("", vec![0; 100])).now_or_never().is_none());
        assert!(matches!(near.send(&Frame::default()).await, Err(FrameError::Torn)));
    }
}
