//! Requests of sessions, and the batches they are in.
//!
//! Owns [`Batches`]: what sessions have asked for, the batches in flight, and what each request has come to so far. One
//! [`turn`](Batches::turn) computes at most one layer of one batch, so that whoever drives it can serve others in
//! between. While a batch waits for experts another one may begin. Invariants: a request is answered exactly once, or
//! nobody waits for it; its pages stay leased while it is in a batch; when a batch of several requests fails, each of them
//! is tried alone, so that only those fail that must. Which rows form a batch is the scheduler's decision.

use std::{
    collections::{BTreeMap, VecDeque},
    task::{Context, Poll, Waker},
    time::Instant,
};

use super::{
    batch::{BatchEntry, InFlightBatch},
    error::EngineError,
    executor::Executor,
    jobs::{Advance, Advanced, JobReply, Routes},
    options::EngineOptions,
    scheduler::{Decision, Limits, RequestId, ScheduledChunk, Scheduler, SessionId},
};
use crate::nn::batch::{CHUNK_ROWS, SequenceChunk, Step, Want};

/// Batches in flight at once, where some wait for experts: one computes while another waits. More would only be smaller.
const BATCHES_MAX: usize = 2;
/// Rows of prompts beside tokens in one batch. A batch that reads most weights anyway takes some rows for little;
/// this many cost as much again as reading them.
const PROMPT_ROWS_BESIDE: usize = 64;
/// Rows that prompts leave free where batches overlap.
const DECODE_ROWS_KEPT: usize = 32;

/// What to do after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Take another one.
    Again,
    /// Wait for a job or an answer, but not longer than this.
    Wait(Option<Instant>),
}

/// A session's request and what it has come to.
struct OpenRequest {
    advance: Advance,
    reply: JobReply<(Advanced, Routes)>,
    /// Tokens that have been through all layers.
    done: usize,
    advanced: Advanced,
    routes: Routes,
}

pub(super) struct Batches {
    scheduler: Scheduler,
    requests: BTreeMap<RequestId, OpenRequest>,
    /// The one that has waited longest for its turn first.
    in_flight: VecDeque<InFlightBatch>,
    next_id: u64,
}

impl Batches {
    pub(super) fn new(options: &EngineOptions) -> Self {
        let rows = options.rows_max.clamp(1, CHUNK_ROWS);
        let limits = Limits { rows, prompt_rows_beside: PROMPT_ROWS_BESIDE.min(rows), decode_rows_kept: 0 };
        Self { scheduler: Scheduler::new(limits), requests: BTreeMap::new(), in_flight: VecDeque::new(), next_id: 0 }
    }

    /// Takes a request.
    pub(super) fn ask(&mut self, advance: Advance, reply: JobReply<(Advanced, Routes)>) {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.scheduler.submit(id, advance.session, advance.tokens.len());
        let (advanced, routes) = (Advanced::default(), Routes::new());
        self.requests.insert(id, OpenRequest { advance, reply, done: 0, advanced, routes });
    }

    /// The session was dropped.
    pub(super) fn gone(&mut self, session: SessionId) {
        self.scheduler.gone(session);
    }

    /// Requests that are in no batch.
    pub(super) fn waiting(&self) -> usize {
        self.scheduler.waiting()
    }

    /// Computes a layer, or says that there is nothing to compute. The clock is read again after computing, which can take
    /// longer than answered sessions are waited for.
    pub(super) fn turn(&mut self, executor: &mut Executor, clock: &dyn Fn() -> Instant) -> Turn {
        self.drop_cancelled(executor);
        let _ = self.poll_answers(&mut Context::from_waker(Waker::noop()));
        let ready = self.in_flight.iter().position(|batch| executor.can_step(batch));
        if let Some(mut batch) = ready.and_then(|index| self.in_flight.remove(index)) {
            match executor.step(&mut batch) {
                Ok(None) => self.in_flight.push_back(batch),
                Ok(Some(logits)) => {
                    executor.end(&mut batch);
                    self.complete(batch, logits, clock());
                }
                Err(error) => {
                    executor.end(&mut batch);
                    self.fail(batch.entries, error);
                }
            }
            return Turn::Again;
        }
        if self.in_flight.len() >= BATCHES_MAX {
            return Turn::Wait(None);
        }
        if executor.state().source().is_some() || executor.has_disk_offload() {
            let rows = self.scheduler.limits().rows;
            self.scheduler.keep_decode_rows(DECODE_ROWS_KEPT.min(rows / 2));
        }
        match self.scheduler.next(clock()) {
            Decision::Run(chunks) => {
                self.launch(executor, &chunks, clock);
                Turn::Again
            }
            Decision::WaitUntil(until) => Turn::Wait(Some(until)),
            Decision::Idle => Turn::Wait(None),
        }
    }

