//! The call of one layer's experts, as a state machine.
//!
//! Owns [`LayerCall`]: what is still open, which attempts are under way, and every decision about them: who is asked, how long
//! to wait, whom to ask instead, when to give up, and who is named in the error. A driver passes each event as a
//! [`CallInput`] to [`LayerCall::handle`] and carries out the [`CallEffect`]s; it decides nothing. Time, randomness and the
//! home's [`HostTable`] are arguments, so every failure replays.
//!
//! A host that fails, answers late or no longer holds an expert has its pairs assigned to other replicas at once. Where none is
//! left, the hosts that failed are asked again after a pause: a connection may have broken, not the host. Experts are
//! stateless, so nothing is lost, and replicas of equal precision give equal bits. A call does not wait for a host that is down,
//! since it holds up a batch; its error says whether an answer may ([`CallError::Unavailable`]).
//!
//! Invariants:
//! - a call that was started finishes exactly once, and has no effects after that;
//! - until then every pair is answered, in exactly one attempt, or waits for a second chance;
//! - an attempt ends by its first outcome; later ones are ignored;
//! - the rows of open attempts, and no others, count as in flight in the [`HostTable`].
//!
//! It does not know how frames travel, and nothing of sessions.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use coel_gossip::Frame;
use coel_model::nn::expert_call::ExpertCall;
use coel_model::serve::expert_source::{ExpertOutputs, Share};
use coel_store::{ExpertId, ModelId, NodeId};
use rand::Rng;

use super::dispatch::{Assignment, DispatchContext, Exclusions, LayerReplicas, MissingExperts, Pair, assign};
use super::hosts::{Answered, HostTable};
use super::wire::{CallHeader, ReplyHeader, VERSION, WireError, decode_reply, encode_call};

/// How often hosts that failed are asked again when no other replica is left.
pub const SECOND_CHANCES: u32 = 2;
/// Pause before that.
pub const SECOND_CHANCE_AFTER: Duration = Duration::from_millis(200);

/// One attempt to have some pairs of a call computed by one node. Never reused within a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct AttemptId(u32);

/// One pause before hosts that failed are asked again. Never reused within a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChanceId(u32);

/// What happens to a call.
#[derive(Debug, Clone, PartialEq)]
pub enum CallInput {
    /// The call begins.
    Start,
    /// A host replied.
    Reply { attempt: AttemptId, frame: Frame },
    /// A host could not be reached, or the connection broke.
    Failed { attempt: AttemptId, reason: String },
    /// A host has not replied within the attempt's deadline.
    DeadlineReached { attempt: AttemptId },
    /// This node's engine is done: one row per pair, in the order of [`CallEffect::Compute`].
    Computed { attempt: AttemptId, outputs: Result<Vec<f32>, LocalError> },
    /// The pause is over.
    SecondChanceDue { chance: ChanceId },
    /// Members, liveness, the placement or what is held here changed.
    MeshChanged(LayerReplicas),
    /// The outputs are no longer wanted.
    Cancelled,
}

/// What a driver does for a call. For each attempt it reports one outcome.
#[derive(Debug, Clone, PartialEq)]
pub enum CallEffect {
    /// Send the frame to the host, and report [`CallInput::Reply`], [`CallInput::Failed`], or
    /// [`CallInput::DeadlineReached`] once `deadline` has passed.
    Send { attempt: AttemptId, host: NodeId, frame: Frame, deadline: Duration },
    /// Have this node's engine compute, and report [`CallInput::Computed`]. `rows` is `[n, hidden]`; `work` lists experts, each
    /// with indices of rows.
    Compute { attempt: AttemptId, rows: Vec<f32>, work: Vec<(u16, Vec<u32>)> },
    /// Report [`CallInput::SecondChanceDue`] after the pause.
    ArmSecondChance { chance: ChanceId, after: Duration },
    /// A host failed, and other replicas are asked: for the log and the metrics.
    Report { host: NodeId, failure: HostFailure },
    /// The call is over: the outputs of all pairs, or the reason why there are none.
    Finish(Result<ExpertOutputs, CallError>),
}

/// Why this node's engine did not compute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalError {
    /// It dropped this expert of the layer since the replicas were listed. Another replica can do it.
    NotHeld(u16),
    /// No other node would do better.
    Engine(String),
}

