//! Who is here and how loaded; carries bytes between nodes.
//!
//! A mesh is the set of peers that one log has admitted. This crate is told which they are and does the rest: it keeps a
//! connection to each (QUIC, or TCP with Noise and Yamux), finds them again when they move (identify, mDNS, configured
//! addresses), exchanges load with them, notices their death, and carries frames of bytes whose meaning other crates know.
//!
//! | room | what it does | it imports |
//! |---|---|---|
//! | [`Handle`] (`handle`) | how the rest of the node talks to gossip: cloneable, with bounded queues | driver, transport, membership |
//! | `driver` | the one task that owns the libp2p swarm, and the tasks that carry gossip | transport, membership |
//! | `transport` | swarm, frames, links, streams and their pool | membership (values only) |
//! | `membership` | the pure half: adverts, processes, liveness, addresses, status, messages, measures | identity |
//! | `config`, `identity`, `error`, `sync` | what a node is started with; faults; locks | membership |
//!
//! **The pure half decides.** It takes the time and a random generator as arguments, returns what is to be done as values,
//! and is tested without a network or a clock. **The driver acts**: it feeds the pure half with what happens, and carries
//! out what it returns.
//!
//! Invariants across all rooms:
//! - A stranger may connect, identify itself, ping, and use protocols that were opened to anyone. On a protocol for members
//!   its streams close without a byte; its connections are few and end when idle.
//! - A peer's bytes never panic this node, sizes are checked before memory is set aside, and what a peer may hold here
//!   (connections, streams, queued messages, facts, addresses) is bounded.
//! - Of several processes with this node's identity that have a common neighbour, the earliest goes on and the others stop.
//! - Nothing waits on a peer that is down: its connections are closed with the verdict, and whatever was pending fails with
//!   an error that says it may be retried.
//!
//! Deliberately absent: models, weights, the log, and any idea of what a payload says.

mod config;
mod driver;
mod error;
mod handle;
mod identity;
pub mod membership;
mod sync;
mod transport;

pub use config::Config;
pub use error::{DialError, Duplicate, FactsTooLarge, OpenError, RequestError, ServeError, StartError, StreamError};
pub use handle::{Handle, start};
pub use identity::Identity;
pub use libp2p::{Multiaddr, PeerId};
pub use membership::liveness::Liveness;
pub use membership::measure::Rtt;
pub use membership::message::FACTS_BYTES_MAX;
pub use membership::status::Status;
pub use membership::view::{PeerView, Peers};
pub use membership::{liveness, status};
pub use transport::frame::{Frame, Protocol};
pub use transport::stream::{Access, FrameStream, Incoming};
