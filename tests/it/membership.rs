//! Membership: joining, leaving, and the ownership of folders and ports.

use std::net::TcpListener;

use coel_node::mesh::admission::invite::Invite;
use coel_testnet::ask;
use coel_testnet::mesh::Mesh;
use coel_testnet::node::{NodeSpec, Start};

use crate::support::{MODEL, QUESTION, coel, coel_at, fixture, lone_node, mesh, spec, turn, until};

/// `coel join LINE` on a fresh folder, as a newcomer would.
async fn join(line: &str) -> crate::support::Ended {
    let folder = tempfile::Builder::new().prefix("coel-").tempdir_in("/tmp").unwrap();
    let data = folder.path().join("d");
    let flags = ["--listen", "/ip4/127.0.0.1/tcp/0", "--api", "127.0.0.1:0", "--mdns", "false", "--device", "cpu"];
    coel_at(&data, ["join", line].into_iter().chain(flags)).await
}

#[tokio::test]
async fn invites_are_checked_to_the_letter() {
    let _turn = turn().await;
    let mut mesh = lone_node().await;
    let data = mesh.nodes()[0].data();

    join("hello").await.refused(2, &["coel1", "coel invite"]);
    let line = coel_at(&data, ["invite", "--uses", "1"]).await.printed().to_owned();
    assert!(line.starts_with("coel1") && line.lines().count() == 1, "{line}");
    join(&line[..line.len() - 4]).await.refused(2, &["damaged", "copy the whole line"]);

    // A well-formed invite that no member issued.
    let mut forged: Invite = line.parse().unwrap();
    forged.token[0] ^= 1;
    join(&forged.to_string()).await.refused(1, &["knows no such invite", "coel invite"]);
    let mut elsewhere: Invite = line.parse().unwrap();
    elsewhere.mesh.0[0] ^= 1;
    join(&elsewhere.to_string()).await.refused(1, &["mesh"]);

    // With `--uses 1`, the invite works once.
    mesh.join(vec![spec("b")], &line).await.unwrap();
    join(&line).await.refused(1, &["invite", "coel invite"]);
    let nodes = until(&mut mesh, 1, "two members", |status| status.nodes.len() == 2).await;
    let names: Vec<_> = nodes.nodes.iter().map(|node| node.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);

    // Any member may invite. A member that has joined starts again without the invite line.
    let line = coel_at(&mesh.nodes()[1].data(), ["invite", "--ttl", "0s"]).await.printed().to_owned();
    join(&line).await.refused(1, &["expired", "coel invite"]);
    assert!(mesh.node(1).stop().await);
    mesh.node(1).start(&Start::Again).await.unwrap();
    until(&mut mesh, 1, "its mesh again", |status| status.nodes.len() == 2 && status.leader.is_some()).await;

    // No member is there to answer.
    let line = coel_at(&data, ["invite"]).await.printed().to_owned();
    mesh.node(1).kill();
    mesh.node(0).kill();
    join(&line).await.refused(1, &["no member answers"]);
}

#[tokio::test]
async fn folders_and_ports_have_one_owner() {
    let _turn = turn().await;
    let mesh = lone_node().await;
    let node = &mesh.nodes()[0];
    let flags = ["--api", "127.0.0.1:0", "--mdns", "false", "--device", "cpu"];
    let free = ["--listen", "/ip4/127.0.0.1/tcp/0"];
    let again = coel_at(&node.data(), ["up"].into_iter().chain(flags).chain(free)).await;
    again.refused(1, &["in use", &node.data().display().to_string()]);
    let anew = coel_at(&node.data(), ["up", "--new"].into_iter().chain(flags).chain(free)).await;
    assert_eq!(anew.code, Some(1), "{anew:#?}");

    let other = mesh.folder().join("x");
    for taken in [format!("/ip4/127.0.0.1/tcp/{}", node.port()), format!("/ip4/127.0.0.1/udp/{}/quic-v1", node.port())]
    {
        let up = coel_at(&other, ["up", "--new", "--listen", &taken].into_iter().chain(flags)).await;
        up.refused(1, &["in use", &node.port().to_string()]);
    }
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let up = coel_at(&other, ["up", "--new", "--api", &address, "--mdns", "false"].into_iter().chain(free)).await;
    up.refused(1, &[&address]);

    // Commands say where they looked for a node.
    coel_at(&other, ["status"]).await.refused(1, &["no node runs", "coel up"]);
    // For a folder that belongs to no mesh yet, the error says what to do.
    let fresh = mesh.folder().join("y");
    coel_at(&fresh, ["up"].into_iter().chain(flags).chain(free)).await.refused(1, &["--new", "join"]);
    coel(["up", "--wings", "2"]).await.refused(2, &["--wings"]);
}

