//! Asks the members what they remember of this node's log, and remembers theirs.
//!
//! Owns [`Recollection`]. Decisions are in [`super::standing`].

use super::local::LocalMember;
use super::network::call;
use super::rpc::{RpcRefusal, RpcReply, RpcRequest};
use super::sled_log::{SledLog, StoreError};
use super::standing::{History, Mark, Others, Progress, Recall, Standing};
use crate::ids::{NodeId, Peer};
use crate::runtime::{self, sleep_until, timeout};
use crate::state::Applied;
use crate::sync::lock;
use futures::stream::{FuturesUnordered, StreamExt};
use openraft::LogIdOptionExt;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::sync::watch;

/// How long a member has to answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Pause before those that have not answered are asked again, until this node may vote, and from then on.
const AGAIN: Duration = Duration::from_millis(100);
const LATER: Duration = Duration::from_secs(2);

/// Pause between two looks at what is to be kept of the others.
const SAVED_AFTER: Duration = Duration::from_secs(1);

/// What this node and the others remember of one another.
pub(super) struct Recollection {
    /// Given up at shutdown, when the database is closed.
    store: Mutex<Option<SledLog>>,
    durable: Arc<Mutex<Mark>>,
    recall: Mutex<Recall>,
    history: Arc<Mutex<History>>,
    others: Mutex<Others>,
    standing: watch::Sender<Standing>,
    parted: watch::Sender<BTreeMap<NodeId, u64>>,
}

impl Recollection {
    /// A node that has just opened its log. That of a node which has just come into the mesh cannot have gone back.
    pub fn new(store: SledLog, fresh: bool, history: Arc<Mutex<History>>) -> Result<Self, StoreError> {
        let standing = if fresh { Standing::Confirmed } else { Standing::Unconfirmed };
        let others = Others::new(store.others()?);
        Ok(Self {
            recall: Mutex::default(),
            durable: store.durable(),
            store: Mutex::new(Some(store)),
            history,
            others: Mutex::new(others),
            standing: watch::Sender::new(standing),
            parted: watch::Sender::default(),
        })
    }

    /// Lets the database be closed.
    pub fn close(&self) {
        lock(&self.store).take();
    }

    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    pub fn parted(&self) -> watch::Receiver<BTreeMap<NodeId, u64>> {
        self.parted.subscribe()
    }

    pub fn may_vote(&self) -> bool {
        self.standing.borrow().may_vote()
    }

    /// Whether this node may acknowledge entries of a leader of this term.
    pub fn may_follow(&self, local: &LocalMember, term: u64) -> bool {
        self.may_vote() || {
            let mut recall = lock(&self.recall);
            recall.learn(local.electors());
            recall.may_follow(local.identity.node, term)
        }
    }

    /// Whether this node can be a member no more under the id that it has.
    pub fn is_lost(&self) -> bool {
        self.standing.borrow().is_lost()
    }

    /// Takes note of how far a member says that it has got.
    pub fn heard(&self, local: &LocalMember, node: NodeId, progress: Progress) {
        let state = Arc::clone(&local.state.borrow());
        let (mut others, history) = (lock(&self.others), lock(&self.history));
        if others.heard(node, progress, &history) {
            tracing::error!(%node, index = progress.applied.index, "the log of another member has parted from this node's");
        }
        others.retain(|node| state.members.contains_key(node));
        self.parted.send_if_modified(|parted| {
            let news = parted != others.parted();
            parted.clone_from(others.parted());
            news
        });
        let metrics = local.raft.metrics();
        let voters = metrics.borrow().membership_config.membership().get_joint_config().clone();
        if let Some(parted) = others.standing(&voters) {
            self.lose(parted);
        }
    }

    /// How far this node remembers another to have got.
    pub fn of(&self, local: &LocalMember, node: NodeId) -> Mark {
        let remembered = lock(&self.others).mark(node);
        let metrics = local.raft.metrics();
        let metrics = metrics.borrow();
        let matched = metrics.replication.as_ref().and_then(|matched| matched.get(&node).copied().flatten());
        // What is not agreed on yet may have been replaced under another leader.
        let index = matched.index().min(metrics.last_applied.index()).unwrap_or(0);
        remembered.max(Mark { term: 0, index })
    }

    /// How far this node has got.
    pub fn progress(&self, local: &LocalMember) -> Progress {
        let applied: Applied = local.state.borrow().applied;
        let durable = *lock(&self.durable);
        Progress { mark: Mark { index: durable.index.min(applied.index), ..durable }, applied }
    }