    /// Ready when experts have come from elsewhere.
    pub(super) fn poll_answers(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut answered = Poll::Pending;
        for batch in &mut self.in_flight {
            if batch.poll(context).is_ready() {
                answered = Poll::Ready(());
            }
        }
        answered
    }

    /// Whether a batch waits for the disk.
    pub(super) fn wait_for_disk(&self) -> bool {
        self.in_flight.iter().any(InFlightBatch::waits_for_disk)
    }

    /// Fails every request, in a batch or not, and forgets all batches. Their claims are the caller's to release.
    pub(super) fn fail_all(self, error: impl Fn() -> EngineError) {
        for request in self.requests.into_values() {
            request.answer(Err(error()));
        }
    }

    /// Forgets requests that nobody waits for, and batches that consist of such.
    fn drop_cancelled(&mut self, executor: &mut Executor) {
        let scheduler = &mut self.scheduler;
        self.requests.retain(|id, request| {
            let wanted = !request.reply.is_closed();
            if !wanted {
                scheduler.cancel(*id);
            }
            wanted
        });
        let requests = &self.requests;
        self.in_flight.retain_mut(|batch| {
            let wanted = batch.entries.iter().any(|entry| requests.contains_key(&entry.chunk.request));
            if !wanted {
                executor.end(batch);
                let failed = scheduler.failed(&batch.chunks());
                debug_assert!(failed.is_none(), "all were cancelled");
            }
            wanted
        });
    }

    fn launch(&mut self, executor: &mut Executor, scheduled: &[ScheduledChunk], clock: &dyn Fn() -> Instant) {
        let since = clock();
        let (mut chunks, mut entries) = (Vec::new(), Vec::new());
        for chunk in scheduled {
            let OpenRequest { advance, done, .. } = &self.requests[&chunk.request];
            let end = done + chunk.rows;
            let want = match advance.want {
                Want::Last if end < advance.tokens.len() => Want::Nothing,
                want => want,
            };
            chunks.push(SequenceChunk {
                tokens: advance.tokens[*done..end].to_vec(),
                past: advance.past + done,
                pages: advance.lease.pages().to_vec(),
                want,
            });
            entries.push(BatchEntry::new(*chunk, advance.lease.clone(), advance.watch));
        }
        let rows = scheduled.iter().map(|chunk| chunk.rows).sum();
        executor.state().activity.batch_begun(scheduled.len(), rows);
        match executor.begin(chunks) {
            Ok((batch, step)) => {
                let batch = InFlightBatch::new(batch, entries, since);
                match step {
                    Step::NeedExperts => self.in_flight.push_back(batch),
                    Step::Logits(logits) => self.complete(batch, logits, clock()),
                }
            }
            Err(error) => self.fail(entries, error),
        }
    }

    fn complete(&mut self, batch: InFlightBatch, logits: Vec<Vec<f32>>, now: Instant) {
        for (entry, mut logits) in batch.entries.iter().zip(logits) {
            if let Some(request) = self.requests.get_mut(&entry.chunk.request) {
                request.done += entry.chunk.rows;
                request.advanced.add(&entry.advanced);
                request.advanced.logits.append(&mut logits);
                add_routes(&mut request.routes, &entry.routes);
            }
        }
        let (chunks, took) = (batch.chunks(), now.saturating_duration_since(batch.since));
        drop(batch);
        for id in self.scheduler.completed(&chunks, now, took) {
            if let Some(mut request) = self.requests.remove(&id) {
                let result = (std::mem::take(&mut request.advanced), std::mem::take(&mut request.routes));
                request.answer(Ok(result));
            }
        }
    }

    fn fail(&mut self, entries: Vec<BatchEntry>, error: EngineError) {
        let chunks: Vec<_> = entries.iter().map(|entry| entry.chunk).collect();
        drop(entries);
        match self.scheduler.failed(&chunks).and_then(|id| self.requests.remove(&id)) {
            Some(request) => request.answer(Err(error)),
            None => tracing::debug!(%error, requests = chunks.len(), "a batch failed; trying its requests one by one"),
        }
    }
}

impl OpenRequest {
    /// Lets go of the pages first: whoever has its answer and drops its session has them back.
    fn answer(self, result: Result<(Advanced, Routes), EngineError>) {
        drop(self.advance);
        // Whoever asked may have gone.
        let _ = self.reply.send(result);
    }
}

fn add_routes(routes: &mut Routes, chunk: &Routes) {
    routes.resize(routes.len().max(chunk.len()), Vec::new());
    for (layer, chunk) in routes.iter_mut().zip(chunk) {
        layer.extend(chunk.iter().cloned());
    }
}
