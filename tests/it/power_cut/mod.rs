//! Power cuts and kill -9 of three nodes that commands are written to: none that was acknowledged is lost, the logs do not
//! part, and the nodes find together again.
//!
//! The commands are invites: each that a node has printed must be in every node's state. A seed chooses who dies, when, and
//! what its disk keeps. The processes themselves are not replayed: the same seed gives the same choices.
//!
//! `COEL_POWER_CUT_ROUNDS` and `COEL_POWER_CUT_SEED` set the number of rounds and the seed.

mod shadow;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coel_node::control::{self, Request};
use coel_node::mesh::admission::invite::{Invite, token_hash};
use coel_node::status::Status;
use coel_store::{Recovery, State, TokenHash};
use coel_testnet::mesh::Mesh;
use coel_testnet::node::{NodeSpec, Start};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::support::{guarded, launcher, spec, turn, until};
use shadow::{Disk, compile};

const NODES: [&str; 3] = ["a", "b", "c"];
/// Rounds where the environment does not say. A round takes a few seconds.
const ROUNDS: usize = 12;
/// After so many rounds the logs themselves are read.
const ROUNDS_TO_AUDIT: usize = 4;
/// Most commands that are begun in a round. The state keeps 1,024 invites, so those of two audits are all there.
const COMMANDS_MAX: usize = 120;
const _: () = assert!(2 * ROUNDS_TO_AUDIT * COMMANDS_MAX < 1024);
/// Pause of a writer whose command failed.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// What the environment says, if it says anything.
fn setting<T: std::str::FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// The commands that were acknowledged.
#[derive(Default)]
struct Acknowledged {
    /// Since the last audit.
    since: BTreeSet<TokenHash>,
    total: usize,
}

/// Commands written to all nodes at once, until it is dropped.
struct Load {
    /// How many commands have been acknowledged.
    acknowledged: watch::Receiver<usize>,
    _writers: JoinSet<()>,
}

impl Load {
    fn on(nodes: &[PathBuf], into: &Arc<Mutex<Acknowledged>>) -> Self {
        let (count, acknowledged) = watch::channel(0);
        let mut writers = JoinSet::new();
        for data in nodes {
            let (data, into, count) = (data.clone(), Arc::clone(into), count.clone());
            writers.spawn(async move {
                for _ in 0..COMMANDS_MAX / NODES.len() {
                    let request = Request::Invite { uses: 1, ttl_s: 86_400 };
                    match control::ask::<String>(&data, &request, |_, _, _| ()).await {
                        Ok(line) => {
                            let invite: Invite = line.parse().unwrap();
                            let mut into = into.lock().unwrap();
                            into.since.insert(token_hash(&invite.token));
                            into.total += 1;
                            count.send_modify(|count| *count += 1);
                        }
                        Err(_) => tokio::time::sleep(RETRY_PAUSE).await,
                    }
                }
            });
        }
        Self { acknowledged, _writers: writers }
    }

    /// Waits until so many are acknowledged, or no more are to come.
    async fn reaches(&mut self, count: usize) {
        let _ = guarded(self.acknowledged.wait_for(|acknowledged| *acknowledged >= count)).await;
    }
}

struct Cluster {
    mesh: Mesh,
    disks: Vec<Disk>,
    rng: StdRng,
    acknowledged: Arc<Mutex<Acknowledged>>,
    /// The commands that the last audit looked for.
    audited: BTreeSet<TokenHash>,
    cuts: usize,
    kills: usize,
}

impl Cluster {
    async fn new(seed: u64) -> Self {
        let mut mesh = Mesh::new(launcher()).unwrap();
        let library = compile(mesh.folder());
        let mut disks = Vec::new();
        for (index, name) in NODES.into_iter().enumerate() {
            let disk = Disk::of(&mesh.folder().join(name));
            let start = match index {
                0 => Start::New,
                _ => Start::Join(mesh.invite(1).await.unwrap()),
            };
            mesh.add(NodeSpec { env: disk.env(&library), ..spec(name) }).unwrap();
            disk.create();
            mesh.node(index).start(&start).await.unwrap();
            disks.push(disk);
        }
        let all_vote = |status: &Status| status.nodes.len() == 3 && status.nodes.iter().all(|node| node.voter);
        for index in 0..NODES.len() {
            until(&mut mesh, index, "three voters", all_vote).await;
        }
        let rng = StdRng::seed_from_u64(seed);
        Self { mesh, disks, rng, acknowledged: Arc::default(), audited: BTreeSet::new(), cuts: 0, kills: 0 }
    }

    async fn pause(&mut self, at_most_ms: u64) {
        let pause = self.rng.random_range(0..=at_most_ms);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }

