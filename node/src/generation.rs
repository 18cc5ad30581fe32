//! Generations: a prompt through the engine, token by token, with experts from wherever they are.
//!
//! [`Generator`] is the node's [`Service`]. One task per generation drives the decoder: it never computes itself, and while
//! the engine or a peer works for one generation, the others go on.

use std::collections::BTreeMap;
use std::sync::Arc;

use coel_model::decoder::{Step, Want};
use coel_model::engine::EngineError;
use coel_model::sequence::{Sequence, SequenceError};
use coel_model::text::TextError;
use coel_store::Placement;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tracing::{Instrument, info, info_span, warn};

use crate::experts::caller::{CallError, Caller, SharedHosts};
use crate::experts::dispatch::Missing;
use crate::library::{Known, run_blocking};
use crate::service::{Event, GenerateRequest, ModelInfo, Prompt, Readiness, Service, ServiceError};
use crate::shared::{Serving, Shared};

/// Generations at once. More would only make each of them slower: they share one compute thread.
const RUNNING_MAX: usize = 8;
/// Generations that may wait for a place.
const WAITING_MAX: usize = 32;
/// Tokens a client may be behind before its generation waits for it.
const EVENTS_BEHIND: usize = 64;

/// Takes generations and runs them.
pub struct Generator {
    shared: Arc<Shared>,
    running: Arc<Semaphore>,
    admitted: Arc<Semaphore>,
    hosts: SharedHosts,
}

/// One generation on its way.
struct Generation {
    shared: Arc<Shared>,
    serving: Serving,
    sequence: Sequence,
    caller: Caller,
    events: mpsc::Sender<Event>,
}

/// Why a generation ends early.
enum End {
    /// Nobody listens any more.
    Cancelled,
    Failed(ServiceError),
}

impl From<ServiceError> for End {
    fn from(error: ServiceError) -> Self {
        Self::Failed(error)
    }
}

impl Generator {
    /// A generator for the node.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            running: Arc::new(Semaphore::new(RUNNING_MAX)),
            admitted: Arc::new(Semaphore::new(RUNNING_MAX + WAITING_MAX)),
            hosts: SharedHosts::default(),
        }
    }

    async fn begin(&self, request: GenerateRequest) -> Result<mpsc::Receiver<Event>, ServiceError> {
        let state = self.shared.state();
        let named = state.model(&request.model).map(|(id, _)| id).ok_or_else(|| ServiceError::UnknownModel {
            asked: request.model.clone(),
            known: self.models().into_iter().map(|model| model.name).collect(),
        })?;
        let not_ready = || ServiceError::NotReady(self.readiness().to_string());
        let serving = self.shared.serving.borrow().clone().ok_or_else(not_ready)?;
        if serving.known.id != named {
            return Err(ServiceError::NotReady(format!("the mesh serves '{}' only", serving.known.manifest.name)));
        }
        // A long prompt takes a while to tokenize, which must not hold up the tasks that move bytes.
        let known = serving.known.clone();
        let prompt = run_blocking(move || tokens(&known, request.prompt)).await?;
        let pool = serving.known.kv_tokens(self.shared.config.kv_tokens);
        let context = serving.known.config.max_position_embeddings;
        if prompt.len() < context && prompt.len() >= pool {
            return Err(ServiceError::ContextExceeded(format!(
                "the prompt has {} tokens, but this node keeps a KV cache of {pool}; shorten it or restart the node with a \
                     larger --kv-tokens",
                prompt.len()
            )));
        }
        let tokenizer = serving.known.text.tokenizer.clone();
        let sequence = Sequence::new(prompt, request.params, context.min(pool), tokenizer).map_err(invalid)?;
        // Everything that is wrong with a request is said before anything about the node.
        if !self.readiness().ready {
            return Err(not_ready());
        }
        let admitted = self.admitted.clone().try_acquire_owned().map_err(|_| {
            ServiceError::Busy(format!(
                "{RUNNING_MAX} generations run and {WAITING_MAX} wait; try again in a moment or ask another node"
            ))
        })?;
        let (events, receiver) = mpsc::channel(EVENTS_BEHIND);
        let caller = Caller::new(self.shared.clone(), serving.clone(), self.hosts.clone());
        let generation = Generation { shared: self.shared.clone(), serving, sequence, caller, events };
        let span = info_span!("request", prompt_tokens = generation.sequence.prompt().len());
        tokio::spawn(generation.run(self.running.clone(), admitted).instrument(span));
        self.shared.metrics.requests.inc();
        Ok(receiver)
    }
}

