//! The planner: covers every expert, then replicates by popularity, within byte budgets, moving as little as possible. Where not
//! everything fits exactly, it chooses precisions; where not everything fits in memory, it uses disks.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use coel_store::{Bounds, ExpertId, NodeId, Precision, Replica};

use super::paging::paged;
use super::table::Table;
use super::upgrade::{rebalance, upgrade};
use super::{Candidate, Current, ExpectedLoss, Plan};
use crate::budget::ExpertSizes;

/// Replicas of an expert where there is room: one to serve, one to survive a node's death.
const REPLICAS_WANTED: usize = 2;
/// How far a node's share of free room may lag behind the emptiest node's before it gives experts up, in millionths.
const LAG_MAX: u64 = 30_000;
/// Share of a plan's expected loss that moving experts for the sake of balance must save.
const GAIN_MIN: f64 = 0.02;
/// Rounds of planning from the previous plan's result, to see whether moving more is worth it again.
const MOVES_MAX: usize = 4;
/// Rounds of rebalancing before a plan is taken as it is. Each round improves it; one or two suffice in practice.
const REBALANCES_MAX: usize = 8;

/// The budgets cannot hold every expert once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the budgets of {nodes} node(s) leave {available_bytes} bytes for experts, but the model's experts need {needed_bytes} bytes at \
     the lowest accepted precision: {missing_bytes} bytes are missing; raise --memory on a node, add a node, accept a lower precision \
     or give a node --disk"
)]
pub struct Shortfall {
    /// Nodes that were counted.
    pub nodes: usize,
    /// What all experts need, once each, at the fewest bits that any node accepts.
    pub needed_bytes: u64,
    /// What the budgets leave in memory and on disks, in whole experts.
    pub available_bytes: u64,
    /// The difference.
    pub missing_bytes: u64,
    /// The best possible table, in which some experts have no replica.
    pub partial: Plan,
}

/// Plans the placement of `experts` on `candidates`, starting from `current` replicas.
///
/// # Errors
/// [`Shortfall`] when not every expert can be held once; its `partial` plan still fits the budgets.
pub fn plan(
    experts: &ExpertSizes,
    candidates: &[Candidate],
    current: &Current,
    loss: &ExpectedLoss,
) -> Result<Plan, Box<Shortfall>> {
    plan_again(experts, candidates, current, loss, MOVES_MAX)
}

fn plan_again(
    experts: &ExpertSizes,
    candidates: &[Candidate],
    current: &Current,
    loss: &ExpectedLoss,
    moves: usize,
) -> Result<Plan, Box<Shortfall>> {
    let planner =
        Planner { experts, candidates, current, loss, ranked: loss.popularity().ranked(experts.keys().copied()) };
    if let Some(exact) = planner.exact() {
        return Ok(exact.into_plan());
    }
    // As few moves as possible, if every replica is then as exact as accepted.
    let hot = loss.popularity().hot(experts.keys().copied());
    let (mut table, missing) = planner.mixed(&hot, |_| REPLICAS_WANTED);
    if !missing.is_empty() {
        if candidates.iter().all(|candidate| candidate.page_bytes_max == 0) {
            return Err(Box::new(planner.shortfall(table, &missing)));
        }
        let (table, missing) = paged(experts, candidates, current, &planner.ranked, planner.exchange_bytes());
        return if missing.is_empty() {
            Ok(planner.with_paging(table.into_plan()))
        } else {
            Err(Box::new(planner.shortfall(table, &missing)))
        };
    }
    upgrade(&mut table, loss);
    if table.is_saturated() {
        planner.fill(&mut table);
        return Ok(table.into_plan());
    }
    // Else a cold expert's second replica is worth less than the bits it takes.
    let kept = |expert| if hot.contains(&expert) { REPLICAS_WANTED } else { 1 };
    let stay = planner.refine(planner.mixed(&hot, kept).0);
    // Sharing the fewest bits out by budget leaves each node room to upgrade what it holds. So a node that joined late has a share of
    // that too.
    let levelled = planner.levelled(&hot, kept).or_else(|| planner.levelled(&hot, |_| 1));
    let moved = levelled.map(|table| planner.refine(table));
    match moved.filter(|moved| loss.of_plan(moved) < loss.of_plan(&stay) * (1.0 - GAIN_MIN)) {
        None => Ok(stay),
        // Plan from what will be held when everything has arrived, so that the plan is stable then.
        Some(moved) if moves > 0 => plan_again(experts, candidates, &held_as(&moved), loss, moves - 1),
        Some(moved) => Ok(moved),
    }
}

