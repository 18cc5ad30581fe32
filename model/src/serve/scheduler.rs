//! Which rows go through the layers together, and when: pure, the time is an argument.
//!
//! Owns [`Scheduler`]. Sessions hand in requests (rows to be computed), [`Scheduler::next`] forms the next batch of
//! them, and whoever computes it says how it ended. A batch reads every weight once for all of its rows, so it takes
//! whoever is ready: requests of few rows (sessions that decode) first, then pieces of long ones (prompts). Five rules:
//!
//! - Beside sessions that decode, prompts get so many rows and no more, so that a long prompt slows tokens down by a
//!   bounded factor and never stops them; and some rows are kept for prompts however many sessions decode.
//! - Where batches overlap, because some wait for others' work, prompts leave a few rows free, so that whoever decodes
//!   need not wait for a batch full of prompts.
//! - Prompts share their rows evenly: a short one need not wait for the end of a long one.
//! - A session that has just been answered is expected back with its next token: the next batch waits for it, but
//!   only for a fraction of what the last batch took. So concurrent requests fall into step, and a lone one waits for
//!   nobody.
//! - Within each kind the order is first come, first served, and what was served queues again at the end.
//!
//! Invariants: a session is in at most one batch; the rows of all batches never exceed [`Limits::rows`]; a request that
//! is not cancelled is computed until its rows are done or its batch of one has failed. It knows no tokens and no pages.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// Requests of at most so many rows are taken whole and first: a token, or a few that were guessed.
const FEW_ROWS: usize = 8;
/// Prompts get no smaller share than this while more is wanted: below it a batch reads all weights for next to nothing.
const SHARE_MIN: usize = 16;
/// How long the next batch waits for sessions that are expected back: a half of what the last one took, in these
/// bounds. The lower is what handing a token over takes on a busy machine, the upper what nobody notices.
const PATIENCE_MIN: Duration = Duration::from_millis(1);
const PATIENCE_MAX: Duration = Duration::from_millis(10);

/// A sequence with a cache of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// One request of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// How large batches may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most rows of all batches together.
    pub rows: usize,
    /// Most rows of prompts in a batch that also decodes.
    pub prompt_rows_beside: usize,
    /// Of `rows`, those that prompts never take: 0 where batches do not overlap.
    pub decode_rows_kept: usize,
}

/// The next rows of a request, as many as are computed at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduledChunk {
    pub request: RequestId,
    pub rows: usize,
}

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Compute these together.
    Run(Vec<ScheduledChunk>),
    /// Ask again then, or when something has changed.
    WaitUntil(Instant),
    /// Ask again when something has changed.
    Idle,
}

#[derive(Clone, Copy, Debug)]
struct QueuedRequest {
    id: RequestId,
    session: SessionId,
    /// Still to be computed.
    rows: usize,
    /// Its batch failed with others in it: it is computed by itself next.
    alone: bool,
}

#[derive(Clone, Copy, Debug)]
struct Batched {
    chunk: ScheduledChunk,
    request: QueuedRequest,
    cancelled: bool,
}

/// Requests that wait, are in a batch, or are about to come.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    /// In the order in which they are served.
    waiting: Vec<QueuedRequest>,
    in_flight: Vec<Batched>,
    /// Sessions expected back, and until when.
    expected: BTreeMap<SessionId, Instant>,
}

impl Limits {
    /// Shares a batch of at most `room` rows out among `ready`, which are in the order of service.
    fn fill(&self, room: usize, ready: &[QueuedRequest]) -> Vec<ScheduledChunk> {
        let (few, long): (Vec<&QueuedRequest>, Vec<&QueuedRequest>) =
            ready.iter().partition(|request| request.rows <= FEW_ROWS);
        let prompt_room = if long.is_empty() { 0 } else { room.saturating_sub(self.decode_rows_kept) };
        let beside = prompt_room.min(self.prompt_rows_beside);
        let mut chunks = Vec::new();
        let mut left = room - SHARE_MIN.min(beside).min(room / 2);
        for request in few {
            // In order: whoever does not fit is first next time. A batch of nothing but a small limit takes a part of one.
            let rows = if chunks.is_empty() { request.rows.min(left) } else { request.rows };
            if rows == 0 || rows > left {
                break;
            }
            chunks.push(ScheduledChunk { request: request.id, rows });
            left -= rows;
        }
        let taken: usize = chunks.iter().map(|chunk| chunk.rows).sum();
        let prompts = if chunks.is_empty() { prompt_room } else { beside.min(room - taken) };
        chunks.extend(share(prompts, &long));
        chunks
    }
}

