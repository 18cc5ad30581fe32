//! What a node counts, for `/metrics` and `coel status`.

use std::sync::atomic::{AtomicU64, Ordering};

use coel_model::offload::meter::OffloadStats;
use coel_model::serve::engine::Activity;
use coel_store::Precision;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

/// Precision as a label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct At {
    precision: &'static str,
}

/// A layer, and when its experts were predicted, as labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PredictedLayer {
    layer: u32,
    when: &'static str,
}

/// The node's counters and gauges. Counters only grow while the process lives.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// (row, expert) pairs this home computed itself.
    pub rows_local: Counter,
    /// (row, expert) pairs this home had computed by peers.
    pub rows_remote: Counter,
    /// (row, expert) pairs computed for other homes.
    pub rows_served: Counter,
    /// Expert calls that failed and went to another replica or were given up.
    pub expert_calls_failed: Counter,
    /// Generations taken.
    pub requests: Counter,
    /// Generations that ended with an error.
    pub requests_failed: Counter,
    /// Tokens generated.
    pub tokens: Counter,
    /// Answers that wait for experts whose hosts are away.
    pub answers_waiting: Gauge,
    /// Bytes received over the weight stream.
    pub bytes_fetched: Counter,
    /// Bytes sent over the weight stream.
    pub bytes_sent: Counter,
    /// Damaged blobs that were replaced.
    pub blobs_repaired: Counter,
    /// Batches that went through the layers together.
    batches: Counter,
    /// Sessions in them; over batches, how many are computed at once.
    batch_sessions: Counter,
    /// Rows in them.
    batch_rows: Counter,
    /// Requests of sessions that wait for a batch.
    sessions_waiting: Gauge,
    /// Pages of the KV pool that sessions have.
    kv_pages_used: Gauge,
    /// Pages of the KV pool.
    kv_pages: Gauge,
    /// What became of experts on disk.
    offload: OffloadMetrics,
    /// Experts loaded, by precision.
    experts: Family<At, Gauge>,
    /// Their weights in bytes, by precision.
    expert_bytes: Family<At, Gauge>,
    /// The ledger, in bytes.
    pub memory_bytes: Gauge,
    /// What the ledger may reach, in bytes.
    pub memory_budget_bytes: Gauge,
    /// Version of the placement.
    pub epoch: Gauge,
    /// Members that are up, this node included.
    pub nodes_up: Gauge,
    /// Share of experts with a ready replica on a live node.
    pub coverage: Gauge<f64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("coel");
        let mut metrics = Self {
            registry: Registry::default(),
            rows_local: Counter::default(),
            rows_remote: Counter::default(),
            rows_served: Counter::default(),
            expert_calls_failed: Counter::default(),
            requests: Counter::default(),
            requests_failed: Counter::default(),
            tokens: Counter::default(),
            answers_waiting: Gauge::default(),
            bytes_fetched: Counter::default(),
            bytes_sent: Counter::default(),
            blobs_repaired: Counter::default(),
            batches: Counter::default(),
            batch_sessions: Counter::default(),
            batch_rows: Counter::default(),
            sessions_waiting: Gauge::default(),
            kv_pages_used: Gauge::default(),
            kv_pages: Gauge::default(),
            offload: OffloadMetrics::register(&mut registry),
            experts: Family::default(),
            expert_bytes: Family::default(),
            memory_bytes: Gauge::default(),
            memory_budget_bytes: Gauge::default(),
            epoch: Gauge::default(),
            nodes_up: Gauge::default(),
            coverage: Gauge::default(),
        };
        for (name, help, counter) in [
            ("rows_local", "(row, expert) pairs computed by this home", &metrics.rows_local),
            ("rows_remote", "(row, expert) pairs computed by peers for this home", &metrics.rows_remote),
            ("rows_served", "(row, expert) pairs computed here for other homes", &metrics.rows_served),
            ("expert_calls_failed", "Expert calls that another replica had to take over", &metrics.expert_calls_failed),
            ("requests", "Generations taken", &metrics.requests),
            ("requests_failed", "Generations that ended with an error", &metrics.requests_failed),
            ("tokens", "Tokens generated", &metrics.tokens),
            ("blobs_repaired", "Damaged blobs of weights that were replaced", &metrics.blobs_repaired),
            ("flights", "Batches that went through the layers together", &metrics.batches),
            ("flight_sessions", "Sessions in those batches", &metrics.batch_sessions),
            ("flight_rows", "Rows in those batches", &metrics.batch_rows),
        ] {
            registry.register(name, help, counter.clone());
        }
        for (name, help, counter) in [
            ("weights_received", "Weights received from peers", &metrics.bytes_fetched),
            ("weights_sent", "Weights sent to peers", &metrics.bytes_sent),
        ] {
            registry.register_with_unit(name, help, Unit::Bytes, counter.clone());
        }
        for (name, help, gauge) in [
            ("memory", "Trunk, experts, KV cache and buffers, as reserved", &metrics.memory_bytes),
            ("memory_budget", "What the node may reserve", &metrics.memory_budget_bytes),
        ] {
            registry.register_with_unit(name, help, Unit::Bytes, gauge.clone());
        }
        for (name, help, gauge) in [
            ("sessions_waiting", "Requests of sessions that wait for a batch", &metrics.sessions_waiting),
            ("answers_waiting", "Answers that wait for experts whose hosts are away", &metrics.answers_waiting),
            ("kv_pages_used", "Pages of the KV pool that sessions have", &metrics.kv_pages_used),
            ("kv_pages", "Pages of the KV pool", &metrics.kv_pages),
            ("epoch", "Version of the placement", &metrics.epoch),
            ("nodes_up", "Members that are up", &metrics.nodes_up),
        ] {
            registry.register(name, help, gauge.clone());
        }
        registry.register("experts", "Experts loaded", metrics.experts.clone());
        let help = "Weights of the experts loaded";
        registry.register_with_unit("expert_weights", help, Unit::Bytes, metrics.expert_bytes.clone());
        registry.register("coverage", "Share of experts with a ready replica on a live node", metrics.coverage.clone());
        metrics.registry = registry;
        metrics
    }
}

