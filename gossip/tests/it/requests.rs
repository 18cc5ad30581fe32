//! Requests and replies, as frames.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use coel_gossip::{Access, Frame, OpenError, Protocol, RequestError, StreamError};

use crate::bench::{ECHO, GUARD, QUIC, TCP, ask, echo, guarded, join, members, mute, node, serve_echo, until};

#[tokio::test(flavor = "multi_thread")]
async fn members_exchange_frames_over_tcp_and_over_quic() {
    for listen in [TCP, QUIC] {
        let (a, b) = (node(listen).await, node(listen).await);
        join(&[&a, &b]).await;
        serve_echo(&b, Access::Members);
        for size in [0, 1, 70_000, 900_000] {
            let payload = vec![size as u8; size];
            let reply = ask(&a, b.local_peer_id(), payload.clone()).await.expect("answered");
            assert_eq!(reply, Frame::new("header", payload));
        }
        // Links are measured by pings and by large replies.
        until(&a, |peers| peers[&b.local_peer_id()].rtt.is_some()).await;
        until(&a, |peers| peers[&b.local_peer_id()].throughput_bytes_s.is_some_and(|rate| rate > 0.0)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_right_after_admission_waits_for_the_connection() {
    let (a, b) = (node(TCP).await, node(TCP).await);
    serve_echo(&b, Access::Members);
    let members = members(&[&a, &b]);
    b.set_members(members.clone());
    a.set_members(members);
    assert!(ask(&a, b.local_peer_id(), vec![1]).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_stream_serves_many_requests_and_a_dead_idle_one_is_replaced() {
    let (a, b) = (node(TCP).await, node(TCP).await);
    join(&[&a, &b]).await;
    let streams = Arc::new(AtomicUsize::new(0));
    let mut incoming = b.serve(ECHO, Access::Members).expect("not served yet");
    let counted = streams.clone();
    tokio::spawn(async move {
        while let Some((_, mut stream)) = incoming.next().await {
            counted.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                // Ten answers a stream; the eleventh request finds it closed.
                for _ in 0..10 {
                    let Ok(Some(frame)) = stream.recv().await else {
                        return;
                    };
                    if stream.send(&frame).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    for nth in 0..10 {
        ask(&a, b.local_peer_id(), vec![nth]).await.expect("answered");
    }
    assert_eq!(streams.load(Ordering::SeqCst), 1);
    for nth in 0..10 {
        ask(&a, b.local_peer_id(), vec![nth]).await.expect("answered on a new stream");
    }
    assert_eq!(streams.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_of_streams_at_once_is_served_although_the_swarm_queues_one() {
    let (a, b, c) = (node(TCP).await, node(TCP).await, node(TCP).await);
    join(&[&a, &b, &c]).await;
    serve_echo(&c, Access::Members);
    let asking = (0..60u8).map(|nth| {
        let from = if nth % 2 == 0 { a.clone() } else { b.clone() };
        let to = c.local_peer_id();
        tokio::spawn(async move { ask(&from, to, vec![nth; 100]).await.map(|reply| reply.payload[0]) })
    });
    for (nth, asked) in asking.collect::<Vec<_>>().into_iter().enumerate() {
        assert_eq!(asked.await.expect("no panic").expect("answered"), nth as u8);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_holds_a_bounded_number_of_streams() {
    const OTHER: Protocol = Protocol::new("/coel/test/other/1", 1000);
    let (a, b) = (node(TCP).await, node(TCP).await);
    join(&[&a, &b]).await;
    serve_echo(&b, Access::Members);
    tokio::spawn(echo(b.serve(OTHER, Access::Members).expect("not served yet")));
    let to = b.local_peer_id();
    let mut held = Vec::new();
    let refused = loop {
        match guarded("opening", a.open(to, ECHO)).await {
            Ok(stream) => held.push(stream),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, OpenError::Refused { .. }), "{refused}");
    assert_eq!(held.len(), 64);
    guarded("opening", a.open(to, OTHER)).await.expect("another protocol has places of its own");
    // The last stream that was opened still works, and streams that are dropped make room.
    let mut last = held.pop().expect("there are some");
    held.clear();
    last.send(&Frame::new("hello", "")).await.expect("sent");
    assert_eq!(last.recv().await.expect("answered"), Some(Frame::new("hello", "")));
    guarded("opening once more", async { while a.open(to, ECHO).await.is_err() {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_over_the_limit_are_refused_on_both_sides() {
    let (a, b) = (node(TCP).await, node(TCP).await);
    join(&[&a, &b]).await;
    let mut incoming = b.serve(ECHO, Access::Members).expect("not served yet");
    let to = b.local_peer_id();
    // Over our own limit: nothing is sent, and a retry makes no sense.
    let too_large = vec![0; ECHO.frame_bytes_max as usize];
    let error = ask(&a, to, too_large).await.expect_err("over the limit");
    assert!(matches!(error, RequestError::Stream(StreamError::FrameTooLarge { .. })), "{error}");
    assert!(!error.is_retryable());
    // Over the receiver's limit: a sender that assumes a larger limit is cut off at the frame's length.
    let generous = Protocol { frame_bytes_max: u32::MAX, ..ECHO };
    let mut stream = guarded("opening", a.open(to, generous)).await.expect("opens");
    let large = Frame::new("", vec![0; ECHO.frame_bytes_max as usize + 1]);
    let sending = tokio::spawn(async move {
        let _ = stream.send(&large).await;
        let _ = stream.recv().await;
    });
    let refused = loop {
        let (from, mut stream) = guarded("accepting", incoming.next()).await.expect("a stream");
        assert_eq!(from, a.local_peer_id());
        if let Err(error) = guarded("receiving", stream.recv()).await {
            break error;
        }
    };
    assert!(matches!(refused, StreamError::FrameTooLarge { .. }), "{refused}");
    guarded("the sender noticing", sending).await.expect("no panic");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_nobody_answers_ends_at_its_deadline() {
    let (a, b) = (node(TCP).await, node(TCP).await);
    join(&[&a, &b]).await;
    tokio::spawn(mute(b.serve(ECHO, Access::Members).expect("not served yet")));
    let deadline = Duration::from_millis(300);
    let asked = guarded("a request", a.request(b.local_peer_id(), ECHO, Frame::default(), deadline)).await;
    let error = asked.expect_err("nobody answers");
    assert!(matches!(error, RequestError::TimedOut { .. }), "{error}");
    assert!(error.is_retryable());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_protocol_is_told_apart() {
    let (a, b) = (node(TCP).await, node(TCP).await);
    join(&[&a, &b]).await;
    let opened = guarded("opening", a.open(b.local_peer_id(), Protocol::new("/coel/nobody/1", 10))).await;
    assert!(matches!(opened, Err(OpenError::Unsupported { .. })), "{opened:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_protocol_is_served_once_and_may_be_taken_over() {
    let a = node(TCP).await;
    let first = a.serve(ECHO, Access::Members).expect("not served yet");
    assert!(a.serve(ECHO, Access::Anyone).is_err());
    drop(first);
    // The swarm forgets the old server once its task has noticed the drop.
    let second = guarded("taking over", async {
        loop {
            match a.serve(ECHO, Access::Anyone) {
                Ok(incoming) => break incoming,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    });
    let served = tokio::spawn(echo(second.await));
    a.shutdown().await;
    tokio::time::timeout(GUARD, served).await.expect("incoming ends with the node").expect("no panic");
}
