//! Who has which pages of the KV pool.
//!
//! Owns [`Pages`], the accounting of a fixed number of pages of equal size, and [`PageTable`], the pages of one session
//! in the order of its positions. The invariant: every page is free or in exactly one table, so `used + free = total`;
//! a table cannot be copied, and its pages come back only by giving it back. What lies on a page, and where, is the
//! kernels' business; when a session may be dropped is the engine's.

/// Tokens of a page unless another size is asked for: a table stays short, and a session wastes at most one page less
/// a token.
pub const PAGE_TOKENS: usize = 32;

/// The pages of one session: the positions `i * page_tokens..` lie on the `i`-th.
#[derive(Debug, PartialEq, Eq)]
pub struct PageTable(Box<[u32]>);

impl PageTable {
    pub fn pages(&self) -> &[u32] {
        &self.0
    }
}

/// A reservation that cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Short {
    /// Not even if all else were given back: at most `tokens` can be had.
    Ever { tokens: usize },
    /// Not now: `tokens` are free.
    Now { tokens: usize },
}

/// A pool's pages.
#[derive(Debug)]
pub struct Pages {
    page_tokens: usize,
    total: usize,
    /// Last given back, first taken: what was touched lately is in some cache, and what never was takes no memory.
    free: Vec<u32>,
}

/// Pages that hold `tokens` tokens.
pub fn pages_for(tokens: usize, page_tokens: usize) -> usize {
    tokens.div_ceil(page_tokens)
}

impl Pages {
    /// A pool of at least `tokens` tokens: a whole number of pages.
    pub fn for_tokens(tokens: usize, page_tokens: usize) -> Self {
        let total = pages_for(tokens, page_tokens);
        let free = (0..u32::try_from(total).expect("a pool of less than 2^32 pages")).rev().collect();
        Self { page_tokens, total, free }
    }

    pub fn total(&self) -> usize {
        self.total
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    pub fn used(&self) -> usize {
        self.total - self.free.len()
    }

    pub fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    /// Takes pages for `tokens` tokens, or changes nothing.
    pub fn take(&mut self, tokens: usize) -> Result<PageTable, Short> {
        let wanted = pages_for(tokens, self.page_tokens);
        if wanted > self.total {
            return Err(Short::Ever { tokens: self.total * self.page_tokens });
        }
        let kept = self.free.len().checked_sub(wanted);
        let kept = kept.ok_or(Short::Now { tokens: self.free.len() * self.page_tokens })?;
        Ok(PageTable(self.free.drain(kept..).rev().collect()))
    }

    /// Takes a table back.
    pub fn give_back(&mut self, table: PageTable) {
        self.free.extend(table.0.iter().rev());
        debug_assert!(self.free.len() <= self.total, "a table of another pool");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn a_reservation_is_whole_pages_or_nothing() {
        let mut pages = Pages::for_tokens(100, 32);
        assert_eq!((pages.total(), pages.free()), (4, 4));
        assert_eq!(pages.take(129), Err(Short::Ever { tokens: 128 }));
        let first = pages.take(33).unwrap();
        assert_eq!((first.pages(), pages.used()), (&[0, 1][..], 2));
        assert_eq!(pages.take(65), Err(Short::Now { tokens: 64 }));
        assert!(pages.take(0).unwrap().pages().is_empty());
        let second = pages.take(64).unwrap();
        assert_eq!((second.pages(), pages.free()), (&[2, 3][..], 0));
        pages.give_back(first);
        assert_eq!(pages.take(1).unwrap().pages(), [0]);
    }

    proptest! {
        /// Sessions of all sizes come and go; no page is ever lost, shared or invented.
        #[test]
        fn pages_are_conserved(tokens in 0usize..200, page_tokens in 1usize..40, moves in vec((0usize..70, 0usize..8), 1..80)) {
            let mut pages = Pages::for_tokens(tokens, page_tokens);
            let mut open = Vec::<PageTable>::new();
            for (wanted, which) in moves {
                match open.len() > which {
                    true => pages.give_back(open.swap_remove(which)),
                    false => match pages.take(wanted) {
                        Ok(table) => {
                            prop_assert_eq!(table.pages().len(), wanted.div_ceil(page_tokens));
                            open.push(table);
                        }
                        Err(Short::Ever { tokens }) => prop_assert!(wanted > tokens && tokens == pages.total() * page_tokens),
                        Err(Short::Now { tokens }) => prop_assert!(wanted > tokens && tokens == pages.free() * page_tokens),
                    },
                }
                let held: Vec<u32> = open.iter().flat_map(|table| table.pages().to_vec()).collect();
                let distinct: BTreeSet<u32> = held.iter().copied().collect();
                prop_assert_eq!(distinct.len(), held.len());
                prop_assert!(held.iter().all(|page| (*page as usize) < pages.total()));
                prop_assert_eq!((pages.used(), pages.used() + pages.free()), (held.len(), pages.total()));
            }
        }
    }
}