/// The replicas of a plan, all there.
fn held_as(plan: &Plan) -> Current {
    let replica = |precision| Replica { precision, ready: Some(precision) };
    let each = plan.replicas.iter();
    each.map(|(&expert, nodes)| (expert, nodes.iter().map(|(&node, &p)| (node, replica(p))).collect())).collect()
}

struct Planner<'a> {
    experts: &'a ExpertSizes,
    candidates: &'a [Candidate],
    current: &'a Current,
    loss: &'a ExpectedLoss,
    /// The most popular first.
    ranked: Vec<ExpertId>,
}

impl<'a> Planner<'a> {
    /// Everything as in the checkpoint, with second replicas where there is room; `None` if not every expert fits.
    fn exact(&self) -> Option<Table<'a>> {
        let (exact, others): (Vec<_>, Vec<_>) =
            self.candidates.iter().cloned().partition(|candidate| candidate.accepts.has(Precision::Exact));
        let exact: Vec<_> =
            exact.into_iter().map(|c| Candidate { accepts: Bounds::only(Precision::Exact), ..c }).collect();
        let mut table = Table::new(self.experts, &exact, self.current);
        self.keep(&mut table, |_| REPLICAS_WANTED);
        if !self.cover(&mut table).is_empty() {
            return None;
        }
        self.second(&mut table, |_| true);
        // Nodes that do not accept exact weights hold second replicas only.
        table.admit(&others);
        self.keep(&mut table, |_| REPLICAS_WANTED);
        for &expert in &self.ranked {
            if table.count(expert) < REPLICAS_WANTED {
                place(&mut table, expert);
            }
        }
        upgrade(&mut table, self.loss);
        Some(table)
    }

    /// Room that each node keeps for exchanging a replica: during the exchange both forms are in memory.
    fn exchange_bytes(&self) -> u64 {
        self.experts.values().filter_map(|choices| choices.bytes(Precision::Q8)).max().unwrap_or(0)
    }

    /// A table without replicas, in which each node keeps room for an exchange.
    fn empty(&self) -> Table<'a> {
        let exchange_bytes = self.exchange_bytes();
        let less = |c: &Candidate| c.expert_bytes_max.saturating_sub(exchange_bytes);
        let candidates = self.candidates.iter().map(|c| Candidate { expert_bytes_max: less(c), ..c.clone() });
        Table::new(self.experts, &candidates.collect::<Vec<_>>(), self.current)
    }

    /// Everything at the fewest bits accepted, the hot experts twice, with as many present replicas of each as are `kept`; and the
    /// experts for which no node has room.
    fn mixed(&self, hot: &BTreeSet<ExpertId>, kept: impl Fn(ExpertId) -> usize) -> (Table<'a>, Vec<ExpertId>) {
        let mut table = self.empty();
        self.keep(&mut table, kept);
        let missing = self.cover(&mut table);
        if missing.is_empty() {
            self.second(&mut table, |expert| hot.contains(&expert));
        }
        (table, missing)
    }

    /// The same with budgets used evenly: an expert stays only where its node's share of free room is not far behind. Experts are
    /// considered one after the other, so that those that stay and those that move are equally popular. A levelled plan stays as it is.
    /// `None` if some expert then has no place.
    fn levelled(&self, hot: &BTreeSet<ExpertId>, kept: impl Fn(ExpertId) -> usize) -> Option<Table<'a>> {
        let mut table = self.empty();
        for &expert in &self.by_weight() {
            for _ in 0..kept(expert) {
                let emptiest = table.emptiest(table.nodes().filter(|&node| table.may_hold_floor(expert, node)));
                let Some(emptiest) = emptiest else { break };
                let level = |node: &NodeId| table.room_share(emptiest) - table.room_share(*node) <= LAG_MAX;
                let node = self.holder(&table, expert).filter(level).unwrap_or(emptiest);
                table.put_floor(expert, node);
            }
            if table.count(expert) == 0 {
                return None;
            }
        }
        self.second(&mut table, |expert| hot.contains(&expert));
        Some(table)
    }

    /// The plan with the table's room spent on precision, first by moving experts with a great loss to where there is room.
    fn refine(&self, mut table: Table<'_>) -> Plan {
        for _ in 0..REBALANCES_MAX {
            table.lower_all();
            upgrade(&mut table, self.loss);
            if !rebalance(&mut table, self.loss) {
                break;
            }
        }
        table.lower_all();
        upgrade(&mut table, self.loss);
        if table.is_saturated() {
            self.fill(&mut table);
        }
        table.into_plan()
    }

    /// The emptiest of the nodes that hold the expert now and may keep it; one that serves it rather than one that is to receive it.
    fn holder(&self, table: &Table<'_>, expert: ExpertId) -> Option<NodeId> {
        let holders = self.current.get(&expert).into_iter().flatten();
        let (ready, coming): (Vec<_>, Vec<_>) = holders
            .filter(|&(&node, _)| table.may_hold_floor(expert, node))
            .partition(|(_, replica)| replica.ready.is_some());
        let nodes = if ready.is_empty() { coming } else { ready };
        table.emptiest(nodes.into_iter().map(|(&node, _)| node))
    }

    /// Keeps present replicas: experts with one holder first, then the hot ones, in case a budget shrank.
    fn keep(&self, table: &mut Table<'_>, kept: impl Fn(ExpertId) -> usize) {
        let holders = |expert: &ExpertId| self.current.get(expert).map_or(0, |nodes| nodes.len());
        let mut ranked = self.ranked.clone();
        ranked.sort_by_key(|expert| holders(expert) > 1);
        for round in 0..REPLICAS_WANTED {
            for &expert in &ranked {
                if table.count(expert) > round || round >= kept(expert) {
                    continue;
                }
                if let Some(node) = self.holder(table, expert) {
                    table.put_floor(expert, node);
                }
            }
        }
    }

    /// One replica of each expert, the heaviest first so that the lightest fill the last gaps. Returns the experts without a place.
    fn cover(&self, table: &mut Table<'_>) -> Vec<ExpertId> {
        let mut missing = self.by_weight();
        missing.retain(|&expert| {
            table.count(expert) == 0 && !place(table, expert) && !evict_spare_for(table, expert, &self.ranked)
        });
        missing
    }

    /// The heaviest first, and of equals the most popular.
    fn by_weight(&self) -> Vec<ExpertId> {
        let mut by_weight = self.ranked.clone();
        by_weight.sort_by_key(|expert| Reverse(self.experts[expert].bytes(Precision::Exact)));
        by_weight
    }

    /// A second replica of the experts that are `wanted` twice, the most popular first.
    fn second(&self, table: &mut Table<'_>, wanted: impl Fn(ExpertId) -> bool) {
        for &expert in &self.ranked {
            if wanted(expert) && table.count(expert) < REPLICAS_WANTED && !place(table, expert) {
                exchange_for(table, expert);
            }
        }
    }

    /// Second replicas of the rest, where there is room for them at the highest precision.
    fn fill(&self, table: &mut Table<'_>) {
        for &expert in &self.ranked {
            if table.count(expert) < REPLICAS_WANTED {
                let highest = |node| table.choices(expert, node).last().copied();
                let roomy =
                    table.nodes().filter(|&node| highest(node).is_some_and(|to| table.may_hold(expert, node, to)));
                if let Some(node) = table.emptiest(roomy) {
                    let precision = highest(node).expect("seen just now");
                    table.put(expert, node, precision);
                }
            }
        }
    }

    /// The plan with the nodes that page and by how much.
    fn with_paging(&self, mut plan: Plan) -> Plan {
        let memories = self.candidates.iter().map(|c| (c.node, c.expert_bytes_max));
        let overrun = memories.map(|(node, memory)| (node, plan.bytes_on(self.experts, node).saturating_sub(memory)));
        plan.paged_bytes = overrun.filter(|(_, bytes)| *bytes > 0).collect();
        plan
    }

    fn shortfall(&self, table: Table<'_>, missing: &[ExpertId]) -> Shortfall {
        let lowest = self.candidates.iter().map(|candidate| candidate.accepts.lowest()).min().unwrap_or(Precision::Q4);
        let bytes = |expert: &ExpertId| {
            let mut choices = self.experts[expert].sensible().filter(|precision| *precision >= lowest);
            let least = choices.next().unwrap_or(Precision::Exact);
            self.experts[expert].bytes(least).unwrap_or(0)
        };
        let needed_bytes: u64 = self.experts.keys().map(bytes).sum();
        let missing_bytes = missing.iter().map(bytes).sum();
        Shortfall {
            nodes: self.candidates.len(),
            needed_bytes,
            available_bytes: needed_bytes - missing_bytes,
            missing_bytes,
            partial: self.with_paging(table.into_plan()),
        }
    }
}

