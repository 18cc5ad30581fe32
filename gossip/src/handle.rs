//! How the rest of the node talks to gossip.
//!
//! Owns: [`Handle`] and [`start`]. Invariant: members, status and facts are desired values of which only the latest counts,
//! so setting them never waits; commands wait in a bounded queue.
//! The node stops when [`Handle::shutdown`] is called or the last handle is dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use libp2p::{Multiaddr, PeerId};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::config::Config;
use crate::driver::neighbours::{self, GOSSIP};
use crate::driver::{Command, DesiredState, Driver};
use crate::error::{DialError, Duplicate, FactsTooLarge, OpenError, RequestError, ServeError, StartError};
use crate::membership::message::FACTS_BYTES_MAX;
use crate::membership::status::Status;
use crate::membership::view::Peers;
use crate::transport::endpoint::{Endpoint, Standing};
use crate::transport::frame::{Frame, Protocol};
use crate::transport::pool::StreamPool;
use crate::transport::stream::{self, Access, FrameStream, Incoming};
use crate::transport::swarm;

/// Commands that wait for the driver.
const COMMANDS: usize = 64;
/// Gossip messages that wait for the driver.
const EVENTS: usize = 256;
/// Unauthorized attempts that wait to be looked at. More are dropped: a peer that is a member tries again.
const UNAUTHORIZED: usize = 16;

/// One running node. Cloning is cheap; all clones are the same node.
#[derive(Clone)]
pub struct Handle {
    endpoint: Arc<Endpoint>,
    pool: Arc<StreamPool>,
    desired: Arc<watch::Sender<DesiredState>>,
    commands: mpsc::Sender<Command>,
}

/// Listens on every address of `config` and starts the node on the current tokio runtime. It has no members yet.
///
/// # Errors
/// [`StartError`], naming the address that cannot be listened on and why.
pub async fn start(config: Config) -> Result<Handle, StartError> {
    let mut swarm = swarm::build(&config)?;
    let listening = swarm::listen(&mut swarm, &config).await?;
    let (me, control) = (*swarm.local_peer_id(), swarm.behaviour().streams.new_control());
    let endpoint = Arc::new(Endpoint::new(me, control, listening.addresses, UNAUTHORIZED));
    let pool = Arc::new(StreamPool::default());
    let incoming = stream::serve(&endpoint, GOSSIP, Access::Members).expect("a fresh swarm serves nothing yet");
    let (events, from_neighbours) = mpsc::channel(EVENTS);
    tokio::spawn(neighbours::listen(incoming, events.clone()));
    let (desired, to_apply) = watch::channel(DesiredState::default());
    let (commands, commanded) = mpsc::channel(COMMANDS);
    let driver = Driver::new(config, swarm, endpoint.clone(), pool.clone(), events);
    tokio::spawn(driver.run(listening.early, commanded, to_apply, from_neighbours));
    Ok(Handle { endpoint, pool, desired: Arc::new(desired), commands })
}

impl Handle {
    pub fn local_peer_id(&self) -> PeerId {
        self.endpoint.me
    }

    /// Concrete addresses this node listens on (port 0 resolved, interfaces enumerated), without `/p2p`.
    /// Never empty; more may appear as interfaces come up.
    pub fn listen_addresses(&self) -> Vec<Multiaddr> {
        self.endpoint.listening.borrow().clone()
    }

    /// The [`Self::listen_addresses`], and when they change.
    pub fn listen_address_changes(&self) -> watch::Receiver<Vec<Multiaddr>> {
        self.endpoint.listening.subscribe()
    }

    /// Replaces the members: the admitted nodes, and where each was last seen. A connection to each is kept from now
    /// on. This node's own id may be among them. A former member is refused at once on protocols for members, and
    /// disconnected a few seconds later, so that a farewell can still be answered.
    pub fn set_members(&self, members: BTreeMap<PeerId, Vec<Multiaddr>>) {
        let admitted: BTreeSet<PeerId> = members.keys().copied().filter(|peer| *peer != self.endpoint.me).collect();
        // Here and not in the driver, so that a stream opened right after this call meets the new members.
        self.endpoint.members.send_replace(Arc::new(admitted));
        self.desired.send_modify(|desired| desired.members = Arc::new(members));
    }

    /// Sets this node's load; it is published when the policy finds it worth a message.
    pub fn set_status(&self, status: Status) {
        self.desired.send_modify(|desired| desired.status = Some(status));
    }

    /// Sets what else this node says about itself, at most [`FACTS_BYTES_MAX`] bytes; published when it differs
    /// from what was said before.
    pub fn set_facts(&self, facts: Bytes) -> Result<(), FactsTooLarge> {
        if facts.len() > FACTS_BYTES_MAX {
            return Err(FactsTooLarge { bytes: facts.len() });
        }
        self.desired.send_modify(|desired| desired.facts = Some(facts));
        Ok(())
    }

