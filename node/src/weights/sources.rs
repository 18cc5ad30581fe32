//! Which peers to ask for a blob, and in which order. Pure.

use coel_gossip::PeerId;
use rand::Rng;
use rand::seq::SliceRandom;

/// A peer to ask, and its name for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobSource {
    /// The peer.
    pub peer: PeerId,
    /// Its name.
    pub name: String,
}

/// How likely a peer has a blob; the likeliest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Likelihood {
    /// It serves what the blob is part of.
    Serves,
    /// It has every blob of the model.
    Complete,
    /// It is there; what it has is not known.
    Unknown,
}

/// The peers in the order in which to ask them: the likeliest first, equally likely ones in random order, so that the load spreads.
pub fn ranked(mut sources: Vec<(Likelihood, BlobSource)>, random: &mut impl Rng) -> Vec<BlobSource> {
    sources.shuffle(random);
    sources.sort_by_key(|(likelihood, _)| *likelihood);
    sources.into_iter().map(|(_, source)| source).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;

    #[test]
    fn the_likeliest_come_first_and_equals_in_any_order() {
        let source = |name: &str| BlobSource { peer: PeerId::random(), name: name.into() };
        let sources = [
            ("d", Likelihood::Unknown),
            ("a", Likelihood::Serves),
            ("c", Likelihood::Complete),
            ("b", Likelihood::Serves),
        ]
        .map(|(name, likelihood)| (likelihood, source(name)));
        let orders: BTreeSet<String> = (0..64)
            .map(|seed| {
                let order = ranked(sources.to_vec(), &mut SmallRng::seed_from_u64(seed));
                order.into_iter().map(|source| source.name).collect()
            })
            .collect();
        assert_eq!(orders, BTreeSet::from(["abcd".to_owned(), "bacd".to_owned()]));
    }
}
