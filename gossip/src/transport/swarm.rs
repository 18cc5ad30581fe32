//! The libp2p swarm: transports, behaviours, and what its errors mean.
//!
//! Owns: how the swarm is put together and made to listen. Invariant: only a failing transport or listen address is fatal;
//! without multicast or a resolver the node runs on with a warning.
//! Deliberately does not know: members and gossip.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use futures::StreamExt;
use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::identity::Keypair;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::swarm::{DialError, NetworkBehaviour, SwarmEvent};
use libp2p::{Multiaddr, Swarm, SwarmBuilder, TransportError, identify, mdns, noise, ping, tcp, yamux};

use crate::config::Config;
use crate::error::StartError;

const IDENTIFY_PROTOCOL: &str = "/coel/1";
/// Above the silence that is death, so that a late answer still counts as a word.
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a listener may take to find its addresses.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections one stranger may have.
const CONNECTIONS_PER_STRANGER_MAX: u32 = 4;
/// Connections that the limits leave room for per member: one dialled by each side, each being replaced.
const CONNECTIONS_PER_MEMBER: u32 = 4;

#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    // First, so that the others never see what it denies.
    pub limits: connection_limits::Behaviour,
    pub identify: identify::Behaviour,
    pub ping: ping::Behaviour,
    pub mdns: Toggle<mdns::tokio::Behaviour>,
    pub streams: libp2p_stream::Behaviour,
}

impl Behaviour {
    fn new(keypair: &Keypair, config: &Config) -> Behaviour {
        let local = keypair.public().to_peer_id();
        let mdns = config.mdns.then(|| mdns::tokio::Behaviour::new(mdns::Config::default(), local));
        let mdns = mdns.and_then(|started| {
            let warn = |error: &io::Error| tracing::warn!(%error, "mDNS is off: the local network is not searched");
            started.inspect_err(warn).ok()
        });
        // Addresses go to the address book, which knows which to trust; identify's own cache does not.
        let identify = identify::Config::new(IDENTIFY_PROTOCOL.to_owned(), keypair.public())
            .with_agent_version(format!("coel/{}", env!("CARGO_PKG_VERSION")))
            .with_push_listen_addr_updates(true)
            .with_cache_size(0);
        Behaviour {
            limits: connection_limits::Behaviour::new(connection_limits(config.strangers_max, 0)),
            identify: identify::Behaviour::new(identify),
            ping: ping::Behaviour::new(
                ping::Config::new().with_interval(config.ping_interval).with_timeout(PING_TIMEOUT),
            ),
            mdns: mdns.into(),
            streams: libp2p_stream::Behaviour::new(),
        }
    }
}

/// Limits for strangers. Members pass them but are counted in the total, so it grows with their number.
pub(crate) fn connection_limits(strangers_max: u32, members: usize) -> ConnectionLimits {
    let members = u32::try_from(members).unwrap_or(u32::MAX);
    ConnectionLimits::default()
        .with_max_pending_incoming(Some(strangers_max.saturating_add(members)))
        .with_max_pending_outgoing(Some(strangers_max))
        .with_max_established(Some(strangers_max.saturating_add(CONNECTIONS_PER_MEMBER.saturating_mul(members))))
        .with_max_established_per_peer(Some(CONNECTIONS_PER_STRANGER_MAX))
}

/// A swarm with all transports, not listening yet.
pub(crate) fn build(config: &Config) -> Result<Swarm<Behaviour>, StartError> {
    let transport = |cause: &dyn std::fmt::Display| StartError::Transport { cause: cause.to_string() };
    let transports = || {
        SwarmBuilder::with_existing_identity(config.identity.keypair().clone())
            .with_tokio()
            .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, yamux::Config::default)
            .map(|builder| builder.with_quic())
    };
    let behaviour = |keypair: &Keypair| Behaviour::new(keypair, config);
    // The default of 10 s would close connections between two words of a quiet mesh.
    let idle = |swarm: libp2p::swarm::Config| swarm.with_idle_connection_timeout(config.idle_timeout);
    match transports().map_err(|error| transport(&error))?.with_dns() {
        Ok(builder) => {
            let built = builder.with_behaviour(behaviour).map_err(|error| transport(&error))?;
            Ok(built.with_swarm_config(idle).build())
        }
        Err(error) => {
            tracing::warn!(%error, "no name resolver: addresses with host names cannot be dialled");
            let builder = transports().map_err(|error| transport(&error))?;
            let built = builder.with_behaviour(behaviour).map_err(|error| transport(&error))?;
            Ok(built.with_swarm_config(idle).build())
        }
    }
}

/// A swarm that listens.
pub(crate) struct Listening {
    /// Concrete addresses, at least one.
    pub addresses: Vec<Multiaddr>,
    /// What happened meanwhile: peers may connect before the last listener is ready.
    pub early: Vec<SwarmEvent<BehaviourEvent>>,
}

