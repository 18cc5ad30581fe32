//! When a mesh is ready to be asked: pure, from what the nodes say.
//!
//! Owns the judgement of one round of statuses and the patience over many: [`Patience`] turns verdicts into a decision by
//! counting rounds, not seconds. The invariant: a mesh passes only if every node itself says that it is ready *and* the
//! replicated placement shows it; neither alone is believed. It asks nobody and waits for nothing.

use coel_node::status::Status;
use coel_store::voters_among;

/// Rounds for which there must be a fault before it is believed to last: a node that has just joined may lack a
/// peer, and a leader may not have heard of a budget yet.
const LASTING_ROUNDS: u32 = 40;
/// Rounds for which everything must stay as it is where budgets leave replicas to chance.
const QUIET_ROUNDS: u32 = 8;

/// What a mesh shall come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Members.
    pub nodes: usize,
    /// Experts of the model.
    pub experts: usize,
    /// Ready replicas of every expert.
    pub replicas: usize,
}

/// One round's judgement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Everything is as wanted, in this state: (applied, epoch).
    Settled(u64, u64),
    /// Not yet; how far it is.
    Waiting(String),
    /// Somebody reports what waiting alone will not mend.
    Fault(String),
}

/// Judges what all nodes said, one status each.
pub fn judge(statuses: &[Status], wanted: Wanted) -> Verdict {
    if let Some((name, problem)) =
        statuses.iter().find_map(|status| Some((&status.name, status.readiness.problem.as_ref()?)))
    {
        return Verdict::Fault(format!("{name}: {problem}"));
    }
    if statuses.len() < wanted.nodes {
        return Verdict::Waiting(format!("{} of {} nodes answer", statuses.len(), wanted.nodes));
    }
    let members = statuses.iter().map(|status| status.nodes.len()).min().unwrap_or(0);
    if members < wanted.nodes {
        return Verdict::Waiting(format!("{members} of {} nodes are known to everybody", wanted.nodes));
    }
    if let Some(reason) = statuses.iter().find_map(|status| status.planner.as_ref()) {
        return Verdict::Fault(reason.clone());
    }
    let ready = statuses.iter().filter(|status| status.readiness.ready).count();
    if ready < statuses.len() {
        return Verdict::Waiting(progress(statuses, ready));
    }
    let first = &statuses[0];
    if first.placement.len() < wanted.experts || statuses.iter().any(|status| status.coverage < 1.0) {
        return Verdict::Waiting(format!("{} of {} experts are placed", first.placement.len(), wanted.experts));
    }
    let (have, all) = statuses
        .iter()
        .flat_map(|status| status.placement.values().flatten())
        .fold((0, 0), |(have, all), replica| (have + usize::from(replica.ready), all + 1));
    let fewest = statuses.iter().map(|status| status.replicas_min).min().unwrap_or(0);
    if have < all || fewest < wanted.replicas {
        let (have, all) = (have / statuses.len(), all / statuses.len());
        return Verdict::Waiting(format!("{have} of {all} replicas are ready, each expert has at least {fewest}"));
    }
    let voters = statuses.iter().map(|status| status.nodes.iter().filter(|node| node.voter).count()).min().unwrap_or(0);
    let enough = voters_among(wanted.nodes);
    if voters < enough {
        return Verdict::Waiting(format!("{voters} of {enough} voters have been up for long enough to vote"));
    }
    if statuses.iter().any(|status| (status.applied, status.epoch) != (first.applied, first.epoch)) {
        return Verdict::Waiting("the log is on its way to everybody".into());
    }
    Verdict::Settled(first.applied, first.epoch)
}

fn progress(statuses: &[Status], ready: usize) -> String {
    let sum = |of: fn(&Status) -> u64| statuses.iter().map(of).sum::<u64>() as f64 / f64::from(1 << 20);
    let held = sum(|status| status.readiness.bytes_held);
    let assigned = sum(|status| status.readiness.bytes_assigned);
    let waiting = statuses.iter().find(|status| !status.readiness.ready);
    let waiting = waiting.map(|status| format!("; {}: {}", status.name, status.readiness)).unwrap_or_default();
    format!("{ready} of {} nodes ready, {held:.1} of {assigned:.1} MiB in place{waiting}", statuses.len())
}

/// What to do after a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Ask the mesh.
    Go,
    /// Look again; what to show meanwhile.
    Wait(String),
    /// It will not get better.
    GiveUp(String),
}

/// Counts rounds that are alike.
#[derive(Debug)]
pub struct Patience {
    wanted: Wanted,
    last: Option<Verdict>,
    rounds: u32,
}

impl Patience {
    /// Patience for a mesh that shall come to `wanted`.
    pub fn new(wanted: Wanted) -> Self {
        Self { wanted, last: None, rounds: 0 }
    }

