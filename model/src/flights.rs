//! Requests of sessions and the flights they are in.
//!
//! Owns [`Flights`]: what sessions have asked for, what is in the air, and what each request has come to so far. One
//! [`turn`](Flights::turn) computes at most one layer of one flight, so that whoever drives it can serve others in
//! between. A flight whose experts are all in memory goes on at once; otherwise the others are asked of the disk or of the
//! engine's source, those in memory are computed meanwhile, and another flight may take off. Invariants: a request is answered exactly
//! once, or nobody waits for it; its pages stay leased while it flies; when a flight of several fails, each of its
//! requests is tried alone, so that only those fail that must. When to fly what is the scheduler's decision.

use std::{
    collections::{BTreeMap, VecDeque},
    task::{Context, Poll, Waker},
    time::Instant,
};

use self::aloft::{Aboard, Aloft};
use crate::{
    decoder::{CHUNK_ROWS, Flight, Piece, Step, Want},
    engine::{EngineError, EngineOptions},
    kernels::Kernels,
    machine::Machine,
    scheduler::{Decision, Limits, Part, Scheduler, SessionId, Ticket},
    session::{Advanced, Routes},
    worker::{Advance, Reply},
};

mod aloft;

/// Flights in the air at once, where some wait for experts: one computes while another waits. More would
/// only be smaller.
const FLIGHTS_MAX: usize = 2;
/// Rows of prompts beside tokens in one flight. A flight that reads most weights anyway takes some rows for little;
/// this many cost as much again as reading them.
const PROMPT_ROWS_BESIDE: usize = 64;
/// Rows that prompts leave free where flights overlap.
const DECODE_ROWS_KEPT: usize = 32;

/// What to do after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Take another one.
    Again,
    /// Wait for a job or an answer, but not longer than this.
    Wait(Option<Instant>),
}

/// A session's request and what it has come to.
struct Open {
    advance: Advance,
    reply: Reply<(Advanced, Routes)>,
    /// Tokens that have been through all layers.
    done: usize,
    advanced: Advanced,
    routes: Routes,
}

pub(crate) struct Flights<K: Kernels> {
    scheduler: Scheduler,
    open: BTreeMap<Ticket, Open>,
    /// The one that has waited longest for its turn first.
    aloft: VecDeque<Aloft<K>>,
    tickets: u64,
}

impl<K: Kernels> Flights<K> {
    pub(crate) fn new(options: &EngineOptions) -> Self {
        let rows = options.rows_max.clamp(1, CHUNK_ROWS);
        let limits = Limits { rows, prompt_rows_beside: PROMPT_ROWS_BESIDE.min(rows), decode_rows_kept: 0 };
        Self { scheduler: Scheduler::new(limits), open: BTreeMap::new(), aloft: VecDeque::new(), tickets: 0 }
    }

    /// Takes a request.
    pub(crate) fn ask(&mut self, advance: Advance, reply: Reply<(Advanced, Routes)>) {
        let ticket = Ticket(self.tickets);
        self.tickets += 1;
        self.scheduler.submit(ticket, advance.session, advance.tokens.len());
        let (advanced, routes) = (Advanced::default(), Routes::new());
        self.open.insert(ticket, Open { advance, reply, done: 0, advanced, routes });
    }

    /// The session was dropped.
    pub(crate) fn gone(&mut self, session: SessionId) {
        self.scheduler.gone(session);
    }

    /// Requests that are in no flight.
    pub(crate) fn waiting(&self) -> usize {
        self.scheduler.waiting()
    }

    /// Computes a layer, or says that there is nothing to compute. The clock is read again after computing, which can take
    /// longer than answered sessions are waited for.
    pub(crate) fn turn(&mut self, machine: &mut Machine<K>, clock: &dyn Fn() -> Instant) -> Turn {
        self.let_go(machine);
        let _ = self.poll_arrivals(&mut Context::from_waker(Waker::noop()));
        let ready = self.aloft.iter().position(|aloft| aloft.can_fly(machine));
        if let Some(mut aloft) = ready.and_then(|index| self.aloft.remove(index)) {
            match aloft.fly(machine) {
                Ok(None) => self.aloft.push_back(aloft),
                Ok(Some(logits)) => {
                    aloft.release(machine);
                    self.land(aloft, logits, clock());
                }
                Err(error) => {
                    aloft.release(machine);
                    self.fail(aloft.aboard, error);
                }
            }
            return Turn::Again;
        }
        if self.aloft.len() >= FLIGHTS_MAX {
            return Turn::Wait(None);
        }
        if machine.shared.source().is_some() || machine.has_shelf() {
            let rows = self.scheduler.limits().rows;
            self.scheduler.keep_decode_rows(DECODE_ROWS_KEPT.min(rows / 2));
        }
        match self.scheduler.next(clock()) {
            Decision::Run(parts) => {
                self.take_off(machine, &parts, clock);
                Turn::Again
            }
            Decision::WaitUntil(until) => Turn::Wait(Some(until)),
            Decision::Idle => Turn::Wait(None),
        }
    }

