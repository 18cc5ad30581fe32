//! The leader's duties as a state machine: who may lose a vote, which members to wait for, and what to propose next.
//!
//! Every node runs a [`Leader`]; only the leader's does anything. [`Leader::handle`] takes facts and the time and returns effects, so
//! a driver gathers facts, proposes, and decides nothing. Invariants: the same facts at the same times give the same effects; a plan is
//! proposed with the epoch that it saw; nothing is proposed while what it would be made from is incomplete.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use coel_store::{Assignment, Command, ModelId, NodeId, Placement, Presence};

use super::inputs::{expected_loss, why_unobtainable};
use super::{
    Candidate, Current, MeshFacts, ModelFacts, Plan, Popularity, Since, Unavailable, next_safe_step, plan,
    restore_coverage,
};
use crate::budget::ExpertSizes;

/// A voter that is down this long gives its vote to a learner, if there is one.
const UNSEAT_AFTER: Duration = Duration::from_secs(30);
/// A member that is up this long may be given a vote. Gossip notices within a quarter of a second that a process is gone: one that
/// joins and dies at once is not up any more by then.
const STEADY_AFTER: Duration = Duration::from_secs(2);
/// A member that is up and has not said what it can hold for this long speaks another version: the others do not wait for it.
const MUTE_AFTER: Duration = Duration::from_secs(15);

/// What a leader asks of its driver.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Bring the consensus group in line with the members that are there.
    ReconcileVoters(Presence),
    /// Put this command into the log.
    Propose {
        /// The placement.
        command: Command,
        /// Nodes that were counted.
        nodes: usize,
        /// The nodes that are given more than their memory holds, and by how many bytes.
        paged_bytes: BTreeMap<NodeId, u64>,
    },
    /// Show people this; sent where it changed.
    Report(LeaderReport),
}

/// What a leader has to say to people. Nodes that do not lead have nothing to say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeaderReport {
    /// Why there is no placement, or only a partial one.
    pub problem: Option<String>,
    /// Members that are down and expected back: their experts stay placed on them.
    pub awaited: BTreeSet<NodeId>,
}

/// The leader's state: what it has seen of the members, and what it aims at.
#[derive(Debug, Default)]
pub struct Leader {
    up_since: Since,
    down_since: Since,
    mute_since: Since,
    /// Inputs that gave nothing to propose.
    settled: Option<PlanInputs>,
    target: Option<Target>,
    report: LeaderReport,
}

/// What a plan is made from, besides the model.
#[derive(Debug, PartialEq)]
struct PlanInputs {
    experts: ExpertSizes,
    candidates: Vec<Candidate>,
    leaving: BTreeSet<NodeId>,
    awaited: BTreeSet<NodeId>,
    placement: Option<Placement>,
}

/// A plan on its way to being the placement. It stays the target until what it was made from changes. Made again halfway, a plan
/// would start from an intermediate state and move replicas that are being fetched.
#[derive(Debug)]
struct Target {
    of: (ModelId, ExpertSizes, Vec<Candidate>),
    plan: Plan,
}

impl Leader {
    /// Takes note of the facts and says what is to be done now. To be called when facts change, and now and then on the leader.
    pub fn handle(&mut self, facts: &MeshFacts, now: Instant) -> Vec<Effect> {
        self.up_since.update(&facts.up(), now);
        self.down_since.update(&facts.down(), now);
        self.mute_since.update(&facts.mute(), now);
        let mut effects = Vec::new();
        let mut report = LeaderReport::default();
        if facts.leads() {
            let mut unavailable = self.down_since.unavailable(facts.state.placement.as_ref(), now);
            unavailable.gone.extend(self.mute_since.longer_than(MUTE_AFTER, now));
            report = self.report.clone();
            // A leader that has left still counts votes until another one leads, and plans no more.
            if facts.state.members.contains_key(&facts.node) {
                effects.extend(self.place(facts, unavailable, &mut report));
            }
            // After the plan, which is made of these facts: to bring voters up to date takes time, and facts age.
            effects.push(Effect::ReconcileVoters(Presence {
                up: facts.up(),
                steady: self.up_since.longer_than(STEADY_AFTER, now),
                lost: self.down_since.longer_than(UNSEAT_AFTER, now),
            }));
        } else {
            (self.settled, self.target) = (None, None);
        }
        if report != self.report {
            self.report = report.clone();
            effects.insert(0, Effect::Report(report));
        }
        effects
    }

