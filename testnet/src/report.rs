//! What came of the main job: one document, as JSON for programs and as a table for people.
//!
//! Owns the document's shape and its making from the nodes' statuses. It judges nothing (`checks` does) and its figures are
//! the nodes' own, but for `rss_bytes` and `bytes_assigned`, which are found out without asking them.

use coel_node::config::Size;
use coel_node::status::{Counts, Status};
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

use crate::ask::Answer;

/// The document of `--json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What was asked.
    pub question: String,
    /// What was answered.
    pub answer: String,
    /// Why the answer ended.
    pub finish_reason: Option<String>,
    /// Tokens of the rendered question.
    pub prompt_tokens: u64,
    /// Tokens generated, the end-of-text token included.
    pub completion_tokens: u64,
    /// Tokens after the first, per second since the first.
    pub tokens_per_s: f64,
    /// The mesh, in hex.
    pub mesh: String,
    /// The model's id.
    pub model: String,
    /// Version of the placement.
    pub epoch: u64,
    /// Name of the log's leader.
    pub leader: Option<String>,
    /// Share of experts with a ready replica.
    pub coverage: f64,
    /// Fewest ready replicas of any expert.
    pub replicas_min: usize,
    /// Name of the node that was asked.
    pub home: String,
    /// Every node, the creator first.
    pub nodes: Vec<NodeReport>,
}

/// One node of the document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeReport {
    pub name: String,
    pub node_id: u64,
    pub peer_id: String,
    /// `http://127.0.0.1:PORT`
    pub api: String,
    pub pid: u32,
    /// Its data folder.
    pub data: String,
    /// Experts loaded.
    pub experts: usize,
    /// Of them, by precision.
    pub precisions: Counts,
    /// Bytes received over the weight stream.
    pub bytes_fetched: u64,
    /// Bytes of the blobs assigned to it, counted from manifest and placement.
    pub bytes_assigned: u64,
    /// The node's own ledger.
    pub memory_bytes: u64,
    /// Resident memory, from `/proc`.
    pub rss_bytes: u64,
    /// The same before its first weight, as the node noted it.
    pub rss_before_bytes: u64,
    /// What the ledger may reach.
    pub memory_budget_bytes: u64,
    /// (row, expert) pairs it computed for its own answers.
    pub rows_local: u64,
    /// (row, expert) pairs peers computed for it.
    pub rows_remote: u64,
    /// (row, expert) pairs it computed for peers.
    pub rows_served: u64,
    /// Last applied entry of the log.
    pub applied: u64,
    /// Hash of the replicated state there.
    pub state_hash: String,
}

/// What the testnet finds out about a node without asking it.
#[derive(Debug, Clone)]
pub struct OutsideFacts {
    pub pid: u32,
    pub data: String,
    pub rss_bytes: u64,
    pub bytes_assigned: u64,
}

impl Report {
    /// Puts the document together. `home` is the index of the node that was asked.
    pub fn new(question: &str, answer: &Answer, home: usize, statuses: &[(Status, OutsideFacts)]) -> Self {
        let (asked, _) = &statuses[home];
        let leader = asked.nodes.iter().find(|node| Some(node.node_id) == asked.leader);
        let count = |name: &str| answer.usage[name].as_u64().unwrap_or(0);
        Self {
            question: question.to_owned(),
            answer: answer.text.clone(),
            finish_reason: answer.finish_reason.clone(),
            prompt_tokens: count("prompt_tokens"),
            completion_tokens: count("completion_tokens"),
            tokens_per_s: answer.tokens_per_s,
            mesh: asked.mesh.clone(),
            model: asked.model.as_ref().map(|model| model.id.clone()).unwrap_or_default(),
            epoch: asked.epoch,
            leader: leader.map(|node| node.name.clone()),
            coverage: asked.coverage,
            replicas_min: asked.replicas_min,
            home: asked.name.clone(),
            nodes: statuses.iter().map(|(status, outside)| NodeReport::new(status, outside)).collect(),
        }
    }

    /// The table for people.
    pub fn table(&self) -> Table {
        const HEADER: [&str; 9] = [
            "node",
            "experts",
            "held at",
            "fetched",
            "memory",
            "of budget",
            "rows here",
            "rows by peers",
            "rows for peers",
        ];
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header(HEADER);
        for node in &self.nodes {
            let marks = [(&self.home, "asked"), (self.leader.as_ref().unwrap_or(&String::new()), "leader")]
                .into_iter()
                .filter(|(name, _)| **name == node.name)
                .map(|(_, mark)| mark)
                .collect::<Vec<_>>()
                .join(", ");
            let name = if marks.is_empty() { node.name.clone() } else { format!("{} ({marks})", node.name) };
            table.add_row([
                name,
                node.experts.to_string(),
                node.precisions.to_string(),
                Size(node.bytes_fetched).to_string(),
                Size(node.memory_bytes).to_string(),
                Size(node.memory_budget_bytes).to_string(),
                node.rows_local.to_string(),
                node.rows_remote.to_string(),
                node.rows_served.to_string(),
            ]);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }

    /// One line below the table.
    pub fn summary(&self) -> String {
        format!(
            "{:.1} tokens/s; every expert on at least {} node(s); placement epoch {}; a row is one token through one expert",
            self.tokens_per_s, self.replicas_min, self.epoch
        )
    }
}

impl NodeReport {
    fn new(status: &Status, outside: &OutsideFacts) -> Self {
        let own = &status.own;
        Self {
            name: status.name.clone(),
            node_id: status.node_id.0,
            peer_id: status.peer_id.clone(),
            api: status.api.clone(),
            pid: outside.pid,
            data: outside.data.clone(),
            experts: own.experts,
            precisions: own.precisions,
            bytes_fetched: own.bytes_fetched,
            bytes_assigned: outside.bytes_assigned,
            memory_bytes: own.memory_bytes,
            rss_bytes: outside.rss_bytes,
            rss_before_bytes: own.rss_before_bytes,
            memory_budget_bytes: own.memory_budget_bytes,
            rows_local: own.rows_local,
            rows_remote: own.rows_remote,
            rows_served: own.rows_served,
            applied: status.applied,
            state_hash: status.state_hash.clone(),
        }
    }
}
