//! All tensors of a device, and what is computed with them.
//!
//! Owns [`Machine`]: kernels, trunk, KV cache, experts, those in host memory beneath a device that does not hold all of
//! them, and the shelf of experts that wait on disk. The compute thread owns the one there is, so nothing here is locked.
//! The invariant: an expert is whole in memory, or on the shelf, or not held, and what is held is in the ledger. Who needs
//! an expert of the shelf makes a claim, and computes what has come.

use std::{
    collections::HashMap,
    sync::Arc,
    task::{Context, Poll},
};

use crate::{
    beneath::Beneath,
    config::ModelConfig,
    decoder::{Core, Flight, KvCache, Outputs},
    engine::{EngineError, Shared},
    experts::by_expert,
    kernels::{ExpertWork, Gated, Kernels, download, packed::Packed},
    layout::ExpertId,
    router::Route,
    slices::{Precision, Weight},
    tensors::{LoadError, Tensors},
    tiers::{
        TierError,
        device::Need,
        residency::ClaimId,
        shelf::{Shelf, Upper},
    },
    trunk::{Trunk, check_expert, load_expert},
};

pub(crate) type Experts<K> = HashMap<ExpertId, (Gated<<K as Kernels>::Matrix>, Precision)>;

pub(crate) struct Machine<K: Kernels> {
    kernels: K,
    pub(crate) shared: Arc<Shared>,
    trunk: Option<(Trunk<K>, KvCache<K>)>,
    /// Those where the kernels compute, for good or from the shelf.
    experts: Experts<K>,
    /// Where the device may not hold all of them.
    beneath: Option<Beneath>,
    /// There once an expert was put on it.
    shelf: Option<Shelf>,
}

/// Brings experts of the shelf to where they are computed.
struct Hands<'a, K: Kernels> {
    kernels: &'a K,
    config: &'a ModelConfig,
    experts: &'a mut Experts<K>,
    beneath: Option<&'a mut Beneath>,
}

impl<K: Kernels> Upper for Hands<'_, K> {
    fn came(&mut self, id: ExpertId, precision: Precision, tensors: &Tensors) -> Result<(), LoadError> {
        match &mut self.beneath {
            Some(beneath) => beneath.came(id, Some(load_expert(&Packed::default(), self.config, id, tensors)?)),
            None => {
                let expert = load_expert(self.kernels, self.config, id, tensors)?;
                self.experts.insert(id, (expert, precision));
            }
        }
        Ok(())
    }

    fn went(&mut self, id: ExpertId) {
        match &mut self.beneath {
            // A copy on the device stays.
            Some(beneath) => beneath.came(id, None),
            None => _ = self.experts.remove(&id),
        }
    }
}

impl<K: Kernels> Machine<K> {
    pub(crate) fn new(kernels: K, shared: Arc<Shared>) -> Self {
        let options = &shared.options;
        let beneath = options.device_bytes.map(|budget| Beneath::new(budget, options.threads));
        Self { kernels, shared, trunk: None, experts: HashMap::new(), beneath, shelf: None }
    }

    /// Loads the trunk; its embedding table stays in its files if so wanted.
    pub(crate) fn load_trunk(&mut self, tensors: &Tensors, embedding_on_disk: bool) -> Result<(), EngineError> {
        if self.trunk.is_some() {
            return Err(EngineError::TrunkLoaded);
        }
        let config = self.shared.config.clone();
        let mut trunk = Trunk::load(&self.kernels, config.clone(), tensors)?;
        if embedding_on_disk {
            let on_disk = trunk.embed_from_disk()?;
            self.shared.meter.update(|stats| stats.embedding_on_disk = on_disk);
        }
        let (pages, page_tokens) = self.shared.pool_size();
        let cache = KvCache::new(&self.kernels, &config, pages, page_tokens);
        if let Some(beneath) = &self.beneath {
            self.kernels.reserve(beneath.room().budget());
        }
        self.shared.trunk_loaded(trunk.bytes());
        self.trunk = Some((trunk, cache));
        Ok(())
    }