    /// Plans, and says what to propose where that differs from the placement.
    fn place(&mut self, facts: &MeshFacts, unavailable: Unavailable, report: &mut LeaderReport) -> Option<Effect> {
        if super::model_to_serve(&facts.state).is_none() {
            *report = LeaderReport::default();
            return None;
        }
        let (registered, model) = facts.served()?;
        let absent = unavailable.all();
        let candidates = facts.candidates(model, &absent, facts.state.precisions)?;
        let leaving = facts.state.members.iter().filter(|(_, member)| member.leaving).map(|(&node, _)| node);
        let inputs = PlanInputs {
            experts: facts.experts(model, &absent),
            candidates,
            leaving: leaving.chain(unavailable.gone.iter().copied()).collect(),
            awaited: unavailable.waited_for,
            placement: facts.placement_of(model.id).cloned(),
        };
        if self.settled.as_ref() == Some(&inputs) {
            return None;
        }
        report.awaited.clone_from(&inputs.awaited);
        let PlanInputs { experts, candidates, placement: placed, .. } = &inputs;
        let (wanted, paged_bytes) = match placed {
            Some(placed) if !inputs.awaited.is_empty() => {
                let popularity = Popularity::new(registered.popularity.clone());
                (restore_coverage(placed, candidates, &absent, experts, &popularity), BTreeMap::new())
            }
            _ => match self.planned(facts, model, &inputs, report) {
                Some(plan) => (plan.replicas, plan.paged_bytes),
                None => {
                    self.settled = Some(inputs);
                    return None;
                }
            },
        };
        let replicas: Assignment =
            experts.keys().map(|&expert| (expert, wanted.get(&expert).cloned().unwrap_or_default())).collect();
        if placed.as_ref().is_some_and(|placed| is_assigned(placed, &replicas)) {
            self.settled = Some(inputs);
            return None;
        }
        let (expect, nodes) = (facts.state.epoch(), candidates.len());
        Some(Effect::Propose { command: Command::Place { expect, model: model.id, replicas }, nodes, paged_bytes })
    }

    /// The part of the plan for these inputs that may be proposed now; `None` where there is none.
    fn planned(
        &mut self,
        facts: &MeshFacts,
        model: &ModelFacts,
        inputs: &PlanInputs,
        report: &mut LeaderReport,
    ) -> Option<Plan> {
        let PlanInputs { experts, candidates, leaving, placement: placed, .. } = inputs;
        let nothing = Current::new();
        let current = placed.as_ref().map_or(&nothing, |placed| &placed.replicas);
        let of = (model.id, experts.clone(), candidates.clone());
        let target = self.target.take().filter(|target| target.of == of).map(|target| target.plan);
        let planned = match (target, facts.state.models.get(&model.id)) {
            (Some(plan), _) => Ok(plan),
            (None, registered) => plan(experts, candidates, current, &expected_loss(registered?)),
        };
        let wanted = match planned {
            Ok(plan) => {
                report.problem = None;
                self.target = Some(Target { of, plan: plan.clone() });
                plan
            }
            Err(shortfall) => {
                let why = why_unobtainable(model, experts, candidates).unwrap_or_else(|| shortfall.to_string());
                report.problem = Some(why);
                // A first placement that cannot cover the model is not attempted; an existing one is kept true.
                placed.as_ref()?;
                shortfall.partial
            }
        };
        Some(match placed {
            Some(placed) => next_safe_step(wanted, placed, candidates, leaving, experts),
            None => wanted,
        })
    }
}

/// Whether the placement has exactly these replicas at these precisions.
fn is_assigned(placed: &Placement, replicas: &Assignment) -> bool {
    replicas.iter().all(|(expert, nodes)| {
        let now = placed.replicas.get(expert).into_iter().flatten().map(|(node, r)| (*node, r.precision));
        now.eq(nodes.iter().map(|(node, precision)| (*node, *precision)))
    })
}

#[cfg(test)]
mod tests;
