//! The leader's duties: who votes, and where experts go. Every node runs this; only the leader's does anything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coel_gossip::Liveness;
use coel_store::{Assignment, Bounds, Command, Model, ModelId, NodeId, Outcome, Placement, State};
use tracing::{info, warn};

use super::PROPOSE_DEADLINE;
use super::facts::Facts;
use super::holdings::{self, had};
use crate::library::Known;
use crate::placement::{
    Away, Candidate, Choices, Current, Experts, Harm, Plan, Popularity, Since, cover, plan, within_reach,
};
use crate::shared::Shared;
use crate::size::Size;

/// How often the leader looks. Deaths and joins are looked at within this time.
const PERIOD: Duration = Duration::from_millis(500);
/// A voter that is down this long gives its vote to a learner, if there is one.
const UNSEAT_AFTER: Duration = Duration::from_secs(30);

/// A member that is up and has not said what it can hold for this long speaks another version; the others do not wait for it.
const MUTE_AFTER: Duration = Duration::from_secs(15);

/// What a plan is made of, beside the model.
#[derive(Debug, PartialEq)]
struct Inputs {
    experts: Experts,
    candidates: Vec<Candidate>,
    leaving: BTreeSet<NodeId>,
    waited_for: BTreeSet<NodeId>,
    placement: Option<Placement>,
}

/// A plan on its way to being the placement. It stays the aim until what it was made of changes: made anew halfway, it would
/// start from what is only passing, and move what is being fetched.
#[derive(Debug)]
struct Aim {
    of: (ModelId, Experts, Vec<Candidate>),
    plan: Plan,
}

/// Does the leader's duties, while this node is the leader, until the node stops.
pub async fn run(shared: Arc<Shared>) {
    let (mut down_since, mut mute_since) = (Since::default(), Since::default());
    let (mut settled, mut aim) = (None, None);
    loop {
        tokio::time::sleep(PERIOD).await;
        let now = Instant::now();
        down_since.update(&shared.down(), now);
        mute_since.update(&mute(&shared), now);
        if shared.log.leader().borrow().as_ref() != Some(&shared.log.node_id()) {
            shared.set_planner(None);
            (settled, aim) = (None, None);
            continue;
        }
        if let Err(error) = shared.log.reconcile(&down_since.longer_than(UNSEAT_AFTER, now)).await {
            warn!(%error, "the voters could not be brought up to date; trying again");
        }
        let mut away = down_since.away(shared.state().placement.as_ref(), now);
        away.gone.extend(mute_since.longer_than(MUTE_AFTER, now));
        place(&shared, &away, &mut settled, &mut aim).await;
    }
}

/// Members that are up and have not said what they can hold, although there is something to hold.
fn mute(shared: &Shared) -> BTreeSet<NodeId> {
    let state = shared.state();
    if state.models.is_empty() {
        return BTreeSet::new();
    }
    let facts = shared.facts_of_members(&state);
    let says = |facts: &Option<Facts>| facts.as_ref().is_some_and(|facts| facts.trunk.is_some());
    let mute = facts.into_iter().filter(|(_, (liveness, facts))| *liveness == Liveness::Up && !says(facts));
    mute.map(|(node, _)| node).collect()
}

/// Plans anew and proposes the plan where it differs from the placement. `settled` are inputs that gave nothing to propose.
async fn place(shared: &Shared, away: &Away, settled: &mut Option<Inputs>, aim: &mut Option<Aim>) {
    let state = shared.log.state().borrow().clone();
    let Some((model, registered)) = shared.model_to_place(&state) else {
        return shared.set_planner(None);
    };
    let Some(known) = shared.library.cached(model) else {
        return;
    };
    let not_there = away.waited_for.union(&away.gone).copied().collect();
    let Some(candidates) = candidates(shared, &state, &known, &not_there, state.precisions) else {
        return;
    };
    let leaving = state.members.iter().filter(|(_, member)| member.leaving).map(|(&node, _)| node);
    let inputs = Inputs {
        experts: experts(shared, &state, &known, &not_there),
        candidates,
        leaving: leaving.chain(away.gone.iter().copied()).collect(),
        waited_for: away.waited_for.clone(),
        placement: state.placement.clone().filter(|placement| placement.model == model),
    };
    if settled.as_ref() == Some(&inputs) {
        return;
    }
    let Inputs { experts, candidates, placement: placed, .. } = &inputs;
    let (wanted, paged_bytes) = match placed {
        Some(placed) if !away.waited_for.is_empty() => {
            let popularity = Popularity::new(registered.popularity.clone());
            (cover(placed, candidates, &not_there, experts, &popularity), BTreeMap::new())
        }
        _ => match planned(shared, &known, registered, &inputs, aim) {
            Some(plan) => (plan.replicas, plan.paged_bytes),
            None => {
                *settled = Some(inputs);
                return;
            }
        },
    };
    let paged: Vec<_> = paged_bytes.iter().map(|(node, bytes)| format!("node {node} {}", Size(*bytes))).collect();
    let replicas: Assignment =
        experts.keys().map(|&expert| (expert, wanted.get(&expert).cloned().unwrap_or_default())).collect();
    let is_so = |placed: &Placement| {
        let now = |expert| placed.replicas.get(expert).into_iter().flatten().map(|(node, r)| (*node, r.precision));
        replicas.iter().all(|(expert, nodes)| now(expert).eq(nodes.iter().map(|(node, p)| (*node, *p))))
    };
    if placed.as_ref().is_some_and(is_so) {
        if !away.waited_for.is_empty() {
            let names = away.waited_for.iter().filter_map(|node| Some(state.members.get(node)?.name.as_str()));
            info!(away = names.collect::<Vec<_>>().join(", "), "waited for before experts are placed elsewhere");
        }
        *settled = Some(inputs);
        return;
    }
    let (expect, nodes) = (state.epoch(), candidates.len());
    match shared.log.propose(Command::Place { expect, model, replicas }, PROPOSE_DEADLINE).await {
        Ok(Outcome::Epoch(epoch)) if paged.is_empty() => info!(%epoch, nodes, "placed"),
        Ok(Outcome::Epoch(epoch)) => info!(%epoch, nodes, paged = paged.join(", "), "placed, with disks"),
        Ok(outcome) => info!(?outcome, "the plan came too late; planning again"),
        Err(error) => warn!(%error, "the plan could not be proposed; trying again"),
    }
}