    /// Holds an expert in memory for good, in the place of another of this id.
    pub(crate) fn load_expert(&mut self, id: ExpertId, tensors: &Tensors) -> Result<(), EngineError> {
        let (config, precision) = (self.shared.config.clone(), tensors.precision());
        if self.beneath.is_some() {
            let weights = load_expert(&Packed::default(), &config, id, tensors)?;
            self.unshelve(id);
            self.experts.remove(&id);
            if let Some((beneath, parts)) = self.beneath() {
                beneath.hold(id, weights, precision, parts);
            }
        } else {
            let expert = load_expert(&self.kernels, &config, id, tensors)?;
            self.unshelve(id);
            self.experts.insert(id, (expert, precision));
        }
        self.shared.expert_loaded(id, precision, tensors.data_bytes());
        self.note_device();
        Ok(())
    }

    /// Puts an expert on the shelf: it is read when it is needed.
    pub(crate) fn shelve_expert(&mut self, id: ExpertId, tensors: &Tensors) -> Result<(), EngineError> {
        check_expert(&self.shared.config, id, tensors)?;
        if self.shelf.is_none() {
            let options = &self.shared.options;
            let shelf = Shelf::new(self.shared.tier_bytes(), options.readers);
            self.shelf = Some(shelf.map_err(|error| TierError::Start { why: error.to_string() })?);
        }
        let on_shelf = self.shelf.as_ref().is_some_and(|shelf| shelf.precision(id).is_some());
        let Some((shelf, mut hands)) = self.shelf() else { return Ok(()) };
        shelf.add(id, tensors, &mut hands)?;
        if !on_shelf || self.beneath.is_some() {
            self.experts.remove(&id); // of what was held until now
        }
        if let Some(beneath) = &mut self.beneath {
            let weights = load_expert(&Packed::default(), &self.shared.config, id, tensors)?;
            beneath.shelve(id, tensors.precision(), &weights, &self.kernels);
        }
        self.note_device();
        self.shared.expert_shelved(id, tensors.precision(), tensors.data_bytes());
        Ok(())
    }

    /// Gives experts on disk another budget of memory.
    pub(crate) fn set_tier_bytes(&mut self, bytes: u64) {
        self.shared.set_tier_bytes(bytes);
        if let Some((shelf, mut hands)) = self.shelf() {
            shelf.set_budget(bytes, &mut hands);
        }
        self.note_shelf();
    }

    /// Whether the expert was held.
    pub(crate) fn drop_expert(&mut self, id: ExpertId) -> bool {
        self.shared.expert_dropped(id);
        let shelved = self.unshelve(id);
        let beneath = self.beneath.as_mut().is_some_and(|beneath| beneath.forget(id));
        let held = self.experts.remove(&id).is_some() || shelved || beneath;
        if let Some((beneath, (kernels, experts))) = self.beneath() {
            beneath.fill(kernels, experts);
        }
        self.note_device();
        held
    }

    fn unshelve(&mut self, id: ExpertId) -> bool {
        self.shelf().is_some_and(|(shelf, mut hands)| shelf.remove(id, &mut hands))
    }

    fn shelf(&mut self) -> Option<(&mut Shelf, Hands<'_, K>)> {
        let Self { kernels, shared, experts, beneath, shelf, .. } = self;
        let hands = Hands { kernels, config: &shared.config, experts, beneath: beneath.as_mut() };
        shelf.as_mut().map(|shelf| (shelf, hands))
    }

    /// At which precision the expert is held, if it is, in memory or on the shelf.
    pub(crate) fn precision(&self, id: ExpertId) -> Option<Precision> {
        let beneath = || self.beneath.as_ref().and_then(|beneath| beneath.precision(id));
        let shelved = || self.shelf.as_ref().and_then(|shelf| shelf.precision(id));
        self.experts.get(&id).map(|(_, precision)| *precision).or_else(beneath).or_else(shelved)
    }

    /// Whether the expert is the shelf's to bring, be it in memory at the moment or not: one that has a copy on a device
    /// beside it needs none.
    pub(crate) fn is_shelved(&self, id: ExpertId) -> bool {
        let on_shelf = self.shelf.as_ref().is_some_and(|shelf| shelf.precision(id).is_some());
        on_shelf && !(self.beneath.is_some() && self.experts.contains_key(&id))
    }

