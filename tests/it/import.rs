//! Imports: interrupted, repeated, of the same model under another name, and of another one.

use coel_node::control::Request;
use coel_node::service::ModelInfo;
use coel_node::status::Status;
use coel_testnet::mesh::Mesh;

use crate::precision::is_settled;
use crate::support::{Copy, MODEL, coel_at, fixture, guarded, lone_node, spec, turn, until};

/// Imports a folder on a node, without giving a name.
async fn import(mesh: &Mesh, index: usize, dir: std::path::PathBuf) -> ModelInfo {
    guarded(mesh.nodes()[index].ask(&Request::Import { dir, name: None }, |_, _, _| ())).await.unwrap()
}

#[tokio::test]
async fn a_model_is_what_it_consists_of_whatever_its_folder_is_called() {
    let _turn = turn().await;
    let copy = Copy::new();
    assert_ne!(copy.dir().file_name(), fixture().file_name());
    let elsewhere = lone_node().await;
    let there = import(&elsewhere, 0, copy.dir()).await;
    drop(elsewhere);

    let mut mesh = lone_node().await;
    let here = import(&mesh, 0, fixture()).await;
    assert_eq!((&here.id, here.name.as_str()), (&there.id, "fixture"));
    // The mesh knows the model by one name. A second import need not give that name, and cannot give another one.
    let invite = mesh.invite(1).await.unwrap();
    mesh.join(vec![spec("b")], &invite).await.unwrap();
    until(&mut mesh, 1, "both serve", |status| is_settled(status) && status.nodes.len() == 2 && status.readiness.ready)
        .await;
    assert_eq!(import(&mesh, 1, copy.dir()).await, here);
    let data = mesh.nodes()[1].data();
    let dir = copy.dir();
    let named = ["model", "import", dir.to_str().unwrap(), "--name", "other"];
    coel_at(&data, named).await.refused(1, &["registered as \"fixture\"", "use that name"]);

    // Another model is refused before the import does any work.
    copy.edit_weights(|header, data| {
        let at = header["model.norm.weight"]["data_offsets"][0].as_u64().unwrap();
        data[at as usize] ^= 1;
    });
    let mut steps = Vec::new();
    let request = Request::Import { dir: copy.dir(), name: Some("second".into()) };
    let refused = guarded(mesh.nodes()[1].ask::<ModelInfo>(&request, |what, _, _| steps.push(what.to_owned()))).await;
    let refusal = format!("{:#}", refused.unwrap_err());
    assert!(refusal.contains("serves one model only") && refusal.contains("'fixture'"), "{refusal}");
    assert_eq!(steps, Vec::<String>::new());
}

#[tokio::test]
async fn an_import_that_was_killed_goes_on_where_it_stopped() {
    let _turn = turn().await;
    let mut mesh = lone_node().await;
    let request = Request::Import { dir: fixture(), name: Some(MODEL.into()) };
    // The node is killed while it cuts the checkpoint, as soon as it reports progress.
    let (seen, mut began) = tokio::sync::mpsc::channel(1);
    {
        let import = mesh.nodes()[0].ask::<ModelInfo>(&request, |_, done, _| {
            if done > 0 {
                let _ = seen.try_send(());
            }
        });
        tokio::select! {
            ended = import => panic!("it ended before it could be killed: {ended:?}"),
            _ = began.recv() => {}
        }
    }
    mesh.node(0).kill();
    mesh.node(0).start(&coel_testnet::node::Start::Again).await.unwrap();
    let status = mesh.nodes()[0].status().await.unwrap();
    assert!(status.models.is_empty(), "nothing is half-registered");
    let model: ModelInfo = guarded(mesh.nodes()[0].ask(&request, |_, _, _| ())).await.unwrap();
    assert_eq!(model.name, MODEL);
    until(&mut mesh, 0, "serving", is_settled).await;
}

#[tokio::test]
async fn the_same_import_twice_is_one_and_is_seen_while_it_runs() {
    let _turn = turn().await;
    let mesh = lone_node().await;
    let node = &mesh.nodes()[0];
    let request = Request::Import { dir: fixture(), name: None };
    let ask = || guarded(node.ask::<ModelInfo>(&request, |_, _, _| ()));
    let seen = async {
        loop {
            let status = node.status().await.unwrap();
            assert!(status.models.is_empty(), "it was not seen before it was done");
            if let Some(importing) = status.importing {
                return importing;
            }
        }
    };
    let (one, other, seen) = tokio::join!(ask(), ask(), seen);
    assert_eq!(one.unwrap(), other.unwrap());
    assert_eq!(seen.dir, fixture().canonicalize().unwrap());
    assert_eq!(node.status().await.unwrap().importing, None);
}

#[tokio::test]
async fn a_checkpoint_that_was_away_is_used_again_when_it_is_back() {
    let _turn = turn().await;
    let (mut mesh, copy) = (lone_node().await, Copy::new());
    import(&mesh, 0, copy.dir()).await;
    until(&mut mesh, 0, "serving", is_settled).await;
    mesh.node(0).kill();
    let away = copy.weights().with_extension("away");
    std::fs::rename(copy.weights(), &away).unwrap();
    mesh.node(0).start(&coel_testnet::node::Start::Again).await.unwrap();
    let is_missed = |status: &Status| {
        let problem = status.readiness.problem.as_deref().unwrap_or_default();
        problem.contains("model.safetensors is not there") && problem.contains("coel model import DIR")
    };
    until(&mut mesh, 0, "the file is missed by name", is_missed).await;
    std::fs::rename(&away, copy.weights()).unwrap();
    let served = |status: &Status| status.readiness.ready && status.readiness.problem.is_none();
    until(&mut mesh, 0, "serving again", served).await;
}