    fn lose(&self, standing: Standing) {
        self.standing.send_if_modified(|now| {
            // The first reason counts.
            let news = !now.is_lost();
            if news {
                *now = standing;
            }
            news
        });
    }

    fn judge(&self, local: &LocalMember) -> Standing {
        let standing = {
            let mut recall = lock(&self.recall);
            recall.learn(local.electors());
            recall.standing(local.identity.node)
        };
        if standing.is_lost() {
            self.lose(standing);
        } else {
            self.standing.send_if_modified(|now| {
                let news = !now.is_lost() && *now != standing && *now != Standing::Confirmed;
                if news {
                    *now = standing;
                }
                news
            });
        }
        *self.standing.borrow()
    }
}

/// Keeps on the disk what is remembered of the others, so that a mesh whose nodes all start at once remembers too; until the log stops.
pub(super) async fn remember(member: Weak<LocalMember>) {
    let mut saved = BTreeMap::new();
    loop {
        sleep_until(runtime::now() + SAVED_AFTER).await;
        let Some(local) = member.upgrade() else { return };
        if local.raft.metrics().borrow().running_state.is_err() {
            return;
        }
        let marks = lock(&local.recollection.others).marks().clone();
        let Some(store) = lock(&local.recollection.store).clone() else { return };
        if marks != saved && local.full_disk().is_none() {
            match store.save_others(&marks).await {
                Ok(()) => saved = marks,
                Err(error) => tracing::debug!(%error, "what is remembered of others is not on the disk"),
            }
        }
    }
}

/// Asks until every member has answered, or the log stops.
pub(super) async fn drive(member: Weak<LocalMember>) {
    loop {
        let Some(local) = member.upgrade() else { return };
        if local.raft.metrics().borrow().running_state.is_err() {
            return;
        }
        let recollection = &local.recollection;
        let open = lock(&recollection.recall).open(local.identity.node, local.others());
        let is_over = open.is_empty() && !local.is_empty();
        ask(&local, open).await;
        lock(&recollection.recall).asked();
        let standing = recollection.judge(&local);
        if standing.may_vote() {
            local.elections.look_again();
        }
        if is_over && standing != Standing::Unconfirmed {
            return;
        }
        let pause = if standing == Standing::Unconfirmed { AGAIN } else { LATER };
        drop(local);
        sleep_until(runtime::now() + pause).await;
    }
}

async fn ask(local: &LocalMember, nodes: BTreeMap<NodeId, Peer>) {
    let asked = nodes.into_iter().map(|(node, peer): (NodeId, Peer)| async move {
        let question =
            call(&*local.transport, local.identity.mesh, node, peer, RpcRequest::Recall(local.identity.node));
        match timeout(PATIENCE, question).await {
            Ok(Ok(RpcReply::Recalls(memory))) => Some((node, memory)),
            _ => None,
        }
    });
    let mut answers: FuturesUnordered<_> = asked.collect();
    while let Some(answer) = answers.next().await {
        if let Some((node, memory)) = answer {
            let found = *lock(&local.recollection.durable);
            lock(&local.recollection.recall).answer(node, local.identity.node, found, memory);
            local.recollection.judge(local);
            if local.recollection.may_vote() {
                local.elections.look_again();
            }
        }
    }
}

/// Waits until this node's vote does not count any more, after it has left or was admitted anew. If it stopped before, it could take
/// the quorum with it. It may not hear of it itself, since nobody sends it the log any more; so it asks.
pub(super) async fn vote_passed_on(local: &LocalMember) {
    let node = local.identity.node;
    loop {
        if !local.voters.borrow().contains(&node) {
            return;
        }
        let asked = local.others().into_iter().map(|(other, peer)| async move {
            let question = call(&*local.transport, local.identity.mesh, other, peer, RpcRequest::Recall(node));
            match timeout(PATIENCE, question).await {
                // Who has applied that the node is gone never gives its vote back.
                Ok(Ok(RpcReply::Recalls(memory))) => Some(!memory.votes && memory.known_as != Some(node)),
                Ok(Ok(RpcReply::Refused(RpcRefusal::NotAMember(_)))) => Some(true),
                _ => None,
            }
        });
        let answers: Vec<bool> = futures::future::join_all(asked).await.into_iter().flatten().collect();
        // A member that is behind may not know yet that this node votes.
        if !answers.is_empty() && answers.iter().all(|passed| *passed) {
            return;
        }
        sleep_until(runtime::now() + AGAIN).await;
    }
}
