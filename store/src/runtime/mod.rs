//! Where the log's tasks run, what time it is there, and what is random: tokio, or a [`simulation`].
//!
//! The functions ask the thread whether a simulation drives it; if none does, they are tokio's and the system's. So the log,
//! and the consensus library in it, run in a simulation as they are. Nothing else in this crate depends on which of the two it is.

pub(crate) mod simulation;

use futures::FutureExt;
use rand::RngCore;
use simulation::Simulation;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// What time it is.
pub(crate) fn now() -> Instant {
    Simulation::current().map_or_else(|| tokio::time::Instant::now().into_std(), |simulation| simulation.now())
}

/// The generator of this thread.
pub(crate) fn rng() -> impl RngCore {
    match Simulation::current() {
        Some(simulation) => Generator::Simulated(simulation),
        None => Generator::System(rand::rng()),
    }
}

/// Runs a future to its end beside others.
pub(crate) fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    match Simulation::current() {
        Some(simulation) => {
            let (done, wait) = oneshot::channel();
            simulation.spawn(future.map(|output| drop(done.send(output))));
            JoinHandle::Simulated(wait)
        }
        None => JoinHandle::Tokio(tokio::spawn(future)),
    }
}

/// Ends at `deadline`.
pub(crate) fn sleep_until(deadline: Instant) -> Sleep {
    match Simulation::current() {
        Some(simulation) => Sleep::Simulated(simulation.sleep_until(deadline)),
        None => Sleep::Tokio(Box::pin(tokio::time::sleep_until(deadline.into()))),
    }
}

/// Waits for `future`, but not beyond `deadline`.
pub(crate) fn timeout_at<F: Future>(deadline: Instant, future: F) -> Timeout<F> {
    Timeout { future: Box::pin(future), sleep: sleep_until(deadline) }
}

/// Waits for `future`, but not longer than `duration`.
pub(crate) fn timeout<F: Future>(duration: Duration, future: F) -> Timeout<F> {
    timeout_at(now() + duration, future)
}

enum Generator {
    System(rand::rngs::ThreadRng),
    Simulated(Simulation),
}

impl RngCore for Generator {
    fn next_u32(&mut self) -> u32 {
        self.next_u64() as u32
    }

    fn next_u64(&mut self) -> u64 {
        match self {
            Self::System(rng) => rng.next_u64(),
            Self::Simulated(simulation) => simulation.random(),
        }
    }

    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next_u64().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// The future of [`sleep_until`].
pub enum Sleep {
    Tokio(Pin<Box<tokio::time::Sleep>>),
    Simulated(simulation::Sleep),
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        match &mut *self {
            Self::Tokio(sleep) => sleep.poll_unpin(context),
            Self::Simulated(sleep) => sleep.poll_unpin(context),
        }
    }
}

/// The time was up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the time was up")]
pub struct Elapsed;

/// The future of [`timeout`].
pub struct Timeout<F> {
    future: Pin<Box<F>>,
    sleep: Sleep,
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(output) = self.future.poll_unpin(context) {
            return Poll::Ready(Ok(output));
        }
        self.sleep.poll_unpin(context).map(|()| Err(Elapsed))
    }
}

/// The future of [`spawn`].
pub enum JoinHandle<T> {
    Tokio(tokio::task::JoinHandle<T>),
    Simulated(oneshot::Receiver<T>),
}

/// The task ended without an output.
#[derive(Debug)]
pub enum JoinError {
    Tokio(tokio::task::JoinError),
    Killed,
}

impl JoinError {
    pub fn is_panic(&self) -> bool {
        matches!(self, Self::Tokio(error) if error.is_panic())
    }
}

impl fmt::Display for JoinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tokio(error) => error.fmt(f),
            Self::Killed => f.write_str("the task was killed"),
        }
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, JoinError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Tokio(handle) => handle.poll_unpin(context).map_err(JoinError::Tokio),
            Self::Simulated(wait) => wait.poll_unpin(context).map_err(|_| JoinError::Killed),
        }
    }
}