    /// The decision after one more round.
    pub fn round(&mut self, verdict: Verdict) -> Decision {
        let same = match (&self.last, &verdict) {
            // A fault may be told in other words each time, naming the peers in another order.
            (Some(Verdict::Fault(_)), Verdict::Fault(_)) => true,
            (Some(last), now) => last == now,
            (None, _) => false,
        };
        self.rounds = if same { self.rounds + 1 } else { 1 };
        self.last = Some(verdict.clone());
        let quiet = if self.wanted.replicas >= 2 { 2 } else { QUIET_ROUNDS };
        match verdict {
            Verdict::Settled(..) if self.rounds >= quiet => Decision::Go,
            Verdict::Settled(..) => Decision::Wait("ready; the placement shall stay as it is for a moment".into()),
            Verdict::Waiting(how_far) => Decision::Wait(how_far),
            Verdict::Fault(fault) if self.rounds >= LASTING_ROUNDS => Decision::GiveUp(fault),
            Verdict::Fault(fault) => Decision::Wait(fault),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use coel_node::status::Status;
    use serde_json::{Value, json};

    use super::*;

    /// A status as a ready node of a settled mesh of three would print it, with `changes` on top.
    pub(crate) fn status(name: &str, changes: &Value) -> Status {
        let node = |id: u64| {
            json!({"node_id": id, "name": format!("node-{id}"), "peer_id": "p", "liveness": "up", "leaving": false,
                   "voter": true, "rtt_ms": null, "memory_headroom": null, "compute_headroom": null,
                   "memory_budget_bytes": null, "experts": 2, "experts_ready": 2, "expert_bytes": 4, "trunk": "exact",
                   "precisions": {"q4": 0, "q8": 0, "exact": 2}})
        };
        let replicas = |a: u64, b: u64| {
            let on = |node: u64| json!({"node": node, "precision": "exact", "serves": "exact", "ready": true});
            json!([on(a), on(b)])
        };
        let mut status = json!({
            "mesh": "m", "node_id": 1, "name": name, "peer_id": "p", "api": "http://127.0.0.1:1", "device": "cpu",
            "leader": 1, "term": 1, "applied": 40, "state_hash": "h", "epoch": 7, "precisions": "auto", "models": [], "model": null,
            "coverage": 1.0, "replicas_min": 2, "planner": null,
            "readiness": {"ready": true, "waiting_for": null, "problem": null, "coverage": 1.0, "bytes_assigned": 10, "bytes_held": 10},
            "nodes": [node(1), node(2), node(3)],
            "own": {"experts": 2, "precisions": {"q4": 0, "q8": 0, "exact": 2}, "bytes_fetched": 10, "memory_bytes": 5, "rss_before_bytes": 1, "memory_budget_bytes": 6,
                    "rows_local": 0, "rows_remote": 0, "rows_served": 0},
            "placement": {"a": replicas(1, 2), "b": replicas(2, 3), "c": replicas(3, 1)},
        });
        merge(&mut status, changes);
        serde_json::from_value(status).unwrap()
    }

    fn merge(onto: &mut Value, changes: &Value) {
        match (onto, changes) {
            (Value::Object(onto), Value::Object(changes)) => {
                for (key, value) in changes {
                    merge(onto.entry(key).or_insert(Value::Null), value);
                }
            }
            (onto, changes) => *onto = changes.clone(),
        }
    }

    const WANTED: Wanted = Wanted { nodes: 3, experts: 3, replicas: 2 };

    fn check(changes: &Value) -> Verdict {
        let statuses = [status("node-1", &json!({})), status("node-2", &json!({})), status("node-3", changes)];
        judge(&statuses, WANTED)
    }

    #[test]
    fn a_ready_mesh_is_settled() {
        assert_eq!(check(&json!({})), Verdict::Settled(40, 7));
    }

    #[test]
    fn whatever_is_missing_is_waited_for_by_name() {
        let mut lone_voter = serde_json::to_value(&status("node-3", &json!({})).nodes).unwrap();
        (1..3).for_each(|node| lone_voter[node]["voter"] = false.into());
        for (changes, named) in [
            (json!({"nodes": []}), "0 of 3 nodes"),
            (json!({"readiness": {"ready": false, "waiting_for": "weights"}}), "node-3: weights"),
            (json!({"coverage": 0.9}), "experts are placed"),
            (json!({"replicas_min": 1}), "at least 1"),
            (
                json!({"placement": {"a": [{"node": 1, "precision": "exact", "serves": null, "ready": false}]}}),
                "replicas are ready",
            ),
            (json!({"nodes": lone_voter}), "1 of 3 voters"),
            (json!({"applied": 39}), "log"),
        ] {
            let verdict = check(&changes);
            assert!(matches!(&verdict, Verdict::Waiting(what) if what.contains(named)), "{changes}: {verdict:?}");
        }
        assert!(matches!(judge(&[status("node-1", &json!({}))], WANTED), Verdict::Waiting(_)));
    }

    #[test]
    fn a_fault_counts_once_it_lasts() {
        let fault = check(&json!({"readiness": {"problem": "layer 5 expert 23: damaged"}}));
        assert_eq!(fault, Verdict::Fault("node-3: layer 5 expert 23: damaged".into()));
        let mut patience = Patience::new(WANTED);
        for _ in 1..LASTING_ROUNDS {
            assert!(matches!(patience.round(fault.clone()), Decision::Wait(_)));
        }
        assert!(matches!(patience.round(fault.clone()), Decision::GiveUp(_)));
        patience.round(Verdict::Waiting("better".into()));
        assert!(matches!(patience.round(fault), Decision::Wait(_)));
    }

    #[test]
    fn a_shortfall_is_no_fault_before_everybody_has_joined() {
        let shortfall = json!({"planner": "17 bytes are missing"});
        assert!(matches!(check(&shortfall), Verdict::Fault(_)));
        assert!(matches!(judge(&[status("node-1", &shortfall)], WANTED), Verdict::Waiting(_)));
    }

    #[test]
    fn tight_budgets_are_watched_for_longer() {
        let mut patience = Patience::new(Wanted { replicas: 1, ..WANTED });
        for _ in 1..QUIET_ROUNDS {
            assert!(matches!(patience.round(Verdict::Settled(40, 7)), Decision::Wait(_)));
        }
        assert!(matches!(patience.round(Verdict::Settled(41, 8)), Decision::Wait(_)));
    }
}
