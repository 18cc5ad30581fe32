//! Routing: the table of routes, the check of the key, and the reading of bodies.
//!
//! The invariants: the key is checked before anything else about a request, including whether its path exists; a body
//! is read within a limit of bytes and of time before it is parsed; and a request reaches the service only after
//! [`openai`] has accepted every field of it.
//!
//! Handlers decide nothing: they read, call the service, and hand its events to `stream`.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, EXPECT, RETRY_AFTER};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::StreamExt;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::auth::Auth;
use super::error::{ApiError, RETRY_NOT_READY_S};
use super::openai::{self, Asked};
use super::reply::{Answer, Chunks, Head, Shape, Spell};
use super::stream;
use crate::service::{ModelInfo, Service, ServiceError};

/// A context of a million tokens in plain text is about this long.
const BODY_BYTES_MAX: usize = 4 << 20;
/// A body over the limit is read this far, so that a client that sends all of it still gets to read the refusal.
const BODY_BYTES_DISCARDED: usize = 16 * BODY_BYTES_MAX;
/// The whole body must arrive within this time.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The state that all handlers share.
#[derive(Clone)]
pub(super) struct App {
    service: Arc<dyn Service>,
    auth: Auth,
    /// Pause between the comments of a stream without a token.
    keepalive: Duration,
    /// Cancelled when running answers must end.
    closing: CancellationToken,
    /// Unix seconds. Stands for the creation date of models, which have none.
    started: u64,
}

pub(super) fn router(service: Arc<dyn Service>, auth: Auth, keepalive: Duration, closing: CancellationToken) -> Router {
    let app = App { service, auth, keepalive, closing, started: unix_seconds() };
    Router::new()
        .route("/healthz", get(async || "ok"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        // A name may hold slashes.
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .method_not_allowed_fallback(wrong_method)
        .fallback(unknown_route)
        .layer(middleware::from_fn_with_state(app.clone(), guard))
        .with_state(app)
}

/// Opens the request's span and checks the key.
async fn guard(State(app): State<App>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let span = tracing::info_span!("http", method = %request.method(), path);
    let open = matches!(path, "/healthz" | "/readyz");
    let allowed = if open { Ok(()) } else { app.auth.check(request.headers()) };
    async move {
        let response = match allowed {
            Ok(()) => next.run(request).await,
            Err(refused) => refused.into_response(),
        };
        tracing::debug!(status = response.status().as_u16(), "answered");
        response
    }
    .instrument(span)
    .await
}

async fn unknown_route(request: Request) -> ApiError {
    let message = format!(
        "there is no {}: this API serves /v1/chat/completions, /v1/completions, /v1/models, /healthz, /readyz and /metrics",
        request.uri().path()
    );
    ApiError::refused(StatusCode::NOT_FOUND, message).code("unknown_url")
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{} does not accept {}: see the Allow header", request.uri().path(), request.method());
    ApiError::refused(StatusCode::METHOD_NOT_ALLOWED, message).code("method_not_allowed")
}

async fn ready(State(app): State<App>) -> Response {
    let readiness = app.service.readiness();
    if readiness.ready {
        return Json(readiness).into_response();
    }
    let retry = [(RETRY_AFTER, RETRY_NOT_READY_S.to_string())];
    (StatusCode::SERVICE_UNAVAILABLE, retry, Json(readiness)).into_response()
}

async fn metrics(State(app): State<App>) -> Response {
    ([(CONTENT_TYPE, OPENMETRICS)], app.service.metrics()).into_response()
}

async fn models(State(app): State<App>) -> Response {
    let models = app.service.models();
    let data: Vec<_> = models.iter().map(|model| describe(model, public_id(model, &models), app.started)).collect();
    Json(json!({ "object": "list", "data": data })).into_response()
}

async fn model(State(app): State<App>, Path(asked): Path<String>) -> Result<Response, ApiError> {
    let models = app.service.models();
    let found = models.iter().find(|model| model.id == asked || model.name == asked);
    let Some(model) = found else {
        let known = models.iter().map(|model| public_id(model, &models).to_owned()).collect();
        return Err(refusal(&app, Shape::Chat, &ServiceError::UnknownModel { asked, known }));
    };
    Ok(Json(describe(model, &asked, app.started)).into_response())
}

/// The id shown to clients: the model's name, unless it is empty or another model has the same.
fn public_id<'a>(model: &'a ModelInfo, all: &[ModelInfo]) -> &'a str {
    let same = all.iter().filter(|other| other.name == model.name).count();
    if model.name.is_empty() || same > 1 { &model.id } else { &model.name }
}

