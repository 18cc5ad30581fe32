//! Generations: a prompt through the engine, token by token, with experts from wherever they are.
//!
//! [`Generator`] is the node's [`Service`]. One task per generation drives a session of the engine, which computes the rows
//! of all sessions together and asks peers for experts it lacks. The task samples, and counts what its rows cost. Where the
//! hosts of an expert are away, it waits for them and goes on with the same tokens. No request has a deadline but that wait's: an answer
//! that advances is bounded by its tokens.

mod answers;

use std::collections::BTreeSet;
use std::sync::Arc;

use coel_model::nn::batch::Want;
use coel_model::serve::Advanced;
use coel_model::serve::engine::EngineError;
use coel_model::serve::expert_source::SourceError;
use coel_model::serve::session::Session;
use coel_model::text::model::TextError;
use coel_model::text::sequence::{Sequence, SequenceError};
use coel_store::Precision;
use futures::FutureExt;
use futures::future::BoxFuture;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};
use tracing::{Instrument, info, info_span, warn};

pub use answers::{AnswerGate, Answering};

// Generations are computed together, so that each costs the others little. Each has its share of the KV pool, and waits where the
// pool is full.
use crate::budget::RUNNING_MAX;
use crate::experts::class;
use crate::experts::wait::{ExpertWait, wait};
use crate::hosting::{Loaded, LoadedModel};
use crate::ids;
use crate::lifecycle::Lifecycle;
use crate::mesh::MeshView;
use crate::metrics::Metrics;
use crate::registry::ModelMeta;
use crate::service::{Event, GenerateRequest, ModelInfo, Prompt, Readiness, Service, ServiceError, Usage};
use crate::status::ReadinessView;
use crate::system::run_blocking;

/// Generations that may wait for a place.
const WAITING_MAX: usize = 64;
/// Tokens a client may be behind before its generation waits for it.
const EVENTS_BEHIND: usize = 64;

/// Takes generations and runs them.
pub struct Generator {
    node: GeneratorHandles,
    queue: Arc<Queue>,
    admitted: Arc<Semaphore>,
    /// Tokenizing takes a hundred times the text's memory for a moment: one at a time.
    encoding: Arc<Semaphore>,
}

/// What a generator needs of the node.
#[derive(Clone)]
pub struct GeneratorHandles {
    /// The mesh.
    pub view: MeshView,
    /// What is loaded here.
    pub loaded: Loaded,
    /// Whether a request would be served.
    pub readiness: ReadinessView,
    /// Lets answers begin.
    pub answers: AnswerGate,
    /// What this node counts.
    pub metrics: Arc<Metrics>,
    /// How the node ends.
    pub lifecycle: Lifecycle,
    /// KV cache that was configured, in tokens.
    pub kv_tokens: usize,
    /// Memory for models that was configured, in bytes.
    pub memory_bytes: u64,
}

/// What generations wait for.
struct Queue {
    running: Semaphore,
    /// Held while waiting for a place in the KV pool: first come, first served, however small the others are.
    opening: Mutex<()>,
}

/// One generation on its way.
struct Generation {
    node: GeneratorHandles,
    model: LoadedModel,
    sequence: Sequence,
    usage: Usage,
    waits: ExpertWait,
    events: mpsc::Sender<Event>,
}

/// Counts one more, until dropped.
struct Counted<'a>(&'a Gauge);

