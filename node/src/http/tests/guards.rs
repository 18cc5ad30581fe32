//! The key, the address rule, and the paths that need no model.

use std::net::SocketAddr;

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use serde_json::json;

use super::*;
use crate::http::check_bind;

const KEY: &str = "s3cret-key";

#[tokio::test]
async fn a_key_guards_everything_but_health() {
    let server = Server::guarded(Script::default(), Some(KEY)).await;
    for (method, path) in [
        (Method::POST, CHAT),
        (Method::POST, TEXT),
        (Method::GET, "/v1/models"),
        (Method::GET, "/v1/models/tiny"),
        (Method::GET, "/metrics"),
        // Without the key, a client does not even learn whether a path exists.
        (Method::GET, "/v1/nothing"),
        (Method::GET, CHAT),
        (Method::GET, "/healthz/"),
    ] {
        for given in [
            None,
            Some(""),
            Some("Bearer"),
            Some("Bearer "),
            Some("Bearer wrong"),
            Some("Bearer s3cret-key-and-more"),
            Some("Bearer s3cret-ke"),
            Some("Basic s3cret-key"),
            Some(KEY),
        ] {
            let mut request = server.request(method.clone(), path);
            if let Some(given) = given {
                request = request.header(AUTHORIZATION, given);
            }
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), 401, "{path} {given:?}");
            assert_eq!(response.headers()[WWW_AUTHENTICATE], "Bearer");
            let error = json_of(response).await["error"].take();
            assert_eq!(error["code"], "invalid_api_key");
            assert_eq!(error["type"], "invalid_request_error");
            assert!(!error["message"].as_str().unwrap().contains(KEY));
        }
    }
    assert!(server.script.asked.lock().unwrap().is_empty());
    for path in ["/healthz", "/readyz"] {
        assert_eq!(server.get(path).await.status(), 200);
    }
}

#[tokio::test]
async fn the_right_key_opens() {
    let server = Server::guarded(Script::default(), Some(" s3cret-key\n")).await;
    for header in ["Bearer s3cret-key", "bearer  s3cret-key"] {
        let request = server.request(Method::POST, CHAT).header(AUTHORIZATION, header);
        assert_eq!(request.json(&chat_body(json!({}))).send().await.unwrap().status(), 200);
        let request = server.request(Method::GET, "/v1/nothing").header(AUTHORIZATION, header);
        assert_eq!(request.send().await.unwrap().status(), 404);
    }
}

#[tokio::test]
async fn without_a_key_any_header_is_fine() {
    let server = Server::start(Script::default()).await;
    let request = server.request(Method::GET, "/v1/models").header(AUTHORIZATION, "Bearer unused");
    assert_eq!(request.send().await.unwrap().status(), 200);
}

#[test]
fn a_key_is_never_shown() {
    assert_eq!(format!("{:?} {:?}", Auth::new(Some(KEY)), Auth::new(Some(" "))), "Auth(key required) Auth(open)");
}

#[test]
fn only_loopback_may_do_without_a_key() {
    let check = |address: &str, key| check_bind(address.parse::<SocketAddr>().unwrap(), key);
    for address in ["127.0.0.1:8080", "127.8.8.8:1", "[::1]:8080", "[::ffff:127.0.0.1]:8080"] {
        assert_eq!(check(address, None), Ok(()));
    }
    for address in ["0.0.0.0:8080", "192.168.1.7:8080", "[::]:8080", "[::ffff:10.0.0.1]:8080"] {
        assert_eq!(check(address, Some(KEY)), Ok(()));
        for (key, shown) in [(None, "not set"), (Some("  "), "blank")] {
            let message = check(address, key).unwrap_err().to_string();
            for words in [address, shown, "--api-key", "--api 127.0.0.1:8080"] {
                assert!(message.contains(words), "{message}");
            }
        }
    }
}

#[tokio::test]
async fn models_are_listed_and_found() {
    let mut script = Script::default();
    script.models.push(model("aa", "twin"));
    script.models.push(model("bb", "twin"));
    let server = Server::start(script).await;
    let mut list = json_of(server.get("/v1/models").await).await;
    for model in list["data"].as_array_mut().unwrap() {
        assert!(model.as_object_mut().unwrap().remove("created").unwrap().as_u64().unwrap() > 1_700_000_000);
    }
    let entry = |id: &str, hash: &str, name: &str| json!({"id": id, "object": "model", "owned_by": "coel", "coel": {"id": hash, "name": name}});
    // A name that two models share identifies neither.
    let data = [
        entry("tiny", "5eed", "tiny"),
        entry("owner/large", "0b0e", "owner/large"),
        entry("aa", "aa", "twin"),
        entry("bb", "bb", "twin"),
    ];
    assert_eq!(list, json!({"object": "list", "data": data}));

    for (path, id) in
        [("tiny", "tiny"), ("5eed", "5eed"), ("owner/large", "owner/large"), ("owner%2Flarge", "owner/large")]
    {
        let found = json_of(server.get(&format!("/v1/models/{path}")).await).await;
        assert_eq!((&found["id"], &found["object"]), (&json!(id), &json!("model")), "{path}");
    }
}

#[tokio::test]
async fn health_is_plain() {
    let server = Server::start(Script::default()).await;
    let response = server.get("/healthz").await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.text().await.unwrap(), "ok");
}

#[tokio::test]
async fn readiness_is_told_with_its_progress() {
    let server = Server::start(Script::default()).await;
    let response = server.get("/readyz").await;
    assert_eq!(response.status(), 200);
    assert_eq!(json_of(response).await["ready"], true);

    let mut script = Script::default();
    script.readiness.ready = false;
    script.readiness.coverage = 0.5;
    script.readiness.waiting_for = Some("a leader".into());
    let told = script.readiness.clone();
    let server = Server::start(script).await;
    let response = server.get("/readyz").await;
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()[RETRY_AFTER], "2");
    assert_eq!(response.json::<Readiness>().await.unwrap(), told);
}

#[tokio::test]
async fn metrics_are_openmetrics() {
    let server = Server::start(Script::default()).await;
    let response = server.get("/metrics").await;
    let kind = response.headers()[CONTENT_TYPE].to_str().unwrap().to_owned();
    assert_eq!(kind, "application/openmetrics-text; version=1.0.0; charset=utf-8");
    assert_eq!(response.text().await.unwrap(), server.script.metrics());
}