impl Metrics {
    /// Takes over what the engine has counted so far.
    pub fn note_engine(&self, activity: Activity) {
        for (counter, count) in [
            (&self.batches, activity.batches),
            (&self.batch_sessions, activity.chunks),
            (&self.batch_rows, activity.rows),
        ] {
            counter.inner().store(count, Ordering::Relaxed);
        }
        self.sessions_waiting.set(activity.waiting as i64);
        self.kv_pages_used.set(activity.pages_used as i64);
        self.kv_pages.set(activity.pages as i64);
    }

    /// Takes over what the engine has counted of experts on disk.
    pub fn note_offload(&self, stats: &OffloadStats) {
        let offload = &self.offload;
        for (counter, count) in [
            (&offload.hits, stats.hits),
            (&offload.misses, stats.misses),
            (&offload.prefetched, stats.prefetched),
            (&offload.prefetch_used, stats.prefetch_used),
            (&offload.read_bytes, stats.bytes_read),
        ] {
            counter.inner().store(count, Ordering::Relaxed);
        }
        offload.stall_seconds.inner().store(stats.stall.as_secs_f64().to_bits(), Ordering::Relaxed);
        offload.on_disk.set(stats.on_disk as i64);
        let (device, of) = (&offload.device, &stats.device);
        for (counter, count) in [
            (&device.hits, of.hits),
            (&device.promoted, of.promoted),
            (&device.on_cpu, of.on_cpu),
            (&device.promoted_bytes, of.bytes_promoted),
        ] {
            counter.inner().store(count, Ordering::Relaxed);
        }
        for (gauge, value) in
            [(&device.experts, of.experts as u64), (&device.bytes, of.bytes), (&device.budget_bytes, of.budget_bytes)]
        {
            gauge.set(value as i64);
        }
        for (layer, recall) in (0..).zip(&stats.recall) {
            for (when, tally) in [("early", recall.early), ("late", recall.late)] {
                if let Some(share) = tally.recall() {
                    offload.recall.get_or_create(&PredictedLayer { layer, when }).set(share);
                }
            }
        }
    }

    /// Notes which experts are loaded, by precision and bytes of each.
    pub fn note_experts(&self, experts: impl Iterator<Item = (Precision, u64)>) {
        let mut totals = Precision::ALL.map(|precision| (precision, 0, 0));
        for (precision, bytes) in experts {
            let (_, count, sum) = &mut totals[precision as usize];
            (*count, *sum) = (*count + 1, *sum + bytes as i64);
        }
        for (precision, count, bytes) in totals {
            let at = At { precision: precision.name() };
            self.experts.get_or_create(&at).set(count);
            self.expert_bytes.get_or_create(&at).set(bytes);
        }
    }

    /// The OpenMetrics text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).expect("writing to a string cannot fail");
        text
    }
}

/// Experts on disk, and what came of having them in memory by turns.
#[derive(Debug, Default)]
struct OffloadMetrics {
    hits: Counter,
    misses: Counter,
    prefetched: Counter,
    prefetch_used: Counter,
    read_bytes: Counter,
    stall_seconds: Counter<f64, AtomicU64>,
    on_disk: Gauge,
    recall: Family<PredictedLayer, Gauge<f64, AtomicU64>>,
    device: Device,
}

/// Experts on a device above host memory; all 0 where everything is in one memory.
#[derive(Debug, Default)]
struct Device {
    hits: Counter,
    promoted: Counter,
    on_cpu: Counter,
    promoted_bytes: Counter,
    experts: Gauge,
    bytes: Gauge,
    budget_bytes: Gauge,
}

impl Device {
    fn register(&self, registry: &mut Registry) {
        for (name, help, counter) in [
            ("tier_device_hits", "Experts needed that were on the device, where some are in host memory", &self.hits),
            ("tier_device_raised", "Experts needed that were promoted to the GPU for it", &self.promoted),
            ("tier_device_by_host", "Experts needed that the CPU computed", &self.on_cpu),
        ] {
            registry.register(name, help, counter.clone());
        }
        let help = "Weights promoted to the GPU";
        registry.register_with_unit("tier_device_raised", help, Unit::Bytes, self.promoted_bytes.clone());
        registry.register("tier_device_experts", "Experts on the device", self.experts.clone());
        for (name, help, gauge) in [
            ("tier_device", "What they take there", &self.bytes),
            ("tier_device_budget", "What they may take there", &self.budget_bytes),
        ] {
            registry.register_with_unit(name, help, Unit::Bytes, gauge.clone());
        }
    }
}

