//! Drives [`Election`]: tells it what happens, asks voters, and has the consensus library stand for election.
//!
//! The library's own election timer is off.

use super::election::{Effect, Election, Electorate, Input};
use super::local::LocalMember;
use super::network::call;
use super::rpc::{RpcReply, RpcRequest};
use super::timing::Timing;
use super::types::LogId;
use crate::ids::NodeId;
use crate::runtime::{self, sleep_until, timeout};
use crate::sync::lock;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use openraft::ServerState;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::sync::Notify;

/// The elections of one node.
pub(super) struct Elections {
    election: Mutex<Election>,
    /// The election is due at another time.
    changed: Notify,
    /// How long a voter may take to answer.
    patience: Duration,
}

impl Elections {
    pub fn new(timing: Timing) -> Self {
        let wait = Duration::from_millis(timing.election_min_ms)..Duration::from_millis(timing.election_max_ms);
        let patience = wait.start / 2;
        let election = Election::new(wait, runtime::now(), &mut runtime::rng());
        Self { election: Mutex::new(election), changed: Notify::new(), patience }
    }

    /// The leader was heard.
    pub fn leader_heard(&self, local: &LocalMember) {
        self.handle(Input::LeaderHeard, local);
    }

    /// The leader's process is said to be gone.
    pub fn leader_suspected(&self, local: &LocalMember) {
        self.handle(Input::LeaderSuspected, local);
        self.changed.notify_one();
    }

    /// This node may vote from now on.
    pub fn look_again(&self) {
        self.changed.notify_one();
    }

    /// Whether this node would vote for one whose log ends at `last`.
    pub fn grants(&self, local: &LocalMember, last: Option<LogId>) -> bool {
        // What cannot be read is not behind anything.
        let behind = local.last_log_id().is_none_or(|own| last < own);
        lock(&self.election).grants(&electorate(local), behind, runtime::now())
    }

    fn handle(&self, input: Input, local: &LocalMember) -> Vec<Effect> {
        lock(&self.election).handle(input, &electorate(local), runtime::now(), &mut runtime::rng())
    }
}

fn electorate(local: &LocalMember) -> Electorate {
    let metrics = local.raft.metrics();
    let metrics = metrics.borrow();
    Electorate {
        node: local.identity.node,
        leads: metrics.state == ServerState::Leader,
        may_stand: local.recollection.may_vote() && local.full_disk().is_none(),
        voters: metrics.membership_config.membership().get_joint_config().clone(),
    }
}

type Answers = FuturesUnordered<BoxFuture<'static, Input>>;

/// Runs until the log stops.
pub(super) async fn drive(member: Weak<LocalMember>, elections: Arc<Elections>) {
    let mut answers = Answers::new();
    let mut input = Input::Tick;
    loop {
        let Some(local) = member.upgrade() else { return };
        if local.raft.metrics().borrow().running_state.is_err() {
            return;
        }
        for effect in elections.handle(input, &local) {
            match effect {
                Effect::Stand => {
                    tracing::info!("standing for election");
                    // An error means that the log has stopped.
                    let _ = local.raft.trigger().elect().await;
                }
                Effect::Ask { round, voters } => ask(&local, elections.patience, round, voters, &answers),
            }
        }
        let due = lock(&elections.election).due();
        drop(local);
        input = tokio::select! {
            biased;
            () = sleep_until(due) => Input::Tick,
            () = elections.changed.notified() => Input::Tick,
            Some(answer) = answers.next() => answer,
        };
    }
}

fn ask(local: &LocalMember, patience: Duration, round: u64, voters: BTreeSet<NodeId>, answers: &Answers) {
    let last = local.last_log_id().flatten();
    for from in voters {
        let Some(peer) = local.peer_of(from) else { continue };
        let (transport, mesh) = (Arc::clone(&local.transport), local.identity.mesh);
        let asked = async move {
            let request = RpcRequest::PreVote { last };
            let answer = timeout(patience, call(&*transport, mesh, from, peer, request)).await;
            Input::Answer { round, from, granted: matches!(answer, Ok(Ok(RpcReply::PreVote(true)))) }
        };
        answers.push(asked.boxed());
    }
}
