//! The words of the handshake, and the proof in it. Pure: the nonce is an argument, the log's answer is an argument.
//!
//! ```text
//! joiner                                  host (any member)
//!   Hello { version, mesh }          ─►
//!                                    ◄─   Challenge { nonce }
//!   Proof { proof, name, ... }       ─►   finds the invite whose hash made the proof; takes one use through the log
//!                                    ◄─   Welcome { node, members }  or  Refused { reason }
//! ```

use coel_gossip::PeerId;
use coel_store::{MeshId, NodeId, Peer, TokenHash};
use serde::{Deserialize, Serialize};

/// The only version there is.
pub const VERSION: u32 = 1;
/// A message of the handshake is small: a hash, a name, some addresses, or the members of a mesh.
pub const MESSAGE_BYTES_MAX: usize = 256 << 10;
/// Most addresses a joining node may leave with the log.
pub const ADDRESSES_MAX: usize = 16;

const CONTEXT: &[u8] = b"coel admission 1";

/// What is said, both ways.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Joiner: which mesh it wants.
    Hello { version: u32, mesh: MeshId },
    /// Host: prove it for this nonce.
    Challenge {
        #[serde(with = "serde_bytes")]
        nonce: [u8; 32],
    },
    /// Joiner: the proof, and what the log shall know of it.
    Proof {
        #[serde(with = "serde_bytes")]
        proof: [u8; 32],
        name: String,
        addresses: Vec<String>,
        /// The mesh that the joiner's data folder belongs to.
        #[serde(default)]
        former: Option<MeshId>,
        /// The joiner has no log of this mesh: if it is a member, it has lost it.
        #[serde(default)]
        anew: bool,
    },
    /// Host: you are a member; these are the others.
    Welcome { node: NodeId, members: Vec<Greeted> },
    /// Host: no, and why.
    Refused { reason: String },
}

/// What a joining node says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newcomer {
    /// Its name, for people.
    pub name: String,
    /// Where it can be reached.
    pub addresses: Vec<String>,
    /// The mesh that its data folder belongs to, if any. The mesh that it joins must go on from that one.
    pub former: Option<MeshId>,
    /// It has no log of the mesh that it joins.
    pub anew: bool,
}

/// A member, as told to a newcomer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeted {
    /// Its id in the log.
    pub node: NodeId,
    /// Its identity on the network.
    pub peer: Peer,
    /// Where it was last reachable.
    pub addresses: Vec<String>,
}

/// The proof of knowing the token behind `hash`, bound to both peers, the mesh and the host's nonce: replayed to another
/// host, by another joiner or a second time, it is worth nothing.
pub fn proof(hash: &TokenHash, mesh: MeshId, joiner: PeerId, host: PeerId, nonce: &[u8; 32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(&hash.0);
    hasher.update(CONTEXT);
    hasher.update(&mesh.0);
    for peer in [joiner, host] {
        let bytes = peer.to_bytes();
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(&bytes);
    }
    hasher.update(nonce);
    *hasher.finalize().as_bytes()
}

/// The invite among `known` that the proof was made with.
pub fn find_invite<'a>(
    known: impl IntoIterator<Item = &'a TokenHash>,
    given: &[u8; 32],
    mesh: MeshId,
    joiner: PeerId,
    host: PeerId,
    nonce: &[u8; 32],
) -> Option<TokenHash> {
    // blake3::Hash compares in constant time.
    let given = blake3::Hash::from_bytes(*given);
    known.into_iter().find(|hash| blake3::Hash::from_bytes(proof(hash, mesh, joiner, host, nonce)) == given).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::admission::invite::token_hash;

    #[test]
    fn a_proof_is_good_for_its_own_handshake_only() {
        let (joiner, host, other) = (PeerId::random(), PeerId::random(), PeerId::random());
        let (mesh, nonce) = (MeshId([1; 16]), [5; 32]);
        let known = [token_hash(&[1; 16]), token_hash(&[2; 16])];
        let good = proof(&known[1], mesh, joiner, host, &nonce);
        let found = |proof, mesh, joiner, host, nonce| find_invite(&known, proof, mesh, joiner, host, nonce);
        assert_eq!(found(&good, mesh, joiner, host, &nonce), Some(known[1]));
        assert_eq!(found(&good, mesh, other, host, &nonce), None, "another joiner");
        assert_eq!(found(&good, mesh, joiner, other, &nonce), None, "another host");
        assert_eq!(found(&good, mesh, joiner, host, &[6; 32]), None, "another nonce");
        assert_eq!(found(&good, MeshId([2; 16]), joiner, host, &nonce), None, "another mesh");
        assert_eq!(found(&proof(&token_hash(&[3; 16]), mesh, joiner, host, &nonce), mesh, joiner, host, &nonce), None);
    }
}
