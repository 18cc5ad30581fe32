//! What the mesh agreed on: its members, its invites, its models, and where each expert lives.
//!
//! | module | idea |
//! |---|---|
//! | this one | [`State`], the value that the placement log replicates |
//! | [`command`] | what can be asked of it, and what it can answer |
//! | [`apply`] | the pure step from a state and a command to the next state; who may ask for what |
//!
//! The state holds decisions only: liveness, load and the content of disks never enter it. Equal logs give equal states,
//! down to the encoded byte.
//!
//! Invariants, kept by [`apply`]: the epoch only grows; node ids are never reused; every replica is on a member; a
//! replica is `ready` only by its own node's word, at the precision that the node said; only the leader places.

pub mod apply;
pub mod command;

use crate::ids::{Epoch, ExpertId, MeshId, ModelId, NodeId, Peer, TokenHash};
use crate::precision::{Bounds, Precision};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Most former meshes that are remembered.
const FORMER_MAX: usize = 8;

/// The replicated state. `Default` is a log before its first command.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Which mesh this is; all zero before it is created.
    pub mesh: MeshId,
    /// The nodes that were admitted and have not left.
    pub members: BTreeMap<NodeId, Member>,
    /// The id of the next newcomer.
    pub next_node_id: u64,
    /// Open and used-up invites by the hash of their token.
    pub invites: BTreeMap<TokenHash, Invite>,
    /// The registered models.
    pub models: BTreeMap<ModelId, Model>,
    /// Where the experts of the served model live, once that is decided.
    pub placement: Option<Placement>,
    /// At which precisions experts may be placed.
    pub precisions: Bounds,
    /// Which part of the log this is the outcome of.
    #[serde(default)]
    pub applied: Applied,
    /// The meshes that this one goes on from, the latest last; none unless it was recovered.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<FormerMesh>,
}

/// A part of the log, from its beginning: two nodes that applied as much with another digest have parted for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Applied {
    /// The index of its last entry.
    pub index: u64,
    /// A hash of all its entries and their outcomes.
    pub digest: [u8; 16],
}

impl Applied {
    /// This part and one entry more, given by its bytes and those of its outcome.
    pub(crate) fn then(self, index: u64, entry: &[u8], outcome: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for bytes in [self.digest.as_slice(), &index.to_le_bytes(), entry, outcome] {
            hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        }
        let mut digest = [0; 16];
        digest.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self { index, digest }
    }
}

/// A mesh that lost its voters, and the members that have not joined the mesh that goes on from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormerMesh {
    /// Which mesh.
    pub mesh: MeshId,
    /// The members it had, without those that follow.
    pub members: BTreeMap<NodeId, MemberInfo>,
}

/// How a node introduces itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberInfo {
    /// Its network identity.
    pub peer: Peer,
    /// Its name, for people.
    pub name: String,
    /// Where it was last reachable, in the transport's own spelling.
    pub addresses: Vec<String>,
}

/// An admitted node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its network identity.
    pub peer: Peer,
    /// Its name, for people.
    pub name: String,
    /// Where it was last reachable, in the transport's own spelling.
    pub addresses: Vec<String>,
    /// It announced that it leaves: nothing new is placed on it.
    pub leaving: bool,
}

/// Permission to join, known by the hash of its token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invite {
    /// How many more nodes it admits.
    pub uses_left: u32,
    /// When it ends, in milliseconds since the Unix epoch.
    pub expires_at_ms: u64,
}

/// A registered model. Its content is in the manifest that its id hashes; here is what was measured on it, which depends
/// on a text and on the machine that measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// The name people use; unique among the models.
    pub name: String,
    /// Length of the encoded manifest in bytes, so that a fetch knows what to expect.
    pub manifest_bytes: u64,
    /// `[layer][expert]` routed rows counted at import. Its shape is also the list of the model's
    /// experts; empty means that nothing was counted.
    pub popularity: Vec<Vec<u32>>,
    /// Which text the popularity was counted on.
    pub popularity_text: String,
    /// `[layer][expert]`: what an expert's output loses at Q4 and at Q8 on that text, as squared error
    /// relative to what its layer puts out for a row. The shape is the popularity's; empty means that
    /// nothing was measured.
    pub sensitivity: Vec<Vec<Loss>>,
}

/// Relative squared error of an expert's output by precision; none where it is exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// At Q4.
    pub q4: f32,
    /// At Q8.
    pub q8: f32,
}

impl Model {
    /// Whether the model has this expert. A model whose experts were not counted has any.
    pub fn has(&self, expert: ExpertId) -> bool {
        self.popularity.is_empty()
            || self
                .popularity
                .get(usize::from(expert.layer))
                .is_some_and(|layer| usize::from(expert.index) < layer.len())
    }

    /// Every expert that was counted at import, in order.
    pub fn experts(&self) -> impl Iterator<Item = ExpertId> + '_ {
        self.popularity
            .iter()
            .enumerate()
            .flat_map(|(layer, row)| (0..row.len()).map(move |index| ExpertId::new(layer as u16, index as u16)))
    }
}

