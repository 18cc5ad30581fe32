//! Every field of a request: the request that reaches the service, or the error that the client gets.

use coel_model::text::chat::Message;
use coel_model::text::sampling::SamplingParams;
use coel_model::text::sequence::GenerateParams;
use serde_json::{Value, json};

use super::{chat_body, text_body};
use crate::http::openai::{self, Asked};
use crate::service::Prompt;

const SEED: u64 = 77;

fn chat(more: Value) -> Asked {
    openai::chat(chat_body(more).to_string().as_bytes(), SEED).unwrap()
}

fn text(more: Value) -> Asked {
    openai::completion(text_body(more).to_string().as_bytes(), SEED).unwrap()
}

fn messages(list: Value) -> Vec<Message> {
    match chat(json!({ "messages": list })).generate.prompt {
        Prompt::Chat(messages) => messages,
        other => panic!("{other:?}"),
    }
}

/// Checks that `more` is refused with an error that names `param` and whose message holds all `words`.
#[track_caller]
fn refused(more: Value, param: &str, words: &[&str]) {
    let body = more.to_string();
    check_refused(openai::chat(chat_body(more).to_string().as_bytes(), SEED), &body, param, words);
}

#[track_caller]
fn refused_text(more: Value, param: &str, words: &[&str]) {
    let body = more.to_string();
    check_refused(openai::completion(text_body(more).to_string().as_bytes(), SEED), &body, param, words);
}

#[track_caller]
fn check_refused(result: Result<Asked, crate::http::ApiError>, body: &str, param: &str, words: &[&str]) {
    let error = result.expect_err(body);
    assert_eq!(error.status, 400, "{body}");
    assert_eq!(error.param.as_deref(), Some(param), "{body}: {}", error.message);
    for word in words.iter().chain([&param]) {
        assert!(error.message.contains(word), "{body}: `{word}` is not in: {}", error.message);
    }
}

#[test]
fn a_bare_chat_has_openais_defaults() {
    let asked = chat(json!({}));
    assert_eq!(asked.generate.model, "tiny");
    let sampling = SamplingParams { seed: SEED, ..SamplingParams::default() };
    assert_eq!(asked.generate.params, GenerateParams { sampling, ..GenerateParams::default() });
    assert_eq!(asked.generate.params.sampling.temperature, 1.0);
    assert_eq!(asked.generate.params.max_tokens, None);
    assert!(!asked.stream && !asked.include_usage);
}

#[test]
fn a_bare_completion_is_short() {
    let asked = text(json!({}));
    assert_eq!(asked.generate.params.max_tokens, Some(16));
    assert!(matches!(asked.generate.prompt, Prompt::Text(text) if text == "The capital of France is"));
}

#[test]
fn every_sampling_field_arrives() {
    let fields = json!({
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.25,
        "seed": 5, "max_tokens": 7, "stop": ["a", "b"], "stream": true,
        "stream_options": {"include_usage": true, "include_obfuscation": false},
    });
    let sampling =
        SamplingParams { temperature: 0.5, top_p: 0.9, top_k: 40, min_p: 0.05, repetition_penalty: 1.25, seed: 5 };
    let expected = GenerateParams {
        max_tokens: Some(7),
        sampling,
        stop: vec!["a".into(), "b".into()],
        logprobs: None,
        ignore_eos: false,
    };
    for asked in [chat(fields.clone()), text(fields)] {
        assert_eq!(asked.generate.params, expected);
        assert!(asked.stream && asked.include_usage);
    }
}

#[test]
fn the_edges_of_every_range_are_inside() {
    for (name, edges) in [
        ("temperature", json!([0, 2, 2.0])),
        ("top_p", json!([0, 1])),
        ("top_k", json!([-1, 0, 1, 4294967295u32])),
        ("min_p", json!([0, 1])),
        ("repetition_penalty", json!([0.01, 10])),
        ("max_tokens", json!([1, 4294967295u32])),
        ("seed", json!([0, -1, i64::MIN, u64::MAX])),
    ] {
        for edge in edges.as_array().unwrap() {
            let asked = chat(json!({ name: edge }));
            asked.generate.params.validate().unwrap();
            text(json!({ name: edge }));
        }
    }
    assert_eq!(chat(json!({"top_k": -1})).generate.params.sampling.top_k, 0);
    assert_eq!(chat(json!({"seed": -1})).generate.params.sampling.seed, u64::MAX);
}

