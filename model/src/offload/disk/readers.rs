//! Threads that read experts from disk.
//!
//! Owns [`Readers`]. Urgent loads are read before prefetches, each kind in order. A prefetch that becomes urgent moves
//! up; an abandoned load is returned unread, or stops in the middle. The invariant: every load comes back exactly once,
//! with its buffer, however it ends. The queue is bounded by the buffers, because each load has one. Nothing here knows
//! which experts are worth reading.

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

use super::{disk_cache::LoadId, read_plan::ReadPlan};

/// An expert to read, and the buffer to read it into.
pub(super) struct Load {
    pub(super) id: LoadId,
    pub(super) plan: Arc<ReadPlan>,
    pub(super) buffer: Buffer,
}

/// A load that has ended.
pub(super) struct Loaded {
    pub(super) id: LoadId,
    pub(super) buffer: Buffer,
    /// Bytes read, or why the buffer is not filled.
    pub(super) result: Result<u64, ReadError>,
}

/// A pool of reading threads, which ends when it is dropped.
pub(super) struct Readers {
    pool: Arc<Pool>,
    threads: Vec<JoinHandle<()>>,
}

struct Pool {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    urgent: VecDeque<Load>,
    prefetches: VecDeque<Load>,
    /// Loads that are being read, each with the flag that abandons it.
    reading: Vec<(LoadId, Arc<AtomicBool>)>,
    closed: bool,
}

impl Queue {
    fn next(&mut self) -> Option<(Load, Arc<AtomicBool>)> {
        let load = self.urgent.pop_front().or_else(|| self.prefetches.pop_front())?;
        let abandoned = Arc::new(AtomicBool::new(false));
        self.reading.push((load.id, abandoned.clone()));
        Some((load, abandoned))
    }
}

impl Pool {
    /// Nothing that holds this lock can panic half-way, so a poisoned queue is still consistent.
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
                return; // the driver is gone
            }
        }
    }
}

impl Readers {
    /// Starts `threads` threads, at least one. Loads come back through the channel.
    pub(super) fn start(threads: usize) -> std::io::Result<(Self, mpsc::UnboundedReceiver<Loaded>)> {
        // Bounded by the loads, each of which has a buffer.
        let (done, loaded) = mpsc::unbounded_channel();
        let pool = Arc::new(Pool { queue: Mutex::default(), changed: Condvar::new() });
        let mut readers = Self { pool: pool.clone(), threads: Vec::new() };
        for index in 0..threads.max(1) {
            let (pool, done) = (pool.clone(), done.clone());
            let thread = thread::Builder::new().name(format!("coel-read-{index}"));
            readers.threads.push(thread.spawn(move || pool.run(&done))?);
        }
        Ok((readers, loaded))
    }

    /// Queues a load.
    pub(super) fn read(&self, load: Load, urgent: bool) {
        let mut queue = self.pool.queue();
        match urgent {
            true => queue.urgent.push_back(load),
            false => queue.prefetches.push_back(load),
        }
        drop(queue);
        self.pool.changed.notify_one();
    }

    /// A prefetch becomes urgent.
    pub(super) fn hurry(&self, id: LoadId) {
        let mut queue = self.pool.queue();
        let found = queue.prefetches.iter().position(|load| load.id == id);
        if let Some(load) = found.and_then(|index| queue.prefetches.remove(index)) {
            queue.urgent.push_back(load);
        }
    }

    /// A load is not wanted any more. It is returned if it was not begun; otherwise it comes back like any other,
    /// perhaps sooner.
    pub(super) fn abandon(&self, id: LoadId) -> Option<Load> {
        let mut queue = self.pool.queue();
        let queue = &mut *queue;
        for loads in [&mut queue.prefetches, &mut queue.urgent] {
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
        let mut queue = self.pool.queue();
        queue.closed = true;
        for (_, abandoned) in &queue.reading {
            abandoned.store(true, Ordering::Relaxed);
        }
        drop(queue);
        self.pool.changed.notify_all();
        for thread in self.threads.drain(..) {
            // The panic hook has reported a thread that panicked.
            let _ = thread.join();
        }
    }
}
