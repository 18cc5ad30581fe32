//! Every fault: its status, its code, and its OpenAI shape.

use reqwest::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER};
use serde_json::{Value, json};

use super::*;

/// Checks a reply's status and shape, and returns what is inside `error`.
#[track_caller]
fn fault(status: u16, body: &str) -> Value {
    let mut reply: Value = serde_json::from_str(body).expect("JSON");
    let error = reply["error"].take();
    let mut names: Vec<_> = error.as_object().unwrap_or_else(|| panic!("{body}")).keys().collect();
    names.sort();
    assert_eq!(names, ["code", "message", "param", "type"]);
    assert_eq!(reply, json!({ "error": null }), "nothing beside it");
    let kind = match status {
        429 => "rate_limit_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    };
    assert_eq!(error["type"], kind);
    assert!(!error["message"].as_str().unwrap().is_empty());
    error
}

async fn refused(response: Response, status: u16, code: Value, param: Value) -> String {
    let body_status = response.status();
    let body = response.text().await.unwrap();
    assert_eq!(body_status, status, "{body}");
    let error = fault(status, &body);
    assert_eq!((&error["code"], &error["param"]), (&code, &param), "{body}");
    error["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn malformed_json_is_refused_with_its_position() {
    let server = Server::start(Script::default()).await;
    for path in [CHAT, TEXT] {
        let request = server.request(Method::POST, path).header(CONTENT_TYPE, "application/json");
        let response = request.body("{\"model\": \"tiny\",\n\"stream\": tru}").send().await.unwrap();
        let message = refused(response, 400, Value::Null, Value::Null).await;
        assert!(message.contains("line 2 column"), "{message}");
    }
    assert!(server.script.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn another_content_type_is_refused() {
    let server = Server::start(Script::default()).await;
    let body = chat_body(json!({})).to_string();
    for (given, shown) in
        [(Some("text/plain"), "text/plain"), (Some("application/x-www-form-urlencoded"), "urlencoded"), (None, "none")]
    {
        let mut request = server.request(Method::POST, CHAT).body(body.clone());
        if let Some(given) = given {
            request = request.header(CONTENT_TYPE, given);
        }
        let response = request.send().await.unwrap();
        let message = refused(response, 415, json!("unsupported_media_type"), Value::Null).await;
        assert!(message.contains(shown) && message.contains("application/json"), "{message}");
    }
    let request = server.request(Method::POST, CHAT).header(CONTENT_TYPE, "Application/JSON; charset=utf-8");
    assert_eq!(request.body(body).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn an_unknown_route_is_refused() {
    let server = Server::start(Script::default()).await;
    for path in ["/v1/embeddings", "/", "/v1/models/"] {
        let message = refused(server.get(path).await, 404, json!("unknown_url"), Value::Null).await;
        assert!(message.contains(path) && message.contains(CHAT), "{message}");
    }
}

#[tokio::test]
async fn a_wrong_method_is_refused() {
    let server = Server::start(Script::default()).await;
    let response = server.get(CHAT).await;
    assert_eq!(response.headers()[ALLOW], "POST");
    let message = refused(response, 405, json!("method_not_allowed"), Value::Null).await;
    assert!(message.contains("GET"), "{message}");
    let response = server.post("/v1/models", &json!({})).await;
    refused(response, 405, json!("method_not_allowed"), Value::Null).await;
}

#[tokio::test]
async fn a_body_too_large_is_refused_and_one_at_the_limit_is_not() {
    let server = Server::start(Script::default()).await;
    let limit = 4 << 20;
    let padded = |length: usize| {
        let body = chat_body(json!({})).to_string();
        body.clone() + &" ".repeat(length - body.len())
    };
    let send = async |body: String| {
        let request = server.request(Method::POST, CHAT).header(CONTENT_TYPE, "application/json");
        request.body(body).send().await.unwrap()
    };
    let response = send(padded(limit + 1)).await;
    let message = refused(response, 413, json!("body_too_large"), Value::Null).await;
    assert!(message.contains("4194304"), "{message}");
    assert_eq!(send(padded(limit)).await.status(), 200);
    assert_eq!(server.script.asked.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn an_unknown_model_is_not_found() {
    let server = Server::start(Script::default()).await;
    let body = json!({"model": "gpt-99"});
    for response in [
        server.post(CHAT, &chat_body(body.clone())).await,
        server.post(TEXT, &text_body(body.clone())).await,
        server.post(CHAT, &chat_body(merge(body, json!({"stream": true})))).await,
        server.get("/v1/models/gpt-99").await,
    ] {
        let message = refused(response, 404, json!("model_not_found"), json!("model")).await;
        assert!(message.contains("gpt-99") && message.contains("tiny"), "{message}");
    }
}

#[tokio::test]
async fn a_field_at_fault_is_named() {
    let server = Server::start(Script::default()).await;
    let response = server.post(CHAT, &chat_body(json!({"temperature": 3}))).await;
    let message = refused(response, 400, json!("invalid_value"), json!("temperature")).await;
    assert_eq!(message, "`temperature` is 3, but must be from 0 to 2");
    let response = server.post(CHAT, &chat_body(json!({"messages": []}))).await;
    refused(response, 400, json!("empty_array"), json!("messages")).await;
    let response = server.post(CHAT, &chat_body(json!({"n": 3}))).await;
    refused(response, 400, json!("unsupported_parameter"), json!("n")).await;
    assert!(server.script.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_prompt_beyond_the_context_is_refused() {
    let message = "the prompt has 300 tokens, but the model's context is 256".to_owned();
    let error = ServiceError::ContextExceeded(message.clone());
    let server = Server::start(Script::refusing(error)).await;
    for (path, body, param) in [(CHAT, chat_body(json!({})), "messages"), (TEXT, text_body(json!({})), "prompt")] {
        let response = server.post(path, &body).await;
        let said = refused(response, 400, json!("context_length_exceeded"), json!(param)).await;
        assert_eq!(said, message);
    }
}

#[tokio::test]
async fn what_the_service_refuses_keeps_its_field() {
    let error = ServiceError::Invalid { param: Some("messages"), message: "roles must alternate".into() };
    let server = Server::start(Script::refusing(error)).await;
    let response = server.post(CHAT, &chat_body(json!({}))).await;
    assert_eq!(refused(response, 400, Value::Null, json!("messages")).await, "roles must alternate");
}

/// The service's own faults, each with its status, its code, its `Retry-After` and some words of its message.
fn troubles() -> Vec<(ServiceError, u16, &'static str, Option<&'static str>, &'static str)> {
    use ServiceError as E;
    vec![
        (E::NotReady("experts are being fetched".into()), 503, "not_ready", Some("2"), "experts are being fetched"),
        (E::Busy("all 8 places are taken".into()), 429, "rate_limit_exceeded", Some("1"), "all 8 places"),
        (E::MissingExperts("expert 3 of layer 1".into()), 503, "missing_experts", Some("5"), "expert 3 of layer 1"),
        (E::Internal("the compute thread ended".into()), 500, "internal_error", None, "compute thread"),
    ]
}

#[tokio::test]
async fn troubles_before_the_answer_have_their_status() {
    for (error, status, code, retry, words) in troubles() {
        // A refusal and a failure before the first token look the same to the client, streamed or not.
        for script in [Script::refusing(error.clone()), Script::saying(vec![Event::Failed(error.clone())])] {
            let server = Server::start(script).await;
            for more in [json!({}), json!({"stream": true})] {
                let response = server.post(CHAT, &chat_body(more)).await;
                let after = response.headers().get(RETRY_AFTER).map(|value| value.to_str().unwrap().to_owned());
                assert_eq!(after.as_deref(), retry);
                let message = refused(response, status, json!(code), Value::Null).await;
                assert!(message.contains(words), "{message}");
            }
        }
    }
}

#[tokio::test]
async fn not_ready_tells_how_far_it_is() {
    let waiting = Readiness {
        ready: false,
        waiting_for: Some("3 blobs from two peers".into()),
        problem: None,
        coverage: 0.625,
        bytes_assigned: 8 << 20,
        bytes_held: 5 << 20,
    };
    let leaving = Readiness { ready: true, ..waiting.clone() };
    let held = "62 % of the experts ready in the mesh, 5.0 of 8.0 MiB held here";
    for (said, readiness, expected) in [
        ("not yet", &waiting, format!("not serving: not yet (3 blobs from two peers; {held})")),
        ("3 blobs from two peers", &waiting, format!("not serving: 3 blobs from two peers ({held})")),
        ("shutting down", &leaving, "not serving: shutting down".to_owned()),
    ] {
        let script = Script::refusing(ServiceError::NotReady(said.into()));
        let server = Server::start(Script { readiness: readiness.clone(), ..script }).await;
        let response = server.post(CHAT, &chat_body(json!({}))).await;
        assert_eq!(refused(response, 503, json!("not_ready"), Value::Null).await, expected);
    }
}

#[tokio::test]
async fn troubles_in_the_middle_end_a_stream_with_an_error_event() {
    for (error, status, code, _, words) in troubles() {
        let server = Server::start(Script::saying(vec![step(0, "Par", None), Event::Failed(error)])).await;
        for (path, body) in [(CHAT, chat_body(json!({"stream": true}))), (TEXT, text_body(json!({"stream": true})))] {
            let response = server.post(path, &body).await;
            assert_eq!(response.status(), 200);
            let body = response.text().await.unwrap();
            let mut events = sent(&body);
            let last = events.pop().unwrap();
            assert_eq!(last.name.as_deref(), Some("error"));
            let error = fault(status, &last.data);
            assert_eq!(error["code"], code);
            assert!(error["message"].as_str().unwrap().contains(words));
            assert!(events.iter().any(|event| event.data.contains("Par")));
            assert!(!body.contains("[DONE]"));
        }
        let response = server.post(CHAT, &chat_body(json!({}))).await;
        refused(response, status, json!(code), Value::Null).await;
    }
}

#[tokio::test]
async fn a_service_that_falls_silent_is_an_error() {
    let server = Server::start(Script::saying(vec![step(0, "Par", None)])).await;
    let response = server.post(CHAT, &chat_body(json!({}))).await;
    refused(response, 500, json!("internal_error"), Value::Null).await;
    let body = server.post(CHAT, &chat_body(json!({"stream": true}))).await.text().await.unwrap();
    assert_eq!(sent(&body).last().unwrap().name.as_deref(), Some("error"));
    assert!(!body.contains("[DONE]"));
}
