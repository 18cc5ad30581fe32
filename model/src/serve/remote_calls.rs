//! Expert calls of peers.
//!
//! Owns [`RemoteCalls`]: calls whose experts are not all in memory, and what was computed of each so far. The invariant:
//! every call is answered once, and its outputs are in the call's order, however its experts came. At most
//! [`PENDING_MAX`] wait; whoever feeds the compute thread then waits too.

use std::collections::BTreeSet;

use coel_weights::slices::Precision;

use super::{
    error::EngineError,
    executor::Executor,
    jobs::{Computed, JOBS_MAX, JobReply, RemoteCall},
};
use crate::offload::{cpu::CpuOffload, disk::ClaimId};

/// Calls that may wait at once: as many again as may wait for the compute thread.
const PENDING_MAX: usize = JOBS_MAX;

/// A call that was begun: plain state.
pub(super) struct PendingCall {
    pub(super) call: RemoteCall,
    /// Pins experts that are on disk, if some are.
    pub(super) claim: Option<ClaimId>,
    /// Of each expert of the call, its outputs once it was computed.
    pub(super) outputs: Vec<Option<Vec<f32>>>,
    /// Precisions of experts that the CPU computed beside a GPU.
    pub(super) on_cpu: BTreeSet<Precision>,
}

#[derive(Default)]
pub(super) struct RemoteCalls(Vec<(PendingCall, JobReply<Computed>)>);

impl RemoteCalls {
    pub(super) fn are_full(&self) -> bool {
        self.0.len() >= PENDING_MAX
    }

    /// Answers a call at once if it can, else as soon as its experts have come.
    pub(super) fn take(&mut self, call: RemoteCall, reply: JobReply<Computed>, executor: &mut Executor) {
        match executor.begin_call(call) {
            Ok(pending) => {
                self.0.push((pending, reply));
                self.step(self.0.len() - 1, executor);
            }
            Err(error) => answer(reply, Err(error)),
        }
    }

    /// Computes what can be computed by now.
    pub(super) fn step_all(&mut self, executor: &mut Executor) {
        let mut index = 0;
        while index < self.0.len() {
            index += usize::from(!self.step(index, executor));
        }
    }

    /// Computes what can be computed of one call; whether the call is over, and gone from here. It stays here while it is
    /// computed, so that it is failed with the others if that panics.
    fn step(&mut self, index: usize, executor: &mut Executor) -> bool {
        let (pending, reply) = &mut self.0[index];
        let done = match reply.is_closed() {
            true => Ok(true),
            false => executor.step_call(pending),
        };
        if let Ok(false) = done {
            return false;
        }
        let (mut pending, reply) = self.0.remove(index);
        executor.end_call(&mut pending);
        answer(reply, done.map(|_| pending.finish()));
        true
    }

    /// Fails all calls. Their claims are the caller's to release.
    pub(super) fn fail_all(&mut self, error: impl Fn() -> EngineError) {
        for (_, reply) in std::mem::take(&mut self.0) {
            answer(reply, Err(error()));
        }
    }
}

impl PendingCall {
    fn finish(self) -> Computed {
        let names: Vec<_> = self.on_cpu.iter().map(|precision| precision.name()).collect();
        let cpu_class = (!names.is_empty()).then(|| format!("{}/{}", CpuOffload::class(), names.join("+")));
        Computed { outputs: self.outputs.into_iter().flatten().flatten().collect(), cpu_class }
    }
}

/// The asker may have gone; its answer is then dropped.
fn answer(reply: JobReply<Computed>, result: Result<Computed, EngineError>) {
    let _ = reply.send(result);
}
