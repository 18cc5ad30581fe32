//! One node, from the data folder to Ctrl-C: starts its tasks in order, keeps them running, stops them in order.
//!
//! Here every task gets the handles that it needs, and no more. Invariants: one process per data folder; when a task fails the node
//! stops instead of going on without it; an address that is announced is being listened on.

use std::fs::{File, TryLockError};
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use coel_gossip::{Access, Duplicate, Handle, Incoming, Protocol};
use coel_model::serve::device::Device;
use coel_store::{Blobs, Log, LogError, MemberInfo, MeshId, NodeId, Timing, replace_file};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::config::{Config, Size};
use crate::control::commands::{self, CommandHandles};
use crate::control::{Listener, NodeFile};
use crate::experts::caller::{Caller, CallerHandles};
use crate::experts::host::{self, HostHandles};
use crate::experts::wire;
use crate::generation::{AnswerGate, Generator, GeneratorHandles};
use crate::hosting::{self, HostingHandles, Loaded};
use crate::http::{self, Auth};
use crate::ids;
use crate::import::{Importer, Imports};
use crate::lifecycle::Lifecycle;
use crate::mesh::admission::handshake::{Greeted, Newcomer};
use crate::mesh::admission::invite::Invite;
use crate::mesh::admission::protocol::{self, Admitted, JoinError};
use crate::mesh::identity::IdentityError;
use crate::mesh::members::Departure;
use crate::mesh::readmission::{self, Readmitted, remove_note};
use crate::mesh::{MeshView, OwnOffer, advert, exclusion, identity, leader, members, raft_network, suspicion};
use crate::metrics::Metrics;
use crate::placement::LeaderReport;
use crate::registry::ModelRegistry;
use crate::status::{ReadinessView, StatusView};
use crate::system::{cpu_time, resident_bytes};
use crate::weights::fetch::Fetcher;
use crate::weights::{self, wire as weight_wire};

/// How often load is sampled; gossip decides when a change is worth sending.
const LOAD_PERIOD: Duration = Duration::from_millis(250);
/// How long a node that is a member already waits for the word of the member that invited it.
const REJOIN_DEADLINE: Duration = Duration::from_secs(5);
/// Longest path of a Unix socket that every system accepts.
const SOCKET_PATH_MAX: usize = 100;

