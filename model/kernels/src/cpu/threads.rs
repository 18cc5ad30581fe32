//! A small pool for regions of a few microseconds.
//!
//! Owns [`Pool`]: the caller and some helpers, which run one closure together. In [`Pool::each`] workers steal pieces of
//! work from one another until none is left. A helper that comes late finds nothing to do, and a region ends without it:
//! the caller waits only for helpers that entered. A helper spins for [`SPIN`] in wait for the next region and then
//! sleeps, so an idle pool costs nothing.
//!
//! The invariant: when [`Pool::run`] returns, or unwinds, no helper is inside the closure. A panic anywhere in it
//! becomes a panic of the caller. Which worker does which piece is not determined, so results must not depend on it.

use std::{
    any::Any,
    cell::UnsafeCell,
    hint,
    marker::PhantomData,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    slice,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};

/// How long a helper spins in wait for the next region: longer than the gaps within a layer, shorter than anything that
/// another process on the machine would notice.
const SPIN: Duration = Duration::from_micros(50);
/// Spins between two readings of the clock.
const LOOKS: u32 = 32;
/// Largest number of threads of a pool.
const THREADS_MAX: usize = 256;

/// Bit of [`Shared::state`]: helpers may enter. Below it the number of helpers inside, above it the region's number.
const OPEN: u64 = 1 << 16;
const REGION: u64 = 1 << 17;

type Task<'a> = &'a (dyn Fn(usize) + Sync);

struct Shared {
    state: AtomicU64,
    /// The open region's closure. Written while no helper is inside and none may enter, read by those inside.
    task: UnsafeCell<Option<Task<'static>>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    /// For each helper, whether it sleeps or is about to.
    asleep: Vec<AtomicBool>,
}

// SAFETY: `task` is the only field that is not `Sync`. It is written only while no helper is inside a region and none may
// enter, and read only by helpers that are inside.
unsafe impl Sync for Shared {}
// SAFETY: as above; a task is `Sync`, so any thread may call it.
unsafe impl Send for Shared {}

/// The caller and `threads - 1` helpers.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<(Thread, Option<JoinHandle<()>>)>,
    /// One for each worker.
    runs: Arc<[Run]>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({})", self.threads())
    }
}

impl Pool {
    /// A pool of `threads` workers, the caller included; 0 means one for each core this process may use. Fewer where
    /// the system refuses more.
    pub fn new(threads: usize) -> Self {
        let threads = match threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let wanted = threads.min(THREADS_MAX) - 1;
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            task: UnsafeCell::new(None),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            asleep: (0..wanted).map(|_| AtomicBool::new(false)).collect(),
        });
        let mut helpers = Vec::with_capacity(wanted);
        for index in 0..wanted {
            let shared = shared.clone();
            let builder = thread::Builder::new().name(format!("coel-helper-{}", index + 1));
            match builder.spawn(move || shared.help(index)) {
                Ok(handle) => helpers.push((handle.thread().clone(), Some(handle))),
                Err(error) => {
                    tracing::warn!(%error, "computing with {} threads instead of {threads}", index + 1);
                    break;
                }
            }
        }
        let runs = (0..=helpers.len()).map(|_| Run::default()).collect();
        Self { shared, helpers, runs }
    }

    /// Workers, the caller included.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `task` with the caller's worker number, 0, and with that of each helper that enters before the caller is done.
    pub fn run(&mut self, task: Task<'_>) {
        if self.helpers.is_empty() {
            return task(0);
        }
        // SAFETY: the last region is closed and no helper is inside, so nobody reads the cell. The lifetime may be extended
        // because this function returns or unwinds only after the region is closed and every helper has left it.
        unsafe { *self.shared.task.get() = Some(std::mem::transmute::<Task<'_>, Task<'static>>(task)) };
        let state = self.shared.state.load(Ordering::Relaxed);
        self.shared.state.store((state + REGION) | OPEN, Ordering::SeqCst);
        for ((thread, _), asleep) in self.helpers.iter().zip(&self.shared.asleep) {
            if asleep.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| task(0)));
        let mut state = self.shared.state.fetch_and(!OPEN, Ordering::AcqRel) & !OPEN;
        let mut looks = 0u32;
        while state & (OPEN - 1) != 0 {
            looks += 1;
            match looks.is_multiple_of(LOOKS * LOOKS) {
                true => thread::yield_now(),
                false => hint::spin_loop(),
            }
            state = self.shared.state.load(Ordering::Acquire);
        }
        let others = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = own.err().or(others) {
            resume_unwind(panic);
        }
    }

    /// Calls `f(worker, piece)` for every piece of `0..count`, `grain` neighbours at a time.
    ///
    /// Each worker begins with a run of neighbouring pieces of its own, because memory is fastest read in long runs, and goes
    /// on with the second half of what another worker has left.
    pub fn each(&mut self, count: usize, grain: usize, f: impl Fn(usize, usize) + Sync) {
        let grain = grain.max(1);
        if self.helpers.is_empty() || count <= grain {
            return (0..count).for_each(|piece| f(0, piece));
        }
        let (runs, workers) = (self.runs.clone(), self.threads());
        for (worker, run) in runs.iter().enumerate() {
            run.put(worker * count / workers..(worker + 1) * count / workers);
        }
        self.run(&|worker| {
            let own = &runs[worker];
            loop {
                while let Some(pieces) = own.take(grain) {
                    pieces.for_each(|piece| f(worker, piece));
                }
                let others = (1..workers).map(|next| &runs[(worker + next) % workers]);
                match others.flat_map(Run::halve).next() {
                    Some(pieces) => own.put(pieces),
                    None => return,
                }
            }
        });
    }
}

