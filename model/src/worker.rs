//! The compute thread of an engine.
//!
//! Owns every tensor of a device: trunk, experts and the caches of all sessions. It takes one job at a time from a
//! bounded queue and answers it; nothing else ever touches its state, so there is no lock around a tensor. The
//! invariant: whatever a job says, the thread answers it and lives on. It does not know who asks.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc as sync_mpsc},
    thread,
};

use tokio::sync::{mpsc, oneshot};

use crate::{
    decoder::{Core, DecodeError, Decoder, Step, Want},
    device::Device,
    engine::{EngineError, Shared},
    experts::{Assembly, ExpertCall},
    kernels::{ExpertWork, Gated, Kernels, download, isa::Isa, packed::Packed, plain::Plain},
    layout::ExpertId,
    tensors::Tensors,
    trunk::{Trunk, load_expert},
};

/// Added to the compute thread's nice value when low priority is asked for.
#[cfg(target_os = "linux")]
const NICE: libc::c_int = 10;

type Reply<T> = oneshot::Sender<Result<T, EngineError>>;

/// What the thread can be asked.
pub(crate) enum Job {
    LoadTrunk {
        tensors: Tensors,
        reply: Reply<()>,
    },
    LoadExpert {
        id: ExpertId,
        tensors: Tensors,
        reply: Reply<()>,
    },
    DropExpert {
        id: ExpertId,
        reply: Reply<bool>,
    },
    OpenSession {
        id: u64,
        capacity: usize,
        reply: Reply<()>,
    },
    Advance {
        session: u64,
        tokens: Vec<u32>,
        want: Want,
        reply: Reply<Step>,
    },
    Resume {
        session: u64,
        outputs: Vec<f32>,
        reply: Reply<Step>,
    },
    Complete {
        session: u64,
        tokens: Vec<u32>,
        want: Want,
        reply: Reply<Vec<f32>>,
    },
    Truncate {
        session: u64,
        used: usize,
        reply: Reply<()>,
    },
    RunExperts {
        layer: u16,
        rows: Vec<f32>,
        calls: Vec<(u16, Vec<u32>)>,
        reply: Reply<Vec<f32>>,
    },
    /// Only frees what dropped sessions held.
    Sweep,
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
                let device = burn_cuda::CudaDevice::new(index);
                run(move || Plain::<burn_cuda::Cuda>::new(device), shared, queue, ready);
            }
            Device::Cpu | Device::Auto => {
                let threads = shared.options.threads;
                run(move || Packed::new(Isa::best(), threads), shared, queue, ready);
            }
        }
    };
    let thread = thread::Builder::new().name(format!("coel-{device}")).spawn(run);
    thread.map_err(|error| EngineError::Start(error.to_string()))?;
    started.recv().map_err(|_| EngineError::Start(format!("{device} failed its first computation")))?
}

fn run<K: Kernels>(
    make: impl FnOnce() -> K,
    shared: Arc<Shared>,
    mut queue: mpsc::Receiver<Job>,
    ready: sync_mpsc::Sender<Result<String, EngineError>>,
) {
    // A device backend may panic where a driver is broken: that is a device that does not start, no more.
    let first = catch_unwind(AssertUnwindSafe(|| {
        let kernels = make();
        let probe = download(kernels.upload(vec![1.0, 2.0], 2) + kernels.upload(vec![1.0, 1.0], 2));
        (probe == [2.0, 3.0]).then_some(kernels)
    }));
    let Ok(Some(kernels)) = first else {
        return; // dropping `ready` says so
    };
    let _ = ready.send(Ok(kernels.class())); // whoever started the thread waits for this
    let mut worker = Worker { kernels, shared, trunk: None, experts: HashMap::new(), sessions: HashMap::new() };
    while let Some(job) = queue.blocking_recv() {
        for session in worker.shared.take_closed() {
            worker.sessions.remove(&session);
        }
        worker.work(job);
    }
}

#[cfg(target_os = "linux")]
fn lower_priority() {
    // SAFETY: plain system call; on Linux, process 0 means the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0 {
        tracing::debug!("the compute thread keeps its priority: {}", std::io::Error::last_os_error());
    }
}

#[cfg(not(target_os = "linux"))]
fn lower_priority() {
    tracing::debug!("thread priorities are lowered on Linux only");
}

struct Worker<K: Kernels> {
    kernels: K,
    shared: Arc<Shared>,
    trunk: Option<Trunk<K>>,
    experts: HashMap<ExpertId, Gated<K::Matrix>>,
    sessions: HashMap<u64, Decoder<K>>,
}

/// The asker may have gone; its answer is then dropped.
fn answer<T>(reply: Reply<T>, result: Result<T, EngineError>) {
    let _ = reply.send(result);
}

