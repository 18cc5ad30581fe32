//! What can be asked of the mesh, and what it can answer: the entries of the placement log.
//!
//! A command carries everything its outcome depends on, the clock included, because every member
//! must compute the same answer from it, now or when it catches up next week. Commands may arrive
//! twice (a proposer that lost the reply asks again), so each is written to be harmless then.

use crate::ids::{Epoch, ExpertId, MeshId, ModelId, NodeId, Peer, TokenHash};
use crate::precision::{Bounds, Precision};
use crate::state::{MemberInfo, Model};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// For each expert the nodes that are to hold it, and at which precision.
pub type Assignment = BTreeMap<ExpertId, BTreeMap<NodeId, Precision>>;

/// One entry of the placement log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// The first command of a mesh; its author becomes node 1.
    CreateMesh {
        /// The new mesh.
        mesh: MeshId,
        /// Who creates it.
        member: MemberInfo,
    },
    /// A newcomer, on an invite. A peer that is a member already gets its own id again and uses
    /// nothing up.
    Join {
        /// Its network identity.
        peer: Peer,
        /// What people call it.
        name: String,
        /// Where it is reachable.
        addresses: Vec<String>,
        /// The hash of the invite's token; whoever proposes this has checked the proof of it.
        token: TokenHash,
        /// The proposer's clock, milliseconds since the Unix epoch.
        now_ms: u64,
    },
    /// A member is now reachable elsewhere, or called otherwise.
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
    /// A member will leave: nothing new goes to it. Or it stays after all.
    Leaving {
        /// Which member.
        node: NodeId,
        /// Whether it will leave.
        leaving: bool,
    },
    /// A member is gone, and its replicas with it.
    Leave {
        /// Which member.
        node: NodeId,
    },
    /// Makes a model known to all.
    RegisterModel {
        /// The hash of its manifest.
        id: ModelId,
        /// What to remember of it.
        model: Model,
    },
    /// A new placement, made looking at epoch `expect`.
    Place {
        /// The epoch that the planner saw; another one refuses the plan.
        expect: Epoch,
        /// The model to place.
        model: ModelId,
        /// Who holds what. Experts of the model that are not named here have no replica.
        replicas: Assignment,
    },
    /// Says at which precisions experts may be placed from now on.
    Precisions {
        /// Those.
        bounds: Bounds,
    },
    /// A node holds, verified and loaded, experts that the placement of `epoch` assigned to it.
    Ready {
        /// Which node.
        node: NodeId,
        /// The placement it looked at; another one refuses the report.
        epoch: Epoch,
        /// Which of its experts, and at which precision, be it the one wanted or not; what is not
        /// assigned to it is ignored.
        experts: BTreeMap<ExpertId, Precision>,
        /// It holds the trunk too.
        trunk: bool,
    },
    /// A node found replicas of its own corrupt, or dropped them.
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
            Self::RegisterModel { .. } => "register-model",
            Self::Place { .. } => "place",
            Self::Precisions { .. } => "precisions",
            Self::Ready { .. } => "ready",
            Self::NotReady { .. } => "not-ready",
        }
    }
}

/// What the mesh answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done, or already so.
    Done,
    /// The peer is this member.
    Joined {
        /// Its id.
        node: NodeId,
    },
    /// Done, and the placement now has this epoch.
    Epoch(Epoch),
    /// Nothing changed.
    Refused(Refusal),
}

/// Why a command changed nothing. The message names the fault; [`Refusal::remedy`] what to do.
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
    /// No such member.
    #[error("node {0} is not a member of the mesh")]
    NotAMember(NodeId),
    /// The only member cannot leave.
    #[error("node {0} is the last member of the mesh")]
    LastMember(NodeId),
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
    /// What was measured on a model cannot be so.
    #[error("the sensitivity of the model's experts is not what was measured on them: {0}")]
    Sensitivity(String),
    /// A part of the command is longer than the log accepts.
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
    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::MeshExists(_) => "use an empty data folder to create another mesh",
            Self::UnknownInvite => {
                "check that the invite was copied whole, or ask a member for a new one (coel invite)"
            }
            Self::ExpiredInvite { .. } | Self::UsedUpInvite => "ask a member for a new one (coel invite)",
            Self::StaleEpoch { .. } => "read the placement again and decide anew",
            Self::NotAMember(_) => "join the mesh first (coel join INVITE)",
            Self::LastMember(_) => "stop the node instead; the mesh ends when its data folder is removed",
            Self::UnknownModel(_) => "import it first (coel model import DIR)",
            Self::NameTaken { .. } => "import it under another name",
            Self::RegisteredAs { .. } => "use that name",
            Self::UnknownExpert(_) => "plan again from the model's manifest",
            Self::Sensitivity(_) => "import the model again (coel model import DIR)",
            Self::TooLarge { .. } => "make it smaller",
        }
    }
}
