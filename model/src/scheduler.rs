//! Which rows go through the layers together, and when: pure, the time is an argument.
//!
//! Owns [`Scheduler`]. Sessions hand in requests (rows to be computed), [`Scheduler::next`] forms the next flight of
//! them, and whoever flies it says how it ended. A flight reads every weight once for all of its rows, so it takes
//! whoever is ready: requests of few rows (sessions that decode) first, then pieces of long ones (prompts). Five rules:
//!
//! - Beside sessions that decode, prompts get so many rows and no more, so that a long prompt slows tokens down by a
//!   bounded factor and never stops them; and some rows are kept for prompts however many sessions decode.
//! - Where flights overlap, because some wait for others' work, prompts leave a few rows free, so that whoever decodes
//!   need not wait for a flight full of prompts.
//! - Prompts share their rows evenly: a short one need not wait for the end of a long one.
//! - A session that has just been answered is expected back with its next token: the next flight waits for it, but
//!   only for a fraction of what the last flight took. So concurrent requests fall into step, and a lone one waits for
//!   nobody.
//! - Within each kind the order is first come, first served, and what was served queues again at the end.
//!
//! Invariants: a session is in at most one flight; the rows of all flights never exceed [`Limits::rows`]; a request that
//! is not cancelled is flown until its rows are done or its flight of one has failed. It knows no tokens and no pages.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// Requests of at most so many rows are taken whole and first: a token, or a few that were guessed.
const FEW_ROWS: usize = 8;
/// Prompts get no smaller share than this while more is wanted: below it a flight reads all weights for next to nothing.
const SHARE_MIN: usize = 16;
/// How long the next flight waits for sessions that are expected back: a half of what the last one took, in these
/// bounds. The lower is what handing a token over takes on a busy machine, the upper what nobody notices.
const PATIENCE_MIN: Duration = Duration::from_millis(1);
const PATIENCE_MAX: Duration = Duration::from_millis(10);

/// A sequence with a cache of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// One request of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// How large flights may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most rows of all flights together.
    pub rows: usize,
    /// Most rows of prompts in a flight that also decodes.
    pub prompt_rows_beside: usize,
    /// Of `rows`, those that prompts never take: 0 where flights do not overlap.
    pub decode_rows_kept: usize,
}

/// The next rows of a request, as many as fly at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub ticket: Ticket,
    pub rows: usize,
}

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Fly these together.
    Run(Vec<Part>),
    /// Ask again then, or when something has changed.
    WaitUntil(Instant),
    /// Ask again when something has changed.
    Idle,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    ticket: Ticket,
    session: SessionId,
    /// Still to be computed.
    rows: usize,
    /// Its flight failed with others aboard: it flies by itself next.
    alone: bool,
}

#[derive(Clone, Copy, Debug)]
struct Flying {
    part: Part,
    request: Request,
    cancelled: bool,
}

/// Requests that wait, fly, or are about to come.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    /// In the order in which they are served.
    waiting: Vec<Request>,
    flying: Vec<Flying>,
    /// Sessions expected back, and until when.
    expected: BTreeMap<SessionId, Instant>,
}

impl Limits {
    /// Shares a flight of at most `room` rows out among `ready`, which are in the order of service.
    fn fill(&self, room: usize, ready: &[Request]) -> Vec<Part> {
        let (few, long): (Vec<&Request>, Vec<&Request>) = ready.iter().partition(|request| request.rows <= FEW_ROWS);
        let prompt_room = if long.is_empty() { 0 } else { room.saturating_sub(self.decode_rows_kept) };
        let beside = prompt_room.min(self.prompt_rows_beside);
        let mut parts = Vec::new();
        let mut left = room - SHARE_MIN.min(beside).min(room / 2);
        for request in few {
            // In order: whoever does not fit is first next time. A flight of nothing but a small limit takes a piece.
            let rows = if parts.is_empty() { request.rows.min(left) } else { request.rows };
            if rows == 0 || rows > left {
                break;
            }
            parts.push(Part { ticket: request.ticket, rows });
            left -= rows;
        }
        let taken: usize = parts.iter().map(|part| part.rows).sum();
        let prompts = if parts.is_empty() { prompt_room } else { beside.min(room - taken) };
        parts.extend(share(prompts, &long));
        parts
    }
}

