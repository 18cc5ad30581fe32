//! Expert calls of peers.
//!
//! A call whose experts are all in memory is one call of the kernels. Otherwise each expert is computed as it arrives
//! from disk. The invariant: outputs are in the call's order.

use std::collections::{BTreeMap, BTreeSet};

use coel_kernels::DeviceWork;
use coel_weights::layout::ExpertId;

use super::Executor;
use crate::serve::{error::EngineError, jobs::RemoteCall, remote_calls::PendingCall};

impl Executor {
    /// Takes a call whose experts are all held.
    pub(crate) fn begin_call(&mut self, call: RemoteCall) -> Result<PendingCall, EngineError> {
        let ids = call.experts.iter().map(|(index, _)| ExpertId { layer: call.layer, index: *index });
        // Checked before anything is computed: a stale placement costs the caller no time.
        if let Some(id) = ids.clone().find(|id| self.precision(*id).is_none()) {
            return Err(EngineError::NotHeld(id));
        }
        let from_disk: Vec<ExpertId> = ids.filter(|id| self.comes_from_disk(*id)).collect();
        let claim = if from_disk.is_empty() { None } else { self.claim() };
        if let Some(claim) = claim {
            self.need(claim, &from_disk);
        }
        let outputs = vec![None; call.experts.len()];
        Ok(PendingCall { call, claim, outputs, on_cpu: BTreeSet::new() })
    }

    /// Computes the experts that are in memory; whether the call is complete.
    pub(crate) fn step_call(&mut self, pending: &mut PendingCall) -> Result<bool, EngineError> {
        let Some(claim) = pending.claim else {
            self.promote_for_call(pending);
            let PendingCall { call, outputs, .. } = pending;
            let computed = self.run_experts(call.layer, &call.rows, &call.experts)?;
            // All outputs together stand in the first expert's place.
            if let Some((first, rest)) = outputs.split_first_mut() {
                *first = Some(computed);
                rest.fill(Some(Vec::new()));
            }
            return Ok(true);
        };
        let id = |layer: u16, index: u16| ExpertId { layer, index };
        // Among them may be experts that were on the GPU when the call came, and were demoted since.
        let open = pending.call.experts.iter().zip(&pending.outputs).filter(|(_, output)| output.is_none());
        let missing = open.map(|((index, _), _)| id(pending.call.layer, *index));
        let missing: Vec<_> = missing.filter(|id| self.comes_from_disk(*id)).collect();
        self.need(claim, &missing);
        let ready = self.ready(claim)?;
        self.promote_for_call(pending);
        let PendingCall { call: RemoteCall { layer, rows, experts }, outputs, .. } = pending;
        for (call, output) in experts.iter().zip(&mut *outputs) {
            let id = id(*layer, call.0);
            if output.is_none() && (ready.contains(&id) || !self.comes_from_disk(id)) {
                *output = Some(self.run_experts(*layer, rows, std::slice::from_ref(call))?);
            }
        }
        // Only after the loop: the call may name an expert more than once.
        let whole = (rows.len() / self.state.config.hidden_size).max(1);
        for id in ready {
            let used: usize = experts.iter().filter(|call| call.0 == id.index).map(|call| call.1.len()).sum();
            self.computed(claim, &[(id, used as f64 / whole as f64)]);
        }
        Ok(outputs.iter().all(Option::is_some))
    }

    /// Ends a call: unpins its experts.
    pub(crate) fn end_call(&mut self, pending: &mut PendingCall) {
        if let Some(claim) = pending.claim.take() {
            self.release(claim);
        }
    }

    /// Promotes to the GPU the call's open experts in host memory that are worth it, and notes the precisions of those
    /// that the CPU will compute.
    fn promote_for_call(&mut self, pending: &mut PendingCall) {
        if !self.has_cpu_offload() {
            return;
        }
        let RemoteCall { layer, rows, experts } = &pending.call;
        let mut needs = BTreeMap::<ExpertId, usize>::new();
        for ((index, rows), _) in experts.iter().zip(&pending.outputs).filter(|(_, output)| output.is_none()) {
            // An expert that is named more than once counts with all its rows.
            *needs.entry(ExpertId { layer: *layer, index: *index }).or_default() += rows.len();
        }
        let rows = rows.len() / self.state.config.hidden_size;
        let on_cpu = self.promote(&needs.into_iter().collect::<Vec<_>>(), rows);
        pending.on_cpu.extend(on_cpu.into_iter().filter_map(|id| self.precision(id)));
    }

    /// Computes experts of a checked call, all of which must be in memory. The outputs in the call's order.
    fn run_experts(&mut self, layer: u16, rows: &[f32], experts: &[(u16, Vec<u32>)]) -> Result<Vec<f32>, EngineError> {
        self.compute(|executor| executor.run_experts_now(layer, rows, experts))
    }

    fn run_experts_now(
        &mut self,
        layer: u16,
        rows: &[f32],
        experts: &[(u16, Vec<u32>)],
    ) -> Result<Vec<f32>, EngineError> {
        let (mut work, mut on_cpu) = (Vec::new(), Vec::new());
        for (index, rows) in experts {
            let id = ExpertId { layer, index: *index };
            match self.experts.get(&id) {
                Some((expert, _)) => work.push(DeviceWork { expert, rows }),
                None if self.is_in_memory(id) => on_cpu.push((id, rows.clone())),
                None => return Err(EngineError::NotHeld(id)),
            }
        }
        let hidden = self.state.config.hidden_size;
        let pending = work.iter().any(|work| !work.rows.is_empty()).then(|| {
            let input = self.kernels.upload(rows.to_vec(), hidden);
            self.kernels.experts(&input, &work)
        });
        // The CPU computes while the device does.
        let on_cpu =
            self.cpu.as_mut().filter(|_| !on_cpu.is_empty()).map(|cpu| cpu.compute(rows.to_vec(), hidden, &on_cpu));
        let on_device = pending.map_or_else(Vec::new, |rows| self.kernels.download(rows));
        let Some(on_cpu) = on_cpu else { return Ok(on_device) };
        let (mut on_cpu, mut on_device) = (on_cpu.as_slice(), on_device.as_slice());
        let mut outputs = Vec::with_capacity(on_cpu.len() + on_device.len());
        for (index, rows) in experts {
            let of = match self.experts.contains_key(&ExpertId { layer, index: *index }) {
                true => &mut on_device,
                false => &mut on_cpu,
            };
            let (mine, rest) = of.split_at(rows.len() * hidden);
            outputs.extend_from_slice(mine);
            *of = rest;
        }
        Ok(outputs)
    }
}
