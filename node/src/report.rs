//! Puts the status document together from what the node's parts say.

use std::collections::BTreeMap;

use coel_gossip::Liveness;
use coel_store::{NodeId, Placement, cbor};

use crate::generation::{ledger_bytes, readiness};
use crate::ids;
use crate::mesh::facts::Facts;
use crate::service::ModelInfo;
use crate::shared::Shared;
use crate::status::{Counts, NodeStatus, OwnStatus, ReplicaStatus, Status, expert_key};

/// The node's view, now.
pub fn status(shared: &Shared, api: &str) -> Status {
    let state = shared.state();
    let peers = shared.peers();
    let own = shared.log.node_id();
    let readiness = readiness(shared);
    let placement = state.placement.as_ref();
    let voters = shared.log.voters();
    let placed_on = |node: NodeId| placement.map_or((0, 0), |placement| counts(placement, node));
    let known = placement.and_then(|placement| shared.library.cached(placement.model));
    let served = |node: NodeId| {
        let placed = placement.into_iter().flat_map(move |placement| placement.of(node));
        placed.filter_map(|(expert, replica)| Some((expert, replica.ready?)))
    };
    let nodes = state.members.iter().map(|(&node_id, member)| {
        let peer = ids::peer_id(&member.peer);
        let view = peer.and_then(|peer| peers.get(&peer));
        let (experts, experts_ready) = placed_on(node_id);
        let is_self = node_id == own;
        let headroom = view.and_then(|view| view.status);
        let facts = if is_self { Some(shared.facts()) } else { view.and_then(Facts::of) };
        NodeStatus {
            node_id,
            name: member.name.clone(),
            peer_id: peer.map(|peer| peer.to_string()).unwrap_or_default(),
            liveness: match view.map(|view| view.liveness) {
                _ if is_self => "self",
                Some(Liveness::Up) => "up",
                Some(Liveness::Suspect) => "suspect",
                Some(Liveness::Down) | None => "down",
            }
            .into(),
            leaving: member.leaving,
            voter: voters.contains(&node_id),
            rtt_ms: view.and_then(|view| view.rtt).map(|rtt| rtt.smoothed.as_secs_f64() * 1e3),
            memory_headroom: headroom.map(|status| f64::from(status.memory) / 255.0),
            compute_headroom: headroom.map(|status| f64::from(status.compute) / 255.0),
            memory_budget_bytes: facts.as_ref().map(|facts| facts.memory_bytes),
            disk_budget_bytes: facts.as_ref().and_then(|facts| facts.disk_bytes),
            paged_bytes: known.as_ref().zip(facts.as_ref()).and_then(|(known, facts)| {
                let placed = placement.into_iter().flat_map(|placement| placement.of(node_id));
                let bytes: u64 = placed.map(|(expert, replica)| known.expert_bytes(expert, replica.precision)).sum();
                Some(bytes.saturating_sub(known.room_for_experts(facts)?))
            }),
            experts,
            experts_ready,
            precisions: Counts::of(served(node_id).map(|(_, precision)| precision)),
            expert_bytes: known
                .as_ref()
                .map(|known| served(node_id).map(|(expert, precision)| known.expert_bytes(expert, precision)).sum()),
            trunk: facts.and_then(|facts| facts.trunk),
        }
    });
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
    // Before the whole is put together: what is looked at stays locked until a statement ends, and who looks a second time then
    // waits behind a writer that waits for it.
    let nodes: Vec<_> = nodes.collect();
    let device = shared.serving.borrow().as_ref().map(|serving| serving.engine.class().to_string());
    let leader = *shared.log.leader().borrow();
    let importing = shared.import.borrow().clone();
    let own_status = own_status(shared);
    Status {
        mesh: shared.log.mesh_id().to_string(),
        node_id: own,
        name: shared.config.name.clone(),
        peer_id: shared.gossip.local_peer_id().to_string(),
        api: api.to_owned(),
        device,
        leader,
        term: shared.log.term(),
        applied: shared.log.applied(),
        state_hash: state_hash(&state),
        epoch: state.epoch().0,
        models: state.models.keys().filter_map(info).collect(),
        model: placement.and_then(|placement| info(&placement.model)),
        precisions: state.precisions,
        coverage: readiness.coverage,
        replicas_min: placement.and_then(|placement| shared.live_replicas(placement).into_values().min()).unwrap_or(0),
        planner: shared.planner(),
        importing,
        readiness,
        nodes,
        own: own_status,
        placement: table.collect::<BTreeMap<_, _>>(),
    }
}

fn counts(placement: &Placement, node: NodeId) -> (usize, usize) {
    placement.of(node).fold((0, 0), |(all, ready), (_, replica)| (all + 1, ready + usize::from(replica.is_settled())))
}

/// Equal states encode to equal bytes.
fn state_hash(state: &coel_store::State) -> String {
    let encoded = cbor::to_vec(state).expect("the state is plain data");
    blake3::hash(&encoded).to_hex().to_string()
}

fn own_status(shared: &Shared) -> OwnStatus {
    let metrics = &shared.metrics;
    let held = shared.held.borrow().clone();
    let paged = shared.shelved.borrow().len();
    OwnStatus {
        experts: held.len(),
        precisions: Counts::of(held.values().copied()),
        paged,
        disk_bytes: shared.blobs.usage().used_bytes,
        bytes_fetched: metrics.bytes_fetched.get(),
        memory_bytes: ledger_bytes(shared),
        rss_before_bytes: shared.rss_before_bytes,
        memory_budget_bytes: shared.config.memory_bytes,
        rows_local: metrics.rows_local.get(),
        rows_remote: metrics.rows_remote.get(),
        rows_served: metrics.rows_served.get(),
    }
}