/// How a node gets into a mesh.
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
    Api { address: SocketAddr, source: std::io::Error },
    /// A fault of the operating system.
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    /// The requested device does not exist.
    #[error("{0}")]
    Device(#[from] coel_model::serve::device::DeviceError),
    /// GPU memory was given and no GPU can be used.
    #[error(
        "--vram {vram} and --device {device}: no GPU can be used here, so this node computes on the CPU; leave --vram out, or name the \
         GPU with --device cuda:N to see why it cannot be used"
    )]
    VramOfCpu { vram: Size, device: String },
    /// The swarm did not start.
    #[error("{0}")]
    Gossip(#[from] coel_gossip::StartError),
    /// The identity is unusable.
    #[error("{0}")]
    Identity(#[from] IdentityError),
    /// Another process of this node is alive.
    #[error(
        "another process runs with the identity of this node, {}, and started before this one: the data folder {} is one of two, copied \
         or restored while the original runs. This process has stopped, and the other one goes on. Start only one of them from now on. \
         To make this one a node of its own, give it an empty data folder: `coel join INVITE --data DIR`",
        duplicate.peer, data.display()
    )]
    Duplicate { data: PathBuf, duplicate: Duplicate },
    /// The log did not open.
    #[error("{0}")]
    Log(#[from] LogError),
    /// The blobs did not open.
    #[error("{0}")]
    Blobs(#[from] coel_store::BlobError),
    /// Not admitted.
    #[error("{0}")]
    Join(#[from] JoinError),
    /// A task of the running node failed for good.
    #[error("{0}")]
    Fatal(String),
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> RunError {
    let what = what.into();
    move |source| RunError::Io { what, source }
}

/// Runs a node until it is asked to stop: by a signal, by `coel leave`, or by a fault. Calls `started` once the node listens.
///
/// # Errors
/// [`RunError`]; everything that was started has been stopped again.
pub async fn run(mut config: Config, origin: Origin, started: impl FnOnce(&NodeFile) + Send) -> Result<(), RunError> {
    let data = config.data.clone();
    std::fs::create_dir_all(&data).map_err(io(format!("the data folder {}", data.display())))?;
    let _lock = lock(&data)?;
    if let (Some(vram), Device::Cpu) = (config.limits.vram_bytes, config.device.resolve()?) {
        return Err(RunError::VramOfCpu { vram: Size(vram), device: config.device.to_string() });
    }
    match (&origin, Log::exists(&data) || Readmitted::read(&data).is_some()) {
        (Origin::New, true) => return Err(RunError::HasMesh(data)),
        (Origin::Existing, false) => return Err(RunError::NoMesh(data)),
        _ => {}
    }
    let mut started = Some(started);
    let mut tell = |file: &NodeFile| {
        if let Some(started) = started.take() {
            started(file);
        }
    };
    let mut origin = origin;
    while let Ended::Restart { api } = run_once(config.clone(), origin, &mut tell).await? {
        // Clients find it where it was.
        config.api = api;
        origin = Origin::Existing;
    }
    Ok(())
}

/// How a node ended that did not fail.
enum Ended {
    /// For good.
    Stopped,
    /// To be started anew, with HTTP at the same address.
    Restart {
        /// The address.
        api: SocketAddr,
    },
}

/// Runs a node once. The data folder is this process's.
async fn run_once(
    config: Config,
    origin: Origin,
    started: &mut (dyn FnMut(&NodeFile) + Send),
) -> Result<Ended, RunError> {
    let data = config.data.clone();
    let newcomer = matches!(origin, Origin::Join(_)) && !Log::exists(&data);
    let api = TcpListener::bind(config.api).await.map_err(|source| RunError::Api { address: config.api, source })?;
    let address = api.local_addr().map_err(io("HTTP"))?;
    let api_url = format!("http://{address}");
    let identity = identity::load_or_create(&data.join("identity.key"))?;
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
    let lifecycle = Lifecycle::default();
    let node = Node { config, gossip: gossip.clone(), log: log.clone(), blobs, newcomer, lifecycle: lifecycle.clone() };
    let outcome = serve(node, api, &api_url, started).await;
    NodeFile::remove(&data);
    log.shutdown().await;
    let duplicate = gossip.duplicate();
    gossip.shutdown().await;
    if let Some(duplicate) = duplicate {
        // Whatever else ended did so for this reason.
        return Err(RunError::Duplicate { data, duplicate });
    }
    if lifecycle.has_left() {
        forget_mesh(&data)?;
    }
    match (outcome, lifecycle.fatal()) {
        (Err(error), _) => Err(error),
        (Ok(()), Some(why)) => Err(RunError::Fatal(why)),
        (Ok(()), None) if lifecycle.is_restarting() => Ok(Ended::Restart { api: address }),
        (Ok(()), None) => Ok(Ended::Stopped),
    }
}

/// Makes the folder one that belongs to no mesh. Its weights stay: they are valid in any mesh.
fn forget_mesh(data: &Path) -> Result<(), RunError> {
    let log = data.join("log");
    std::fs::remove_dir_all(&log).map_err(io(log.display().to_string()))
}

/// Takes the data folder for this process, until the file is dropped.
///
/// # Errors
/// [`RunError::InUse`] where another process has it.
pub fn lock(data: &Path) -> Result<File, RunError> {
    let file = File::create(data.join("lock")).map_err(io(format!("the data folder {}", data.display())))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(RunError::InUse(data.to_owned())),
        Err(TryLockError::Error(source)) => Err(io(format!("the data folder {}", data.display()))(source)),
    }
}

async fn open(config: &Config, origin: Origin, gossip: &Handle, data: &Path) -> Result<(Log, Arc<Blobs>), RunError> {
    let transport = Arc::new(raft_network::RaftNetwork(gossip.clone()));
    let timing = Timing::default();
    let log = match origin {
        Origin::New => {
            let me = MemberInfo {
                peer: ids::peer_key(gossip.local_peer_id()),
                name: config.name.clone(),
                addresses: members::own_addresses(gossip),
            };
            Log::create(data, me, transport, timing).await?
        }
        Origin::Existing => open_existing(gossip, data, transport, timing).await?,
        Origin::Join(invite) => {
            let own = if Log::exists(data) { own_membership(data).await? } else { None };
            let former = own.map(|(_, mesh)| mesh).filter(|mesh| *mesh != invite.mesh);
            // A join that was interrupted once the mesh had answered is taken up again. Otherwise a member without a log has lost it.
            let noted = std::fs::read(joining_path(data)).ok();
            let noted: Option<Readmitted> = noted.and_then(|bytes| serde_json::from_slice(&bytes).ok());
            let resumes = own.is_none() && noted.is_some_and(|noted| noted.mesh == invite.mesh);
            let anew = !resumes && own.is_none_or(|(_, mesh)| mesh != invite.mesh);
            let me = Newcomer { name: config.name.clone(), addresses: members::own_addresses(gossip), former, anew };
            let joining = protocol::join(gossip, &invite, me);
            // A member that starts again can do without an answer.
            let joined = match own {
                Some(_) if former.is_none() => timeout(REJOIN_DEADLINE, joining)
                    .await
                    .unwrap_or_else(|_| Err(JoinError::Broken("no answer in time".into()))),
                _ => joining.await,
            };
            match (joined, own) {
                // A restart with the same command line; the mesh may not be there, and the invite may be used up.
                (Ok(Admitted { node, .. }), Some((same, mesh))) if (node, invite.mesh) == (same, mesh) => {
                    open_existing(gossip, data, transport, timing).await?
                }
                (Err(error), Some((_, mesh))) if mesh == invite.mesh => {
                    info!(%error, "this node is a member already; it goes on as one");
                    open_existing(gossip, data, transport, timing).await?
                }
                (Err(error), _) => return Err(error.into()),
                (Ok(admitted), _) => {
                    if Log::exists(data) {
                        let kept = Log::set_aside(data).await?;
                        info!(kept = %kept.display(), "this node joins anew; its former log is kept");
                    }
                    write_welcome(data, &admitted.members).map_err(io("the members of the mesh"))?;
                    let note = Readmitted { node: admitted.node, mesh: invite.mesh };
                    write_joining(data, note).map_err(io("the note of a join"))?;
                    welcome(gossip, &admitted.members);
                    let log = Log::join(data, admitted.node, invite.mesh, transport, timing).await?;
                    remove_note(&joining_path(data)).map_err(io("the note of a join"))?;
                    log
                }
            }
        }
    };
    info!(node = %log.node_id(), mesh = %log.mesh_id(), peer = %gossip.local_peer_id(), "in the mesh");
    Ok((log, Arc::new(Blobs::open_within(data, config.limits.disk_bytes)?)))
}

/// The node, and the mesh, that the data folder belongs to; `None` where its log is damaged, so that it says nothing any more.
async fn own_membership(data: &Path) -> Result<Option<(NodeId, MeshId)>, LogError> {
    match Log::membership(data).await {
        Ok(own) => Ok(Some(own)),
        Err(LogError::Damaged(log)) => {
            warn!(damage = %log.damage, "this node cannot go on as {}; it joins anew", log.member);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Opens the log of a node that is a member already.
async fn open_existing(
    gossip: &Handle,
    data: &Path,
    transport: Arc<raft_network::RaftNetwork>,
    timing: Timing,
) -> Result<Log, RunError> {
    if let Some(Readmitted { node, mesh }) = Readmitted::read(data) {
        let log = match Log::membership(data).await {
            Ok(own) if own == (node, mesh) => Log::open(data, transport, timing).await?,
            _ => {
                if Log::exists(data) {
                    let kept = Log::set_aside(data).await?;
                    info!(kept = %kept.display(), "the former log is kept");
                }
                Log::join(data, node, mesh, transport, timing).await?
            }
        };
        Readmitted::done(data).map_err(io("the note of who this node has become"))?;
        welcome(gossip, &read_welcome(data));
        return Ok(log);
    }
    let log = Log::open(data, transport, timing).await?;
    remove_note(&joining_path(data)).map_err(io("the note of a join"))?;
    let (state, node) = (log.state().borrow().clone(), log.node_id());
    let admitted = state.members.contains_key(&node);
    // One that was readmitted, and stopped before it could take that up, goes on as what it was until it has asked for another id.
    let readmitted = state.node_of(&ids::peer_key(gossip.local_peer_id())).is_some_and(|now| now != node);
    if readmitted {
        return Ok(log);
    }
    if !admitted && state.next_node_id > node.0 {
        // It left, and was stopped before it could forget the mesh.
        log.shutdown().await;
        forget_mesh(data)?;
        return Err(RunError::NoMesh(data.to_owned()));
    }
    if !admitted {
        // It was stopped before its log had reached its own admission: the welcome is all it knows.
        welcome(gossip, &read_welcome(data));
    }
    Ok(log)
}

/// Admits the members that the welcome named, until the log names them.
fn welcome(gossip: &Handle, members: &[Greeted]) {
    let known = members.iter().filter_map(|member| {
        let addresses = members::parse_addresses(&member.addresses);
        Some((ids::peer_id(&member.peer)?, addresses))
    });
    gossip.set_members(known.collect());
}

fn write_joining(data: &Path, note: Readmitted) -> std::io::Result<()> {
    replace_file(&joining_path(data), &serde_json::to_vec(&note)?)
}

/// Says as which node of which mesh a folder was admitted, until it belongs to that node.
fn joining_path(data: &Path) -> PathBuf {
    data.join("joining")
}

fn welcome_path(data: &Path) -> PathBuf {
    data.join("welcome.json")
}

fn write_welcome(data: &Path, members: &[Greeted]) -> std::io::Result<()> {
    replace_file(&welcome_path(data), &serde_json::to_vec(members)?)
}

fn read_welcome(data: &Path) -> Vec<Greeted> {
    let read = std::fs::read(welcome_path(data)).ok();
    read.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// What the tasks of a node are built on.
struct Node {
    config: Config,
    gossip: Handle,
    log: Log,
    blobs: Arc<Blobs>,
    newcomer: bool,
    lifecycle: Lifecycle,
}

/// The handles of one node, wired once.
struct Parts {
    offer: OwnOffer,
    view: MeshView,
    loaded: Loaded,
    metrics: Arc<Metrics>,
    leader_report: Arc<watch::Sender<LeaderReport>>,
    hosting: HostingHandles,
    generator: GeneratorHandles,
    commands: CommandHandles,
}

/// Gives each part of the node the handles it needs.
fn wire_up(node: &Node, api_url: &str) -> Parts {
    let Node { config, gossip, log, blobs, newcomer, lifecycle } = node;
    let limits = config.limits;
    let (metrics, loaded, imports) = (Arc::new(Metrics::default()), Loaded::default(), Imports::default());
    let (offer, leader_report) = (OwnOffer::new(&limits), Arc::new(watch::Sender::new(LeaderReport::default())));
    let fetcher = Fetcher::new(gossip.clone(), blobs.clone(), metrics.clone());
    let registry = ModelRegistry::new(fetcher.clone(), blobs.clone());
    let view = MeshView::new(log.clone(), gossip.clone(), offer.clone(), registry.clone());
    let hosting = HostingHandles {
        limits,
        device: config.device,
        view: view.clone(),
        registry: registry.clone(),
        blobs: blobs.clone(),
        fetcher: fetcher.clone(),
        offer: offer.clone(),
        loaded: loaded.clone(),
        imports: imports.clone(),
        metrics: metrics.clone(),
        lifecycle: lifecycle.clone(),
        newcomer: *newcomer,
        remote_experts: Arc::new(Caller::new(CallerHandles {
            loaded: loaded.downgrade(),
            view: view.clone(),
            metrics: metrics.clone(),
        })),
        rows_max: wire::rows_max,
    };
    let importer = Importer {
        data: config.data.clone(),
        limits,
        view: view.clone(),
        registry: registry.clone(),
        blobs: blobs.clone(),
        fetcher,
        offer: offer.clone(),
        imports: imports.clone(),
        lifecycle: lifecycle.clone(),
    };
    let readiness =
        ReadinessView { view: view.clone(), loaded: loaded.clone(), imports, leader_report: leader_report.clone() };
    let status = StatusView {
        name: config.name.clone(),
        api: api_url.to_owned(),
        view: view.clone(),
        registry,
        loaded: loaded.clone(),
        blobs: blobs.clone(),
        readiness: readiness.clone(),
        metrics: metrics.clone(),
        memory_bytes: limits.memory_bytes,
        rss_before_bytes: resident_bytes(),
    };
    let answers = AnswerGate::default();
    let generator = GeneratorHandles {
        view: view.clone(),
        loaded: loaded.clone(),
        readiness,
        answers: answers.clone(),
        metrics: metrics.clone(),
        lifecycle: lifecycle.clone(),
        kv_tokens: limits.kv_tokens,
        memory_bytes: limits.memory_bytes,
    };
    let commands = CommandHandles {
        view: view.clone(),
        status,
        importer,
        answers,
        departure: Departure::default(),
        lifecycle: lifecycle.clone(),
    };
    Parts { offer, view, loaded, metrics, leader_report, hosting, generator, commands }
}

/// Starts the node's tasks and waits until one of them, or a person, ends the node.
async fn serve(
    node: Node,
    api: TcpListener,
    api_url: &str,
    started: &mut (dyn FnMut(&NodeFile) + Send),
) -> Result<(), RunError> {
    let data = node.config.data.clone();
    let socket = socket_path(&data);
    let mut control = Listener::bind(&socket).map_err(io(format!("the control socket {}", socket.display())))?;
    let parts = wire_up(&node, api_url);
    let Node { config, gossip, log, blobs, lifecycle, .. } = node;
    let mut tasks = JoinSet::new();
    let mut task = |name: &'static str, task: BoxTask| {
        tasks.spawn(async move {
            task.await;
            name
        });
    };
    let load = sample_load(gossip.clone(), parts.loaded.clone(), config.limits.memory_bytes, lifecycle.clone());
    task("suspicion", Box::pin(suspicion::follow(parts.view.clone())));
    task("progress", Box::pin(readmission::hear_others(parts.view.clone())));
    task("readmission", Box::pin(readmission::follow(parts.view.clone(), data.clone(), lifecycle.clone())));
    task("exclusion", Box::pin(exclusion::follow(parts.view.clone())));
    task("members", Box::pin(members::follow(gossip.clone(), log.clone())));
    let calls = Calls { gossip: gossip.clone(), lifecycle: lifecycle.clone() };
    let (raft_log, join_view) = (log.clone(), parts.view.clone());
    task("raft", calls.serve(raft_network::PROTOCOL, Access::Members, |calls| raft_network::serve(calls, raft_log)));
    task("admission", calls.serve(protocol::PROTOCOL, Access::Anyone, move |calls| protocol::serve(calls, join_view)));
    let experts = HostHandles { loaded: parts.loaded.clone(), metrics: parts.metrics.clone() };
    task("experts", calls.serve(wire::PROTOCOL, Access::Members, |calls| host::serve(calls, experts)));
    let metrics = parts.metrics;
    let serve_weights = |calls| weights::serve::serve(calls, blobs, metrics);
    task("weights", calls.serve(weight_wire::PROTOCOL, Access::Members, serve_weights));
    task("claims", Box::pin(hosting::claims::follow(parts.view.clone(), parts.loaded)));
    task("hosting", Box::pin(hosting::run(parts.hosting)));
    let (name, departure) = (config.name.clone(), parts.commands.departure.clone());
    task("membership", Box::pin(members::stop_if_removed(log.clone(), lifecycle.clone())));
    task("entry", Box::pin(members::keep_own_entry(parts.view.clone(), name, departure)));
    task("leader", Box::pin(leader::run(parts.view, parts.leader_report)));
    task("offer", Box::pin(advert::publish(gossip.clone(), parts.offer, log.clone())));
    task("load", Box::pin(load));

    let generator = Arc::new(Generator::new(parts.generator));
    let stopping = lifecycle.stopping().clone();
    let auth = Auth::new(config.api_key.as_deref());
    let mut web = tokio::spawn(http::serve(api, generator, auth, stopping.clone().cancelled_owned()));

    let file = NodeFile {
        pid: std::process::id(),
        peer_id: gossip.local_peer_id().to_string(),
        name: config.name,
        api: api_url.to_owned(),
        socket,
    };
    // A reader of the file may send a signal at once.
    let (mut interrupt, mut terminate) = signals().map_err(io("signals"))?;
    file.write(&data).map_err(io("node.json"))?;
    info!(api = api_url, "listening");
    started(&file);

    loop {
        tokio::select! {
            () = stopping.cancelled() => break,
            // This process is a duplicate.
            () = gossip.stopped() => lifecycle.stop(),
            _ = interrupt.recv() => lifecycle.stop(),
            _ = terminate.recv() => lifecycle.stop(),
            conversation = control.next() => match conversation {
                Ok(conversation) => {
                    tokio::spawn(commands::converse(conversation, parts.commands.clone()));
                }
                Err(error) => {
                    warn!(%error, "the control socket cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(ended) = tasks.join_next() => {
                let why = ended.map_or_else(|error| error.to_string(), |name| format!("the task '{name}' ended"));
                lifecycle.fail(why);
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

/// What serves the calls of other nodes needs.
struct Calls {
    gossip: Handle,
    lifecycle: Lifecycle,
}

impl Calls {
    /// Serves a protocol until the swarm stops. Not before it is known that this process is the node: a call that reaches a copy
    /// must not be answered there.
    fn serve<F: Future<Output = ()> + Send>(
        &self,
        protocol: Protocol,
        access: Access,
        serve: impl FnOnce(Incoming) -> F + Send + 'static,
    ) -> BoxTask {
        let (gossip, lifecycle) = (self.gossip.clone(), self.lifecycle.clone());
        Box::pin(async move {
            if gossip.confirmed().await.is_err() {
                return;
            }
            match gossip.serve(protocol, access) {
                Ok(incoming) => serve(incoming).await,
                Err(error) => lifecycle.fail(error.to_string()),
            }
        })
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

/// Samples how loaded this node is and tells gossip; ends the node when the compute thread has stopped.
async fn sample_load(gossip: Handle, loaded: Loaded, memory_bytes: u64, lifecycle: Lifecycle) {
    let mut busy = cpu_time();
    let mut sampled = tokio::time::Instant::now();
    loop {
        if let Some(engine) = loaded.model().map(|model| model.engine).filter(|engine| engine.is_stopped()) {
            let why = engine.fault().unwrap_or_else(|| "it has stopped, see the log".into());
            lifecycle.fail(format!("the compute thread: {why}; restart the node"));
        }
        let memory = 1.0 - loaded.ledger_bytes() as f64 / memory_bytes.max(1) as f64;
        let computed = cpu_time();
        let (worked, elapsed) = (computed.saturating_sub(busy), sampled.elapsed());
        (busy, sampled) = (computed, tokio::time::Instant::now());
        let compute = 1.0 - worked.as_secs_f64() / elapsed.as_secs_f64().max(1e-3);
        gossip.set_status(coel_gossip::Status::from_shares(memory, compute));
        tokio::time::sleep(LOAD_PERIOD).await;
    }
}