/// Makes `swarm` listen on every address of the configuration, and waits until each has led to a concrete one.
pub(crate) async fn listen(swarm: &mut Swarm<Behaviour>, config: &Config) -> Result<Listening, StartError> {
    if config.listen.is_empty() {
        return Err(StartError::NoListenAddress);
    }
    // All before the first listener: a wildcard of one family may cover the other.
    config.listen.iter().try_for_each(probe)?;
    let mut listening = Listening { addresses: Vec::new(), early: Vec::new() };
    for address in &config.listen {
        let listener = swarm.listen_on(address.clone()).map_err(|error| match error {
            TransportError::MultiaddrNotSupported(_) => StartError::Unsupported { address: address.clone() },
            TransportError::Other(cause) => listen_error(address, cause),
        })?;
        let first = async {
            loop {
                match swarm.select_next_some().await {
                    SwarmEvent::NewListenAddr { listener_id, address } => {
                        listening.addresses.push(address);
                        if listener_id == listener {
                            return Ok(());
                        }
                    }
                    SwarmEvent::ListenerClosed { listener_id, reason: Err(cause), .. } if listener_id == listener => {
                        return Err(listen_error(address, cause));
                    }
                    other => listening.early.push(other),
                }
            }
        };
        let timeout = StartError::NoAddress { address: address.clone(), after: LISTEN_TIMEOUT };
        tokio::time::timeout(LISTEN_TIMEOUT, first).await.unwrap_or(Err(timeout))?;
    }
    Ok(listening)
}

/// Finds out whether a port is taken, by binding it for a moment. The TCP transport shares its port with any other
/// process of the same user that shares it too, so two nodes on one port would each get some of the connections;
/// binding it without sharing finds that out.
fn probe(address: &Multiaddr) -> Result<(), StartError> {
    let mut parts = address.iter();
    let ip = match parts.next() {
        Some(Protocol::Ip4(ip)) => ip.into(),
        Some(Protocol::Ip6(ip)) => ip.into(),
        _ => return Ok(()),
    };
    let bound = match parts.next() {
        Some(Protocol::Tcp(port)) if port != 0 => TcpListener::bind(SocketAddr::new(ip, port)).map(drop),
        Some(Protocol::Udp(port)) if port != 0 => UdpSocket::bind(SocketAddr::new(ip, port)).map(drop),
        _ => Ok(()),
    };
    bound.map_err(|cause| listen_error(address, cause))
}

fn listen_error(address: &Multiaddr, cause: io::Error) -> StartError {
    let address = address.clone();
    match io_kind(&cause) {
        Some(io::ErrorKind::AddrInUse) => StartError::PortInUse { address },
        _ => StartError::Listen { address, cause },
    }
}

/// Whether a failed dial means that no process of that peer listens at the addresses that were dialled: the machine behind
/// each of them answered, and none with a connection.
pub(crate) fn is_refusal(error: &DialError) -> bool {
    match error {
        DialError::WrongPeerId { .. } | DialError::LocalPeerId { .. } => true,
        DialError::Transport(attempts) => {
            !attempts.is_empty()
                && attempts.iter().all(|(_, error)| match error {
                    TransportError::Other(cause) => io_kind(cause) == Some(io::ErrorKind::ConnectionRefused),
                    TransportError::MultiaddrNotSupported(_) => false,
                })
        }
        _ => false,
    }
}

/// The kind of the error of the operating system behind `error`. The transports wrap it in types without a name,
/// some of which leave it out of their chain of sources, but all of them show its number.
fn io_kind(error: &io::Error) -> Option<io::ErrorKind> {
    if error.kind() != io::ErrorKind::Other {
        return Some(error.kind());
    }
    let text = error.to_string();
    let (_, number) = text.rsplit_once("(os error ")?;
    let (number, _) = number.split_once(')')?;
    Some(io::Error::from_raw_os_error(number.parse().ok()?).kind())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;

    /// Dials `address` with a swarm as nodes have it, and returns how that fails.
    async fn failure(address: &str) -> DialError {
        let mut swarm = build(&Config { mdns: false, ..Config::new(Identity::generate()) }).expect("builds");
        swarm.dial(address.parse::<Multiaddr>().expect("a multiaddress")).expect("begins");
        loop {
            if let SwarmEvent::OutgoingConnectionError { error, .. } = swarm.select_next_some().await {
                return error;
            }
        }
    }

    #[tokio::test]
    async fn a_refusal_is_recognised_behind_every_wrapping() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let port = listener.local_addr().expect("bound").port();
        drop(listener);
        let error = failure(&format!("/ip4/127.0.0.1/tcp/{port}")).await;
        assert!(is_refusal(&error), "{error:?}");
    }

    #[tokio::test]
    async fn a_listener_that_speaks_something_else_is_no_refusal() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let port = listener.local_addr().expect("bound").port();
        let closing = std::thread::spawn(move || listener.accept().map(drop));
        let error = failure(&format!("/ip4/127.0.0.1/tcp/{port}")).await;
        assert!(!is_refusal(&error), "{error:?}");
        closing.join().expect("no panic").expect("accepted");
    }
}