impl OffloadMetrics {
    fn register(registry: &mut Registry) -> Self {
        let offload = Self::default();
        for (name, help, counter) in [
            ("tier_hits", "Experts on disk that were in memory when they were needed", &offload.hits),
            ("tier_misses", "Experts on disk that had to be waited for", &offload.misses),
            ("tier_prefetched", "Experts read before they were needed", &offload.prefetched),
            (
                "tier_prefetch_used",
                "Of these, needed before they had to go; the others were wasted",
                &offload.prefetch_used,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
        let help = "Weights of experts read from disk";
        registry.register_with_unit("tier_read", help, Unit::Bytes, offload.read_bytes.clone());
        let help = "Time in which there was nothing to compute but what was on its way from disk";
        registry.register_with_unit("tier_stall", help, Unit::Seconds, offload.stall_seconds.clone());
        registry.register("tier_experts", "Experts held on disk", offload.on_disk.clone());
        let help = "Share of the experts chosen in a layer that were predicted while the one before waited: late, by its experts in memory; early, without them";
        registry.register("tier_recall", help, offload.recall.clone());
        offload.device.register(registry);
        offload
    }
}

#[cfg(test)]
mod tests {
    use coel_model::offload::meter::{DeviceStats, LayerRecall, Tally};

    use super::*;

    #[test]
    fn tiers_are_counted_once_and_by_layer() {
        let metrics = Metrics::default();
        let tally = |pairs, found| Tally { pairs, found };
        let recall = [(tally(0, 0), tally(0, 0)), (tally(8, 4), tally(4, 3)), (tally(0, 0), tally(2, 1))];
        let recall = recall.map(|(early, late)| LayerRecall { early, late });
        let stats = OffloadStats {
            on_disk: 9,
            hits: 5,
            misses: 7,
            prefetched: 4,
            prefetch_used: 3,
            bytes_read: 4096,
            stall: std::time::Duration::from_millis(1500),
            recall: recall.into(),
            device: DeviceStats { hits: 11, on_cpu: 2, bytes: 640, bytes_promoted: 1280, ..DeviceStats::default() },
            ..OffloadStats::default()
        };
        metrics.note_offload(&OffloadStats { misses: 1, ..stats.clone() });
        metrics.note_offload(&stats);
        let text = metrics.text();
        for line in [
            "coel_tier_hits_total 5",
            "coel_tier_misses_total 7",
            "coel_tier_prefetched_total 4",
            "coel_tier_prefetch_used_total 3",
            "coel_tier_read_bytes_total 4096",
            "coel_tier_stall_seconds_total 1.5",
            "coel_tier_experts 9",
            "coel_tier_device_hits_total 11",
            "coel_tier_device_by_host_total 2",
            "coel_tier_device_bytes 640",
            "coel_tier_device_raised_bytes_total 1280",
            "coel_tier_recall{layer=\"1\",when=\"early\"} 0.5",
            "coel_tier_recall{layer=\"1\",when=\"late\"} 0.75",
            "coel_tier_recall{layer=\"2\",when=\"late\"} 0.5",
        ] {
            assert!(text.contains(line), "{line} not in\n{text}");
        }
        assert!(!text.contains("layer=\"0\""), "nothing was chosen there");
        assert!(!text.contains("layer=\"2\",when=\"early\""), "nothing was predicted then");
    }

    #[test]
    fn what_is_counted_is_shown() {
        let metrics = Metrics::default();
        metrics.rows_remote.inc_by(12);
        metrics.memory_bytes.set(4096);
        metrics.coverage.set(0.5);
        let activity = Activity { batches: 3, chunks: 8, rows: 70, waiting: 2, pages_used: 5, pages: 64 };
        metrics.note_engine(activity);
        metrics.note_engine(Activity { batches: 4, ..activity });
        metrics.note_experts([(Precision::Q4, 10), (Precision::Exact, 32), (Precision::Q4, 11)].into_iter());
        const EXPERTS: &str = "coel_experts{precision=\"q4\"} 2";
        const BYTES: &str = "coel_expert_weights_bytes{precision=\"q4\"} 21";
        let text = metrics.text();
        const FIXED: [&str; 4] = ["coel_rows_remote_total 12", "coel_memory_bytes 4096", "coel_coverage 0.5", "# EOF"];
        const FLIGHTS: [&str; 2] = ["coel_flights_total 4", "coel_flight_rows_total 70"];
        const QUEUES: [&str; 2] = ["coel_sessions_waiting 2", "coel_kv_pages_used 5"];
        for line in FIXED.into_iter().chain(FLIGHTS).chain(QUEUES).chain([EXPERTS, BYTES]) {
            assert!(text.contains(line), "{line} not in\n{text}");
        }
    }
}