/// The pieces that one worker has left, on a cache line of its own. Pieces never return to a run that they have left,
/// except as the very same run, so a compare-and-swap suffices.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Run(AtomicU64);

impl Run {
    fn of(pieces: Range<usize>) -> u64 {
        assert!(pieces.end <= u32::MAX as usize);
        (pieces.start as u64) << 32 | pieces.end as u64
    }

    /// Gives an empty run something to do.
    fn put(&self, pieces: Range<usize>) {
        self.0.store(Self::of(pieces), Ordering::Relaxed);
    }

    /// Replaces the pieces by `f(pieces).0` and returns `f(pieces).1`, unless there are none.
    fn split(&self, f: impl Fn(Range<usize>) -> (Range<usize>, Range<usize>)) -> Option<Range<usize>> {
        let mut now = self.0.load(Ordering::Relaxed);
        loop {
            let pieces = (now >> 32) as usize..(now & u64::from(u32::MAX)) as usize;
            if pieces.is_empty() {
                return None;
            }
            let (left, taken) = f(pieces);
            match self.0.compare_exchange_weak(now, Self::of(left), Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(taken),
                Err(found) => now = found,
            }
        }
    }

    /// The first `grain` pieces.
    fn take(&self, grain: usize) -> Option<Range<usize>> {
        self.split(|pieces| {
            let cut = pieces.end.min(pieces.start + grain);
            (cut..pieces.end, pieces.start..cut)
        })
    }

    /// The second half of the pieces, for another worker.
    fn halve(&self) -> Option<Range<usize>> {
        self.split(|pieces| {
            let cut = pieces.start + pieces.len() / 2;
            (pieces.start..cut, cut..pieces.end)
        })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for (thread, handle) in &mut self.helpers {
            thread.unpark();
            let _ = handle.take().map(JoinHandle::join); // helpers catch what panics
        }
    }
}

impl Shared {
    fn help(&self, index: usize) {
        let mut seen = 0;
        while let Some(region) = self.next(index, seen) {
            seen = region;
            let mut state = self.state.load(Ordering::Acquire);
            let entered = loop {
                if state & OPEN == 0 || state / REGION != region {
                    break false;
                }
                match self.state.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => break true,
                    Err(found) => state = found,
                }
            };
            if !entered {
                continue;
            }
            // SAFETY: this helper is inside the region, so the caller waits for it and does not write the cell.
            let task = unsafe { *self.task.get() }.expect("an open region has a task");
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(index + 1))) {
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for a region after `seen` and returns its number; `None` at the end.
    fn next(&self, index: usize, seen: u64) -> Option<u64> {
        let asleep = &self.asleep[index];
        let mut until = Instant::now() + SPIN;
        loop {
            for _ in 0..LOOKS {
                let region = self.state.load(Ordering::Acquire) / REGION;
                if region != seen {
                    return Some(region);
                }
                hint::spin_loop();
            }
            if Instant::now() < until {
                continue;
            }
            // Set before the last look: a caller that opens a region after that look sees it and wakes this helper.
            asleep.store(true, Ordering::SeqCst);
            if self.state.load(Ordering::SeqCst) / REGION == seen && !self.stop.load(Ordering::SeqCst) {
                thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            until = Instant::now() + SPIN;
        }
    }
}

/// A slice that several workers write to, each its own elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shares<'a, T> {
    start: *mut T,
    len: usize,
    whole: PhantomData<&'a mut [T]>,
}

// SAFETY: elements are reached through `part` alone, whose callers promise that no two reach the same one.
unsafe impl<T: Send> Sync for Shares<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shares<'_, T> {}

impl<'a, T> Shares<'a, T> {
    pub(super) fn of(whole: &'a mut [T]) -> Self {
        Self { start: whole.as_mut_ptr(), len: whole.len(), whole: PhantomData }
    }

    /// The elements `first..first + len`, which must be inside.
    ///
    /// # Safety
    /// Nobody else reads or writes them while the result is used.
    pub(super) unsafe fn part(&self, first: usize, len: usize) -> &'a mut [T] {
        assert!(first <= self.len && len <= self.len - first);
        // SAFETY: the elements are inside the slice by the assertion, and nobody else uses them as the caller promises.
        unsafe { slice::from_raw_parts_mut(self.start.add(first), len) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn every_piece_is_done_once() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for round in 0..200 {
                let done: Vec<AtomicUsize> = (0..round % 37).map(|_| AtomicUsize::new(0)).collect();
                pool.each(done.len(), 1 + round % 3, |worker, piece| {
                    assert!(worker < threads);
                    done[piece].fetch_add(1, Ordering::Relaxed);
                });
                assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn sleepers_are_woken() {
        let mut pool = Pool::new(2);
        while !pool.shared.asleep[0].load(Ordering::SeqCst) {
            thread::yield_now();
        }
        let helped = AtomicBool::new(false);
        pool.run(&|worker| match worker {
            // The caller's part lasts until the helper was there.
            0 => {
                while !helped.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
            }
            _ => helped.store(true, Ordering::SeqCst),
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(3);
        for faulty in 0..3 {
            let inside = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|worker| {
                    inside.fetch_add(1, Ordering::SeqCst);
                    while inside.load(Ordering::SeqCst) < 3 {
                        thread::yield_now();
                    }
                    assert!(worker != faulty, "worker {worker}");
                });
            }));
            let message = result.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(*message, format!("worker {faulty}"));
        }
        let done = AtomicUsize::new(0);
        pool.each(10, 1, |_, _| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 10);
    }
}
