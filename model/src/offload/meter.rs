//! Counters of offloading and prediction.
//!
//! Owns [`OffloadStats`], the counters, and [`Meter`], through which the compute thread shares them with its handles.
//! The invariant: counters only grow. To measure a stretch of time, take two readings and subtract
//! ([`OffloadStats::since`]). Nothing here decides by them.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use serde::Serialize;

/// How many choices of a router were predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// (row, expert) pairs that the router chose.
    pub pairs: u64,
    /// Of these, predicted.
    pub found: u64,
}

impl Tally {
    /// The share that was predicted; nothing if there were no pairs.
    pub fn recall(&self) -> Option<f64> {
        (self.pairs > 0).then(|| share(self.found, self.pairs))
    }

    fn add(&mut self, other: &Self) {
        self.pairs += other.pairs;
        self.found += other.found;
    }

    fn since(&self, earlier: &Self) -> Self {
        Self { pairs: self.pairs - earlier.pairs, found: self.found - earlier.found }
    }
}

/// How well the experts of one layer were predicted for rows that decode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LayerRecall {
    /// Predicted before any expert of the layer before was computed. Counted only on request.
    pub early: Tally,
    /// Predicted from the experts in memory while others were missing. These are prefetched.
    pub late: Tally,
}

impl LayerRecall {
    pub(crate) fn add(&mut self, other: &Self) {
        self.early.add(&other.early);
        self.late.add(&other.late);
    }
}

/// The GPU's memory, for an engine that offloads experts to the CPU; all 0 where everything is in one memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeviceStats {
    /// Bytes of the GPU's memory that experts may take.
    pub budget_bytes: u64,
    /// Experts on the GPU now.
    pub experts: usize,
    /// Bytes of the experts on the GPU now.
    pub bytes: u64,
    /// Of these bytes, those of experts that are on disk too.
    pub on_disk_bytes: u64,
    /// Experts that were on the GPU when a layer needed them.
    pub hits: u64,
    /// Experts that were promoted for a layer that needed them.
    pub promoted: u64,
    /// Experts that the CPU computed for a layer that needed them.
    pub on_cpu: u64,
    /// Bytes of weights that were promoted, needed or not.
    pub bytes_promoted: u64,
}

impl DeviceStats {
    /// Share of needed experts that were on the GPU; 1 if none was needed.
    pub fn hit_rate(&self) -> f64 {
        share(self.hits, self.hits + self.promoted + self.on_cpu)
    }

    fn add(&mut self, other: &Self) {
        (self.budget_bytes, self.experts) = (other.budget_bytes, other.experts);
        (self.bytes, self.on_disk_bytes) = (other.bytes, other.on_disk_bytes);
        self.hits += other.hits;
        self.promoted += other.promoted;
        self.on_cpu += other.on_cpu;
        self.bytes_promoted += other.bytes_promoted;
    }

    fn since(&self, earlier: &Self) -> Self {
        Self {
            hits: self.hits - earlier.hits,
            promoted: self.promoted - earlier.promoted,
            on_cpu: self.on_cpu - earlier.on_cpu,
            bytes_promoted: self.bytes_promoted - earlier.bytes_promoted,
            ..*self
        }
    }
}

/// What an engine's offloading has done so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct OffloadStats {
    /// Experts on disk.
    pub on_disk: usize,
    /// Bytes of memory in which experts on disk take turns.
    pub budget_bytes: u64,
    /// Experts on disk that are in memory now.
    pub in_memory: usize,
    /// Bytes of memory taken for experts on disk now. After the budget was made smaller, they exceed it for a moment.
    pub bytes_in_memory: u64,
    /// Whether the embedding table is on disk too, and read row by row.
    pub embedding_on_disk: bool,
    /// Experts on disk that were in memory when a batch or a call came to need them.
    pub hits: u64,
    /// Experts on disk that were not.
    pub misses: u64,
    /// Prefetches of experts on disk.
    pub prefetched: u64,
    /// Of these, the ones whose expert was needed afterwards.
    pub prefetch_used: u64,
    /// Bytes read from disk.
    pub bytes_read: u64,
    /// Time in which the compute thread had nothing to do but wait for the disk.
    pub stall: Duration,
    /// By layer; empty if nothing was predicted.
    pub recall: Vec<LayerRecall>,
    pub device: DeviceStats,
}

