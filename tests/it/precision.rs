//! Experts at fewer bits: when not everything fits at exact precision, and when a user lowers or raises the precision
//! while the mesh serves.

use std::collections::BTreeMap;

use coel_node::control::Request;
use coel_node::service::ModelInfo;
use coel_node::status::{Counts, Status};
use coel_store::{ExpertId, Manifest, ModelId, Precision, Slices};
use coel_testnet::ask;
use coel_testnet::mesh::Mesh;
use coel_testnet::node::{NodeSpec, Start};

use crate::golden::Alone;
use crate::support::{
    Copy, MODEL, QUESTION, coel_at, continue_tokens, fixture, get, guarded, launcher, mesh, spec, turn, until,
};

/// Long enough for the mesh to get a command and carry it out well before the answer ends.
const LONG_TOKENS: usize = 120;

/// Whether every expert is covered and every placed replica is ready.
pub fn is_settled(status: &Status) -> bool {
    status.coverage == 1.0 && status.placement.values().flatten().all(|replica| replica.ready)
}

/// The manifest of the placed model, from the importer's folder.
fn manifest(mesh: &Mesh, status: &Status) -> Manifest {
    let id = &status.model.as_ref().unwrap().id;
    let path = mesh.nodes()[0].data().join("blobs").join(&id[..2]).join(id);
    Manifest::decode_as(&std::fs::read(path).unwrap(), id.parse::<ModelId>().unwrap()).unwrap()
}

/// The slices of every expert that the placement gives a node.
fn held<'a>(manifest: &'a Manifest, status: &Status, node: u64) -> BTreeMap<ExpertId, &'a Slices> {
    let placed = status.placement.iter().filter(|(_, replicas)| replicas.iter().any(|r| r.node.0 == node));
    let placed = placed.map(|(expert, _)| expert.parse::<ExpertId>().unwrap());
    placed.map(|expert| (expert, &manifest.experts[&expert])).collect()
}

#[tokio::test]
async fn a_mesh_too_small_for_everything_exactly_serves_at_mixed_precision() {
    let _turn = turn().await;
    let (mut mesh, job, budget) = mesh(3, 20).await;
    let report = job.ask(&mut mesh, |_| ()).await.unwrap();
    job.verify(&report, &budget).unwrap();
    let status = mesh.nodes()[1].status().await.unwrap();
    assert!(is_settled(&status), "{:?}", status.readiness);
    let manifest = manifest(&mesh, &status);
    let mut all = Counts::default();
    for node in &status.nodes {
        let Counts { q4, q8, exact } = node.precisions;
        (all.q4, all.q8, all.exact) = (all.q4 + q4, all.q8 + q8, all.exact + exact);
        assert_eq!(q4 + q8 + exact, node.experts);
        // The status reports the bytes of these experts at these precisions, and they are within the budget.
        let placed = status.placement.iter().filter_map(|(expert, replicas)| {
            let replica = replicas.iter().find(|replica| replica.node == node.node_id)?;
            manifest.experts[&expert.parse::<ExpertId>().unwrap()].bytes(replica.precision)
        });
        let bytes = placed.sum::<u64>();
        assert_eq!(node.expert_bytes, Some(bytes));
        assert!(
            bytes + budget.fixed_bytes <= node.memory_budget_bytes.unwrap() || node.trunk != Some(Precision::Exact)
        );
    }
    assert!(all.exact < 144 && all.q8 > 0, "{all:?}");

    // The usage names the precisions that took part, and the metrics count the experts at each.
    let api = mesh.nodes()[2].api().unwrap();
    let answer = ask::chat(&api, MODEL, QUESTION, |_| ()).await.unwrap();
    let classes = answer.usage["coel"]["other_classes"].to_string();
    assert!(classes.contains("q8") || classes.contains("q4"), "{}", answer.usage);
    let own = mesh.nodes()[2].status().await.unwrap().own;
    let (_, metrics) = get(&format!("{api}/metrics")).await;
    let line = format!("coel_experts{{precision=\"q8\"}} {}", own.precisions.q8);
    assert!(metrics.contains(&line), "{line} not in {metrics}");
    let printed = coel_at(&mesh.nodes()[0].data(), ["status"]).await;
    assert!(printed.printed().contains(" q8"), "{printed:#?}");
}

