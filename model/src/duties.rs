//! Expert calls of peers that wait for the disk.
//!
//! Owns [`Duties`]: calls whose experts are not all in memory, and what was computed of each so far. The invariant: every
//! call is answered once, and its outputs are in the call's order, however its experts came. At most [`DUTIES_MAX`] wait;
//! whoever feeds the compute thread then waits too.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    beneath::Beneath,
    engine::{EngineError, JOBS_MAX},
    kernels::Kernels,
    layout::ExpertId,
    machine::Machine,
    slices::Precision,
    tiers::residency::ClaimId,
    worker::Reply,
};

/// Calls that may wait at once: as many again as may wait for the compute thread.
pub(crate) const DUTIES_MAX: usize = JOBS_MAX;

/// A checked call.
pub(crate) struct Call {
    pub(crate) layer: u16,
    /// `[n, hidden]`
    pub(crate) rows: Vec<f32>,
    /// Experts, each with its rows.
    pub(crate) calls: Vec<(u16, Vec<u32>)>,
    pub(crate) reply: Reply<Computed>,
}

/// What came of an expert call.
#[derive(Clone, Debug, PartialEq)]
pub struct Computed {
    /// One row for each row index of the call, in its order.
    pub outputs: Vec<f32>,
    /// The host's kernel class and precisions, where it took part beneath a device.
    pub by_host: Option<String>,
}

impl Call {
    /// Brings up to the device what is worth it of those experts that are wanted and in memory; adds the precisions of those
    /// that the host will compute.
    fn bring_up<K: Kernels>(
        &self,
        machine: &mut Machine<K>,
        wanted: impl Fn(u16) -> bool,
        by_host: &mut BTreeSet<Precision>,
    ) {
        if !machine.has_beneath() {
            return;
        }
        let mut needs = BTreeMap::new();
        for (index, rows) in self.calls.iter().filter(|(index, _)| wanted(*index)) {
            *needs.entry(ExpertId { layer: self.layer, index: *index }).or_default() += rows.len();
        }
        let rows = self.rows.len() / machine.shared.config.hidden_size;
        let left = machine.bring_up(&needs.into_iter().collect::<Vec<_>>(), rows);
        by_host.extend(left.into_iter().filter_map(|id| machine.precision(id)));
    }
}

struct Duty {
    call: Call,
    claim: ClaimId,
    /// Of each expert of the call, its outputs once it was computed.
    outputs: Vec<Option<Vec<f32>>>,
    /// Precisions of what the host computed beneath a device.
    by_host: BTreeSet<Precision>,
}

#[derive(Default)]
pub(crate) struct Duties(Vec<Duty>);

impl Duties {
    pub(crate) fn are_full(&self) -> bool {
        self.0.len() >= DUTIES_MAX
    }

    /// Answers a call at once if it can, else as soon as its experts have come.
    pub(crate) fn take<K: Kernels>(&mut self, call: Call, machine: &mut Machine<K>) {
        let Call { layer, calls, .. } = &call;
        let id = |(index, _): &(u16, Vec<u32>)| ExpertId { layer: *layer, index: *index };
        let unknown = calls.iter().map(id).find(|id| machine.precision(*id).is_none());
        let shelved: Vec<ExpertId> = calls.iter().map(id).filter(|id| machine.is_shelved(*id)).collect();
        let claim = (!shelved.is_empty()).then(|| machine.claim()).flatten();
        match (unknown, claim) {
            (Some(id), _) => answer(call.reply, Err(EngineError::NotHeld(id)), &BTreeSet::new()),
            (None, None) => {
                let mut by_host = BTreeSet::new();
                call.bring_up(machine, |_| true, &mut by_host);
                let result = machine.run_experts(call.layer, &call.rows, &call.calls);
                answer(call.reply, result, &by_host);
            }
            (None, Some(claim)) => {
                machine.need(claim, &shelved);
                let outputs = vec![None; call.calls.len()];
                self.0.push(Duty { call, claim, outputs, by_host: BTreeSet::new() });
                self.go_on(machine);
            }
        }
    }

    /// Computes what can be computed by now.
    pub(crate) fn go_on<K: Kernels>(&mut self, machine: &mut Machine<K>) {
        for mut duty in std::mem::take(&mut self.0) {
            let done = match duty.call.reply.is_closed() {
                true => Ok(true),
                false => duty.go_on(machine),
            };
            if let Ok(false) = done {
                self.0.push(duty);
                continue;
            }
            machine.release(duty.claim);
            let outputs = duty.outputs.into_iter().flatten().flatten().collect();
            answer(duty.call.reply, done.map(|_| outputs), &duty.by_host);
        }
    }
}

impl Duty {
    /// Whether all is computed.
    fn go_on<K: Kernels>(&mut self, machine: &mut Machine<K>) -> Result<bool, EngineError> {
        let Call { layer, rows, calls, .. } = &self.call;
        // Also what was on a device when the call came, and has gone from there since.
        let missing = calls.iter().zip(&self.outputs).filter(|(_, output)| output.is_none());
        let missing = missing.map(|((index, _), _)| ExpertId { layer: *layer, index: *index });
        let missing: Vec<_> = missing.filter(|id| machine.is_shelved(*id)).collect();
        machine.need(self.claim, &missing);
        let ready = machine.ready(self.claim)?;
        let whole = (rows.len() / machine.shared.config.hidden_size).max(1);
        let open =
            |index: &u16| calls.iter().zip(&self.outputs).any(|(call, output)| call.0 == *index && output.is_none());
        self.call.bring_up(machine, |index| open(&index), &mut self.by_host);
        for (call, output) in calls.iter().zip(&mut self.outputs) {
            let id = ExpertId { layer: *layer, index: call.0 };
            if output.is_none() && (ready.contains(&id) || !machine.is_shelved(id)) {
                *output = Some(machine.run_experts(*layer, rows, std::slice::from_ref(call))?);
            }
        }
        // Not before all calls are through: one expert may be in several of them.
        for id in ready {
            let used: usize = calls.iter().filter(|call| call.0 == id.index).map(|call| call.1.len()).sum();
            machine.computed(self.claim, &[(id, used as f64 / whole as f64)]);
        }
        Ok(self.outputs.iter().all(Option::is_some))
    }
}

/// The asker may have gone; its answer is then dropped.
fn answer(reply: Reply<Computed>, result: Result<Vec<f32>, EngineError>, by_host: &BTreeSet<Precision>) {
    let names: Vec<_> = by_host.iter().map(|precision| precision.name()).collect();
    let by_host = (!names.is_empty()).then(|| format!("{}/{}", Beneath::class(), names.join("+")));
    let _ = reply.send(result.map(|outputs| Computed { outputs, by_host }));
}
