//! What hosting tells others: the log, which experts are ready here; people, how far loading is.

use std::collections::BTreeMap;

use coel_store::{Command, Precision};

use super::{HeldExperts, Hosting, HostingError};
use crate::mesh::{self, ProposalError};
use crate::registry::ModelMeta;

impl Hosting {
    /// Notes how far the node is. Experts count once they are loaded as wanted; files and trunk, few as they are, once they lie here.
    pub(super) fn count(&self, meta: &ModelMeta, assigned: &HeldExperts) {
        let (loaded, held) = (&self.node.loaded, self.node.loaded.held());
        // The manifest is here, or nothing of this would be known.
        let (mut all, mut here) = (meta.manifest_bytes, meta.manifest_bytes);
        let serves = loaded.model().is_some();
        for blob in meta.fixed_blobs(self.node.offer.trunk().unwrap_or(Precision::Exact)) {
            all += blob.bytes;
            here += if serves || self.node.blobs.has(&blob.id) { blob.bytes } else { 0 };
        }
        for (expert, precision) in assigned {
            let bytes = meta.sizes.expert_bytes(*expert, *precision);
            all += bytes;
            here += if held.get(expert) == Some(precision) { bytes } else { 0 };
        }
        loaded.set_bytes(all, here);
        let each = held.iter().map(|(&expert, &precision)| (precision, meta.sizes.expert_bytes(expert, precision)));
        self.node.metrics.note_experts(each);
    }

    /// Takes back what the log says is ready here and is not held.
    pub(super) async fn retract(&self) -> Result<(), HostingError> {
        let (state, node, held) = (self.node.view.state(), self.node.view.node(), self.node.loaded.held());
        let own = state.placement.iter().flat_map(|placement| placement.of(node));
        let lost = own.filter(|(expert, replica)| replica.ready.is_some() && !held.contains_key(expert));
        let experts: Vec<_> = lost.map(|(expert, _)| expert).collect();
        if experts.is_empty() { Ok(()) } else { self.propose(Command::NotReady { node, experts }).await }
    }

    /// Tells the log what is held and was not reported yet.
    pub(super) async fn claim(&self) -> Result<(), HostingError> {
        let (state, node, held) = (self.node.view.state(), self.node.view.node(), self.node.loaded.held());
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

    /// Puts a command into the log, if there is a leader.
    pub(super) async fn propose(&self, command: Command) -> Result<(), HostingError> {
        if self.node.view.leader().is_none() {
            return Err(HostingError::Report("there is no leader".into()));
        }
        match mesh::propose(self.node.view.log(), command).await {
            Ok(_) => Ok(()),
            Err(ProposalError::Refused { refusal }) => Err(HostingError::Report(refusal.to_string())),
            Err(error) => Err(HostingError::Report(error.to_string())),
        }
    }
}
