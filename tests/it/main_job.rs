//! The main job as a user runs it, and the figures it prints, recomputed from first principles.
//!
//! A toy could print any figures, so they are recomputed here: the bytes that a node had to fetch, from the checkpoint
//! and the placement; the rows that peers had to compute, from the routes that the model takes on one machine. Neither
//! computation asks the nodes.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Stdio;

use coel_node::status::Status;
use coel_testnet::ask;
use coel_testnet::checks::RSS_SLACK_BYTES;
use coel_testnet::report::{NodeReport, Report};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::golden::Alone;
use crate::support::{MODEL, QUESTION, coel_at, get, guarded, lone_node, mesh, post, program, run, testnet, turn};

#[tokio::test]
async fn one_command_answers_and_leaves_nothing_behind() {
    let _turn = turn().await;
    let folder = tempfile::Builder::new().prefix("c").tempdir_in("/tmp").unwrap();
    let mut command = std::process::Command::new(program());
    command.args(["--once", "--json"]).env("TMPDIR", folder.path());
    let ended = run(command).await;
    let document: Value = serde_json::from_str(ended.printed()).unwrap();
    assert_eq!(document["answer"], "The capital of France is Paris.");
    assert!(document["tokens_per_s"].as_f64().unwrap() > 0.0);
    assert!(document["epoch"].as_u64().unwrap() > 0);
    assert_eq!((document["coverage"].as_f64(), document["replicas_min"].as_u64()), (Some(1.0), Some(2)));

    let report: Report = serde_json::from_value(document).unwrap();
    let names: Vec<_> = report.nodes.iter().map(|node| node.name.as_str()).collect();
    assert_eq!(names, ["node-1", "node-2", "node-3"]);
    assert!(names.contains(&report.leader.as_deref().unwrap()));
    let peers: BTreeSet<_> = report.nodes.iter().map(|node| node.peer_id.as_str()).collect();
    assert_eq!(peers.len(), 3);
    for node in &report.nodes {
        assert!(node.api.starts_with("http://127.0.0.1:"), "{}", node.api);
        assert!((1..144).contains(&node.experts), "{} holds {} of 144 experts", node.name, node.experts);
        assert!(node.memory_bytes > 0 && node.memory_bytes <= node.memory_budget_bytes);
        assert!(
            node.rss_bytes > 0 && node.rss_bytes - node.rss_before_bytes <= node.memory_budget_bytes + RSS_SLACK_BYTES
        );
        assert!(!Path::new(&format!("/proc/{}", node.pid)).exists(), "{} still runs", node.name);
        assert_eq!((node.applied, &node.state_hash), (report.nodes[0].applied, &report.nodes[0].state_hash));
    }
    let fetched: Vec<_> = report.nodes.iter().map(|node| node.bytes_fetched > 0).collect();
    assert_eq!(fetched, [false, true, true], "the importer fetches nothing, the others what they were assigned");
    let asked = &report.nodes[2];
    assert!(asked.rows_remote > 0 && asked.rows_local > 0);
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn the_figures_are_those_of_the_routes_and_the_placement() {
    let _turn = turn().await;
    let (mut mesh, job, budget) = mesh(3, 70).await;
    let before = statuses(&mut mesh).await;
    let report = job.ask(&mut mesh, |_| ()).await.unwrap();
    job.verify(&report, &budget).unwrap();
    let after = statuses(&mut mesh).await;

    // Bytes: the manifest, the files, the trunk, and the experts that the placement gives a node.
    let alone = Alone::new();
    let manifest_bytes = manifest_bytes(&mesh.nodes()[0].data(), &report.model);
    for status in &before[1..] {
        let held = held_by(status, status.node_id.0);
        assert_eq!(held.len(), status.own.experts);
        assert_eq!(status.own.bytes_fetched, manifest_bytes + alone.blob_bytes(&held), "{}", status.name);
    }
    assert_eq!(before[0].own.bytes_fetched, 0);

    // Rows: every token except the last one generated goes through every layer.
    let home = &before[2];
    assert_eq!((home.own.rows_local, home.own.rows_remote), (0, 0), "nothing was asked before");
    let held = held_by(home, home.node_id.0);
    let answer = alone.answer(QUESTION);
    assert_eq!((&answer.text, answer.tokens.len() as u64), (&report.answer, report.completion_tokens));
    let tokens = [alone.prompt(QUESTION), answer.tokens].concat();
    let routes = alone.routes(&tokens[..tokens.len() - 1]);
    let remote = routes.iter().filter(|expert| !held.contains(*expert)).count() as u64;
    let own = &after[2].own;
    assert_eq!((own.rows_local, own.rows_remote), (routes.len() as u64 - remote, remote));

    // The log: all nodes have the same state, whether or not the question changed it.
    let states: BTreeSet<_> = after.iter().map(|status| (status.applied, &status.state_hash)).collect();
    assert_eq!(states.len(), 1, "{states:?}");

    // Every node gives the same answer.
    for node in mesh.nodes() {
        let answer = ask::chat(&node.api().unwrap(), MODEL, QUESTION, |_| ()).await.unwrap();
        assert_eq!(answer.text, report.answer, "{}", node.name());
    }
    people_can_ask(&mesh.nodes()[1].data(), &report.answer).await;
    crate::golden::continuations_are_equal(&mesh.nodes()[1].api().unwrap(), &alone).await;
    crate::strangers::get_nothing(&mut mesh).await;
    crate::bad_input::http_is_refused(&mesh.nodes()[0].api().unwrap()).await;
    assert_eq!(mesh.shut_down().await, Vec::<String>::new());
}

#[tokio::test]
async fn tighter_budgets_hold_every_expert_once_and_the_hot_ones_twice() {
    let _turn = turn().await;
    let (mut mesh, _, budget) = mesh(3, 50).await;
    let status = &statuses(&mut mesh).await[0];
    assert_eq!(status.placement.len(), budget.experts);
    let twice: BTreeSet<_> =
        status.placement.iter().filter(|(_, replicas)| replicas.len() == 2).map(|(expert, _)| expert.clone()).collect();
    assert!(status.placement.values().all(|replicas| (1..=2).contains(&replicas.len())));
    let hot = Alone::new().hot();
    assert!(!hot.is_empty() && hot.len() < budget.experts / 2);
    assert!(hot.is_subset(&twice), "hot but held once: {:?}", hot.difference(&twice).collect::<Vec<_>>());
    // No node has room left for one more expert.
    assert_eq!(status.placement.values().map(Vec::len).sum::<usize>(), 3 * budget.experts_in(budget.bytes(50)));
    let answer = ask::chat(&mesh.nodes()[2].api().unwrap(), MODEL, QUESTION, |_| ()).await.unwrap();
    assert_eq!(answer.text, "The capital of France is Paris.");
}

#[tokio::test]
async fn ctrl_c_and_even_a_kill_leave_no_process() {
    let _turn = turn().await;
    let folder = tempfile::Builder::new().prefix("c").tempdir_in("/tmp").unwrap();
    for signal in [libc::SIGINT, libc::SIGKILL] {
        let mut command = tokio::process::Command::new(program());
        command.arg("--json").env("TMPDIR", folder.path()).kill_on_drop(true);
        let mut testnet = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(testnet.stdout.take().unwrap()).lines();
        let document = guarded(lines.next_line()).await.unwrap().expect("no document");
        let report: Report = serde_json::from_str(&document).unwrap();
        let runs = |node: &NodeReport| Path::new(&format!("/proc/{}", node.pid)).exists();
        assert!(report.nodes.iter().all(runs), "it stays up after the answer");
        assert_eq!(get(&format!("{}/readyz", report.nodes[0].api)).await.0, 200);

        // SAFETY: kill has no memory preconditions, and the process is ours and not reaped yet.
        unsafe { libc::kill(testnet.id().unwrap().cast_signed(), signal) };
        let ended = guarded(testnet.wait()).await.unwrap();
        assert_eq!(ended.code(), (signal == libc::SIGINT).then_some(0), "{ended:?}");
        if signal == libc::SIGINT {
            let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
            assert!(left.is_empty(), "{left:?}");
        }
        // After a kill the kernel ends the nodes, soon but not at once.
        guarded(async {
            while report.nodes.iter().any(runs) {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_node_without_a_model_is_alive_and_not_ready() {
    let _turn = turn().await;
    let mesh = lone_node().await;
    let api = mesh.nodes()[0].api().unwrap();
    assert_eq!(get(&format!("{api}/healthz")).await.0, 200);
    let (status, body) = get(&format!("{api}/readyz")).await;
    assert!(status == 503 && body.contains("model import"), "{status} {body}");
    let body = json!({"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]});
    let (status, reply) = post(&format!("{api}/v1/chat/completions"), body.to_string()).await;
    assert!(status == 404 && reply["error"]["code"] == "model_not_found", "{status} {reply}");
}

#[tokio::test]
async fn the_testnet_tells_wrong_usage_from_failure() {
    testnet(["--nodes", "0"]).await.refused(2, &["--nodes", "0"]);
    testnet(["--once", "--model", "/nowhere"]).await.refused(1, &["/nowhere"]);
}

/// The commands of a user against a serving mesh: the same answer, the same figures.
async fn people_can_ask(data: &Path, answer: &str) {
    assert_eq!(coel_at(data, ["chat", QUESTION]).await.printed(), answer);
    let status = coel_at(data, ["status", "--json"]).await;
    let status: Status = serde_json::from_str(status.printed()).unwrap();
    assert_eq!((status.nodes.len(), status.coverage, status.replicas_min), (3, 1.0, 2));
    assert!(status.own.rows_remote > 0 && status.nodes.iter().all(|node| node.voter));
    assert_eq!(get(&format!("{}/readyz", status.api)).await.0, 200);
    let (code, metrics) = get(&format!("{}/metrics", status.api)).await;
    assert!(code == 200 && metrics.trim_end().ends_with("# EOF"), "{metrics}");
    let remote = metrics.lines().find(|line| !line.starts_with('#') && line.contains("rows_remote"));
    assert!(remote.is_some_and(|line| line.ends_with(&format!(" {}", status.own.rows_remote))), "{remote:?}");
}

async fn statuses(mesh: &mut coel_testnet::mesh::Mesh) -> Vec<Status> {
    mesh.statuses().await.into_iter().collect::<Result<_, _>>().unwrap()
}

/// The keys of the experts that the placement gives a node.
fn held_by(status: &Status, node: u64) -> BTreeSet<String> {
    let holds =
        |replicas: &Vec<coel_node::status::ReplicaStatus>| replicas.iter().any(|replica| replica.node.0 == node);
    status.placement.iter().filter(|(_, replicas)| holds(replicas)).map(|(expert, _)| expert.clone()).collect()
}

/// Length of the manifest, which is a blob like others, named by the model's id.
fn manifest_bytes(data: &Path, model: &str) -> u64 {
    data.join("blobs").join(&model[..2]).join(model).metadata().unwrap().len()
}
