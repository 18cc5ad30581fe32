//! The end of a connection, which cancels its generation; and of the server, which waits for answers, but not for ever.

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::*;

/// A service that begins an answer and then says nothing more.
fn stuck() -> Script {
    Script { events: vec![step(0, "Par", None)], holds: true, ..Script::default() }
}

/// Sends a chat by hand, on a connection that can be dropped.
async fn connect(server: &Server, more: Value) -> TcpStream {
    let address = server.base.strip_prefix("http://").unwrap();
    let mut connection = TcpStream::connect(address).await.unwrap();
    let body = chat_body(more).to_string();
    let request = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    connection.write_all(request.as_bytes()).await.unwrap();
    connection
}

/// Reads until `words` have arrived.
async fn read_until(connection: &mut TcpStream, words: &str) -> String {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&seen).contains(words) {
        let count = timeout(HANG, connection.read(&mut buffer)).await.unwrap().unwrap();
        assert_ne!(count, 0, "{words} never came: {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8_lossy(&seen).into_owned()
}

#[tokio::test]
async fn a_stream_without_a_token_is_kept_alive_by_comments() {
    let server = Server::start(stuck()).await;
    let mut connection = connect(&server, json!({"stream": true})).await;
    let seen = read_until(&mut connection, ": keepalive\n\n").await;
    assert!(seen.contains("Par") && !seen.contains("event:"), "{seen}");
    read_until(&mut connection, ": keepalive\n\n").await;
}

#[tokio::test]
async fn a_dropped_stream_cancels_its_generation() {
    let server = Server::start(stuck()).await;
    let mut connection = connect(&server, json!({"stream": true})).await;
    read_until(&mut connection, "Par").await;
    drop(connection);
    timeout(HANG, server.script.cancelled.notified()).await.expect("the receiver is dropped");
}

#[tokio::test]
async fn a_dropped_request_cancels_its_generation() {
    let server = Server::start(stuck()).await;
    let connection = connect(&server, json!({})).await;
    let asked = async {
        while server.script.asked.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    timeout(HANG, asked).await.expect("the service is asked");
    drop(connection);
    timeout(HANG, server.script.cancelled.notified()).await.expect("the receiver is dropped");
}

#[tokio::test]
async fn a_generation_outlives_nothing_of_a_finished_answer() {
    let server = Server::start(Script { holds: true, ..Script::default() }).await;
    // The last event completes the reply, although the channel stays open.
    let reply = json_of(server.post(CHAT, &chat_body(json!({}))).await).await;
    assert_eq!(reply["choices"][0]["message"]["content"], "Parisé!");
    timeout(HANG, server.script.cancelled.notified()).await.expect("the receiver is dropped");
}

#[tokio::test]
async fn an_idle_server_stops_and_frees_its_port() {
    let server = Server::start(Script::default()).await;
    // Leaves an idle connection in the client's pool.
    assert_eq!(server.get("/healthz").await.text().await.unwrap(), "ok");
    server.stop.send(()).unwrap();
    timeout(HANG, server.task).await.expect("no hang").unwrap().unwrap();
    let address = server.base.strip_prefix("http://").unwrap();
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn a_stream_that_does_not_end_is_ended_with_an_error() {
    let server = Server::start(stuck()).await;
    let mut streamed = connect(&server, json!({"stream": true})).await;
    read_until(&mut streamed, "Par").await;
    server.stop.send(()).unwrap();
    let rest = read_until(&mut streamed, "\r\n0\r\n\r\n").await;
    assert!(rest.contains("event: error") && rest.contains("shutting down"), "{rest}");
    assert!(!rest.contains("[DONE]"));
    timeout(HANG, server.task).await.expect("no hang").unwrap().unwrap();
    server.script.cancelled.notified().await;
}

#[tokio::test]
async fn a_client_that_never_finishes_its_request_does_not_keep_the_server() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut half = TcpStream::connect(address).await.unwrap();
    half.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: appl").await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let patience = Patience { keepalive: HANG, drain: Duration::from_millis(20), farewell: Duration::from_millis(20) };
    let shutdown = async { stopped.await.unwrap_or_default() };
    let server = serve_with(listener, Arc::new(Script::default()), Auth::new(None), shutdown, patience);
    let server = tokio::spawn(server);
    stop.send(()).unwrap();
    timeout(HANG, server).await.expect("no hang").unwrap().unwrap();
}
