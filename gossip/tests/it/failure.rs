//! Death, farewell and return.

use std::time::Duration;

use coel_gossip::{Access, Frame, Identity, Liveness, OpenError, RequestError};

use crate::bench::{
    ECHO, GUARD, Process, QUIC, TCP, ask, config, echo, guarded, join, members, mute, node, serve_echo, until_liveness,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_peer_goes_down_and_what_was_pending_fails_retryably() {
    for listen in [TCP, QUIC] {
        let mut watching = config(&Identity::generate(), listen);
        if listen == TCP {
            // The limits are so long that only the lost connection and the refusals after it can bring the peer down.
            watching.liveness.suspect_after = GUARD * 2;
            watching.liveness.down_after = GUARD * 3;
        } else {
            // Over QUIC only silence reveals a death; here a short one is enough.
            watching.liveness.suspect_after = Duration::from_secs(1);
            watching.liveness.down_after = Duration::from_secs(2);
        }
        let a = coel_gossip::start(watching).await.expect("starts");
        let victim = Process::start(config(&Identity::generate(), listen)).await;
        join(&[&a, &victim.handle]).await;
        let peer = victim.handle.local_peer_id();
        victim.spawn(mute(victim.handle.serve(ECHO, Access::Members).expect("not served yet")));
        let asking = a.clone();
        let pending = tokio::spawn(async move { asking.request(peer, ECHO, Frame::default(), GUARD * 2).await });
        // The peer is killed only once the request has a stream: this next stream shows that the server is registered.
        guarded("opening", a.open(peer, ECHO)).await.expect("opens");
        victim.kill();
        let error = guarded("the pending request", pending).await.expect("no panic").expect_err("killed");
        assert!(error.is_retryable(), "{error}");
        assert!(!matches!(error, RequestError::TimedOut { .. }), "{error}");
        until_liveness(&a, peer, Liveness::Down).await;
        let error = ask(&a, peer, vec![]).await.expect_err("down");
        assert!(matches!(error, RequestError::Open(OpenError::Unreachable { .. })), "{error}");
        assert!(error.is_retryable());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_farewell_is_seen_at_once() {
    for listen in [TCP, QUIC] {
        let mut patient = config(&Identity::generate(), listen);
        // So patient that only the farewell can bring the peer down.
        patient.liveness.suspect_after = GUARD * 2;
        patient.liveness.down_after = GUARD * 3;
        patient.liveness.refusals_down = u32::MAX;
        let a = coel_gossip::start(patient).await.expect("starts");
        let b = node(listen).await;
        join(&[&a, &b]).await;
        // Once b's status has arrived, its gossip stream, which carries the farewell, is up.
        b.set_status(coel_gossip::Status { memory: 1, compute: 1 });
        crate::bench::until(&a, |peers| peers[&b.local_peer_id()].status.is_some()).await;
        let peer = b.local_peer_id();
        guarded("shutting down", b.shutdown()).await;
        until_liveness(&a, peer, Liveness::Down).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_peer_is_reached_again_where_the_mesh_says_it_is() {
    for listen in [TCP, QUIC] {
        let identity = Identity::generate();
        let a = node(listen).await;
        let before = Process::start(config(&identity, listen)).await;
        join(&[&a, &before.handle]).await;
        before.spawn(echo(before.handle.serve(ECHO, Access::Members).expect("not served yet")));
        let peer = identity.peer_id();
        ask(&a, peer, vec![1]).await.expect("answered");
        before.kill();
        let after = coel_gossip::start(config(&identity, listen)).await.expect("starts");
        serve_echo(&after, Access::Members);
        // The restarted peer knows no addresses, so `a` must find it.
        after.set_members([a.local_peer_id(), peer].map(|peer| (peer, vec![])).into());
        a.set_members(members(&[&a, &after]));
        answered_again(&a, peer).await;
        until_liveness(&a, peer, Liveness::Up).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_peer_is_reached_again_when_it_dials() {
    let identity = Identity::generate();
    let a = node(TCP).await;
    let before = Process::start(config(&identity, TCP)).await;
    join(&[&a, &before.handle]).await;
    let peer = identity.peer_id();
    before.kill();
    until_liveness(&a, peer, Liveness::Down).await;
    let after = coel_gossip::start(config(&identity, TCP)).await.expect("starts");
    serve_echo(&after, Access::Members);
    after.set_members(members(&[&a, &after]));
    until_liveness(&a, peer, Liveness::Up).await;
    ask(&a, peer, vec![2]).await.expect("answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_was_never_there_is_down_in_the_end() {
    let (a, gone) = (node(TCP).await, node(TCP).await);
    let nobody = members(&[&gone]);
    let peer = gone.local_peer_id();
    gone.shutdown().await;
    a.set_members(nobody);
    until_liveness(&a, peer, Liveness::Down).await;
    let error = ask(&a, peer, vec![]).await.expect_err("down");
    assert!(matches!(error, RequestError::Open(OpenError::Unreachable { .. })), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_busy_for_a_while_is_suspect_but_not_dead() {
    for listen in [TCP, QUIC] {
        let mut watching = config(&Identity::generate(), listen);
        watching.liveness.suspect_after = Duration::from_millis(700);
        watching.liveness.down_after = GUARD * 2;
        let a = coel_gossip::start(watching).await.expect("starts");
        let busy = Process::start(config(&Identity::generate(), listen)).await;
        join(&[&a, &busy.handle]).await;
        busy.spawn(echo(busy.handle.serve(ECHO, Access::Members).expect("not served yet")));
        let peer = busy.handle.local_peer_id();
        ask(&a, peer, vec![1]).await.expect("answered");
        // The node's only worker is busy until the node is suspected, so the node is silent meanwhile.
        let (release, released) = std::sync::mpsc::channel::<()>();
        busy.spawn(async move {
            let _ = released.recv_timeout(GUARD); // an error is a release too
        });
        until_liveness(&a, peer, Liveness::Suspect).await;
        let asking = a.clone();
        let pending = tokio::spawn(async move { ask(&asking, peer, vec![2]).await });
        release.send(()).expect("still busy");
        let reply = guarded("the pending request", pending).await.expect("no panic").expect("answered late");
        assert_eq!(reply.payload[..], [2]);
        until_liveness(&a, peer, Liveness::Up).await;
        busy.kill();
    }
}

/// Asks until there is an answer, like a caller with no other node to ask.
async fn answered_again(a: &coel_gossip::Handle, peer: coel_gossip::PeerId) {
    let mut peers = a.peers();
    guarded("an answer after the restart", async {
        loop {
            match ask(a, peer, vec![2]).await {
                Ok(reply) => break assert_eq!(reply.payload[..], [2]),
                Err(error) => tracing::debug!(%error, "not yet"),
            }
            // Another attempt makes sense only once something about the members has changed.
            peers.changed().await.expect("the node runs");
        }
    })
    .await;
}