#[tokio::test]
async fn leaving_hands_over_first() {
    let _turn = turn().await;
    let (mut mesh, _, _) = mesh(3, 70).await;
    let api = mesh.nodes()[0].api().unwrap();
    let before = ask::chat(&api, MODEL, QUESTION, |_| ()).await.unwrap();
    let leaver = mesh.nodes()[2].status().await.unwrap().node_id;
    let left = coel_at(&mesh.nodes()[2].data(), ["leave"]).await;
    left.printed();
    assert!(mesh.node(2).wait_end().await.is_some_and(|ended| ended.success()), "{}", mesh.nodes()[2].tail());
    for index in [0, 1] {
        let status = until(&mut mesh, index, "two members that hold everything", |status| {
            status.nodes.len() == 2 && status.coverage == 1.0 && status.readiness.ready
        });
        let status = status.await;
        assert!(
            status.placement.values().flatten().all(|replica| replica.node != leaver),
            "{leaver} is still placed on"
        );
        assert!(status.nodes.iter().all(|node| node.name != "node-3"));
    }
    let after = ask::chat(&api, MODEL, QUESTION, |_| ()).await.unwrap();
    assert_eq!(after.text, before.text);
    // A node that has left belongs to no mesh any more, and the error says so.
    let flags = ["up", "--listen", "/ip4/127.0.0.1/tcp/0", "--api", "127.0.0.1:0", "--mdns", "false"];
    coel_at(&mesh.nodes()[2].data(), flags).await.refused(1, &["belongs to no mesh", "join"]);
}

#[tokio::test]
async fn a_budget_below_the_trunk_is_refused_with_both_numbers() {
    let _turn = turn().await;
    let mut mesh = Mesh::new(crate::support::launcher()).unwrap();
    let small = NodeSpec { memory_bytes: 1 << 20, ..spec("small") };
    mesh.create(small).await.unwrap();
    let model = fixture();
    let data = mesh.nodes()[0].data();
    let import = coel_at(&data, ["model", "import", model.to_str().unwrap(), "--name", MODEL]).await;
    import.refused(1, &["1.0 MiB", "trunk", "--memory"]);
    assert!(coel_at(&data, ["model", "ls"]).await.code == Some(0), "the node lives on");
    mesh.node(0).stop().await;

    // A newcomer that cannot even hold the trunk of the mesh's model does not stay.
    let (mut mesh, _, _) = crate::support::mesh(1, 100).await;
    let invite = mesh.invite(1).await.unwrap();
    let tiny = NodeSpec { memory_bytes: 1 << 20, ..spec("tiny") };
    // The node may answer before it finds out, or it may exit first; that depends on timing. It exits the same way in
    // both cases.
    let joined = mesh.join(vec![tiny], &invite).await;
    let ended = mesh.node(1).wait_end().await;
    let tail = mesh.nodes()[1].tail();
    assert!(ended.is_some_and(|ended| ended.code() == Some(1)), "{ended:?} after {joined:?}\n{tail}");
    assert!(tail.contains("1.0 MiB") && tail.contains("trunk") && tail.contains("--memory"), "{tail}");
    until(&mut mesh, 0, "one member again", |status| status.nodes.len() == 1).await;
}
