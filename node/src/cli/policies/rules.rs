//! Rules by which experts get more bits than the fewest, compared at the same number of bytes.
//!
//! Owns [`Policy`] and the loss that each expects of every expert. Invariant: the planner makes the choice itself
//! ([`assign_precisions`]) under every policy; policies differ only in the loss it is told to avoid. It measures nothing.

use std::collections::BTreeMap;

use coel_store::{Bounds, ExpertId, Loss, Precision};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::budget::ExpertSizes;
use crate::placement::{ExpectedLoss, Popularity, assign_precisions};

/// A rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// All alike: as many of every layer, evenly spread.
    Uniform,
    /// At random.
    Random {
        /// Same seed, same choice.
        seed: u64,
    },
    /// The most popular first: the paper's rule.
    Popularity,
    /// Popularity times measured sensitivity: what the planner goes by.
    ExpectedLoss,
}

impl Policy {
    /// As tables spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Random { .. } => "random",
            Self::Popularity => "popularity",
            Self::ExpectedLoss => "expected loss",
        }
    }

    /// The loss that this rule expects of each of `experts`, given what was measured.
    pub fn expected_loss(self, experts: &ExpertSizes, measured: &Measured) -> ExpectedLoss {
        // Alike in all but their turn: the nth of a sequence that leaves no gaps, or of none.
        let turns = |turn: &mut dyn FnMut(u32) -> u32| {
            let layers = experts.keys().map(|expert| usize::from(expert.layer) + 1).max().unwrap_or(0);
            let mut counts = vec![Vec::new(); layers];
            for (n, expert) in (0..).zip(experts.keys()) {
                let layer: &mut Vec<u32> = &mut counts[usize::from(expert.layer)];
                layer.resize(layer.len().max(usize::from(expert.index) + 1), 0);
                layer[usize::from(expert.index)] = turn(n) >> 8;
            }
            ExpectedLoss::new(Popularity::new(counts), Vec::new())
        };
        match self {
            // Multiples of the golden ratio lie evenly, however many of them are taken.
            Self::Uniform => turns(&mut |n| n.wrapping_mul(2_654_435_769)),
            Self::Random { seed } => {
                let mut random = SmallRng::seed_from_u64(seed);
                turns(&mut |_| random.random())
            }
            Self::Popularity => ExpectedLoss::new(measured.popularity.clone(), Vec::new()),
            Self::ExpectedLoss => ExpectedLoss::new(measured.popularity.clone(), measured.sensitivity.clone()),
        }
    }

    /// The precision of each expert, Q4 or Q8, in at most `bytes_max`; `None` if not even Q4 fits.
    pub fn assign(
        self,
        experts: &ExpertSizes,
        bytes_max: u64,
        measured: &Measured,
    ) -> Option<BTreeMap<ExpertId, Precision>> {
        let accepts = Bounds::new(Precision::Q4, Precision::Q8).expect("in order");
        assign_precisions(experts, bytes_max, accepts, &self.expected_loss(experts, measured))
    }
}

/// What a survey found, as the planner reads it.
#[derive(Debug, Clone)]
pub struct Measured {
    /// How often experts were chosen.
    pub popularity: Popularity,
    /// What their outputs lose, `[layers][experts]`.
    pub sensitivity: Vec<Vec<Loss>>,
}

/// What experts of `q4` bytes at Q4 and `q8` at Q8 take at so many bits a weight, where Q4 is 4.5 and Q8 is 8.5 of them.
pub fn bytes_at(bits: f64, q4: u64, q8: u64) -> u64 {
    q4 + ((bits - 4.5) / 4.0 * q8.saturating_sub(q4) as f64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::SizeByPrecision;

    const LAYERS: u16 = 6;
    const PER_LAYER: u16 = 24;

    fn experts() -> ExpertSizes {
        let all = (0..LAYERS).flat_map(|layer| (0..PER_LAYER).map(move |index| ExpertId { layer, index }));
        all.map(|expert| (expert, SizeByPrecision::new([Some(500), Some(900), Some(1600)]))).collect()
    }

    /// Popular at the end of every layer, sensitive in the first.
    fn measured() -> Measured {
        let loss = |layer| Loss { q4: if layer == 0 { 0.3 } else { 0.02 }, q8: 0.0 };
        Measured {
            popularity: Popularity::new(vec![(0..u32::from(PER_LAYER)).map(|n| 10 * n).collect(); usize::from(LAYERS)]),
            sensitivity: (0..LAYERS).map(|layer| vec![loss(layer); usize::from(PER_LAYER)]).collect(),
        }
    }

    fn upgraded(policy: Policy) -> Vec<ExpertId> {
        let experts = experts();
        let bytes = bytes_at(5.5, 144 * 500, 144 * 900);
        let mixed = policy.assign(&experts, bytes, &measured()).unwrap();
        assert_eq!(mixed.len(), experts.len());
        mixed.into_iter().filter(|(_, precision)| *precision == Precision::Q8).map(|(expert, _)| expert).collect()
    }

    #[test]
    fn every_rule_upgrades_a_quarter_at_five_and_a_half_bits() {
        for policy in [Policy::Uniform, Policy::Random { seed: 1 }, Policy::Popularity, Policy::ExpectedLoss] {
            assert_eq!(upgraded(policy).len(), 36, "{policy:?}");
        }
        let (none, all) = (bytes_at(4.5, 144 * 500, 144 * 900), bytes_at(8.5, 144 * 500, 144 * 900));
        assert_eq!((none, all), (144 * 500, 144 * 900));
        assert!(Policy::Uniform.assign(&experts(), none - 1, &measured()).is_none());
    }

    #[test]
    fn rules_upgrade_what_they_say() {
        let in_layer = |experts: &[ExpertId], layer| experts.iter().filter(|expert| expert.layer == layer).count();
        let uniform = upgraded(Policy::Uniform);
        assert!((0..LAYERS).all(|layer| (5..=7).contains(&in_layer(&uniform, layer))), "{uniform:?}");
        let popular = upgraded(Policy::Popularity);
        assert!(popular.iter().all(|expert| expert.index >= PER_LAYER - 6), "{popular:?}");
        let lossy = upgraded(Policy::ExpectedLoss);
        assert!(in_layer(&lossy, 0) > 18, "{lossy:?}");
        let random = |seed| upgraded(Policy::Random { seed });
        assert_eq!(random(1), random(1));
        assert_ne!(random(1), random(2));
    }
}