/// What of the plan for these inputs may be proposed now; `None` where nothing is.
fn planned(shared: &Shared, known: &Known, registered: &Model, inputs: &Inputs, aim: &mut Option<Aim>) -> Option<Plan> {
    let Inputs { experts, candidates, leaving, placement: placed, .. } = inputs;
    let model = known.id;
    let nothing = Current::new();
    let current = placed.as_ref().map_or(&nothing, |placed| &placed.replicas);
    let aimed = aim.take().filter(|aim| aim.of == (model, experts.clone(), candidates.clone())).map(|aim| aim.plan);
    let planned = aimed.map_or_else(|| plan(experts, candidates, current, &harm(registered)), Ok);
    let wanted = match planned {
        Ok(plan) => {
            shared.set_planner(None);
            *aim = Some(Aim { of: (model, experts.clone(), candidates.clone()), plan: plan.clone() });
            plan
        }
        Err(shortfall) => {
            let why = out_of_reach(known, experts, candidates).unwrap_or_else(|| shortfall.to_string());
            shared.set_planner(Some(why));
            // A first placement that cannot cover the model is not attempted; an existing one is kept true.
            placed.as_ref()?;
            shortfall.partial
        }
    };
    Some(match placed {
        Some(placed) => within_reach(wanted, placed, candidates, leaving, experts),
        None => wanted,
    })
}

/// The experts, at the precisions that can be had of them from those who are not `gone`. Who is leaving is a source only of what
/// nobody else has: it may have left before the last of it was fetched.
fn experts(shared: &Shared, state: &State, known: &Known, gone: &BTreeSet<NodeId>) -> Experts {
    let facts = shared.facts_of_members(state);
    let leaving = |node: &NodeId| state.members.get(node).is_some_and(|member| member.leaving);
    let there = facts.iter().filter(|(node, _)| !gone.contains(node));
    let (staying, all): (Vec<_>, Vec<_>) =
        (there.clone().filter(|(node, _)| !leaving(node)).collect(), there.collect());
    let complete = |(_, (_, facts)): &(&NodeId, &(Liveness, Option<Facts>))| {
        facts.as_ref().is_some_and(|facts| facts.complete_models.contains(&known.id))
    };
    if staying.iter().any(complete) {
        return known.manifest.experts.iter().map(|(&expert, slices)| (expert, Choices::of(slices))).collect();
    }
    let from = |members: &[(&NodeId, &(Liveness, Option<Facts>))]| {
        let holders: Vec<_> = members.iter().map(|(_, (_, facts))| facts.as_ref()?.holds.as_ref()).collect();
        let nodes: BTreeSet<_> = members.iter().map(|(node, _)| **node).collect();
        let serves = |expert| {
            let placed = state.placement.as_ref().filter(|placement| placement.model == known.id)?;
            placed.hosts(expert).filter(|(node, _)| nodes.contains(node)).map(|(_, precision)| precision).max()
        };
        had(known.id, &known.manifest, &holders, serves)
    };
    // What only those have who are leaving comes from them: `had` says of it that it can be had at any precision, which they know
    // better.
    let (mut experts, everybody) = (from(&staying), from(&all));
    for (expert, choices) in &mut experts {
        let slices = &known.manifest.experts[expert];
        if *choices == Choices::of(slices) {
            *choices = everybody[expert];
        }
    }
    experts
}

