//! What the tasks of one node share: handles and figures, each with one owner behind it.
//!
//! Nothing here decides anything. It answers questions that several tasks ask: who is down, which model is placed, how far
//! the node is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use coel_gossip::{Handle, Liveness, PeerId, PeerView};
use coel_model::engine::Engine;
use coel_store::{Blobs, ExpertId, Log, Model, ModelId, NodeId, Placement, Precision, Slice, State};
use rand::seq::SliceRandom;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::hosting;
use crate::hosting::loading::Loading;
use crate::ids;
use crate::library::{Known, Library};
use crate::mesh::facts::Facts;
use crate::mesh::holdings::Holdings;
use crate::mesh::leader::MemberFacts;
use crate::metrics::Metrics;
use crate::status::Importing;
use crate::weights::fetch::{Fetcher, Source};

/// A model with its engine: the trunk is loaded, experts come and go.
#[derive(Clone)]
pub struct Serving {
    /// The model.
    pub known: Arc<Known>,
    /// Where it computes.
    pub engine: Engine,
    /// At which precision the trunk is loaded.
    pub trunk: Precision,
}

impl Serving {
    /// Kernel class and precisions of what is computed here, as told to other homes: `cpu/avx512/exact`, or
    /// `cpu/avx512/q4+q8` where experts of both took part.
    pub fn class(&self, precisions: &BTreeSet<Precision>) -> String {
        let names: Vec<_> = precisions.iter().map(|precision| precision.name()).collect();
        format!("{}/{}", self.engine.class(), names.join("+"))
    }
}

/// Experts that are held, and at which precision.
pub type Held = BTreeMap<ExpertId, Precision>;

/// How far this node is with what it was assigned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the assigned blobs.
    pub bytes_assigned: u64,
    /// Of them, bytes held and verified.
    pub bytes_held: u64,
    /// What does not mend itself by waiting.
    pub problem: Option<String>,
}

/// Shared by the tasks of one node.
pub struct Shared {
    /// The checked configuration.
    pub config: Config,
    /// Who is here.
    pub gossip: Handle,
    /// What was agreed.
    pub log: Log,
    /// Weights on disk.
    pub blobs: Arc<Blobs>,
    /// Weights from peers.
    pub fetcher: Fetcher,
    /// Models, their tensors aside.
    pub library: Library,
    /// The model that is loaded here.
    pub serving: watch::Sender<Option<Serving>>,
    /// Experts held in the engine, in memory or on disk.
    pub held: watch::Sender<Arc<Held>>,
    /// Of these, those that are held on disk and had in memory by turns.
    pub shelved: watch::Sender<BTreeSet<ExpertId>>,
    /// At which precision this node holds the trunk, once it has decided that.
    pub trunk: watch::Sender<Option<Precision>>,
    /// Models of which every blob lies here.
    pub complete: watch::Sender<Vec<ModelId>>,
    /// What lies here of the experts.
    pub holds: watch::Sender<Option<Holdings>>,
    /// Memory of weights that are being loaded.
    pub loading: Loading,
    /// How far the node is.
    pub progress: watch::Sender<Progress>,
    /// What this node counts.
    pub metrics: Arc<Metrics>,
    /// Held by the import that runs.
    pub importing: tokio::sync::Mutex<()>,
    /// What that one does.
    pub import: watch::Sender<Option<Importing>>,
    /// Asks every task to end.
    pub stopping: CancellationToken,
    /// Answers that are being written here.
    pub answers: watch::Sender<usize>,
    /// No answer is begun any more: this node is about to leave.
    pub retiring: watch::Sender<bool>,
    /// This node has just been admitted, in this run of its process.
    pub newcomer: bool,
    /// This node has left the mesh.
    pub left: watch::Sender<bool>,
    /// Why the node must end: the first fatal fault.
    pub fatal: watch::Sender<Option<String>>,
    /// Resident memory when the node had started and knew no model yet, in bytes.
    pub rss_before_bytes: u64,
    planner: Mutex<Option<String>>,
}

