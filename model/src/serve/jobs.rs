//! What the compute thread can be asked, and what it answers.
//!
//! Owns [`Job`] and [`JobQueue`], a handle's way to the thread. Every job but [`Job::Wake`] carries its reply. The
//! invariant: a job is answered once, or its asker is told why it was not. A job's values were checked by its sender.

use std::{collections::BTreeSet, sync::Arc};

use coel_weights::{layout::ExpertId, slices::Precision, tensors::Tensors};
use tokio::sync::{mpsc, oneshot};

use super::{error::EngineError, pages::PageTable, scheduler::SessionId, state::EngineState};
use crate::nn::{batch::Want, router::Route};

/// Jobs that may wait for the compute thread. Each may hold a chunk of rows, so the number bounds memory too.
pub(crate) const JOBS_MAX: usize = 16;

pub(crate) type JobReply<T> = oneshot::Sender<Result<T, EngineError>>;

/// What the compute thread can be asked.
pub(crate) enum Job {
    LoadTrunk {
        tensors: Tensors,
        embedding_on_disk: bool,
        reply: JobReply<()>,
    },
    LoadExpert {
        id: ExpertId,
        tensors: Tensors,
        reply: JobReply<()>,
    },
    LoadExpertOnDisk {
        id: ExpertId,
        tensors: Tensors,
        reply: JobReply<()>,
    },
    DropExpert {
        id: ExpertId,
        reply: JobReply<bool>,
    },
    SetDiskCacheBytes {
        bytes: u64,
        reply: JobReply<()>,
    },
    Advance {
        advance: Advance,
        reply: JobReply<(Advanced, Routes)>,
    },
    RunExperts {
        call: RemoteCall,
        reply: JobReply<Computed>,
    },
    /// Look around: a session was dropped, or something has come.
    Wake,
}

/// Tokens to be appended to a session.
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

/// Experts of one layer to be computed for somebody else's rows.
pub(crate) struct RemoteCall {
    pub(crate) layer: u16,
    /// `[n, hidden]`
    pub(crate) rows: Vec<f32>,
    /// Experts, each with its rows.
    pub(crate) experts: Vec<(u16, Vec<u32>)>,
}

/// What came of an expert call.
#[derive(Clone, Debug, PartialEq)]
pub struct Computed {
    /// One row for each row index of the call, in its order.
    pub outputs: Vec<f32>,
    /// The CPU's kernel class and precisions, where the CPU computed experts that a GPU does not hold.
    pub cpu_class: Option<String>,
}

/// For each layer and row its routes, ascending by expert; nothing for a layer without experts.
pub type Routes = Vec<Vec<Vec<Route>>>;

/// What an advance brought, and what it took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Advanced {
    /// As wanted: `[vocab]` or `[n, vocab]`.
    pub logits: Vec<f32>,
    /// (row, expert) pairs computed on this machine.
    pub pairs_here: u64,
    /// At which precisions.
    pub precisions: BTreeSet<Precision>,
    /// (row, expert) pairs computed elsewhere.
    pub pairs_elsewhere: u64,
    /// Kernel classes and precisions of everything else that computed, each once: other machines, and the CPU where it
    /// computes experts that a GPU does not hold.
    pub classes: Vec<String>,
}

impl Advanced {
    pub(crate) fn add(&mut self, other: &Self) {
        self.pairs_here += other.pairs_here;
        self.precisions.extend(&other.precisions);
        self.pairs_elsewhere += other.pairs_elsewhere;
        other.classes.iter().for_each(|class| self.note_class(class.clone()));
    }

    pub(crate) fn note_class(&mut self, class: String) {
        if !self.classes.contains(&class) {
            self.classes.push(class);
        }
    }
}

/// The pages of a session, given back when the last of handle and batches lets go.
#[derive(Debug)]
pub(crate) struct Lease {
    state: Arc<EngineState>,
    table: Option<PageTable>,
}

impl Lease {
    pub(crate) fn new(state: Arc<EngineState>, table: PageTable) -> Self {
        Self { state, table: Some(table) }
    }

    pub(crate) fn pages(&self) -> &[u32] {
        self.table.as_ref().map(PageTable::pages).unwrap_or_default()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(table) = self.table.take() {
            self.state.give_pages_back(table);
        }
    }
}

/// A handle's way to the compute thread.
#[derive(Clone, Debug)]
pub(crate) struct JobQueue {
    pub(crate) state: Arc<EngineState>,
    jobs: mpsc::Sender<Job>,
}

impl JobQueue {
    /// The queue, and the end that the thread takes jobs from.
    pub(crate) fn new(state: Arc<EngineState>) -> (Self, mpsc::Receiver<Job>) {
        let (jobs, receiver) = mpsc::channel(JOBS_MAX);
        (Self { state, jobs }, receiver)
    }

    /// Hands a job over and waits for its answer.
    pub(crate) async fn ask<T>(&self, job: impl FnOnce(JobReply<T>) -> Job) -> Result<T, EngineError> {
        let (reply, answer) = oneshot::channel();
        self.jobs.send(job(reply)).await.map_err(|_| self.state.stopped())?;
        answer.await.map_err(|_| self.state.unanswered())?
    }

    /// Has the thread look around. A full queue needs no nudge: the thread looks before every turn.
    pub(crate) fn wake(&self) {
        let _ = self.jobs.try_send(Job::Wake);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.jobs.is_closed()
    }
}
