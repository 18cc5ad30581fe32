//! A simulation: one thread, virtual time, one source of randomness. The same seed gives the same history, to the last step.
//!
//! Owns the tasks and the timers. Time stands still while a task can run, and then jumps to the next timer. Two things keep tokio's own
//! randomness out. Timers fire one at a time, even those of one instant, and what each of them sets in motion comes to rest before
//! the next one fires: so two branches of a `select!`, which chooses among ready ones at random, are never ready at once. And of
//! the tasks that can run, the seed says which is next: a `watch` wakes its readers in a random order.
//!
//! Every task belongs to a process, as does what it spawns; [`Simulation::kill`] ends a process in the middle of whatever it does.
//! A panic in a task ends the simulation.

use crate::sync::lock;
use futures::FutureExt;
use futures::future::BoxFuture;
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

/// More steps than this without time passing are a loop that would never end.
const STEPS_MAX: u64 = 1_000_000;

thread_local! {
    static CURRENT: RefCell<Option<Simulation>> = const { RefCell::new(None) };
}

/// A process in the simulation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process(pub u64);

/// A handle on a simulation; cloning it is cheap.
#[derive(Clone)]
pub struct Simulation(Arc<Core>);

struct Core {
    origin: Instant,
    world: Mutex<World>,
    ready: Arc<Mutex<BTreeSet<u64>>>,
}

struct World {
    elapsed: Duration,
    rng: StdRng,
    /// The process of the task that runs.
    process: Process,
    numbers: u64,
    tasks: BTreeMap<u64, Task>,
    timers: BTreeMap<(Duration, u64), (Process, Arc<Timer>)>,
    paused: BTreeSet<Process>,
    /// Timers of paused processes that are to fire, and tasks that are to run.
    overdue: BTreeMap<(Duration, u64), (Process, Arc<Timer>)>,
    waiting: BTreeSet<u64>,
}

struct Task {
    process: Process,
    /// Absent while it is polled.
    future: Option<BoxFuture<'static, ()>>,
    waker: Waker,
}

#[derive(Default)]
struct Timer(Mutex<TimerState>);

#[derive(Default)]
struct TimerState {
    fired: bool,
    waker: Option<Waker>,
}

struct Wakeup {
    task: u64,
    ready: Arc<Mutex<BTreeSet<u64>>>,
}

impl Wake for Wakeup {
    fn wake(self: Arc<Self>) {
        lock(&self.ready).insert(self.task);
    }
}

/// The number of the future that [`Simulation::run`] drives.
const MAIN: u64 = 0;

impl Simulation {
    /// A simulation in which nothing has happened.
    pub fn new(seed: u64) -> Self {
        let world = World {
            elapsed: Duration::ZERO,
            rng: StdRng::seed_from_u64(seed),
            process: Process::default(),
            numbers: MAIN,
            tasks: BTreeMap::new(),
            timers: BTreeMap::new(),
            paused: BTreeSet::new(),
            overdue: BTreeMap::new(),
            waiting: BTreeSet::new(),
        };
        Self(Arc::new(Core { origin: Instant::now(), world: Mutex::new(world), ready: Arc::default() }))
    }

    /// The simulation that drives this thread.
    pub(super) fn current() -> Option<Self> {
        CURRENT.with_borrow(Clone::clone)
    }

    /// Runs `main`, and all that is spawned, until `main` ends. What is left then is dropped.
    ///
    /// # Panics
    /// If a task panics, if `main` waits for something that cannot happen any more, and if time stands still for a million steps.
    pub fn run<T>(&self, main: impl Future<Output = T>) -> T {
        let _guard = Guard::enter(self);
        let mut main = pin!(main);
        let waker = self.waker(MAIN);
        waker.wake_by_ref();
        let mut steps = 0;
        loop {
            let next = self.next();
            steps += 1;
            assert!(steps < STEPS_MAX, "time has stood still for {STEPS_MAX} steps");
            match next {
                Some(MAIN) => {
                    lock(&self.0.world).process = Process::default();
                    if let Poll::Ready(output) = main.as_mut().poll(&mut Context::from_waker(&waker)) {
                        return output;
                    }
                }
                Some(task) => self.poll(task),
                None => {
                    assert!(self.fire(), "nothing can happen any more, and the simulation has not ended");
                    steps = 0;
                }
            }
        }
    }

