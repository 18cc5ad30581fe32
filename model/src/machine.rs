//! All tensors of a device, and what is computed with them.
//!
//! Owns [`Machine`]: kernels, trunk, KV cache, experts, and the shelf of experts that wait on disk. The compute thread
//! owns the one there is, so nothing here is locked. The invariant: an expert is whole in memory, or on the shelf, or not
//! held, and what is held is in the ledger. Who needs an expert of the shelf makes a claim, and computes what has come.

use std::{
    collections::HashMap,
    sync::Arc,
    task::{Context, Poll},
};

use crate::{
    config::ModelConfig,
    decoder::{Core, Flight, KvCache, Outputs},
    engine::{EngineError, Shared},
    kernels::{ExpertWork, Gated, Kernels, download},
    layout::ExpertId,
    router::Route,
    slices::Precision,
    tensors::{LoadError, Tensors},
    tiers::{
        TierError,
        residency::ClaimId,
        shelf::{Shelf, Upper},
    },
    trunk::{Trunk, check_expert, load_expert},
};

type Experts<K> = HashMap<ExpertId, (Gated<<K as Kernels>::Matrix>, Precision)>;

pub(crate) struct Machine<K: Kernels> {
    kernels: K,
    pub(crate) shared: Arc<Shared>,
    trunk: Option<(Trunk<K>, KvCache<K>)>,
    /// Those in memory, for good or from the shelf.
    experts: Experts<K>,
    /// There once an expert was put on it.
    shelf: Option<Shelf>,
}

/// Brings experts of the shelf to where they are computed.
struct Hands<'a, K: Kernels> {
    kernels: &'a K,
    config: &'a ModelConfig,
    experts: &'a mut Experts<K>,
}

impl<K: Kernels> Upper for Hands<'_, K> {
    fn came(&mut self, id: ExpertId, precision: Precision, tensors: &Tensors) -> Result<(), LoadError> {
        let expert = load_expert(self.kernels, self.config, id, tensors)?;
        self.experts.insert(id, (expert, precision));
        Ok(())
    }

    fn went(&mut self, id: ExpertId) {
        self.experts.remove(&id);
    }
}

impl<K: Kernels> Machine<K> {
    pub(crate) fn new(kernels: K, shared: Arc<Shared>) -> Self {
        Self { kernels, shared, trunk: None, experts: HashMap::new(), shelf: None }
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
        self.shared.trunk_loaded(trunk.bytes());
        self.trunk = Some((trunk, cache));
        Ok(())
    }

    pub(crate) fn load_expert(&mut self, id: ExpertId, tensors: &Tensors) -> Result<(), EngineError> {
        let expert = load_expert(&self.kernels, &self.shared.config, id, tensors)?;
        self.unshelve(id);
        self.experts.insert(id, (expert, tensors.precision()));
        self.shared.expert_loaded(id, tensors.precision(), tensors.data_bytes());
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
        if !on_shelf {
            self.experts.remove(&id); // it was held for good until now
        }
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
        self.experts.remove(&id).is_some() || shelved
    }

    fn unshelve(&mut self, id: ExpertId) -> bool {
        self.shelf().is_some_and(|(shelf, mut hands)| shelf.remove(id, &mut hands))
    }

    fn shelf(&mut self) -> Option<(&mut Shelf, Hands<'_, K>)> {
        let Self { kernels, shared, experts, shelf, .. } = self;
        let hands = Hands { kernels, config: &shared.config, experts };
        shelf.as_mut().map(|shelf| (shelf, hands))
    }

    /// At which precision the expert is held, if it is, in memory or on the shelf.
    pub(crate) fn precision(&self, id: ExpertId) -> Option<Precision> {
        let shelved = || self.shelf.as_ref().and_then(|shelf| shelf.precision(id));
        self.experts.get(&id).map(|(_, precision)| *precision).or_else(shelved)
    }

    /// Whether the expert is on the shelf, be it in memory at the moment or not.
    pub(crate) fn is_shelved(&self, id: ExpertId) -> bool {
        self.shelf.as_ref().is_some_and(|shelf| shelf.precision(id).is_some())
    }

    /// Whether experts may have to be waited for.
    pub(crate) fn has_shelf(&self) -> bool {
        self.shelf.is_some()
    }

    /// Whether the experts of the next layer are predicted.
    pub(crate) fn looks_ahead(&self) -> bool {
        self.has_shelf() || self.shared.options.foresee
    }

    /// A flight begins.
    pub(crate) fn tick(&mut self) {
        if let Some(shelf) = &mut self.shelf {
            shelf.tick();
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
        if let Some((shelf, mut hands)) = self.shelf() {
            shelf.foresee(claim, ids, &mut hands);
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
        if let Some((shelf, mut hands)) = self.shelf() {
            shelf.computed(claim, ids, &mut hands);
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
        let (trunk, cache) = self.trunk.as_mut().ok_or(EngineError::NoTrunk)?;
        let mut core = Core { kernels: &mut self.kernels, trunk, cache };
        let (experts, layer) = (&self.experts, flight.layer());
        Ok(flight.run_held(&mut core, |index| experts.get(&ExpertId { layer, index }).map(|(expert, _)| expert)))
    }

    /// Those of `ids` into `outputs`; all must be in memory.
    pub(crate) fn run_more(
        &mut self,
        flight: &Flight<K>,
        ids: &[ExpertId],
        outputs: &mut Outputs,
    ) -> Result<(), EngineError> {
        if let Some(id) = ids.iter().find(|id| !self.experts.contains_key(id)) {
            return Err(EngineError::NotHeld(*id));
        }
        let (trunk, cache) = self.trunk.as_mut().ok_or(EngineError::NoTrunk)?;
        let mut core = Core { kernels: &mut self.kernels, trunk, cache };
        let (experts, layer) = (&self.experts, flight.layer());
        let held = |index| {
            let id = ExpertId { layer, index };
            ids.contains(&id).then(|| &experts[&id].0)
        };
        flight.run_more(&mut core, held, outputs);
        Ok(())
    }

    /// Experts over the rows of a checked call, in its order; all must be in memory.
    pub(crate) fn run_experts(
        &mut self,
        layer: u16,
        rows: &[f32],
        calls: &[(u16, Vec<u32>)],
    ) -> Result<Vec<f32>, EngineError> {
        let mut work = Vec::with_capacity(calls.len());
        for (index, rows) in calls {
            // Known before anything is computed: a stale placement costs its caller no time.
            let id = ExpertId { layer, index: *index };
            let (expert, _) = self.experts.get(&id).ok_or(EngineError::NotHeld(id))?;
            work.push(ExpertWork { expert, rows });
        }
        if work.iter().all(|work| work.rows.is_empty()) {
            return Ok(Vec::new());
        }
        let input = self.kernels.upload(rows.to_vec(), self.shared.config.hidden_size);
        Ok(download(self.kernels.experts(&input, &work)))
    }
}