/// Why no room would do, if that is why there is no plan.
fn out_of_reach(known: &Known, experts: &Experts, candidates: &[Candidate]) -> Option<String> {
    let roomy = candidates.iter().filter(|c| c.expert_bytes_max.max(c.page_bytes_max) > 0);
    let lowest = roomy.clone().map(|candidate| candidate.accepts.lowest()).min()?;
    let accepted = |precision| roomy.clone().any(|candidate| candidate.accepts.has(precision));
    holdings::out_of_reach(&known.manifest, experts, accepted, lowest)
}

fn harm(registered: &Model) -> Harm {
    Harm::new(Popularity::new(registered.popularity.clone()), registered.sensitivity.clone())
}

/// Why every expert could not be held, or why that is not known.
#[derive(Debug)]
pub enum Unplaceable {
    /// This will be known in a moment.
    NotYet(&'static str),
    /// The missing bytes and the remedy, in words.
    Short(String),
}

impl Unplaceable {
    fn prefixed(self, prefix: &str) -> Self {
        match self {
            Self::NotYet(what) => Self::NotYet(what),
            Self::Short(why) => Self::Short(format!("{prefix}, {why}")),
        }
    }
}

/// Whether the others could hold every expert without `node`.
pub fn can_spare(shared: &Shared, node: NodeId) -> Result<(), Unplaceable> {
    let precisions = shared.state().precisions;
    let gone = shared.down().into_iter().chain([node]).collect();
    could_place(shared, &gone, precisions).map_err(|why| why.prefixed("without this node"))
}

/// Whether every expert could be held at these precisions.
pub fn can_hold(shared: &Shared, precisions: Bounds) -> Result<(), Unplaceable> {
    could_place(shared, &shared.down(), precisions).map_err(|why| why.prefixed(&format!("at {precisions}")))
}

fn could_place(shared: &Shared, gone: &BTreeSet<NodeId>, precisions: Bounds) -> Result<(), Unplaceable> {
    let state = shared.state();
    let Some((model, registered)) = shared.model_to_place(&state) else { return Ok(()) };
    let known = shared.library.cached(model).ok_or(Unplaceable::NotYet("this node does not know the model yet"))?;
    let candidates = candidates(shared, &state, &known, gone, precisions)
        .ok_or(Unplaceable::NotYet("not every member has said yet what it can hold"))?;
    let experts = experts(shared, &state, &known, gone);
    let planned = plan(&experts, &candidates, &Current::new(), &harm(registered));
    planned.map(drop).map_err(|shortfall| {
        let why = out_of_reach(&known, &experts, &candidates);
        Unplaceable::Short(why.unwrap_or_else(|| shortfall.to_string()))
    })
}

/// Nodes that may hold experts now, with the room their budgets leave. `None` while a member that is up has not said what it
/// has: it will in a moment, and a plan without it would be made twice.
fn candidates(
    shared: &Shared,
    state: &State,
    known: &Known,
    gone: &BTreeSet<NodeId>,
    precisions: Bounds,
) -> Option<Vec<Candidate>> {
    let facts = shared.facts_of_members(state);
    let held: BTreeSet<_> = state
        .placement
        .iter()
        .flat_map(|placement| placement.replicas.values().flat_map(|nodes| nodes.keys().copied()))
        .collect();
    let mut candidates = Vec::new();
    for (&node, member) in &state.members {
        if member.leaving || gone.contains(&node) {
            continue;
        }
        match facts.get(&node) {
            Some((_, Some(facts))) if facts.trunk.is_some() => {
                candidates.push(candidate(known, node, facts, precisions));
            }
            Some((Liveness::Up, _)) => return None,
            // Just lost, and it holds something: wait until it is back or gone for good.
            _ if held.contains(&node) => return None,
            _ => {}
        }
    }
    Some(candidates)
}

fn candidate(known: &Known, node: NodeId, facts: &Facts, precisions: Bounds) -> Candidate {
    let (memory, disk) = (known.room_for_experts(facts).unwrap_or(0), known.disk_for_experts(facts));
    // What the mesh wants and the node does not accept, it has no room for.
    let Some(accepts) = facts.accepts.and(precisions) else {
        return Candidate { node, expert_bytes_max: 0, page_bytes_max: 0, accepts: facts.accepts };
    };
    // What is in memory is on the disk too.
    let expert_bytes_max = disk.map_or(memory, |disk| memory.min(disk));
    let least = known.least_to_page(accepts.lowest());
    Candidate { node, expert_bytes_max, page_bytes_max: disk.filter(|_| memory >= least).unwrap_or(0), accepts }
}

/// What the leader needs to know of each member: whether it is there, and its facts.
pub type MemberFacts = BTreeMap<NodeId, (Liveness, Option<Facts>)>;
