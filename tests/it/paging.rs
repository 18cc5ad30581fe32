//! Experts on disk: two nodes without enough memory for the model serve it from disk, until a third one joins.

use coel_model::weights::checkpoint::Checkpoint;
use coel_model::weights::parts::parts;
use coel_model::weights::slices::Precision as Slices;
use coel_model::weights::slicing::part_slices::part_bytes;
use coel_node::control::Request;
use coel_node::service::ModelInfo;
use coel_node::status::{Counts, Status};
use coel_testnet::ask;
use coel_testnet::budget::Budget;
use coel_testnet::checks::RSS_SLACK_BYTES;
use coel_testnet::mesh::Mesh;
use coel_testnet::node::NodeSpec;

use crate::golden::Alone;
use crate::support::{MODEL, QUESTION, coel_at, fixture, get, guarded, launcher, turn, until};

const EXPERTS: usize = 144;
const ALL: Counts = Counts { q4: EXPERTS, q8: 0, exact: 0 };

/// Bytes of all experts as Q4 blobs, and of the largest expert as in the checkpoint.
fn expert_bytes() -> (u64, u64) {
    let checkpoint = Checkpoint::open(&fixture()).unwrap();
    let experts = parts(&checkpoint).into_iter().filter(|part| part.expert().is_some());
    experts.fold((0, 0), |(all, largest), part| {
        let exact = part.header().len() as u64 + part.data_bytes();
        (all + part_bytes(&part).unwrap().base, largest.max(exact))
    })
}

/// A node with memory for `percent` of the experts at Q4, beside what it keeps for an exchange.
fn spec(name: &str, percent: u64, disk_bytes: Option<u64>) -> NodeSpec {
    let budget = Budget::of(&fixture()).unwrap();
    let (all, largest) = expert_bytes();
    let disk = disk_bytes.map(|bytes| ["--disk".to_owned(), bytes.to_string()]);
    let flags = ["--precision", "q4", "--trunk", "exact"].map(str::to_owned);
    NodeSpec {
        name: name.into(),
        memory_bytes: budget.fixed_bytes + all * percent / 100 + largest,
        kv_tokens: budget.kv_tokens,
        flags: flags.into_iter().chain(disk.into_iter().flatten()).map(Into::into).collect(),
        env: Vec::new(),
    }
}

/// Bytes of all files below a node's weight folders.
fn bytes_on_disk(data: &std::path::Path) -> u64 {
    let mut folders = vec![data.join("blobs"), data.join("partial")];
    let mut bytes = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            // A file may disappear during the walk.
            match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => folders.push(entry.path()),
                Ok(metadata) => bytes += metadata.len(),
                Err(_) => {}
            }
        }
    }
    bytes
}

fn is_settled(status: &Status, nodes: usize) -> bool {
    status.nodes.len() == nodes
        && status.coverage == 1.0
        && status.placement.values().flatten().all(|replica| replica.ready)
}

/// The status of every node, after checks that both budgets hold: in the ledger, and in the process and the files.
async fn within_budgets(mesh: &mut Mesh) -> Vec<Status> {
    let statuses: Vec<Status> = mesh.statuses().await.into_iter().map(Result::unwrap).collect();
    for (node, status) in mesh.nodes().iter().zip(&statuses) {
        let own = &status.own;
        assert!(own.memory_bytes <= own.memory_budget_bytes, "{}: {own:?}", node.name());
        let grown = node.rss_bytes().unwrap().saturating_sub(own.rss_before_bytes);
        assert!(grown <= own.memory_budget_bytes + RSS_SLACK_BYTES, "{} grew by {grown}: {own:?}", node.name());
        let me = status.nodes.iter().find(|other| other.node_id == status.node_id).unwrap();
        if let Some(disk) = me.disk_budget_bytes {
            assert_eq!(own.disk_bytes, bytes_on_disk(&node.data()), "{}", node.name());
            assert!(own.disk_bytes <= disk, "{}: {own:?}", node.name());
        }
    }
    statuses
}

async fn metric(api: &str, name: &str) -> f64 {
    let (_, text) = get(&format!("{api}/metrics")).await;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
}

