//! How a stranger becomes a member: an invite, and a proof of having it.
//!
//! [`invite`] is the line that a person passes on. [`handshake`] is what two nodes say to each other about it (pure): the host sends
//! a nonce, the joiner proves that it knows the token, and the log takes one use off the invite. [`protocol`] is both ends of that
//! conversation. The token itself never travels, and a proof is good for one pair of peers and one nonce only.
//!
//! Invariant: before the handshake has ended well, a stranger's bytes reach nothing but this module.

pub mod handshake;
pub mod invite;
pub mod protocol;