    /// Whether experts may lie in host memory beneath the device.
    pub(crate) fn has_beneath(&self) -> bool {
        self.beneath.is_some()
    }

    fn beneath(&mut self) -> Option<(&mut Beneath, (&K, &mut Experts<K>))> {
        let Self { kernels, experts, beneath, .. } = self;
        beneath.as_mut().map(|beneath| (beneath, (&*kernels, experts)))
    }

    /// Whether some do.
    fn lie_beneath(&self) -> bool {
        self.beneath.as_ref().is_some_and(Beneath::holds_any)
    }

    /// Brings up what is worth it of these, which a layer needs by so many of its `rows` each; those that are in memory, and
    /// will be computed by the host now.
    pub(crate) fn bring_up(&mut self, needs: &[(ExpertId, usize)], rows: usize) -> Vec<ExpertId> {
        let Some((beneath, (kernels, experts))) = self.beneath() else { return Vec::new() };
        let here = |id: &ExpertId| experts.contains_key(id) || beneath.weights(*id).is_some();
        let share = |needed: usize| needed as f64 / rows.max(1) as f64;
        let needs = needs.iter().filter(|(id, _)| here(id));
        let needs: Vec<_> = needs.map(|(id, rows)| Need { id: *id, rows: *rows, share: share(*rows) }).collect();
        let moved = beneath.need(&needs, kernels, experts);
        let by_host = needs.iter().map(|need| need.id).filter(|id| !experts.contains_key(id)).collect();
        if moved {
            self.note_device();
        }
        self.note_uses();
        by_host
    }

    /// Whether experts may have to be waited for.
    pub(crate) fn has_shelf(&self) -> bool {
        self.shelf.is_some()
    }

    /// Whether the experts of the next layer are predicted.
    pub(crate) fn looks_ahead(&self) -> bool {
        self.has_shelf() || self.lie_beneath() || self.shared.options.foresee
    }

    /// A flight begins.
    pub(crate) fn tick(&mut self) {
        if let Some(shelf) = &mut self.shelf {
            shelf.tick();
        }
        if let Some(beneath) = &mut self.beneath {
            beneath.tick();
        }
    }

    /// A claim on the shelf, which must be [released](Self::release).
    pub(crate) fn claim(&mut self) -> Option<ClaimId> {
        self.shelf.as_mut().map(Shelf::claim)
    }

    /// `claim` needs these experts of the shelf, now.
    pub(crate) fn need(&mut self, claim: ClaimId, ids: &[ExpertId]) {
        if let Some((shelf, mut hands)) = self.shelf() {
            shelf.need(claim, ids, &mut hands);
        }
    }

    /// `claim` will need these next, it seems.
    pub(crate) fn foresee(&mut self, claim: ClaimId, ids: &[ExpertId]) {
        let ids: Vec<ExpertId> = ids.iter().copied().filter(|id| self.is_shelved(*id)).collect();
        if let Some((shelf, mut hands)) = self.shelf() {
            shelf.foresee(claim, &ids, &mut hands);
        }
    }

    /// Brings up what is worth it of these, which are needed next, it seems. Nothing that is on the device may be needed
    /// any more by the layer before.
    pub(crate) fn bring_up_ahead(&mut self, ids: &[ExpertId]) {
        let Some((beneath, (kernels, experts))) = self.beneath() else { return };
        if beneath.foresee(ids, kernels, experts) {
            self.note_device();
        }
    }

    /// What `claim` needs and can compute now.
    pub(crate) fn ready(&mut self, claim: ClaimId) -> Result<Vec<ExpertId>, TierError> {
        self.shelf.as_mut().map_or(Ok(Vec::new()), |shelf| shelf.ready(claim))
    }

    pub(crate) fn is_ready(&self, claim: ClaimId) -> bool {
        self.shelf.as_ref().is_some_and(|shelf| shelf.is_ready(claim))
    }

