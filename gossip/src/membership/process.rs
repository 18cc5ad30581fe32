//! The processes of one node, and the word of one that it has heard of another.
//!
//! A data folder that was copied or restored while the original runs gives two live processes one identity. Owns the order of
//! such processes ([`Process`]), the order of what they say ([`Incarnation`]), and the proof that two of them live
//! ([`Sighting`]). Invariants: every start has a nonce of its own, so no two processes are equal, whatever their clocks say;
//! only who holds the node's key can sign a sighting, and only a process that was alive after another had started can name
//! that one's nonce.
//! Deliberately does not know: who has to be told (`state` does), or how a process ends.

use libp2p::identity::PublicKey;

use crate::identity::Identity;

pub const SIGNATURE_BYTES: usize = 64;

/// One process of a node. The earlier one by the clock is the lesser, and of two of the same millisecond that with the lesser
/// nonce.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// When it started, in milliseconds since the Unix epoch, by its own clock.
    pub started_ms: u64,
    /// Drawn at its start.
    pub nonce: u64,
}

/// Which of two records of one node is the newer: the greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Incarnation {
    /// The start of its process, or one more than a record that it had to outrank.
    pub rank: u64,
    /// The process that wrote the record.
    pub process: Process,
}

impl Incarnation {
    pub fn first(process: Process) -> Incarnation {
        Incarnation { rank: process.started_ms, process }
    }

    /// The first incarnation of `process` that is newer than this one. Nothing is newer than the end of the range.
    pub fn outranked_by(self, process: Process) -> Option<Incarnation> {
        Some(Incarnation { rank: self.rank.checked_add(1)?, process })
    }
}

/// The word of a process that it has heard of another one of its node, signed with the node's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    pub of: Process,
    pub signature: [u8; SIGNATURE_BYTES],
}

impl Sighting {
    /// The word of process `by` about process `of`.
    pub fn sign(identity: &Identity, by: Process, of: Process) -> Sighting {
        let signature = identity.keypair().sign(&signed(by, of)).expect("ed25519 signs anything");
        Sighting { of, signature: signature.try_into().expect("an ed25519 signature has 64 bytes") }
    }

    /// Whether process `by` of the node with this key gave it.
    pub fn is_of(&self, key: &PublicKey, by: Process) -> bool {
        key.verify(&signed(by, self.of), &self.signature)
    }
}

/// The bytes that are signed. Transports sign with the same key, under prefixes of their own.
fn signed(by: Process, of: Process) -> Vec<u8> {
    let numbers = [by.started_ms, by.nonce, of.started_ms, of.nonce];
    let mut bytes = b"coel: this process has heard of that one\0".to_vec();
    bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sighting_is_of_one_node_and_two_processes() {
        let (identity, other) = (Identity::generate(), Identity::generate());
        let [a, b] = [5, 6].map(|started_ms| Process { started_ms, nonce: 9 });
        let sighting = Sighting::sign(&identity, a, b);
        let key = identity.keypair().public();
        assert!(sighting.is_of(&key, a));
        assert!(!sighting.is_of(&key, b) && !sighting.is_of(&other.keypair().public(), a));
        assert!(!Sighting { of: a, ..sighting }.is_of(&key, a));
    }

    #[test]
    fn a_record_that_is_outranked_is_older_whatever_the_clocks_say() {
        let [early, late] = [5, 60].map(|started_ms| Process { started_ms, nonce: 1 });
        let remembered = Incarnation::first(late);
        let jumped = remembered.outranked_by(early).expect("not the end of the range");
        assert!(jumped > remembered && early < late && Incarnation::first(early) < remembered);
        assert_eq!(Incarnation { rank: u64::MAX, process: late }.outranked_by(early), None);
    }
}