/// One copy of an expert on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// At which precision it is to be held.
    pub precision: Precision,
    /// The precision at which the node said it holds the replica, verified and loaded. A precision other than the
    /// wanted one serves until that is there.
    pub ready: Option<Precision>,
}

impl Replica {
    /// A replica that its node has not reported yet.
    pub fn wanted(precision: Precision) -> Self {
        Self { precision, ready: None }
    }

    /// Whether the replica is held as wanted.
    pub fn is_settled(&self) -> bool {
        self.ready == Some(self.precision)
    }
}

/// Where each expert of the served model lives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    /// The version; it only grows.
    pub epoch: Epoch,
    /// The model that is placed.
    pub model: ModelId,
    /// For each expert its replicas. An expert that lost its last replica stays, with none.
    pub replicas: BTreeMap<ExpertId, BTreeMap<NodeId, Replica>>,
    /// The nodes that said they hold the trunk, verified.
    pub trunk_ready: BTreeSet<NodeId>,
}

impl Placement {
    /// The share of experts that have a ready replica, 0 to 1.
    pub fn coverage(&self) -> f64 {
        if self.replicas.is_empty() {
            return 1.0;
        }
        let ready = self.replicas.len() - self.missing().len();
        ready as f64 / self.replicas.len() as f64
    }

    /// The smallest number of ready replicas of any expert.
    pub fn replicas_min(&self) -> usize {
        let ready = |hosts: &BTreeMap<NodeId, Replica>| hosts.values().filter(|r| r.ready.is_some()).count();
        self.replicas.values().map(ready).min().unwrap_or(0)
    }

    /// What `node` is to hold.
    pub fn of(&self, node: NodeId) -> impl Iterator<Item = (ExpertId, Replica)> + '_ {
        self.replicas.iter().filter_map(move |(expert, hosts)| hosts.get(&node).map(|r| (*expert, *r)))
    }

    /// The nodes that said they hold `expert`, in ascending order, and at which precision they do.
    pub fn hosts(&self, expert: ExpertId) -> impl Iterator<Item = (NodeId, Precision)> + '_ {
        self.replicas.get(&expert).into_iter().flatten().filter_map(|(node, replica)| Some((*node, replica.ready?)))
    }

    /// The experts without a ready replica.
    pub fn missing(&self) -> Vec<ExpertId> {
        let lost = |hosts: &BTreeMap<NodeId, Replica>| hosts.values().all(|r| r.ready.is_none());
        self.replicas.iter().filter(|(_, hosts)| lost(hosts)).map(|(expert, _)| *expert).collect()
    }
}

impl State {
    /// The node id of a peer, if it is a member.
    pub fn node_of(&self, peer: &Peer) -> Option<NodeId> {
        self.members.iter().find(|(_, member)| member.peer == *peer).map(|(node, _)| *node)
    }

    /// The current epoch; zero before anything was placed.
    pub fn epoch(&self) -> Epoch {
        self.placement.as_ref().map_or(Epoch(0), |placement| placement.epoch)
    }

    /// The state with which a mesh goes on that has lost its voters: `node` is its only member, and it is called `mesh`. Models
    /// and precisions stay; of the placement stays what is on `node`, to be verified and reported again. Node ids are
    /// not used again. `None` if `node` is no member.
    pub fn recovered(&self, node: NodeId, mesh: MeshId) -> Option<Self> {
        let mut others = self.members.clone();
        let survivor = others.remove(&node)?;
        let info = |member: Member| MemberInfo { peer: member.peer, name: member.name, addresses: member.addresses };
        let others = others.into_iter().map(|(node, member)| (node, info(member))).collect();
        let mut former = self.former.clone();
        former.push(FormerMesh { mesh: self.mesh, members: others });
        former.drain(..former.len().saturating_sub(FORMER_MAX));
        let placement = self.placement.as_ref().map(|placement| {
            let own = |replicas: &BTreeMap<NodeId, Replica>| {
                let kept = replicas.get(&node).map(|replica| Replica { ready: None, ..*replica });
                kept.map(|replica| (node, replica)).into_iter().collect()
            };
            Placement {
                epoch: placement.epoch.next(),
                model: placement.model,
                replicas: placement.replicas.iter().map(|(expert, replicas)| (*expert, own(replicas))).collect(),
                trunk_ready: BTreeSet::new(),
            }
        });
        Some(Self {
            mesh,
            members: BTreeMap::from([(node, Member { leaving: false, ..survivor })]),
            next_node_id: self.next_node_id,
            invites: BTreeMap::new(),
            models: self.models.clone(),
            placement,
            precisions: self.precisions,
            applied: self.applied,
            former,
        })
    }

    /// Whether this mesh goes on from that one.
    pub fn follows(&self, mesh: MeshId) -> bool {
        self.former.iter().any(|former| former.mesh == mesh)
    }

