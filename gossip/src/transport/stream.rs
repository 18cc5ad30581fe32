//! Streams of frames between two nodes: how they are opened, accepted and used.
//!
//! Owns: [`FrameStream`], the handshake of a stream, and [`Incoming`].
//! Invariants: a stream counts as open only after the far side has accepted it with one byte; only members get that byte
//! on a protocol for members, and each of them holds a bounded number of streams; an operation on a stream ends when its
//! peer's link is cut.
//! Deliberately does not know: what frames mean, and which streams are reused (`pool` does).
//!
//! The byte has two reasons. The queue between the swarm and a protocol's server holds one stream, and drops the next in
//! silence: without an answer the opener could not tell a dropped stream from a slow server; with one, a few quick tries
//! make up for the drop. And a stranger gets nothing at all, not even a reason.

use std::sync::Arc;
use std::time::Duration;

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::{PeerId, Stream, StreamProtocol};
use libp2p_stream::OpenStreamError;
use rand::Rng;
use tokio::sync::mpsc;

use super::endpoint::Endpoint;
use super::frame::{Frame, FrameError, Framed, Protocol};
use super::link::{Link, Place};
use crate::error::{OpenError, ServeError, StreamError};
use crate::membership::liveness::Liveness;

const ACCEPTED: u8 = 0x06;
/// Longest wait for a connection and for the far side to accept.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Tries before a stream that is closed without being accepted counts as refused.
const OPEN_TRIES: u32 = 6;
/// Longest wait for the accepting byte to leave.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the link of a stream that came before the driver heard of its connection.
const LINK_TIMEOUT: Duration = Duration::from_millis(500);
/// Accepted streams that wait for their server; more are dropped, and their openers try again.
const BACKLOG: usize = 64;

/// Who may open streams of a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Members only: to others the stream closes without a byte.
    Members,
    /// Any peer that connects; the server bounds what it does for strangers.
    Anyone,
}

/// A stream of frames with one peer. One frame at a time each way; dropping it resets it.
pub struct FrameStream {
    framed: Framed<Stream>,
    link: Arc<Link>,
    peer: PeerId,
    protocol: Protocol,
    /// Of a stream that the peer opened.
    _place: Option<Place>,
}

impl FrameStream {
    fn new(stream: Stream, link: Arc<Link>, peer: PeerId, protocol: Protocol, place: Option<Place>) -> FrameStream {
        let framed = Framed::new(stream, protocol.frame_bytes_max);
        FrameStream { framed, link, peer, protocol, _place: place }
    }

    pub fn peer(&self) -> PeerId {
        self.peer
    }

    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Sends one frame and flushes it.
    ///
    /// Not to be abandoned half way: if the future is dropped, later sends fail with [`StreamError::Torn`].
    ///
    /// # Errors
    /// [`StreamError`]; a frame over the limit is refused before a byte is sent, and the stream stays usable.
    pub async fn send(&mut self, frame: &Frame) -> Result<(), StreamError> {
        let sent = tokio::select! {
            biased;
            () = self.link.cut.cancelled() => return Err(self.lost()),
            sent = self.framed.send(frame) => sent,
        };
        sent.map_err(|error| self.error(error))
    }

    /// The next frame, or nothing if the peer closed the stream between two frames. The future may be dropped
    /// and called again without losing anything.
    ///
    /// # Errors
    /// [`StreamError`]; the stream is of no use afterwards.
    pub async fn recv(&mut self) -> Result<Option<Frame>, StreamError> {
        let received = tokio::select! {
            biased;
            () = self.link.cut.cancelled() => return Err(self.lost()),
            received = self.framed.recv() => received,
        };
        let received = received.map_err(|error| self.error(error))?;
        Ok(received.map(|received| {
            self.link.received(received.frame.payload.len(), received.took);
            received.frame
        }))
    }

