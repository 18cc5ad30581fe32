//! Losing the voters: what is said, what still works, and how a person goes on.

use coel_node::status::Status;
use coel_testnet::ask;
use coel_testnet::mesh::Mesh;
use coel_testnet::node::Start;

use crate::support::{MODEL, QUESTION, coel_at, lone_node, mesh, spec, turn, until};

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
