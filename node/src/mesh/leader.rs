//! Drives the leader's state machine: gathers facts, hands them to [`Leader`], and carries its effects out.
//!
//! No decision is made here. A look at the mesh follows every change, and on the leader also passes at regular intervals, since the
//! consensus group changes without telling.

use std::sync::Arc;
use std::time::{Duration, Instant};

use coel_store::Outcome;
use tokio::sync::watch;
use tracing::{info, warn};

use super::{MeshView, PROPOSE_DEADLINE};
use crate::config::Size;
use crate::placement::{Effect, Leader, LeaderReport};

/// Time between two looks: at least this, and on the leader no more.
const PERIOD: Duration = Duration::from_millis(500);

/// Does the leader's duties, while this node leads, until the node stops. `report` shows what the leader has to say.
pub async fn run(view: MeshView, report: Arc<watch::Sender<LeaderReport>>) {
    let (mut leader, mut changes) = (Leader::default(), view.changes());
    loop {
        let facts = view.facts();
        let leads = facts.leads();
        for effect in leader.handle(&facts, Instant::now()) {
            carry_out(&view, effect, &report).await;
        }
        tokio::time::sleep(PERIOD).await;
        if !leads && !changes.changed().await {
            return;
        }
    }
}

async fn carry_out(view: &MeshView, effect: Effect, report: &watch::Sender<LeaderReport>) {
    match effect {
        Effect::ReconcileVoters(presence) => {
            if let Err(error) = view.log().reconcile(presence).await {
                warn!(%error, "the voters could not be brought up to date; trying again");
            }
        }
        Effect::Propose { command, nodes, paged_bytes } => {
            let paged = paged_bytes.iter().map(|(node, bytes)| format!("node {node} {}", Size(*bytes)));
            let paged = paged.collect::<Vec<_>>().join(", ");
            match view.log().propose(command, PROPOSE_DEADLINE).await {
                Ok(Outcome::Epoch(epoch)) if paged.is_empty() => info!(%epoch, nodes, "placed"),
                Ok(Outcome::Epoch(epoch)) => info!(%epoch, nodes, paged, "placed, with experts on disk"),
                Ok(outcome) => info!(?outcome, "the placement changed before the plan arrived; planning again"),
                Err(error) => warn!(%error, "the plan could not be proposed; trying again"),
            }
        }
        Effect::Report(said) => {
            if !said.awaited.is_empty() {
                let state = view.state();
                let names = said.awaited.iter().filter_map(|node| Some(state.members.get(node)?.name.as_str()));
                info!(
                    members = names.collect::<Vec<_>>().join(", "),
                    "waiting for members before placing their experts elsewhere"
                );
            }
            report.send_replace(said);
        }
    }
}
