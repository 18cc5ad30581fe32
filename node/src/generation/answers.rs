//! Answers that are being written on this node, counted so that it can leave the mesh between them.
//!
//! Owns [`AnswerGate`]. Invariant: once the gate is closed no answer begins, and who waits for the last one sees every answer that began.

use std::sync::Arc;

use tokio::sync::watch;

/// Lets answers begin, until it is closed. Cloning is cheap; all clones are the same gate.
#[derive(Debug, Clone, Default)]
pub struct AnswerGate(Arc<watch::Sender<Gate>>);

#[derive(Debug, Default)]
struct Gate {
    answers: usize,
    closed: bool,
}

/// An answer that is being written; over when dropped.
#[derive(Debug)]
pub struct Answering(AnswerGate);

impl AnswerGate {
    /// Begins an answer; `None` while the gate is closed.
    pub fn begin(&self) -> Option<Answering> {
        let open = self.0.send_if_modified(|gate| {
            gate.answers += usize::from(!gate.closed);
            !gate.closed
        });
        open.then(|| Answering(self.clone()))
    }

    /// Lets no answer begin any more.
    pub fn close(&self) {
        self.0.send_modify(|gate| gate.closed = true);
    }

    /// Lets answers begin again.
    pub fn open(&self) {
        self.0.send_modify(|gate| gate.closed = false);
    }

    /// Waits until no answer is being written.
    pub async fn idle(&self) {
        // The gate lives as long as the sender that `self` holds.
        let _ = self.0.subscribe().wait_for(|gate| gate.answers == 0).await;
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.0.send_modify(|gate| gate.answers -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_closed_gate_lets_no_answer_begin_and_waits_for_those_that_did() {
        let gate = AnswerGate::default();
        gate.idle().await;
        let answer = gate.begin().unwrap();
        gate.close();
        assert!(gate.begin().is_none());
        let idle = gate.idle();
        tokio::pin!(idle);
        assert!(futures::poll!(&mut idle).is_pending());
        drop(answer);
        idle.await;
        gate.open();
        assert!(gate.begin().is_some());
    }
}
