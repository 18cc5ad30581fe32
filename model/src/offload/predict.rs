//! Which experts the next layer will need.
//!
//! Owns [`Predictor`], and [`Prediction`]: the routes predicted for the rows of a batch, and how many came true. While
//! a layer waits for experts, its rows go ahead without them. The known part of the layer's output (from the shared
//! expert and the experts in memory, both computed anyway) passes through the next layer's own attention to its router.
//! This needs no training and no memory, and costs one attention while the layer waits for the disk. The invariant:
//! predictions change what is prefetched, and nothing else. Nothing here reads.

use super::meter::{LayerRecall, Tally};
use crate::nn::{batch::Batch, forward::ForwardContext, outputs::LayerOutputs, router::Route};

/// How the experts of the next layer are predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Predictor {
    /// Not at all.
    Off,
    /// By the next layer's attention and router, from the rows as far as they are known.
    #[default]
    Attention,
}

impl Predictor {
    /// Predicts from the `known` outputs which experts the next layer with experts will need, ascending, for each row
    /// of `batch`; nothing if there is no such layer.
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

/// The routes predicted for the next layer of a batch. Without rows, nothing was predicted.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Prediction {
    /// The layer that the routes are for.
    pub layer: usize,
    /// For each row, predicted before any expert of the layer before was computed.
    pub early: Vec<Vec<Route>>,
    /// For each row, predicted from the experts in memory while others were missing.
    pub late: Vec<Vec<Route>>,
}

impl Prediction {
    /// How many of the routes `chosen` in `layer` were predicted, over the rows for which `counts` holds.
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

/// The experts of some routes, by the sum of their weights, largest first.
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
    fn hits_are_counted_for_the_rows_that_count() {
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
    fn largest_weight_first() {
        let rows = [routes(&[(1, 0.5), (4, 0.3)]), routes(&[(4, 0.3), (7, 0.1)])];
        assert_eq!(by_weight(&rows), [4, 1, 7]);
    }
}
