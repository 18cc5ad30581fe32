//! The compute thread of an engine.
//!
//! Owns every tensor of a device, through the [`Executor`]. The thread takes jobs from a bounded queue, answers them, and
//! computes batches layer by layer; between two layers it serves the jobs that have come, so that a peer that waits for an
//! expert of ours waits for one layer of our own work and no more. Nothing else ever touches its state, so there is no
//! lock around a tensor.
//!
//! The invariant: every job is answered or fails by name, also when computing it panics. [`Worker::guarded`] is the one
//! place where a panic is caught. All who wait get [`EngineError::Panicked`]. If the panic struck while the device computed,
//! a small computation shows whether it still works, and the thread goes on. Otherwise it ends, and the engine says why
//! ([`Engine::fault`](super::engine::Engine::fault)). The thread does not know who asks.

use std::{
    any::Any,
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc as sync_mpsc},
    task::Poll,
    thread,
    time::Instant,
};

use coel_kernels::DynKernels;
use tokio::sync::mpsc::{self, error::TryRecvError};

use super::{
    batches::{Batches, Turn},
    block_on::block_until,
    device::{Device, open},
    error::EngineError,
    executor::Executor,
    jobs::{JOBS_MAX, Job, JobReply},
    remote_calls::RemoteCalls,
    state::EngineState,
};
use crate::system::lower_priority;

/// Starts the thread of a resolved device and returns its kernel class once a first computation has worked.
pub(super) fn start(
    device: Device,
    state: Arc<EngineState>,
    queue: mpsc::Receiver<Job>,
) -> Result<String, EngineError> {
    let (ready, started) = sync_mpsc::channel();
    let run = move || {
        if state.options.low_priority {
            lower_priority();
        }
        let threads = state.options.threads;
        run(|| open(device, threads), state, queue, ready);
    };
    let thread = thread::Builder::new().name(format!("coel-{device}")).spawn(run);
    thread.map_err(|error| EngineError::Start(error.to_string()))?;
    started.recv().map_err(|_| EngineError::Start(format!("{device} failed its first computation")))?
}

fn run(
    open: impl FnOnce() -> Result<Box<dyn DynKernels>, String>,
    state: Arc<EngineState>,
    mut queue: mpsc::Receiver<Job>,
    ready: sync_mpsc::Sender<Result<String, EngineError>>,
) {
    // A device backend may panic where a driver is broken: that is a device that does not start, no more.
    let first = catch_unwind(AssertUnwindSafe(|| {
        let mut kernels = open()?;
        kernels.works().then_some(kernels).ok_or_else(|| "its first computation came out wrong".to_owned())
    }));
    let kernels = match first {
        Ok(Ok(kernels)) => kernels,
        Ok(Err(why)) => {
            let _ = ready.send(Err(EngineError::Start(why)));
            return;
        }
        Err(_) => return, // dropping `ready` says so
    };
    let _ = ready.send(Ok(kernels.class())); // whoever started the thread waits for this
    let _fault = FaultOnPanic(state.clone());
    let mut worker = Worker::new(kernels, state);
    let mut job = None;
    while let Some(turn) = worker.guarded(job.take(), &mut queue, &Instant::now) {
        let Turn::Wait(until) = turn else { continue };
        let Worker { batches, executor, remote_calls, .. } = &mut worker;
        let stalled = batches.wait_for_disk().then(Instant::now);
        let awaited = poll_fn(|context| {
            let came = batches.poll_answers(context).is_ready() | executor.poll_disk(context).is_ready();
            match came {
                true => Poll::Ready(Some(Job::Wake)),
                // A full thread takes no more jobs, but it notices when the askers are gone.
                false if remote_calls.are_full() => Poll::Pending,
                false => queue.poll_recv(context),
            }
        });
        let received = block_until(awaited, until);
        if let Some(since) = stalled {
            executor.state().meter.update(|stats| stats.stall += since.elapsed());
        }
        match received {
            Some(Some(received)) => job = Some(received),
            Some(None) => return,
            None => {}
        }
    }
    // Before the device is let go of, which may take long where it is lost: no job is accepted any more.
    drop(queue);
}

/// A panic outside of [`Worker::guarded`] ends the thread; the engine then says so.
struct FaultOnPanic(Arc<EngineState>);

impl Drop for FaultOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.set_fault("a panic while the compute thread waited; see the log".to_owned());
        }
    }
}