impl Generation {
    async fn run(mut self, running: Arc<Semaphore>, _admitted: OwnedSemaphorePermit) {
        let stopping = self.shared.stopping.clone();
        let events = self.events.clone();
        let metrics = self.shared.metrics.clone();
        let ended = tokio::select! {
            ended = self.generate(running) => ended,
            () = events.closed() => Err(End::Cancelled),
            () = stopping.cancelled() => Err(ServiceError::NotReady("this node is stopping; ask another one".into()).into()),
        };
        match ended {
            Ok(()) => {}
            Err(End::Cancelled) => info!("cancelled by the client"),
            Err(End::Failed(error)) => {
                warn!(%error, "failed");
                metrics.requests_failed.inc();
                let _ = events.send(Event::Failed(error)).await;
            }
        }
    }

    async fn generate(&mut self, running: Arc<Semaphore>) -> Result<(), End> {
        let _place = running.acquire().await.map_err(|_| End::Cancelled)?;
        let engine = self.serving.engine.clone();
        let mut session = loop {
            match engine.open_session(self.sequence.tokens_max()).await {
                Ok(session) => break session,
                // The pool frees as other generations end; each of them does.
                Err(EngineError::Busy { .. }) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
                Err(error) => return Err(internal(&error).into()),
            }
        };
        let rows_max = self.serving.known.rows_max();
        loop {
            let input = self.sequence.next_input().to_vec();
            let mut logits = Vec::new();
            for chunk in input.chunks(rows_max) {
                let mut step = session.advance(chunk, Want::Last).await.map_err(|e| internal(&e))?;
                logits = loop {
                    match step {
                        Step::NeedExperts(call) => {
                            let outputs = self.caller.run(&call).await.map_err(|error| match error {
                                CallError::Missing { .. } => ServiceError::MissingExperts(error.to_string()),
                                CallError::Engine(error) => internal(&error),
                            })?;
                            step = session.resume(outputs).await.map_err(|error| internal(&error))?;
                        }
                        Step::Logits(logits) => break logits,
                    }
                };
            }
            let emitted = self.sequence.accept(&logits).map_err(|error| internal(&error))?;
            self.shared.metrics.tokens.inc();
            let finish = emitted.finish;
            self.events.send(Event::Token(emitted)).await.map_err(|_| End::Cancelled)?;
            if let Some(reason) = finish {
                let counted = self.sequence.usage();
                let mut usage = self.caller.usage.clone();
                usage.prompt_tokens = counted.prompt_tokens;
                usage.completion_tokens = counted.completion_tokens;
                info!(
                    completion_tokens = usage.completion_tokens,
                    rows_local = usage.rows_local,
                    rows_remote = usage.rows_remote,
                    "answered"
                );
                return self.events.send(Event::Finished { reason, usage }).await.map_err(|_| End::Cancelled);
            }
        }
    }
}

/// The prompt's tokens.
fn tokens(known: &Known, prompt: Prompt) -> Result<Vec<u32>, ServiceError> {
    let fault = |param, message: String| ServiceError::Invalid { param: Some(param), message };
    match prompt {
        Prompt::Chat(messages) => known.text.chat_prompt(&messages).map_err(|error| match error {
            TextError::Chat(error) if !error.is_callers_fault() => internal(&error),
            error => fault("messages", error.to_string()),
        }),
        Prompt::Text(text) => {
            known.text.tokenizer.encode(&text, true).map_err(|error| fault("prompt", error.to_string()))
        }
        Prompt::Tokens(tokens) => match tokens.iter().find(|&&token| token as usize >= known.config.vocab_size) {
            Some(token) => {
                Err(fault("prompt", format!("token {token} is beyond the vocabulary of {}", known.config.vocab_size)))
            }
            None => Ok(tokens),
        },
    }
}

fn invalid(error: SequenceError) -> ServiceError {
    match error {
        SequenceError::ContextOverflow { .. } => ServiceError::ContextExceeded(error.to_string()),
        error => ServiceError::Invalid { param: None, message: error.to_string() },
    }
}

