//! What must hold after every step, in one place.
//!
//! | invariant | |
//! |---|---|
//! | applied prefixes agree | of one mesh, equal index means equal digest of all entries and outcomes |
//! | one leader a term | |
//! | an epoch only grows | in every process |
//! | a replica is on a member | |
//! | ready by its own word | a replica is ready only if its node said so of itself |
//! | one peer per node id | for good, in all meshes that go on from one another |
//! | tokens are the undisturbed ones | of every answer that does not end with an error |
//! | acknowledged is kept | what was acknowledged is in the state of every node in the end |

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coel_store::simulation::Process;
use coel_store::{Epoch, ExpertId, MeshId, NodeId, Peer, Precision, State, TokenHash};

/// What was seen so far; cloning the handle is cheap.
#[derive(Clone, Default)]
pub struct Checker(Arc<Mutex<Seen>>);

#[derive(Default)]
struct Seen {
    violation: Option<String>,
    digests: BTreeMap<(MeshId, u64), [u8; 16]>,
    leaders: BTreeMap<(MeshId, u64), NodeId>,
    epochs: BTreeMap<(MeshId, Process), Epoch>,
    words: BTreeSet<(NodeId, ExpertId, Precision)>,
    peers: BTreeMap<NodeId, Peer>,
    acknowledged: BTreeSet<TokenHash>,
    disks_lie: bool,
    answers: u64,
    /// So much happened.
    steps: u64,
    /// A hash of it.
    trace: [u8; 32],
}

impl Checker {
    fn with<T>(&self, look: impl FnOnce(&mut Seen) -> T) -> T {
        look(&mut self.0.lock().unwrap())
    }

    /// The first thing that went wrong.
    pub fn violation(&self) -> Option<String> {
        self.with(|seen| seen.violation.clone())
    }

    /// A hash of all that was seen, and when: equal for equal histories.
    pub fn trace(&self) -> [u8; 32] {
        self.with(|seen| seen.trace)
    }

    pub fn steps(&self) -> u64 {
        self.with(|seen| seen.steps)
    }

    pub fn violated(&self, what: String) {
        self.with(|seen| _ = seen.violation.get_or_insert(what));
    }

    /// A node has applied this state.
    pub fn applied(&self, at: Duration, process: Process, peer: &Peer, state: &State) {
        let found = self.with(|seen| {
            seen.note(format!("{at:?} {peer} {:?}", state.applied));
            seen.check(process, state)
        });
        if let Err(what) = found {
            self.violated(what);
        }
    }

    /// A node says that it leads.
    pub fn leads(&self, at: Duration, mesh: MeshId, term: u64, node: NodeId) {
        self.with(|seen| seen.note(format!("{at:?} {node} leads {term}")));
        let first = self.with(|seen| *seen.leaders.entry((mesh, term)).or_insert(node));
        if first != node {
            self.violated(format!("nodes {first} and {node} both led term {term}"));
        }
    }

    /// An answer came to its end, without an error.
    pub fn answered(&self) {
        self.with(|seen| seen.answers += 1);
    }

    pub fn answers(&self) -> u64 {
        self.with(|seen| seen.answers)
    }

    /// A person has had a mesh go on from one survivor: what only others had is lost.
    pub fn recovered(&self) {
        self.with(|seen| seen.acknowledged.clear());
    }

    /// From now on a disk may have gone back.
    pub fn disks_lie(&self) {
        self.with(|seen| seen.disks_lie = true);
    }

    /// A node takes its log for another than it was: wrongly, where every disk has kept its word.
    pub fn lost_standing(&self, what: &str) {
        if !self.with(|seen| seen.disks_lie) {
            self.violated(format!("{what}, and every disk has kept its word"));
        }
    }

    /// A node says of itself that it holds an expert.
    pub fn said(&self, node: NodeId, expert: ExpertId, precision: Precision) {
        self.with(|seen| seen.words.insert((node, expert, precision)));
    }

    /// A command was acknowledged.
    pub fn acknowledged(&self, token: TokenHash) {
        self.with(|seen| seen.acknowledged.insert(token));
    }

    /// How many were.
    pub fn acknowledgements(&self) -> usize {
        self.with(|seen| seen.acknowledged.len())
    }

    /// The end: this state must have everything that was acknowledged.
    pub fn is_whole(&self, state: &State) {
        let lost =
            self.with(|seen| seen.acknowledged.iter().filter(|token| !state.invites.contains_key(token)).count());
        if lost > 0 {
            self.violated(format!("{lost} acknowledged commands are lost"));
        }
    }
}

impl Seen {
    fn note(&mut self, what: String) {
        self.steps += 1;
        trace(&what);
        self.trace = *blake3::Hasher::new().update(&self.trace).update(what.as_bytes()).finalize().as_bytes();
    }

    fn check(&mut self, process: Process, state: &State) -> Result<(), String> {
        let applied = state.applied;
        let known = *self.digests.entry((state.mesh, applied.index)).or_insert(applied.digest);
        if known != applied.digest {
            return Err(format!("two histories of mesh {} up to entry {}", state.mesh, applied.index));
        }
        for (&node, member) in &state.members {
            let first = self.peers.entry(node).or_insert_with(|| member.peer.clone());
            if *first != member.peer {
                return Err(format!("node id {node} is two peers"));
            }
        }
        let epoch = self.epochs.entry((state.mesh, process)).or_default();
        if state.epoch() < *epoch {
            return Err(format!("the epoch went back from {epoch} to {}", state.epoch()));
        }
        *epoch = state.epoch();
        let Some(placement) = &state.placement else { return Ok(()) };
        for (expert, hosts) in &placement.replicas {
            for (node, replica) in hosts {
                if !state.members.contains_key(node) {
                    return Err(format!("a replica of {expert} is on node {node}, which is no member"));
                }
                if let Some(ready) = replica.ready
                    && !self.words.contains(&(*node, *expert, ready))
                {
                    return Err(format!("node {node} has never said that it holds {expert} at {ready}"));
                }
            }
        }
        Ok(())
    }
}

/// Prints what happens, where `COEL_TRACE` is set.
pub fn trace(what: &str) {
    if std::env::var_os("COEL_TRACE").is_some() {
        println!("{what}");
    }
}