    /// Ready when experts have come from elsewhere.
    pub(crate) fn poll_arrivals(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut arrived = Poll::Pending;
        for aloft in &mut self.aloft {
            if aloft.poll(context).is_ready() {
                arrived = Poll::Ready(());
            }
        }
        arrived
    }

    /// Whether a flight waits for the disk.
    pub(crate) fn wait_for_disk(&self) -> bool {
        self.aloft.iter().any(Aloft::waits_for_disk)
    }

    /// Forgets requests that nobody waits for, and flights that have no others aboard.
    fn let_go(&mut self, machine: &mut Machine<K>) {
        let scheduler = &mut self.scheduler;
        self.open.retain(|ticket, open| {
            let wanted = !open.reply.is_closed();
            if !wanted {
                scheduler.cancel(*ticket);
            }
            wanted
        });
        let open = &self.open;
        self.aloft.retain_mut(|aloft| {
            let wanted = aloft.aboard.iter().any(|aboard| open.contains_key(&aboard.part.ticket));
            if !wanted {
                aloft.release(machine);
                let none = scheduler.failed(&parts(&aloft.aboard));
                debug_assert!(none.is_none(), "all were cancelled");
            }
            wanted
        });
    }

    fn take_off(&mut self, machine: &mut Machine<K>, parts: &[Part], clock: &dyn Fn() -> Instant) {
        let since = clock();
        let (mut pieces, mut aboard) = (Vec::new(), Vec::new());
        for part in parts {
            let Open { advance, done, .. } = &self.open[&part.ticket];
            let end = done + part.rows;
            let want = match advance.want {
                Want::Last if end < advance.tokens.len() => Want::Nothing,
                want => want,
            };
            pieces.push(Piece {
                tokens: advance.tokens[*done..end].to_vec(),
                past: advance.past + done,
                pages: advance.lease.pages().to_vec(),
                want,
            });
            aboard.push(Aboard::new(*part, advance.lease.clone(), advance.watch));
        }
        machine.shared.activity.took_off(parts.len(), parts.iter().map(|part| part.rows).sum());
        machine.tick();
        let begun = machine.core().and_then(|mut core| Ok(Flight::begin(&mut core, pieces)?));
        match begun {
            Ok((flight, step)) => {
                let aloft = Aloft::new(flight, aboard, since);
                match step {
                    Step::NeedExperts => self.aloft.push_back(aloft),
                    Step::Logits(logits) => self.land(aloft, logits, clock()),
                }
            }
            Err(error) => self.fail(aboard, error),
        }
    }

    fn land(&mut self, aloft: Aloft<K>, logits: Vec<Vec<f32>>, now: Instant) {
        for (aboard, mut logits) in aloft.aboard.iter().zip(logits) {
            if let Some(open) = self.open.get_mut(&aboard.part.ticket) {
                open.done += aboard.part.rows;
                open.advanced.add(&aboard.advanced);
                open.advanced.logits.append(&mut logits);
                add_routes(&mut open.routes, &aboard.routes);
            }
        }
        let (parts, took) = (parts(&aloft.aboard), now.saturating_duration_since(aloft.since));
        drop(aloft);
        for ticket in self.scheduler.landed(&parts, now, took) {
            if let Some(mut open) = self.open.remove(&ticket) {
                let result = (std::mem::take(&mut open.advanced), std::mem::take(&mut open.routes));
                open.answer(Ok(result));
            }
        }
    }

    fn fail(&mut self, aboard: Vec<Aboard>, error: EngineError) {
        let parts = parts(&aboard);
        drop(aboard);
        match self.scheduler.failed(&parts).and_then(|ticket| self.open.remove(&ticket)) {
            Some(open) => open.answer(Err(error)),
            None => tracing::debug!(%error, requests = parts.len(), "a flight failed; trying its requests one by one"),
        }
    }
}

impl Open {
    /// Lets go of the pages first: whoever has its answer and drops its session has them back.
    fn answer(self, result: Result<(Advanced, Routes), EngineError>) {
        drop(self.advance);
        // Whoever asked may have gone.
        let _ = self.reply.send(result);
    }
}

fn parts(aboard: &[Aboard]) -> Vec<Part> {
    aboard.iter().map(|aboard| aboard.part).collect()
}

fn add_routes(routes: &mut Routes, piece: &Routes) {
    routes.resize(routes.len().max(piece.len()), Vec::new());
    for (layer, piece) in routes.iter_mut().zip(piece) {
        layer.extend(piece.iter().cloned());
    }
}

impl Advanced {
    fn add(&mut self, other: &Self) {
        self.pairs_here += other.pairs_here;
        self.precisions.extend(&other.precisions);
        self.pairs_elsewhere += other.pairs_elsewhere;
        other.classes.iter().for_each(|class| self.note_class(class.clone()));
    }

    fn note_class(&mut self, class: String) {
        if !self.classes.contains(&class) {
            self.classes.push(class);
        }
    }
}
