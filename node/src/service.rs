//! What a node offers its users: generations, models, readiness.
//!
//! HTTP (and the terminal) see a node only through [`Service`]; they never see the log, the swarm or the engine. So the
//! OpenAI surface is tested with a scripted service, and the node without HTTP.
//!
//! Invariant: a submitted generation ends with exactly one [`Event::Finished`] or [`Event::Failed`], and nothing after it.

use std::collections::BTreeSet;
use std::fmt;

use coel_model::text::chat::Message;
use coel_model::text::sequence::{Emitted, FinishReason, GenerateParams};
use coel_store::Precision;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// What to continue.
#[derive(Debug, Clone)]
pub enum Prompt {
    /// Turns of a chat, rendered with the model's chat template.
    Chat(Vec<Message>),
    /// Text, continued as it is.
    Text(String),
    /// Token ids, continued as they are.
    Tokens(Vec<u32>),
}

/// One generation asked of the node.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Model id or name.
    pub model: String,
    /// What to continue.
    pub prompt: Prompt,
    /// How to continue it.
    pub params: GenerateParams,
}

/// What a generation took, and what took part in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the rendered prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, the end-of-text token included.
    pub completion_tokens: usize,
    /// (row, expert) pairs computed by this node.
    pub rows_local: u64,
    /// (row, expert) pairs computed by peers.
    pub rows_remote: u64,
    /// Precisions of all weights that took part: the trunk, and experts here and at peers. An answer is exact if this is `exact`
    /// alone.
    pub precisions: BTreeSet<Precision>,
    /// Kernel classes and precisions that took part besides this node's class at exact precision, e.g. `cpu-avx2/exact` or
    /// `cpu-avx512/q4+q8`. Empty if one class computed everything, with all weights as in the checkpoint.
    pub other_classes: Vec<String>,
}

/// One step of a generation.
#[derive(Debug, Clone)]
pub enum Event {
    /// A token was chosen. `Emitted::text` may be empty while a stop string or a character is incomplete.
    Token(Emitted),
    /// The generation ended well.
    Finished { reason: FinishReason, usage: Usage },
    /// The generation ended badly.
    Failed(ServiceError),
}

/// Why a request is not, or no longer, served. `Display` is the message for the user: fault and remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServiceError {
    /// The request itself is at fault; `param` is the OpenAI field it is about.
    #[error("{message}")]
    Invalid { param: Option<&'static str>, message: String },
    /// The prompt is longer than the context, or than what this node keeps of it.
    #[error("{0}")]
    ContextExceeded(String),
    /// No model of that id or name is registered.
    #[error("the model '{asked}' is not registered in this mesh; registered: {}", list(.known))]
    UnknownModel { asked: String, known: Vec<String> },
    /// The node does not serve yet, or no longer; retry later.
    #[error("not serving: {0}")]
    NotReady(String),
    /// Every place is taken; retry later.
    #[error("{0}")]
    Busy(String),
    /// Experts have no replica that answers.
    #[error("{0}")]
    MissingExperts(String),
    /// A fault of the node itself.
    #[error("{0}")]
    Internal(String),
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none (use `coel model import DIR`)".into() } else { names.join(", ") }
}

/// A registered model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// The manifest's hash, in hex.
    pub id: String,
    /// The name it was registered under.
    pub name: String,
}

/// Whether requests are answered now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Readiness {
    /// True once a request would truly be served.
    pub ready: bool,
    /// What is being waited for, in words.
    pub waiting_for: Option<String>,
    /// A fault that waiting alone will not mend.
    pub problem: Option<String>,
    /// Share of the model's experts with a ready replica on a live node, 0 to 1.
    pub coverage: f64,
    /// Bytes of the blobs assigned to this node.
    pub bytes_assigned: u64,
    /// Bytes of them held here, verified.
    pub bytes_held: u64,
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.problem, &self.waiting_for) {
            (Some(problem), _) => f.write_str(problem),
            (None, Some(waiting)) => f.write_str(waiting),
            (None, None) => f.write_str("ready"),
        }
    }
}

/// A node, as its users see it.
pub trait Service: Send + Sync + 'static {
    /// Models that can be named in a request.
    fn models(&self) -> Vec<ModelInfo>;

    /// Whether a request would be served now, and if not, how far it is.
    fn readiness(&self) -> Readiness;

    /// Starts a generation. Dropping the receiver cancels it.
    ///
    /// # Errors
    /// Everything that can be said before the first token: an invalid request, an unknown model, a node that is busy or
    /// not serving.
    fn submit(&self, request: GenerateRequest) -> BoxFuture<'_, Result<mpsc::Receiver<Event>, ServiceError>>;

    /// The bytes that `token` stands for in the vocabulary of `model` (an id or a name): possibly a part of a character, empty
    /// for an id or a model that there is not.
    fn token_bytes(&self, model: &str, token: u32) -> Vec<u8>;

    /// The node's metrics in the OpenMetrics text format.
    fn metrics(&self) -> String;
}
