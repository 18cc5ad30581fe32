//! The events of one generation, as one reply or as server-sent events.
//!
//! The invariants: the receiver lives in the reply's future or body, so that a closed connection drops the receiver and
//! cancels the generation; and a stream ends in exactly one of two ways: with `data: [DONE]` after the last chunk, or
//! with an `error` event and nothing after it. A service that falls silent (its channel closes without a last event) is
//! an error, never an answer that looks complete.
//!
//! The module does not know what the chunks contain.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, stream};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::error::ApiError;
use super::reply::{Answer, Chunks};
use crate::service::{Event, ServiceError};

/// How long a stream's headers wait for the first event, so that a fault before the first token has a status of its
/// own. If the prompt takes longer, the headers go out first, so that no client gives up on a silent connection.
const FIRST_EVENT: Duration = Duration::from_secs(5);

/// One reply with everything, once the generation has ended.
///
/// # Errors
/// The failure that ended the generation, or the shutdown that cut it short.
pub(super) async fn whole(
    mut answer: Answer,
    logprobs: bool,
    mut events: mpsc::Receiver<Event>,
    closing: &CancellationToken,
) -> Result<Response, ServiceError> {
    loop {
        match next(&mut events, closing).await {
            Event::Token(emitted) => answer.push(&emitted),
            Event::Finished { reason, usage } => {
                return Ok(Json(answer.whole(reason, usage, logprobs)).into_response());
            }
            Event::Failed(error) => return Err(error),
        }
    }
}

/// A stream of chunks, with a comment whenever none has come for `keepalive`. `fault` puts a failure in OpenAI's shape.
///
/// # Errors
/// A failure before the first token.
pub(super) async fn server_sent(
    chunks: Chunks,
    mut events: mpsc::Receiver<Event>,
    keepalive: Duration,
    closing: CancellationToken,
    fault: impl Fn(&ServiceError) -> ApiError + Send + 'static,
) -> Result<Response, ServiceError> {
    let first = match tokio::time::timeout(FIRST_EVENT, next(&mut events, &closing)).await {
        Ok(Event::Failed(error)) => return Err(error),
        Ok(event) => Some(event),
        Err(_) => None,
    };
    let opening = chunks.opening().iter().map(data).collect::<Vec<_>>();
    let state = State { chunks, events, closing, first, fault };
    let parts = stream::unfold(Some(state), async |state| {
        let mut state = state?;
        let event = match state.first.take() {
            Some(event) => event,
            None => next(&mut state.events, &state.closing).await,
        };
        Some(match event {
            Event::Token(emitted) => (state.chunks.token(&emitted).iter().map(data).collect(), Some(state)),
            Event::Finished { reason, usage } => {
                let last = state.chunks.closing(reason, usage);
                let done = sse::Event::default().data("[DONE]");
                (last.iter().map(data).chain([done]).collect(), None)
            }
            Event::Failed(error) => {
                let fault = (state.fault)(&error);
                (vec![data(&fault.body()).event("error")], None)
            }
        })
    });
    let parts = stream::once(async { opening }).chain(parts);
    let parts = parts.flat_map(stream::iter).map(Ok::<_, Infallible>);
    Ok(Sse::new(parts).keep_alive(KeepAlive::new().interval(keepalive).text("keepalive")).into_response())
}

struct State<F> {
    chunks: Chunks,
    events: mpsc::Receiver<Event>,
    closing: CancellationToken,
    /// The event that was read while the headers waited.
    first: Option<Event>,
    fault: F,
}

/// The next event. A generation that is cut short ends with a failure event, like any other failure.
async fn next(events: &mut mpsc::Receiver<Event>, closing: &CancellationToken) -> Event {
    tokio::select! {
        biased;
        event = events.recv() => event.unwrap_or_else(|| {
            let silent = "the generation ended without a result; try again, and check the node's log if it recurs";
            Event::Failed(ServiceError::Internal(silent.into()))
        }),
        () = closing.cancelled() => {
            Event::Failed(ServiceError::NotReady("this node is shutting down; ask another one".into()))
        }
    }
}

fn data(part: &impl Serialize) -> sse::Event {
    // Parts are structs of strings and finite numbers, so serialising them does not fail.
    let json = serde_json::to_string(part).expect("a reply is valid JSON");
    sse::Event::default().data(json)
}