impl<'a> Counted<'a> {
    fn new(gauge: &'a Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
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
    pub fn new(node: GeneratorHandles) -> Self {
        let queue = Queue { running: Semaphore::new(RUNNING_MAX), opening: Mutex::default() };
        Self {
            node,
            queue: Arc::new(queue),
            admitted: Arc::new(Semaphore::new(RUNNING_MAX + WAITING_MAX)),
            encoding: Arc::new(Semaphore::new(1)),
        }
    }

    async fn begin(&self, request: GenerateRequest) -> Result<mpsc::Receiver<Event>, ServiceError> {
        let retiring = || ServiceError::NotReady("this node is leaving the mesh; ask another one".into());
        let answering = self.node.answers.begin().ok_or_else(retiring)?;
        let state = self.node.view.state();
        if !self.node.view.is_caught_up(&state) {
            return Err(ServiceError::NotReady(self.readiness().to_string()));
        }
        let named = state.model(&request.model).map(|(id, _)| id).ok_or_else(|| ServiceError::UnknownModel {
            asked: request.model.clone(),
            known: self.models().into_iter().map(|model| model.name).collect(),
        })?;
        let not_ready = || ServiceError::NotReady(self.readiness().to_string());
        let model = self.node.loaded.model().ok_or_else(not_ready)?;
        if model.meta.id != named {
            let served = state.models.get(&model.meta.id).map_or("another model", |model| model.name.as_str());
            return Err(ServiceError::NotReady(format!("the mesh serves '{served}' only")));
        }
        let admitted = self.admitted.clone().try_acquire_owned().map_err(|_| {
            ServiceError::Busy(format!(
                "{RUNNING_MAX} generations run and {WAITING_MAX} wait; try again in a moment or ask another node"
            ))
        })?;
        // A long prompt takes a while to tokenize, which must not hold up the tasks that move bytes.
        let meta = model.meta.clone();
        let place = self.encoding.clone().acquire_owned().await.map_err(|error| internal(&error))?;
        let prompt = run_blocking(move || {
            let _place = place;
            tokens(&meta, request.prompt)
        })
        .await?;
        let pool = model.meta.sizes.kv_tokens(self.node.kv_tokens);
        let context = model.meta.config.max_position_embeddings;
        if prompt.len() < context && prompt.len() >= pool {
            return Err(ServiceError::ContextExceeded(format!(
                "the prompt has {} tokens, but this node keeps a KV cache of {pool}; shorten it or restart the node with a \
                     larger --kv-tokens",
                prompt.len()
            )));
        }
        let tokenizer = model.meta.text.tokenizer.clone();
        let sequence = Sequence::new(prompt, request.params, context.min(pool), tokenizer).map_err(invalid)?;
        // Faults of the request are reported before those of the node.
        if !self.readiness().ready {
            return Err(not_ready());
        }
        let (events, receiver) = mpsc::channel(EVENTS_BEHIND);
        let (node, usage, waits) = (self.node.clone(), Usage::default(), ExpertWait::default());
        let generation = Generation { node, model, sequence, usage, waits, events };
        let span = info_span!("request", prompt_tokens = generation.sequence.prompt().len());
        let run = generation.run(self.queue.clone(), admitted);
        tokio::spawn(
            async move {
                run.await;
                drop(answering);
            }
            .instrument(span),
        );
        self.node.metrics.requests.inc();
        Ok(receiver)
    }
}

impl Generation {
    async fn run(mut self, queue: Arc<Queue>, _admitted: OwnedSemaphorePermit) {
        let stopping = self.node.lifecycle.stopping().clone();
        let events = self.events.clone();
        let metrics = self.node.metrics.clone();
        let ended = tokio::select! {
            ended = self.generate(&queue) => ended,
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

    async fn generate(&mut self, queue: &Queue) -> Result<(), End> {
        let _place = queue.running.acquire().await.map_err(|_| End::Cancelled)?;
        let mut session = self.open(queue).await?;
        loop {
            let advanced = self.advance(&mut session).await?;
            self.count(&advanced);
            let emitted = self.sequence.accept(&advanced.logits).map_err(|error| internal(&error))?;
            self.node.metrics.tokens.inc();
            let finish = emitted.finish;
            self.events.send(Event::Token(emitted)).await.map_err(|_| End::Cancelled)?;
            if let Some(reason) = finish {
                let counted = self.sequence.usage();
                let mut usage = self.usage.clone();
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

    /// Advances the session by the sequence's next tokens, again and again while the hosts of experts are away.
    async fn advance(&mut self, session: &mut Session) -> Result<Advanced, ServiceError> {
        loop {
            let (layer, experts, why) = match session.advance(self.sequence.next_input(), Want::Last).await {
                Ok(advanced) => return Ok(advanced),
                Err(EngineError::Source(SourceError::Unavailable { layer, experts, why })) => (layer, experts, why),
                Err(EngineError::Source(SourceError::Missing(why))) => return Err(ServiceError::MissingExperts(why)),
                Err(error) => return Err(internal(&error)),
            };
            info!(why, "waiting for experts");
            let _waiting = Counted::new(&self.node.metrics.answers_waiting);
            let waited = wait(&mut self.waits, &self.node.view, &self.node.loaded, layer, experts).await;
            waited.map_err(|waited| {
                ServiceError::MissingExperts(format!("waited {} s in vain: {why}", waited.as_secs()))
            })?;
            info!("going on");
        }
    }

    /// A session with room for prompt and answer, as soon as there is room and it is this generation's turn.
    async fn open(&self, queue: &Queue) -> Result<Session, End> {
        let _turn = queue.opening.lock().await;
        let opened = self.model.engine.open_session_when_free(self.sequence.tokens_max()).await;
        opened.map_err(|error| internal(&error).into())
    }

    fn count(&mut self, advanced: &Advanced) {
        self.node.metrics.rows_local.inc_by(advanced.pairs_here);
        self.node.metrics.rows_remote.inc_by(advanced.pairs_elsewhere);
        let local: BTreeSet<_> = advanced.precisions.iter().map(|&p| ids::to_store_precision(p)).collect();
        let class_of = |precisions: &BTreeSet<Precision>| self.model.class(precisions);
        count(&mut self.usage, advanced, &local, self.model.trunk, class_of);
    }
}

/// Adds to the usage what an advance took. `local` are the precisions of the experts that were computed here, `trunk` is that of
/// everything else; `class_of` gives this node's class at some precisions.
fn count(
    usage: &mut Usage,
    advanced: &Advanced,
    local: &BTreeSet<Precision>,
    trunk: Precision,
    class_of: impl Fn(&BTreeSet<Precision>) -> String,
) {
    usage.rows_local += advanced.pairs_here;
    usage.rows_remote += advanced.pairs_elsewhere;
    let own = class_of(&[Precision::Exact].into());
    let mut classes = advanced.classes.clone();
    if advanced.pairs_here > 0 && !local.is_empty() {
        classes.push(class_of(local));
    }
    if trunk != Precision::Exact {
        classes.push(class_of(&[trunk].into()));
    }
    usage.precisions.insert(trunk);
    for class in classes {
        usage.precisions.extend(class::precisions(&class));
        if class != own && !usage.other_classes.contains(&class) {
            usage.other_classes.push(class);
        }
    }
}

/// The prompt's tokens.
fn tokens(meta: &ModelMeta, prompt: Prompt) -> Result<Vec<u32>, ServiceError> {
    let fault = |param, message: String| ServiceError::Invalid { param: Some(param), message };
    // Refused before tokenizing, which would take many times the memory of a text that cannot fit anyway.
    let text_bytes = match &prompt {
        Prompt::Chat(messages) => messages.iter().map(|message| message.content.len()).sum(),
        Prompt::Text(text) => text.len(),
        Prompt::Tokens(_) => 0,
    };
    let context = meta.config.max_position_embeddings;
    let bytes_max = context.saturating_mul(meta.token_bytes_max);
    if text_bytes > bytes_max {
        return Err(ServiceError::ContextExceeded(format!(
            "the prompt has {text_bytes} bytes of text, but the model's context is {context} tokens, which can hold at most \
             {bytes_max} bytes: shorten the prompt"
        )));
    }
    match prompt {
        Prompt::Chat(messages) => meta.text.chat_prompt(&messages).map_err(|error| match error {
            TextError::Chat(error) if !error.is_callers_fault() => internal(&error),
            error => fault("messages", error.to_string()),
        }),
        Prompt::Text(text) => {
            meta.text.tokenizer.encode(&text, true).map_err(|error| fault("prompt", error.to_string()))
        }
        Prompt::Tokens(tokens) => match tokens.iter().find(|&&token| token as usize >= meta.config.vocab_size) {
            Some(token) => {
                Err(fault("prompt", format!("token {token} is beyond the vocabulary of {}", meta.config.vocab_size)))
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
        let state = self.node.view.state();
        state.models.iter().map(|(id, model)| ModelInfo { id: id.to_string(), name: model.name.clone() }).collect()
    }

    fn readiness(&self) -> Readiness {
        self.node.readiness.now()
    }

    fn submit(&self, request: GenerateRequest) -> BoxFuture<'_, Result<mpsc::Receiver<Event>, ServiceError>> {
        self.begin(request).boxed()
    }

    fn token_bytes(&self, model: &str, token: u32) -> Vec<u8> {
        let named = self.node.view.state().model(model).map(|(id, _)| id);
        let loaded = self.node.loaded.model().filter(|model| Some(model.meta.id) == named);
        loaded.map(|model| model.meta.text.tokenizer.token_bytes(token).to_vec()).unwrap_or_default()
    }

    fn metrics(&self) -> String {
        let node = &self.node;
        let (metrics, state) = (&node.metrics, node.view.state());
        metrics.epoch.set(state.epoch().0 as i64);
        metrics.nodes_up.set(state.members.len() as i64 - node.view.down().len() as i64);
        metrics.coverage.set(self.readiness().coverage);
        metrics.memory_bytes.set(node.loaded.ledger_bytes() as i64);
        metrics.memory_budget_bytes.set(node.memory_bytes as i64);
        if let Some(model) = node.loaded.model() {
            metrics.note_engine(model.engine.activity());
            metrics.note_offload(&model.engine.offload_stats());
        }
        metrics.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class_of(precisions: &BTreeSet<Precision>) -> String {
        let names: Vec<_> = precisions.iter().map(|precision| precision.name()).collect();
        format!("cpu-avx2/{}", names.join("+"))
    }

    /// The usage after one advance with experts at `local` precisions here, and of `classes` elsewhere.
    fn counted(local: &[Precision], classes: &[&str], trunk: Precision) -> Usage {
        let advanced = Advanced {
            pairs_here: local.len() as u64,
            pairs_elsewhere: classes.len() as u64,
            classes: classes.iter().map(|&class| class.into()).collect(),
            ..Advanced::default()
        };
        let mut usage = Usage::default();
        count(&mut usage, &advanced, &local.iter().copied().collect(), trunk, class_of);
        usage
    }

    #[test]
    fn an_exact_answer_of_one_class_says_so() {
        let usage = counted(&[Precision::Exact], &["cpu-avx2/exact"], Precision::Exact);
        assert_eq!((usage.rows_local, usage.rows_remote), (1, 1));
        assert_eq!(usage.precisions, [Precision::Exact].into());
        assert_eq!(usage.other_classes, [] as [String; 0]);
    }

    #[test]
    fn every_precision_that_took_part_is_named() {
        use Precision::{Exact, Q4, Q8};
        let usage = counted(&[Q4], &["cuda/q8 and cpu-avx512/exact"], Exact);
        assert_eq!(usage.precisions, [Q4, Q8, Exact].into());
        assert_eq!(usage.other_classes, ["cuda/q8 and cpu-avx512/exact", "cpu-avx2/q4"]);
        assert_eq!(counted(&[Exact], &["cpu-avx2/q4+q8"], Exact).precisions, [Q4, Q8, Exact].into());
        assert_eq!(counted(&[Exact], &[], Q8).precisions, [Q8, Exact].into(), "the trunk takes part too");
        assert_eq!(counted(&[Q4], &["of an unknown form"], Q4).precisions, [Q4].into());
    }

    #[test]
    fn what_took_part_more_than_once_is_named_once() {
        let mut usage = counted(&[Precision::Q4], &["cpu-avx512/q8"], Precision::Q8);
        let again = Advanced { pairs_elsewhere: 2, classes: vec!["cpu-avx512/q8".into()], ..Advanced::default() };
        count(&mut usage, &again, &BTreeSet::new(), Precision::Q8, class_of);
        assert_eq!(usage.rows_remote, 3);
        assert_eq!(usage.other_classes, ["cpu-avx512/q8", "cpu-avx2/q4", "cpu-avx2/q8"]);
        assert_eq!(usage.precisions, [Precision::Q4, Precision::Q8].into());
    }
}