    /// Sends `frame` and waits for its reply.
    pub(crate) async fn exchange(&mut self, frame: &Frame) -> Result<Frame, StreamError> {
        self.send(frame).await?;
        let closed = StreamError::Closed { peer: self.peer, protocol: self.protocol.name };
        self.recv().await?.ok_or(closed)
    }

    /// Closes the stream once what was sent has left; the peer sees its end. Failing to say goodbye is no error.
    pub async fn close(mut self) {
        tokio::select! {
            () = self.link.cut.cancelled() => {}
            _ = self.framed.io().close() => {}
        }
    }

    /// Whether its peer is still there, as far as is known.
    pub(crate) fn is_live(&self) -> bool {
        !self.link.cut.is_cancelled()
    }

    /// Whether a frame has begun to arrive.
    pub(crate) fn is_receiving(&self) -> bool {
        self.framed.is_receiving()
    }

    fn lost(&self) -> StreamError {
        StreamError::PeerLost { peer: self.peer, protocol: self.protocol.name }
    }

    fn error(&self, error: FrameError) -> StreamError {
        let (peer, protocol) = (self.peer, self.protocol.name);
        match error {
            FrameError::TooLarge { bytes, max } => StreamError::FrameTooLarge { peer, protocol, bytes, max },
            FrameError::HeaderTooLarge { bytes } => StreamError::HeaderTooLarge { bytes },
            FrameError::Malformed { .. } => StreamError::Malformed { peer, protocol },
            FrameError::Truncated => StreamError::Closed { peer, protocol },
            FrameError::Torn => StreamError::Torn { peer, protocol },
            FrameError::Io(cause) => StreamError::Io { peer, protocol, cause },
        }
    }
}

/// Opens a stream to a connected peer, or to a member that is about to be.
pub(crate) async fn open(endpoint: &Endpoint, peer: PeerId, protocol: Protocol) -> Result<FrameStream, OpenError> {
    let opened = tokio::time::timeout(OPEN_TIMEOUT, open_patiently(endpoint, peer, protocol)).await;
    opened.unwrap_or(Err(OpenError::TimedOut { peer, protocol: protocol.name, after: OPEN_TIMEOUT }))
}

async fn open_patiently(endpoint: &Endpoint, peer: PeerId, protocol: Protocol) -> Result<FrameStream, OpenError> {
    let link = connected_link(endpoint, peer).await?;
    let opening = async {
        for attempt in 1..=OPEN_TRIES {
            if let Some(stream) = open_once(endpoint, &link, peer, protocol).await? {
                return Ok(stream);
            }
            let pause_ms = rand::rng().random_range(5..30) * u64::from(attempt);
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        }
        Err(OpenError::Refused { peer, protocol: protocol.name })
    };
    tokio::select! {
        biased;
        () = link.cut.cancelled() => Err(OpenError::Unreachable { peer }),
        opened = opening => opened,
    }
}

/// `None` if the far side closed the stream without accepting it.
async fn open_once(
    endpoint: &Endpoint,
    link: &Arc<Link>,
    peer: PeerId,
    protocol: Protocol,
) -> Result<Option<FrameStream>, OpenError> {
    let name = protocol.name;
    let opened = endpoint.control.clone().open_stream(peer, StreamProtocol::new(name)).await;
    let mut stream = opened.map_err(|error| match error {
        OpenStreamError::UnsupportedProtocol(_) => OpenError::Unsupported { peer, protocol: name },
        OpenStreamError::Io(cause) => OpenError::Io { peer, protocol: name, cause },
        other => OpenError::Io { peer, protocol: name, cause: std::io::Error::other(other) },
    })?;
    let mut answer = [0];
    match stream.read(&mut answer).await {
        Ok(1) if answer[0] == ACCEPTED => Ok(Some(FrameStream::new(stream, link.clone(), peer, protocol, None))),
        Ok(_) | Err(_) => Ok(None),
    }
}

