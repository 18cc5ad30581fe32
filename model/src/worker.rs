//! The compute thread of an engine.
//!
//! Owns every tensor of a device. It takes jobs from a bounded queue, answers them, and flies requests of sessions
//! layer by layer; between two layers it serves the jobs that have come, so that whoever waits for an expert of ours
//! waits for one layer of our own work and no more. Nothing else ever touches its state, so there is no lock around a
//! tensor. The invariant: whatever a job says, the thread answers it and lives on. It does not know who asks.

use std::{
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc as sync_mpsc},
    task::Poll,
    thread,
    time::Instant,
};

use tokio::sync::{
    mpsc::{self, error::TryRecvError},
    oneshot,
};

use crate::{
    block::block_until,
    decoder::Want,
    device::{Device, vulkan},
    duties::{Call, Duties},
    engine::{EngineError, JOBS_MAX, Shared},
    flights::{Flights, Turn},
    kernels::{
        Kernels,
        cube::{CudaCube, VulkanCube},
        isa::Isa,
        packed::Packed,
        works,
    },
    layout::ExpertId,
    machine::Machine,
    scheduler::SessionId,
    session::{Advanced, Lease, Routes},
    tensors::Tensors,
};

/// Added to the compute thread's nice value when low priority is asked for.
#[cfg(target_os = "linux")]
const NICE: libc::c_int = 10;

pub(crate) type Reply<T> = oneshot::Sender<Result<T, EngineError>>;

/// What the thread can be asked.
pub(crate) enum Job {
    LoadTrunk {
        tensors: Tensors,
        embedding_on_disk: bool,
        reply: Reply<()>,
    },
    LoadExpert {
        id: ExpertId,
        tensors: Tensors,
        reply: Reply<()>,
    },
    ShelveExpert {
        id: ExpertId,
        tensors: Tensors,
        reply: Reply<()>,
    },
    DropExpert {
        id: ExpertId,
        reply: Reply<bool>,
    },
    TierBytes {
        bytes: u64,
        reply: Reply<()>,
    },
    Advance {
        advance: Advance,
        reply: Reply<(Advanced, Routes)>,
    },
    RunExperts(Call),
    /// Sessions were dropped.
    Sweep,
}

/// Tokens to be appended to a session; they were checked.
pub(crate) struct Advance {
    pub(crate) session: SessionId,
    pub(crate) lease: Arc<Lease>,
    /// Tokens of the session whose keys and values are stored.
    pub(crate) past: usize,
    pub(crate) tokens: Vec<u32>,
    pub(crate) want: Want,
    /// Whether the routes are to be told.
    pub(crate) watch: bool,
}

/// Starts the thread of a resolved device and returns its kernel class once a first computation has worked.
pub(crate) fn start(device: Device, shared: Arc<Shared>, queue: mpsc::Receiver<Job>) -> Result<String, EngineError> {
    let (ready, started) = sync_mpsc::channel();
    let run = move || {
        if shared.options.low_priority {
            lower_priority();
        }
        match device {
            Device::Cuda(index) => {
                run(move || Ok(CudaCube::at(index)), shared, queue, ready);
            }
            Device::Vulkan(number) => {
                run(move || vulkan::open(number).map(VulkanCube::on), shared, queue, ready);
            }
            Device::Cpu | Device::Auto => {
                let threads = shared.options.threads;
                run(move || Ok(Packed::new(Isa::best(), threads)), shared, queue, ready);
            }
        }
    };
    let thread = thread::Builder::new().name(format!("coel-{device}")).spawn(run);
    thread.map_err(|error| EngineError::Start(error.to_string()))?;
    started.recv().map_err(|_| EngineError::Start(format!("{device} failed its first computation")))?
}

