//! What an answer is expected to lose where an expert is held less exactly than in the checkpoint.
//!
//! Owns [`ExpectedLoss`]: popularity times the relative error of the expert's output, per precision. Invariant: it is never
//! negative, never grows with precision, and is zero where the expert is exact. The layer's mean stands in for an expert that was not
//! measured. Where nothing was measured at all, a quantization step 16 times as wide stands in for the error, so that among equally
//! popular experts bytes alone decide.

use coel_store::{ExpertId, Loss, Precision};

use super::{Plan, Popularity};

/// Loss where nothing was measured: the error goes with the square of the step.
const ASSUMED: Loss = Loss { q4: 1.0, q8: 1.0 / 256.0 };

/// Expected loss per expert and precision.
#[derive(Debug, Clone)]
pub struct ExpectedLoss {
    popularity: Popularity,
    sensitivity: Vec<Vec<Loss>>,
    /// Mean of what was measured, per layer.
    means: Vec<Loss>,
}

impl ExpectedLoss {
    /// From popularity and sensitivity `[layers][experts]`; an empty sensitivity means that nothing was measured.
    pub fn new(popularity: Popularity, sensitivity: Vec<Vec<Loss>>) -> Self {
        let means = sensitivity.iter().map(|layer| mean(layer)).collect();
        Self { popularity, sensitivity, means }
    }

    /// How popular experts are.
    pub fn popularity(&self) -> &Popularity {
        &self.popularity
    }

    /// The loss of holding the expert at this precision, comparable only between experts of one model.
    pub fn of(&self, expert: ExpertId, precision: Precision) -> f64 {
        let layer = usize::from(expert.layer);
        let measured = self.sensitivity.get(layer).and_then(|layer| layer.get(usize::from(expert.index)));
        let loss = measured.copied().filter(|loss| loss.q4 > 0.0).or(self.means.get(layer).copied()).unwrap_or(ASSUMED);
        let loss = match precision {
            Precision::Q4 => loss.q4,
            Precision::Q8 => loss.q8.min(loss.q4),
            Precision::Exact => 0.0,
        };
        // One more: on other texts the router chooses experts, too, to which no row was routed here.
        (f64::from(self.popularity.of(expert)) + 1.0) * f64::from(loss)
    }

    /// The loss of a plan: for each expert the mean over its replicas, since any of them may be asked.
    pub fn of_plan(&self, plan: &Plan) -> f64 {
        let each = plan.replicas.iter().filter(|(_, nodes)| !nodes.is_empty()).map(|(&expert, nodes)| {
            nodes.values().map(|&precision| self.of(expert, precision)).sum::<f64>() / nodes.len() as f64
        });
        each.sum()
    }
}

/// The mean of the losses that were measured.
fn mean(layer: &[Loss]) -> Loss {
    let measured: Vec<_> = layer.iter().filter(|loss| loss.q4 > 0.0).collect();
    if measured.is_empty() {
        return ASSUMED;
    }
    let mean = |of: fn(&Loss) -> f32| measured.iter().map(|loss| of(loss)).sum::<f32>() / measured.len() as f32;
    Loss { q4: mean(|loss| loss.q4), q8: mean(|loss| loss.q8) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expert(index: u16) -> ExpertId {
        ExpertId { layer: 0, index }
    }

    #[test]
    fn loss_is_popularity_times_what_was_measured() {
        let losses = vec![Loss { q4: 0.5, q8: 0.01 }, Loss::default(), Loss { q4: 0.1, q8: 0.2 }];
        let loss = ExpectedLoss::new(Popularity::new(vec![vec![9, 0, 3]]), vec![losses]);
        let of = |index| Precision::ALL.map(|precision| loss.of(expert(index), precision));
        assert!((of(0)[0] - 5.0).abs() < 1e-6 && (of(0)[1] - 0.1).abs() < 1e-6 && of(0)[2] == 0.0);
        assert!((of(1)[0] - 0.3).abs() < 1e-6, "nothing was routed to it: the layer's mean");
        assert_eq!(of(2)[0], of(2)[1], "noise does not make a finer form worse");
    }

    #[test]
    fn where_nothing_was_measured_the_step_decides() {
        let loss = ExpectedLoss::new(Popularity::new(Vec::new()), Vec::new());
        assert_eq!(Precision::ALL.map(|precision| loss.of(expert(7), precision)), [1.0, 1.0 / 256.0, 0.0]);
    }
}
