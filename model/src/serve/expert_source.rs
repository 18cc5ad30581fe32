//! Where an engine turns for experts it does not hold.
//!
//! Owns [`ExpertSource`], which whoever runs several machines implements, and what goes to and fro: a call as plain
//! values, and one output row per pair with a word on who computed it. The invariant: every request is answered once;
//! one that is dropped counts as failed. The engine knows nothing of hosts, and the source nothing of sessions.

use tokio::sync::oneshot;

use crate::nn::expert_call::ExpertCall;

/// Computes experts elsewhere.
pub trait ExpertSource: Send + Sync {
    /// Takes a request and returns at once: the compute thread calls this. It never has more requests open than an
    /// engine has batches in flight.
    fn ask(&self, request: ExpertRequest);
}

/// Expert outputs wanted from elsewhere.
#[derive(Debug)]
pub struct ExpertRequest {
    /// Rows of a layer, with none but the experts wanted in their routes; a row may have none.
    pub call: ExpertCall,
    pub reply: ExpertReply,
}

/// Where the answer goes.
#[derive(Debug)]
pub struct ExpertReply(oneshot::Sender<Result<ExpertOutputs, SourceError>>);

/// What came of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertOutputs {
    /// `[slots, hidden]`, in the call's order of slots.
    pub values: Vec<f32>,
    /// Who computed them.
    pub shares: Vec<Share>,
}

/// Slots that were computed by one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Kernel class and precision, if it was not this machine after all.
    pub elsewhere: Option<String>,
    pub slots: Vec<u32>,
}

/// Why experts cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// Nobody has some of them; the text names them and who should.
    #[error("{0}")]
    Missing(String),
    /// Those who have these experts of the layer are away and expected back; the text names them. The same request may succeed later.
    #[error("{why}")]
    Unavailable { layer: u16, experts: Vec<u16>, why: String },
    #[error("{0}")]
    Failed(String),
}

impl ExpertRequest {
    pub(crate) fn new(call: ExpertCall) -> (Self, oneshot::Receiver<Result<ExpertOutputs, SourceError>>) {
        let (reply, answer) = oneshot::channel();
        (Self { call, reply: ExpertReply(reply) }, answer)
    }
}

impl ExpertReply {
    /// Ends the request.
    pub fn answer(self, result: Result<ExpertOutputs, SourceError>) {
        // The batch may have been cancelled meanwhile.
        let _ = self.0.send(result);
    }

    /// Resolves when nobody waits for the answer any more.
    pub async fn given_up(&mut self) {
        self.0.closed().await;
    }
}
