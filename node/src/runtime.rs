//! One node, from the data folder to Ctrl-C: starts its parts in order, keeps them running, stops them in order.
//!
//! Invariants: one process per data folder; when a part fails the node stops rather than limp; what is announced as listening
//! is listening.

use std::fs::{File, TryLockError};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use coel_gossip::{Handle, Identity};
use coel_model::device::Device;
use coel_store::{Blobs, Command, Log, MemberInfo, Outcome, Timing};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::admission::handshake::{ADDRESSES_MAX, Greeted};
use crate::admission::invite::Invite;
use crate::config::Config;
use crate::control::{Listener, NodeFile};
use crate::experts::{host, wire};
use crate::generation::Generator;
use crate::http::{self, Auth};
use crate::mesh::{PROPOSE_DEADLINE, admit, leader, members, raft};
use crate::metrics::Metrics;
use crate::shared::Shared;
use crate::size::Size;
use crate::weights::{self, wire as weight_wire};
use crate::{commands, hosting, ids};

/// How often load is looked at; gossip decides when it is worth sending.
const LOAD_PERIOD: Duration = Duration::from_millis(250);
/// Longest path of a Unix socket that every system accepts.
const SOCKET_PATH_MAX: usize = 100;

/// How a node comes to be in a mesh.
#[derive(Debug)]
pub enum Origin {
    /// It creates one.
    New,
    /// Its data folder belongs to one.
    Existing,
    /// It was invited to one.
    Join(Invite),
}