/// Shares `room` rows out evenly among the first few of `long`: none gets more than it wants, and what it leaves goes to
/// the others.
fn share(mut room: usize, long: &[&Request]) -> Vec<Part> {
    let mut sharing: Vec<&Request> = long.iter().take((room / SHARE_MIN).max(1)).copied().collect();
    sharing.sort_by_key(|request| request.rows);
    let mut parts = Vec::new();
    for (index, request) in sharing.iter().enumerate() {
        let rows = request.rows.min(room / (sharing.len() - index));
        room -= rows;
        parts.extend((rows > 0).then_some(Part { ticket: request.ticket, rows }));
    }
    parts
}

impl Scheduler {
    pub fn new(limits: Limits) -> Self {
        let Limits { rows, prompt_rows_beside, decode_rows_kept } = limits;
        assert!(rows > decode_rows_kept && prompt_rows_beside > 0, "a flight needs rows");
        Self { limits, waiting: Vec::new(), flying: Vec::new(), expected: BTreeMap::new() }
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// From now on flights overlap: prompts leave `rows` rows free.
    pub fn keep_decode_rows(&mut self, rows: usize) {
        assert!(self.limits.rows > rows, "prompts need rows too");
        self.limits.decode_rows_kept = rows;
    }

    /// Requests that are in no flight.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// `rows` rows of `session` are to be computed. `ticket` was never used before.
    pub fn submit(&mut self, ticket: Ticket, session: SessionId, rows: usize) {
        assert!(rows > 0, "a request has rows");
        self.expected.remove(&session);
        self.waiting.push(Request { ticket, session, rows, alone: false });
    }

    /// Nobody wants the request any more. If it flies its session stays busy until the flight has ended.
    pub fn cancel(&mut self, ticket: Ticket) {
        self.waiting.retain(|request| request.ticket != ticket);
        let flying = self.flying.iter_mut().filter(|flying| flying.part.ticket == ticket);
        flying.for_each(|flying| flying.cancelled = true);
    }

    /// The session will not come again.
    pub fn gone(&mut self, session: SessionId) {
        self.expected.remove(&session);
    }

    /// Forms the next flight, or says how long to wait for a better one.
    pub fn next(&mut self, now: Instant) -> Decision {
        self.expected.retain(|_, until| *until > now);
        let busy: BTreeSet<SessionId> = self.flying.iter().map(|flying| flying.request.session).collect();
        let aloft: usize = self.flying.iter().map(|flying| flying.part.rows).sum();
        let room = self.limits.rows - aloft;
        let mut ready = self.waiting.clone();
        ready.retain(|request| !busy.contains(&request.session));
        if ready.is_empty() {
            return Decision::Idle;
        }
        let alone = ready.iter().find(|request| request.alone);
        let parts = match (alone, self.expected.values().max()) {
            (Some(request), _) => self.limits.fill(room, &[*request]),
            (None, Some(until)) => return Decision::WaitUntil(*until),
            (None, None) => self.limits.fill(room, &ready),
        };
        if parts.is_empty() {
            return Decision::Idle;
        }
        for part in &parts {
            let place = self.waiting.iter().position(|request| request.ticket == part.ticket).expect("it waits");
            let request = self.waiting.remove(place);
            self.flying.push(Flying { part: *part, request, cancelled: false });
        }
        Decision::Run(parts)
    }

    /// A flight that took `took` has ended well. Returns the requests that are done.
    pub fn landed(&mut self, parts: &[Part], now: Instant, took: Duration) -> Vec<Ticket> {
        let patience = (took / 2).clamp(PATIENCE_MIN, PATIENCE_MAX);
        let mut done = Vec::new();
        for (part, request) in self.disembark(parts) {
            match request.rows - part.rows {
                0 => {
                    self.expected.insert(request.session, now + patience);
                    done.push(part.ticket);
                }
                rows => self.waiting.push(Request { rows, alone: false, ..request }),
            }
        }
        done
    }

    /// A flight has ended and computed nothing. Returns the request that has failed: the only one aboard. Several are
    /// each tried by themselves, at once.
    pub fn failed(&mut self, parts: &[Part]) -> Option<Ticket> {
        let aboard = self.disembark(parts);
        if parts.len() == 1 {
            return aboard.first().map(|(part, _)| part.ticket);
        }
        self.waiting.splice(0..0, aboard.into_iter().map(|(_, request)| Request { alone: true, ..request }));
        None
    }

    /// Takes the requests of a flight out of it, without those that were cancelled.
    fn disembark(&mut self, parts: &[Part]) -> Vec<(Part, Request)> {
        let each = parts.iter().filter_map(|part| {
            let place = self.flying.iter().position(|flying| flying.part.ticket == part.ticket).expect("it flies");
            let flying = self.flying.remove(place);
            (!flying.cancelled).then_some((flying.part, flying.request))
        });
        each.collect()
    }
}

#[cfg(test)]
mod tests;