/// Why a host did not compute what it was asked for. Another host may.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostFailure {
    /// It was too late.
    #[error("did not answer within {0:?}")]
    Late(Duration),
    /// It could not be reached, or the connection broke.
    #[error("could not be asked: {0}")]
    Transport(String),
    /// It replied with bytes that are no reply to this call.
    #[error("sent an invalid reply: {0}")]
    InvalidReply(#[from] WireError),
    /// It named experts as not held, but none that it was asked for.
    #[error("sent an invalid reply: it names experts that it was not asked for")]
    Unasked,
    /// It refused the call.
    #[error("refused the call: {0}")]
    Refused(String),
    /// It no longer holds some of the experts, or not yet. It is not cooling down for that, and computes what else it holds.
    #[error("no longer holds some of the experts")]
    NotHeld,
}

impl HostFailure {
    /// Whether the same host may compute the same call later.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Late(_) | Self::Transport(_) | Self::NotHeld => true,
            Self::InvalidReply(_) | Self::Unasked | Self::Refused(_) => false,
        }
    }
}

/// Why a layer could not be computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// No host is left for some experts, and for one of them none is expected: the placement names no node for it that does not
    /// fail it for good.
    #[error("{missing}{}", named(.failures))]
    Missing { missing: MissingExperts, failures: Vec<(NodeId, HostFailure)> },
    /// No host is left for some experts, but each is placed on a node that may come back or become ready. Retryable.
    #[error("{missing}{}", named(.failures))]
    Unavailable { missing: MissingExperts, failures: Vec<(NodeId, HostFailure)> },
    /// This node's engine failed: a fault of this node.
    #[error("this node's engine: {0}")]
    Engine(String),
    /// The outputs were no longer wanted.
    #[error("the call was cancelled")]
    Cancelled,
}

fn named(failures: &[(NodeId, HostFailure)]) -> String {
    let each: Vec<_> = failures.iter().map(|(node, failure)| format!("node {node} {failure}")).collect();
    if each.is_empty() { String::new() } else { format!(" ({})", each.join("; ")) }
}

/// One attempt under way.
#[derive(Debug)]
struct Attempt {
    assignment: Assignment,
    sent_at: Instant,
    deadline: Duration,
    /// Rows that the host owed this home before the attempt.
    rows_ahead: usize,
}

/// The call of one layer's experts.
#[derive(Debug)]
pub struct LayerCall {
    call: ExpertCall,
    model: ModelId,
    replicas: LayerReplicas,
    started: bool,
    finished: bool,
    attempts: BTreeMap<AttemptId, Attempt>,
    next_attempt: u32,
    /// Hosts that were asked and have not failed.
    contacted: BTreeSet<NodeId>,
    excluded: Exclusions,
    /// What became of hosts in this call, each kind of failure once.
    failures: Vec<(NodeId, HostFailure)>,
    /// Pairs that no available node can compute; they wait for a second chance.
    stranded: Vec<Pair>,
    chances_left: u32,
    /// The pause that is running.
    chance: Option<ChanceId>,
    outputs: Vec<f32>,
    shares: Vec<Share>,
}

/// What one input has at hand, and the effects that it causes.
struct Turn<'a, R> {
    hosts: &'a mut HostTable,
    now: Instant,
    rng: &'a mut R,
    effects: Vec<CallEffect>,
}

impl LayerCall {
    /// The call of `model`'s experts, not started yet. `replicas` lists those of the call's experts.
    pub fn new(model: ModelId, call: ExpertCall, replicas: LayerReplicas) -> Self {
        Self {
            outputs: vec![0.0; call.slots() * call.hidden],
            call,
            model,
            replicas,
            started: false,
            finished: false,
            attempts: BTreeMap::new(),
            next_attempt: 0,
            contacted: BTreeSet::new(),
            excluded: Exclusions::default(),
            failures: Vec::new(),
            stranded: Vec::new(),
            chances_left: SECOND_CHANCES,
            chance: None,
            shares: Vec::new(),
        }
    }

