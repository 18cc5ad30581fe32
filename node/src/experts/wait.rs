//! How an answer waits for experts whose hosts are away.
//!
//! Owns [`ExpertWait`], which is pure, and its driver [`wait`]. Experts are stateless and the KV cache is at the home, so nothing is lost
//! when a host falls silent: once the host is heard again, or another one has the expert ready, the same tokens are advanced again, with
//! the same bits. The answer waits outside of the engine: there it has no place in a batch that others could use, only its pages of the
//! KV cache.
//!
//! Invariants: an answer waits at most [`WAIT_MAX`] in all; hosts that are there and fail are not asked again at once, but after a
//! pause. The module does not know why hosts are away, and nothing of sessions.

use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::dispatch::LayerReplicas;
use super::watch::ReplicaWatch;
use crate::hosting::Loaded;
use crate::mesh::MeshView;

/// How long one answer waits in all. The mesh waits half a minute for an absent node, and the others take about as long again to fetch
/// and load what it held: twice that.
pub const WAIT_MAX: Duration = Duration::from_secs(120);
/// Pause before hosts that were there all the time are asked again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What an answer that lacks experts does now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitStep {
    /// It asks again.
    Retry,
    /// It looks again when the mesh has changed, but after this time at the latest.
    Wait(Duration),
    /// It ends. It has waited this long, in all.
    GiveUp(Duration),
}

/// The waits of one answer: none at first, then one after the other.
#[derive(Debug, Default)]
pub struct ExpertWait {
    /// In the waits that are over.
    waited: Duration,
    /// The wait that goes on.
    current: Option<Current>,
}

#[derive(Debug)]
struct Current {
    since: Instant,
    /// Whether some expert had no live host at some moment since.
    was_away: bool,
}

impl ExpertWait {
    /// What to do at this moment. The first step after a [`WaitStep::Retry`] begins another wait. `replicas` lists those of the experts
    /// that the answer lacks.
    pub fn step(&mut self, replicas: &LayerReplicas, now: Instant) -> WaitStep {
        let current = self.current.get_or_insert(Current { since: now, was_away: false });
        let is_complete = replicas.is_complete();
        current.was_away |= !is_complete;
        let elapsed = now.saturating_duration_since(current.since);
        let pause = RETRY_AFTER.saturating_sub(elapsed);
        let left = WAIT_MAX.saturating_sub(self.waited + elapsed);
        if left.is_zero() {
            WaitStep::GiveUp(self.waited + elapsed)
        } else if is_complete && (current.was_away || pause.is_zero()) {
            self.waited += elapsed;
            self.current = None;
            WaitStep::Retry
        } else {
            WaitStep::Wait(if is_complete { pause.min(left) } else { left })
        }
    }
}

