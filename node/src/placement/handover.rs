//! A replica on a node that goes, or has gone, stays in the placement until there is another.

use std::collections::BTreeSet;

use coel_store::{NodeId, Placement};

use super::Plan;

/// Keeps in `plan` what nodes in `leaving` hold, for each expert that has no ready replica elsewhere yet. Planned again once
/// another one is ready, the old one goes. So a leaving node serves to the last, and what died with its last holder is still
/// known by that holder's name.
pub fn keep_until_replaced(plan: &mut Plan, placed: &Placement, leaving: &BTreeSet<NodeId>) {
    for (expert, held) in &placed.replicas {
        let wanted = plan.replicas.entry(*expert).or_default();
        let is_ready = |node: &NodeId| held.get(node).is_some_and(|replica| replica.ready);
        if !wanted.iter().any(is_ready) {
            wanted.extend(held.keys().filter(|node| leaving.contains(node)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use coel_store::{Epoch, ExpertId, ModelId, Precision, Replica};

    use super::*;

    fn check(held: &[(u64, bool)], planned: &[u64], expected: &[u64]) {
        let expert = ExpertId { layer: 0, index: 0 };
        let replica = |&(node, ready): &(u64, bool)| (NodeId(node), Replica { precision: Precision::Bf16, ready });
        let placed = Placement {
            epoch: Epoch(1),
            model: ModelId([0; 32]),
            replicas: BTreeMap::from([(expert, held.iter().map(replica).collect())]),
            trunk_ready: BTreeSet::new(),
        };
        let nodes = |ids: &[u64]| ids.iter().map(|&id| NodeId(id)).collect::<BTreeSet<_>>();
        let mut plan = Plan { replicas: BTreeMap::from([(expert, nodes(planned))]) };
        keep_until_replaced(&mut plan, &placed, &nodes(&[9]));
        assert_eq!(plan.replicas[&expert], nodes(expected), "{held:?} {planned:?}");
    }

    #[test]
    fn the_last_ready_replica_stays_until_another_is_ready() {
        check(&[(9, true)], &[1], &[1, 9]);
        check(&[(9, true), (1, false)], &[1], &[1, 9]);
        check(&[(9, true), (1, true)], &[1], &[1]);
        check(&[(9, true), (2, true)], &[1], &[1, 9]);
        check(&[(2, true)], &[1], &[1]);
    }
}
