//! The call a decoder makes for its experts, as plain values.
//!
//! Owns [`ExpertCall`] and the numbering of its outputs: slots count the (row, expert) pairs row by row, each row's
//! experts ascending. Whoever serves a call (this machine's engine, or a node that asks others) computes one f32 row
//! per slot. The invariant: a call's slots depend on its routes alone, so a part of a call and the whole of it agree on
//! what belongs where.

use std::collections::BTreeMap;

use crate::nn::router::Route;

/// Expert outputs wanted for the rows of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertCall {
    pub layer: u16,
    pub hidden: usize,
    /// `[n, hidden]`
    pub rows: Vec<f32>,
    /// For each row its routes, ascending by expert.
    pub routes: Vec<Vec<Route>>,
}

/// One (row, expert) pair, by its row and its place in the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    pub row: u32,
    pub slot: u32,
}

/// The pairs of each expert, ascending by row.
pub fn by_expert(routes: &[Vec<Route>]) -> BTreeMap<u16, Vec<Pair>> {
    let mut experts = BTreeMap::<u16, Vec<Pair>>::new();
    let rows = routes.iter().zip(0..).flat_map(|(routes, row)| routes.iter().map(move |route| (row, route.expert)));
    for ((row, expert), slot) in rows.zip(0..) {
        experts.entry(expert).or_default().push(Pair { row, slot });
    }
    experts
}

impl ExpertCall {
    /// Number of (row, expert) pairs, hence of output rows.
    pub fn slots(&self) -> usize {
        self.routes.iter().map(Vec::len).sum()
    }

    /// Row `row`, `[hidden]`.
    pub fn row(&self, row: u32) -> &[f32] {
        &self.rows[row as usize * self.hidden..][..self.hidden]
    }

    /// Keeps only the pairs whose expert is `wanted`; returns the slots they had.
    pub fn retain(&mut self, wanted: impl Fn(u16) -> bool) -> Vec<u32> {
        let (mut slots, mut slot) = (Vec::new(), 0);
        for routes in &mut self.routes {
            routes.retain(|route| {
                let keep = wanted(route.expert);
                slots.extend(keep.then_some(slot));
                slot += 1;
                keep
            });
        }
        slots
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> ExpertCall {
        let routes = |experts: [u16; 2]| experts.map(|expert| Route { expert, weight: 0.5 }).to_vec();
        ExpertCall { layer: 3, hidden: 1, rows: vec![1.0, 2.0], routes: vec![routes([0, 4]), routes([4, 7])] }
    }

    #[test]
    fn slots_count_pairs_row_by_row() {
        let call = call();
        let pair = |row, slot| Pair { row, slot };
        let expected =
            BTreeMap::from([(0, vec![pair(0, 0)]), (4, vec![pair(0, 1), pair(1, 2)]), (7, vec![pair(1, 3)])]);
        assert_eq!(by_expert(&call.routes), expected);
        assert_eq!((call.slots(), call.row(1)), (4, &[2.0][..]));
    }

    #[test]
    fn a_part_of_a_call_knows_where_its_outputs_belong() {
        let mut part = call();
        assert_eq!(part.retain(|expert| expert != 4), [0, 3]);
        assert_eq!(part.routes.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(part.retain(|expert| expert == 7), [1]);
        assert!(part.routes[0].is_empty());
        assert_eq!(part.retain(|_| false), [] as [u32; 0]);
        assert_eq!(part.slots(), 0);
    }
}
