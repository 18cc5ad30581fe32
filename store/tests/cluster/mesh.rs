//! Members in one process, joined by channels.

use coel_store::{
    Command, Log, MemberInfo, NodeId, Outcome, Peer, Presence, State, Timing, TokenHash, Transport, Unreachable,
};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Only a hang takes this long.
pub const GUARD: Duration = Duration::from_secs(60);

pub fn timing() -> Timing {
    Timing { heartbeat_ms: 100, election_min_ms: 400, election_max_ms: 800, ..Timing::default() }
}

/// The nodes that can be called, by identity, and those that are cut off.
#[derive(Clone, Default)]
pub struct Wires(Arc<Mutex<BTreeMap<Peer, Log>>>, Arc<Mutex<BTreeSet<Peer>>>);

/// One node's end of the wires.
struct Port {
    me: Peer,
    wires: Wires,
}

impl Transport for Port {
    fn call(&self, to: Peer, _: NodeId, rpc: Vec<u8>) -> BoxFuture<'static, Result<Vec<u8>, Unreachable>> {
        let cut = |peer: &Peer| self.wires.1.lock().unwrap().contains(peer);
        let log = self.wires.0.lock().unwrap().get(&to).cloned().filter(|_| !cut(&to) && !cut(&self.me));
        let from = self.me.clone();
        async move {
            match log {
                Some(log) => Ok(log.handle(from, rpc).await),
                None => Err(Unreachable("nobody there".into())),
            }
        }
        .boxed()
    }
}

impl Wires {
    pub fn port(&self, name: &str) -> Arc<dyn Transport> {
        Arc::new(Port { me: peer(name), wires: self.clone() })
    }

    pub fn plug(&self, name: &str, log: &Log) {
        self.0.lock().unwrap().insert(peer(name), log.clone());
    }

    pub fn unplug(&self, name: &str) {
        self.0.lock().unwrap().remove(&peer(name));
    }

    pub fn cut(&self, name: &str) {
        self.1.lock().unwrap().insert(peer(name));
    }

    pub fn mend(&self, name: &str) {
        self.1.lock().unwrap().remove(&peer(name));
    }
}

pub fn peer(name: &str) -> Peer {
    Peer(name.as_bytes().to_vec())
}

pub fn info(name: &str) -> MemberInfo {
    MemberInfo { peer: peer(name), name: name.into(), addresses: vec![format!("/memory/{name}")] }
}

/// A mesh and its nodes, by name.
pub struct Mesh {
    pub wires: Wires,
    pub dir: tempfile::TempDir,
    pub nodes: BTreeMap<String, Log>,
}

impl Mesh {
    pub async fn new(creator: &str) -> Self {
        let wires = Wires::default();
        let dir = tempfile::tempdir().unwrap();
        let log = Log::create(dir.path().join(creator), info(creator), wires.port(creator), timing()).await.unwrap();
        wires.plug(creator, &log);
        Self { wires, dir, nodes: BTreeMap::from([(creator.to_string(), log)]) }
    }

    /// A mesh of these nodes, all of which vote if there are three or five.
    pub async fn of(names: &[&str]) -> Self {
        let mut mesh = Self::new(names[0]).await;
        for name in &names[1..] {
            mesh.join(names[0], name).await;
        }
        mesh
    }

    pub async fn join(&mut self, via: &str, name: &str) -> NodeId {
        let node = self.admit(via, name).await;
        let members = self.nodes.len();
        self.reconcile_until("the newcomer has the state", &BTreeSet::new(), |mesh| {
            let state = mesh.state(name);
            state.members.contains_key(&node) && mesh.voters() == members.min(5) - (1 - members.min(5) % 2)
        })
        .await;
        node
    }

