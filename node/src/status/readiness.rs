//! Whether this node, as a home, would serve a request now, and what it waits for.

use std::sync::Arc;

use coel_store::{ExpertId, State};
use tokio::sync::watch;

use crate::experts::dispatch::MissingExperts;
use crate::hosting::{LoadProgress, Loaded};
use crate::import::Imports;
use crate::mesh::MeshView;
use crate::placement::LeaderReport;
use crate::service::Readiness;

/// What readiness follows from. Cloning is cheap.
#[derive(Clone)]
pub struct ReadinessView {
    /// The mesh.
    pub view: MeshView,
    /// What is loaded here.
    pub loaded: Loaded,
    /// The import that runs.
    pub imports: Imports,
    /// What this node has to say as the leader.
    pub leader_report: Arc<watch::Sender<LeaderReport>>,
}

impl ReadinessView {
    /// Whether a request would be served now.
    pub fn now(&self) -> Readiness {
        let (state, progress, held) = (self.view.state(), self.loaded.progress(), self.loaded.held());
        let placement = state.placement.as_ref();
        let replicas = placement.map(|placement| self.view.live_replicas(placement, &held)).unwrap_or_default();
        let absent: Vec<_> = replicas.iter().filter(|(_, live)| **live == 0).map(|(&expert, _)| expert).collect();
        let experts = replicas.len();
        let waiting_for = self.waiting_for(&state, &progress, &absent);
        Readiness {
            ready: waiting_for.is_none(),
            waiting_for,
            problem: progress.problem,
            coverage: if experts == 0 { 0.0 } else { (experts - absent.len()) as f64 / experts as f64 },
            bytes_assigned: progress.bytes_assigned,
            bytes_held: progress.bytes_held,
        }
    }

    /// What this node has to say as the leader.
    pub fn leader_report(&self) -> LeaderReport {
        self.leader_report.borrow().clone()
    }

    /// What keeps this node from serving, in words; `absent` experts have no live replica.
    fn waiting_for(&self, state: &State, progress: &LoadProgress, absent: &[ExpertId]) -> Option<String> {
        if !self.view.is_caught_up(state) {
            return Some("catching up with the placement log".into());
        }
        let (leaderless, loaded) = (self.view.leader().is_none(), self.loaded.model().is_some());
        let down = self.view.down();
        if leaderless && (state.placement.is_none() || !absent.is_empty() || !loaded) {
            if let Some(exclusion) = self.view.exclusion() {
                return Some(exclusion);
            }
            let electing = || "the voters are electing a leader".to_owned();
            return Some(self.view.quorum().missing().map_or_else(electing, |missing| format!("no leader: {missing}")));
        }
        if state.models.is_empty() {
            return Some(match self.imports.progress() {
                Some(importing) => format!("importing {importing}"),
                None => "no model is registered; import one with `coel model import DIR`".into(),
            });
        }
        let (assigned, held) = (progress.bytes_assigned, progress.bytes_held);
        if !loaded {
            return Some(format!("loading the trunk: {held} of {assigned} bytes are here"));
        }
        let Some(placement) = &state.placement else {
            let planning = || "waiting for the leader to place the model's experts".to_owned();
            return Some(self.leader_report().problem.unwrap_or_else(planning));
        };
        // An expert that a live node is still loading will come; one whose holders are all gone will not.
        let holders = |expert: &ExpertId| placement.replicas[expert].keys().copied().collect::<Vec<_>>();
        let lost = absent.iter().map(|expert| (*expert, holders(expert)));
        let lost = MissingExperts {
            experts: lost.filter(|(_, nodes)| nodes.iter().all(|node| down.contains(node))).collect(),
        };
        if !lost.experts.is_empty() {
            return Some(lost.to_string());
        }
        (!absent.is_empty()).then(|| {
            let experts = placement.replicas.len();
            let ready = experts - absent.len();
            format!(
                "loading: {ready} of {experts} experts are ready on some node; this node holds {held} of the {assigned} bytes assigned \
                 to it"
            )
        })
    }
}
