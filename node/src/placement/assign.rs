//! The planner's choice of precisions without its choice of nodes: one node holds the whole model in a given number of bytes.
//!
//! Every expert starts at the fewest bits accepted; the remaining room is [spent](super::upgrade) as on any node.

use std::collections::BTreeMap;

use coel_store::{Bounds, ExpertId, NodeId, Precision};

use super::table::Table;
use super::upgrade::upgrade;
use super::{Candidate, Current, ExpectedLoss};
use crate::budget::ExpertSizes;

/// The precision of each expert; `None` if they do not fit. At most `bytes_max` bytes, all within `accepts`.
pub fn assign_precisions(
    experts: &ExpertSizes,
    bytes_max: u64,
    accepts: Bounds,
    loss: &ExpectedLoss,
) -> Option<BTreeMap<ExpertId, Precision>> {
    let (node, current) = (NodeId(0), Current::new());
    let mut table =
        Table::new(experts, &[Candidate { node, expert_bytes_max: bytes_max, page_bytes_max: 0, accepts }], &current);
    for &expert in experts.keys() {
        if !table.may_hold_floor(expert, node) {
            return None;
        }
        table.put_floor(expert, node);
    }
    upgrade(&mut table, loss);
    Some(table.all().map(|(expert, _, precision)| (expert, precision)).collect())
}