fn describe(model: &ModelInfo, id: &str, created: u64) -> serde_json::Value {
    json!({
        "id": id,
        "object": "model",
        "created": created,
        "owned_by": "coel",
        "coel": { "id": model.id, "name": model.name },
    })
}

async fn chat(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let body = read_body(request).await?;
    answer(&app, Shape::Chat, openai::chat(&body, rand::random())?).await
}

async fn completion(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let body = read_body(request).await?;
    answer(&app, Shape::Text, openai::completion(&body, rand::random())?).await
}

async fn answer(app: &App, shape: Shape, asked: Asked) -> Result<Response, ApiError> {
    let Asked { generate, stream, include_usage } = asked;
    let head = Head::new(shape, &generate.model, rand::random(), unix_seconds());
    tracing::debug!(id = head.id, model = generate.model, stream, "generation requested");
    let answer = Answer::new(head, spell(app, &generate.model));
    let logprobs = generate.params.logprobs.is_some();
    let submitted = app.service.submit(generate).await;
    let events = submitted.map_err(|error| refusal(app, shape, &error))?;
    let reply = if stream {
        let fault = {
            let app = app.clone();
            move |error: &ServiceError| refusal(&app, shape, error)
        };
        let chunks = Chunks::new(answer, include_usage);
        stream::server_sent(chunks, events, app.keepalive, app.closing.clone(), fault).await
    } else {
        stream::whole(answer, logprobs, events, &app.closing).await
    };
    reply.map_err(|error| refusal(app, shape, &error))
}

fn spell(app: &App, model: &str) -> Spell {
    let service = app.service.clone();
    let model = model.to_owned();
    Arc::new(move |token| service.token_bytes(&model, token))
}

fn refusal(app: &App, shape: Shape, error: &ServiceError) -> ApiError {
    let refused = ApiError::from_service(error, shape.prompt_field(), || app.service.readiness());
    tracing::info!(status = refused.status.as_u16(), message = refused.message, "refused");
    refused
}

/// The body of a JSON request, read within the limits.
async fn read_body(request: Request) -> Result<Vec<u8>, ApiError> {
    check_content_type(request.headers())?;
    let too_large = || {
        let message = format!("the request body is larger than {BODY_BYTES_MAX} bytes: shorten the prompt");
        ApiError::refused(StatusCode::PAYLOAD_TOO_LARGE, message).code("body_too_large")
    };
    let announced = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    // A client that sends `Expect` waits for the answer before it sends the body.
    if request.headers().contains_key(EXPECT) && announced.is_some_and(|length: usize| length > BODY_BYTES_MAX) {
        return Err(too_large());
    }
    let reading = collect(request.into_body());
    match tokio::time::timeout(BODY_TIMEOUT, reading).await {
        Ok(Ok(Some(body))) => Ok(body),
        Ok(Ok(None)) => Err(too_large()),
        Ok(Err(error)) => Err(ApiError::request(format!("the request body could not be read: {error}"))),
        Err(_) => {
            let message = format!("the request body did not arrive within {} s", BODY_TIMEOUT.as_secs());
            Err(ApiError::refused(StatusCode::REQUEST_TIMEOUT, message))
        }
    }
}

/// The body, or `None` if it is larger than allowed.
async fn collect(body: Body) -> Result<Option<Vec<u8>>, axum::Error> {
    let mut frames = body.into_data_stream();
    let mut body = Vec::new();
    let mut length = 0;
    while let Some(frame) = frames.next().await {
        let frame = frame?;
        length += frame.len();
        if length <= BODY_BYTES_MAX {
            body.extend_from_slice(&frame);
        } else if length > BODY_BYTES_DISCARDED {
            break;
        } else {
            body = Vec::new();
        }
    }
    Ok((length <= BODY_BYTES_MAX).then_some(body))
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let given = headers.get(CONTENT_TYPE).map(|value| String::from_utf8_lossy(value.as_bytes()));
    let essence = given.as_deref().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let json = essence.eq_ignore_ascii_case("application/json")
        || (essence.starts_with("application/") && essence.ends_with("+json"));
    if json {
        return Ok(());
    }
    let given = if essence.is_empty() { "none" } else { essence };
    let message =
        format!("the body must be JSON, but its content type is {given}: send `Content-Type: application/json`");
    Err(ApiError::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, message).code("unsupported_media_type"))
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