    /// One of the tasks that can run.
    fn next(&self) -> Option<u64> {
        let mut ready = lock(&self.0.ready);
        let nth = if ready.len() > 1 { self.random() as usize % ready.len() } else { 0 };
        let task = ready.iter().nth(nth).copied()?;
        ready.remove(&task);
        Some(task)
    }

    fn waker(&self, task: u64) -> Waker {
        Waker::from(Arc::new(Wakeup { task, ready: Arc::clone(&self.0.ready) }))
    }

    fn poll(&self, number: u64) {
        let (mut future, waker) = {
            let mut world = lock(&self.0.world);
            let World { tasks, paused, waiting, .. } = &mut *world;
            let Some(task) = tasks.get_mut(&number) else { return };
            if paused.contains(&task.process) {
                waiting.insert(number);
                return;
            }
            let Some(future) = task.future.take() else { return };
            let (process, waker) = (task.process, task.waker.clone());
            world.process = process;
            (future, waker)
        };
        let ended = future.poll_unpin(&mut Context::from_waker(&waker)).is_ready();
        let mut world = lock(&self.0.world);
        // Its own process may have been killed.
        match world.tasks.get_mut(&number) {
            Some(task) if !ended => task.future = Some(future),
            _ => {
                world.tasks.remove(&number);
                drop(world);
                drop(future);
            }
        }
    }

    /// Lets time pass until the next timer; `false` if there is none.
    fn fire(&self) -> bool {
        let mut world = lock(&self.0.world);
        let Some((key, (process, timer))) = world.timers.pop_first() else { return false };
        world.elapsed = world.elapsed.max(key.0);
        if world.paused.contains(&process) {
            world.overdue.insert(key, (process, timer));
            return true;
        }
        drop(world);
        let waker = {
            let mut state = lock(&timer.0);
            state.fired = true;
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    /// The time in the simulation.
    pub fn now(&self) -> Instant {
        self.0.origin + self.elapsed()
    }

    /// Since its beginning.
    pub fn elapsed(&self) -> Duration {
        lock(&self.0.world).elapsed
    }

    /// The next random number.
    pub fn random(&self) -> u64 {
        lock(&self.0.world).rng.next_u64()
    }

    /// Runs a future beside others, in the process of the task that calls this.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        let process = lock(&self.0.world).process;
        self.spawn_in(process, future);
    }

    /// Runs a future in a process.
    pub fn spawn_in(&self, process: Process, future: impl Future<Output = ()> + Send + 'static) {
        let mut world = lock(&self.0.world);
        world.numbers += 1;
        let number = world.numbers;
        let waker = self.waker(number);
        world.tasks.insert(number, Task { process, future: Some(future.boxed()), waker: waker.clone() });
        drop(world);
        waker.wake();
    }

    /// Ends a process: its tasks go no step further.
    pub fn kill(&self, process: Process) {
        let mut world = lock(&self.0.world);
        let dead: Vec<u64> =
            world.tasks.iter().filter(|(_, task)| task.process == process).map(|(number, _)| *number).collect();
        let dead: Vec<Task> = dead.into_iter().filter_map(|number| world.tasks.remove(&number)).collect();
        drop(world);
        // Their destructors may come back here.
        drop(dead);
    }

    /// Stops a process in the middle of whatever it does, until it is resumed. Time goes on without it.
    pub fn pause(&self, process: Process) {
        lock(&self.0.world).paused.insert(process);
    }

    /// Lets paused processes go on.
    pub fn resume_all(&self) {
        let mut world = lock(&self.0.world);
        world.paused.clear();
        let (waiting, overdue) = (std::mem::take(&mut world.waiting), std::mem::take(&mut world.overdue));
        world.timers.extend(overdue);
        drop(world);
        lock(&self.0.ready).extend(waiting);
    }

    /// Ends at `deadline`.
    pub fn sleep_until(&self, deadline: Instant) -> Sleep {
        let at = deadline.saturating_duration_since(self.0.origin);
        let mut world = lock(&self.0.world);
        world.numbers += 1;
        let key = (at.max(world.elapsed), world.numbers);
        let timer = Arc::new(Timer::default());
        let process = world.process;
        world.timers.insert(key, (process, Arc::clone(&timer)));
        Sleep { simulation: self.clone(), key, timer }
    }

    /// Ends after `duration`.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        self.sleep_until(self.now() + duration)
    }
}