#[test]
fn a_field_out_of_range_is_named_with_value_and_range() {
    for (name, value, range) in [
        ("temperature", json!(2.01), "from 0 to 2"),
        ("temperature", json!(-0.1), "from 0 to 2"),
        ("top_p", json!(1.5), "from 0 to 1"),
        ("top_k", json!(-2), "from -1"),
        ("top_k", json!(1.5), "whole number"),
        ("min_p", json!(-1), "from 0 to 1"),
        ("repetition_penalty", json!(0), "above 0"),
        ("repetition_penalty", json!(10.5), "at most 10"),
        ("max_tokens", json!(0), "from 1"),
        ("max_tokens", json!(-5), "from 1"),
        ("max_tokens", json!(u64::MAX), "from 1"),
        ("seed", json!(0.5), "whole number"),
    ] {
        let shown = value.to_string();
        refused(json!({ name: value }), name, &[&shown, range]);
        refused_text(json!({ name: value }), name, &[&shown, range]);
    }
    refused(json!({"max_completion_tokens": 0}), "max_completion_tokens", &["0", "from 1"]);
}

#[test]
fn a_field_of_another_type_is_named_with_both_types() {
    for (name, value, words) in [
        ("temperature", json!("warm"), ["a number", "a string"]),
        ("top_k", json!([1]), ["a whole number", "an array"]),
        ("max_tokens", json!("10"), ["a whole number", "a string"]),
        ("seed", json!("x"), ["a whole number", "a string"]),
        ("stop", json!(5), ["a string", "a number"]),
        ("stop", json!(["a", 5]), ["a string", "a number"]),
        ("stream", json!("yes"), ["true or false", "a string"]),
        ("stream_options", json!(true), ["an object", "a boolean"]),
        ("model", json!(3), ["a string", "a number"]),
    ] {
        refused(json!({ name: value }), name, &words);
        refused_text(json!({ name: value }), name, &words);
    }
    refused(json!({"stream_options": {"include_usage": 1}}), "stream_options.include_usage", &["a number"]);
    refused(json!({"messages": "Hello"}), "messages", &["an array", "a string"]);
}

#[test]
fn stop_is_one_string_or_up_to_four() {
    assert_eq!(chat(json!({"stop": "\n"})).generate.params.stop, ["\n"]);
    assert_eq!(chat(json!({"stop": ["a", "b", "c", "d"]})).generate.params.stop.len(), 4);
    assert!(chat(json!({"stop": []})).generate.params.stop.is_empty());
    refused(json!({"stop": ["a", "b", "c", "d", "e"]}), "stop", &["array of 5", "at most 4"]);
    refused(json!({"stop": [""]}), "stop", &["0 bytes", "1 to 1024"]);
    refused(json!({"stop": "x".repeat(1025)}), "stop", &["1025 bytes", "1 to 1024"]);
}

#[test]
fn both_names_of_the_token_limit_are_understood() {
    assert_eq!(chat(json!({"max_completion_tokens": 9})).generate.params.max_tokens, Some(9));
    assert_eq!(chat(json!({"max_completion_tokens": 9, "max_tokens": 9})).generate.params.max_tokens, Some(9));
    refused(json!({"max_completion_tokens": 9, "max_tokens": 8}), "max_completion_tokens", &["9", "`max_tokens`", "8"]);
    refused_text(json!({"max_completion_tokens": 9}), "max_completion_tokens", &["not a field"]);
}