    /// The process of a node ends at once, and maybe the power with it.
    fn strike(&mut self, index: usize) {
        self.mesh.node(index).kill();
        if self.rng.random_bool(0.6) {
            self.disks[index].cut(&mut self.rng);
            self.cuts += 1;
        } else {
            self.kills += 1;
        }
    }

    async fn start(&mut self, index: usize) {
        self.pause(1000).await;
        if self.rng.random_bool(0.2) {
            // It is struck again while it comes up.
            let limit = Duration::from_millis(self.rng.random_range(0..600));
            let _ = tokio::time::timeout(limit, self.mesh.node(index).start(&Start::Again)).await;
            self.strike(index);
        }
        self.mesh.node(index).start(&Start::Again).await.unwrap();
    }

    /// Some nodes are struck while commands are written to all of them, and start again.
    async fn round(&mut self) {
        let nodes: Vec<PathBuf> = self.mesh.nodes().iter().map(|node| node.data()).collect();
        let mut load = Load::on(&nodes, &self.acknowledged);
        let mut victims: Vec<usize> = (0..NODES.len()).collect();
        victims.shuffle(&mut self.rng);
        victims.truncate(self.rng.random_range(1..=NODES.len()));
        load.reaches(self.rng.random_range(0..COMMANDS_MAX / 3)).await;
        for &victim in &victims {
            self.pause(40).await;
            self.strike(victim);
        }
        victims.shuffle(&mut self.rng);
        for &victim in &victims {
            self.start(victim).await;
        }
    }

    /// Waits until all nodes have applied the same entries, with the same outcome.
    async fn converge(&mut self) -> u64 {
        let mut reached = 0;
        for index in 0..NODES.len() {
            until(&mut self.mesh, index, "a leader", |status| status.leader.is_some()).await;
        }
        loop {
            let statuses = self.mesh.statuses().await;
            let statuses: Vec<Status> = statuses.into_iter().map(|status| status.unwrap()).collect();
            let of = |status: &Status| (status.leader, status.applied);
            let is_equal = statuses.iter().all(|status| of(status) == of(&statuses[0])) && statuses[0].leader.is_some();
            if is_equal {
                let first = &statuses[0];
                assert!(statuses.iter().all(|status| status.state_hash == first.state_hash), "parted: {statuses:#?}");
                assert!(statuses.iter().all(|status| status.mesh == first.mesh && status.nodes.len() == NODES.len()));
                let ids: Vec<u64> = statuses.iter().map(|status| status.node_id.0).collect();
                assert_eq!(ids, [1, 2, 3]);
                return first.applied;
            }
            reached += 1;
            assert!(reached < 1800, "they do not converge: {statuses:#?}\n{}", self.mesh.last_words().await);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Strikes all nodes and reads what each of them has. They may have begun to write more, each on its own.
    async fn audit(&mut self) {
        for index in 0..NODES.len() {
            self.strike(index);
        }
        let expected = std::mem::take(&mut self.acknowledged.lock().unwrap().since);
        for (index, name) in NODES.into_iter().enumerate() {
            let state = read_log(&self.mesh.nodes()[index].data()).await;
            let lost = self.audited.union(&expected).filter(|token| !state.invites.contains_key(token)).count();
            assert_eq!(lost, 0, "acknowledged commands that node {name} does not have");
        }
        self.audited = expected;
        for index in 0..NODES.len() {
            self.mesh.node(index).start(&Start::Again).await.unwrap();
        }
    }
}

/// What the log of a node that does not run comes to. Reading it goes on from a crash, so a copy is read.
async fn read_log(data: &Path) -> State {
    let copy = tempfile::tempdir().unwrap();
    copy_folder(&data.join("log"), &copy.path().join("log"));
    Recovery::open(copy.path()).await.unwrap().state().clone()
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_folder(&path, &to);
        } else {
            fs::copy(&path, &to).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_commands_survive_power_cuts_and_kills() {
    let _turn = turn().await;
    let rounds = setting("COEL_POWER_CUT_ROUNDS").unwrap_or(ROUNDS);
    let seed = setting("COEL_POWER_CUT_SEED").unwrap_or_else(rand::random);
    eprintln!("COEL_POWER_CUT_SEED={seed} COEL_POWER_CUT_ROUNDS={rounds}");
    let mut cluster = Cluster::new(seed).await;
    let mut applied = cluster.converge().await;
    for round in 1..=rounds {
        cluster.round().await;
        let now = cluster.converge().await;
        assert!(now >= applied, "round {round}: {now} entries are applied, after {applied} before");
        applied = now;
        if round % ROUNDS_TO_AUDIT == 0 || round == rounds {
            cluster.audit().await;
            applied = applied.max(cluster.converge().await);
            let total = cluster.acknowledged.lock().unwrap().total;
            let (cuts, kills) = (cluster.cuts, cluster.kills);
            eprintln!("round {round}: {cuts} power cuts, {kills} kills, {total} commands acknowledged, none lost");
        }
    }
}
