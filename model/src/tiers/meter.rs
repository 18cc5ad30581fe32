//! What tiers and predictions came to.
//!
//! Owns [`Meter`], which the compute thread counts on, and [`TierStats`], what others see of it. Counters only grow, so
//! that whoever measures takes two readings and subtracts ([`TierStats::since`]).

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use serde::Serialize;

/// How well the experts of one layer were predicted for rows that decode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LayerRecall {
    /// (row, expert) pairs the router chose.
    pub pairs: u64,
    /// Of these, predicted as soon as the layer before had its attention.
    pub early: u64,
    /// Predicted once the layer before was computed.
    pub late: u64,
}

/// What an engine's tiers have done so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TierStats {
    /// Experts on disk, and the bytes of memory they take by turns.
    pub shelved: usize,
    pub budget_bytes: u64,
    /// Of these, in memory now.
    pub in_memory: usize,
    /// Bytes of memory taken for them now: more than the budget for a moment after that was made smaller.
    pub bytes_in_memory: u64,
    /// The embedding table is on disk too, read row by row.
    pub embedding_on_disk: bool,
    /// Experts needed by a flight that were in memory, and that were not.
    pub hits: u64,
    pub misses: u64,
    /// Experts read before they were needed; of these, needed before they were evicted.
    pub prefetched: u64,
    pub prefetch_used: u64,
    pub bytes_read: u64,
    /// Time in which the compute thread had nothing to do but wait for the disk.
    pub stall: Duration,
    /// By layer; empty where nothing was predicted.
    pub recall: Vec<LayerRecall>,
}

impl TierStats {
    /// Share of needs that were in memory; 1 where there were none.
    pub fn hit_rate(&self) -> f64 {
        share(self.hits, self.hits + self.misses)
    }

    /// Predicted experts among those chosen, over all layers: early, and late.
    pub fn mean_recall(&self) -> Option<[f64; 2]> {
        let layers: Vec<_> = self.recall.iter().filter(|layer| layer.pairs > 0).collect();
        let mean = |of: fn(&LayerRecall) -> u64| {
            layers.iter().map(|layer| share(of(layer), layer.pairs)).sum::<f64>() / layers.len() as f64
        };
        (!layers.is_empty()).then(|| [mean(|layer| layer.early), mean(|layer| layer.late)])
    }

    /// Adds what was done in another stretch of time.
    pub fn add(&mut self, other: &Self) {
        (self.shelved, self.budget_bytes, self.in_memory) = (other.shelved, other.budget_bytes, other.in_memory);
        self.hits += other.hits;
        self.misses += other.misses;
        self.prefetched += other.prefetched;
        self.prefetch_used += other.prefetch_used;
        self.bytes_read += other.bytes_read;
        self.stall += other.stall;
        self.recall.resize(self.recall.len().max(other.recall.len()), LayerRecall::default());
        for (sum, layer) in self.recall.iter_mut().zip(&other.recall) {
            sum.pairs += layer.pairs;
            sum.early += layer.early;
            sum.late += layer.late;
        }
    }

    /// What was done since `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        let recall = self.recall.iter().enumerate().map(|(layer, now)| {
            let before = earlier.recall.get(layer).copied().unwrap_or_default();
            LayerRecall {
                pairs: now.pairs - before.pairs,
                early: now.early - before.early,
                late: now.late - before.late,
            }
        });
        Self {
            recall: recall.collect(),
            hits: self.hits - earlier.hits,
            misses: self.misses - earlier.misses,
            prefetched: self.prefetched - earlier.prefetched,
            prefetch_used: self.prefetch_used - earlier.prefetch_used,
            bytes_read: self.bytes_read - earlier.bytes_read,
            stall: self.stall.saturating_sub(earlier.stall),
            ..*self
        }
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 1.0 } else { part as f64 / whole as f64 }
}

/// What is counted, shared by the compute thread and its handles.
#[derive(Debug, Default)]
pub(crate) struct Meter(Mutex<TierStats>);

impl Meter {
    pub(crate) fn read(&self) -> TierStats {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn update(&self, update: impl FnOnce(&mut TierStats)) {
        update(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_readings_are_subtracted() {
        let recall = |pairs, early, late| LayerRecall { pairs, early, late };
        let before = TierStats { hits: 3, misses: 1, recall: vec![recall(4, 2, 3)], ..TierStats::default() };
        let stall = Duration::from_millis(5);
        let recalls = vec![recall(12, 4, 9), recall(8, 4, 4), recall(0, 0, 0)];
        let now = TierStats { hits: 6, misses: 2, stall, recall: recalls, ..TierStats::default() };
        let since = now.since(&before);
        assert_eq!((since.hit_rate(), since.stall), (0.75, stall));
        assert_eq!(since.mean_recall(), Some([(0.25 + 0.5) / 2.0, (0.75 + 0.5) / 2.0]));
        let mut sum = before;
        sum.add(&since);
        assert_eq!((sum.hits, sum.misses, sum.recall), (now.hits, now.misses, now.recall));
        assert_eq!(TierStats::default().mean_recall(), None);
        assert_eq!(TierStats::default().hit_rate(), 1.0);
    }
}