impl OffloadStats {
    /// Share of needed experts on disk that were in memory; 1 if none was needed.
    pub fn hit_rate(&self) -> f64 {
        share(self.hits, self.hits + self.misses)
    }

    /// The early and the late recall, each the mean over the layers that had pairs.
    pub fn mean_recall(&self) -> [Option<f64>; 2] {
        let mean = |of: fn(&LayerRecall) -> Tally| {
            let layers: Vec<f64> = self.recall.iter().filter_map(|layer| of(layer).recall()).collect();
            (!layers.is_empty()).then(|| layers.iter().sum::<f64>() / layers.len() as f64)
        };
        [mean(|layer| layer.early), mean(|layer| layer.late)]
    }

    /// Adds the counters of another stretch of time, and takes its gauges.
    pub fn add(&mut self, other: &Self) {
        (self.on_disk, self.budget_bytes, self.in_memory) = (other.on_disk, other.budget_bytes, other.in_memory);
        self.hits += other.hits;
        self.misses += other.misses;
        self.prefetched += other.prefetched;
        self.prefetch_used += other.prefetch_used;
        self.bytes_read += other.bytes_read;
        self.stall += other.stall;
        self.device.add(&other.device);
        self.recall.resize(self.recall.len().max(other.recall.len()), LayerRecall::default());
        for (sum, layer) in self.recall.iter_mut().zip(&other.recall) {
            sum.add(layer);
        }
    }

    /// The counters since `earlier`, with the present gauges.
    pub fn since(&self, earlier: &Self) -> Self {
        let recall = self.recall.iter().enumerate().map(|(layer, now)| {
            let before = earlier.recall.get(layer).copied().unwrap_or_default();
            LayerRecall { early: now.early.since(&before.early), late: now.late.since(&before.late) }
        });
        Self {
            recall: recall.collect(),
            hits: self.hits - earlier.hits,
            misses: self.misses - earlier.misses,
            prefetched: self.prefetched - earlier.prefetched,
            prefetch_used: self.prefetch_used - earlier.prefetch_used,
            bytes_read: self.bytes_read - earlier.bytes_read,
            stall: self.stall.saturating_sub(earlier.stall),
            device: self.device.since(&earlier.device),
            ..*self
        }
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 1.0 } else { part as f64 / whole as f64 }
}

/// The counters, shared by the compute thread and its handles.
#[derive(Debug, Default)]
pub(crate) struct Meter(Mutex<OffloadStats>);

impl Meter {
    pub(crate) fn read(&self) -> OffloadStats {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn update(&self, update: impl FnOnce(&mut OffloadStats)) {
        update(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_readings_are_subtracted() {
        let tally = |(pairs, found)| Tally { pairs, found };
        let recall = |early, late| LayerRecall { early: tally(early), late: tally(late) };
        let before =
            OffloadStats { hits: 3, misses: 1, recall: vec![recall((4, 2), (4, 3))], ..OffloadStats::default() };
        let stall = Duration::from_millis(5);
        let recalls = vec![recall((12, 4), (8, 6)), recall((8, 4), (0, 0)), recall((0, 0), (0, 0))];
        let now = OffloadStats { hits: 6, misses: 2, stall, recall: recalls, ..OffloadStats::default() };
        let since = now.since(&before);
        assert_eq!((since.hit_rate(), since.stall), (0.75, stall));
        assert_eq!(since.mean_recall(), [Some((0.25 + 0.5) / 2.0), Some(0.75)]);
        let mut sum = before;
        sum.add(&since);
        assert_eq!((sum.hits, sum.misses, sum.recall), (now.hits, now.misses, now.recall));
        let device = |hits, on_cpu| DeviceStats { hits, on_cpu, experts: 7, ..DeviceStats::default() };
        let (before, now) = (device(1, 1), device(4, 2));
        assert_eq!((now.since(&before).hit_rate(), now.since(&before).experts), (0.75, 7));
        assert_eq!(OffloadStats::default().mean_recall(), [None; 2]);
        assert_eq!(OffloadStats::default().hit_rate(), 1.0);
    }
}