#[test]
fn logprobs_of_a_chat() {
    assert_eq!(chat(json!({"logprobs": false})).generate.params.logprobs, None);
    assert_eq!(chat(json!({"logprobs": true})).generate.params.logprobs, Some(0));
    assert_eq!(chat(json!({"logprobs": true, "top_logprobs": 20})).generate.params.logprobs, Some(20));
    assert_eq!(chat(json!({"logprobs": false, "top_logprobs": 0})).generate.params.logprobs, None);
    refused(json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", &["21", "from 0 to 20"]);
    refused(json!({"top_logprobs": 3}), "top_logprobs", &["3", "`logprobs`"]);
    refused(json!({"logprobs": 3}), "logprobs", &["true or false", "a number"]);
}

#[test]
fn logprobs_of_a_completion() {
    assert_eq!(text(json!({"logprobs": 0})).generate.params.logprobs, Some(0));
    assert_eq!(text(json!({"logprobs": 5})).generate.params.logprobs, Some(5));
    refused_text(json!({"logprobs": 6}), "logprobs", &["6", "from 0 to 5"]);
    refused_text(json!({"logprobs": true}), "logprobs", &["a whole number", "a boolean"]);
}

#[test]
fn what_is_not_done_is_refused_by_name() {
    for (name, value) in [
        ("n", json!(2)),
        ("frequency_penalty", json!(0.5)),
        ("presence_penalty", json!(-0.5)),
        ("logit_bias", json!({"50256": -100})),
    ] {
        refused(json!({ name: value }), name, &["not supported", &value.to_string()]);
        refused_text(json!({ name: value }), name, &["not supported", &value.to_string()]);
    }
    for (name, value) in [
        ("tools", json!([{"type": "function", "function": {"name": "f"}}])),
        ("functions", json!([{"name": "f"}])),
        ("tool_choice", json!("required")),
        ("function_call", json!({"name": "f"})),
        ("response_format", json!({"type": "json_object"})),
        ("modalities", json!(["text", "audio"])),
        ("audio", json!({"voice": "alloy"})),
        ("prediction", json!({"type": "content", "content": "x"})),
        ("reasoning_effort", json!("high")),
        ("verbosity", json!("low")),
        ("web_search_options", json!({})),
    ] {
        refused(json!({ name: value }), name, &["not supported"]);
    }
    for (name, value) in [("echo", json!(true)), ("best_of", json!(2)), ("suffix", json!("end"))] {
        refused_text(json!({ name: value }), name, &["not supported"]);
    }
}

#[test]
fn what_asks_for_nothing_is_accepted() {
    chat(json!({
        "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
        "user": "someone", "metadata": {"a": "b"}, "store": false, "service_tier": "auto",
        "safety_identifier": "x", "prompt_cache_key": "y", "parallel_tool_calls": true,
    }));
    text(json!({"echo": false, "best_of": 1, "suffix": "", "user": "someone", "n": 1}));
    // A null counts as an absent field, known or not.
    let nulls = r#"{"model": "tiny", "messages": [{"role": "user", "content": "Hi", "name": null}], "tools": null,
        "temperature": null, "stop": null, "seed": null, "stream_options": null, "logprobs": null, "later": null}"#;
    openai::chat(nulls.as_bytes(), SEED).unwrap();
}

#[test]
fn a_misspelt_field_is_refused() {
    refused(json!({"temprature": 0}), "temprature", &["spelling"]);
    refused_text(json!({"messages": []}), "messages", &["not a field"]);
    refused(json!({"messages": [{"role": "user", "content": "x", "colour": 1}]}), "messages[0].colour", &[]);
}

#[test]
fn roles_and_contents_arrive() {
    let list = messages(json!([
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}], "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [], "refusal": null},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
    ]));
    let expected =
        [("system", "Be brief."), ("system", "Be kind."), ("user", "Hi there"), ("assistant", ""), ("tool", "42")];
    assert_eq!(list, expected.map(|(role, content)| Message::new(role, content)));
}

