//! How one node would hold a whole model in so many bytes: the planner's choice of precisions without its choice of nodes.
//!
//! Every expert at the least that is accepted, then the room that is left [spent](super::raise) as on any node.

use std::collections::BTreeMap;

use coel_store::{Bounds, ExpertId, NodeId, Precision};

use super::raise::raise;
use super::table::Table;
use super::{Candidate, Current, Experts, Harm};

/// The precision of each expert; `None` if they do not fit. At most `bytes_max` bytes, all within `accepts`.
pub fn mix(experts: &Experts, bytes_max: u64, accepts: Bounds, harm: &Harm) -> Option<BTreeMap<ExpertId, Precision>> {
    let (node, current) = (NodeId(0), Current::new());
    let mut table =
        Table::new(experts, &[Candidate { node, expert_bytes_max: bytes_max, page_bytes_max: 0, accepts }], &current);
    for &expert in experts.keys() {
        if !table.may_hold_floor(expert, node) {
            return None;
        }
        table.put_floor(expert, node);
    }
    raise(&mut table, harm);
    Some(table.all().map(|(expert, _, precision)| (expert, precision)).collect())
}