    /// `claim` has computed these, each for a share of its rows.
    pub(crate) fn computed(&mut self, claim: ClaimId, ids: &[(ExpertId, f64)]) {
        // What has a copy on a device beside it is not needed in host memory: its use is no reason to stay there.
        let beneath = self.beneath.is_some();
        let share = |id: &ExpertId, share: f64| if beneath && self.experts.contains_key(id) { 0.0 } else { share };
        let ids: Vec<_> = ids.iter().map(|(id, of)| (*id, share(id, *of))).collect();
        if let Some((shelf, mut hands)) = self.shelf() {
            shelf.computed(claim, &ids, &mut hands);
        }
    }

    /// Nothing is needed by `claim` any more.
    pub(crate) fn release(&mut self, claim: ClaimId) {
        if let Some((shelf, mut hands)) = self.shelf() {
            shelf.release(claim, &mut hands);
        }
    }

    /// Ready when something has come from disk.
    pub(crate) fn poll_shelf(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.shelf.as_mut().map_or(Poll::Pending, |shelf| shelf.poll(context))
    }

    /// Sees to what has come from disk.
    pub(crate) fn settle(&mut self) {
        let Some((shelf, mut hands)) = self.shelf() else { return };
        shelf.settle(&mut hands);
        self.note_shelf();
    }

    fn note_shelf(&self) {
        let Some(shelf) = &self.shelf else { return };
        let bytes_in_memory = shelf.bytes();
        let (counts, bytes_read, in_memory) = (shelf.residency().counts(), shelf.bytes_read(), shelf.in_memory());
        self.shared.meter.update(|stats| {
            (stats.hits, stats.misses) = (counts.hits, counts.misses);
            (stats.prefetched, stats.prefetch_used) = (counts.ahead, counts.ahead_used);
            (stats.bytes_read, stats.in_memory) = (bytes_read, in_memory);
            stats.bytes_in_memory = bytes_in_memory;
        });
    }

    /// What is on the device, for the ledger.
    fn note_device(&self) {
        let Some(beneath) = &self.beneath else { return };
        self.shared.meter.update(|stats| {
            (stats.device.experts, stats.device.bytes) = (self.experts.len(), beneath.room().used());
            stats.device.shelved_bytes = beneath.shelved_bytes();
            stats.device.bytes_raised = beneath.raised_bytes();
        });
    }

    fn note_uses(&self) {
        let Some(beneath) = &self.beneath else { return };
        let uses = beneath.room().uses();
        self.shared.meter.update(|stats| {
            (stats.device.hits, stats.device.raised) = (uses.there, uses.brought);
            stats.device.by_host = uses.beneath;
        });
    }

