//! Puts the status document together from what the node's parts say.

use std::collections::BTreeMap;
use std::sync::Arc;

use coel_gossip::Liveness;
use coel_store::{Blobs, Member, NodeId, Placement, State, cbor};

use super::warnings::{full_disk, warnings};
use super::{Counts, NodeStatus, OwnStatus, ReadinessView, ReplicaStatus, Status, expert_key};
use crate::hosting::Loaded;
use crate::ids;
use crate::mesh::MeshView;
use crate::mesh::readmission::explain;
use crate::metrics::Metrics;
use crate::registry::{ModelMeta, ModelRegistry};
use crate::service::ModelInfo;

/// What the status document is made from.
#[derive(Clone)]
pub struct StatusView {
    /// This node's name.
    pub name: String,
    /// Where its HTTP listens.
    pub api: String,
    /// The mesh.
    pub view: MeshView,
    /// Models without tensors.
    pub registry: ModelRegistry,
    /// What is loaded here.
    pub loaded: Loaded,
    /// Weights on disk.
    pub blobs: Arc<Blobs>,
    /// Whether a request would be served.
    pub readiness: ReadinessView,
    /// What this node counts.
    pub metrics: Arc<Metrics>,
    /// Memory for models that was configured, in bytes.
    pub memory_bytes: u64,
    /// Resident memory after the start, in bytes.
    pub rss_before_bytes: u64,
}

impl StatusView {
    /// The node's view, now.
    pub fn now(&self) -> Status {
        let (log, state) = (self.view.log(), self.view.state());
        let readiness = self.readiness.now();
        let placement = state.placement.as_ref();
        let leader_report = self.readiness.leader_report();
        let held = self.loaded.held();
        let live = placement.map(|placement| self.view.live_replicas(placement, &held)).unwrap_or_default();
        let info = |id: &coel_store::ModelId| {
            state.models.get(id).map(|model| ModelInfo { id: id.to_string(), name: model.name.clone() })
        };
        let table = placement.into_iter().flat_map(|placement| &placement.replicas).map(|(&expert, nodes)| {
            let replicas = nodes.iter().map(|(&node, replica)| ReplicaStatus {
                node,
                precision: replica.precision,
                serves: replica.ready,
                ready: replica.is_settled(),
            });
            (expert_key(expert), replicas.collect())
        });
        Status {
            mesh: log.mesh_id().to_string(),
            node_id: self.view.node(),
            name: self.name.clone(),
            peer_id: self.view.gossip().local_peer_id().to_string(),
            api: self.api.clone(),
            device: self.loaded.model().map(|model| model.engine.class().to_string()),
            leader: self.view.leader(),
            term: log.term(),
            applied: log.applied(),
            state_hash: state_hash(&state),
            epoch: state.epoch().0,
            models: state.models.keys().filter_map(info).collect(),
            model: placement.and_then(|placement| info(&placement.model)),
            precisions: state.precisions,
            coverage: readiness.coverage,
            replicas_min: live.into_values().min().unwrap_or(0),
            planner: leader_report.problem,
            awaited: leader_report.awaited.into_iter().collect(),
            warnings: self.warnings(&state),
            importing: self.readiness.imports.progress(),
            readiness,
            nodes: self.members(&state),
            own: self.own(),
            placement: table.collect::<BTreeMap<_, _>>(),
        }
    }

    fn warnings(&self, state: &State) -> Vec<String> {
        let log = self.view.log();
        let standing = Some(explain(*log.standing().borrow())).filter(|said| !said.is_empty());
        let parted = log.parted().borrow().keys().copied().collect();
        let others = warnings(state, &self.view.quorum(), self.view.copied(), parted);
        let full = full_disk(log.full_disk(), self.blobs.full_disk());
        full.into_iter().chain(standing).chain(self.view.exclusion()).chain(others).collect()
    }