    /// The model that `text` names: by its name, or by its id in hex.
    pub fn model(&self, text: &str) -> Option<(ModelId, &Model)> {
        let by_id = text.parse().ok().and_then(|id: ModelId| self.models.get_key_value(&id));
        by_id.or_else(|| self.models.iter().find(|(_, model)| model.name == text)).map(|(id, m)| (*id, m))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement(rows: &[(u16, &[(u64, bool)])]) -> Placement {
        let replica = |(node, ready): &(u64, bool)| {
            (NodeId(*node), Replica { precision: Precision::Exact, ready: ready.then_some(Precision::Q8) })
        };
        let expert =
            |(index, hosts): &(u16, &[(u64, bool)])| (ExpertId::new(0, *index), hosts.iter().map(replica).collect());
        Placement {
            epoch: Epoch(1),
            model: ModelId([1; 32]),
            replicas: rows.iter().map(expert).collect(),
            trunk_ready: BTreeSet::new(),
        }
    }

    #[test]
    fn coverage_counts_ready_replicas_only() {
        let all = placement(&[(0, &[(1, true), (2, true)]), (1, &[(2, true), (3, true)])]);
        assert_eq!((all.coverage(), all.replicas_min(), all.missing()), (1.0, 2, vec![]));
        let half = placement(&[(0, &[(1, true), (2, false)]), (1, &[(2, false)])]);
        assert_eq!((half.coverage(), half.replicas_min()), (0.5, 0));
        assert_eq!(half.missing(), [ExpertId::new(0, 1)]);
        assert_eq!(half.of(NodeId(2)).map(|(e, _)| e.index).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(half.hosts(ExpertId::new(0, 0)).collect::<Vec<_>>(), [(NodeId(1), Precision::Q8)]);
        assert!(!half.of(NodeId(1)).any(|(_, replica)| replica.is_settled()));
        assert_eq!(half.hosts(ExpertId::new(9, 9)).count(), 0);
        let lost = placement(&[(0, &[])]);
        assert_eq!((lost.coverage(), lost.replicas_min()), (0.0, 0));
    }

    #[test]
    fn a_recovered_mesh_keeps_what_the_survivor_has() {
        let member = |name: &str| Member {
            peer: Peer(name.as_bytes().to_vec()),
            name: name.into(),
            addresses: vec![format!("/memory/{name}")],
            leaving: true,
        };
        let state = State {
            mesh: MeshId([1; 16]),
            members: [(NodeId(1), member("a")), (NodeId(3), member("c"))].into(),
            next_node_id: 4,
            invites: [(TokenHash([7; 32]), Invite { uses_left: 1, expires_at_ms: 9 })].into(),
            models: [(ModelId([1; 32]), Model::default())].into(),
            placement: Some(placement(&[(0, &[(1, true), (3, true)]), (1, &[(1, true)])])),
            ..State::default()
        };
        let next = state.recovered(NodeId(3), MeshId([2; 16])).unwrap();
        assert_eq!((next.mesh, next.next_node_id, &next.models), (MeshId([2; 16]), 4, &state.models));
        assert_eq!(next.members, [(NodeId(3), Member { leaving: false, ..member("c") })].into());
        assert!(next.invites.is_empty(), "they were for the former mesh");
        let placed = next.placement.as_ref().unwrap();
        assert_eq!((placed.epoch, placed.of(NodeId(3)).count(), placed.missing().len()), (Epoch(2), 1, 2));
        assert!(placed.of(NodeId(1)).next().is_none() && placed.trunk_ready.is_empty());
        assert!(next.follows(state.mesh) && !next.follows(next.mesh));
        assert_eq!(next.former[0].members[&NodeId(1)].name, "a");
        assert_eq!(state.recovered(NodeId(2), MeshId([2; 16])), None, "it is no member");
        let mut again = next;
        for generation in 0..20 {
            again = again.recovered(NodeId(3), MeshId([generation; 16])).unwrap();
        }
        assert_eq!(again.former.len(), FORMER_MAX);
    }

    #[test]
    fn a_model_is_found_by_name_and_by_id() {
        let id = ModelId([3; 32]);
        let model = Model {
            name: "tiny".into(),
            manifest_bytes: 1,
            popularity: vec![vec![1, 2], vec![3]],
            popularity_text: "none".into(),
            sensitivity: Vec::new(),
        };
        assert!(model.has(ExpertId::new(1, 0)) && !model.has(ExpertId::new(1, 1)));
        assert_eq!(model.experts().map(|e| e.to_string()).collect::<Vec<_>>(), ["0.0", "0.1", "1.0"]);
        let state = State { models: BTreeMap::from([(id, model)]), ..State::default() };
        assert_eq!(state.model("tiny").map(|m| m.0), Some(id));
        assert_eq!(state.model(&id.to_string()).map(|m| m.0), Some(id));
        assert_eq!(state.model("other"), None);
    }
}
