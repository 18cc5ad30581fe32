//! Which words of which slab are whose.
//!
//! Owns [`Ranges`], the accounting of the [`Arena`](crate::arena::Arena): pure, so that it is tested without a device. The
//! invariant: a word is free or in exactly one range that was taken, and free neighbours are one range, so that what was
//! given back whole can be taken whole again.

use std::collections::BTreeMap;

/// Ranges begin at multiples of so many words: 256 bytes, what devices want of the start of a binding, and whole lines.
pub(crate) const ALIGNED: u32 = 64;

/// Words `at..at + words` of slab `slab`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) slab: usize,
    pub(crate) at: u32,
    pub(crate) words: u32,
}

/// Free words of each slab, by their start.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    slabs: Vec<BTreeMap<u32, u32>>,
}

impl Ranges {
    /// Adds a slab of `words` words, all free, and says which it is.
    pub(crate) fn add_slab(&mut self, words: u32) -> usize {
        self.slabs.push(BTreeMap::from([(0, words)]));
        self.slabs.len() - 1
    }

    /// Words that are free, all together.
    pub(crate) fn free(&self) -> u64 {
        self.slabs.iter().flat_map(BTreeMap::values).map(|words| u64::from(*words)).sum()
    }

    /// Takes `words` words, where they fit first.
    pub(crate) fn take(&mut self, words: u32) -> Option<Range> {
        let words = words.max(1).checked_next_multiple_of(ALIGNED)?;
        self.slabs.iter_mut().enumerate().find_map(|(slab, free)| {
            let (&at, &found) = free.iter().find(|(_, found)| **found >= words)?;
            free.remove(&at);
            if found > words {
                free.insert(at + words, found - words);
            }
            Some(Range { slab, at, words })
        })
    }

    /// Takes back what [`take`](Self::take) gave.
    pub(crate) fn give_back(&mut self, range: Range) {
        let free = &mut self.slabs[range.slab];
        let (mut at, mut words) = (range.at, range.words);
        if let Some((&before, &size)) = free.range(..at).next_back() {
            assert!(before + size <= at, "a range is given back once");
            if before + size == at {
                (at, words) = (before, size + words);
            }
        }
        if let Some(size) = free.remove(&(range.at + range.words)) {
            words += size;
        }
        free.insert(at, words);
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn neighbours_grow_together_again() {
        let mut ranges = Ranges::default();
        assert_eq!(ranges.take(1), None);
        assert_eq!((ranges.add_slab(256), ranges.free()), (0, 256));
        let taken: Vec<Range> = [64, 1, 128].iter().map(|words| ranges.take(*words).unwrap()).collect();
        assert_eq!(
            taken.iter().map(|range| (range.at, range.words)).collect::<Vec<_>>(),
            [(0, 64), (64, 64), (128, 128)]
        );
        assert_eq!(ranges.take(1), None);
        for index in [0, 2, 1] {
            ranges.give_back(taken[index]);
        }
        assert_eq!(ranges.take(256), Some(Range { slab: 0, at: 0, words: 256 }));
        assert_eq!((ranges.add_slab(128), ranges.take(65)), (1, Some(Range { slab: 1, at: 0, words: 128 })));
        assert_eq!(ranges.take(u32::MAX), None);
    }

    proptest! {
        /// Whatever comes and goes, no word is anyone's twice, and all of them are free in the end.
        #[test]
        fn words_are_conserved(moves in vec((1u32..400, 0usize..6), 1..80)) {
            let mut ranges = Ranges::default();
            let slabs = [1024, 640];
            for words in slabs {
                ranges.add_slab(words);
            }
            let mut held = Vec::<Range>::new();
            for (words, which) in moves {
                match held.len() > which {
                    true => ranges.give_back(held.swap_remove(which)),
                    false => held.extend(ranges.take(words)),
                }
                let mut sorted = held.clone();
                sorted.sort_by_key(|range| (range.slab, range.at));
                for pair in sorted.windows(2) {
                    prop_assert!(pair[0].slab < pair[1].slab || pair[0].at + pair[0].words <= pair[1].at);
                }
                prop_assert!(sorted.iter().all(|range| range.at + range.words <= slabs[range.slab]));
            }
            for range in held {
                ranges.give_back(range);
            }
            prop_assert_eq!(ranges.take(1024), Some(Range { slab: 0, at: 0, words: 1024 }));
            prop_assert_eq!(ranges.take(640), Some(Range { slab: 1, at: 0, words: 640 }));
        }
    }
}
