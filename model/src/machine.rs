//! All tensors of a device, and what is computed with them.
//!
//! Owns [`Machine`]: kernels, trunk, KV cache and experts. The compute thread owns the one there is, so nothing here is
//! locked. The invariant: an expert is either whole or not held, and what is held is in the ledger.

use std::{collections::HashMap, sync::Arc};

use crate::{
    decoder::{Core, Flight, KvCache, Outputs},
    engine::{EngineError, Shared},
    kernels::{ExpertWork, Gated, Kernels, download},
    layout::ExpertId,
    slices::Precision,
    tensors::Tensors,
    trunk::{Trunk, load_expert},
};

pub(crate) struct Machine<K: Kernels> {
    kernels: K,
    pub(crate) shared: Arc<Shared>,
    trunk: Option<(Trunk<K>, KvCache<K>)>,
    experts: HashMap<ExpertId, (Gated<K::Matrix>, Precision)>,
}

impl<K: Kernels> Machine<K> {
    pub(crate) fn new(kernels: K, shared: Arc<Shared>) -> Self {
        Self { kernels, shared, trunk: None, experts: HashMap::new() }
    }

    pub(crate) fn load_trunk(&mut self, tensors: &Tensors) -> Result<(), EngineError> {
        if self.trunk.is_some() {
            return Err(EngineError::TrunkLoaded);
        }
        let config = self.shared.config.clone();
        let trunk = Trunk::load(&self.kernels, config.clone(), tensors)?;
        let (pages, page_tokens) = self.shared.pool_size();
        let cache = KvCache::new(&self.kernels, &config, pages, page_tokens);
        self.shared.trunk_loaded(trunk.bytes());
        self.trunk = Some((trunk, cache));
        Ok(())
    }

    pub(crate) fn load_expert(&mut self, id: ExpertId, tensors: &Tensors) -> Result<(), EngineError> {
        let expert = load_expert(&self.kernels, &self.shared.config, id, tensors)?;
        self.experts.insert(id, (expert, tensors.precision()));
        self.shared.expert_loaded(id, tensors.precision(), tensors.data_bytes());
        Ok(())
    }

    /// Whether the expert was held.
    pub(crate) fn drop_expert(&mut self, id: ExpertId) -> bool {
        self.shared.expert_dropped(id);
        self.experts.remove(&id).is_some()
    }

    /// At which precision the expert is held, if it is.
    pub(crate) fn precision(&self, id: ExpertId) -> Option<Precision> {
        self.experts.get(&id).map(|(_, precision)| *precision)
    }

    /// What a flight borrows.
    pub(crate) fn core(&mut self) -> Result<Core<'_, K>, EngineError> {
        let (trunk, cache) = self.trunk.as_mut().ok_or(EngineError::NoTrunk)?;
        Ok(Core { kernels: &mut self.kernels, trunk, cache })
    }

    /// The awaited experts of a flight, as far as they are held.
    pub(crate) fn run_held(&mut self, flight: &Flight<K>) -> Result<Outputs, EngineError> {
        let (trunk, cache) = self.trunk.as_mut().ok_or(EngineError::NoTrunk)?;
        let mut core = Core { kernels: &mut self.kernels, trunk, cache };
        let (experts, layer) = (&self.experts, flight.layer());
        Ok(flight.run_held(&mut core, |index| experts.get(&ExpertId { layer, index }).map(|(expert, _)| expert)))
    }

    /// Experts over the rows of a checked call, in its order.
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
