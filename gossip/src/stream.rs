//! Streams of frames between two nodes: how they are opened, accepted and used.
//!
//! Owns: [`FrameStream`], the handshake of a stream, and [`Incoming`].
//! Invariants: a stream counts as open only after the far side has accepted it with one byte; nobody but members
//! gets that byte on a protocol for members; an operation on a stream ends when its peer's link is cut.
//! Deliberately does not know: what frames mean, and which streams are reused (`pool` does).
//!
//! The byte has two reasons. The queue between the swarm and whoever serves a protocol holds one stream, and what
//! does not fit is dropped in silence: without an answer the opener could not tell that from a slow server, and a
//! few quick tries make up for it. And a stranger gets nothing at all, not even a reason.

use std::sync::Arc;
use std::time::Duration;

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::{PeerId, Stream, StreamProtocol};
use libp2p_stream::OpenStreamError;
use rand::Rng;
use tokio::sync::mpsc;

use crate::error::{OpenError, ServeError, StreamError};
use crate::frame::{Frame, FrameError, Framed, Protocol};
use crate::link::{Link, Shared};
use crate::liveness::Liveness;

const ACCEPTED: u8 = 0x06;
/// Longest wait for a connection and for the far side to accept.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Tries before a stream that is closed without being accepted counts as refused.
const OPEN_TRIES: u32 = 6;
/// Longest wait for the accepting byte to leave.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often, and how far apart, to look for the link of a stream that came before its connection was known.
const LINK_LOOKS: u32 = 50;
const LINK_PAUSE: Duration = Duration::from_millis(10);
/// Accepted streams that nobody took yet; more are dropped, and their openers try again.
const BACKLOG: usize = 64;

/// Who may open streams of a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Members only: to others the stream closes without a byte.
    Members,
    /// Whoever connects; the server bounds what it does for strangers.
    Anyone,
}

/// A stream of frames with one peer. One frame at a time each way; dropping it resets it.
pub struct FrameStream {
    framed: Framed<Stream>,
    link: Arc<Link>,
    peer: PeerId,
    protocol: Protocol,
}

