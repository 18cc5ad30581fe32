//! A node's identity: an ed25519 key pair.
//!
//! Owns: the key, and its form as bytes. Deliberately does not know: where the bytes are kept, and what the peer id is used for.

use libp2p::PeerId;
use libp2p::identity::Keypair;

/// The key pair behind a [`PeerId`].
#[derive(Clone)]
pub struct Identity {
    keypair: Keypair,
}

/// Shows the public half only.
impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Identity").field(&self.peer_id()).finish()
    }
}

impl Identity {
    /// A new identity.
    pub fn generate() -> Identity {
        Identity { keypair: Keypair::generate_ed25519() }
    }

    /// The identity whose secret is `seed`: for simulations, in which a seed gives the same history each time.
    pub fn from_seed(seed: [u8; 32]) -> Identity {
        let keypair = Keypair::ed25519_from_bytes(seed).expect("any 32 bytes are a secret");
        Identity { keypair }
    }

    /// The identity that [`Self::to_bytes`] encoded; nothing if these bytes are no ed25519 key pair.
    pub fn from_bytes(bytes: &[u8]) -> Option<Identity> {
        let keypair = Keypair::from_protobuf_encoding(bytes).ok()?;
        keypair.clone().try_into_ed25519().ok()?;
        Some(Identity { keypair })
    }

    /// Both halves of the key. To be kept secret.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.keypair.to_protobuf_encoding().expect("ed25519 keys have an encoding")
    }

    pub fn peer_id(&self) -> PeerId {
        self.keypair.public().to_peer_id()
    }

    pub(crate) fn keypair(&self) -> &Keypair {
        &self.keypair
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_survives_its_bytes() {
        let identity = Identity::generate();
        let again = Identity::from_bytes(&identity.to_bytes()).expect("the same key");
        assert_eq!(again.peer_id(), identity.peer_id());
        assert!(Identity::from_bytes(b"not a key").is_none());
    }

    #[test]
    fn the_secret_is_not_shown() {
        let identity = Identity::generate();
        assert_eq!(format!("{identity:?}"), format!("Identity(PeerId(\"{}\"))", identity.peer_id()));
    }
}
