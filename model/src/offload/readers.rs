//! Threads that read experts from disk.
//!
//! Owns [`Readers`]. Loads that somebody waits for are read before those that are read ahead, each kind in order; a load
//! read ahead that is wanted after all moves up, and one that is not wanted any more is given back unread, or stops in
//! the middle. The invariant: every load comes back exactly once, with its buffer, however it ends. The queue is as long
//! as there are buffers: whoever reads bounds it. Nothing here knows what is worth reading.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use tokio::sync::mpsc;

use coel_weights::memory::{Buffer, ReadError};

use super::{read_plan::ReadPlan, residency::LoadId};

/// Something to read.
pub(super) struct Load {
    pub(super) id: LoadId,
    pub(super) plan: Arc<ReadPlan>,
    pub(super) buffer: Buffer,
}

/// How it ended.
pub(super) struct Loaded {
    pub(super) id: LoadId,
    pub(super) buffer: Buffer,
    /// Bytes read.
    pub(super) result: Result<u64, ReadError>,
}

/// A pool of reading threads. They end when this is dropped.
pub(super) struct Readers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    urgent: VecDeque<Load>,
    ahead: VecDeque<Load>,
    reading: Vec<(LoadId, Arc<AtomicBool>)>,
    closed: bool,
}

impl Queue {
    fn next(&mut self) -> Option<(Load, Arc<AtomicBool>)> {
        let load = self.urgent.pop_front().or_else(|| self.ahead.pop_front())?;
        let abandoned = Arc::new(AtomicBool::new(false));
        self.reading.push((load.id, abandoned.clone()));
        Some((load, abandoned))
    }
}

impl Shared {
    /// Nothing under this lock can panic half-way, so a poisoned one is still whole.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, done: &mpsc::UnboundedSender<Loaded>) {
        loop {
            let mut queue = self.queue();
            let (mut load, abandoned) = loop {
                if queue.closed {
                    return;
                }
                match queue.next() {
                    Some(next) => break next,
                    None => queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(queue);
            let result = load.plan.fill(&mut load.buffer, &abandoned);
            self.queue().reading.retain(|(id, _)| *id != load.id);
            if done.send(Loaded { id: load.id, buffer: load.buffer, result }).is_err() {
                return; // nobody is left to use it
            }
        }
    }
}

impl Readers {
    /// Starts `threads` threads; what they have read comes through the channel.
    pub(super) fn start(threads: usize) -> std::io::Result<(Self, mpsc::UnboundedReceiver<Loaded>)> {
        // No longer than there are loads, each of which has a buffer.
        let (done, loaded) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new() });
        let mut readers = Self { shared: shared.clone(), threads: Vec::new() };
        for index in 0..threads.max(1) {
            let (shared, done) = (shared.clone(), done.clone());
            let thread = thread::Builder::new().name(format!("coel-read-{index}"));
            readers.threads.push(thread.spawn(move || shared.run(&done))?);
        }
        Ok((readers, loaded))
    }

    pub(super) fn read(&self, load: Load, urgent: bool) {
        let mut queue = self.shared.queue();
        match urgent {
            true => queue.urgent.push_back(load),
            false => queue.ahead.push_back(load),
        }
        drop(queue);
        self.shared.changed.notify_one();
    }

    /// Somebody waits for a load that was to be read ahead.
    pub(super) fn hurry(&self, id: LoadId) {
        let mut queue = self.shared.queue();
        let found = queue.ahead.iter().position(|load| load.id == id);
        if let Some(load) = found.and_then(|index| queue.ahead.remove(index)) {
            queue.urgent.push_back(load);
        }
    }

    /// Nobody wants a load any more. It is returned if it was not begun; else it comes back like any other, perhaps sooner.
    pub(super) fn abandon(&self, id: LoadId) -> Option<Load> {
        let mut queue = self.shared.queue();
        let queue = &mut *queue;
        for loads in [&mut queue.ahead, &mut queue.urgent] {
            if let Some(index) = loads.iter().position(|load| load.id == id) {
                return loads.remove(index);
            }
        }
        if let Some((_, abandoned)) = queue.reading.iter().find(|(reading, _)| *reading == id) {
            abandoned.store(true, Ordering::Relaxed);
        }
        None
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        let mut queue = self.shared.queue();
        queue.closed = true;
        for (_, abandoned) in &queue.reading {
            abandoned.store(true, Ordering::Relaxed);
        }
        drop(queue);
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}
