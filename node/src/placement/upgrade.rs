//! Spends the remaining room on precision.
//!
//! Greedy on each node by itself: the step that saves the most expected loss per byte comes first. Invariant: with the same holders,
//! more room never gives more loss. Where the smaller budget has to pass over a step, everything else that fits there saves less per
//! byte than the step would, and takes fewer bytes.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use coel_store::{ExpertId, NodeId, Precision};

use super::ExpectedLoss;
use super::table::Table;

/// A replica made more exact.
#[derive(Debug, Clone, Copy)]
struct Step {
    /// Expected loss saved per byte.
    density: f64,
    expert: ExpertId,
    node: NodeId,
    to: Precision,
}

impl Ord for Step {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_place = || (other.expert, other.node, other.to).cmp(&(self.expert, self.node, self.to));
        self.density.total_cmp(&other.density).then_with(by_place)
    }
}

impl PartialOrd for Step {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Step {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Step {}

/// The best step up from `from`, to a precision below `below` if that is given.
fn step(
    table: &Table<'_>,
    loss: &ExpectedLoss,
    (expert, node, from): (ExpertId, NodeId, Precision),
    below: Option<Precision>,
) -> Option<Step> {
    let share = table.count(expert).max(1) as f64;
    let choices = table.choices(expert, node).into_iter();
    let higher = choices.filter(|&to| to > from && below.is_none_or(|below| to < below));
    let steps = higher.map(|to| {
        let bytes = table.bytes(expert, to) - table.bytes(expert, from);
        let saved = (loss.of(expert, from) - loss.of(expert, to)) / share;
        Step { density: saved / bytes as f64, expert, node, to }
    });
    steps.filter(|step| step.density > 0.0).max()
}

/// Makes replicas more exact until no step fits.
pub(super) fn upgrade(table: &mut Table<'_>, loss: &ExpectedLoss) {
    let mut steps: BinaryHeap<_> = table.all().filter_map(|replica| step(table, loss, replica, None)).collect();
    while let Some(best) = steps.pop() {
        let Step { expert, node, to, .. } = best;
        let from = table.held(expert, node).expect("a step is a replica's");
        // What does not fit now will not fit later: perhaps a lesser step does.
        let next = if table.change(expert, node, to) {
            step(table, loss, (expert, node, to), None)
        } else {
            step(table, loss, (expert, node, from), Some(to))
        };
        steps.extend(next);
    }
}

/// Moves experts to nodes that have room to hold them more exactly, those with the greatest loss first. Experts that are held twice
/// stay where they are. Returns whether anything moved.
pub(super) fn rebalance(table: &mut Table<'_>, loss: &ExpectedLoss) -> bool {
    let mut worst: Vec<_> = table
        .all()
        .filter(|&(expert, _, _)| table.count(expert) == 1)
        .map(|(expert, node, precision)| (loss.of(expert, precision), expert, node, precision))
        .collect();
    worst.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let mut moved = false;
    for (now, expert, from, precision) in worst {
        let choices = |node: NodeId| table.choices(expert, node).into_iter().map(move |to| (to, node));
        let better =
            table.nodes().flat_map(choices).filter(|&(to, node)| to > precision && table.may_hold(expert, node, to));
        let step = |(to, node)| {
            let density = (now - loss.of(expert, to)) / table.bytes(expert, to) as f64;
            Step { density, expert, node, to }
        };
        let best = better.map(step).filter(|step| step.density > 0.0).max();
        if let Some(Step { node, to, .. }) = best {
            table.take(expert, from);
            table.put(expert, node, to);
            moved = true;
        }
    }
    moved
}
