//! What can be asked of the mesh, and what it can answer: the commands of the placement log.
//!
//! A command carries everything its outcome depends on, the clock included, because every member must compute the same
//! outcome from it, now or when it catches up next week. The one thing a command does not carry is its author: a sender
//! could claim anything, so the leader adds that to the log's entry ([`Origin`]). Commands may arrive twice, because a
//! proposer that lost the reply asks again; each is harmless then.

use super::{MemberInfo, Model};
use crate::ids::{Epoch, ExpertId, MeshId, ModelId, NodeId, Peer, TokenHash};
use crate::precision::{Bounds, Precision};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Who stands behind a command: known from the log's entry, never from the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The member that proposed the command, by the connection on which the proposal came.
    pub author: NodeId,
    /// The leader that put it into the log.
    pub leader: NodeId,
}

/// For each expert the nodes that are to hold it, and at which precision.
pub type Assignment = BTreeMap<ExpertId, BTreeMap<NodeId, Precision>>;

/// One command of the placement log. [`apply`](crate::apply()) says who may propose which.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// The first command of a mesh; its author becomes node 1.
    CreateMesh {
        /// The new mesh.
        mesh: MeshId,
        /// The creator.
        member: MemberInfo,
    },
    /// Admits a newcomer on an invite. A peer that is a member already gets its own id again; nothing of it changes, and
    /// the invite is not used; unless it joins anew.
    Join {
        /// The newcomer's network identity.
        peer: Peer,
        /// Its name, for people.
        name: String,
        /// Where it is reachable.
        addresses: Vec<String>,
        /// The hash of the invite's token; the proposer has checked the newcomer's proof of it.
        token: TokenHash,
        /// The proposer's clock, milliseconds since the Unix epoch.
        now_ms: u64,
        /// It has no log of this mesh. A member that has lost its log must not come back under its id: it would vote again where it has
        /// voted, and lack what it has acknowledged. So it is admitted under a new id, and the old one is gone.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        anew: bool,
    },
    /// A member has other addresses or another name now.
    Readdress {
        /// Which member.
        node: NodeId,
        /// Its name.
        name: String,
        /// Where it is reachable.
        addresses: Vec<String>,
    },
    /// Opens an invite, or renews one with the same token.
    Invite {
        /// The hash of its token.
        token: TokenHash,
        /// How many nodes it admits.
        uses: u32,
        /// When it ends, milliseconds since the Unix epoch.
        expires_at_ms: u64,
    },
    /// A member is about to leave, so that nothing new is placed on it; or it stays after all.
    Leaving {
        /// Which member.
        node: NodeId,
        /// Whether it is about to leave.
        leaving: bool,
    },
    /// A member is gone, and its replicas with it.
    Leave {
        /// Which member.
        node: NodeId,
    },
    /// A member is gone for good and cannot say so itself, and its replicas with it; or a member of a former mesh will not follow.
    Forget {
        /// Which member.
        node: NodeId,
    },
    /// A member's log is not what it was: it is admitted anew, under a new id, and its old one is gone with its replicas. It would vote again
    /// where it has voted, and lack what it has acknowledged. A node that was readmitted and does not know it is told its id by the
    /// refusal.
    Readmit {
        /// Which member.
        node: NodeId,
    },
    /// Registers a model with the mesh.
    RegisterModel {
        /// The hash of its manifest.
        id: ModelId,
        /// What the mesh remembers of it.
        model: Model,
    },
    /// A new placement, planned at epoch `expect`.
    Place {
        /// The epoch that the planner saw; at any other epoch the plan is refused.
        expect: Epoch,
        /// The model to place.
        model: ModelId,
        /// The replicas to have. Experts of the model that are not named here have none.
        replicas: Assignment,
    },
    /// Sets the precisions at which experts may be placed from now on.
    Precisions {
        /// The precisions.
        bounds: Bounds,
    },
    /// A node holds, verified and loaded, experts that the placement of `epoch` assigned to it.
    Ready {
        /// Which node.
        node: NodeId,
        /// The placement that the node looked at; at any other epoch the report is refused.
        epoch: Epoch,
        /// The experts, each with the precision it is held at, which need not be the one wanted. Experts that are not
        /// assigned to the node are ignored.
        experts: BTreeMap<ExpertId, Precision>,
        /// Whether it holds the trunk too.
        trunk: bool,
    },
    /// A node no longer serves some of its replicas: it found them corrupt, or dropped them.
    NotReady {
        /// Which node.
        node: NodeId,
        /// Which of its experts.
        experts: Vec<ExpertId>,
    },
}