/// An answer that is being written; over when dropped.
pub struct Answering(Arc<Shared>);

impl Answering {
    /// `None` while the node retires.
    pub fn begin(shared: &Arc<Shared>) -> Option<Self> {
        shared.answers.send_modify(|answers| *answers += 1);
        let answering = Self(shared.clone());
        // Looked at once it is counted: who retires looks in the other order, so one of the two sees the other.
        (!*shared.retiring.borrow()).then_some(answering)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.answers.send_modify(|answers| *answers -= 1);
    }
}

impl Shared {
    /// The handles put together; nothing is loaded yet.
    pub fn new(
        config: Config,
        gossip: Handle,
        log: Log,
        blobs: Arc<Blobs>,
        metrics: Arc<Metrics>,
        newcomer: bool,
    ) -> Self {
        Self {
            fetcher: Fetcher::new(gossip.clone(), blobs.clone(), metrics.clone()),
            config,
            gossip,
            log,
            blobs,
            library: Library::default(),
            serving: watch::Sender::new(None),
            held: watch::Sender::default(),
            shelved: watch::Sender::default(),
            trunk: watch::Sender::default(),
            complete: watch::Sender::default(),
            holds: watch::Sender::default(),
            loading: Loading::default(),
            progress: watch::Sender::default(),
            metrics,
            importing: tokio::sync::Mutex::default(),
            import: watch::Sender::default(),
            stopping: CancellationToken::new(),
            answers: watch::Sender::default(),
            retiring: watch::Sender::new(false),
            newcomer,
            left: watch::Sender::new(false),
            fatal: watch::Sender::new(None),
            rss_before_bytes: hosting::resident_bytes(),
            planner: Mutex::new(None),
        }
    }

    /// The agreed state as this node has applied it.
    pub fn state(&self) -> Arc<State> {
        self.log.state().borrow().clone()
    }

    /// What gossip says of the peers.
    pub fn peers(&self) -> Arc<BTreeMap<PeerId, PeerView>> {
        self.gossip.peers().borrow().clone()
    }

    /// Members that gossip holds for dead.
    pub fn down(&self) -> BTreeSet<NodeId> {
        let (state, peers) = (self.state(), self.peers());
        let own = self.log.node_id();
        let down = state.members.iter().filter(|&(&node, member)| {
            let view = ids::peer_id(&member.peer).and_then(|peer| peers.get(&peer));
            node != own && view.is_none_or(|view| view.liveness == Liveness::Down)
        });
        down.map(|(&node, _)| node).collect()
    }

    /// Liveness and facts of every member that gossip knows, this node included.
    pub fn facts_of_members(&self, state: &State) -> MemberFacts {
        let peers = self.peers();
        let each = state.members.iter().filter_map(|(&node, member)| {
            if node == self.log.node_id() {
                return Some((node, (Liveness::Up, Some(self.facts()))));
            }
            let view = peers.get(&ids::peer_id(&member.peer)?)?;
            Some((node, (view.liveness, Facts::of(view))))
        });
        each.collect()
    }

    /// This node's facts.
    pub fn facts(&self) -> Facts {
        let memory_bytes = match &*self.serving.borrow() {
            Some(serving) => serving.known.memory_bytes(&self.config, serving.trunk),
            None => self.config.memory_bytes,
        };
        let trunk = *self.trunk.borrow();
        let complete_models = self.complete.borrow().clone();
        let holds = self.holds.borrow().clone();
        Facts {
            memory_bytes,
            disk_bytes: self.config.disk_bytes,
            kv_tokens: self.config.kv_tokens as u64,
            accepts: self.config.precision,
            trunk,
            complete_models,
            holds,
        }
    }

