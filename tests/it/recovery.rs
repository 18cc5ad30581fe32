//! Losing the voters: what is said, what still works, and how a person goes on.

use coel_node::status::Status;
use coel_testnet::ask;
use coel_testnet::mesh::Mesh;
use coel_testnet::node::Start;

use crate::support::{MODEL, QUESTION, coel_at, copy_folder, lone_node, mesh, spec, turn, until};

const ANSWER: &str = "The capital of France is Paris.";

async fn answer(mesh: &Mesh, index: usize) -> String {
    ask::chat(&mesh.nodes()[index].api().unwrap(), MODEL, QUESTION, |_| ()).await.unwrap().text
}

fn warns(status: &Status, of: &str) -> bool {
    status.warnings.iter().any(|warning| warning.contains(of))
}

#[tokio::test]
async fn a_mesh_that_lost_its_only_voter_goes_on_by_a_persons_word() {
    let _turn = turn().await;
    let (mut mesh, ..) = mesh(2, 100).await;
    let before = until(&mut mesh, 1, "a warning", |status| warns(status, "only node-1 votes")).await;
    mesh.node(0).kill();
    let is_lost = |status: &Status| warns(status, "nothing can be agreed") && status.leader.is_none();
    until(&mut mesh, 1, "the loss is noticed", is_lost).await;
    let data = mesh.nodes()[1].data();
    for command in [["leave"].as_slice(), &["invite"], &["forget", "node-1"], &["model", "precision", "q8"]] {
        coel_at(&data, command).await.refused(1, &["0 of 1 voters can be reached", "coel recover"]);
    }

    // The survivor serves, after a restart too, and goes on serving while the mesh is recovered from it.
    assert_eq!(answer(&mesh, 1).await, ANSWER);
    mesh.node(1).stop().await;
    mesh.node(1).start(&Start::Again).await.unwrap();
    until(&mut mesh, 1, "service without a leader", |status| status.readiness.ready).await;
    assert_eq!(answer(&mesh, 1).await, ANSWER);
    coel_at(&data, ["recover"]).await.refused(1, &["in use"]);
    mesh.node(1).stop().await;
    let said = coel_at(&data, ["recover"]).await;
    assert!(
        ["node-1 (node 1)", MODEL, "Nothing was changed"].iter().all(|part| said.printed().contains(part)),
        "{said:?}"
    );
    coel_at(&data, ["recover", "--yes"]).await.printed();
    mesh.node(1).start(&Start::Again).await.unwrap();
    let after = until(&mut mesh, 1, "service under a new id", |status| status.readiness.ready).await;
    assert_ne!(after.mesh, before.mesh);
    assert_eq!((after.leader, after.nodes.len(), after.own.bytes_fetched), (Some(after.node_id), 1, 0));
    assert!(warns(&after, "recovered without node-1"), "{:?}", after.warnings);
    assert_eq!(answer(&mesh, 1).await, ANSWER);

    // The lost node comes back, is told, and follows with the weights that it has.
    mesh.node(0).start(&Start::Again).await.unwrap();
    until(&mut mesh, 0, "word of the recovery", |status| warns(status, "recovered without its other members")).await;
    mesh.node(0).stop().await;
    let invite = mesh.nodes()[1].ask(&coel_node::control::Request::Invite { uses: 1, ttl_s: 60 }, |_, _, _| ()).await;
    let invite: String = invite.unwrap();
    mesh.node(0).start(&Start::Join(invite.clone())).await.unwrap();
    let follower = until(&mut mesh, 0, "service in the new mesh", |status| status.readiness.ready).await;
    assert_eq!((&follower.mesh, follower.own.bytes_fetched), (&after.mesh, 0));
    assert!(!warns(&follower, "recovered without"), "{:?}", follower.warnings);
    // The same command again is a restart.
    mesh.node(0).stop().await;
    mesh.node(0).start(&Start::Join(invite)).await.unwrap();
    let again = until(&mut mesh, 0, "service after a restart", |status| status.readiness.ready).await;
    assert_eq!(again.node_id, follower.node_id);

    // It dies and is forgotten; it comes back after all, and joins anew.
    mesh.node(0).kill();
    let is_down = |status: &Status| status.nodes.iter().any(|node| node.name == "node-1" && node.liveness == "down");
    until(&mut mesh, 1, "its death is noticed", is_down).await;
    coel_at(&data, ["forget", "node-7"]).await.refused(1, &["no member is called 'node-7'"]);
    coel_at(&data, ["forget", "node-2"]).await.refused(1, &["coel leave"]);
    coel_at(&data, ["forget", "node-1"]).await.printed();
    until(&mut mesh, 1, "a mesh of one", |status| status.nodes.len() == 1 && status.warnings.is_empty()).await;
    mesh.node(0).start(&Start::Again).await.unwrap();
    until(&mut mesh, 0, "word of its removal", |status| warns(status, "does not know this node")).await;
    mesh.node(0).stop().await;
    let invite = mesh.nodes()[1].ask(&coel_node::control::Request::Invite { uses: 1, ttl_s: 60 }, |_, _, _| ()).await;
    let invite: String = invite.unwrap();
    mesh.node(0).start(&Start::Join(invite)).await.unwrap();
    let anew = until(&mut mesh, 0, "service as a new member", |status| status.readiness.ready).await;
    assert!(anew.node_id > follower.node_id && anew.mesh == after.mesh, "{:?}", anew.node_id);
}

