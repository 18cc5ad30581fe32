//! Which experts the next layer will need.
//!
//! Owns [`Predictor`] and [`Foresight`], what was predicted for the rows of a flight and how it came true. A prediction
//! is made twice: when a layer stops for its experts, which leaves time to read, and again when the layer is done, which
//! is surer. The invariant: predictions change nothing but what is read ahead. Nothing here reads.

use super::meter::LayerRecall;
use crate::{
    decoder::{Core, Flight},
    kernels::Kernels,
    router::Route,
};

/// How experts are predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Predictor {
    /// Not at all.
    Off,
    /// The layer's own router, shown the rows as they are now: a layer changes a row by little.
    #[default]
    Gate,
}

impl Predictor {
    /// For each row of `flight` the experts of `layer` it will need, ascending, as its residual is now; nothing for a
    /// layer without experts.
    pub(crate) fn predict<K: Kernels>(
        self,
        core: &mut Core<'_, K>,
        flight: &Flight<K>,
        layer: usize,
    ) -> Vec<Vec<Route>> {
        match self {
            Predictor::Off => Vec::new(),
            Predictor::Gate => flight.routes_if(core, layer),
        }
    }
}

/// What is predicted for the next layer of a flight.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Foresight {
    /// The layer it is about.
    layer: usize,
    /// For each row, early and late.
    predicted: [Vec<Vec<Route>>; 2],
}

impl Foresight {
    pub(crate) fn early(layer: usize, routes: Vec<Vec<Route>>) -> Self {
        Self { layer, predicted: [routes, Vec::new()] }
    }

    pub(crate) fn is_about(&self, layer: usize) -> bool {
        self.layer == layer && !self.predicted[0].is_empty()
    }

    pub(crate) fn late(&mut self, routes: Vec<Vec<Route>>) {
        self.predicted[1] = routes;
    }

    /// How much of what `layer` chose was predicted, over the rows for which `counts`.
    pub(crate) fn recall(&self, layer: usize, chosen: &[Vec<Route>], counts: impl Fn(usize) -> bool) -> LayerRecall {
        let mut recall = LayerRecall::default();
        if !self.is_about(layer) {
            return recall;
        }
        for (row, routes) in chosen.iter().enumerate().filter(|(row, _)| counts(*row)) {
            let found = |predicted: &[Vec<Route>]| {
                let predicted = predicted.get(row).map(Vec::as_slice).unwrap_or_default();
                let mine = |route: &&Route| predicted.iter().any(|other| other.expert == route.expert);
                routes.iter().filter(mine).count() as u64
            };
            recall.pairs += routes.len() as u64;
            recall.early += found(&self.predicted[0]);
            recall.late += found(&self.predicted[1]);
        }
        recall
    }
}

/// The experts of some routes, the weightiest first.
pub(crate) fn by_weight(routes: &[Vec<Route>]) -> Vec<u16> {
    let mut weights = std::collections::BTreeMap::<u16, f32>::new();
    for route in routes.iter().flatten() {
        *weights.entry(route.expert).or_default() += route.weight;
    }
    let mut experts: Vec<(u16, f32)> = weights.into_iter().collect();
    experts.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    experts.into_iter().map(|(expert, _)| expert).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(experts: &[(u16, f32)]) -> Vec<Route> {
        experts.iter().map(|(expert, weight)| Route { expert: *expert, weight: *weight }).collect()
    }

    #[test]
    fn what_came_true_is_counted_for_the_rows_that_count() {
        let mut foresight = Foresight::early(2, vec![routes(&[(1, 0.5), (4, 0.5)]), routes(&[(0, 0.5), (1, 0.5)])]);
        foresight.late(vec![routes(&[(1, 0.5), (5, 0.5)]), routes(&[(0, 0.5), (1, 0.5)])]);
        let chosen = [routes(&[(1, 0.6), (5, 0.4)]), routes(&[(2, 0.6), (3, 0.4)])];
        let first = foresight.recall(2, &chosen, |row| row == 0);
        assert_eq!(first, LayerRecall { pairs: 2, early: 1, late: 2 });
        let all = foresight.recall(2, &chosen, |_| true);
        assert_eq!(all, LayerRecall { pairs: 4, early: 1, late: 2 });
        assert_eq!(foresight.recall(3, &chosen, |_| true), LayerRecall::default(), "another layer");
    }

    #[test]
    fn the_weightiest_first() {
        let rows = [routes(&[(1, 0.5), (4, 0.3)]), routes(&[(4, 0.3), (7, 0.1)])];
        assert_eq!(by_weight(&rows), [4, 1, 7]);
    }
}
