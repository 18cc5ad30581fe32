//! Keeps what the log says of this node's replicas true: which are ready, and at which precision.
//!
//! Owns [`follow`], a task of its own, so that loading never waits for the log: without a leader nothing can be reported, and what
//! is held serves all the same. Decisions are in [`correction`], which is pure. Invariant: what is reported ready was held
//! when it was reported.

use std::collections::BTreeMap;
use std::time::Duration;

use coel_store::{Command, ExpertId, ModelId, NodeId, State};
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use super::{HeldExperts, Loaded};
use crate::mesh::{MeshView, ProposalError};

/// How long to gather experts for one log entry. Others can use the first while the last are being loaded.
const GATHER: Duration = Duration::from_millis(200);
/// The longest time to gather.
const GATHER_MAX: Duration = Duration::from_secs(1);
/// Pause before a report that failed is made again.
const RETRY: Duration = Duration::from_secs(1);

/// Reports to the log until the node stops.
pub async fn follow(view: MeshView, loaded: Loaded) {
    let (mut state, mut held, mut model) = (view.log().state(), loaded.held_changes(), loaded.model_changes());
    loop {
        let (agreed, now) = (state.borrow_and_update().clone(), held.borrow_and_update().clone());
        let serving = model.borrow_and_update().as_ref().map(|model| model.meta.id);
        if let Some(command) = correction(&agreed, view.node(), &now, serving) {
            match view.propose(command).await {
                // This node's own copy of the state has it in a moment.
                Ok(_) => {}
                // The placement has changed meanwhile, and so has what there is to say.
                Err(ProposalError::Refused { refusal }) => debug!(%refusal, "a report is out of date"),
                Err(error) => {
                    debug!(%error, "the log cannot be told what is ready; trying again");
                    sleep(RETRY).await;
                    continue;
                }
            }
        }
        let changed = tokio::select! {
            changed = state.changed() => changed,
            changed = held.changed() => changed,
            changed = model.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
        // Until nothing more comes for a moment.
        let until = Instant::now() + GATHER_MAX;
        while Instant::now() < until && matches!(timeout(GATHER, held.changed()).await, Ok(Ok(()))) {}
    }
}

/// What to tell the log where it is wrong about `node`, which holds these experts of the model that it serves. What is no longer held is
/// taken back first, so that nobody asks in vain.
pub fn correction(state: &State, node: NodeId, held: &HeldExperts, serving: Option<ModelId>) -> Option<Command> {
    let placement = state.placement.as_ref()?;
    let serves = serving == Some(placement.model);
    let holds = |expert: &ExpertId| if serves { held.get(expert).copied() } else { None };
    let lost = placement.of(node).filter(|(expert, replica)| replica.ready.is_some() && holds(expert).is_none());
    let experts: Vec<_> = lost.map(|(expert, _)| expert).collect();
    if !experts.is_empty() {
        return Some(Command::NotReady { node, experts });
    }
    if !serves {
        return None;
    }
    let news = placement.of(node).filter_map(|(expert, replica)| {
        let now = holds(&expert)?;
        (replica.ready != Some(now)).then_some((expert, now))
    });
    let experts: BTreeMap<_, _> = news.collect();
    let is_told = experts.is_empty() && placement.trunk_ready.contains(&node);
    (!is_told).then_some(Command::Ready { node, epoch: placement.epoch, experts, trunk: true })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use coel_store::{Epoch, Placement, Precision, Replica};

    use super::*;

    const NODE: NodeId = NodeId(2);
    const MODEL: ModelId = ModelId([1; 32]);

    fn expert(index: u16) -> ExpertId {
        ExpertId::new(0, index)
    }

    /// A placement of experts on the node, each at Q8, with what the log says of them.
    fn placed(experts: &[(u16, Option<Precision>)], trunk: bool) -> State {
        let replica = |ready| BTreeMap::from([(NODE, Replica { precision: Precision::Q8, ready })]);
        let replicas = experts.iter().map(|&(index, ready)| (expert(index), replica(ready))).collect();
        let trunk_ready = if trunk { BTreeSet::from([NODE]) } else { BTreeSet::new() };
        let placement = Placement { epoch: Epoch(3), model: MODEL, replicas, trunk_ready };
        State { placement: Some(placement), ..State::default() }
    }

    fn held(experts: &[(u16, Precision)]) -> HeldExperts {
        experts.iter().map(|&(index, precision)| (expert(index), precision)).collect()
    }

    #[test]
    fn what_is_not_held_any_more_is_taken_back_before_anything_is_reported() {
        use Precision::{Q4, Q8};
        let state = placed(&[(0, Some(Q8)), (1, None), (2, Some(Q8))], true);
        let back = |experts: &[u16]| {
            let experts = experts.iter().copied().map(expert).collect();
            Some(Command::NotReady { node: NODE, experts })
        };
        assert_eq!(correction(&state, NODE, &held(&[]), None), back(&[0, 2]), "a restart");
        assert_eq!(correction(&state, NODE, &held(&[(1, Q4), (2, Q8)]), Some(MODEL)), back(&[0]));
        assert_eq!(correction(&state, NODE, &held(&[(0, Q8), (2, Q8)]), Some(ModelId([9; 32]))), back(&[0, 2]));
    }

    #[test]
    fn what_is_held_is_reported_at_its_precision_and_once() {
        use Precision::{Q4, Q8};
        let state = placed(&[(0, Some(Q8)), (1, None), (2, Some(Q4))], true);
        let now = held(&[(0, Q8), (1, Q4), (2, Q8), (7, Q8)]);
        let experts = held(&[(1, Q4), (2, Q8)]);
        let ready = Command::Ready { node: NODE, epoch: Epoch(3), experts, trunk: true };
        assert_eq!(correction(&state, NODE, &now, Some(MODEL)), Some(ready), "7 is not assigned");
        let told = placed(&[(0, Some(Q8)), (1, Some(Q4)), (2, Some(Q8))], true);
        assert_eq!(correction(&told, NODE, &now, Some(MODEL)), None);
        assert_eq!(correction(&placed(&[(0, None)], false), NODE, &held(&[(0, Q8)]), None), None, "nothing serves yet");
        let trunk = Command::Ready { node: NODE, epoch: Epoch(3), experts: BTreeMap::new(), trunk: true };
        assert_eq!(correction(&placed(&[(0, None)], false), NODE, &held(&[]), Some(MODEL)), Some(trunk));
        assert_eq!(correction(&State::default(), NODE, &now, Some(MODEL)), None, "nothing is placed");
    }
}