    /// Takes what happened, and says what to do. `hosts` is shared by all calls of this home.
    pub fn handle(
        &mut self,
        input: CallInput,
        hosts: &mut HostTable,
        now: Instant,
        rng: &mut impl Rng,
    ) -> Vec<CallEffect> {
        let mut turn = Turn { hosts, now, rng, effects: Vec::new() };
        if self.finished {
            return turn.effects;
        }
        match input {
            CallInput::Start => {
                if !std::mem::replace(&mut self.started, true) {
                    self.place(pairs_of(&self.call), &mut turn);
                }
            }
            CallInput::Reply { attempt, frame } => {
                if let Some(attempt) = self.end_remote(attempt, &mut turn) {
                    self.on_reply(attempt, &frame, &mut turn);
                }
            }
            CallInput::Failed { attempt, reason } => {
                if let Some(attempt) = self.end_remote(attempt, &mut turn) {
                    self.on_failure(attempt.assignment, HostFailure::Transport(reason), &mut turn);
                }
            }
            CallInput::DeadlineReached { attempt } => {
                if let Some(attempt) = self.end_remote(attempt, &mut turn) {
                    self.on_failure(attempt.assignment, HostFailure::Late(attempt.deadline), &mut turn);
                }
            }
            CallInput::Computed { attempt, outputs } => {
                if let Some(attempt) = self.end_local(attempt) {
                    self.on_computed(attempt.assignment, outputs, &mut turn);
                }
            }
            CallInput::SecondChanceDue { chance } => {
                if self.chance == Some(chance) {
                    self.chance = None;
                    self.excluded.clear();
                    self.place_stranded(&mut turn);
                }
            }
            CallInput::MeshChanged(replicas) => {
                self.replicas = replicas;
                self.place_stranded(&mut turn);
            }
            CallInput::Cancelled => self.finish(Err(CallError::Cancelled), &mut turn),
        }
        if self.started && !self.finished && self.attempts.is_empty() && self.stranded.is_empty() {
            let (values, shares) = (std::mem::take(&mut self.outputs), std::mem::take(&mut self.shares));
            self.finish(Ok(ExpertOutputs { values, shares }), &mut turn);
        }
        turn.effects
    }

    /// Has the pairs computed by whoever can. Those that no available node can compute wait for a second chance; where
    /// there is none, the call fails.
    fn place(&mut self, pairs: Vec<Pair>, turn: &mut Turn<'_, impl Rng>) {
        match self.assign(&pairs, turn) {
            Ok(assignments) => assignments.into_iter().for_each(|assignment| self.launch(assignment, turn)),
            Err(missing) => {
                if self.chance.is_none() && !self.arm_second_chance(turn) {
                    let error = self.without(missing);
                    return self.finish(Err(error), turn);
                }
                let layer = self.call.layer;
                let is_missing = |pair: &Pair| missing.experts.contains_key(&ExpertId { layer, index: pair.expert });
                let (lost, rest): (Vec<_>, Vec<_>) = pairs.into_iter().partition(is_missing);
                self.stranded.extend(lost);
                let rest = self.assign(&rest, turn).unwrap_or_default();
                rest.into_iter().for_each(|assignment| self.launch(assignment, turn));
            }
        }
    }

    /// The error of a call that no host is left for.
    fn without(&mut self, missing: MissingExperts) -> CallError {
        let failures = std::mem::take(&mut self.failures);
        let fails_for_good = |node| failures.iter().any(|(failed, why)| *failed == node && !why.is_passing());
        let is_expected = |expert: &ExpertId| self.replicas.placed(expert.index).any(|node| !fails_for_good(node));
        if missing.experts.keys().all(is_expected) {
            CallError::Unavailable { missing, failures }
        } else {
            CallError::Missing { missing, failures }
        }
    }

    fn place_stranded(&mut self, turn: &mut Turn<'_, impl Rng>) {
        let stranded = std::mem::take(&mut self.stranded);
        if !stranded.is_empty() {
            self.place(stranded, turn);
        }
        if self.stranded.is_empty() {
            self.chance = None;
        }
    }

    fn assign(&self, pairs: &[Pair], turn: &mut Turn<'_, impl Rng>) -> Result<Vec<Assignment>, MissingExperts> {
        let context = DispatchContext {
            replicas: &self.replicas,
            excluded: &self.excluded,
            contacted: &self.contacted,
            hosts: turn.hosts,
            now: turn.now,
        };
        assign(pairs, context, turn.rng)
    }