#[tokio::test]
async fn newcomers_that_die_at_once_cost_no_quorum() {
    let _turn = turn().await;
    let mut mesh = lone_node().await;
    for name in ["b", "c"] {
        let invite = mesh.invite(1).await.unwrap();
        let node = mesh.add(spec(name)).unwrap();
        node.start(&Start::Join(invite)).await.unwrap();
        node.kill();
    }
    let gone = |status: &Status| status.nodes.iter().filter(|node| node.liveness == "down").count() == 2;
    until(&mut mesh, 0, "two dead newcomers", gone).await;
    let data = mesh.nodes()[0].data();
    for name in ["b", "c"] {
        coel_at(&data, ["forget", name]).await.printed();
    }
    let alone = until(&mut mesh, 0, "a mesh of one", |status| status.nodes.len() == 1).await;
    assert_eq!(alone.leader, Some(alone.node_id));
}

#[tokio::test]
async fn a_node_whose_log_is_damaged_joins_anew_with_its_weights() {
    let _turn = turn().await;
    let (mut mesh, ..) = mesh(3, 100).await;
    let all_vote = |status: &Status| status.nodes.len() == 3 && status.nodes.iter().all(|node| node.voter);
    let before = until(&mut mesh, 2, "three voters", all_vote).await;
    let data = mesh.nodes()[2].data();
    mesh.node(2).stop().await;
    let database = data.join("log/db");
    let bytes = std::fs::metadata(&database).unwrap().len();
    std::fs::File::options().write(true).open(&database).unwrap().set_len(bytes / 2).unwrap();

    // Nothing is changed by itself, and no advice deletes anything.
    let member = format!("node {} of mesh {}", before.node_id, before.mesh);
    let path = database.display().to_string();
    let advice = [path.as_str(), "is damaged", &member, "Keep the data folder", "coel join INVITE", "only vote"];
    let up = ["up", "--api", "127.0.0.1:0", "--listen", "/ip4/127.0.0.1/tcp/0", "--mdns", "false", "--device", "cpu"];
    coel_at(&data, up).await.refused(1, &advice);
    coel_at(&data, ["recover", "--yes"]).await.refused(1, &advice);

    let invite = mesh.invite(1).await.unwrap();
    mesh.node(2).start(&Start::Join(invite.clone())).await.unwrap();
    let after = until(&mut mesh, 2, "service as a new member", |status| status.readiness.ready).await;
    assert!(after.node_id > before.node_id && after.mesh == before.mesh, "{:?}", after.node_id);
    assert_eq!((after.peer_id, after.own.bytes_fetched), (before.peer_id, 0));
    assert!(data.join("damaged-log/db").is_file() && data.join("log/db").is_file());
    assert_eq!(answer(&mesh, 2).await, ANSWER);
    let replaced = until(&mut mesh, 0, "its vote goes to its new id", all_vote).await;
    let ids: Vec<_> = replaced.nodes.iter().map(|node| node.node_id).collect();
    assert!(ids.contains(&after.node_id) && !ids.contains(&before.node_id), "{ids:?}");

    // The same command again is a restart.
    mesh.node(2).stop().await;
    mesh.node(2).start(&Start::Join(invite)).await.unwrap();
    let again = until(&mut mesh, 2, "service after a restart", |status| status.readiness.ready).await;
    assert_eq!(again.node_id, after.node_id);
}

#[tokio::test]
async fn a_node_whose_disk_was_put_back_returns_under_a_new_id() {
    let _turn = turn().await;
    let (mut mesh, ..) = mesh(3, 100).await;
    let all_vote = |status: &Status| status.nodes.len() == 3 && status.nodes.iter().all(|node| node.voter);
    let before = until(&mut mesh, 2, "three voters", all_vote).await;
    let data = mesh.nodes()[2].data();
    let backup = data.with_extension("backup");

    // A backup of a stopped node, which then goes on for a while.
    mesh.node(2).stop().await;
    copy_folder(&data.join("log"), &backup);
    mesh.node(2).start(&Start::Again).await.unwrap();
    until(&mut mesh, 2, "service after the backup", |status| status.readiness.ready).await;
    for _ in 0..3 {
        mesh.invite(1).await.unwrap();
    }
    let written = mesh.nodes()[0].status().await.unwrap().applied;
    until(&mut mesh, 2, "the writes arrive", |status| status.applied >= written).await;
    // Members gossip how far they have got, and remember it of one another.
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    mesh.node(2).kill();
    std::fs::remove_dir_all(data.join("log")).unwrap();
    copy_folder(&backup, &data.join("log"));

    // It goes on in the same process, under a new id, with its weights.
    mesh.node(2).start(&Start::Again).await.unwrap();
    let is_new = |status: &Status| status.readiness.ready && status.node_id > before.node_id;
    let after = until(&mut mesh, 2, "service under a new id", is_new).await;
    assert_eq!((&after.mesh, &after.peer_id, after.own.bytes_fetched), (&before.mesh, &before.peer_id, 0));
    let said = std::fs::read_to_string(data.with_file_name("log")).unwrap();
    assert!(said.contains("this node's log went back"), "{said}");
    assert_eq!(answer(&mesh, 2).await, ANSWER);
    let replaced = until(&mut mesh, 0, "its vote goes to its new id", all_vote).await;
    let ids: Vec<_> = replaced.nodes.iter().map(|node| node.node_id).collect();
    assert!(ids.contains(&after.node_id) && !ids.contains(&before.node_id), "{ids:?}");
    let kept = std::fs::read_dir(&data).unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    assert!(kept.into_iter().any(|name| name.starts_with("log-of-")), "its own log is kept");
}
