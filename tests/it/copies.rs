//! A data folder that is copied while its node runs: the copy stops and says why, and nobody else is disturbed.

use coel_node::status::Status;
use coel_testnet::node::Start;

use crate::support::{copy_folder, lone_node, spec, turn, until};

fn warns(status: &Status) -> bool {
    status.warnings.iter().any(|warning| warning.contains("two processes run as a"))
}

#[tokio::test]
async fn the_copy_of_the_only_voter_stops_and_the_mesh_goes_on() {
    let _turn = turn().await;
    let mut mesh = lone_node().await;
    let invite = mesh.invite(1).await.unwrap();
    mesh.join(vec![spec("b")], &invite).await.unwrap();
    until(&mut mesh, 1, "both know the leader", |status| status.nodes.len() == 2 && status.leader.is_some()).await;

    // A restart on the same folder is no alarm, neither is one after a kill.
    mesh.node(0).kill();
    mesh.node(0).start(&Start::Again).await.unwrap();
    until(&mut mesh, 0, "the leader is back", |status| status.leader == Some(status.node_id)).await;
    mesh.invite(1).await.unwrap();
    let before = until(&mut mesh, 1, "the leader is known", |status| status.leader.is_some()).await;
    assert!(!warns(&before), "{:?}", before.warnings);

    let original = mesh.nodes()[0].data();
    let node = mesh.add(spec("copy")).unwrap();
    copy_folder(&original, &node.data());
    // It may have ended before it was asked anything.
    let _ = node.start(&Start::Again).await;
    let ended = node.wait_end().await.expect("it ends by itself");
    assert_eq!(ended.code(), Some(1), "{}", node.tail());
    let said = node.tail();
    for part in ["another process runs with the identity of this node", "coel join INVITE", &before.nodes[0].peer_id] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }

    // The original still writes, and the other member follows it.
    assert!(mesh.node(0).is_running());
    mesh.invite(1).await.unwrap();
    let leader = mesh.nodes()[0].status().await.unwrap();
    let follower = until(&mut mesh, 1, "the write arrives", |status| status.applied >= leader.applied).await;
    assert_eq!(
        (leader.term, &leader.leader, &leader.state_hash),
        (follower.term, &follower.leader, &follower.state_hash)
    );
    assert!(warns(&follower), "{:?}", follower.warnings);

    // Started again, it ends again.
    let node = mesh.node(2);
    let _ = node.start(&Start::Again).await;
    assert_eq!(node.wait_end().await.and_then(|ended| ended.code()), Some(1));
    assert!(mesh.node(0).is_running());
    mesh.invite(1).await.unwrap();
}
