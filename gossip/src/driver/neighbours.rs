//! The tasks that carry gossip messages to and from connected members.
//!
//! Owns: the gossip protocol's streams. Each member is written to on a stream of ours and read from on streams of its own,
//! so that both directions come up and fail independently. What goes against the stream is small: what the reader knows of the
//! process that opened it, since a peer may be two processes, and a stream of ours reaches one of them.
//! Invariants: the driver keeps one writer per connected member, and the log bounds the members; a member's readers are
//! bounded with its streams; the queue to a neighbour is bounded, and what does not fit is dropped (anti-entropy repairs
//! it); a message that was read waits for the driver, which slows down a member that sends too much.
//! Deliberately does not know: what messages say.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use libp2p::PeerId;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::error::StreamError;
use crate::membership::message::{MESSAGE_BYTES_MAX, Message};
use crate::transport::endpoint::Endpoint;
use crate::transport::frame::{Frame, Protocol};
use crate::transport::stream::{self, FrameStream, Incoming};

pub(crate) const GOSSIP: Protocol = Protocol::new("/coel/gossip/2", MESSAGE_BYTES_MAX as u32 + 2);

/// Messages that wait for one neighbour: a greeting and a burst of news. A neighbour with more in its queue is too slow.
const QUEUE: usize = 32;
/// Messages that wait to go against a member's stream. More are dropped: the member's next digest brings the same.
const REFLECTIONS: usize = 4;
/// Pause between attempts to open the stream; a new member needs a moment to learn that this node is one too.
const REOPEN_FIRST: Duration = Duration::from_millis(200);
const REOPEN_MAX: Duration = Duration::from_secs(2);

/// What the tasks here tell the driver.
#[derive(Debug)]
pub(crate) enum Event {
    /// Messages written to this writer's queue are carried from now on.
    Linked {
        peer: PeerId,
        writer: u64,
    },
    Unlinked {
        peer: PeerId,
        writer: u64,
    },
    /// The peer opened a stream. What is put into the queue goes against it.
    Opened {
        peer: PeerId,
        reflections: mpsc::Sender<Message>,
    },
    Message {
        peer: PeerId,
        message: Message,
    },
}

/// The task that writes to one neighbour; it ends with this value.
pub(crate) struct NeighbourWriter {
    pub id: u64,
    queue: mpsc::Sender<Message>,
    task: JoinHandle<()>,
}

impl NeighbourWriter {
    pub fn spawn(id: u64, peer: PeerId, endpoint: Arc<Endpoint>, events: mpsc::Sender<Event>) -> NeighbourWriter {
        let (queue, messages) = mpsc::channel(QUEUE);
        let task = tokio::spawn(write(id, peer, endpoint, messages, events));
        NeighbourWriter { id, queue, task }
    }

    pub fn send(&self, message: Message) {
        if let Err(error) = self.queue.try_send(message) {
            tracing::debug!(%error, "dropped a gossip message");
        }
    }

    /// Sends what is queued and a last message, closes the stream, and waits for both.
    pub async fn finish(mut self, last: Message) {
        self.send(last);
        let (closed, _) = mpsc::channel(1);
        self.queue = closed;
        // A task that panicked has nothing left to send.
        let _ = (&mut self.task).await;
    }
}

impl Drop for NeighbourWriter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn write(
    id: u64,
    peer: PeerId,
    endpoint: Arc<Endpoint>,
    mut messages: mpsc::Receiver<Message>,
    events: mpsc::Sender<Event>,
) {
    let mut pause = REOPEN_FIRST;
    loop {
        match stream::open(&endpoint, peer, GOSSIP).await {
            Ok(mut stream) => {
                pause = REOPEN_FIRST;
                if events.send(Event::Linked { peer, writer: id }).await.is_err() {
                    return;
                }
                if carry(&mut stream, &mut messages, &events).await {
                    return stream.close().await;
                }
                if events.send(Event::Unlinked { peer, writer: id }).await.is_err() {
                    return;
                }
            }
            Err(error) => tracing::debug!(%peer, %error, "no gossip stream yet"),
        }
        // Messages that are queued meanwhile are dropped, like those that do not fit. The queue closes after a farewell.
        let dropped = async { while messages.recv().await.is_some() {} };
        if tokio::time::timeout(pause, dropped).await.is_ok() {
            return;
        }
        pause = (pause * 2).min(REOPEN_MAX);
    }
}

/// Returns true when the queue was closed, false when the stream failed.
async fn carry(stream: &mut FrameStream, messages: &mut mpsc::Receiver<Message>, events: &mpsc::Sender<Event>) -> bool {
    loop {
        tokio::select! {
            message = messages.recv() => {
                let Some(message) = message else { return true };
                if !send(stream, message).await {
                    return false;
                }
            }
            received = stream.recv() => {
                if !receive(stream.peer(), received, events).await {
                    return false;
                }
            }
        }
    }
}

/// Reads from every stream that members open to us.
pub(crate) async fn listen(mut incoming: Incoming, events: mpsc::Sender<Event>) {
    while let Some((peer, stream)) = incoming.next().await {
        tokio::spawn(read(peer, stream, events.clone()));
    }
}

async fn read(peer: PeerId, mut stream: FrameStream, events: mpsc::Sender<Event>) {
    let (reflections, mut reflected) = mpsc::channel(REFLECTIONS);
    if events.send(Event::Opened { peer, reflections }).await.is_err() {
        return;
    }
    loop {
        let goes_on = tokio::select! {
            Some(message) = reflected.recv() => send(&mut stream, message).await,
            received = stream.recv() => receive(peer, received, &events).await,
        };
        if !goes_on {
            return;
        }
    }
}

/// Whether the stream can be used further.
async fn send(stream: &mut FrameStream, message: Message) -> bool {
    let sent = stream.send(&Frame::new(Bytes::new(), message.encode())).await;
    sent.inspect_err(|error| tracing::debug!(peer = %stream.peer(), %error, "a gossip stream failed")).is_ok()
}

/// Hands what was received to the driver. Whether the stream can be used further.
async fn receive(peer: PeerId, received: Result<Option<Frame>, StreamError>, events: &mpsc::Sender<Event>) -> bool {
    let frame = match received {
        Ok(Some(frame)) => frame,
        Ok(None) => return false,
        Err(error) => {
            tracing::debug!(%peer, %error, "a gossip stream ended");
            return false;
        }
    };
    match Message::decode(frame.payload) {
        Ok(message) => {
            // A driver that is ending hears nothing more, but what is queued for this stream is still sent.
            let _ = events.send(Event::Message { peer, message }).await;
            true
        }
        Err(error) => {
            tracing::warn!(%peer, %error, "closed a gossip stream");
            false
        }
    }
}