/// Waits until `peer` has a connection, unless there is no hope of one.
async fn connected_link(endpoint: &Endpoint, peer: PeerId) -> Result<Arc<Link>, OpenError> {
    let mut peers = endpoint.peers.subscribe();
    loop {
        // Before the links: a change after this look wakes the wait below.
        let is_down = peers.borrow_and_update().get(&peer).is_some_and(|view| view.liveness == Liveness::Down);
        if let Some(link) = endpoint.link(&peer) {
            return Ok(link);
        }
        if !endpoint.is_member(&peer) {
            return Err(OpenError::UnknownPeer { peer });
        }
        if is_down || endpoint.stopped.is_cancelled() {
            return Err(OpenError::Unreachable { peer });
        }
        tokio::select! {
            () = endpoint.stopped.cancelled() => {}
            _ = peers.changed() => {}
        }
    }
}

/// Streams that others open for one protocol. A peer holds a bounded number of them at once, so a server may give each a
/// task of its own. Dropping the value stops serving the protocol.
#[derive(Debug)]
pub struct Incoming {
    streams: mpsc::Receiver<(PeerId, FrameStream)>,
}

impl Incoming {
    /// The next accepted stream and the peer that opened it; `None` once the node has shut down.
    pub async fn next(&mut self) -> Option<(PeerId, FrameStream)> {
        self.streams.recv().await
    }
}

impl std::fmt::Debug for FrameStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameStream").field("peer", &self.peer).field("protocol", &self.protocol).finish()
    }
}

pub(crate) fn serve(endpoint: &Arc<Endpoint>, protocol: Protocol, access: Access) -> Result<Incoming, ServeError> {
    let registered = endpoint.control.clone().accept(StreamProtocol::new(protocol.name));
    let opened = registered.map_err(|_| ServeError { protocol: protocol.name })?;
    let (accepted, streams) = mpsc::channel(BACKLOG);
    endpoint.runtime.spawn(accept(endpoint.clone(), opened, protocol, access, accepted));
    Ok(Incoming { streams })
}

/// Takes streams off the swarm's queue of one as fast as they come; everything that waits happens in other tasks.
async fn accept(
    endpoint: Arc<Endpoint>,
    mut opened: libp2p_stream::IncomingStreams,
    protocol: Protocol,
    access: Access,
    accepted: mpsc::Sender<(PeerId, FrameStream)>,
) {
    loop {
        let next = tokio::select! {
            () = accepted.closed() => break,
            () = endpoint.stopped.cancelled() => break,
            next = opened.next() => next,
        };
        let Some((peer, mut stream)) = next else { break };
        if access == Access::Members && !endpoint.is_member(&peer) {
            tracing::debug!(%peer, protocol = protocol.name, "closed a stream of a stranger");
            // An error means that there is no receiver.
            let _ = endpoint.unauthorized.send(peer);
            continue;
        }
        let Ok(backlog) = accepted.clone().try_reserve_owned() else {
            tracing::warn!(%peer, protocol = protocol.name, "too many streams wait to be served; closed one more");
            continue;
        };
        let endpoint = endpoint.clone();
        // At most as many of these tasks run as the backlog has room.
        tokio::spawn(async move {
            // The connection runs in a task of its own, so its stream can be here a moment before the driver has heard of it.
            let Ok(Some(link)) = tokio::time::timeout(LINK_TIMEOUT, endpoint.linked(&peer)).await else {
                return;
            };
            let Some(place) = link.admit(protocol.name) else {
                tracing::warn!(%peer, protocol = protocol.name, "a peer has too many streams open; closed one more");
                return;
            };
            let greeting = async {
                stream.write_all(&[ACCEPTED]).await?;
                stream.flush().await
            };
            if let Ok(Ok(())) = tokio::time::timeout(ACCEPT_TIMEOUT, greeting).await {
                backlog.send((peer, FrameStream::new(stream, link, peer, protocol, Some(place))));
            }
        });
    }
}
