//! One sequence on an engine.
//!
//! Owns [`Session`]: how far the sequence is, and its pages of the KV pool. All its state is here; the compute thread
//! knows a session only while it has something to compute. The invariants: a session's pages are its own until it is
//! dropped and no flight has it any more; an advance that fails or is given up leaves the session as it was.

use std::{collections::BTreeSet, sync::Arc};

use crate::{
    decoder::{DecodeError, Want, check_tokens},
    engine::{Engine, EngineError, Shared},
    pages::PageTable,
    router::Route,
    scheduler::SessionId,
    slices::Precision,
    worker::{Advance, Job},
};

/// The pages of a session, given back when the last of handle and flights lets go.
#[derive(Debug)]
pub(crate) struct Lease {
    shared: Arc<Shared>,
    table: Option<PageTable>,
}

impl Lease {
    pub(crate) fn new(shared: Arc<Shared>, table: PageTable) -> Self {
        Self { shared, table: Some(table) }
    }

    pub(crate) fn pages(&self) -> &[u32] {
        self.table.as_ref().map(PageTable::pages).unwrap_or_default()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(table) = self.table.take() {
            self.shared.pages_back(table);
        }
    }
}

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
    /// Kernel classes and precisions of those who computed elsewhere, each once: other machines, and the host where experts
    /// lie in its memory beneath a device.
    pub classes: Vec<String>,
}

/// For each layer and row its routes, ascending by expert; nothing for a layer without experts.
pub type Routes = Vec<Vec<Vec<Route>>>;

/// One sequence. Dropping it frees its pages, at the end of the flight it is in if it is in one.
#[derive(Debug)]
pub struct Session {
    engine: Engine,
    id: SessionId,
    lease: Arc<Lease>,
    capacity: usize,
    used: usize,
}

impl Session {
    pub(crate) fn new(engine: Engine, id: SessionId, lease: Lease, capacity: usize) -> Self {
        Self { engine, id, lease: Arc::new(lease), capacity, used: 0 }
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
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
        check_tokens(self.engine.config(), self.used, self.capacity, tokens)?;
        let advance = Advance {
            session: self.id,
            lease: self.lease.clone(),
            past: self.used,
            tokens: tokens.to_vec(),
            want,
            watch,
        };
        let advanced = self.engine.ask(|reply| Job::Advance { advance, reply }).await?;
        self.used += tokens.len();
        Ok(advanced)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.engine.closed(self.id);
    }
}
