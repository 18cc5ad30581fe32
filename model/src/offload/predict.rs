//! Which experts the next layer will need.
//!
//! Owns [`Predictor`] and [`Prediction`], what was predicted for the rows of a batch and how it came true. While a layer
//! waits for experts, the rows go on without them: what is known of the layer's output (the shared expert's part, and
//! that of the experts in memory, all of which is computed anyway) passes through the next layer's own attention to its
//! router. That takes no training and no memory, and costs one attention where the disk is waited for. The invariant:
//! predictions change nothing but what is read ahead. Nothing here reads.

use super::meter::{LayerRecall, Tally};
use crate::nn::{batch::Batch, forward::ForwardContext, outputs::LayerOutputs, router::Route};

/// How experts are predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Predictor {
    /// Not at all.
    Off,
    /// By the next layer's attention and router, shown the rows as far as they are known.
    #[default]
    Attention,
}

impl Predictor {
    /// For each row of `batch` the experts that the next layer with experts will need, ascending, as far as `known`
    /// tells; nothing if there is no such layer.
    pub(crate) fn predict(
        self,
        context: &mut ForwardContext<'_>,
        batch: &Batch,
        known: &LayerOutputs,
    ) -> Vec<Vec<Route>> {
        match self {
            Predictor::Off => Vec::new(),
            Predictor::Attention => context.routes_ahead(batch, known),
        }
    }
}

/// What is predicted for the next layer of a batch; nothing where there are no rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Prediction {
    /// The layer it is about.
    pub layer: usize,
    /// For each row, before any expert of the layer before was computed.
    pub early: Vec<Vec<Route>>,
    /// With those that were in memory, while others were missing.
    pub late: Vec<Vec<Route>>,
}

impl Prediction {
    /// How much of what `layer` chose was predicted, over the rows for which `counts`.
    pub(crate) fn recall(&self, layer: usize, chosen: &[Vec<Route>], counts: impl Fn(usize) -> bool) -> LayerRecall {
        let tally = |predicted: &[Vec<Route>]| {
            let mut tally = Tally::default();
            let rows = predicted.iter().zip(chosen).enumerate().filter(|(row, _)| counts(*row));
            for (predicted, chosen) in rows.map(|(_, row)| row) {
                let found = |route: &&Route| predicted.iter().any(|other| other.expert == route.expert);
                tally.pairs += chosen.len() as u64;
                tally.found += chosen.iter().filter(found).count() as u64;
            }
            tally
        };
        match self.layer == layer {
            true => LayerRecall { early: tally(&self.early), late: tally(&self.late) },
            false => LayerRecall::default(),
        }
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
        let early = vec![routes(&[(1, 0.5), (4, 0.5)]), routes(&[(0, 0.5), (1, 0.5)])];
        let late = vec![routes(&[(1, 0.5), (5, 0.5)]), routes(&[(0, 0.5), (2, 0.5)])];
        let chosen = [routes(&[(1, 0.6), (5, 0.4)]), routes(&[(2, 0.6), (3, 0.4)])];
        let tally = |pairs, found| Tally { pairs, found };
        let prediction = Prediction { layer: 2, early, late };
        let first = prediction.recall(2, &chosen, |row| row == 0);
        assert_eq!(first, LayerRecall { early: tally(2, 1), late: tally(2, 2) });
        let all = prediction.recall(2, &chosen, |_| true);
        assert_eq!(all, LayerRecall { early: tally(4, 1), late: tally(4, 3) });
        assert_eq!(prediction.recall(3, &chosen, |_| true), LayerRecall::default(), "another layer");
        let none = Prediction { early: Vec::new(), ..prediction };
        assert_eq!(none.recall(2, &chosen, |_| true).early, Tally::default(), "nothing was predicted then");
    }

    #[test]
    fn the_weightiest_first() {
        let rows = [routes(&[(1, 0.5), (4, 0.3)]), routes(&[(4, 0.3), (7, 0.1)])];
        assert_eq!(by_weight(&rows), [4, 1, 7]);
    }
}
