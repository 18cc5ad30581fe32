//! Stop strings in a text that arrives in pieces.
//!
//! Owns the text that cannot be shown yet: the longest end of it that a stop string begins with. The answer
//! is cut where the first stop string is complete, and of several that end there at the longest. That choice
//! depends on the characters alone, so the pieces may be cut anywhere.

/// Lets text through up to the first stop string.
#[derive(Debug, Clone)]
pub(super) struct StopFilter {
    stops: Vec<String>,
    /// The end of the text, as far as a stop string may begin in it. Shorter than the longest stop string
    /// between calls.
    held: String,
    found: bool,
}

impl StopFilter {
    /// `stops` holds no empty string.
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new(), found: false }
    }

    /// Whether a stop string has occurred: nothing passes any more.
    pub(super) fn found(&self) -> bool {
        self.found
    }

    /// Takes the next piece and returns what is certain to come before any stop string.
    pub(super) fn push(&mut self, piece: &str) -> String {
        if self.found {
            return String::new();
        }
        let mut searched = self.held.len();
        self.held.push_str(piece);
        while let Some(character) = self.held[searched..].chars().next() {
            searched += character.len_utf8();
            if let Some(start) = self.match_ending_at(searched) {
                self.found = true;
                self.held.truncate(start);
                return std::mem::take(&mut self.held);
            }
        }
        let hidden = self.held.split_off(self.held.len() - self.beginning_length());
        std::mem::replace(&mut self.held, hidden)
    }

    /// The text held back, when no more follows.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the longest stop string begins that ends at `end`.
    fn match_ending_at(&self, end: usize) -> Option<usize> {
        let text = &self.held[..end];
        let longest = self.stops.iter().filter(|stop| text.ends_with(stop.as_str())).map(String::len).max()?;
        Some(end - longest)
    }

    /// The length of the longest end of `held` that a stop string begins with, but is longer than.
    fn beginning_length(&self) -> usize {
        let text = self.held.as_bytes();
        let begins = |stop: &String| {
            let stop = stop.as_bytes();
            let longest = (stop.len() - 1).min(text.len());
            // A character that begins in a stop string begins in the text as well, so no character is cut.
            (1..=longest).rev().find(|length| text.ends_with(&stop[..*length])).unwrap_or(0)
        };
        self.stops.iter().map(begins).max().unwrap_or(0)
    }
}
