//! The node over HTTP: OpenAI's API, health and metrics.
//!
//! Owns the translation between OpenAI's API and [`Service`], and nothing else: the module keeps no state of a
//! generation that outlives its connection, and sees a node only through that trait. The invariants: every fault is
//! reported in OpenAI's error shape; a closed connection cancels its generation, because the receiver lives in the
//! reply's body; and a request body is limited in size and in time before it is parsed.
//!
//! - [`openai`]: requests read and checked, pure.
//! - `reply`, `logprobs`: replies and stream chunks built from tokens, pure.
//! - `stream`: the events of one generation as one reply or as server-sent events.
//! - `routes`: the table of routes, and the reading of bodies.
//! - `error`: every fault in OpenAI's shape. `fields`: a JSON object read strictly.
//! - `auth`: the API key, and the addresses that may do without one.
//!
//! TLS, browsers (no CORS) and quotas are deliberately left to a reverse proxy.

mod auth;
mod error;
mod fields;
mod logprobs;
pub mod openai;
mod reply;
mod routes;
mod stream;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use auth::{Auth, BindRefused, check_bind};
pub use error::ApiError;

use crate::service::Service;

/// How long silence may last, and how long answers may go on once the server stops. A service ends its own generations when its
/// node stops; the limits of a stop are for a service that does not, and for clients that do not read.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// A stream without a token sends a comment after this time, and again: clients and proxies close silent connections.
    keepalive: Duration,
    /// From the shutdown until running answers are ended with an error.
    drain: Duration,
    /// From then until the server stops waiting for connections.
    farewell: Duration,
}

const PATIENCE: Patience =
    Patience { keepalive: Duration::from_secs(5), drain: Duration::from_secs(10), farewell: Duration::from_secs(1) };

/// Serves the API on `listener` until `shutdown` completes.
///
/// From then on no connection is accepted, idle ones are closed, and running answers may finish. Answers that do not
/// finish within ten seconds are ended with an error. Returns at most a second later, whatever the clients do.
///
/// # Errors
/// Errors of the listener. An error on one connection ends only that connection.
pub async fn serve(
    listener: TcpListener,
    service: Arc<dyn Service>,
    auth: Auth,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    serve_with(listener, service, auth, shutdown, PATIENCE).await
}

async fn serve_with(
    listener: TcpListener,
    service: Arc<dyn Service>,
    auth: Auth,
    shutdown: impl Future<Output = ()> + Send + 'static,
    patience: Patience,
) -> io::Result<()> {
    let address = listener.local_addr()?;
    tracing::info!(%address, ?auth, "serving the API");
    let closing = CancellationToken::new();
    let app = routes::router(service, auth, patience.keepalive, closing.clone());
    // A token is a small write with no other right behind it: without this option it could wait for the client's
    // delayed ACK.
    let listener = listener.tap_io(|connection| {
        if let Err(error) = connection.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY not set");
        }
    });

    let stopping = CancellationToken::new();
    let stopped = stopping.clone();
    let server = axum::serve(listener, app).with_graceful_shutdown(async move {
        shutdown.await;
        stopped.cancel();
    });
    let limit = async {
        stopping.cancelled().await;
        tracing::debug!(%address, "the API is stopping; running answers may finish");
        tokio::time::sleep(patience.drain).await;
        closing.cancel();
        tokio::time::sleep(patience.farewell).await;
        tracing::warn!(%address, "connections were still open when the API stopped");
    };
    tokio::select! {
        served = server => served,
        () = limit => Ok(()),
    }
}
