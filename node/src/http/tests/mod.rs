//! The API over real sockets, in front of a scripted service: requests reach the service, and replies have OpenAI's
//! shape.
//!
//! [`Script`] plays a fixed list of events and records the requests; it has no model. The tests measure no time: every
//! wait ends with an event, and [`HANG`] only turns a hang into a failure.

mod answers;
mod faults;
mod guards;
mod lifetime;
mod requests;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use coel_model::text::sampling::Logprobs;
use coel_model::text::sequence::{Emitted, FinishReason};
use coel_store::Precision;
use futures::FutureExt;
use futures::future::BoxFuture;
use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::{Auth, Patience, serve_with};
use crate::service::{Event, GenerateRequest, ModelInfo, Readiness, Service, ServiceError, Usage};

const HANG: Duration = Duration::from_secs(60);

/// Tokens of the scripted vocabulary: 2 and 3 are the halves of one character.
const VOCABULARY: [&[u8]; 6] = [b"Par", b"is", &[0xc3], &[0xa9], b"!", b"<end>"];
const END: u32 = 5;

/// A service that follows a script.
struct Script {
    models: Vec<ModelInfo>,
    readiness: Readiness,
    refusal: Option<ServiceError>,
    events: Vec<Event>,
    /// Whether the channel stays open after the last event, until the receiver is dropped.
    holds: bool,
    asked: Mutex<Vec<GenerateRequest>>,
    /// Notified once the receiver of a held channel is dropped.
    cancelled: Arc<Notify>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            models: vec![model("5eed", "tiny"), model("0b0e", "owner/large")],
            readiness: Readiness {
                ready: true,
                waiting_for: None,
                problem: None,
                coverage: 1.0,
                bytes_assigned: 3 << 20,
                bytes_held: 3 << 20,
            },
            refusal: None,
            events: paris(None),
            holds: false,
            asked: Mutex::default(),
            cancelled: Arc::default(),
        }
    }
}

impl Script {
    fn saying(events: Vec<Event>) -> Self {
        Self { events, ..Self::default() }
    }

    fn refusing(error: ServiceError) -> Self {
        Self { refusal: Some(error), ..Self::default() }
    }
}

impl Service for Script {
    fn models(&self) -> Vec<ModelInfo> {
        self.models.clone()
    }

    fn readiness(&self) -> Readiness {
        self.readiness.clone()
    }

    fn submit(&self, request: GenerateRequest) -> BoxFuture<'_, Result<mpsc::Receiver<Event>, ServiceError>> {
        let known = self.models.iter().any(|model| model.id == request.model || model.name == request.model);
        let asked = request.model.clone();
        self.asked.lock().unwrap().push(request);
        async move {
            if let Some(error) = &self.refusal {
                return Err(error.clone());
            }
            if !known {
                let known = self.models.iter().map(|model| model.name.clone()).collect();
                return Err(ServiceError::UnknownModel { asked, known });
            }
            let (sender, receiver) = mpsc::channel(1);
            let (events, holds, cancelled) = (self.events.clone(), self.holds, self.cancelled.clone());
            tokio::spawn(async move {
                for event in events {
                    if sender.send(event).await.is_err() {
                        break;
                    }
                }
                if holds {
                    sender.closed().await;
                    cancelled.notify_one();
                }
            });
            Ok(receiver)
        }
        .boxed()
    }

    fn token_bytes(&self, model: &str, token: u32) -> Vec<u8> {
        assert_eq!(model, "tiny");
        VOCABULARY.get(token as usize).copied().unwrap_or_default().to_vec()
    }

    fn metrics(&self) -> String {
        "# TYPE coel_requests counter\ncoel_requests_total 7\n# EOF\n".into()
    }
}

fn model(id: &str, name: &str) -> ModelInfo {
    ModelInfo { id: id.into(), name: name.into() }
}

/// A step that shows `text`; with `top`, also with log-probabilities of `token` and of that many top tokens.
fn step(token: u32, text: &str, top: Option<usize>) -> Event {
    let logprobs = top.filter(|_| token != END).map(|count| {
        let others = [(token, -0.25), (4, -1.5), (1, f32::NEG_INFINITY)];
        Logprobs { chosen: -0.25, top: others[..count].to_vec() }
    });
    Event::Token(Emitted { token, text: text.into(), logprobs, finish: None })
}

