//! Generations: a prompt goes through the engine token by token, with experts from wherever they are.
//!
//! [`Generator`] is the node's [`Service`]. One task per generation drives a session of the engine, which computes the rows
//! of all sessions together and asks peers for experts that it lacks. The task samples, and counts what its rows took.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use coel_model::decoder::Want;
use coel_model::engine::EngineError;
use coel_model::sequence::{Sequence, SequenceError};
use coel_model::session::{Advanced, Session};
use coel_model::source::SourceError;
use coel_model::text::TextError;
use coel_store::{ExpertId, Precision, State};
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};
use tracing::{Instrument, info, info_span, warn};

use crate::experts::class;
use crate::experts::dispatch::MissingExperts;
use crate::ids;
use crate::library::{Known, run_blocking};
use crate::service::{Event, GenerateRequest, ModelInfo, Prompt, Readiness, Service, ServiceError, Usage};
use crate::shared::{Answering, Progress, Serving, Shared};

/// Generations at once. They are computed together, so that each costs the others little; each has its share of the KV
/// pool, and waits where the pool is full.
pub const RUNNING_MAX: usize = 32;
/// Generations that may wait for a place.
const WAITING_MAX: usize = 64;
/// Pause before a full pool is looked at again.
const POOL_AGAIN: Duration = Duration::from_millis(20);
/// Tokens a client may be behind before its generation waits for it.
const EVENTS_BEHIND: usize = 64;

/// Takes generations and runs them.
pub struct Generator {
    shared: Arc<Shared>,
    running: Arc<Semaphore>,
    admitted: Arc<Semaphore>,
    /// Tokenizing takes a hundred times the text's memory for a moment: one at a time.
    encoding: Arc<Semaphore>,
    /// Whoever waits for a place in the KV pool: first come, first served, however small the others are.
    opening: Arc<Mutex<()>>,
}

/// One generation on its way.
struct Generation {
    shared: Arc<Shared>,
    serving: Serving,
    sequence: Sequence,
    usage: Usage,
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
            encoding: Arc::new(Semaphore::new(1)),
            opening: Arc::default(),
        }
    }

    async fn begin(&self, request: GenerateRequest) -> Result<mpsc::Receiver<Event>, ServiceError> {
        let retiring = || ServiceError::NotReady("this node is leaving the mesh; ask another one".into());
        let answering = Answering::begin(&self.shared).ok_or_else(retiring)?;
        let state = self.shared.state();
        if !self.shared.caught_up(&state) {
            return Err(ServiceError::NotReady(self.readiness().to_string()));
        }
        let named = state.model(&request.model).map(|(id, _)| id).ok_or_else(|| ServiceError::UnknownModel {
            asked: request.model.clone(),
            known: self.models().into_iter().map(|model| model.name).collect(),
        })?;
        let not_ready = || ServiceError::NotReady(self.readiness().to_string());
        let serving = self.shared.serving.borrow().clone().ok_or_else(not_ready)?;
        if serving.known.id != named {
            let served = state.models.get(&serving.known.id).map_or("another model", |model| model.name.as_str());
            return Err(ServiceError::NotReady(format!("the mesh serves '{served}' only")));
        }
        let admitted = self.admitted.clone().try_acquire_owned().map_err(|_| {
            ServiceError::Busy(format!(
                "{RUNNING_MAX} generations run and {WAITING_MAX} wait; try again in a moment or ask another node"
            ))
        })?;
        // A long prompt takes a while to tokenize, which must not hold up the tasks that move bytes.
        let known = serving.known.clone();
        let place = self.encoding.clone().acquire_owned().await.map_err(|error| internal(&error))?;
        let prompt = run_blocking(move || {
            let _place = place;
            tokens(&known, request.prompt)
        })
        .await?;
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
        let (events, receiver) = mpsc::channel(EVENTS_BEHIND);
        let usage = Usage::default();
        let generation = Generation { shared: self.shared.clone(), serving, sequence, usage, events };
        let span = info_span!("request", prompt_tokens = generation.sequence.prompt().len());
        let run = generation.run(self.running.clone(), self.opening.clone(), admitted);
        tokio::spawn(
            async move {
                run.await;
                drop(answering);
            }
            .instrument(span),
        );
        self.shared.metrics.requests.inc();
        Ok(receiver)
    }
}