#[tokio::test]
async fn experts_are_raised_and_lowered_while_a_chat_runs() {
    let _turn = turn().await;
    let mut mesh = Mesh::new(launcher()).unwrap();
    mesh.create(spec("a")).await.unwrap();
    let data = mesh.nodes()[0].data();
    // Set before there is a model, so that the other node never fetches more than it needs.
    coel_at(&data, ["model", "precision", "q4"]).await.printed();
    assert_eq!(coel_at(&data, ["model", "precision"]).await.printed(), "q4");
    coel_at(&data, ["model", "precision", "q5"]).await.refused(2, &["q5", "q4, q8, exact"]);
    let request = Request::Import { dir: fixture(), name: Some(MODEL.into()) };
    let _: ModelInfo = guarded(mesh.nodes()[0].ask(&request, |_, _, _| ())).await.unwrap();
    let invite = mesh.invite(1).await.unwrap();
    let q8_trunk = NodeSpec { flags: vec!["--trunk".into(), "q8".into()], ..spec("b") };
    mesh.join(vec![q8_trunk], &invite).await.unwrap();
    let both = |precision: Precision| {
        let wanted = move |counts: Counts| match precision {
            Precision::Q4 => counts == Counts { q4: 144, ..Counts::default() },
            Precision::Q8 => counts == Counts { q8: 144, ..Counts::default() },
            Precision::Exact => false,
        };
        move |status: &Status| {
            is_settled(status) && status.nodes.len() == 2 && status.nodes.iter().all(|node| wanted(node.precisions))
        }
    };
    let low = until(&mut mesh, 1, "everything at Q4 on both", both(Precision::Q4)).await;
    let manifest = manifest(&mesh, &low);
    let node = low.node_id.0;
    let fetched = |status: &Status| status.own.bytes_fetched;
    let sum = |of: fn(&Slices) -> u64| held(&manifest, &low, node).values().map(|slices| of(slices)).sum::<u64>();
    let files: u64 = manifest.files.iter().map(|file| file.blob.bytes).sum();
    let encoded = manifest.encode().unwrap().0.len() as u64;
    let base = sum(|slices| slices.base.as_ref().unwrap().bytes);
    assert_eq!(fetched(&low), encoded + files + manifest.trunk_bytes(Precision::Q8) + base);
    assert_eq!(
        low.nodes.iter().map(|node| node.trunk).collect::<Vec<_>>(),
        [Some(Precision::Exact), Some(Precision::Q8)]
    );

    // A user raises the precision in the middle of a long answer.
    let alone = Alone::new();
    let prompt = alone.story();
    let api = mesh.nodes()[1].api().unwrap();
    let (told, mut tell) = tokio::sync::mpsc::channel(1);
    let mut pieces = 0;
    let chat = continue_tokens(&api, &prompt, LONG_TOKENS, |_| {
        pieces += 1;
        if pieces == 5 {
            let _ = told.try_send(());
        }
    });
    let raise = async {
        tell.recv().await;
        coel_at(&data, ["model", "precision", "q8"]).await.printed();
    };
    let (answer, ()) = tokio::join!(chat, raise);
    let answer = answer.unwrap();
    assert!(answer.tokens.len() == LONG_TOKENS || answer.finish_reason.as_deref() == Some("stop"), "{answer:?}");
    let high = until(&mut mesh, 1, "everything at Q8 on both", both(Precision::Q8)).await;
    let refine = sum(|slices| slices.refine.as_ref().unwrap().bytes);
    assert_eq!(fetched(&high) - fetched(&low), refine, "a raise costs the refine slices and nothing else");
    assert!(high.epoch > low.epoch);
    assert_eq!(held(&manifest, &low, node).len(), held(&manifest, &high, node).len());

    // Going down again fetches nothing, and neither does going up again: fetched slices stay on disk.
    for (word, precision) in [("q4", Precision::Q4), ("q8", Precision::Q8)] {
        coel_at(&data, ["model", "precision", word]).await.printed();
        let status = until(&mut mesh, 1, word, both(precision)).await;
        assert_eq!(fetched(&status), fetched(&high));
    }
    let text = ask::chat(&api, MODEL, QUESTION, |_| ()).await.unwrap().text;
    assert_eq!(text, "The capital of France is Paris.");
}