#[tokio::test]
async fn what_memories_do_not_hold_is_served_from_disks_until_they_do() {
    let _turn = turn().await;
    let (all, largest) = expert_bytes();
    let mut mesh = Mesh::new(launcher()).unwrap();
    mesh.create(spec("a", 30, Some(64 << 20))).await.unwrap();
    let request = Request::Import { dir: fixture(), name: Some(MODEL.into()) };
    let _: ModelInfo = guarded(mesh.nodes()[0].ask(&request, |_, _, _| ())).await.unwrap();
    until(&mut mesh, 0, "everything on the importer, by turns", |status| {
        is_settled(status, 1) && status.own.paged == EXPERTS && status.nodes[0].precisions == ALL
    })
    .await;
    within_budgets(&mut mesh).await;

    // The second node's disk has room for two thirds of the experts, beside what every node keeps.
    let invite = mesh.invite(2).await.unwrap();
    let files: u64 = std::fs::read_dir(fixture()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
    let exact: u64 = {
        let checkpoint = Checkpoint::open(&fixture()).unwrap();
        parts(&checkpoint).iter().filter(|part| part.expert().is_some()).map(|part| part.data_bytes()).sum()
    };
    // All files of the checkpoint without the experts' bytes: a little more than trunk, files and manifest.
    let disk = files - exact + all * 2 / 3 + largest;
    mesh.join(vec![spec("b", 30, Some(disk))], &invite).await.unwrap();
    let shared = until(&mut mesh, 1, "half of the experts on each, by turns", |status| {
        is_settled(status, 2) && status.own.paged > 0 && status.placement.values().all(|replicas| replicas.len() == 1)
    })
    .await;
    assert_eq!(shared.planner, None);
    let per_node: Vec<_> = shared.nodes.iter().map(|node| node.experts).collect();
    assert!(per_node.iter().all(|experts| (70..=74).contains(experts)), "{per_node:?}");
    assert!(shared.nodes.iter().all(|node| node.paged_bytes.is_some_and(|bytes| bytes > 0)), "{:?}", shared.nodes);
    let printed = coel_at(&mesh.nodes()[1].data(), ["status"]).await;
    assert!(printed.printed().contains("(pages "), "{printed:#?}");

    // The answer is that of a machine with everything in memory at the same precisions.
    let expected = Alone::at(Slices::Q4).answer(QUESTION).text;
    let api = mesh.nodes()[1].api().unwrap();
    let answer = ask::chat(&api, MODEL, QUESTION, |_| ()).await.unwrap();
    assert_eq!(answer.text, expected);
    assert!(metric(&api, "coel_tier_misses_total").await > 0.0);
    assert!(metric(&api, "coel_tier_read_bytes_total").await > 0.0);
    assert!(metric(&api, "coel_tier_experts").await >= 70.0);
    within_budgets(&mut mesh).await;

    // A third node has memory for the rest. An answer is under way while the experts move to memory for good.
    mesh.join(vec![spec("c", 70, None)], &invite).await.unwrap();
    let meanwhile = ask::chat(&api, MODEL, QUESTION, |_| ()).await.unwrap();
    assert_eq!(meanwhile.text, expected);
    for node in 0..3 {
        until(&mut mesh, node, "everything in memory", |status| is_settled(status, 3) && status.own.paged == 0).await;
    }
    let ended = within_budgets(&mut mesh).await;
    for node in ended.iter().flat_map(|status| &status.nodes) {
        assert_eq!(node.paged_bytes, Some(0), "{node:?}");
    }
    let misses = metric(&api, "coel_tier_misses_total").await;
    let answer = ask::chat(&api, MODEL, QUESTION, |_| ()).await.unwrap();
    assert_eq!((answer.text, metric(&api, "coel_tier_misses_total").await), (expected, misses));
}

#[tokio::test]
async fn budgets_that_cannot_work_are_refused_with_both_numbers() {
    let _turn = turn().await;
    // The slices of the bundled model take some 20 MB: with a smaller disk budget the import is refused, and nothing is
    // registered.
    let mut mesh = Mesh::new(launcher()).unwrap();
    mesh.create(spec("a", 120, Some(4 << 20))).await.unwrap();
    let data = mesh.nodes()[0].data();
    let dir = fixture().display().to_string();
    let import = coel_at(&data, ["model", "import", &dir]).await;
    import.refused(1, &["--disk", "4.0 MiB", "bytes are missing"]);
    let status = mesh.nodes()[0].status().await.unwrap();
    assert!(status.models.is_empty() && status.own.disk_bytes <= 4 << 20, "{:?}", status.own);

    let flags = ["up", "--new", "--device", "cpu", "--vram", "4GiB"];
    let folder = tempfile::tempdir().unwrap();
    coel_at(folder.path(), flags).await.refused(2, &["--vram 4.0 GiB", "--device cpu"]);
}
