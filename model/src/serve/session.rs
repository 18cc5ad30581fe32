//! One sequence on an engine.
//!
//! Owns [`Session`]: how far the sequence is, and its pages of the KV pool. All its state is here; the compute thread
//! knows a session only while it has something to compute. The invariants: a session's pages are its own until it is
//! dropped and no batch has it any more; an advance that fails or is cancelled leaves the session as it was.

use std::sync::Arc;

use super::{
    error::EngineError,
    jobs::{Advance, Advanced, Job, JobQueue, Lease, Routes},
    scheduler::SessionId,
};
use crate::nn::batch::{DecodeError, Want, check_tokens};

/// One sequence. Dropping it frees its pages, at the end of the batch it is in if it is in one.
#[derive(Debug)]
pub struct Session {
    queue: JobQueue,
    id: SessionId,
    lease: Arc<Lease>,
    capacity: usize,
    used: usize,
}

impl Session {
    pub(crate) fn new(queue: JobQueue, id: SessionId, lease: Lease, capacity: usize) -> Self {
        Self { queue, id, lease: Arc::new(lease), capacity, used: 0 }
    }

    /// Tokens there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tokens whose keys and values are stored.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Appends `tokens` and computes the logits wanted, together with whatever other sessions want at the moment.
    pub async fn advance(&mut self, tokens: &[u32], want: Want) -> Result<Advanced, EngineError> {
        Ok(self.request(tokens, want, false).await?.0)
    }

    /// Like [`advance`](Self::advance), and tells which experts were chosen.
    pub async fn advance_watched(&mut self, tokens: &[u32], want: Want) -> Result<(Advanced, Routes), EngineError> {
        self.request(tokens, want, true).await
    }

    /// Forgets all but the first `used` tokens.
    pub fn truncate(&mut self, used: usize) -> Result<(), EngineError> {
        if used > self.used {
            return Err(DecodeError::Truncate { wanted: used, used: self.used }.into());
        }
        self.used = used;
        Ok(())
    }

    async fn request(&mut self, tokens: &[u32], want: Want, watch: bool) -> Result<(Advanced, Routes), EngineError> {
        check_tokens(&self.queue.state.config, self.used, self.capacity, tokens)?;
        let advance = Advance {
            session: self.id,
            lease: self.lease.clone(),
            past: self.used,
            tokens: tokens.to_vec(),
            want,
            watch,
        };
        let advanced = self.queue.ask(|reply| Job::Advance { advance, reply }).await?;
        self.used += tokens.len();
        Ok(advanced)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.queue.state.session_closed(self.id);
        self.queue.wake();
    }
}