impl FrameStream {
    fn new(stream: Stream, link: Arc<Link>, peer: PeerId, protocol: Protocol) -> FrameStream {
        FrameStream { framed: Framed::new(stream, protocol.frame_bytes_max), link, peer, protocol }
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
pub(crate) async fn open(shared: &Shared, peer: PeerId, protocol: Protocol) -> Result<FrameStream, OpenError> {
    let opened = tokio::time::timeout(OPEN_TIMEOUT, open_patiently(shared, peer, protocol)).await;
    opened.unwrap_or(Err(OpenError::TimedOut { peer, protocol: protocol.name, after: OPEN_TIMEOUT }))
}

async fn open_patiently(shared: &Shared, peer: PeerId, protocol: Protocol) -> Result<FrameStream, OpenError> {
    let link = connected_link(shared, peer).await?;
    let opening = async {
        for attempt in 1..=OPEN_TRIES {
            if let Some(stream) = open_once(shared, &link, peer, protocol).await? {
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

/// Nothing if the far side closed the stream without accepting it.
async fn open_once(
    shared: &Shared,
    link: &Arc<Link>,
    peer: PeerId,
    protocol: Protocol,
) -> Result<Option<FrameStream>, OpenError> {
    let name = protocol.name;
    let opened = shared.control.clone().open_stream(peer, StreamProtocol::new(name)).await;
    let mut stream = opened.map_err(|error| match error {
        OpenStreamError::UnsupportedProtocol(_) => OpenError::Unsupported { peer, protocol: name },
        OpenStreamError::Io(cause) => OpenError::Io { peer, protocol: name, cause },
        other => OpenError::Io { peer, protocol: name, cause: std::io::Error::other(other) },
    })?;
    let mut answer = [0];
    match stream.read(&mut answer).await {
        Ok(1) if answer[0] == ACCEPTED => Ok(Some(FrameStream::new(stream, link.clone(), peer, protocol))),
        Ok(_) | Err(_) => Ok(None),
    }
}

/// Waits until `peer` has a connection, unless there is no hope of one.
async fn connected_link(shared: &Shared, peer: PeerId) -> Result<Arc<Link>, OpenError> {
    let mut peers = shared.peers.subscribe();
    loop {
        if let Some(link) = shared.link(&peer) {
            return Ok(link);
        }
        if !shared.is_member(&peer) {
            return Err(OpenError::UnknownPeer { peer });
        }
        let is_down = peers.borrow_and_update().get(&peer).is_some_and(|view| view.liveness == Liveness::Down);
        if is_down || shared.stopped.is_cancelled() {
            return Err(OpenError::Unreachable { peer });
        }
        tokio::select! {
            () = shared.stopped.cancelled() => {}
            _ = peers.changed() => {}
        }
    }
}

/// Streams that others open for one protocol. Dropping it stops serving the protocol.
#[derive(Debug)]
pub struct Incoming {
    streams: mpsc::Receiver<(PeerId, FrameStream)>,
}

impl Incoming {
    /// The next accepted stream and who opened it; nothing once the node has shut down.
    pub async fn next(&mut self) -> Option<(PeerId, FrameStream)> {
        self.streams.recv().await
    }
}

impl std::fmt::Debug for FrameStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameStream").field("peer", &self.peer).field("protocol", &self.protocol).finish()
    }
}

pub(crate) fn serve(shared: &Arc<Shared>, protocol: Protocol, access: Access) -> Result<Incoming, ServeError> {
    let registered = shared.control.clone().accept(StreamProtocol::new(protocol.name));
    let opened = registered.map_err(|_| ServeError { protocol: protocol.name })?;
    let (accepted, streams) = mpsc::channel(BACKLOG);
    shared.runtime.spawn(accept(shared.clone(), opened, protocol, access, accepted));
    Ok(Incoming { streams })
}

/// Takes streams off the swarm's queue of one as fast as they come; all that waits happens elsewhere.
async fn accept(
    shared: Arc<Shared>,
    mut opened: libp2p_stream::IncomingStreams,
    protocol: Protocol,
    access: Access,
    accepted: mpsc::Sender<(PeerId, FrameStream)>,
) {
    loop {
        let next = tokio::select! {
            () = accepted.closed() => break,
            () = shared.stopped.cancelled() => break,
            next = opened.next() => next,
        };
        let Some((peer, mut stream)) = next else { break };
        if access == Access::Members && !shared.is_member(&peer) {
            tracing::debug!(%peer, protocol = protocol.name, "closed a stream of a stranger");
            // Nobody may be listening for it.
            let _ = shared.knocks.send(peer);
            continue;
        }
        let Ok(place) = accepted.clone().try_reserve_owned() else {
            tracing::warn!(%peer, protocol = protocol.name, "too many streams wait to be served; closed one more");
            continue;
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            let Some(link) = settled_link(&shared, &peer).await else {
                return;
            };
            let greeting = async {
                stream.write_all(&[ACCEPTED]).await?;
                stream.flush().await
            };
            if let Ok(Ok(())) = tokio::time::timeout(ACCEPT_TIMEOUT, greeting).await {
                place.send((peer, FrameStream::new(stream, link, peer, protocol)));
            }
        });
    }
}

/// The link of a peer that has just opened a stream. Its connection runs in a task of its own, so the stream can be
/// here a moment before the driver has heard of the connection.
async fn settled_link(shared: &Shared, peer: &PeerId) -> Option<Arc<Link>> {
    for _ in 0..LINK_LOOKS {
        if let Some(link) = shared.link(peer) {
            return Some(link);
        }
        tokio::time::sleep(LINK_PAUSE).await;
    }
    None
}