    /// Admits a node and starts its log, which is empty.
    pub async fn admit(&mut self, via: &str, name: &str) -> NodeId {
        let token = TokenHash::of(name.as_bytes());
        let invite = Command::Invite { token, uses: 1, expires_at_ms: 1_000 };
        assert_eq!(self.propose(via, invite).await, Outcome::Done);
        let MemberInfo { peer, name: called, addresses } = info(name);
        let join = Command::Join { peer, name: called, addresses, token, now_ms: 1, anew: false };
        let Outcome::Joined { node } = self.propose(via, join).await else { panic!("not admitted") };
        let mesh = self.nodes[via].mesh_id();
        let dir = self.dir.path().join(name);
        let log = Log::join(dir, node, mesh, self.wires.port(name), timing()).await.unwrap();
        self.wires.plug(name, &log);
        self.nodes.insert(name.into(), log);
        node
    }

    pub fn log(&self, name: &str) -> Log {
        self.nodes[name].clone()
    }

    pub fn state(&self, name: &str) -> Arc<State> {
        self.nodes[name].state().borrow().clone()
    }

    /// The number of voters that the leader counts; zero without a leader.
    pub fn voters(&self) -> usize {
        let leads = |log: &&Log| *log.leader().borrow() == Some(log.node_id());
        self.nodes.values().find(leads).map_or(0, |log| log.voters().borrow().len())
    }

    pub async fn propose(&self, name: &str, command: Command) -> Outcome {
        self.log(name).propose(command, GUARD).await.unwrap()
    }

    /// All members are there but those in `lost`.
    pub fn without(&self, lost: &BTreeSet<NodeId>) -> Presence {
        let members =
            self.nodes.values().flat_map(|log| log.state().borrow().members.keys().copied().collect::<Vec<_>>());
        let up: BTreeSet<_> = members.filter(|node| !lost.contains(node)).collect();
        Presence { steady: up.clone(), up, lost: lost.clone() }
    }

    /// Lets the leader reconcile until `done`.
    pub async fn reconcile_until(&self, what: &str, down: &BTreeSet<NodeId>, done: impl Fn(&Self) -> bool) {
        let wait = async {
            while !done(self) {
                for log in self.nodes.values() {
                    log.reconcile(self.without(down)).await.unwrap();
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(GUARD, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    pub async fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let wait = async {
            while !done(self) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(GUARD, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    /// Waits until all nodes have the same state.
    pub async fn until_equal(&self) {
        self.until("all states are equal", |mesh| {
            let states: Vec<_> = mesh.nodes.keys().map(|name| mesh.state(name)).collect();
            states.windows(2).all(|pair| pair[0] == pair[1])
        })
        .await;
    }

    pub async fn stop(&mut self, name: &str) {
        self.wires.unplug(name);
        self.nodes.remove(name).unwrap().shutdown().await;
    }

    pub async fn start(&mut self, name: &str) {
        let log = Log::open(self.dir.path().join(name), self.wires.port(name), timing()).await.unwrap();
        self.wires.plug(name, &log);
        self.nodes.insert(name.into(), log);
    }

    /// The name of the leader that all running nodes agree on.
    pub async fn leader(&self) -> String {
        let agreed = |mesh: &Self| {
            let said: BTreeSet<_> = mesh.nodes.values().map(|log| *log.leader().borrow()).collect();
            let leader = said.into_iter().collect::<Vec<_>>();
            let [Some(leader)] = leader[..] else { return None };
            mesh.nodes.iter().find(|(_, log)| log.node_id() == leader).map(|(name, _)| name.clone())
        };
        self.until("a leader is agreed on", |mesh| agreed(mesh).is_some()).await;
        agreed(self).unwrap()
    }

    pub async fn close(mut self) {
        for name in self.nodes.keys().cloned().collect::<Vec<_>>() {
            self.stop(&name).await;
        }
    }
}

impl Mesh {
    pub async fn until_equal_after_reconcile(&self, down: &BTreeSet<NodeId>) {
        self.reconcile_until("all states are equal", down, |mesh| {
            let states: Vec<_> = mesh.nodes.keys().map(|name| mesh.state(name)).collect();
            states.windows(2).all(|pair| pair[0] == pair[1])
        })
        .await;
    }
}