fn internal(error: &dyn std::fmt::Display) -> ServiceError {
    ServiceError::Internal(error.to_string())
}

impl Service for Generator {
    fn models(&self) -> Vec<ModelInfo> {
        let state = self.shared.state();
        state.models.iter().map(|(id, model)| ModelInfo { id: id.to_string(), name: model.name.clone() }).collect()
    }

    fn readiness(&self) -> Readiness {
        readiness(&self.shared)
    }

    fn submit(&self, request: GenerateRequest) -> BoxFuture<'_, Result<mpsc::Receiver<Event>, ServiceError>> {
        self.begin(request).boxed()
    }

    fn token_bytes(&self, model: &str, token: u32) -> Vec<u8> {
        let named = self.shared.state().model(model).map(|(id, _)| id);
        let serving = self.shared.serving.borrow();
        let known = serving.as_ref().map(|serving| &serving.known).filter(|known| Some(known.id) == named);
        known.map(|known| known.text.tokenizer.token_bytes(token).to_vec()).unwrap_or_default()
    }

    fn metrics(&self) -> String {
        let shared = &self.shared;
        let metrics = &shared.metrics;
        let state = shared.state();
        metrics.epoch.set(state.epoch().0 as i64);
        metrics.nodes_up.set(state.members.len() as i64 - shared.down().len() as i64);
        metrics.coverage.set(self.readiness().coverage);
        metrics.memory_bytes.set(ledger_bytes(shared) as i64);
        metrics.memory_budget_bytes.set(shared.config.memory_bytes as i64);
        metrics.text()
    }
}

/// What this node's models take of its budget.
pub fn ledger_bytes(shared: &Shared) -> u64 {
    shared.serving.borrow().as_ref().map_or(0, |serving| serving.engine.memory().total())
}

/// Whether this node, as a home, would serve a request now.
pub fn readiness(shared: &Shared) -> Readiness {
    let state = shared.state();
    let progress = shared.progress.borrow().clone();
    let placement = state.placement.as_ref();
    let (lost, loading) = placement.map_or_else(Default::default, |placement| missing(shared, placement));
    let experts = placement.map_or(0, |placement| placement.replicas.len());
    let absent = lost.experts.len() + loading;
    let coverage = if experts == 0 { 0.0 } else { (experts - absent) as f64 / experts as f64 };
    let waiting_for = if state.models.is_empty() {
        Some("no model is registered; import one with `coel model import DIR`".to_owned())
    } else if shared.serving.borrow().is_none() {
        Some(format!("loading the trunk: {} of {} bytes here", progress.bytes_held, progress.bytes_assigned))
    } else if let (None, planner) = (&state.placement, shared.planner()) {
        Some(planner.unwrap_or_else(|| "waiting for the leader to place the model's experts".into()))
    } else if !lost.experts.is_empty() {
        Some(lost.to_string())
    } else if loading > 0 {
        Some(format!(
            "loading: {} of {experts} experts are ready somewhere, {} of {} bytes assigned here are held",
            experts - loading,
            progress.bytes_held,
            progress.bytes_assigned
        ))
    } else {
        None
    };
    Readiness {
        ready: waiting_for.is_none(),
        waiting_for,
        problem: progress.problem,
        coverage,
        bytes_assigned: progress.bytes_assigned,
        bytes_held: progress.bytes_held,
    }
}

/// Experts that this node could not have computed now: those whose holders are all gone, and how many are only being loaded.
fn missing(shared: &Shared, placement: &Placement) -> (Missing, usize) {
    let (own, down, held) = (shared.log.node_id(), shared.down(), shared.held.borrow().clone());
    let (mut lost, mut loading) = (BTreeMap::new(), 0);
    for (&expert, nodes) in &placement.replicas {
        let live = || nodes.iter().filter(|(node, _)| !down.contains(node));
        if held.contains(&expert) || live().any(|(&node, replica)| node != own && replica.ready) {
            continue;
        }
        if live().next().is_some() {
            loading += 1;
        } else {
            lost.insert(expert, nodes.keys().copied().collect());
        }
    }
    (Missing { experts: lost }, loading)
}