struct Worker {
    executor: Executor,
    batches: Batches,
    remote_calls: RemoteCalls,
    /// Waits until experts on disk keep within their budget of memory.
    shrinking: Option<JobReply<()>>,
}

/// The asker may have gone; its answer is then dropped.
fn answer<T>(reply: JobReply<T>, result: Result<T, EngineError>) {
    let _ = reply.send(result);
}

impl Worker {
    fn new(kernels: Box<dyn DynKernels>, state: Arc<EngineState>) -> Self {
        let batches = Batches::new(&state.options);
        Self { batches, executor: Executor::new(kernels, state), remote_calls: RemoteCalls::default(), shrinking: None }
    }

    /// A [round](Self::round) that survives a panic, if the device does. Nothing if the thread is to end.
    fn guarded(
        &mut self,
        job: Option<Job>,
        queue: &mut mpsc::Receiver<Job>,
        clock: &dyn Fn() -> Instant,
    ) -> Option<Turn> {
        match catch_unwind(AssertUnwindSafe(|| self.round(job, queue, clock))) {
            Ok(turn) => turn,
            Err(panic) => self.recover(message(&*panic)).then_some(Turn::Again),
        }
    }

    /// Serves the jobs that have come, then computes at most one layer. Nothing if all who could send jobs are gone.
    fn round(
        &mut self,
        job: Option<Job>,
        queue: &mut mpsc::Receiver<Job>,
        clock: &dyn Fn() -> Instant,
    ) -> Option<Turn> {
        if let Some(job) = job {
            self.work(job);
        }
        for _ in 0..JOBS_MAX {
            if self.remote_calls.are_full() {
                break;
            }
            match queue.try_recv() {
                Ok(job) => self.work(job),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return None,
            }
        }
        for session in self.executor.state().take_closed() {
            self.batches.gone(session);
        }
        self.executor.settle();
        self.remote_calls.step_all(&mut self.executor);
        let turn = self.batches.turn(&mut self.executor, clock);
        if let Some(reply) = self.shrinking.take_if(|_| self.executor.is_disk_cache_within_budget()) {
            answer(reply, Ok(()));
        }
        self.executor.state().activity.set_waiting(self.batches.waiting());
        Some(turn)
    }

    fn work(&mut self, job: Job) {
        let executor = &mut self.executor;
        match job {
            Job::LoadTrunk { tensors, embedding_on_disk, reply } => {
                answer(reply, executor.load_trunk(&tensors, embedding_on_disk));
            }
            Job::LoadExpert { id, tensors, reply } => {
                answer(reply, executor.load_expert(id, &tensors));
            }
            Job::LoadExpertOnDisk { id, tensors, reply } => {
                answer(reply, executor.load_expert_on_disk(id, &tensors));
            }
            Job::SetDiskCacheBytes { bytes, reply } => {
                executor.set_disk_cache_bytes(bytes);
                if let Some(earlier) = self.shrinking.replace(reply) {
                    answer(earlier, Ok(()));
                }
            }
            Job::DropExpert { id, reply } => answer(reply, Ok(executor.drop_expert(id))),
            Job::RunExperts { call, reply } => self.remote_calls.take(call, reply, executor),
            Job::Advance { advance, reply } => self.batches.ask(advance, reply),
            Job::Wake => {}
        }
    }

    /// Fails everything that is under way, and tries the device if the panic struck while it computed. Whether the thread can
    /// go on: a panic elsewhere, while experts changed places, may have left their accounts torn.
    fn recover(&mut self, why: String) -> bool {
        let state = self.executor.state().clone();
        state.set_panicked(&why);
        let panicked = || EngineError::Panicked(why.clone());
        let was_computing = self.executor.was_computing();
        let recovered = catch_unwind(AssertUnwindSafe(|| {
            // A fresh queue: what the old one counted as in a batch may be in none.
            std::mem::replace(&mut self.batches, Batches::new(&state.options)).fail_all(panicked);
            self.remote_calls.fail_all(panicked);
            was_computing && {
                self.executor.release_all();
                self.executor.kernels().works()
            }
        }));
        if let Ok(true) = recovered {
            tracing::error!(panic = why, "the compute thread panicked; what was under way has failed, and it goes on");
            return true;
        }
        let fault = match was_computing {
            true => format!("the device does not work any more after a panic: {why}"),
            false => format!("a panic while weights were being loaded or moved: {why}"),
        };
        tracing::error!("the compute thread ends: {fault}");
        state.set_fault(fault);
        false
    }
}

/// What a panic says.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests;
