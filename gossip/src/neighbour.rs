//! Carries gossip messages to and from connected members.
//!
//! Owns: the gossip protocol's streams. Each member is written to on a stream of our own and read from on theirs,
//! so that both directions come up and fail independently.
//! Invariants: the queue to a neighbour is bounded and what does not fit is dropped (anti-entropy repairs it);
//! what is read waits for the driver, which pushes back on whoever sends too much.
//! Deliberately does not know: what messages say.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use libp2p::PeerId;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::frame::{Frame, Protocol};
use crate::link::Shared;
use crate::message::{MESSAGE_BYTES_MAX, Message};
use crate::stream::{self, FrameStream, Incoming};

pub(crate) const GOSSIP: Protocol = Protocol::new("/coel/gossip/1", MESSAGE_BYTES_MAX as u32 + 2);

/// Messages that wait for one neighbour: a greeting, a burst of news, and then it is too slow.
const QUEUE: usize = 32;
/// Pause between attempts to open the stream; a new member takes a moment to learn that we are one too.
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
    Message {
        peer: PeerId,
        message: Message,
    },
}

/// The task that writes to one neighbour; it ends with this value.
pub(crate) struct Writer {
    pub id: u64,
    queue: mpsc::Sender<Message>,
    task: JoinHandle<()>,
}

impl Writer {
    pub fn spawn(id: u64, peer: PeerId, shared: Arc<Shared>, events: mpsc::Sender<Event>) -> Writer {
        let (queue, messages) = mpsc::channel(QUEUE);
        let task = tokio::spawn(write(id, peer, shared, messages, events));
        Writer { id, queue, task }
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

impl Drop for Writer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn write(
    id: u64,
    peer: PeerId,
    shared: Arc<Shared>,
    mut messages: mpsc::Receiver<Message>,
    events: mpsc::Sender<Event>,
) {
    let mut pause = REOPEN_FIRST;
    loop {
        match stream::open(&shared, peer, GOSSIP).await {
            Ok(mut stream) => {
                pause = REOPEN_FIRST;
                if events.send(Event::Linked { peer, writer: id }).await.is_err() {
                    return;
                }
                if carry(&mut stream, &mut messages).await {
                    return stream.close().await;
                }
                if events.send(Event::Unlinked { peer, writer: id }).await.is_err() {
                    return;
                }
            }
            Err(error) => tracing::debug!(%peer, %error, "no gossip stream yet"),
        }
        // What is queued meanwhile is dropped, as what does not fit is: an answer to a member whose own stream is up already,
        // or a farewell, after which the queue closes.
        let dropped = async { while messages.recv().await.is_some() {} };
        if tokio::time::timeout(pause, dropped).await.is_ok() {
            return;
        }
        pause = (pause * 2).min(REOPEN_MAX);
    }
}

/// Returns true when the queue was closed, false when the stream failed.
async fn carry(stream: &mut FrameStream, messages: &mut mpsc::Receiver<Message>) -> bool {
    while let Some(message) = messages.recv().await {
        if let Err(error) = stream.send(&Frame::new(Bytes::new(), message.encode())).await {
            tracing::debug!(peer = %stream.peer(), %error, "the gossip stream failed");
            return false;
        }
    }
    true
}

/// Reads from every stream that members open to us.
pub(crate) async fn listen(mut incoming: Incoming, events: mpsc::Sender<Event>) {
    while let Some((peer, stream)) = incoming.next().await {
        tokio::spawn(read(peer, stream, events.clone()));
    }
}

async fn read(peer: PeerId, mut stream: FrameStream, events: mpsc::Sender<Event>) {
    loop {
        let frame = match stream.recv().await {
            Ok(Some(frame)) => frame,
            Ok(None) => return,
            Err(error) => return tracing::debug!(%peer, %error, "the gossip stream from a member ended"),
        };
        match Message::decode(frame.payload) {
            Ok(message) => {
                if events.send(Event::Message { peer, message }).await.is_err() {
                    return;
                }
            }
            Err(error) => return tracing::warn!(%peer, %error, "closed a gossip stream"),
        }
    }
}
