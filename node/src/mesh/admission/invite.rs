//! An invite is one line: `coel1` and, in base64url, the mesh, a random token, and where a member was last reachable.

use std::fmt;
use std::str::FromStr;

use coel_gossip::{Multiaddr, PeerId};
use coel_store::{MeshId, TokenHash};
use data_encoding::BASE64URL_NOPAD;

/// First characters of every invite of this format.
const PREFIX: &str = "coel1";
/// Enough for every interface of a multi-homed host; a longer list is cut.
const ADDRESSES_MAX: usize = 16;
const CHECKSUM_BYTES: usize = 4;

/// What a person passes from one machine to another. Whoever has it can join, so it is a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Invite {
    /// The mesh to join.
    pub mesh: MeshId,
    /// The secret. The log keeps only its hash.
    pub token: [u8; 16],
    /// The member that issued it.
    pub peer: PeerId,
    /// Where that member listens.
    pub addresses: Vec<Multiaddr>,
}

/// A line that is not an invite.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadInvite {
    /// Another kind of text.
    #[error("an invite starts with '{PREFIX}'; ask a member for one with `coel invite`")]
    NotAnInvite,
    /// Characters are missing, added or changed.
    #[error("the invite is damaged ({0}); copy the whole line again")]
    Damaged(&'static str),
}

/// What the log keeps of a token.
pub fn token_hash(token: &[u8; 16]) -> TokenHash {
    TokenHash(*blake3::hash(token).as_bytes())
}

impl fmt::Debug for Invite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invite").field("mesh", &self.mesh).field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl fmt::Display for Invite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut body = Vec::new();
        body.extend(self.mesh.0);
        body.extend(self.token);
        put(&mut body, &self.peer.to_bytes());
        for address in self.addresses.iter().take(ADDRESSES_MAX) {
            put(&mut body, &address.to_vec());
        }
        let checksum = blake3::hash(&body);
        body.extend(&checksum.as_bytes()[..CHECKSUM_BYTES]);
        write!(f, "{PREFIX}{}", BASE64URL_NOPAD.encode(&body))
    }
}

/// Peer ids and addresses are shorter than 256 bytes; one that is not is left out rather than cut.
fn put(body: &mut Vec<u8>, bytes: &[u8]) {
    if let Ok(len) = u8::try_from(bytes.len()) {
        body.push(len);
        body.extend(bytes);
    }
}

impl FromStr for Invite {
    type Err = BadInvite;

    fn from_str(line: &str) -> Result<Self, BadInvite> {
        let body = line.trim().strip_prefix(PREFIX).ok_or(BadInvite::NotAnInvite)?;
        let body = BASE64URL_NOPAD
            .decode(body.as_bytes())
            .map_err(|_| BadInvite::Damaged("a character does not belong there, or the end is missing"))?;
        let split = body.len().checked_sub(CHECKSUM_BYTES).ok_or(BadInvite::Damaged("too short"))?;
        let (body, checksum) = body.split_at(split);
        if &blake3::hash(body).as_bytes()[..CHECKSUM_BYTES] != checksum {
            return Err(BadInvite::Damaged("the checksum does not match"));
        }
        let mut rest = body;
        let mesh = MeshId(take_array(&mut rest)?);
        let token = take_array(&mut rest)?;
        let peer = PeerId::from_bytes(take(&mut rest)?).map_err(|_| BadInvite::Damaged("no peer id"))?;
        let mut addresses = Vec::new();
        while !rest.is_empty() && addresses.len() < ADDRESSES_MAX {
            let address = Multiaddr::try_from(take(&mut rest)?.to_vec());
            addresses.push(address.map_err(|_| BadInvite::Damaged("an address is malformed"))?);
        }
        Ok(Self { mesh, token, peer, addresses })
    }
}

fn take<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], BadInvite> {
    let cut = BadInvite::Damaged("the end is missing");
    let (&len, tail) = rest.split_first().ok_or(cut.clone())?;
    let (bytes, tail) = tail.split_at_checked(usize::from(len)).ok_or(cut)?;
    *rest = tail;
    Ok(bytes)
}

fn take_array<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], BadInvite> {
    let (bytes, tail) = rest.split_first_chunk().ok_or(BadInvite::Damaged("the end is missing"))?;
    *rest = tail;
    Ok(*bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn invite() -> Invite {
        Invite {
            mesh: MeshId([7; 16]),
            token: [9; 16],
            peer: PeerId::random(),
            addresses: vec![
                "/ip4/192.168.1.20/tcp/4001".parse().unwrap(),
                "/ip4/192.168.1.20/udp/4001/quic-v1".parse().unwrap(),
            ],
        }
    }

    #[test]
    fn a_line_brings_everything_across() {
        let invite = invite();
        let line = invite.to_string();
        assert!(line.starts_with("coel1") && !line.contains(char::is_whitespace));
        assert_eq!(format!("  {line}\n").parse(), Ok(invite));
    }

    #[test]
    fn a_changed_or_missing_character_is_noticed() {
        let line = invite().to_string();
        assert_eq!("hello".parse::<Invite>(), Err(BadInvite::NotAnInvite));
        assert!(line[..line.len() - 3].parse::<Invite>().is_err());
        for at in [6, 30, line.len() - 1] {
            let mut damaged = line.clone().into_bytes();
            damaged[at] = if damaged[at] == b'A' { b'B' } else { b'A' };
            assert!(String::from_utf8(damaged).unwrap().parse::<Invite>().is_err(), "position {at}");
        }
    }

    #[test]
    fn the_secret_does_not_reach_a_log_file() {
        let invite = invite();
        assert!(!format!("{invite:?}").contains(&format!("{:?}", invite.token)));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "coel1[A-Za-z0-9_-]{0,400}") {
            let _ = text.parse::<Invite>();
        }
    }
}