fn run<K: Kernels>(
    make: impl FnOnce() -> Result<K, String>,
    shared: Arc<Shared>,
    mut queue: mpsc::Receiver<Job>,
    ready: sync_mpsc::Sender<Result<String, EngineError>>,
) {
    // A device backend may panic where a driver is broken: that is a device that does not start, no more.
    let first = catch_unwind(AssertUnwindSafe(|| {
        let mut kernels = make()?;
        works(&mut kernels).then_some(kernels).ok_or_else(|| "its first computation came out wrong".to_owned())
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
    let mut worker = Worker::new(kernels, shared);
    while let Some(turn) = worker.round(&mut queue, &Instant::now) {
        let Turn::Wait(until) = turn else { continue };
        let Worker { flights, machine, duties } = &mut worker;
        let stalled = flights.wait_for_disk().then(Instant::now);
        let awaited = poll_fn(|context| {
            let arrived = flights.poll_arrivals(context).is_ready() | machine.poll_shelf(context).is_ready();
            match arrived {
                true => Poll::Ready(Some(Job::Sweep)),
                // Who is busy enough takes no more jobs, but those who gave some must not be gone unnoticed.
                false if duties.are_full() => Poll::Pending,
                false => queue.poll_recv(context),
            }
        });
        let job = block_until(awaited, until);
        if let Some(since) = stalled {
            machine.shared.meter.update(|stats| stats.stall += since.elapsed());
        }
        match job {
            Some(Some(job)) => worker.work(job),
            Some(None) => return,
            None => {}
        }
    }
}

#[cfg(target_os = "linux")]
pub(crate) fn lower_priority() {
    // SAFETY: plain system call; on Linux, process 0 means the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0 {
        tracing::debug!("the compute thread keeps its priority: {}", std::io::Error::last_os_error());
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn lower_priority() {
    tracing::debug!("thread priorities are lowered on Linux only");
}

struct Worker<K: Kernels> {
    machine: Machine<K>,
    flights: Flights<K>,
    duties: Duties,
}

/// The asker may have gone; its answer is then dropped.
fn answer<T>(reply: Reply<T>, result: Result<T, EngineError>) {
    let _ = reply.send(result);
}

impl<K: Kernels> Worker<K> {
    fn new(kernels: K, shared: Arc<Shared>) -> Self {
        let flights = Flights::new(&shared.options);
        Self { flights, machine: Machine::new(kernels, shared), duties: Duties::default() }
    }

    /// Serves the jobs that have come, then computes at most one layer. Nothing if all who could send jobs are gone.
    fn round(&mut self, queue: &mut mpsc::Receiver<Job>, clock: &dyn Fn() -> Instant) -> Option<Turn> {
        for _ in 0..JOBS_MAX {
            if self.duties.are_full() {
                break;
            }
            match queue.try_recv() {
                Ok(job) => self.work(job),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return None,
            }
        }
        for session in self.machine.shared.take_closed() {
            self.flights.gone(session);
        }
        self.machine.settle();
        self.duties.go_on(&mut self.machine);
        let turn = self.flights.turn(&mut self.machine, clock);
        self.machine.shared.activity.waiting(self.flights.waiting());
        Some(turn)
    }

    fn work(&mut self, job: Job) {
        let machine = &mut self.machine;
        match job {
            Job::LoadTrunk { tensors, embedding_on_disk, reply } => {
                answer(reply, machine.load_trunk(&tensors, embedding_on_disk));
            }
            Job::LoadExpert { id, tensors, reply } => answer(reply, machine.load_expert(id, &tensors)),
            Job::ShelveExpert { id, tensors, reply } => answer(reply, machine.shelve_expert(id, &tensors)),
            Job::TierBytes { bytes, reply } => {
                machine.set_tier_bytes(bytes);
                answer(reply, Ok(()));
            }
            Job::DropExpert { id, reply } => answer(reply, Ok(machine.drop_expert(id))),
            Job::RunExperts(call) => self.duties.take(call, machine),
            Job::Advance { advance, reply } => self.flights.ask(advance, reply),
            Job::Sweep => {}
        }
    }
}

#[cfg(test)]
mod tests;
