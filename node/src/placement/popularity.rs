//! How often each expert is chosen, and which experts are hot.

use std::collections::BTreeSet;

use coel_store::ExpertId;

/// Routed rows per expert: `counts[layer][expert]`, counted at import on a named text (paper, Deployment: expert popularity).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Popularity {
    counts: Vec<Vec<u32>>,
}

impl Popularity {
    /// Popularity from counts `[layers][experts]`.
    pub fn new(counts: Vec<Vec<u32>>) -> Self {
        Self { counts }
    }

    /// Rows that were routed to the expert; 0 where nothing was counted.
    pub fn of(&self, expert: ExpertId) -> u32 {
        let layer = self.counts.get(usize::from(expert.layer));
        layer.and_then(|layer| layer.get(usize::from(expert.index))).copied().unwrap_or(0)
    }

    /// `experts`, the most popular first; ties in ascending order.
    pub fn ranked(&self, experts: impl IntoIterator<Item = ExpertId>) -> Vec<ExpertId> {
        let mut ranked: Vec<_> = experts.into_iter().collect();
        ranked.sort_by_key(|&expert| (std::cmp::Reverse(self.of(expert)), expert));
        ranked
    }

    /// The smallest set of experts with half of the routed mass.
    pub fn hot(&self, experts: impl IntoIterator<Item = ExpertId>) -> BTreeSet<ExpertId> {
        let ranked = self.ranked(experts);
        let total: u64 = ranked.iter().map(|&expert| u64::from(self.of(expert))).sum();
        let mut mass = 0;
        let mut hot = BTreeSet::new();
        for expert in ranked {
            if 2 * mass >= total {
                break;
            }
            mass += u64::from(self.of(expert));
            hot.insert(expert);
        }
        hot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expert(index: u16) -> ExpertId {
        ExpertId { layer: 0, index }
    }

    #[test]
    fn the_hot_set_is_the_smallest_with_half_of_the_mass() {
        let popularity = Popularity::new(vec![vec![10, 50, 30, 10]]);
        assert_eq!(popularity.hot((0..4).map(expert)), BTreeSet::from([expert(1)]));
        let popularity = Popularity::new(vec![vec![30, 30, 30, 10]]);
        assert_eq!(popularity.hot((0..4).map(expert)), BTreeSet::from([expert(0), expert(1)]));
    }

    #[test]
    fn without_counts_nothing_is_hot() {
        assert!(Popularity::new(Vec::new()).hot((0..4).map(expert)).is_empty());
    }
}