/// Why a node did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Another process has the data folder.
    #[error("the data folder {} is in use by another coel process; stop it, or name another folder with --data", .0.display())]
    InUse(PathBuf),
    /// The data folder is in a mesh already.
    #[error("the data folder {} already belongs to a mesh; start it with `coel up --data {}`, or name another folder with --data", .0.display(), .0.display())]
    HasMesh(PathBuf),
    /// The data folder is in no mesh.
    #[error("the data folder {} belongs to no mesh yet; create one with `coel up --new`, or join one with `coel join INVITE`", .0.display())]
    NoMesh(PathBuf),
    /// HTTP cannot listen.
    #[error("HTTP cannot listen on {address}: {source}; stop what uses that port, or name another address with --api")]
    Api { address: std::net::SocketAddr, source: std::io::Error },
    /// Something of the operating system.
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    /// The device asked for is not there.
    #[error("{0}")]
    Device(#[from] coel_model::device::DeviceError),
    /// Memory of a GPU where there is none.
    #[error(
        "--vram {vram} and --device {device}: no GPU can be used here and this node computes on the CPU; leave --vram out, or say \
         with --device cuda:N which GPU, to hear why it cannot be used"
    )]
    VramOfCpu { vram: Size, device: String },
    /// The swarm did not start.
    #[error("{0}")]
    Gossip(#[from] coel_gossip::StartError),
    /// The identity is unusable.
    #[error("{0}")]
    Identity(#[from] coel_gossip::IdentityError),
    /// The log did not open.
    #[error("{0}")]
    Log(#[from] coel_store::LogError),
    /// The blobs did not open.
    #[error("{0}")]
    Blobs(#[from] coel_store::BlobError),
    /// Not admitted.
    #[error("{0}")]
    Join(#[from] admit::JoinError),
    /// A part of the running node failed for good.
    #[error("{0}")]
    Fatal(String),
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> RunError {
    let what = what.into();
    move |source| RunError::Io { what, source }
}

/// Runs a node until it is asked to stop: by a signal, by `coel leave`, or by a fault. `started` hears once it listens.
///
/// # Errors
/// [`RunError`]; everything that was started has been stopped again.
pub async fn run(config: Config, origin: Origin, started: impl FnOnce(&NodeFile) + Send) -> Result<(), RunError> {
    let data = config.data.clone();
    std::fs::create_dir_all(&data).map_err(io(format!("the data folder {}", data.display())))?;
    let _lock = lock(&data)?;
    if let (Some(vram), Device::Cpu) = (config.vram_bytes, config.device.resolve()?) {
        return Err(RunError::VramOfCpu { vram: Size(vram), device: config.device.to_string() });
    }
    let newcomer = matches!(origin, Origin::Join(_));
    match (&origin, Log::exists(&data)) {
        (Origin::New | Origin::Join(_), true) => return Err(RunError::HasMesh(data)),
        (Origin::Existing, false) => return Err(RunError::NoMesh(data)),
        _ => {}
    }
    let api = TcpListener::bind(config.api).await.map_err(|source| RunError::Api { address: config.api, source })?;
    let api_url = format!("http://{}", api.local_addr().map_err(io("HTTP"))?);
    let identity = Identity::load_or_create(&data.join("identity.key"))?;
    let mut swarm = coel_gossip::Config::new(identity);
    swarm.listen = config.listen.clone();
    swarm.peers = config.peers.clone();
    swarm.mdns = config.mdns;
    let gossip = coel_gossip::start(swarm).await?;
    let opened = open(&config, origin, &gossip, &data).await;
    let (log, blobs) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            gossip.shutdown().await;
            return Err(error);
        }
    };
    let shared = Arc::new(Shared::new(config, gossip, log, blobs, Arc::new(Metrics::default()), newcomer));
    let outcome = serve(shared.clone(), api, &api_url, started).await;
    NodeFile::remove(&data);
    shared.log.clone().shutdown().await;
    shared.gossip.clone().shutdown().await;
    if *shared.left.borrow() {
        forget_mesh(&data)?;
    }
    let fatal = shared.fatal.borrow().clone();
    match (outcome, fatal) {
        (Err(error), _) => Err(error),
        (Ok(()), Some(why)) => Err(RunError::Fatal(why)),
        (Ok(()), None) => Ok(()),
    }
}

/// Makes the folder one that belongs to no mesh. Its weights stay: they are good in any mesh.
fn forget_mesh(data: &Path) -> Result<(), RunError> {
    let log = data.join("log");
    std::fs::remove_dir_all(&log).map_err(io(log.display().to_string()))
}

fn lock(data: &Path) -> Result<File, RunError> {
    let file = File::create(data.join("lock")).map_err(io(format!("the data folder {}", data.display())))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(RunError::InUse(data.to_owned())),
        Err(TryLockError::Error(source)) => Err(io(format!("the data folder {}", data.display()))(source)),
    }
}

async fn open(config: &Config, origin: Origin, gossip: &Handle, data: &Path) -> Result<(Log, Arc<Blobs>), RunError> {
    let transport = Arc::new(raft::OverGossip(gossip.clone()));
    let timing = Timing::default();
    let log = match origin {
        Origin::New => {
            let me = MemberInfo {
                peer: ids::peer_key(gossip.local_peer_id()),
                name: config.name.clone(),
                addresses: addresses(gossip),
            };
            Log::create(data, me, transport, timing).await?
        }
        Origin::Existing => {
            let log = Log::open(data, transport, timing).await?;
            let (state, node) = (log.state().borrow().clone(), log.node_id());
            let admitted = state.members.contains_key(&node);
            if !admitted && state.next_node_id > node.0 {
                // It left, and was stopped before it could forget the mesh.
                log.shutdown().await;
                forget_mesh(data)?;
                return Err(RunError::NoMesh(data.to_owned()));
            }
            if !admitted {
                // It was stopped before its log had come to its own admission: what the welcome said is all it knows.
                welcome(gossip, &read_welcome(data));
            }
            log
        }
        Origin::Join(invite) => {
            let admitted = admit::join(gossip, &invite, &config.name, addresses(gossip)).await?;
            write_welcome(data, &admitted.members).map_err(io("the members of the mesh"))?;
            welcome(gossip, &admitted.members);
            Log::join(data, admitted.node, invite.mesh, transport, timing).await?
        }
    };
    info!(node = %log.node_id(), mesh = %log.mesh_id(), peer = %gossip.local_peer_id(), "in the mesh");
    Ok((log, Arc::new(Blobs::open_within(data, config.disk_bytes)?)))
}

/// Lets the members in that a newcomer was told of, until its log tells it.
fn welcome(gossip: &Handle, members: &[Greeted]) {
    let known = members.iter().filter_map(|member| {
        let addresses = members::parse(&member.addresses);
        Some((ids::peer_id(&member.peer)?, addresses))
    });
    gossip.set_members(known.collect());
}

fn welcome_path(data: &Path) -> PathBuf {
    data.join("welcome.json")
}

fn write_welcome(data: &Path, members: &[Greeted]) -> std::io::Result<()> {
    std::fs::write(welcome_path(data), serde_json::to_vec(members)?)
}

fn read_welcome(data: &Path) -> Vec<Greeted> {
    let read = std::fs::read(welcome_path(data)).ok();
    read.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// Where this node listens, as others are told. A machine with many interfaces has many; those beyond itself come first.
pub fn addresses(gossip: &Handle) -> Vec<String> {
    let mut listening: Vec<_> = gossip.listen_addresses().iter().map(ToString::to_string).collect();
    listening.sort_by_key(|address| address.starts_with("/ip4/127.") || address.starts_with("/ip6/::1/"));
    listening.truncate(ADDRESSES_MAX);
    listening
}

/// Starts the node's tasks and waits until one of them, or a person, ends the node.
async fn serve(
    shared: Arc<Shared>,
    api: TcpListener,
    api_url: &str,
    started: impl FnOnce(&NodeFile) + Send,
) -> Result<(), RunError> {
    let data = shared.config.data.clone();
    let socket = socket_path(&data);
    let mut control = Listener::bind(&socket).map_err(io(format!("the control socket {}", socket.display())))?;
    let gossip = &shared.gossip;
    let mut tasks = JoinSet::new();
    let mut part = |name: &'static str, task: BoxTask| {
        tasks.spawn(async move {
            task.await;
            name
        });
    };
    let serve =
        |protocol| gossip.serve(protocol, coel_gossip::Access::Members).map_err(|e| RunError::Fatal(e.to_string()));
    let (raft_in, experts_in) = (serve(raft::PROTOCOL)?, serve(wire::PROTOCOL)?);
    let weights_in = serve(weight_wire::PROTOCOL)?;
    let join_in = gossip
        .serve(admit::PROTOCOL, coel_gossip::Access::Anyone)
        .map_err(|error| RunError::Fatal(error.to_string()))?;
    part("members", Box::pin(members::follow(gossip.clone(), shared.log.clone())));
    part("raft", Box::pin(raft::serve(raft_in, shared.log.clone())));
    part("admission", Box::pin(admit::serve(join_in, shared.log.clone(), gossip.local_peer_id())));
    part("experts", Box::pin(host::serve(experts_in, host::HostHandles::new(&shared))));
    let (blobs, metrics) = (shared.blobs.clone(), shared.metrics.clone());
    part("weights", Box::pin(weights::serve::serve(weights_in, blobs, metrics)));
    part("hosting", Box::pin(hosting::run(shared.clone())));
    part("leader", Box::pin(leader::run(shared.clone())));
    part("load", Box::pin(publish(shared.clone())));
    part("address", Box::pin(readdress(shared.clone())));

    let generator = Arc::new(Generator::new(shared.clone()));
    let stopping = shared.stopping.clone();
    let auth = Auth::new(shared.config.api_key.as_deref());
    let mut web = tokio::spawn(http::serve(api, generator, auth, stopping.clone().cancelled_owned()));

    let file = NodeFile {
        pid: std::process::id(),
        peer_id: gossip.local_peer_id().to_string(),
        name: shared.config.name.clone(),
        api: api_url.to_owned(),
        socket,
    };
    // Whoever reads the file may send a signal at once.
    let (mut interrupt, mut terminate) = signals().map_err(io("signals"))?;
    file.write(&data).map_err(io("node.json"))?;
    info!(api = api_url, "listening");
    started(&file);

    loop {
        tokio::select! {
            () = stopping.cancelled() => break,
            _ = interrupt.recv() => stopping.cancel(),
            _ = terminate.recv() => stopping.cancel(),
            conversation = control.next() => match conversation {
                Ok(conversation) => {
                    tokio::spawn(commands::converse(conversation, shared.clone(), api_url.to_owned()));
                }
                Err(error) => {
                    warn!(%error, "the control socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(ended) = tasks.join_next() => {
                let why = ended.map_or_else(|error| error.to_string(), |name| format!("the part '{name}' ended"));
                shared.fail(why);
            }
        }
    }
    info!("stopping");
    let served = (&mut web).await;
    tasks.shutdown().await;
    match served {
        Ok(Ok(())) => Ok(()),
        Ok(Err(source)) => Err(io("HTTP")(source)),
        Err(error) => Err(RunError::Fatal(error.to_string())),
    }
}

type BoxTask = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

fn signals() -> std::io::Result<(tokio::signal::unix::Signal, tokio::signal::unix::Signal)> {
    Ok((signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?))
}

/// Beside the data, or, where that path is too long for a socket, in the temporary folder under a name of its hash.
fn socket_path(data: &Path) -> PathBuf {
    let beside = data.join("node.sock");
    if beside.as_os_str().len() <= SOCKET_PATH_MAX {
        return beside;
    }
    let hash = blake3::hash(beside.as_os_str().as_encoded_bytes()).to_hex();
    std::env::temp_dir().join(format!("coel-{}.sock", &hash[..16]))
}

/// Tells gossip how loaded this node is, and what there is to know of it.
async fn publish(shared: Arc<Shared>) {
    let mut facts = None;
    let mut busy = cpu_time();
    let mut looked = tokio::time::Instant::now();
    loop {
        if shared.serving.borrow().as_ref().is_some_and(|serving| serving.engine.is_stopped()) {
            shared.fail("the compute thread has stopped, see the log; restart the node".into());
        }
        let now = shared.facts();
        if facts.as_ref() != Some(&now) {
            if let Err(error) = shared.gossip.set_facts(now.encode()) {
                warn!(%error, "this node's facts cannot be told");
            }
            facts = Some(now);
        }
        let budget = shared.config.memory_bytes.max(1) as f64;
        let memory = 1.0 - crate::generation::ledger_bytes(&shared) as f64 / budget;
        let computed = cpu_time();
        let (worked, elapsed) = (computed.saturating_sub(busy), looked.elapsed());
        (busy, looked) = (computed, tokio::time::Instant::now());
        let compute = 1.0 - worked.as_secs_f64() / elapsed.as_secs_f64().max(1e-3);
        shared.gossip.set_status(coel_gossip::Status::from_shares(memory, compute));
        tokio::time::sleep(LOAD_PERIOD).await;
    }
}

/// Processor time of this process so far; nearly all of it is the one compute thread's.
fn cpu_time() -> Duration {
    // SAFETY: getrusage fills the struct it is given, whose fields are plain integers.
    let usage = unsafe {
        let mut usage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let time = |t: libc::timeval| Duration::new(t.tv_sec.max(0) as u64, t.tv_usec.max(0) as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Keeps the log's idea of this node's name and addresses true: a restart may have moved it.
async fn readdress(shared: Arc<Shared>) {
    let node = shared.log.node_id();
    let mut state = shared.log.state();
    loop {
        let (name, addresses) = (shared.config.name.clone(), addresses(&shared.gossip));
        let known = state.borrow_and_update().members.get(&node).cloned();
        if known.is_some_and(|member| member.name != name || member.addresses != addresses) {
            let command = Command::Readdress { node, name, addresses };
            match shared.log.propose(command, PROPOSE_DEADLINE).await {
                Ok(Outcome::Refused(refusal)) => warn!(%refusal, "the log does not take this node's addresses"),
                Ok(_) => {}
                Err(error) => warn!(%error, "the log could not be told this node's addresses; trying again"),
            }
        }
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return std::future::pending().await },
            () = tokio::time::sleep(Duration::from_secs(5)) => {}
        }
    }
}