impl Command {
    /// The command's name, for logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::CreateMesh { .. } => "create-mesh",
            Self::Join { .. } => "join",
            Self::Readdress { .. } => "readdress",
            Self::Invite { .. } => "invite",
            Self::Leaving { .. } => "leaving",
            Self::Leave { .. } => "leave",
            Self::Forget { .. } => "forget",
            Self::Readmit { .. } => "readmit",
            Self::RegisterModel { .. } => "register-model",
            Self::Place { .. } => "place",
            Self::Precisions { .. } => "precisions",
            Self::Ready { .. } => "ready",
            Self::NotReady { .. } => "not-ready",
        }
    }
}

/// What came of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done, or done before.
    Done,
    /// The peer is a member now, or was one before.
    Joined {
        /// Its id.
        node: NodeId,
    },
    /// Done, and the placement now has this epoch.
    Epoch(Epoch),
    /// Nothing changed.
    Refused(Refusal),
}

/// Why a command changed nothing. The message names the fault, [`Refusal::remedy`] what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The log already belongs to a mesh.
    #[error("this log already belongs to mesh {0}")]
    MeshExists(MeshId),
    /// No invite has this token.
    #[error("the invite is not known to this mesh")]
    UnknownInvite,
    /// The invite's time is over.
    #[error("the invite expired {} s ago", late_ms / 1000)]
    ExpiredInvite {
        /// By how much, in milliseconds.
        late_ms: u64,
    },
    /// Nobody else may join on it.
    #[error("the invite is used up")]
    UsedUpInvite,
    /// The placement has moved on since the command was made.
    #[error("made for epoch {expected}, but the mesh is at epoch {actual}")]
    StaleEpoch {
        /// What the command expected.
        expected: Epoch,
        /// What the mesh has.
        actual: Epoch,
    },
    /// The author says something that only another node may say.
    #[error("node {author} may not speak for node {node}")]
    SpeaksForAnother {
        /// The author.
        author: NodeId,
        /// The node that the command is about.
        node: NodeId,
    },
    /// The author says something that only the leader may say.
    #[error("only the leader, node {leader}, may do this; node {author} asked for it")]
    NotTheLeader {
        /// The author.
        author: NodeId,
        /// The leader that took the command into the log.
        leader: NodeId,
    },
    /// No such member.
    #[error("node {0} is not a member of the mesh")]
    NotAMember(NodeId),
    /// The only member cannot leave.
    #[error("node {0} is the last member of the mesh")]
    LastMember(NodeId),
    /// A member that the leader hears is not forgotten.
    #[error("node {0} is up")]
    StillUp(NodeId),
    /// No such model.
    #[error("model {0} is not registered")]
    UnknownModel(ModelId),
    /// Another model has this name.
    #[error("the name \"{name}\" belongs to model {id}")]
    NameTaken {
        /// The name.
        name: String,
        /// Whose it is.
        id: ModelId,
    },
    /// The same model is registered under another name.
    #[error("model {id} is registered as \"{name}\"")]
    RegisteredAs {
        /// The model.
        id: ModelId,
        /// Its name.
        name: String,
    },
    /// The model has no such expert.
    #[error("the model has no expert {0}")]
    UnknownExpert(ExpertId),
    /// The measurements on a model's experts contradict the model.
    #[error("the sensitivity of the model's experts is not what was measured on them: {0}")]
    Sensitivity(String),
    /// A part of the command, or what the state would become, is larger than the log accepts.
    #[error("{what}: {actual} is more than the {limit} allowed")]
    TooLarge {
        /// Which part, with its unit.
        what: String,
        /// How much it is.
        actual: u64,
        /// How much it may be.
        limit: u64,
    },
}

impl Refusal {
    /// What a person can do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::MeshExists(_) => "use an empty data folder to create another mesh",
            Self::UnknownInvite => {
                "check that the invite was copied whole, or ask a member for a new one (coel invite)"
            }
            Self::ExpiredInvite { .. } | Self::UsedUpInvite => "ask a member for a new one (coel invite)",
            Self::StaleEpoch { .. } => "read the placement again and decide anew",
            Self::SpeaksForAnother { .. } => "run the command on that node",
            Self::NotTheLeader { .. } => "leave it to the leader, which plans again by itself",
            Self::NotAMember(_) => "join the mesh first (coel join INVITE)",
            Self::LastMember(_) => "stop the node instead; the mesh ends when its data folder is removed",
            Self::StillUp(_) => "run `coel leave` on it; or stop it, and try again in a moment",
            Self::UnknownModel(_) => "import it first (coel model import DIR)",
            Self::NameTaken { .. } => "import it under another name",
            Self::RegisteredAs { .. } => "use that name",
            Self::UnknownExpert(_) => "plan again from the model's manifest",
            Self::Sensitivity(_) => "import the model again (coel model import DIR)",
            Self::TooLarge { .. } => "make it smaller, or remove what is not needed",
        }
    }
}