    fn members(&self, state: &State) -> Vec<NodeStatus> {
        let (peers, voters) = (self.view.peers(), self.view.log().voters().borrow().clone());
        let placement = state.placement.as_ref();
        let meta = placement.and_then(|placement| self.registry.get(placement.model));
        let each = state.members.iter().map(|(&node_id, member)| {
            let view = ids::peer_id(&member.peer).and_then(|peer| peers.get(&peer));
            let status = self.member(node_id, member, view, placement, meta.as_deref());
            NodeStatus { voter: voters.contains(&node_id), ..status }
        });
        each.collect()
    }

    fn member(
        &self,
        node_id: NodeId,
        member: &Member,
        view: Option<&coel_gossip::PeerView>,
        placement: Option<&Placement>,
        meta: Option<&ModelMeta>,
    ) -> NodeStatus {
        let offer = self.view.offer_of(node_id, view);
        let headroom = view.and_then(|view| view.status);
        let placed = || placement.into_iter().flat_map(|placement| placement.of(node_id));
        let served = || placed().filter_map(|(expert, replica)| Some((expert, replica.ready?)));
        NodeStatus {
            node_id,
            name: member.name.clone(),
            peer_id: ids::peer_id(&member.peer).map(|peer| peer.to_string()).unwrap_or_default(),
            liveness: match view.map(|view| view.liveness) {
                _ if node_id == self.view.node() => "self",
                Some(Liveness::Up) => "up",
                Some(Liveness::Suspect) => "suspect",
                Some(Liveness::Down) | None => "down",
            }
            .into(),
            leaving: member.leaving,
            voter: false,
            rtt_ms: view.and_then(|view| view.rtt).map(|rtt| rtt.smoothed.as_secs_f64() * 1e3),
            memory_headroom: headroom.map(|status| f64::from(status.memory) / 255.0),
            compute_headroom: headroom.map(|status| f64::from(status.compute) / 255.0),
            memory_budget_bytes: offer.as_ref().map(|offer| offer.memory_bytes),
            disk_budget_bytes: offer.as_ref().and_then(|offer| offer.disk_bytes),
            paged_bytes: meta.zip(offer.as_ref()).and_then(|(meta, offer)| {
                let bytes = placed().map(|(expert, replica)| meta.sizes.expert_bytes(expert, replica.precision));
                Some(bytes.sum::<u64>().saturating_sub(meta.sizes.offered_memory(offer)?))
            }),
            experts: placed().count(),
            experts_ready: placed().filter(|(_, replica)| replica.is_settled()).count(),
            precisions: Counts::of(served().map(|(_, precision)| precision)),
            expert_bytes: meta
                .map(|meta| served().map(|(expert, precision)| meta.sizes.expert_bytes(expert, precision)).sum()),
            trunk: offer.and_then(|offer| offer.trunk),
        }
    }

    fn own(&self) -> OwnStatus {
        let (metrics, held) = (&self.metrics, self.loaded.held());
        OwnStatus {
            experts: held.len(),
            precisions: Counts::of(held.values().copied()),
            paged: self.loaded.paged().len(),
            disk_bytes: self.blobs.usage().used_bytes,
            bytes_fetched: metrics.bytes_fetched.get(),
            blobs_repaired: metrics.blobs_repaired.get(),
            memory_bytes: self.loaded.ledger_bytes(),
            rss_before_bytes: self.rss_before_bytes,
            memory_budget_bytes: self.memory_bytes,
            rows_local: metrics.rows_local.get(),
            rows_remote: metrics.rows_remote.get(),
            rows_served: metrics.rows_served.get(),
            answers_waiting: metrics.answers_waiting.get().cast_unsigned(),
        }
    }
}

/// Equal states encode to equal bytes.
fn state_hash(state: &State) -> String {
    let encoded = cbor::to_vec(state).expect("the state is plain data");
    blake3::hash(&encoded).to_hex().to_string()
}