fn usage() -> Usage {
    Usage {
        prompt_tokens: 12,
        completion_tokens: 6,
        rows_local: 40,
        rows_remote: 24,
        precisions: [Precision::Q8, Precision::Exact].into(),
        other_classes: vec!["avx2/q8".into()],
    }
}

/// "Parisé!": the text of one token is held back, and one character takes two tokens.
fn paris(top: Option<usize>) -> Vec<Event> {
    let steps = [(0, ""), (1, "Paris"), (2, ""), (3, "é"), (4, "!"), (END, "")];
    let mut events: Vec<_> = steps.map(|(token, text)| step(token, text, top)).into();
    events.push(Event::Finished { reason: FinishReason::Stop, usage: usage() });
    events
}

/// The server of one test.
struct Server {
    base: String,
    script: Arc<Script>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<std::io::Result<()>>,
    client: reqwest::Client,
}

impl Server {
    async fn start(script: Script) -> Self {
        Self::guarded(script, None).await
    }

    async fn guarded(script: Script, key: Option<&str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let script = Arc::new(script);
        let (stop, stopped) = oneshot::channel();
        let patience =
            Patience { keepalive: Duration::from_millis(20), drain: Duration::from_millis(20), farewell: HANG };
        let shutdown = async { stopped.await.unwrap_or_default() };
        let task = tokio::spawn(serve_with(listener, script.clone(), Auth::new(key), shutdown, patience));
        let client = reqwest::Client::builder().no_proxy().timeout(HANG).build().unwrap();
        Self { base, script, stop, task, client }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.base))
    }

    async fn get(&self, path: &str) -> Response {
        self.request(Method::GET, path).send().await.unwrap()
    }

    async fn post(&self, path: &str, body: &Value) -> Response {
        self.request(Method::POST, path).json(body).send().await.unwrap()
    }

    /// The last request that reached the service.
    fn asked(&self) -> GenerateRequest {
        self.script.asked.lock().unwrap().last().cloned().expect("the service was asked")
    }
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// The smallest chat request, with `more` fields.
fn chat_body(more: Value) -> Value {
    merge(json!({"model": "tiny", "messages": [{"role": "user", "content": "Capital of France?"}]}), more)
}

/// The smallest completion request, with `more` fields.
fn text_body(more: Value) -> Value {
    merge(json!({"model": "tiny", "prompt": "The capital of France is"}), more)
}

/// `base` with the fields of `more`; a null in `more` removes the field.
fn merge(mut base: Value, more: Value) -> Value {
    let (Value::Object(fields), Value::Object(more)) = (&mut base, more) else { panic!("objects") };
    for (name, value) in more {
        if value.is_null() {
            fields.remove(&name);
        } else {
            fields.insert(name, value);
        }
    }
    base
}

/// A server-sent event: its name, and its data.
#[derive(Debug, PartialEq)]
struct Sent {
    name: Option<String>,
    data: String,
}

/// Parses a whole event stream; comments are dropped.
fn sent(body: &str) -> Vec<Sent> {
    let mut all = Vec::new();
    for block in body.split("\n\n").filter(|block| !block.trim().is_empty()) {
        let mut event = Sent { name: None, data: String::new() };
        for line in block.lines().filter(|line| !line.starts_with(':')) {
            match line.split_once(": ").expect("a field") {
                ("event", name) => event.name = Some(name.into()),
                ("data", data) => event.data.push_str(data),
                other => panic!("unexpected field {other:?}"),
            }
        }
        all.push(event);
    }
    all
}

/// The chunks of a stream that must end well.
fn chunks(body: &str) -> Vec<Value> {
    let mut events = sent(body);
    assert_eq!(events.pop(), Some(Sent { name: None, data: "[DONE]".into() }));
    assert!(events.iter().all(|event| event.name.is_none()));
    events.iter().map(|event| serde_json::from_str(&event.data).unwrap()).collect()
}

async fn json_of(response: Response) -> Value {
    serde_json::from_str(&response.text().await.unwrap()).unwrap()
}
