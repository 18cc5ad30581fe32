//! A process without an invite: it may connect, and gets nothing.
//!
//! The stranger speaks the mesh's own protocols, not HTTP: it is a libp2p node without membership.

use std::time::Duration;

use bytes::Bytes;
use coel_gossip::{Config, Frame, Handle, Identity, Multiaddr, OpenError, PeerId, Protocol};
use coel_node::experts::wire as experts;
use coel_node::mesh::admission::handshake::{MESSAGE_BYTES_MAX, Message, VERSION};
use coel_node::mesh::admission::protocol as admit;
use coel_node::mesh::raft_network as raft;
use coel_node::weights::wire as weights;
use coel_store::{MeshId, cbor};
use coel_testnet::mesh::Mesh;
use coel_testnet::node::Node;

/// A hang guard.
const LIMIT: Duration = Duration::from_secs(60);
/// The gossip protocol has no public constant, but its name is on the wire for everyone to see.
const GOSSIP: Protocol = Protocol::new("/coel/gossip/2", 1 << 18);

async fn stranger() -> Handle {
    let mut config = Config::new(Identity::generate());
    config.listen = vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()];
    config.mdns = false;
    coel_gossip::start(config).await.unwrap()
}

async fn connect(stranger: &Handle, node: &Node) -> PeerId {
    let peer: PeerId = node.peer_id().unwrap().parse().unwrap();
    let port = node.port();
    let addresses: Vec<Multiaddr> = vec![
        format!("/ip4/127.0.0.1/udp/{port}/quic-v1").parse().unwrap(),
        format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap(),
    ];
    stranger.dial(addresses, Some(peer), LIMIT).await.unwrap()
}

/// The replies of a node to one message on the admission protocol, until it hangs up.
async fn handshake(stranger: &Handle, peer: PeerId, message: &Message) -> Vec<Message> {
    let frame = Frame::new(Bytes::new(), cbor::to_vec(message).unwrap());
    said(stranger, peer, &frame).await
}

async fn said(stranger: &Handle, peer: PeerId, frame: &Frame) -> Vec<Message> {
    let mut stream = stranger.open(peer, admit::PROTOCOL).await.unwrap();
    stream.send(frame).await.unwrap();
    let mut said = Vec::new();
    let heard = async {
        while let Ok(Some(frame)) = stream.recv().await {
            said.push(cbor::from_slice(&frame.payload, MESSAGE_BYTES_MAX).unwrap());
            if matches!(said.last(), Some(Message::Challenge { .. })) {
                break;
            }
        }
    };
    tokio::time::timeout(LIMIT, heard).await.expect("neither an answer nor an end");
    said
}

/// Every protocol but admission is closed without a byte, admission demands a proof, and the mesh stays as it was.
pub async fn get_nothing(mesh: &mut Mesh) {
    let stranger = stranger().await;
    let before = mesh.nodes()[0].status().await.unwrap();
    for node in mesh.nodes() {
        let peer = connect(&stranger, node).await;
        for protocol in [GOSSIP, raft::PROTOCOL, weights::PROTOCOL, experts::PROTOCOL] {
            match stranger.open(peer, protocol).await {
                Err(OpenError::Refused { .. }) => {}
                Err(other) => panic!("{} on {}: {other}", protocol.name, node.name()),
                Ok(_) => panic!("{} of {} is open to strangers", protocol.name, node.name()),
            }
        }
        let wrong = Message::Hello { version: VERSION, mesh: MeshId([0; 16]) };
        let said = handshake(&stranger, peer, &wrong).await;
        assert!(matches!(&said[..], [Message::Refused { reason }] if reason.contains("mesh")), "{said:?}");
        let future = Message::Hello { version: VERSION + 1, mesh: before.mesh.parse().unwrap() };
        let said = handshake(&stranger, peer, &future).await;
        assert!(matches!(&said[..], [Message::Refused { reason }] if reason.contains("version")), "{said:?}");
        let proof =
            Message::Proof { proof: [7; 32], name: "x".into(), addresses: Vec::new(), former: None, anew: false };
        let said = handshake(&stranger, peer, &proof).await;
        assert!(matches!(&said[..], [Message::Refused { .. }]), "{said:?}");
        let garbage = Frame::new(Bytes::new(), Bytes::from_static(b"\xff\x00 no message"));
        let said = self::said(&stranger, peer, &garbage).await;
        assert!(matches!(&said[..], [Message::Refused { .. }]), "{said:?}");
    }
    let after = mesh.nodes()[0].status().await.unwrap();
    assert_eq!((after.nodes.len(), after.state_hash), (before.nodes.len(), before.state_hash));
    stranger.shutdown().await;
}