impl Generation {
    async fn run(mut self, running: Arc<Semaphore>, opening: Arc<Mutex<()>>, _admitted: OwnedSemaphorePermit) {
        let stopping = self.shared.stopping.clone();
        let events = self.events.clone();
        let metrics = self.shared.metrics.clone();
        let ended = tokio::select! {
            ended = self.generate(running, opening) => ended,
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

    async fn generate(&mut self, running: Arc<Semaphore>, opening: Arc<Mutex<()>>) -> Result<(), End> {
        let _place = running.acquire().await.map_err(|_| End::Cancelled)?;
        let mut session = self.open(&opening).await?;
        loop {
            let advanced =
                session.advance(self.sequence.next_input(), Want::Last).await.map_err(|error| match error {
                    EngineError::Source(SourceError::Missing(why)) => ServiceError::MissingExperts(why),
                    error => internal(&error),
                })?;
            self.count(&advanced);
            let emitted = self.sequence.accept(&advanced.logits).map_err(|error| internal(&error))?;
            self.shared.metrics.tokens.inc();
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

    /// A session with room for prompt and answer, as soon as there is room and it is this generation's turn.
    async fn open(&self, opening: &Mutex<()>) -> Result<Session, End> {
        let _turn = opening.lock().await;
        loop {
            match self.serving.engine.open_session(self.sequence.tokens_max()) {
                Ok(session) => return Ok(session),
                // The pool frees as other generations end; each of them does.
                Err(EngineError::Busy { .. }) => tokio::time::sleep(POOL_AGAIN).await,
                Err(error) => return Err(internal(&error).into()),
            }
        }
    }

    fn count(&mut self, advanced: &Advanced) {
        self.shared.metrics.rows_local.inc_by(advanced.pairs_here);
        self.shared.metrics.rows_remote.inc_by(advanced.pairs_elsewhere);
        let local: BTreeSet<_> = advanced.precisions.iter().map(|&p| ids::to_store_precision(p)).collect();
        let class_of = |precisions: &BTreeSet<Precision>| self.serving.class(precisions);
        count(&mut self.usage, advanced, &local, self.serving.trunk, class_of);
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
fn tokens(known: &Known, prompt: Prompt) -> Result<Vec<u32>, ServiceError> {
    let fault = |param, message: String| ServiceError::Invalid { param: Some(param), message };
    // Said before tokenizing, which would take many times the memory of a text that cannot fit anyway.
    let text_bytes = match &prompt {
        Prompt::Chat(messages) => messages.iter().map(|message| message.content.len()).sum(),
        Prompt::Text(text) => text.len(),
        Prompt::Tokens(_) => 0,
    };
    let context = known.config.max_position_embeddings;
    let bytes_max = context.saturating_mul(known.token_bytes_max);
    if text_bytes > bytes_max {
        return Err(ServiceError::ContextExceeded(format!(
            "the prompt has {text_bytes} bytes of text, but the model's context is {context} tokens, which can hold at most \
             {bytes_max} bytes: shorten the prompt"
        )));
    }
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
        if let Some(serving) = shared.serving.borrow().as_ref() {
            metrics.note_engine(serving.engine.activity());
            metrics.note_tiers(&serving.engine.tiers());
        }
        metrics.text()
    }
}

/// What this node's models take of its budget, loaded or on their way.
pub fn ledger_bytes(shared: &Shared) -> u64 {
    let loaded = shared.serving.borrow().as_ref().map_or(0, |serving| serving.engine.memory().total());
    loaded + shared.loading.bytes()
}

/// Whether this node, as a home, would serve a request now.
pub fn readiness(shared: &Shared) -> Readiness {
    let state = shared.state();
    let progress = shared.progress.borrow().clone();
    let replicas = state.placement.as_ref().map(|placement| shared.live_replicas(placement)).unwrap_or_default();
    let absent: Vec<_> = replicas.iter().filter(|(_, replicas)| **replicas == 0).map(|(&expert, _)| expert).collect();
    let waiting_for = waiting_for(shared, &state, &progress, &absent);
    let experts = replicas.len();
    Readiness {
        ready: waiting_for.is_none(),
        waiting_for,
        problem: progress.problem,
        coverage: if experts == 0 { 0.0 } else { (experts - absent.len()) as f64 / experts as f64 },
        bytes_assigned: progress.bytes_assigned,
        bytes_held: progress.bytes_held,
    }
}

/// What keeps this node from serving, in words; `absent` experts have no live replica.
fn waiting_for(shared: &Shared, state: &State, progress: &Progress, absent: &[ExpertId]) -> Option<String> {
    let leaderless = shared.log.leader().borrow().is_none();
    let down = shared.down();
    if !shared.caught_up(state) {
        return Some("catching up with the placement log".into());
    }
    if leaderless && (state.placement.is_none() || !absent.is_empty() || shared.serving.borrow().is_none()) {
        let members = state.members.len();
        return Some(format!(
            "no leader: {} of {members} members are reached, and a majority must be; start the others, or name one with \
             --peer if it has moved",
            members - down.len()
        ));
    }
    if let Some(importing) = shared.import.borrow().as_ref().filter(|_| state.models.is_empty()) {
        return Some(format!("importing {importing}"));
    }
    if state.models.is_empty() {
        return Some("no model is registered; import one with `coel model import DIR`".into());
    }
    if shared.serving.borrow().is_none() {
        return Some(format!("loading the trunk: {} of {} bytes here", progress.bytes_held, progress.bytes_assigned));
    }
    let Some(placement) = &state.placement else {
        let planning = || "waiting for the leader to place the model's experts".to_owned();
        return Some(shared.planner().unwrap_or_else(planning));
    };
    // An expert that a live node is still loading will come; one whose holders are all gone will not.
    let lost = absent.iter().map(|&expert| (expert, placement.replicas[&expert].keys().copied().collect::<Vec<_>>()));
    let lost =
        MissingExperts { experts: lost.filter(|(_, nodes)| nodes.iter().all(|node| down.contains(node))).collect() };
    if !lost.experts.is_empty() {
        return Some(lost.to_string());
    }
    (!absent.is_empty()).then(|| {
        let experts = placement.replicas.len();
        format!(
            "loading: {} of {experts} experts are ready somewhere, {} of {} bytes assigned here are held",
            experts - absent.len(),
            progress.bytes_held,
            progress.bytes_assigned
        )
    })
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
