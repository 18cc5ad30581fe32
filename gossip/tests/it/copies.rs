//! Two processes with one identity, as a copied data folder gives.

use std::time::Duration;

use coel_gossip::{Access, Identity};

use crate::bench::{QUIC, TCP, ask, config, guarded, join, members, node, serve_echo, until};

#[tokio::test(flavor = "multi_thread")]
async fn the_later_of_two_processes_of_one_identity_stops_and_the_earlier_goes_on() {
    for listen in [TCP, QUIC] {
        let (neighbour, identity) = (node(listen).await, Identity::generate());
        let original = coel_gossip::start(config(&identity, listen)).await.expect("starts");
        join(&[&neighbour, &original]).await;
        guarded("confirming", original.confirmed()).await.expect("there is no other");
        serve_echo(&original, Access::Members);

        let copy = coel_gossip::start(config(&identity, listen)).await.expect("starts");
        copy.set_members(members(&[&neighbour, &copy]));
        let duplicate = guarded("asking", copy.confirmed()).await.expect_err("the original is alive");
        assert_eq!((duplicate.peer, copy.duplicate()), (identity.peer_id(), Some(duplicate)));
        guarded("stopping", copy.stopped()).await;

        // The neighbour has seen both, and still has the original.
        until(&neighbour, |peers| peers[&identity.peer_id()].alternates).await;
        let answered = async {
            // A stream may still be opened on the connection of the copy, which is closing.
            while let Err(error) = ask(&neighbour, identity.peer_id(), vec![1]).await {
                assert!(error.is_retryable(), "{error}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        guarded("asking the original", answered).await;
        assert_eq!(original.duplicate(), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_without_members_is_confirmed_at_once() {
    let alone = node(TCP).await;
    alone.set_members(members(&[&alone]));
    guarded("confirming", alone.confirmed()).await.expect("there is no other");
}