/// Waits until these experts of a layer can be asked for again.
///
/// # Errors
/// How long the answer has waited in all, once that is too long.
pub async fn wait(
    waits: &mut ExpertWait,
    view: &MeshView,
    loaded: &Loaded,
    layer: u16,
    experts: Vec<u16>,
) -> Result<(), Duration> {
    let mut mesh = ReplicaWatch::new(view, loaded, layer, experts);
    loop {
        match waits.step(&mesh.replicas(), Instant::now()) {
            WaitStep::Retry => return Ok(()),
            WaitStep::GiveUp(waited) => return Err(waited),
            // Whether something has changed or the time is over: the next step looks.
            WaitStep::Wait(time) => _ = timeout(time, mesh.changed()).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use coel_store::{NodeId, Precision};
    use proptest::prelude::*;

    use super::*;

    /// Two experts, each ready on a node of its own.
    fn replicas(live: &[u64]) -> LayerReplicas {
        let on = |node| BTreeMap::from([(NodeId(node), Precision::Exact)]);
        LayerReplicas {
            home: NodeId(1),
            holders: [(0, on(2)), (1, on(3))].into(),
            live: live.iter().map(|&node| (NodeId(node), None)).collect(),
            ..LayerReplicas::default()
        }
    }

    const ALL: &[u64] = &[2, 3];
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_silent_host_is_waited_for_and_asked_as_soon_as_it_is_heard() {
        let (mut waits, start) = (ExpertWait::default(), Instant::now());
        assert_eq!(waits.step(&replicas(&[2]), start), WaitStep::Wait(WAIT_MAX));
        assert_eq!(waits.step(&replicas(&[2]), start + 8 * SECOND), WaitStep::Wait(WAIT_MAX - 8 * SECOND));
        assert_eq!(waits.step(&replicas(ALL), start + 8 * SECOND), WaitStep::Retry);
    }

    #[test]
    fn another_host_ends_the_wait_too() {
        let (mut waits, start) = (ExpertWait::default(), Instant::now());
        let mut mesh = replicas(&[2, 4]);
        waits.step(&mesh, start);
        mesh.loading.entry(1).or_default().insert(NodeId(4));
        assert!(matches!(waits.step(&mesh, start + SECOND), WaitStep::Wait(_)), "node 4 is still loading");
        mesh.holders.entry(1).or_default().insert(NodeId(4), Precision::Q8);
        assert_eq!(waits.step(&mesh, start + 2 * SECOND), WaitStep::Retry);
    }

    #[test]
    fn hosts_that_are_there_and_fail_are_asked_after_a_pause() {
        let (mut waits, start) = (ExpertWait::default(), Instant::now());
        for round in 0..3 {
            let failed = start + round * 2 * SECOND;
            assert_eq!(waits.step(&replicas(ALL), failed), WaitStep::Wait(RETRY_AFTER));
            assert_eq!(waits.step(&replicas(ALL), failed + RETRY_AFTER / 4), WaitStep::Wait(RETRY_AFTER * 3 / 4));
            assert_eq!(waits.step(&replicas(ALL), failed + RETRY_AFTER), WaitStep::Retry);
        }
    }

    #[test]
    fn waits_add_up_and_what_is_computed_between_them_does_not_count() {
        let (mut waits, start) = (ExpertWait::default(), Instant::now());
        waits.step(&replicas(&[]), start);
        assert_eq!(waits.step(&replicas(ALL), start + 100 * SECOND), WaitStep::Retry);
        let again = start + 500 * SECOND;
        assert_eq!(waits.step(&replicas(&[]), again), WaitStep::Wait(20 * SECOND));
        assert_eq!(waits.step(&replicas(&[]), again + 20 * SECOND), WaitStep::GiveUp(120 * SECOND));
    }

    proptest! {
        #[test]
        fn no_history_waits_longer_than_allowed_or_asks_too_often(
            looks in proptest::collection::vec((0u64..5000, any::<bool>(), any::<bool>()), 1..200),
        ) {
            let (mut waits, start) = (ExpertWait::default(), Instant::now());
            let (mut now, mut began, mut was_away, mut waited) = (start, None, false, Duration::ZERO);
            for (pause_ms, two, three) in looks {
                now += Duration::from_millis(pause_ms);
                let live: Vec<u64> = [(2, two), (3, three)].iter().filter(|(_, up)| *up).map(|(node, _)| *node).collect();
                let since = *began.get_or_insert(now);
                was_away |= !(two && three);
                let total = waited + (now - since);
                match waits.step(&replicas(&live), now) {
                    WaitStep::Retry => {
                        prop_assert!(two && three && total < WAIT_MAX);
                        prop_assert!(was_away || now - since >= RETRY_AFTER);
                        (began, was_away, waited) = (None, false, total);
                    }
                    WaitStep::Wait(time) => {
                        prop_assert!(!time.is_zero() && total + time <= WAIT_MAX);
                        prop_assert!(!(two && three && was_away), "everything is there");
                    }
                    WaitStep::GiveUp(said) => {
                        prop_assert!(total >= WAIT_MAX);
                        prop_assert_eq!(said, total);
                        break;
                    }
                }
            }
        }
    }
}