/// Puts the expert on the emptiest node (by share of its budget) that has room and does not hold it.
fn place(table: &mut Table<'_>, expert: ExpertId) -> bool {
    let roomy = table.nodes().filter(|&node| table.may_hold_floor(expert, node));
    let emptiest = table.emptiest(roomy);
    emptiest.map(|node| table.put_floor(expert, node)).is_some()
}

/// Makes room for an expert without a replica by giving up one spare replica of another, the least popular first.
fn evict_spare_for(table: &mut Table<'_>, expert: ExpertId, ranked: &[ExpertId]) -> bool {
    let spares = ranked.iter().rev().filter(|&&other| table.count(other) > 1);
    let mut spares = spares.flat_map(|&other| table.of(other).map(move |(node, precision)| (other, node, precision)));
    let spare = spares.find(|&(other, node, precision)| {
        let floor = table.floor(expert, node);
        !table.is_last_that_has_it(other, node)
            && floor.is_some_and(|floor| table.room(node) + table.bytes(other, precision) >= table.bytes(expert, floor))
    });
    drop(spares);
    let Some((other, node, _)) = spare else { return false };
    table.take(other, node);
    table.put_floor(expert, node);
    true
}

/// The nodes with room already hold this expert: hand one of them something from a full node, and take its place there.
fn exchange_for(table: &mut Table<'_>, expert: ExpertId) -> bool {
    let (roomy, full): (Vec<_>, Vec<_>) = table.nodes().partition(|&node| table.held(expert, node).is_some());
    for &to in roomy.iter().filter(|&&to| table.room(to) >= table.least_bytes()) {
        for &from in &full {
            let Some(floor) = table.floor(expert, from) else { continue };
            let other = table.all().find(|&(other, node, precision)| {
                node == from
                    && !table.is_last_that_has_it(other, from)
                    && table.may_hold_floor(other, to)
                    && table.room(from) + table.bytes(other, precision) >= table.bytes(expert, floor)
            });
            if let Some((other, ..)) = other {
                table.take(other, from);
                table.put_floor(other, to);
                table.put_floor(expert, from);
                return true;
            }
        }
    }
    false
}
