//! Requests of sessions and the flights they are in.
//!
//! Owns [`Flights`]: what sessions have asked for, what is in the air, and what each request has come to so far. One
//! [`turn`](Flights::turn) computes at most one layer of one flight, so that whoever drives it can serve others in
//! between. A flight whose experts are all held goes on at once; otherwise the missing ones are asked of the engine's
//! source, those held are computed meanwhile, and another flight may take off. Invariants: a request is answered exactly
//! once, or nobody waits for it; its pages stay leased while it flies; when a flight of several fails, each of its
//! requests is tried alone, so that only those fail that must. When to fly what is the scheduler's decision.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Instant,
};

use tokio::sync::oneshot;

use crate::{
    decoder::{CHUNK_ROWS, Flight, Outputs, Piece, Step, Want},
    engine::{EngineError, EngineOptions},
    kernels::Kernels,
    layout::ExpertId,
    machine::Machine,
    scheduler::{Decision, Limits, Part, Scheduler, SessionId, Ticket},
    session::{Advanced, Lease, Routes},
    source::{ExpertOutputs, ExpertRequest, SourceError},
    worker::{Advance, Reply},
};

/// Flights in the air at once, where some wait for experts from elsewhere: one computes while another waits. More would
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

type Answer = oneshot::Receiver<Result<ExpertOutputs, SourceError>>;

/// A session's request and what it has come to.
struct Open {
    advance: Advance,
    reply: Reply<(Advanced, Routes)>,
    /// Tokens that have been through all layers.
    done: usize,
    advanced: Advanced,
    routes: Routes,
}

/// One part of a flight: what it has come to since take-off. Dropped if the flight fails.
struct Aboard {
    part: Part,
    /// Held here too: the session may have gone.
    _lease: Arc<Lease>,
    watch: bool,
    advanced: Advanced,
    routes: Routes,
}

/// Where a flight is.
enum Phase {
    /// The experts of its layer are to be computed.
    Ready,
    /// Some are computed elsewhere: `slots` are missing in `outputs`.
    Waiting { answer: Answer, slots: Vec<u32>, outputs: Outputs },
    /// They have come, or cannot be had.
    Arrived { result: Result<ExpertOutputs, SourceError>, slots: Vec<u32>, outputs: Outputs },
}

struct Aloft<K: Kernels> {
    flight: Flight<K>,
    aboard: Vec<Aboard>,
    phase: Phase,
    since: Instant,
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