/// Shares `room` rows out evenly among the first few of `long`: none gets more than it wants, and what it leaves goes to
/// the others.
fn share(mut room: usize, long: &[&QueuedRequest]) -> Vec<ScheduledChunk> {
    let mut sharing: Vec<&QueuedRequest> = long.iter().take((room / SHARE_MIN).max(1)).copied().collect();
    sharing.sort_by_key(|request| request.rows);
    let mut chunks = Vec::new();
    for (index, request) in sharing.iter().enumerate() {
        let rows = request.rows.min(room / (sharing.len() - index));
        room -= rows;
        chunks.extend((rows > 0).then_some(ScheduledChunk { request: request.id, rows }));
    }
    chunks
}

impl Scheduler {
    pub fn new(limits: Limits) -> Self {
        let Limits { rows, prompt_rows_beside, decode_rows_kept } = limits;
        assert!(rows > decode_rows_kept && prompt_rows_beside > 0, "a batch needs rows");
        Self { limits, waiting: Vec::new(), in_flight: Vec::new(), expected: BTreeMap::new() }
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// From now on batches overlap: prompts leave `rows` rows free.
    pub fn keep_decode_rows(&mut self, rows: usize) {
        assert!(self.limits.rows > rows, "prompts need rows too");
        self.limits.decode_rows_kept = rows;
    }

    /// Requests that are in no batch.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// `rows` rows of `session` are to be computed. `id` was never used before.
    pub fn submit(&mut self, id: RequestId, session: SessionId, rows: usize) {
        assert!(rows > 0, "a request has rows");
        self.expected.remove(&session);
        self.waiting.push(QueuedRequest { id, session, rows, alone: false });
    }

    /// Nobody wants the request any more. If it is in a batch its session stays busy until the batch has ended.
    pub fn cancel(&mut self, id: RequestId) {
        self.waiting.retain(|request| request.id != id);
        let batched = self.in_flight.iter_mut().filter(|batched| batched.chunk.request == id);
        batched.for_each(|batched| batched.cancelled = true);
    }

    /// The session will not come again.
    pub fn gone(&mut self, session: SessionId) {
        self.expected.remove(&session);
    }

    /// Forms the next batch, or says how long to wait for a better one.
    pub fn next(&mut self, now: Instant) -> Decision {
        self.expected.retain(|_, until| *until > now);
        let busy: BTreeSet<SessionId> = self.in_flight.iter().map(|batched| batched.request.session).collect();
        let rows_in_flight: usize = self.in_flight.iter().map(|batched| batched.chunk.rows).sum();
        let room = self.limits.rows - rows_in_flight;
        let mut ready = self.waiting.clone();
        ready.retain(|request| !busy.contains(&request.session));
        if ready.is_empty() {
            return Decision::Idle;
        }
        let alone = ready.iter().find(|request| request.alone);
        let chunks = match (alone, self.expected.values().max()) {
            (Some(request), _) => self.limits.fill(room, &[*request]),
            (None, Some(until)) => return Decision::WaitUntil(*until),
            (None, None) => self.limits.fill(room, &ready),
        };
        if chunks.is_empty() {
            return Decision::Idle;
        }
        for chunk in &chunks {
            let place = self.waiting.iter().position(|request| request.id == chunk.request).expect("it waits");
            let request = self.waiting.remove(place);
            self.in_flight.push(Batched { chunk: *chunk, request, cancelled: false });
        }
        Decision::Run(chunks)
    }

    /// A batch that took `took` has ended well. Returns the requests that are done.
    pub fn completed(&mut self, chunks: &[ScheduledChunk], now: Instant, took: Duration) -> Vec<RequestId> {
        let patience = (took / 2).clamp(PATIENCE_MIN, PATIENCE_MAX);
        let mut done = Vec::new();
        for (chunk, request) in self.take_out(chunks) {
            match request.rows - chunk.rows {
                0 => {
                    self.expected.insert(request.session, now + patience);
                    done.push(chunk.request);
                }
                rows => self.waiting.push(QueuedRequest { rows, alone: false, ..request }),
            }
        }
        done
    }

    /// A batch has ended and computed nothing. Returns the request that has failed: the only one in it. Several are
    /// each tried by themselves, at once.
    pub fn failed(&mut self, chunks: &[ScheduledChunk]) -> Option<RequestId> {
        let requests = self.take_out(chunks);
        if chunks.len() == 1 {
            return requests.first().map(|(chunk, _)| chunk.request);
        }
        self.waiting.splice(0..0, requests.into_iter().map(|(_, request)| QueuedRequest { alone: true, ..request }));
        None
    }

    /// Takes the requests of a batch out of it, without those that were cancelled.
    fn take_out(&mut self, chunks: &[ScheduledChunk]) -> Vec<(ScheduledChunk, QueuedRequest)> {
        let each = chunks.iter().filter_map(|chunk| {
            let place = self
                .in_flight
                .iter()
                .position(|batched| batched.chunk.request == chunk.request)
                .expect("it is in a batch");
            let batched = self.in_flight.remove(place);
            (!batched.cancelled).then_some((batched.chunk, batched.request))
        });
        each.collect()
    }
}

#[cfg(test)]
mod tests;
