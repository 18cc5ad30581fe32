//! Everything that can go wrong with a request, in OpenAI's error shape.
//!
//! Owns the shape `{"error": {"message", "type", "param", "code"}}` and the choice of HTTP status, code and
//! `Retry-After` for each fault. The invariant: no reply with a status of 400 or above leaves this API in any other
//! shape, so that a client needs only one error path; and every message says what was wrong and what to do about it.
//!
//! The module does not know how a fault arose. Statuses are chosen by how clients react to them: clients retry 429 and
//! 503 after the requested pause, and report 400, 401 and 404 to their user.

use axum::Json;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::service::{Readiness, ServiceError};

/// Values of `Retry-After`, in seconds. A place is free as soon as an answer ends; weights take longer to arrive; an
/// expert without a replica waits until the mesh detects a dead node and moves its experts.
pub(super) const RETRY_BUSY_S: u32 = 1;
pub(super) const RETRY_NOT_READY_S: u32 = 2;
const RETRY_MISSING_S: u32 = 5;

/// A refusal or failure, ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status, if the reply has not begun yet.
    pub status: StatusCode,
    /// OpenAI's error type, a coarse class.
    pub kind: &'static str,
    /// What was wrong and what to do, in words.
    pub message: String,
    /// The field at fault, as a path such as `messages[0].content`.
    pub param: Option<String>,
    /// The fault's machine-readable name.
    pub code: Option<&'static str>,
    /// Seconds after which a retry makes sense.
    pub retry_after_s: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None, retry_after_s: None }
    }

    /// A fault of the request as a whole.
    pub fn request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A fault of one field.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::request(message) }
    }

    /// A field that asks for something this API does not support.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::field(param, message).code("unsupported_parameter")
    }

    /// A request refused before its body is examined.
    pub fn refused(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    /// No key, or a wrong one.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::refused(StatusCode::UNAUTHORIZED, message).code("invalid_api_key")
    }

    /// The same error, with a code.
    #[must_use]
    pub fn code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// Maps an error of the service to HTTP. `prompt` names the field that holds the prompt, and `readiness` gives the
    /// progress of a node that does not serve yet.
    pub fn from_service(error: &ServiceError, prompt: &str, readiness: impl FnOnce() -> Readiness) -> Self {
        let message = error.to_string();
        let server = |status, code, message: String| Self::new(status, "server_error", message).code(code);
        match error {
            ServiceError::ContextExceeded(_) => Self::field(prompt, message).code("context_length_exceeded"),
            ServiceError::Invalid { param, .. } => Self { param: param.map(str::to_owned), ..Self::request(message) },
            ServiceError::UnknownModel { .. } => Self {
                param: Some("model".into()),
                ..Self::refused(StatusCode::NOT_FOUND, message).code("model_not_found")
            },
            ServiceError::NotReady(_) => {
                let message = with_progress(message, &readiness());
                server(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message).retry_after(RETRY_NOT_READY_S)
            }
            ServiceError::Busy(_) => Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
                .code("rate_limit_exceeded")
                .retry_after(RETRY_BUSY_S),
            ServiceError::MissingExperts(_) => {
                server(StatusCode::SERVICE_UNAVAILABLE, "missing_experts", message).retry_after(RETRY_MISSING_S)
            }
            ServiceError::Internal(_) => server(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message),
        }
    }

    fn retry_after(self, seconds: u32) -> Self {
        Self { retry_after_s: Some(seconds), ..self }
    }

    /// The reply's body.
    pub fn body(&self) -> impl Serialize {
        #[derive(Serialize)]
        struct Body {
            error: Fault,
        }
        #[derive(Serialize)]
        struct Fault {
            message: String,
            r#type: &'static str,
            param: Option<String>,
            code: Option<&'static str>,
        }
        let Self { kind, message, param, code, .. } = self.clone();
        Body { error: Fault { message, r#type: kind, param, code } }
    }
}

/// Adds the node's progress: what the node waits for, unless the message says so already; the share of experts held
/// somewhere; and the node's own weights. A node that was ready is on its way out, and has no progress to report.
fn with_progress(message: String, readiness: &Readiness) -> String {
    if readiness.ready {
        return message;
    }
    let waiting = readiness.to_string();
    let waiting = if message.contains(&waiting) { String::new() } else { format!("{waiting}; ") };
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    format!(
        "{message} ({waiting}{:.0} % of the experts ready in the mesh, {:.1} of {:.1} MiB held here)",
        readiness.coverage * 100.0,
        mib(readiness.bytes_held),
        mib(readiness.bytes_assigned),
    )
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