#[test]
fn bad_messages_are_refused_where_they_are() {
    let one = |message: Value| json!({ "messages": [{"role": "user", "content": "x"}, message] });
    refused(json!({"messages": []}), "messages", &["empty", "at least one"]);
    refused(json!({"messages": null}), "messages", &["required"]);
    refused(json!({"messages": ["Hi"]}), "messages[0]", &["an object", "a string"]);
    refused(one(json!({"content": "x"})), "messages[1].role", &["required"]);
    refused(one(json!({"role": "robot", "content": "x"})), "messages[1].role", &["robot", "assistant"]);
    refused(one(json!({"role": "user"})), "messages[1].content", &["required"]);
    refused(one(json!({"role": "user", "content": 5})), "messages[1].content", &["a number"]);
    refused(one(json!({"role": "user", "content": []})), "messages[1].content", &["empty array"]);
    refused(one(json!({"role": "user", "content": ["x"]})), "messages[1].content[0]", &["an object"]);
    refused(one(json!({"role": "user", "content": [{"type": "text"}]})), "messages[1].content[0].text", &[]);
    let image = json!({"type": "image_url", "image_url": {"url": "data:"}});
    refused(
        one(json!({"role": "user", "content": [image]})),
        "messages[1].content[0].type",
        &["image_url", "text only"],
    );
    let calls = json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]);
    refused(
        one(json!({"role": "assistant", "content": "x", "tool_calls": calls})),
        "messages[1].tool_calls",
        &["not supported"],
    );
}

#[test]
fn a_model_must_be_named() {
    refused(json!({"model": null}), "model", &["required", "/v1/models"]);
    refused_text(json!({"model": ""}), "model", &["required"]);
}

#[test]
fn prompts_are_text_or_tokens_and_one() {
    let prompt = |value| text(json!({ "prompt": value })).generate.prompt;
    assert!(matches!(prompt(json!("a")), Prompt::Text(text) if text == "a"));
    assert!(matches!(prompt(json!(["a"])), Prompt::Text(text) if text == "a"));
    assert!(matches!(prompt(json!([1, 2, 3])), Prompt::Tokens(ids) if ids == [1, 2, 3]));
    assert!(matches!(prompt(json!([[1, 2]])), Prompt::Tokens(ids) if ids == [1, 2]));
    refused_text(json!({"prompt": null}), "prompt", &["required"]);
    refused_text(json!({"prompt": ["a", "b"]}), "prompt", &["2 prompts", "one by one"]);
    refused_text(json!({"prompt": [[1], [2]]}), "prompt", &["2 prompts"]);
    refused_text(json!({"prompt": []}), "prompt", &["empty array"]);
    refused_text(json!({"prompt": [[]]}), "prompt[0]", &["[]"]);
    refused_text(json!({"prompt": [1, -2]}), "prompt[1]", &["-2", "token id"]);
    refused_text(json!({"prompt": [1, "a"]}), "prompt[1]", &["\"a\"", "token id"]);
    refused_text(json!({"prompt": [4294967296u64]}), "prompt[0]", &["4294967296", "token id"]);
    refused_text(json!({"prompt": {"text": "a"}}), "prompt", &["an object"]);
}

#[test]
fn what_is_no_json_object_is_refused_with_its_position() {
    let refused = |body: &[u8]| openai::chat(body, SEED).unwrap_err().message;
    assert!(refused(b"{\"model\": \"tiny\",\n \"messages\": [}").contains("line 2 column 15"));
    assert!(refused(b"").contains("line 1 column 0"));
    assert!(refused(b"{\"model\": \"\xff\"}").contains("line 1"));
    assert!(refused(b"[1]").contains("an array"));
    assert!(refused("[".repeat(100_000).as_bytes()).contains("recursion"));
    assert!(refused(br#"{"temperature": 1e999}"#).contains("number out of range"));
}

#[test]
fn long_values_are_quoted_in_part() {
    let error = openai::chat(chat_body(json!({"n": "x".repeat(100_000)})).to_string().as_bytes(), SEED);
    assert!(error.unwrap_err().message.len() < 300);
    let error = openai::chat(chat_body(json!({"é".repeat(100_000): 1})).to_string().as_bytes(), SEED);
    assert!(error.unwrap_err().message.len() < 600);
    let error = chat_body(json!({"messages": [{"role": "é".repeat(100_000), "content": ""}]})).to_string();
    assert!(openai::chat(error.as_bytes(), SEED).unwrap_err().message.len() < 600);
}