impl<K: Kernels> Worker<K> {
    fn work(&mut self, job: Job) {
        match job {
            Job::LoadTrunk { tensors, reply } => answer(reply, self.load_trunk(&tensors)),
            Job::LoadExpert { id, tensors, reply } => answer(reply, self.load_expert(id, &tensors)),
            Job::DropExpert { id, reply } => {
                let held = self.experts.remove(&id).is_some();
                self.shared.expert_dropped(id);
                answer(reply, Ok(held));
            }
            Job::OpenSession { id, capacity, reply } => {
                let opened = self.open(id, capacity);
                if reply.send(opened).is_err() {
                    // The asker left while this was queued; its session may have been swept before it was there.
                    self.sessions.remove(&id);
                }
            }
            Job::Advance { session, tokens, want, reply } => {
                answer(reply, self.step(session, |decoder, core| decoder.advance(core, &tokens, want)));
            }
            Job::Resume { session, outputs, reply } => {
                answer(reply, self.step(session, |decoder, core| decoder.resume(core, &outputs)));
            }
            Job::Complete { session, tokens, want, reply } => {
                answer(reply, self.complete(session, &tokens, want));
            }
            Job::Truncate { session, used, reply } => {
                answer(reply, self.step(session, |decoder, _| decoder.truncate(used)));
            }
            Job::RunExperts { layer, rows, calls, reply } => {
                answer(reply, self.run_experts(layer, &rows, &calls));
            }
            Job::Sweep => {}
        }
    }

    fn load_trunk(&mut self, tensors: &Tensors) -> Result<(), EngineError> {
        if self.trunk.is_some() {
            return Err(EngineError::TrunkLoaded);
        }
        let trunk = Trunk::load(&self.kernels, self.shared.config.clone(), tensors)?;
        self.shared.trunk_loaded(trunk.bytes());
        self.trunk = Some(trunk);
        Ok(())
    }

    fn load_expert(&mut self, id: ExpertId, tensors: &Tensors) -> Result<(), EngineError> {
        let expert = load_expert(&self.kernels, &self.shared.config, id, tensors)?;
        self.experts.insert(id, expert);
        self.shared.expert_loaded(id, tensors.precision(), tensors.data_bytes());
        Ok(())
    }

    fn open(&mut self, id: u64, capacity: usize) -> Result<(), EngineError> {
        let trunk = self.trunk.as_ref().ok_or(EngineError::NoTrunk)?;
        self.sessions.insert(id, Decoder::new(&self.kernels, trunk, capacity));
        Ok(())
    }

    fn step<T>(
        &mut self,
        session: u64,
        f: impl FnOnce(&mut Decoder<K>, &mut Core<'_, K>) -> Result<T, DecodeError>,
    ) -> Result<T, EngineError> {
        let trunk = self.trunk.as_ref().ok_or(EngineError::NoTrunk)?;
        let decoder = self.sessions.get_mut(&session).ok_or(EngineError::Stopped)?;
        Ok(f(decoder, &mut Core { kernels: &mut self.kernels, trunk })?)
    }

    fn complete(&mut self, session: u64, tokens: &[u32], want: Want) -> Result<Vec<f32>, EngineError> {
        let used = self.step(session, |decoder, _| Ok(decoder.used()))?;
        let mut step = self.step(session, |decoder, core| decoder.advance(core, tokens, want))?;
        loop {
            let call = match step {
                Step::Logits(logits) => return Ok(logits),
                Step::NeedExperts(call) => call,
            };
            match self.serve(&call) {
                Ok(outputs) => step = self.step(session, |decoder, core| decoder.resume(core, &outputs))?,
                Err(error) => {
                    self.step(session, |decoder, _| decoder.truncate(used))?;
                    return Err(error);
                }
            }
        }
    }

    fn serve(&mut self, call: &ExpertCall) -> Result<Vec<f32>, EngineError> {
        let calls: Vec<(u16, Vec<u32>)> = call.by_expert().into_iter().collect();
        let outputs = self.run_experts(call.layer, &call.rows, &calls)?;
        let (mut assembly, mut rest) = (Assembly::new(call), outputs.as_slice());
        for (expert, rows) in &calls {
            let (own, others) = rest.split_at(rows.len() * call.hidden);
            assembly.put(*expert, rows, own)?;
            rest = others;
        }
        Ok(assembly.finish()?)
    }

    /// Each expert over its rows of `rows`, one output row each, in order of the calls.
    fn run_experts(&mut self, layer: u16, rows: &[f32], calls: &[(u16, Vec<u32>)]) -> Result<Vec<f32>, EngineError> {
        let mut work = Vec::with_capacity(calls.len());
        for (index, rows) in calls {
            // Known before anything is computed: a stale placement costs its caller no time.
            let id = ExpertId { layer, index: *index };
            work.push(ExpertWork { expert: self.experts.get(&id).ok_or(EngineError::NotHeld(id))?, rows });
        }
        if work.iter().all(|work| work.rows.is_empty()) {
            return Ok(Vec::new());
        }
        let input = self.kernels.upload(rows.to_vec(), self.shared.config.hidden_size);
        Ok(download(self.kernels.experts(&input, &work)))
    }
}
