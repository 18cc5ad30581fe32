//! Answers: their exact shapes, whole and streamed, and the agreement of the two.

use coel_model::text::sequence::FinishReason;
use reqwest::header::CONTENT_TYPE;
use serde_json::{Value, json};

use super::*;
use crate::service::Prompt;

/// Checks the fields that differ from run to run, and returns the reply without them.
fn settled(mut reply: Value, prefix: &str) -> Value {
    let fields = reply.as_object_mut().unwrap();
    let id = fields.remove("id").unwrap();
    assert_eq!(id.as_str().unwrap().strip_prefix(prefix).expect("the prefix").len(), 32);
    assert!(fields.remove("created").unwrap().as_u64().unwrap() > 1_700_000_000);
    assert!(fields.remove("system_fingerprint").unwrap().as_str().unwrap().starts_with("coel-"));
    reply
}

fn counts() -> Value {
    json!({
        "prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 18,
        "coel": {"rows_local": 40, "rows_remote": 24, "precisions": ["q8", "exact"], "other_classes": ["avx2/q8"]},
    })
}

#[tokio::test]
async fn a_chat_whole() {
    let server = Server::start(Script::default()).await;
    let response = server.post(CHAT, &chat_body(json!({}))).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()[CONTENT_TYPE], "application/json");
    let expected = json!({
        "object": "chat.completion",
        "model": "tiny",
        "choices": [{
            "index": 0,
            "message": {"role": "assistant", "content": "Parisé!", "refusal": null},
            "logprobs": null,
            "finish_reason": "stop",
        }],
        "usage": counts(),
    });
    assert_eq!(settled(json_of(response).await, "chatcmpl-"), expected);
    assert!(matches!(server.asked().prompt, Prompt::Chat(messages) if messages[0].content == "Capital of France?"));
}

#[tokio::test]
async fn a_completion_whole() {
    let server = Server::start(Script::default()).await;
    let response = server.post(TEXT, &text_body(json!({}))).await;
    assert_eq!(response.status(), 200);
    let expected = json!({
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"text": "Parisé!", "index": 0, "logprobs": null, "finish_reason": "stop"}],
        "usage": counts(),
    });
    assert_eq!(settled(json_of(response).await, "cmpl-"), expected);
}

#[tokio::test]
async fn an_answer_cut_short_says_length() {
    let length = Event::Finished { reason: FinishReason::Length, usage: usage() };
    let server = Server::start(Script::saying(vec![step(0, "Par", None), length])).await;
    for (path, body) in [(CHAT, chat_body(json!({}))), (TEXT, text_body(json!({})))] {
        assert_eq!(json_of(server.post(path, &body).await).await["choices"][0]["finish_reason"], "length");
        let body = merge(body, json!({"stream": true}));
        let all = chunks(&server.post(path, &body).await.text().await.unwrap());
        assert_eq!(all.last().unwrap()["choices"][0]["finish_reason"], "length");
    }
}

#[tokio::test]
async fn a_model_is_known_by_name_and_by_id_and_answers_to_the_one_asked() {
    let server = Server::start(Script::default()).await;
    let reply = json_of(server.post(CHAT, &chat_body(json!({"model": "5eed"}))).await).await;
    assert_eq!(reply["model"], "5eed");
    assert_eq!(server.asked().model, "5eed");
}

#[tokio::test]
async fn a_chat_streamed() {
    let server = Server::start(Script::default()).await;
    let response = server.post(CHAT, &chat_body(json!({"stream": true}))).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()[CONTENT_TYPE], "text/event-stream");
    let all = chunks(&response.text().await.unwrap());

    let ids: Vec<_> = all.iter().map(|chunk| chunk["id"].clone()).collect();
    assert!(ids.iter().all(|id| *id == ids[0]));
    let choice =
        |delta: Value, reason: Value| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason}]);
    let choices = [
        choice(json!({"role": "assistant", "content": ""}), Value::Null),
        choice(json!({"content": "Paris"}), Value::Null),
        choice(json!({"content": "é"}), Value::Null),
        choice(json!({"content": "!"}), Value::Null),
        choice(json!({}), json!("stop")),
    ];
    assert_eq!(all.len(), choices.len());
    for (chunk, choices) in all.into_iter().zip(choices) {
        let expected = json!({"object": "chat.completion.chunk", "model": "tiny", "choices": choices});
        assert_eq!(settled(chunk, "chatcmpl-"), expected);
    }
}

#[tokio::test]
async fn a_completion_streamed() {
    let server = Server::start(Script::default()).await;
    let all = chunks(&server.post(TEXT, &text_body(json!({"stream": true}))).await.text().await.unwrap());
    let pieces = [("Paris", Value::Null), ("é", Value::Null), ("!", Value::Null), ("", json!("stop"))];
    assert_eq!(all.len(), pieces.len());
    for (chunk, (text, reason)) in all.into_iter().zip(pieces) {
        let choices = json!([{"text": text, "index": 0, "logprobs": null, "finish_reason": reason}]);
        let expected = json!({"object": "text_completion", "model": "tiny", "choices": choices});
        assert_eq!(settled(chunk, "cmpl-"), expected);
    }
}

