//! Shared by the tests: nodes on loopback, an echo server, and waits with a guard against hangs.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use coel_gossip::{Access, Config, Frame, Handle, Identity, Incoming, Liveness, Multiaddr, PeerId, Peers, Protocol};
use tokio::runtime::Runtime;

/// No test comes near this limit; it only ends one that hangs.
pub const GUARD: Duration = Duration::from_secs(60);
pub const TCP: &str = "/ip4/127.0.0.1/tcp/0";
pub const QUIC: &str = "/ip4/127.0.0.1/udp/0/quic-v1";
pub const ECHO: Protocol = Protocol::new("/coel/test/echo/1", 1024 * 1024);

pub fn config(identity: &Identity, listen: &str) -> Config {
    Config { listen: vec![listen.parse().expect("a multiaddress")], mdns: false, ..Config::new(identity.clone()) }
}

pub async fn node(listen: &str) -> Handle {
    coel_gossip::start(config(&Identity::generate(), listen)).await.expect("starts")
}

/// A node on a runtime of its own, which can be killed like a process: without a farewell.
pub struct Process {
    pub handle: Handle,
    runtime: Runtime,
}

impl Process {
    pub async fn start(config: Config) -> Process {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let handle = runtime.spawn(coel_gossip::start(config)).await.expect("no panic").expect("starts");
        Process { handle, runtime }
    }

    pub fn kill(self) {
        self.runtime.shutdown_background();
    }

    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(future);
    }
}

pub type Members = BTreeMap<PeerId, Vec<Multiaddr>>;

pub fn members(handles: &[&Handle]) -> Members {
    handles.iter().map(|handle| (handle.local_peer_id(), handle.listen_addresses())).collect()
}

/// Makes the nodes members of one mesh and waits until each sees all others up.
pub async fn join(handles: &[&Handle]) {
    let members = members(handles);
    handles.iter().for_each(|handle| handle.set_members(members.clone()));
    for handle in handles {
        until(handle, |peers| {
            peers.len() == handles.len() - 1 && peers.values().all(|peer| peer.liveness == Liveness::Up)
        })
        .await;
    }
}

pub async fn guarded<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(GUARD, future).await.unwrap_or_else(|_| panic!("hangs: {what}"))
}

/// Waits until the members, as `handle` sees them, satisfy `condition`.
pub async fn until(handle: &Handle, condition: impl Fn(&Peers) -> bool) {
    let mut peers = handle.peers();
    let waited = tokio::time::timeout(GUARD, peers.wait_for(|peers| condition(peers))).await;
    let waited = waited.map(|seen| seen.is_ok());
    assert!(waited.unwrap_or(false), "never came true; the last view: {:#?}", handle.peers().borrow());
}

pub async fn until_liveness(handle: &Handle, peer: PeerId, liveness: Liveness) {
    until(handle, |peers| peers.get(&peer).is_some_and(|view| view.liveness == liveness)).await;
}

/// Sends every frame back on its stream.
pub async fn echo(mut incoming: Incoming) {
    while let Some((_, mut stream)) = incoming.next().await {
        tokio::spawn(async move {
            while let Ok(Some(frame)) = stream.recv().await {
                if stream.send(&frame).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// Accepts streams and never answers.
pub async fn mute(mut incoming: Incoming) {
    let mut kept = Vec::new();
    while let Some((_, stream)) = incoming.next().await {
        kept.push(stream);
    }
}

pub fn serve_echo(handle: &Handle, access: Access) {
    tokio::spawn(echo(handle.serve(ECHO, access).expect("not served yet")));
}

pub async fn ask(handle: &Handle, peer: PeerId, payload: Vec<u8>) -> Result<Frame, coel_gossip::RequestError> {
    guarded("a request", handle.request(peer, ECHO, Frame::new("header", payload), GUARD)).await
}