/// While it is there, its simulation drives this thread.
struct Guard;

impl Guard {
    fn enter(simulation: &Simulation) -> Self {
        CURRENT.with_borrow_mut(|current| {
            assert!(current.is_none(), "a simulation drives this thread already");
            *current = Some(simulation.clone());
        });
        Self
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let simulation = Simulation::current();
        if let Some(simulation) = &simulation {
            // Tasks and the simulation hold one another. Destructors may wake or spawn others.
            while let Some((_, task)) = { lock(&simulation.0.world).tasks.pop_first() } {
                drop(task);
            }
        }
        CURRENT.set(None);
    }
}

/// The future of [`Simulation::sleep_until`].
pub struct Sleep {
    simulation: Simulation,
    key: (Duration, u64),
    timer: Arc<Timer>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut state = lock(&self.timer.0);
        if state.fired {
            return Poll::Ready(());
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        lock(&self.simulation.0.world).timers.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn time_jumps_from_timer_to_timer() {
        let simulation = Simulation::new(1);
        let seen: Arc<Mutex<Vec<(u64, Duration)>>> = Arc::default();
        simulation.run(async {
            for (name, at) in [(1, 3000), (2, 1000), (3, 1000)] {
                let (simulation, seen) = (simulation.clone(), Arc::clone(&seen));
                simulation.clone().spawn(async move {
                    simulation.sleep(ms(at)).await;
                    lock(&seen).push((name, simulation.elapsed()));
                });
            }
            simulation.sleep(ms(5000)).await;
        });
        assert_eq!(*lock(&seen), [(2, ms(1000)), (3, ms(1000)), (1, ms(3000))]);
    }

    #[test]
    fn a_killed_process_goes_no_step_further() {
        let simulation = Simulation::new(1);
        let ticks: Arc<Mutex<u32>> = Arc::default();
        simulation.run(async {
            let (inner, count) = (simulation.clone(), Arc::clone(&ticks));
            simulation.spawn_in(Process(7), async move {
                // What a process spawns belongs to it.
                let inner = inner.clone();
                inner.clone().spawn(async move {
                    loop {
                        inner.sleep(ms(10)).await;
                        *lock(&count) += 1;
                    }
                });
            });
            simulation.sleep(ms(35)).await;
            simulation.kill(Process(7));
            simulation.sleep(ms(100)).await;
        });
        assert_eq!(*lock(&ticks), 3);
    }

    #[test]
    #[should_panic(expected = "nothing can happen any more")]
    fn a_wait_for_nothing_is_named() {
        Simulation::new(1).run(std::future::pending::<()>());
    }

    #[test]
    #[should_panic(expected = "stood still")]
    fn a_loop_without_time_is_named() {
        Simulation::new(1).run(async {
            loop {
                let mut woken = false;
                std::future::poll_fn(|context| {
                    context.waker().wake_by_ref();
                    if std::mem::replace(&mut woken, true) { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
            }
        });
    }
}
