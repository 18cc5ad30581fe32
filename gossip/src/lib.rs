//! Who is here and how loaded; carries bytes between nodes.
//!
//! A mesh is the set of peers that one log has admitted; this crate is told who they are and does the rest. It
//! keeps a connection to each (QUIC, or TCP with Noise and Yamux), finds them again when they move (identify,
//! mDNS, given addresses), tells them how loaded this node is, hears the same of them, notices who died, and
//! carries frames of bytes whose meaning other crates know.
//!
//! It has two halves.
//!
//! **The pure half decides.** [`status`] says when 16 bits of load are worth a message. `state` merges what nodes
//! advertise and repairs what was missed. [`liveness`] turns silence and refusals into verdicts. `addresses` knows
//! where members may be found and which addresses lead back to ourselves. `measure` smooths round-trip times and
//! throughput. `message` and `frame` are bytes. These take the time and a random generator as arguments, return
//! what is to be done as values, and are tested without a network or a clock.
//!
//! **The driver half acts.** One task (`driver`) owns the libp2p swarm, feeds the pure half with what happens and
//! does what it returns. [`Handle`] is how the rest of the node talks to it: cloneable, with bounded queues.
//! `stream` opens and accepts streams, `pool` keeps idle ones for the next request, `neighbour` carries gossip,
//! and `link` holds what makes everything that waits on a dead peer fail at once.
//!
//! Invariants across both halves:
//! - A stranger may connect, identify itself, ping, and use protocols that were opened to anyone; on a protocol for
//!   members its streams close without a byte, and its connections are few and end when idle.
//! - A peer's bytes never panic this node, and sizes are checked before memory is set aside.
//! - Nothing waits on a peer that is down: its connections are closed with the verdict, and whatever was pending
//!   fails with an error that says it may be retried.
//!
//! Deliberately absent: models, weights, the log, and any idea of what a payload says.

mod addresses;
mod config;
mod driver;
mod error;
mod frame;
mod handle;
mod identity;
mod link;
pub mod liveness;
mod measure;
mod message;
mod neighbour;
mod pool;
mod state;
pub mod status;
mod stream;
mod swarm;
mod view;

pub use config::Config;
pub use error::{DialError, FactsTooLarge, OpenError, RequestError, ServeError, StartError, StreamError};
pub use frame::{Frame, Protocol};
pub use handle::{Handle, start};
pub use identity::{Identity, IdentityError};
pub use libp2p::{Multiaddr, PeerId};
pub use liveness::Liveness;
pub use measure::Rtt;
pub use message::FACTS_BYTES_MAX;
pub use status::Status;
pub use stream::{Access, FrameStream, Incoming};
pub use view::{PeerView, Peers};