#[tokio::test]
async fn usage_ends_a_stream_where_asked_for() {
    let server = Server::start(Script::default()).await;
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    for (path, body) in [(CHAT, chat_body(options.clone())), (TEXT, text_body(options))] {
        let mut all = chunks(&server.post(path, &body).await.text().await.unwrap());
        let last = all.pop().unwrap();
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"], counts());
        assert!(all.iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)));
    }
}

/// The text of a stream, joined as in its whole reply, and the log-probabilities of its chunks.
fn joined(all: &[Value], text: impl Fn(&Value) -> &Value) -> (String, Vec<Value>) {
    let choices = all.iter().map(|chunk| &chunk["choices"][0]);
    let said = choices.clone().filter_map(|choice| text(choice).as_str()).collect();
    (said, choices.map(|choice| choice["logprobs"].clone()).filter(|listed| !listed.is_null()).collect())
}

#[tokio::test]
async fn logprobs_of_a_chat() {
    let server = Server::start(Script::saying(paris(Some(2)))).await;
    let fields = json!({"logprobs": true, "top_logprobs": 2});
    let whole = json_of(server.post(CHAT, &chat_body(fields.clone())).await).await;
    let listed = &whole["choices"][0]["logprobs"];
    assert_eq!(listed["refusal"], Value::Null);
    // One entry for each token but the end of the text.
    assert_eq!(listed["content"].as_array().unwrap().len(), 5);
    let exclamation = json!({"token": "!", "logprob": -1.5, "bytes": [33]});
    assert_eq!(
        listed["content"][0],
        json!({
            "token": "Par", "logprob": -0.25, "bytes": [80, 97, 114],
            "top_logprobs": [{"token": "Par", "logprob": -0.25, "bytes": [80, 97, 114]}, exclamation],
        })
    );
    // Half a character is shown as its byte.
    assert_eq!(listed["content"][2]["token"], "\\xc3");
    assert_eq!(listed["content"][2]["bytes"], json!([195]));

    let body = chat_body(merge(fields, json!({"stream": true})));
    let all = chunks(&server.post(CHAT, &body).await.text().await.unwrap());
    let (said, parts) = joined(&all, |choice| &choice["delta"]["content"]);
    assert_eq!(said, whole["choices"][0]["message"]["content"]);
    let tokens: Vec<_> = parts.iter().flat_map(|part| part["content"].as_array().unwrap().clone()).collect();
    assert_eq!(Value::from(tokens), listed["content"]);
}

#[tokio::test]
async fn logprobs_of_a_completion() {
    let server = Server::start(Script::saying(paris(Some(3)))).await;
    let whole = json_of(server.post(TEXT, &text_body(json!({"logprobs": 3}))).await).await;
    let listed = &whole["choices"][0]["logprobs"];
    assert_eq!(listed["tokens"], json!(["Par", "is", "bytes:\\xc3", "bytes:\\xa9", "!"]));
    assert_eq!(listed["token_logprobs"], json!([-0.25, -0.25, -0.25, -0.25, -0.25]));
    // Offsets count characters: "é" is one, though it takes two tokens.
    assert_eq!(listed["text_offset"], json!([0, 3, 5, 6, 6]));
    assert_eq!(listed["top_logprobs"][0], json!({"Par": -0.25, "!": -1.5, "is": -9999.0}));

    let body = text_body(json!({"logprobs": 3, "stream": true}));
    let all = chunks(&server.post(TEXT, &body).await.text().await.unwrap());
    let (said, parts) = joined(&all, |choice| &choice["text"]);
    assert_eq!(said, whole["choices"][0]["text"]);
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let list: Vec<_> = parts.iter().flat_map(|part| part[name].as_array().unwrap().clone()).collect();
        assert_eq!(Value::from(list), listed[name], "{name}");
    }
}

#[tokio::test]
async fn the_chosen_token_is_listed_even_without_alternatives() {
    let server = Server::start(Script::saying(paris(Some(0)))).await;
    let whole = json_of(server.post(TEXT, &text_body(json!({"logprobs": 0}))).await).await;
    assert_eq!(whole["choices"][0]["logprobs"]["top_logprobs"][0], json!({"Par": -0.25}));
    let whole = json_of(server.post(CHAT, &chat_body(json!({"logprobs": true}))).await).await;
    assert_eq!(whole["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[tokio::test]
async fn an_empty_answer_is_an_answer() {
    let end = Event::Finished { reason: FinishReason::Stop, usage: usage() };
    let server = Server::start(Script::saying(vec![step(END, "", Some(1)), end])).await;
    let whole = json_of(server.post(CHAT, &chat_body(json!({"logprobs": true}))).await).await;
    assert_eq!(whole["choices"][0]["message"]["content"], "");
    assert_eq!(whole["choices"][0]["logprobs"], json!({"content": [], "refusal": null}));
    let all = chunks(&server.post(CHAT, &chat_body(json!({"stream": true}))).await.text().await.unwrap());
    assert_eq!(all.len(), 2);
}