    /// What a flight borrows.
    pub(crate) fn core(&mut self) -> Result<Core<'_, K>, EngineError> {
        let (trunk, cache) = self.trunk.as_mut().ok_or(EngineError::NoTrunk)?;
        Ok(Core { kernels: &mut self.kernels, trunk, cache })
    }

    /// The next layer with experts after those before `layer`.
    pub(crate) fn sparse_layer_from(&self, layer: usize) -> Option<usize> {
        self.shared.config.sparse_layers().find(|sparse| *sparse >= layer)
    }

    /// What the rows of a flight will need in the next layer with experts, it seems, `known` of this one's outputs.
    pub(crate) fn predict(&mut self, flight: &Flight<K>, known: &Outputs) -> Result<Vec<Vec<Route>>, EngineError> {
        let predictor = self.shared.options.predictor;
        Ok(predictor.predict(&mut self.core()?, flight, known))
    }

    /// The awaited experts of a flight, as far as they are in memory, and the one that all rows share.
    pub(crate) fn run_held(&mut self, flight: &Flight<K>) -> Result<Outputs, EngineError> {
        self.run(flight, |_| true, true)
    }

    /// Those of `ids` into `outputs`; all must be in memory.
    pub(crate) fn run_more(
        &mut self,
        flight: &Flight<K>,
        ids: &[ExpertId],
        outputs: &mut Outputs,
    ) -> Result<(), EngineError> {
        if let Some(id) = ids.iter().find(|id| !self.is_here(**id)) {
            return Err(EngineError::NotHeld(*id));
        }
        let more = self.run(flight, |id| ids.contains(&id), false)?;
        outputs.join(more, self.shared.config.hidden_size);
        Ok(())
    }

    /// Whether the expert can be computed now.
    fn is_here(&self, id: ExpertId) -> bool {
        self.experts.contains_key(&id) || self.weights(id).is_some()
    }

    fn weights(&self, id: ExpertId) -> Option<&Gated<Weight>> {
        self.beneath.as_ref().and_then(|beneath| beneath.weights(id))
    }

    /// Those of the awaited experts that are wanted and in memory: the device is told what it has, then the host computes
    /// what it has, then the device is waited for.
    fn run(
        &mut self,
        flight: &Flight<K>,
        wanted: impl Fn(ExpertId) -> bool,
        shared: bool,
    ) -> Result<Outputs, EngineError> {
        let layer = flight.layer();
        let (mut slots, mut work) = (Vec::new(), Vec::new());
        if self.beneath.is_some() {
            for (index, pairs) in by_expert(flight.routes()) {
                let id = ExpertId { layer, index };
                if wanted(id) && !self.experts.contains_key(&id) && self.weights(id).is_some() {
                    slots.extend(pairs.iter().map(|pair| pair.slot));
                    work.push((id, pairs.iter().map(|pair| pair.row).collect::<Vec<u32>>()));
                }
            }
        }
        // Before the device is busy: it answers in order.
        let rows = (!work.is_empty()).then(|| flight.rows());
        let (trunk, cache) = self.trunk.as_mut().ok_or(EngineError::NoTrunk)?;
        let mut core = Core { kernels: &mut self.kernels, trunk, cache };
        let experts = &self.experts;
        let held = |index| {
            let id = ExpertId { layer, index };
            experts.get(&id).filter(|_| wanted(id)).map(|(expert, _)| expert)
        };
        let running = flight.run(&mut core, held, shared);
        let by_host = rows.zip(self.beneath.as_mut()).map(|(rows, beneath)| {
            let hidden = self.shared.config.hidden_size;
            beneath.compute(rows, hidden, &work)
        });
        let mut outputs = running.outputs();
        if let Some(by_host) = by_host {
            outputs.add(&slots, &by_host);
        }
        Ok(outputs)
    }

    /// Experts over the rows of a checked call, in its order; all must be in memory.
    pub(crate) fn run_experts(
        &mut self,
        layer: u16,
        rows: &[f32],
        calls: &[(u16, Vec<u32>)],
    ) -> Result<Vec<f32>, EngineError> {
        let (mut work, mut by_host) = (Vec::new(), Vec::new());
        for (index, rows) in calls {
            // Known before anything is computed: a stale placement costs its caller no time.
            let id = ExpertId { layer, index: *index };
            match self.experts.get(&id) {
                Some((expert, _)) => work.push(ExpertWork { expert, rows }),
                None if self.is_here(id) => by_host.push((id, rows.clone())),
                None => return Err(EngineError::NotHeld(id)),
            }
        }
        let hidden = self.shared.config.hidden_size;
        let running = work.iter().any(|work| !work.rows.is_empty()).then(|| {
            let input = self.kernels.upload(rows.to_vec(), hidden);
            self.kernels.experts(&input, &work)
        });
        let beneath = self.beneath.as_mut().filter(|_| !by_host.is_empty());
        let Some(beneath) = beneath else { return Ok(running.map_or_else(Vec::new, download)) };
        let by_host_outputs = beneath.compute(rows.to_vec(), hidden, &by_host);
        let by_device = running.map_or_else(Vec::new, download);
        let (mut by_host_outputs, mut by_device) = (by_host_outputs.as_slice(), by_device.as_slice());
        let mut outputs = Vec::with_capacity(by_host_outputs.len() + by_device.len());
        for (index, rows) in calls {
            let of = match self.experts.contains_key(&ExpertId { layer, index: *index }) {
                true => &mut by_device,
                false => &mut by_host_outputs,
            };
            let (mine, rest) = of.split_at(rows.len() * hidden);
            outputs.extend_from_slice(mine);
            *of = rest;
        }
        Ok(outputs)
    }
}