#[tokio::test]
async fn what_does_not_fit_is_refused_and_changes_nothing() {
    let _turn = turn().await;
    let (mut mesh, _, _) = mesh(1, 60).await;
    let before = mesh.nodes()[0].status().await.unwrap();
    let data = mesh.nodes()[0].data();
    coel_at(&data, ["model", "precision", "exact"]).await.refused(1, &["at exact", "bytes are missing", "--memory"]);
    let after = mesh.nodes()[0].status().await.unwrap();
    assert_eq!((after.precisions, after.epoch), (before.precisions, before.epoch));
    until(&mut mesh, 0, "still serving", is_settled).await;
}

#[tokio::test]
async fn slices_are_made_where_exact_weights_are() {
    let _turn = turn().await;
    let mut mesh = crate::support::lone_node().await;
    let request = Request::Import { dir: fixture(), name: Some(MODEL.into()) };
    let _: ModelInfo = guarded(mesh.nodes()[0].ask(&request, |_, _, _| ())).await.unwrap();
    let invite = mesh.invite(1).await.unwrap();
    mesh.join(vec![spec("b")], &invite).await.unwrap();
    let all = |wanted: Counts| {
        move |status: &Status| {
            let own = status.nodes.iter().find(|node| node.node_id == status.node_id);
            is_settled(status) && status.readiness.ready && own.is_some_and(|own| own.precisions == wanted)
        }
    };
    let exact =
        until(&mut mesh, 1, "everything exactly on both", all(Counts { exact: 144, ..Counts::default() })).await;
    let manifest = manifest(&mesh, &exact);
    // Only the importer has slices, and it leaves. The other node has the exact weights.
    coel_at(&mesh.nodes()[0].data(), ["leave"]).await.printed();
    assert!(mesh.node(0).wait_end().await.is_some_and(|ended| ended.success()));
    until(&mut mesh, 1, "alone", |status| status.nodes.len() == 1 && is_settled(status) && status.leader.is_some())
        .await;
    let data = mesh.nodes()[1].data();
    coel_at(&data, ["model", "precision", "q8"]).await.printed();
    let sliced = until(&mut mesh, 1, "everything at Q8", all(Counts { q8: 144, ..Counts::default() })).await;
    assert_eq!(sliced.own.bytes_fetched, exact.own.bytes_fetched, "sliced here");
    let api = mesh.nodes()[1].api().unwrap();
    assert_eq!(ask::chat(&api, MODEL, QUESTION, |_| ()).await.unwrap().text, "The capital of France is Paris.");

    // A slice that is damaged on disk is made again, and the repair is counted.
    mesh.node(1).kill();
    let base = manifest.experts[&ExpertId::new(2, 7)].base.as_ref().unwrap().id.to_string();
    let path = data.join("blobs").join(&base[..2]).join(&base);
    let whole = std::fs::read(&path).unwrap();
    let mut spoilt = whole.clone();
    spoilt[whole.len() / 2] ^= 1;
    std::fs::write(&path, spoilt).unwrap();
    mesh.node(1).start(&Start::Again).await.unwrap();
    let again = until(&mut mesh, 1, "everything at Q8 again", all(Counts { q8: 144, ..Counts::default() })).await;
    assert_eq!(again.own.bytes_fetched, 0);
    assert!(std::fs::read(&path).unwrap() == whole);
    assert_eq!(again.own.blobs_repaired, 1, "{}", mesh.nodes()[1].tail());
}

#[tokio::test]
async fn experts_without_slices_say_what_would_do() {
    let _turn = turn().await;
    let copy = Copy::new();
    copy.edit_weights(|header, data| {
        // Beyond the range of a slice's scale: 2^100 in BF16.
        let tensor = &header["model.layers.5.mlp.experts.23.down_proj.weight"];
        let at = tensor["data_offsets"][0].as_u64().unwrap() as usize;
        data[at..][..2].copy_from_slice(&[0x80, 0x71]);
    });
    let mut mesh = crate::support::lone_node().await;
    let request = Request::Import { dir: copy.dir(), name: None };
    let _: ModelInfo = guarded(mesh.nodes()[0].ask(&request, |_, _, _| ())).await.unwrap();
    until(&mut mesh, 0, "serving", is_settled).await;
    let data = mesh.nodes()[0].data();
    let remedy = "coel model precision q4..";
    let refused = coel_at(&data, ["model", "precision", "q4"]).await;
    refused.refused(1, &["1 of the model's 144 experts", "5.23", "no slices", remedy]);
    coel_at(&data, ["model", "precision", "q4.."]).await.printed();
}