    /// Begins a pause, after which excluded hosts are asked again; `false` if none is excluded or no chance is left.
    fn arm_second_chance(&mut self, turn: &mut Turn<'_, impl Rng>) -> bool {
        if self.chances_left == 0 || self.excluded.is_empty() {
            return false;
        }
        let chance = ChanceId(self.chances_left);
        self.chances_left -= 1;
        self.chance = Some(chance);
        turn.effects.push(CallEffect::ArmSecondChance { chance, after: SECOND_CHANCE_AFTER });
        true
    }

    fn launch(&mut self, assignment: Assignment, turn: &mut Turn<'_, impl Rng>) {
        let (host, count) = (assignment.host, assignment.pairs.len());
        let attempt = AttemptId(self.next_attempt);
        self.next_attempt += 1;
        let indices = assignment.rows();
        let mut rows = Vec::with_capacity(indices.len() * self.call.hidden);
        indices.into_iter().for_each(|row| rows.extend_from_slice(self.call.row(row.into())));
        let work = assignment.work();
        let (mut deadline, mut rows_ahead) = (Duration::ZERO, 0);
        if host == self.replicas.home {
            let work = work.into_iter().map(|work| (work.expert, work.rows.into_iter().map(u32::from).collect()));
            turn.effects.push(CallEffect::Compute { attempt, rows, work: work.collect() });
        } else {
            deadline = turn.hosts.deadline(host, self.replicas.round_trip(host), count, self.has_spares(&assignment));
            rows_ahead = turn.hosts.rows_in_flight(host);
            turn.hosts.sent(host, count);
            self.contacted.insert(host);
            let header = CallHeader {
                version: VERSION,
                model: self.model,
                epoch: self.replicas.epoch,
                layer: self.call.layer,
                hidden_size: self.call.hidden as u32,
                work,
            };
            let frame = encode_call(&header, &rows);
            turn.effects.push(CallEffect::Send { attempt, host, frame, deadline });
        }
        self.attempts.insert(attempt, Attempt { assignment, sent_at: turn.now, deadline, rows_ahead });
    }

    /// Whether other live nodes could compute every pair of the assignment.
    fn has_spares(&self, assignment: &Assignment) -> bool {
        assignment.pairs.iter().all(|pair| {
            self.replicas.of(pair.expert).any(|(node, _)| {
                let absent = self.excluded.absent.contains(&(node, pair.expert));
                node != assignment.host && !absent && self.replicas.is_live(node)
            })
        })
    }

    /// Closes an attempt at a peer that is still open.
    fn end_remote(&mut self, id: AttemptId, turn: &mut Turn<'_, impl Rng>) -> Option<Attempt> {
        let home = self.replicas.home;
        self.attempts.get(&id).filter(|attempt| attempt.assignment.host != home)?;
        let attempt = self.attempts.remove(&id)?;
        turn.hosts.settled(attempt.assignment.host, attempt.assignment.pairs.len());
        Some(attempt)
    }

    /// Closes an attempt at this node that is still open.
    fn end_local(&mut self, id: AttemptId) -> Option<Attempt> {
        self.attempts.get(&id).filter(|attempt| attempt.assignment.host == self.replicas.home)?;
        self.attempts.remove(&id)
    }

    fn on_reply(&mut self, attempt: Attempt, frame: &Frame, turn: &mut Turn<'_, impl Rng>) {
        let Attempt { assignment, sent_at, rows_ahead, .. } = attempt;
        let host = assignment.host;
        let (header, values) = match decode_reply(frame, assignment.pairs.len(), self.call.hidden) {
            Ok(reply) => reply,
            Err(error) => return self.on_failure(assignment, error.into(), turn),
        };
        match header {
            ReplyHeader::Done { class } => {
                let took = turn.now.saturating_duration_since(sent_at);
                let round_trip = self.replicas.round_trip(host);
                turn.hosts.answered(host, Answered { rows: assignment.pairs.len(), rows_ahead, took, round_trip });
                let class = turn.hosts.intern_class(host, &class);
                self.accept(&assignment, &values, Some(class.as_ref().into()));
            }
            ReplyHeader::NotHeld(experts) => {
                // Without one that was asked for, the call would go on for ever.
                let layer = self.call.layer;
                let asked = |expert: &ExpertId| {
                    expert.layer == layer && assignment.pairs.iter().any(|pair| pair.expert == expert.index)
                };
                let absent: Vec<_> = experts.into_iter().filter(asked).map(|expert| expert.index).collect();
                if absent.is_empty() {
                    return self.on_failure(assignment, HostFailure::Unasked, turn);
                }
                self.on_not_held(assignment, absent, turn);
            }
            ReplyHeader::Refused(reason) => self.on_failure(assignment, HostFailure::Refused(reason), turn),
        }
    }

