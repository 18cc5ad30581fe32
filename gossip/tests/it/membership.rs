//! Access for members and strangers, and the state that members share.

use bytes::Bytes;
use coel_gossip::{
    Access, DialError, FACTS_BYTES_MAX, Frame, Identity, Liveness, OpenError, Protocol, RequestError, Status,
};

use crate::bench::{ECHO, GUARD, QUIC, TCP, ask, config, echo, guarded, join, members, node, serve_echo, until};

const HANDSHAKE: Protocol = Protocol::new("/coel/test/handshake/1", 1000);

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_gets_nothing_on_a_protocol_for_members_but_may_use_one_for_anyone() {
    let (a, b, stranger) = (node(TCP).await, node(TCP).await, node(TCP).await);
    join(&[&a, &b]).await;
    serve_echo(&a, Access::Members);
    tokio::spawn(echo(a.serve(HANDSHAKE, Access::Anyone).expect("not served yet")));
    let dialed = guarded("dialling", stranger.dial(a.listen_addresses(), None, GUARD)).await;
    assert_eq!(dialed.expect("strangers may connect"), a.local_peer_id());
    let error = ask(&stranger, a.local_peer_id(), vec![1]).await.expect_err("no member");
    assert!(matches!(error, RequestError::Open(OpenError::Refused { .. })), "{error}");
    assert!(!error.is_retryable());
    let hello = Frame::new("hello", "");
    let answer = stranger.request(a.local_peer_id(), HANDSHAKE, hello.clone(), GUARD).await;
    assert_eq!(answer.expect("answered"), hello);
    // Admission takes effect without a new connection.
    let everyone = members(&[&a, &b, &stranger]);
    [&a, &b, &stranger].into_iter().for_each(|node| node.set_members(everyone.clone()));
    assert!(ask(&stranger, a.local_peer_id(), vec![1]).await.is_ok());
    until(&a, |peers| peers.len() == 2 && peers.values().all(|peer| peer.liveness == Liveness::Up)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_few_and_never_in_the_way_of_members() {
    let mut narrow = config(&Identity::generate(), TCP);
    narrow.strangers_max = 1;
    let a = coel_gossip::start(narrow).await.expect("starts");
    tokio::spawn(echo(a.serve(HANDSHAKE, Access::Anyone).expect("not served yet")));
    let (first, second, member) = (node(TCP).await, node(TCP).await, node(TCP).await);
    guarded("dialling", first.dial(a.listen_addresses(), None, GUARD)).await.expect("one place");
    let hello = || Frame::new("hello", "");
    first.request(a.local_peer_id(), HANDSHAKE, hello(), GUARD).await.expect("answered");
    // The second stranger may believe for a moment that it is connected, but it gets no answer.
    let _ = guarded("dialling", second.dial(a.listen_addresses(), None, GUARD)).await;
    let asked = guarded("asking", second.request(a.local_peer_id(), HANDSHAKE, hello(), GUARD)).await;
    assert!(asked.is_err(), "{asked:?}");
    join(&[&a, &member]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_former_member_is_refused_and_forgotten() {
    let (a, b) = (node(TCP).await, node(TCP).await);
    join(&[&a, &b]).await;
    serve_echo(&a, Access::Members);
    a.set_members(members(&[&a]));
    let error = ask(&b, a.local_peer_id(), vec![1]).await.expect_err("no member any more");
    assert!(matches!(error, RequestError::Open(OpenError::Refused { .. })), "{error}");
    until(&a, |peers| peers.is_empty()).await;
    // Once b has learned of the removal too, it no longer dials, and after the farewell no connection is left.
    b.set_members(members(&[&b]));
    let opened = guarded("opening", async {
        loop {
            match a.open(b.local_peer_id(), ECHO).await {
                // Until the farewell is over, there is still a connection.
                Err(OpenError::Unsupported { .. }) => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
                other => break other,
            }
        }
    });
    let error = opened.await.expect_err("b is nobody to a");
    assert!(matches!(error, OpenError::UnknownPeer { .. } | OpenError::Unreachable { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn load_and_facts_reach_every_member() {
    for listen in [TCP, QUIC] {
        let (a, b, c) = (node(listen).await, node(listen).await, node(listen).await);
        // Load and facts are set before there are members, and changed afterwards.
        a.set_status(Status { memory: 200, compute: 100 });
        a.set_facts(Bytes::from_static(b"48 GiB")).expect("small");
        join(&[&a, &b, &c]).await;
        let me = a.local_peer_id();
        for node in [&b, &c] {
            until(node, |peers| {
                peers[&me].status == Some(Status { memory: 200, compute: 100 })
                    && peers[&me].facts.as_deref() == Some(b"48 GiB")
                    && peers[&me].started_ms > 0
            })
            .await;
        }
        a.set_status(Status { memory: 20, compute: 100 });
        let large = Bytes::from(vec![7; FACTS_BYTES_MAX]);
        a.set_facts(large.clone()).expect("at the limit");
        for node in [&b, &c] {
            until(node, |peers| {
                peers[&me].status == Some(Status { memory: 20, compute: 100 })
                    && peers[&me].facts.as_ref() == Some(&large)
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn facts_arrive_also_from_whom_we_admit_later_than_it_admits_us() {
    let (early, late) = (node(TCP).await, node(TCP).await);
    early.set_facts(Bytes::from_static(b"48 GiB")).expect("small");
    let mut attempts = late.unauthorized_attempts();
    early.set_members(members(&[&early, &late]));
    // After six refusals in a row, `early` waits before it retries its stream, longer each time. It is waiting now.
    // Meanwhile the stream of `late` comes up and asks for the missing facts.
    for _ in 0..12 {
        let attempted = guarded("an attempt", attempts.recv()).await.expect("the node runs");
        assert_eq!(attempted, early.local_peer_id());
    }
    late.set_members(members(&[&early, &late]));
    let me = early.local_peer_id();
    until(&late, |peers| peers.get(&me).is_some_and(|peer| peer.facts.as_deref() == Some(b"48 GiB"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn facts_over_the_limit_are_refused() {
    let a = node(TCP).await;
    assert_eq!(a.set_facts(vec![0; FACTS_BYTES_MAX + 1].into()).expect_err("too large").bytes, FACTS_BYTES_MAX + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn dialling_names_every_failure() {
    let (a, b) = (node(TCP).await, node(TCP).await);
    let gone = node(TCP).await;
    let nobody = gone.listen_addresses()[0].clone();
    gone.shutdown().await;
    let error = guarded("dialling", a.dial(vec![nobody.clone()], None, GUARD)).await.expect_err("nobody there");
    assert!(matches!(error, DialError::Failed { .. }), "{error}");
    assert!(error.to_string().contains(&nobody.to_string()), "{error}");
    // One good address among bad ones is enough. An address with the wrong identity is not a good one.
    let mut addresses = b.listen_addresses();
    addresses.push(nobody);
    let wanted = Some(Identity::generate().peer_id());
    let error = guarded("dialling", a.dial(addresses.clone(), wanted, GUARD)).await.expect_err("somebody else");
    assert!(error.to_string().contains(&b.local_peer_id().to_string()), "{error}");
    let reached = guarded("dialling", a.dial(addresses, None, GUARD)).await.expect("b is there");
    assert_eq!(reached, b.local_peer_id());
    assert!(matches!(a.dial(vec![], None, GUARD).await, Err(DialError::NoAddress)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_given_peer_is_found_although_the_mesh_does_not_know_where_it_is() {
    let b = node(TCP).await;
    let mut config = config(&Identity::generate(), TCP);
    config.peers = b.listen_addresses();
    let a = coel_gossip::start(config).await.expect("starts");
    let nowhere = [a.local_peer_id(), b.local_peer_id()].map(|peer| (peer, vec![]));
    a.set_members(nowhere.clone().into());
    b.set_members(nowhere.into());
    for node in [&a, &b] {
        until(node, |peers| peers.values().all(|peer| peer.liveness == Liveness::Up)).await;
    }
}