    /// Computes a layer, or says that there is nothing to compute.
    pub(crate) fn turn(&mut self, machine: &mut Machine<K>, now: Instant) -> Turn {
        self.let_go();
        let _ = self.poll_arrivals(&mut Context::from_waker(Waker::noop()));
        let ready = |aloft: &Aloft<K>| !matches!(aloft.phase, Phase::Waiting { .. });
        if let Some(mut aloft) = self.aloft.iter().position(ready).and_then(|index| self.aloft.remove(index)) {
            match aloft.fly(machine) {
                Ok(None) => self.aloft.push_back(aloft),
                Ok(Some(logits)) => self.land(aloft, logits, now),
                Err(error) => self.fail(aloft.aboard, error),
            }
            return Turn::Again;
        }
        if self.aloft.len() >= FLIGHTS_MAX {
            return Turn::Wait(None);
        }
        if machine.shared.source().is_some() {
            let rows = self.scheduler.limits().rows;
            self.scheduler.keep_decode_rows(DECODE_ROWS_KEPT.min(rows / 2));
        }
        match self.scheduler.next(now) {
            Decision::Run(parts) => {
                self.take_off(machine, &parts, now);
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
            let Phase::Waiting { answer, .. } = &mut aloft.phase else { continue };
            let Poll::Ready(result) = Pin::new(answer).poll(context) else { continue };
            let result = result.unwrap_or_else(|_| Err(SourceError::Failed("nobody answered for them".into())));
            if let Phase::Waiting { slots, outputs, .. } = std::mem::replace(&mut aloft.phase, Phase::Ready) {
                aloft.phase = Phase::Arrived { result, slots, outputs };
            }
            arrived = Poll::Ready(());
        }
        arrived
    }

    /// Forgets requests that nobody waits for, and flights that have no others aboard.
    fn let_go(&mut self) {
        let scheduler = &mut self.scheduler;
        self.open.retain(|ticket, open| {
            let wanted = !open.reply.is_closed();
            if !wanted {
                scheduler.cancel(*ticket);
            }
            wanted
        });
        let open = &self.open;
        self.aloft.retain(|aloft| {
            let wanted = aloft.aboard.iter().any(|aboard| open.contains_key(&aboard.part.ticket));
            if !wanted {
                let none = scheduler.failed(&parts(&aloft.aboard));
                debug_assert!(none.is_none(), "all were cancelled");
            }
            wanted
        });
    }

    fn take_off(&mut self, machine: &mut Machine<K>, parts: &[Part], now: Instant) {
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
            aboard.push(Aboard {
                part: *part,
                _lease: advance.lease.clone(),
                watch: advance.watch,
                advanced: Advanced::default(),
                routes: Routes::new(),
            });
        }
        machine.shared.activity.took_off(parts.len(), parts.iter().map(|part| part.rows).sum());
        let begun = machine.core().and_then(|mut core| Ok(Flight::begin(&mut core, pieces)?));
        match begun {
            Ok((flight, step)) => {
                let aloft = Aloft { flight, aboard, phase: Phase::Ready, since: now };
                match step {
                    Step::NeedExperts => self.aloft.push_back(aloft),
                    Step::Logits(logits) => self.land(aloft, logits, now),
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

impl<K: Kernels> Aloft<K> {
    /// Computes the experts of the layer and what follows, up to the next layer's; logits at the end.
    fn fly(&mut self, machine: &mut Machine<K>) -> Result<Option<Vec<Vec<f32>>>, EngineError> {
        let outputs = match std::mem::replace(&mut self.phase, Phase::Ready) {
            Phase::Ready => match self.experts(machine)? {
                Some(outputs) => outputs,
                None => return Ok(None),
            },
            Phase::Arrived { result, slots, outputs } => self.assemble(machine, &result?, &slots, outputs)?,
            Phase::Waiting { .. } => unreachable!("a flight that waits has no turn"),
        };
        match self.flight.resume(&mut machine.core()?, outputs)? {
            Step::NeedExperts => Ok(None),
            Step::Logits(logits) => Ok(Some(logits)),
        }
    }

    /// The outputs of the layer's experts, if all are held here; else asks for the others and computes those.
    fn experts(&mut self, machine: &mut Machine<K>) -> Result<Option<Outputs>, EngineError> {
        let layer = self.flight.layer();
        let absent = self.note_routes(machine);
        let Some(first) = absent.first() else {
            return Ok(Some(machine.run_held(&self.flight)?));
        };
        let source = machine.shared.source().ok_or(EngineError::NotHeld(ExpertId { layer, index: *first }))?;
        let mut call = self.flight.call();
        let slots = call.retain(|expert| absent.contains(&expert));
        let (request, answer) = ExpertRequest::new(call);
        source.ask(request);
        let outputs = machine.run_held(&self.flight)?;
        self.phase = Phase::Waiting { answer, slots, outputs };
        Ok(None)
    }

    /// Adds what came from elsewhere for `slots`.
    fn assemble(
        &mut self,
        machine: &Machine<K>,
        came: &ExpertOutputs,
        slots: &[u32],
        mut outputs: Outputs,
    ) -> Result<Outputs, EngineError> {
        let hidden = machine.shared.config.hidden_size;
        if came.values.len() != slots.len() * hidden {
            let why = format!("{} values for {} expert outputs of {hidden}", came.values.len(), slots.len());
            return Err(SourceError::Failed(why).into());
        }
        outputs.add(slots, &came.values);
        self.note_shares(came, slots);
        Ok(outputs)
    }

    /// Counts the layer's pairs as computed here, shows the routes to those who watch, and names the experts that are
    /// not held.
    fn note_routes(&mut self, machine: &Machine<K>) -> BTreeSet<u16> {
        let layer = self.flight.layer();
        let mut absent = BTreeSet::new();
        let mut rows = self.flight.routes().iter();
        for aboard in &mut self.aboard {
            let mine: Vec<_> = rows.by_ref().take(aboard.part.rows).collect();
            for route in mine.iter().copied().flatten() {
                match machine.precision(ExpertId { layer, index: route.expert }) {
                    Some(precision) => _ = aboard.advanced.precisions.insert(precision),
                    None => _ = absent.insert(route.expert),
                }
                aboard.advanced.pairs_here += 1;
            }
            if aboard.watch {
                aboard.routes.resize(usize::from(layer) + 1, Vec::new());
                aboard.routes[usize::from(layer)] = mine.into_iter().cloned().collect();
            }
        }
        absent
    }

    /// Moves the pairs that were computed elsewhere to where they belong.
    fn note_shares(&mut self, came: &ExpertOutputs, slots: &[u32]) {
        let mut ends = Vec::new();
        let (mut slot, mut rows) = (0, self.flight.routes().iter());
        for aboard in &self.aboard {
            slot += rows.by_ref().take(aboard.part.rows).map(|routes| routes.len() as u32).sum::<u32>();
            ends.push(slot);
        }
        for share in &came.shares {
            let Some(class) = &share.elsewhere else { continue };
            for slot in share.slots.iter().filter_map(|index| slots.get(*index as usize)) {
                let advanced = &mut self.aboard[ends.partition_point(|end| end <= slot)].advanced;
                advanced.pairs_here = advanced.pairs_here.saturating_sub(1);
                advanced.pairs_elsewhere += 1;
                if !advanced.classes.contains(class) {
                    advanced.classes.push(class.clone());
                }
            }
        }
    }
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
        for class in &other.classes {
            if !self.classes.contains(class) {
                self.classes.push(class.clone());
            }
        }
    }
}
