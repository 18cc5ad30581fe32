//! What hosting tells others: the log, of what is ready; people, of how far it is.

use std::collections::BTreeMap;

use coel_store::{Command, Outcome, Precision};

use super::{Hosting, Setback};
use crate::library::Known;
use crate::mesh::PROPOSE_DEADLINE;
use crate::shared::Held;

impl Hosting {
    /// Notes how far the node is. Experts count once they are loaded as wanted; files and trunk, few as they are, once they lie
    /// here.
    pub(super) fn count(&self, known: &Known, assigned: &Held) {
        let (shared, held) = (&self.shared, self.shared.held.borrow().clone());
        // The manifest is here, or nothing of this would be known.
        let (mut all, mut here) = (known.manifest_bytes, known.manifest_bytes);
        let serves = shared.serving.borrow().is_some();
        for blob in known.fixed_blobs(shared.trunk.borrow().unwrap_or(Precision::Exact)) {
            all += blob.bytes;
            here += if serves || shared.blobs.has(&blob.id) { blob.bytes } else { 0 };
        }
        for (expert, precision) in assigned {
            let bytes = known.expert_bytes(*expert, *precision);
            all += bytes;
            here += if held.get(expert) == Some(precision) { bytes } else { 0 };
        }
        shared.progress.send_modify(|progress| (progress.bytes_assigned, progress.bytes_held) = (all, here));
        let each = held.iter().map(|(&expert, &precision)| (precision, known.expert_bytes(expert, precision)));
        shared.metrics.note_experts(each);
    }

    /// Takes back what the log claims and is not held.
    pub(super) async fn retract(&self) -> Result<(), Setback> {
        let (state, node, held) = (self.shared.state(), self.shared.log.node_id(), self.shared.held.borrow().clone());
        let own = state.placement.iter().flat_map(|placement| placement.of(node));
        let lost = own.filter(|(expert, replica)| replica.ready.is_some() && !held.contains_key(expert));
        let experts: Vec<_> = lost.map(|(expert, _)| expert).collect();
        if experts.is_empty() { Ok(()) } else { self.propose(Command::NotReady { node, experts }).await }
    }

    /// Tells the log what is held and not claimed so yet.
    pub(super) async fn claim(&self) -> Result<(), Setback> {
        let (state, node, held) = (self.shared.state(), self.shared.log.node_id(), self.shared.held.borrow().clone());
        let own = state.placement.iter().flat_map(|placement| placement.of(node));
        let news = own.filter_map(|(expert, replica)| {
            let now = *held.get(&expert)?;
            (replica.ready != Some(now)).then_some((expert, now))
        });
        let experts: BTreeMap<_, _> = news.collect();
        let trunk_claimed = state.placement.as_ref().is_none_or(|placement| placement.trunk_ready.contains(&node));
        if experts.is_empty() && trunk_claimed {
            return Ok(());
        }
        self.propose(Command::Ready { node, epoch: state.epoch(), experts, trunk: true }).await
    }

    pub(super) async fn propose(&self, command: Command) -> Result<(), Setback> {
        if self.shared.log.leader().borrow().is_none() {
            return Err(Setback::Report("there is no leader".into()));
        }
        match self.shared.log.propose(command, PROPOSE_DEADLINE).await {
            Ok(Outcome::Refused(refusal)) => Err(Setback::Report(refusal.to_string())),
            Ok(_) => Ok(()),
            Err(error) => Err(Setback::Report(error.to_string())),
        }
    }
}