    /// All members but this node. The value changes at once with liveness and connections, and a few times a
    /// second with everything else.
    pub fn peers(&self) -> watch::Receiver<Peers> {
        self.endpoint.peers.subscribe()
    }

    /// Connects to the peer that answers first at `addresses`. With `peer`, or an address that ends in `/p2p/ID`, only that
    /// peer counts. For the handshake with a mesh that this node is not a member of yet; members are connected to
    /// without a call.
    ///
    /// # Errors
    /// [`DialError`], with one cause per address.
    pub async fn dial(
        &self,
        addresses: Vec<Multiaddr>,
        peer: Option<PeerId>,
        deadline: Duration,
    ) -> Result<PeerId, DialError> {
        if addresses.is_empty() {
            return Err(DialError::NoAddress);
        }
        let (reply, answer) = oneshot::channel();
        let asking = async {
            let command = Command::Dial { addresses, peer, reply };
            self.commands.send(command).await.map_err(|_| DialError::ShutDown)?;
            answer.await.unwrap_or(Err(DialError::ShutDown))
        };
        tokio::time::timeout(deadline, asking).await.unwrap_or(Err(DialError::TimedOut { after: deadline }))
    }

    /// Opens a stream to a connected peer. For a member that is not connected but not down either, waits a few
    /// seconds for its connection.
    ///
    /// # Errors
    /// [`OpenError`]; `is_retryable` tells whether it can help to try again.
    pub async fn open(&self, peer: PeerId, protocol: Protocol) -> Result<FrameStream, OpenError> {
        stream::open(&self.endpoint, peer, protocol).await
    }

    /// Sends one frame and returns the reply, over a stream that is kept for the next request. When an idle stream
    /// turns out to have died before any byte of a reply, the request is sent once more on a new one, so the far
    /// side may see it twice: it must not matter.
    ///
    /// # Errors
    /// [`RequestError`]; when the peer goes down while it is pending, at once and retryable.
    pub async fn request(
        &self,
        peer: PeerId,
        protocol: Protocol,
        frame: Frame,
        deadline: Duration,
    ) -> Result<Frame, RequestError> {
        let exchange = self.pool.exchange(&self.endpoint, peer, protocol, &frame);
        let late = RequestError::TimedOut { peer, protocol: protocol.name, after: deadline };
        tokio::time::timeout(deadline, exchange).await.unwrap_or(Err(late))
    }

    /// Accepts streams of `protocol` from now on. A peer holds a bounded number of them at once, so each may have a task of
    /// its own. A server of strangers bounds what it keeps for them too: an open stream keeps their connection open.
    ///
    /// # Errors
    /// [`ServeError`] if the protocol is served already.
    pub fn serve(&self, protocol: Protocol, access: Access) -> Result<Incoming, ServeError> {
        stream::serve(&self.endpoint, protocol, access)
    }

    /// Waits until members have been asked whether an earlier process of this node is alive. Where there are no other members
    /// that is at once; where none answers, about a second after the first call of [`Self::set_members`].
    ///
    /// # Errors
    /// [`Duplicate`]: one is alive, and this process must not act as the node.
    pub async fn confirmed(&self) -> Result<(), Duplicate> {
        let mut standing = self.endpoint.standing.subscribe();
        tokio::select! {
            // Whatever waits fails by itself then.
            () = self.endpoint.stopped.cancelled() => {}
            _ = standing.wait_for(|standing| *standing != Standing::Unknown) => {}
        }
        self.duplicate().map_or(Ok(()), Err)
    }

    /// The earlier process of this node that is alive, if one is. Gossip has stopped then.
    pub fn duplicate(&self) -> Option<Duplicate> {
        self.endpoint.duplicate()
    }

    /// Waits until gossip has stopped: by [`Self::shutdown`], or because this process is a [`Duplicate`].
    pub async fn stopped(&self) {
        self.endpoint.stopped.cancelled().await;
    }

    /// Attempts of strangers to use a protocol for members, as they are refused. One of them may come from a member of whom
    /// this node has not heard yet. A slow receiver misses some; a member tries again.
    pub fn unauthorized_attempts(&self) -> broadcast::Receiver<PeerId> {
        self.endpoint.unauthorized.subscribe()
    }

    /// Says goodbye, closes every connection so that others see it at once, and stops this node for all handles.
    pub async fn shutdown(self) {
        let (done, stopped) = oneshot::channel();
        if self.commands.send(Command::Shutdown { done }).await.is_ok() {
            // An error means that the driver has ended, which is what was asked for.
            let _ = stopped.await;
        }
    }
}
