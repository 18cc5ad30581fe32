//! What members said about peers that this node's own state does not list.
//!
//! Invariant: the words are bounded in number and in age. The cache does not know who gave them.

use crate::ids::Peer;
use crate::sync::lock;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How long a word about a stranger holds, for or against.
const WORD_HOLDS: Duration = Duration::from_secs(2);
/// Most strangers remembered; beyond that all are forgotten. A mesh adds a handful of nodes within the seconds for which a
/// word holds.
const STRANGERS_MAX: usize = 64;

/// Words about strangers, each with the time it was given.
#[derive(Default)]
pub(super) struct AdmissionCache(Mutex<BTreeMap<Peer, (Instant, bool)>>);

impl AdmissionCache {
    /// The word about a peer, unless it is too old.
    pub fn word(&self, peer: &Peer, now: Instant) -> Option<bool> {
        let words = lock(&self.0);
        words.get(peer).filter(|(given, _)| now.duration_since(*given) < WORD_HOLDS).map(|(_, word)| *word)
    }

    pub fn remember(&self, peer: &Peer, now: Instant, word: bool) {
        let mut words = lock(&self.0);
        if words.len() >= STRANGERS_MAX {
            words.clear();
        }
        words.insert(peer.clone(), (now, word));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_hold_for_a_while_and_are_bounded() {
        let cache = AdmissionCache::default();
        let (peer, now) = (Peer(vec![1]), Instant::now());
        assert_eq!(cache.word(&peer, now), None);
        cache.remember(&peer, now, true);
        assert_eq!(cache.word(&peer, now + WORD_HOLDS / 2), Some(true));
        assert_eq!(cache.word(&peer, now + WORD_HOLDS), None);
        for stranger in 0..10 * STRANGERS_MAX {
            cache.remember(&Peer(stranger.to_be_bytes().to_vec()), now, false);
            assert!(lock(&cache.0).len() <= STRANGERS_MAX);
        }
    }
}
