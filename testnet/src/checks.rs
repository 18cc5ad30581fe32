//! Whether every step of the main job truly happened: pure, from its report.
//!
//! Owns one function for each property. The invariant: a run passes only if all of them hold; each failure says what was
//! expected and what was found. It measures nothing itself.

use std::collections::BTreeSet;

use crate::budget::Budget;
use crate::report::{NodeReport, Report};

/// What a process may take beyond its budget: code, stacks, the allocator's slack, buffers of the network.
pub const RSS_SLACK_BYTES: u64 = 32 << 20;

/// What the run was meant to be.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    /// The model's needs.
    pub budget: Budget,
    /// Ready replicas of every expert.
    pub replicas: usize,
}

/// Every property that does not hold, in words; empty for a run in which every step truly happened.
pub fn failures(report: &Report, expected: &Expected) -> Vec<String> {
    let mut failures = Vec::new();
    failures.extend(answered(report));
    failures.extend(covered(report, expected));
    failures.extend(fetched(report));
    failures.extend(shared(report, expected));
    failures.extend(rows(report, expected));
    failures.extend(agreed(report));
    failures.extend(within_budget(report));
    failures
}

fn answered(report: &Report) -> Option<String> {
    match (report.answer.trim().is_empty(), report.finish_reason.as_deref()) {
        (true, _) => Some("the answer is empty".into()),
        (false, Some("stop")) => None,
        (false, reason) => Some(format!("the answer should end with finish_reason stop, but ended with {reason:?}")),
    }
}

fn covered(report: &Report, expected: &Expected) -> Option<String> {
    if report.coverage < 1.0 {
        return Some(format!("coverage is {}, not 1.0", report.coverage));
    }
    let (have, want) = (report.replicas_min, expected.replicas);
    (have < want).then(|| format!("an expert has {have} ready replica(s); the budgets leave room for {want}"))
}

/// The importer had everything already; the others fetched what they were assigned, each byte once. Where experts are held at
/// fewer bits, what they are held at may have changed as nodes joined: then at least that much.
fn fetched(report: &Report) -> impl Iterator<Item = String> {
    report.nodes.iter().enumerate().filter_map(|(index, node)| {
        let expected = if index == 0 { 0 } else { node.bytes_assigned };
        let lossless = node.precisions.exact == node.experts;
        let wrong = match lossless || index == 0 {
            true => node.bytes_fetched != expected,
            false => node.bytes_fetched < expected,
        };
        let wrong = wrong || node.bytes_assigned == 0;
        wrong.then(|| {
            let NodeReport { name, bytes_fetched, bytes_assigned, .. } = node;
            format!(
                "{name} fetched {bytes_fetched} bytes instead of {expected}; {bytes_assigned} bytes are assigned to it"
            )
        })
    })
}

/// Nobody holds the model alone, where the budget says so and nothing is held at fewer bits.
fn shared(report: &Report, expected: &Expected) -> impl Iterator<Item = String> {
    let Budget { experts, .. } = expected.budget;
    let fits = move |node: &NodeReport| expected.budget.experts_in(node.memory_budget_bytes);
    let wrong = move |node: &&NodeReport| {
        let lossless = node.precisions.exact == node.experts;
        node.experts == 0 || lossless && node.experts > fits(node).min(experts)
    };
    report.nodes.iter().filter(wrong).map(move |node| {
        format!("{} holds {} experts; its budget has room for {}", node.name, node.experts, fits(node))
    })
}

/// Every token but the last went through every layer, some of it at peers; what homes had computed, hosts have served.
fn rows(report: &Report, expected: &Expected) -> Vec<String> {
    let sum = |of: fn(&NodeReport) -> u64| report.nodes.iter().map(of).sum::<u64>();
    let (local, remote, served) = (sum(|n| n.rows_local), sum(|n| n.rows_remote), sum(|n| n.rows_served));
    let tokens = (report.prompt_tokens + report.completion_tokens).saturating_sub(1);
    let pairs = tokens * expected.budget.pairs_per_token;
    let mut failures = Vec::new();
    if local + remote != pairs {
        failures
            .push(format!("{tokens} tokens make {pairs} (row, expert) pairs, but {local} + {remote} were computed"));
    }
    let alone = report.nodes.iter().any(|node| node.name == report.home && node.experts >= expected.budget.experts);
    if remote == 0 && !alone {
        failures.push("no row was computed by a peer".into());
    }
    if remote != served {
        failures.push(format!("homes count {remote} rows computed by peers, hosts count {served}"));
    }
    failures
}