    fn on_computed(
        &mut self,
        assignment: Assignment,
        outputs: Result<Vec<f32>, LocalError>,
        turn: &mut Turn<'_, impl Rng>,
    ) {
        match outputs {
            Ok(values) if values.len() == assignment.pairs.len() * self.call.hidden => {
                self.accept(&assignment, &values, None);
            }
            Ok(values) => {
                let (rows, count) = (assignment.pairs.len(), values.len());
                let why = format!("{count} values for {rows} rows of {}", self.call.hidden);
                self.finish(Err(CallError::Engine(why)), turn);
            }
            Err(LocalError::NotHeld(expert)) if assignment.pairs.iter().any(|pair| pair.expert == expert) => {
                self.on_not_held(assignment, vec![expert], turn);
            }
            Err(LocalError::NotHeld(expert)) => {
                let why = format!("it misses expert {expert}, which it was not asked for");
                self.finish(Err(CallError::Engine(why)), turn);
            }
            Err(LocalError::Engine(why)) => self.finish(Err(CallError::Engine(why)), turn),
        }
    }

    /// Puts one output row per pair where it belongs.
    fn accept(&mut self, assignment: &Assignment, values: &[f32], elsewhere: Option<String>) {
        let hidden = self.call.hidden;
        for (pair, row) in assignment.pairs.iter().zip(values.chunks_exact(hidden)) {
            self.outputs[pair.slot as usize * hidden..][..hidden].copy_from_slice(row);
        }
        let slots = assignment.pairs.iter().map(|pair| pair.slot).collect();
        self.shares.push(Share { elsewhere, slots });
    }

    /// The node's placement is for a moment another than ours. What else it holds it goes on computing.
    fn on_not_held(&mut self, assignment: Assignment, experts: Vec<u16>, turn: &mut Turn<'_, impl Rng>) {
        let host = assignment.host;
        self.excluded.absent.extend(experts.into_iter().map(|expert| (host, expert)));
        self.report(host, HostFailure::NotHeld, turn);
        self.place(assignment.pairs, turn);
    }

    fn on_failure(&mut self, assignment: Assignment, failure: HostFailure, turn: &mut Turn<'_, impl Rng>) {
        let host = assignment.host;
        turn.hosts.failed(host, turn.now);
        self.excluded.failed.insert(host);
        self.contacted.remove(&host);
        self.report(host, failure, turn);
        self.place(assignment.pairs, turn);
    }

    fn report(&mut self, host: NodeId, failure: HostFailure, turn: &mut Turn<'_, impl Rng>) {
        turn.effects.push(CallEffect::Report { host, failure: failure.clone() });
        let failure = (host, failure);
        // A host may be asked again, and fail alike.
        if !self.failures.contains(&failure) {
            self.failures.push(failure);
        }
    }

    fn finish(&mut self, outcome: Result<ExpertOutputs, CallError>, turn: &mut Turn<'_, impl Rng>) {
        self.finished = true;
        for attempt in std::mem::take(&mut self.attempts).into_values() {
            if attempt.assignment.host != self.replicas.home {
                turn.hosts.settled(attempt.assignment.host, attempt.assignment.pairs.len());
            }
        }
        turn.effects.push(CallEffect::Finish(outcome));
    }
}

/// The call's pairs in route order, which is the order of the decoder's answer.
fn pairs_of(call: &ExpertCall) -> Vec<Pair> {
    let rows = call.routes.iter().zip(0..);
    let pairs = rows.flat_map(|(routes, row)| routes.iter().map(move |route| (row, route.expert)));
    pairs.zip(0..).map(|((row, expert), slot)| Pair { row, expert, slot }).collect()
}

#[cfg(test)]
mod tests;
