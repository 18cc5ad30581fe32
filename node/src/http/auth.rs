//! Access to the API: the key, and the rule that an address open to other machines needs one.
//!
//! The invariants: an address that other machines can reach is never served without a key, and the time to compare a
//! key does not depend on how much of it is right. A blank key counts as none everywhere, so that an empty variable in
//! some environment file cannot open a node to the network.
//!
//! Only the key's hash is kept. The module does not know users, quotas or where the key came from.

use std::fmt;
use std::net::SocketAddr;

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;

use super::error::ApiError;

/// The key that requests must carry, if any.
#[derive(Clone)]
pub struct Auth(Option<blake3::Hash>);

impl Auth {
    /// Requires `key`, unless it is absent or blank. Surrounding white space is dropped, as in a header.
    pub fn new(key: Option<&str>) -> Self {
        Self(effective(key).map(|key| blake3::hash(key.as_bytes())))
    }

    /// Whether these headers carry the key.
    ///
    /// # Errors
    /// 401, saying whether the key was missing, malformed or wrong.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(expected) = self.0 else { return Ok(()) };
        let Some(value) = headers.get(AUTHORIZATION) else {
            return Err(ApiError::unauthorized(
                "an API key is required and none was given: send the header `Authorization: Bearer KEY`",
            ));
        };
        let given = value.to_str().ok().and_then(|text| text.split_once(' '));
        let Some((_, key)) = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")) else {
            return Err(ApiError::unauthorized(
                "the Authorization header is not of the form `Bearer KEY`: send the API key in that form",
            ));
        };
        // Hashes have equal length and are compared in constant time, so nothing reveals the length of the key.
        if blake3::hash(key.trim().as_bytes()) == expected {
            Ok(())
        } else {
            Err(ApiError::unauthorized("the API key is wrong: send the one that this node was started with"))
        }
    }
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Auth(key required)" } else { "Auth(open)" })
    }
}

/// An address that would be served to other machines without a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the API address {address} can be reached from other machines, but the API key is {key}: \
     give one with --api-key (COEL_API_KEY), or use --api 127.0.0.1:{port} instead",
    port = .address.port()
)]
pub struct BindRefused {
    /// The address asked for.
    pub address: SocketAddr,
    /// The state of the key, in words; never the key itself.
    pub key: &'static str,
}

/// Allows an address to be served: loopback always, any other only with a key.
///
/// # Errors
/// Names the address, the state of the key, and both remedies.
pub fn check_bind(address: SocketAddr, key: Option<&str>) -> Result<(), BindRefused> {
    // `::ffff:127.0.0.1` is loopback too.
    if address.ip().to_canonical().is_loopback() || effective(key).is_some() {
        return Ok(());
    }
    Err(BindRefused { address, key: if key.is_some() { "blank" } else { "not set" } })
}

fn effective(key: Option<&str>) -> Option<&str> {
    key.map(str::trim).filter(|key| !key.is_empty())
}