fn agreed(report: &Report) -> Option<String> {
    let states: BTreeSet<_> = report.nodes.iter().map(|node| (node.applied, &node.state_hash)).collect();
    (states.len() > 1).then(|| format!("the log's state differs between nodes (applied, hash): {states:?}"))
}

fn within_budget(report: &Report) -> impl Iterator<Item = String> {
    report.nodes.iter().flat_map(|node| {
        let NodeReport { name, memory_bytes, memory_budget_bytes, rss_bytes, rss_before_bytes, .. } = node;
        let ledger = (memory_bytes > memory_budget_bytes || *memory_bytes == 0)
            .then(|| format!("{name} accounts for {memory_bytes} bytes with a budget of {memory_budget_bytes}"));
        let grown = rss_bytes.saturating_sub(*rss_before_bytes);
        let process = (grown > memory_budget_bytes + RSS_SLACK_BYTES || *rss_bytes == 0)
            .then(|| format!("{name} grew by {grown} bytes (to {rss_bytes}) with a budget of {memory_budget_bytes}"));
        [ledger, process].into_iter().flatten()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::ask::Answer;
    use crate::report::OutsideFacts;
    use crate::settle::tests::status;

    const EXPECTED: Expected = Expected {
        budget: Budget { fixed_bytes: 2, kv_tokens: 1, expert_bytes: 2, experts: 3, pairs_per_token: 4 },
        replicas: 2,
    };

    /// A run in which every step happened.
    fn run() -> Report {
        let answer = Answer {
            text: "Paris.".into(),
            finish_reason: Some("stop".into()),
            usage: json!({"prompt_tokens": 5, "completion_tokens": 3}),
            ..Answer::default()
        };
        let facts = OutsideFacts { pid: 1, data: "d".into(), rss_bytes: 5, bytes_assigned: 10 };
        let own = |fetched: u64, local: u64, remote: u64, served: u64| json!({"own": {"bytes_fetched": fetched, "rows_local": local, "rows_remote": remote, "rows_served": served}});
        let statuses = [
            (status("node-1", &own(0, 0, 0, 6)), facts.clone()),
            (status("node-2", &own(10, 0, 0, 4)), facts.clone()),
            (status("node-3", &own(10, 18, 10, 0)), facts),
        ];
        Report::new("Where?", &answer, 2, &statuses)
    }

    #[test]
    fn a_true_run_passes() {
        assert_eq!(failures(&run(), &EXPECTED), Vec::<String>::new());
    }

    #[test]
    fn each_step_that_did_not_happen_is_told() {
        type Case = (fn(&mut Report), &'static str);
        let cases: [Case; 14] = [
            (|r| r.answer = " ".into(), "empty"),
            (|r| r.finish_reason = Some("length".into()), "finish_reason"),
            (|r| r.coverage = 0.99, "coverage"),
            (|r| r.replicas_min = 1, "ready replica"),
            (|r| r.nodes[0].bytes_fetched = 1, "node-1 fetched 1"),
            (|r| r.nodes[1].bytes_fetched = 9, "node-2 fetched 9"),
            (|r| (r.nodes[1].experts, r.nodes[1].precisions.exact) = (3, 3), "holds 3 experts"),
            (|r| r.nodes[2].rows_local += 1, "pairs"),
            (|r| (r.nodes[2].rows_remote, r.nodes[2].rows_local) = (0, 28), "by a peer"),
            (|r| r.nodes[0].rows_served = 0, "hosts count"),
            (|r| r.nodes[1].state_hash = "other".into(), "differs"),
            (|r| r.nodes[1].memory_bytes = 7, "accounts for 7"),
            (|r| r.nodes[1].rss_bytes = 8 + RSS_SLACK_BYTES, "grew by"),
            (|r| r.nodes[1].rss_bytes = 0, "grew by"),
        ];
        for (change, named) in cases {
            let mut report = run();
            change(&mut report);
            let failures = failures(&report, &EXPECTED).join("; ");
            assert!(failures.contains(named), "{named}: {failures}");
        }
    }

    #[test]
    fn the_table_names_roles() {
        let table = run().table().to_string();
        assert!(table.contains("node-1 (leader)") && table.contains("node-3 (asked)"), "{table}");
    }

    #[test]
    fn the_document_has_the_fields_programs_read() {
        let document = serde_json::to_value(run()).unwrap();
        for field in ["answer", "tokens_per_s", "epoch", "leader", "coverage", "replicas_min", "nodes"] {
            assert!(!document[field].is_null(), "{field}");
        }
        for field in
            "name peer_id api experts bytes_fetched memory_bytes rss_bytes memory_budget_bytes rows_local rows_remote"
                .split(' ')
        {
            assert!(!document["nodes"][0][field].is_null(), "{field}");
        }
    }
}
