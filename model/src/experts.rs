//! The call a decoder makes for its experts, as plain values.
//!
//! Owns [`ExpertCall`] and [`Assembly`]. Whoever serves a call (this machine's engine, or a node that asks others)
//! groups its rows by expert, gets one f32 row per (row, expert) from wherever, and assembles them in route order. The
//! invariant: an assembly is complete, each slot filled exactly once, or it is an error that names what is missing.

use std::collections::BTreeMap;

use crate::{layout::ExpertId, router::Route};

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

/// Outputs that do not fit the call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AssemblyError {
    #[error("row {row} of layer {layer} was not routed to expert {expert}, or came twice")]
    Unexpected { layer: u16, row: u32, expert: u16 },
    #[error("{found} values for {rows} rows of layer {layer}, expected {expected}")]
    Length { layer: u16, rows: usize, expected: usize, found: usize },
    #[error("no output yet for row {row} of {expert}")]
    Missing { row: u32, expert: ExpertId },
}

impl ExpertCall {
    /// Number of (row, expert) pairs, hence of output rows.
    pub fn slots(&self) -> usize {
        self.routes.iter().map(Vec::len).sum()
    }

    /// The rows each expert must compute, ascending in both.
    pub fn by_expert(&self) -> BTreeMap<u16, Vec<u32>> {
        let mut calls = BTreeMap::<u16, Vec<u32>>::new();
        for (row, routes) in self.routes.iter().enumerate() {
            for route in routes {
                calls.entry(route.expert).or_default().push(row as u32);
            }
        }
        calls
    }

    /// Row `row`, `[hidden]`.
    pub fn row(&self, row: u32) -> &[f32] {
        &self.rows[row as usize * self.hidden..][..self.hidden]
    }
}

/// Output rows of a call, gathered in any order.
#[derive(Clone, Debug)]
pub struct Assembly<'a> {
    call: &'a ExpertCall,
    /// First slot of each row.
    first: Vec<usize>,
    filled: Vec<bool>,
    outputs: Vec<f32>,
}

impl<'a> Assembly<'a> {
    pub fn new(call: &'a ExpertCall) -> Self {
        let mut slots = 0;
        let first = call.routes.iter().map(|routes| {
            slots += routes.len();
            slots - routes.len()
        });
        let first = first.collect();
        Self { call, first, filled: vec![false; slots], outputs: vec![0.0; slots * call.hidden] }
    }

    /// Stores what `expert` gave for `rows`: one output row of `hidden` values each, in that order.
    ///
    /// On an error the rows before the faulty one are stored, the others are not.
    pub fn put(&mut self, expert: u16, rows: &[u32], outputs: &[f32]) -> Result<(), AssemblyError> {
        let (layer, hidden) = (self.call.layer, self.call.hidden);
        let expected = rows.len() * hidden;
        if outputs.len() != expected {
            return Err(AssemblyError::Length { layer, rows: rows.len(), expected, found: outputs.len() });
        }
        for (row, output) in rows.iter().zip(outputs.chunks_exact(hidden)) {
            let unexpected = AssemblyError::Unexpected { layer, row: *row, expert };
            let routes = self.call.routes.get(*row as usize).ok_or_else(|| unexpected.clone())?;
            let place = routes.iter().position(|route| route.expert == expert);
            let slot = self.first[*row as usize] + place.ok_or_else(|| unexpected.clone())?;
            if std::mem::replace(&mut self.filled[slot], true) {
                return Err(unexpected);
            }
            self.outputs[slot * hidden..][..hidden].copy_from_slice(output);
        }
        Ok(())
    }

    /// All outputs in route order, `[slots, hidden]`: what `resume` takes.
    pub fn finish(self) -> Result<Vec<f32>, AssemblyError> {
        for (row, (routes, first)) in self.call.routes.iter().zip(&self.first).enumerate() {
            for (place, route) in routes.iter().enumerate() {
                if !self.filled[first + place] {
                    let expert = ExpertId { layer: self.call.layer, index: route.expert };
                    return Err(AssemblyError::Missing { row: row as u32, expert });
                }
            }
        }
        Ok(self.outputs)
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
    fn outputs_come_back_in_route_order() {
        let call = call();
        assert_eq!(call.by_expert(), BTreeMap::from([(0, vec![0]), (4, vec![0, 1]), (7, vec![1])]));
        let mut assembly = Assembly::new(&call);
        assembly.put(7, &[1], &[17.0]).unwrap();
        assembly.put(4, &[1, 0], &[14.0, 4.0]).unwrap();
        assembly.put(0, &[0], &[0.5]).unwrap();
        assert_eq!(assembly.finish().unwrap(), [0.5, 4.0, 14.0, 17.0]);
    }

    #[test]
    fn strangers_outputs_are_refused() {
        let call = call();
        let mut assembly = Assembly::new(&call);
        assert!(matches!(assembly.put(1, &[0], &[0.0]), Err(AssemblyError::Unexpected { .. })));
        assert!(matches!(assembly.put(0, &[9], &[0.0]), Err(AssemblyError::Unexpected { .. })));
        assert!(matches!(assembly.put(0, &[0], &[]), Err(AssemblyError::Length { .. })));
        assembly.put(0, &[0], &[0.0]).unwrap();
        assert!(matches!(assembly.put(0, &[0], &[0.0]), Err(AssemblyError::Unexpected { .. })));
        let missing = assembly.finish().unwrap_err();
        assert_eq!(missing.to_string(), "no output yet for row 0 of layer 3 expert 4");
    }
}