    /// Looks what of the model lies here, and whether that is all of it, for [`Self::facts`]. Looks at files: not from async threads.
    pub fn look_for_all_of(&self, known: &Known) {
        let all = known.manifest.blobs().all(|blob| self.blobs.has(&blob.id));
        let holds = Holdings::of(known.id, &known.manifest, |id| all || self.fetcher.is_expected(id));
        self.holds.send_if_modified(|held| {
            let news = *held != holds;
            *held = holds;
            news
        });
        self.complete.send_if_modified(|complete| {
            let was = complete.contains(&known.id);
            complete.retain(|id| *id != known.id);
            complete.extend(all.then_some(known.id));
            was != all
        });
    }

    /// The model the mesh serves: the placed one, or the first registered before there is a placement.
    pub fn model_to_place<'a>(&self, state: &'a State) -> Option<(ModelId, &'a Model)> {
        let placed = state.placement.as_ref().map(|placement| placement.model);
        let id = placed.or_else(|| state.models.keys().next().copied())?;
        state.models.get(&id).map(|model| (id, model))
    }

    /// Whom to ask for a blob: nodes that hold this slice of the expert in random order, then nodes that have the whole model,
    /// then the other members that are there. `None` is a part of the trunk.
    pub fn sources(&self, state: &State, model: ModelId, expert: Option<(ExpertId, Slice)>) -> Vec<Source> {
        let facts = self.facts_of_members(state);
        let ready: BTreeSet<NodeId> = match (&state.placement, expert) {
            (Some(placement), Some((expert, slice))) => {
                let hosts = placement.hosts(expert).filter(|(_, precision)| slice.is_part_of(*precision));
                hosts.map(|(node, _)| node).collect()
            }
            (Some(placement), None) => placement.trunk_ready.clone(),
            (None, _) => BTreeSet::new(),
        };
        let mut ranked: Vec<_> = state
            .members
            .iter()
            .filter(|&(&node, _)| node != self.log.node_id())
            .filter_map(|(&node, member)| {
                let (liveness, facts) = facts.get(&node)?;
                let complete = facts.as_ref().is_some_and(|facts| facts.complete_models.contains(&model));
                let rank = if ready.contains(&node) { 0 } else { 2 - i32::from(complete) };
                let source = Source { peer: ids::peer_id(&member.peer)?, name: member.name.clone() };
                (*liveness != Liveness::Down).then_some((rank, source))
            })
            .collect();
        ranked.shuffle(&mut rand::rng());
        ranked.sort_by_key(|(rank, _)| *rank);
        ranked.into_iter().map(|(_, source)| source).collect()
    }

    /// Nodes that could compute the expert now, as this node sees it: a ready replica on a live node, or loaded here.
    pub fn live_replicas(&self, placement: &Placement) -> BTreeMap<ExpertId, usize> {
        let (own, down, held) = (self.log.node_id(), self.down(), self.held.borrow().clone());
        let each = placement.replicas.iter().map(|(&expert, nodes)| {
            let others =
                nodes.iter().filter(|(node, replica)| **node != own && replica.ready.is_some() && !down.contains(node));
            (expert, others.count() + usize::from(held.contains_key(&expert)))
        });
        each.collect()
    }

    /// Whether this node's log has come as far as its own admission.
    pub fn caught_up(&self, state: &State) -> bool {
        state.members.contains_key(&self.log.node_id())
    }

    /// What the planner of this node, as leader, has to say.
    pub fn planner(&self) -> Option<String> {
        self.planner.lock().expect("no panic while held").clone()
    }

    /// Notes it.
    pub fn set_planner(&self, word: Option<String>) {
        *self.planner.lock().expect("no panic while held") = word;
    }

    /// Ends the node with an error.
    pub fn fail(&self, why: String) {
        self.fatal.send_if_modified(|fatal| {
            let first = fatal.is_none();
            fatal.get_or_insert(why);
            first
        });
        self.stopping.cancel();
    }
}
