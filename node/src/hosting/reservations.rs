//! Memory of weights that are being loaded: counted from before they are read until the engine counts them.
//!
//! Owns [`Reservations`]. Invariant: a reservation was seen to fit beside the others, or was made where it had to be
//! ([`Reservations::take_anyway`]). How much room there is, the caller knows.

use tokio::sync::watch;

/// Bytes that are reserved.
#[derive(Debug, Default)]
pub struct Reservations(watch::Sender<u64>);

/// Gives its bytes back when it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Reservation<'a> {
    from: &'a Reservations,
    bytes: u64,
}

impl Reservations {
    /// Reserves `bytes` as soon as they `fit` beside the bytes of other reservations; `None` if they do not fit although there are none.
    pub async fn take(&self, bytes: u64, fit: impl Fn(u64) -> bool) -> Option<Reservation<'_>> {
        let mut changes = self.0.subscribe();
        loop {
            let mut only = false;
            let took = self.0.send_if_modified(|taken| {
                only = *taken == 0;
                let fits = fit(*taken);
                *taken += if fits { bytes } else { 0 };
                fits
            });
            if took {
                return Some(Reservation { from: self, bytes });
            }
            if only || changes.changed().await.is_err() {
                return None;
            }
        }
    }

    /// Reserves `bytes`, whether there is room or not.
    pub fn take_anyway(&self, bytes: u64) -> Reservation<'_> {
        self.0.send_modify(|taken| *taken += bytes);
        Reservation { from: self, bytes }
    }

    /// Bytes that are reserved now.
    pub fn bytes(&self) -> u64 {
        *self.0.borrow()
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.from.0.send_modify(|taken| *taken -= self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures::StreamExt;
    use futures::stream;

    use super::*;

    #[tokio::test]
    async fn loads_wait_for_each_other_and_never_pass_the_budget() {
        const BUDGET: u64 = 100;
        let (loading, loaded, highest) = (Reservations::default(), AtomicU64::new(0), AtomicU64::new(0));
        let load = |bytes: u64| {
            let (loading, loaded, highest) = (&loading, &loaded, &highest);
            async move {
                let fits = |others: u64| loaded.load(Ordering::Relaxed) + others + bytes <= BUDGET;
                let taken = loading.take(bytes, fits).await?;
                // Read, and then loaded: only then the engine counts it.
                highest.fetch_max(loaded.load(Ordering::Relaxed) + loading.bytes(), Ordering::Relaxed);
                tokio::task::yield_now().await;
                loaded.fetch_add(bytes, Ordering::Relaxed);
                drop(taken);
                Some(bytes)
            }
        };
        // Four at once, as hosting does; each alone fits beside what is loaded, all together do not.
        let each = [10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10].map(load);
        let done: Vec<_> = stream::iter(each).buffer_unordered(4).collect().await;
        assert_eq!(done.iter().flatten().sum::<u64>(), BUDGET, "what fits is loaded, the last is not: {done:?}");
        assert_eq!((highest.load(Ordering::Relaxed), loading.bytes()), (BUDGET, 0));
    }

    #[tokio::test]
    async fn what_has_to_be_taken_is_counted_too() {
        let loading = Reservations::default();
        let forced = loading.take_anyway(70);
        let waiting = loading.take(50, |others| others + 50 <= 100);
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        drop(forced);
        let taken = waiting.await.unwrap();
        assert_eq!(loading.bytes(), 50);
        drop(taken);
        assert!(loading.take(101, |others| others + 101 <= 100).await.is_none());
    }
}
