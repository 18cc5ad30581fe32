//! One flight on its way through the layers.
//!
//! Owns [`Aloft`]: where a flight is, and what it waits for. A layer's experts are computed as they are there: those in
//! memory at once, while others come from disk or are computed elsewhere, then each as it comes; so a layer that needs
//! more experts than there is memory for goes through them by turns. What the next layer will need is predicted and read
//! ahead. The invariant: a layer goes on when every output is there, and no output depends on when it came.

use std::{
    collections::BTreeSet,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use tokio::sync::oneshot;

use crate::{
    beneath::Beneath,
    decoder::{Flight, Outputs, Step},
    engine::EngineError,
    experts::by_expert,
    kernels::Kernels,
    layout::ExpertId,
    machine::Machine,
    scheduler::Part,
    session::{Advanced, Lease, Routes},
    source::{ExpertOutputs, ExpertRequest, SourceError},
    tiers::{
        meter::LayerRecall,
        predict::{Foresight, by_weight},
        residency::ClaimId,
    },
};

/// One part of a flight: what it has come to since take-off. Dropped if the flight fails.
pub(super) struct Aboard {
    pub(super) part: Part,
    /// Held here too: the session may have gone.
    _lease: Arc<Lease>,
    watch: bool,
    pub(super) advanced: Advanced,
    pub(super) routes: Routes,
}

impl Aboard {
    pub(super) fn new(part: Part, lease: Arc<Lease>, watch: bool) -> Self {
        Self { part, _lease: lease, watch, advanced: Advanced::default(), routes: Routes::new() }
    }
}

pub(super) struct Aloft<K: Kernels> {
    pub(super) flight: Flight<K>,
    pub(super) aboard: Vec<Aboard>,
    pub(super) since: Instant,
    phase: Phase,
    /// On experts of the shelf, once one was needed.
    claim: Option<ClaimId>,
    foresight: Foresight,
}

/// Where a flight is.
enum Phase {
    /// The experts of its layer are to be computed.
    Ready,
    /// Some are not yet.
    Waiting(Waiting),
}

struct Waiting {
    outputs: Outputs,
    /// Experts of the shelf that are not computed yet.
    shelved: BTreeSet<ExpertId>,
    elsewhere: Option<Elsewhere>,
}

impl Waiting {
    /// Whether outputs are missing.
    fn waits(&self) -> bool {
        !self.shelved.is_empty() || self.elsewhere.is_some()
    }
}

/// Experts that are computed elsewhere.
struct Elsewhere {
    slots: Vec<u32>,
    answer: oneshot::Receiver<Result<ExpertOutputs, SourceError>>,
    /// The answer, once it has come.
    result: Option<Result<ExpertOutputs, SourceError>>,
}

impl<K: Kernels> Aloft<K> {
    pub(super) fn new(flight: Flight<K>, aboard: Vec<Aboard>, since: Instant) -> Self {
        Self { flight, aboard, since, phase: Phase::Ready, claim: None, foresight: Foresight::default() }
    }

    /// Ready when an answer from elsewhere has come.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Phase::Waiting(Waiting { elsewhere: Some(elsewhere), .. }) = &mut self.phase else { return Poll::Pending };
        if elsewhere.result.is_none() {
            let Poll::Ready(result) = Pin::new(&mut elsewhere.answer).poll(context) else { return Poll::Pending };
            let nobody = |_| Err(SourceError::Failed("nobody answered for them".into()));
            elsewhere.result = Some(result.unwrap_or_else(nobody));
        }
        Poll::Ready(())
    }

    /// Whether there is something to compute.
    pub(super) fn can_fly(&self, machine: &Machine<K>) -> bool {
        match &self.phase {
            Phase::Ready => true,
            Phase::Waiting(waiting) => {
                waiting.elsewhere.as_ref().is_some_and(|elsewhere| elsewhere.result.is_some())
                    || self.claim.is_some_and(|claim| machine.is_ready(claim))
            }
        }
    }

    pub(super) fn waits_for_disk(&self) -> bool {
        matches!(&self.phase, Phase::Waiting(waiting) if !waiting.shelved.is_empty())
    }

    /// Gives up what it claims of the shelf.
    pub(super) fn release(&mut self, machine: &mut Machine<K>) {
        if let Some(claim) = self.claim.take() {
            machine.release(claim);
        }
    }

    /// Computes what is there of the layer's experts and, once all are done, what follows up to the next layer's; logits
    /// at the end.
    pub(super) fn fly(&mut self, machine: &mut Machine<K>) -> Result<Option<Vec<Vec<f32>>>, EngineError> {
        let mut waiting = match std::mem::replace(&mut self.phase, Phase::Ready) {
            Phase::Ready => self.experts(machine)?,
            Phase::Waiting(waiting) => waiting,
        };
        self.take_in(machine, &mut waiting)?;
        if waiting.waits() {
            self.phase = Phase::Waiting(waiting);
            return Ok(None);
        }
        match self.flight.resume(&mut machine.core()?, waiting.outputs)? {
            Step::NeedExperts => Ok(None),
            Step::Logits(logits) => Ok(Some(logits)),
        }
    }

    /// Asks for the layer's experts that are not in memory and computes those that are.
    fn experts(&mut self, machine: &mut Machine<K>) -> Result<Waiting, EngineError> {
        let layer = self.flight.layer();
        let (absent, shelved) = self.note_routes(machine);
        let mut elsewhere = None;
        if let Some(first) = absent.first() {
            let source = machine.shared.source().ok_or(EngineError::NotHeld(ExpertId { layer, index: *first }))?;
            let mut call = self.flight.call();
            let slots = call.retain(|expert| absent.contains(&expert));
            let (request, answer) = ExpertRequest::new(call);
            source.ask(request);
            elsewhere = Some(Elsewhere { slots, answer, result: None });
        }
        self.note_recall(machine);
        if !shelved.is_empty() {
            self.claim = self.claim.or_else(|| machine.claim());
        }
        if let Some(claim) = self.claim {
            // Also if there is nothing to need: what was foreseen for this layer is over.
            machine.need(claim, &shelved.iter().copied().collect::<Vec<_>>());
        }
        let next = machine.sparse_layer_from(usize::from(layer) + 1).filter(|_| machine.looks_ahead());
        if let Some(next) = next.filter(|_| self.needs_nearly_all(machine)) {
            let all = (0..machine.shared.config.num_experts as u16).collect::<Vec<_>>();
            self.foresee(machine, next, &all);
        }
        self.bring_up(machine, |_| true);
        let outputs = machine.run_held(&self.flight)?;
        let mut waiting = Waiting { outputs, shelved, elsewhere };
        if let Some(claim) = self.claim {
            let ready = machine.ready(claim)?;
            self.count_computed(machine, &mut waiting, claim, &ready);
        }
        if let Some(next) = next {
            self.look_ahead(machine, next, &waiting)?;
        }
        Ok(waiting)
    }

    /// Adds what has come since.
    fn take_in(&mut self, machine: &mut Machine<K>, waiting: &mut Waiting) -> Result<(), EngineError> {
        if let Some(Elsewhere { slots, result: Some(_), .. }) = &waiting.elsewhere {
            let slots = slots.clone();
            let result = waiting.elsewhere.take().and_then(|elsewhere| elsewhere.result);
            self.assemble(machine, &result.expect("seen just now")?, &slots, &mut waiting.outputs)?;
        }
        if let Some(claim) = self.claim.filter(|_| !waiting.shelved.is_empty()) {
            let ready = machine.ready(claim)?;
            if !ready.is_empty() {
                self.bring_up(machine, |id| ready.contains(&id));
                machine.run_more(&self.flight, &ready, &mut waiting.outputs)?;
                self.count_computed(machine, waiting, claim, &ready);
            }
        }
        Ok(())
    }

    /// Brings up what is worth it of those experts that are wanted and in memory, and names the host's kernel class to
    /// those whose rows it will compute.
    fn bring_up(&mut self, machine: &mut Machine<K>, wanted: impl Fn(ExpertId) -> bool) {
        if !machine.has_beneath() {
            return;
        }
        let layer = self.flight.layer();
        let needs =
            by_expert(self.flight.routes()).into_iter().map(|(index, pairs)| (ExpertId { layer, index }, pairs.len()));
        let needs: Vec<_> = needs.filter(|(id, _)| wanted(*id)).collect();
        let by_host = machine.bring_up(&needs, self.flight.routes().len());
        let mut rows = self.flight.routes().iter();
        for aboard in &mut self.aboard {
            for route in rows.by_ref().take(aboard.part.rows).flatten() {
                let id = ExpertId { layer, index: route.expert };
                if let Some(precision) = machine.precision(id).filter(|_| by_host.contains(&id)) {
                    aboard.advanced.note_class(format!("{}/{precision}", Beneath::class()));
                }
            }
        }
    }

    /// Experts of the shelf were computed: their memory may go to others.
    fn count_computed(&self, machine: &mut Machine<K>, waiting: &mut Waiting, claim: ClaimId, ids: &[ExpertId]) {
        let pairs = by_expert(self.flight.routes());
        let rows = self.flight.routes().len() as f64;
        let share = |id: &ExpertId| pairs.get(&id.index).map_or(0.0, |pairs| pairs.len() as f64 / rows);
        machine.computed(claim, &ids.iter().map(|id| (*id, share(id))).collect::<Vec<_>>());
        for id in ids {
            waiting.shelved.remove(id);
        }
    }

    /// Adds what came from elsewhere for `slots`.
    fn assemble(
        &mut self,
        machine: &Machine<K>,
        came: &ExpertOutputs,
        slots: &[u32],
        outputs: &mut Outputs,
    ) -> Result<(), EngineError> {
        let hidden = machine.shared.config.hidden_size;
        if came.values.len() != slots.len() * hidden {
            let why = format!("{} values for {} expert outputs of {hidden}", came.values.len(), slots.len());
            return Err(SourceError::Failed(why).into());
        }
        outputs.add(slots, &came.values);
        self.note_shares(came, slots);
        Ok(())
    }

    /// Predicts what `next` will need while this layer waits for experts, and has it read ahead. Nothing is predicted
    /// where nothing is missing: the next layer itself tells as soon.
    fn look_ahead(&mut self, machine: &mut Machine<K>, next: usize, waiting: &Waiting) -> Result<(), EngineError> {
        let measured = machine.shared.options.foresee;
        let (waits, nearly_all) = (waiting.waits() && machine.looks_ahead(), self.needs_nearly_all(machine));
        self.foresight.layer = next;
        if measured {
            self.foresight.early = machine.predict(&self.flight, &waiting.outputs.shared_alone())?;
        }
        if waits && (measured || !nearly_all) {
            self.foresight.late = machine.predict(&self.flight, &waiting.outputs)?;
            if !nearly_all {
                let experts = by_weight(&self.foresight.late);
                self.foresee(machine, next, &experts);
                machine.bring_up_ahead(&ids(next, &experts));
            }
        }
        Ok(())
    }

    fn foresee(&mut self, machine: &mut Machine<K>, layer: usize, experts: &[u16]) {
        if let Some(claim) = self.claim.or_else(|| machine.claim()) {
            self.claim = Some(claim);
            machine.foresee(claim, &ids(layer, experts));
        }
    }

    fn rows(&self) -> usize {
        self.aboard.iter().map(|aboard| aboard.part.rows).sum()
    }

    /// Whether so many rows are aboard that they will be routed to most experts of any layer.
    fn needs_nearly_all(&self, machine: &Machine<K>) -> bool {
        let config = &machine.shared.config;
        self.rows() * config.num_experts_per_tok >= 2 * config.num_experts
    }

    /// Counts how much of the layer's routes had been predicted: for rows that decode, since prompts need most experts
    /// anyway, or for all where that was asked for.
    fn note_recall(&mut self, machine: &Machine<K>) {
        let layer = usize::from(self.flight.layer());
        let foresight = std::mem::take(&mut self.foresight);
        let decoding: Vec<bool> = self
            .aboard
            .iter()
            .flat_map(|aboard| std::iter::repeat_n(aboard.part.rows == 1, aboard.part.rows))
            .collect();
        let all = machine.shared.options.foresee;
        let recall = foresight.recall(layer, self.flight.routes(), |row| all || decoding[row]);
        if recall != LayerRecall::default() {
            machine.shared.meter.update(|stats| {
                stats.recall.resize(stats.recall.len().max(layer + 1), Default::default());
                stats.recall[layer].add(&recall);
            });
        }
    }

    /// Counts the layer's pairs as computed here, shows the routes to those who watch, and names the experts that are
    /// not held, and those that are on the shelf.
    fn note_routes(&mut self, machine: &Machine<K>) -> (BTreeSet<u16>, BTreeSet<ExpertId>) {
        let layer = self.flight.layer();
        let (mut absent, mut shelved) = (BTreeSet::new(), BTreeSet::new());
        let mut rows = self.flight.routes().iter();
        for aboard in &mut self.aboard {
            let mine: Vec<_> = rows.by_ref().take(aboard.part.rows).collect();
            for route in mine.iter().copied().flatten() {
                let id = ExpertId { layer, index: route.expert };
                match machine.precision(id) {
                    Some(precision) => _ = aboard.advanced.precisions.insert(precision),
                    None => _ = absent.insert(route.expert),
                }
                if machine.is_shelved(id) {
                    shelved.insert(id);
                }
                aboard.advanced.pairs_here += 1;
            }
            if aboard.watch {
                aboard.routes.resize(usize::from(layer) + 1, Vec::new());
                aboard.routes[usize::from(layer)] = mine.into_iter().cloned().collect();
            }
        }
        (absent, shelved)
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
                advanced.note_class(class.clone());
            }
        }
    }
}

fn ids(layer: usize, experts: &[u16]) -> Vec<ExpertId> {
    experts.iter().map(|index| ExpertId { layer: layer as u16, index: *index }).collect()
}
