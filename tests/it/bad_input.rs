//! Bad input, case by case: the message names the fault and the remedy, and the exit code tells wrong usage from
//! failure.

use std::fs::OpenOptions;

use serde_json::json;

use crate::support::{Copy, MODEL, coel, fixture, post, testnet, turn};

async fn generate(copy: &Copy) -> crate::support::Ended {
    coel(["generate", "--model", copy.dir().to_str().unwrap(), "--max-tokens", "1", "Hello"]).await
}

/// A tensor of an arbitrary expert.
const TENSOR: &str = "model.layers.3.mlp.experts.7.up_proj.weight";

#[tokio::test]
async fn spoilt_checkpoints_are_refused_by_name() {
    let _turn = turn().await;
    let copy = Copy::new();
    let whole = generate(&copy).await;
    assert_eq!(whole.code, Some(0), "{whole:#?}");

    let length = copy.weights().metadata().unwrap().len();
    OpenOptions::new().write(true).open(copy.weights()).unwrap().set_len(length - 1000).unwrap();
    generate(&copy).await.refused(1, &["model.safetensors", "truncated"]);

    // A missing tensor: the last one of the file, so that it leaves no gap.
    let copy = Copy::new();
    let mut gone = String::new();
    copy.edit_weights(|header, data| {
        let start = |entry: &serde_json::Value| entry["data_offsets"][0].as_u64().unwrap_or(0);
        gone = header.iter().max_by_key(|(_, entry)| start(entry)).unwrap().0.clone();
        data.truncate(start(&header[&gone]) as usize);
        header.remove(&gone);
    });
    generate(&copy).await.refused(1, &["missing", &gone]);

    // An extra tensor.
    let copy = Copy::new();
    copy.edit_weights(|header, data| {
        let end = data.len();
        data.extend([0; 4]);
        header
            .insert("model.extra.weight".into(), json!({"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}));
    });
    generate(&copy).await.refused(1, &["model.extra.weight"]);

    // A tensor of another shape.
    let copy = Copy::new();
    copy.edit_weights(|header, _| {
        let shape = header[TENSOR]["shape"].as_array_mut().unwrap();
        shape.reverse();
    });
    generate(&copy).await.refused(1, &[TENSOR, "96", "256"]);

    // A NaN weight: loading does not scan the weights, but no token is sampled from logits that are not finite.
    let spoilt = Copy::new();
    spoilt.edit_weights(|header, data| {
        let at = header["model.norm.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
        data[at..][..2].copy_from_slice(&[0xc0, 0x7f]);
    });
    generate(&spoilt).await.refused(1, &["no finite numbers", "coel model slice"]);

    // Import refuses the checkpoint that generate refuses, before the mesh learns of it.
    let mesh = crate::support::lone_node().await;
    let data = mesh.nodes()[0].data();
    let import = crate::support::coel_at(&data, ["model", "import", copy.dir().to_str().unwrap()]).await;
    import.refused(1, &[TENSOR]);
    assert!(!crate::support::coel_at(&data, ["model", "ls"]).await.printed().contains(MODEL));
}

#[tokio::test]
async fn models_that_cannot_be_run_are_refused_by_name() {
    let _turn = turn().await;
    let copy = Copy::new();
    copy.edit("config.json", |config| config["architectures"] = json!(["LlamaForCausalLM"]));
    generate(&copy).await.refused(1, &["LlamaForCausalLM", "Qwen2MoeForCausalLM"]);

    let copy = Copy::new();
    copy.edit("tokenizer.json", |tokenizer| {
        let token = json!({"id": 5000, "content": "<|beyond|>", "single_word": false, "lstrip": false,
                           "rstrip": false, "normalized": false, "special": true});
        tokenizer["added_tokens"].as_array_mut().unwrap().push(token);
    });
    generate(&copy).await.refused(1, &["tokenizer", "4096"]);

    let copy = Copy::new();
    std::fs::remove_file(copy.dir().join("config.json")).unwrap();
    generate(&copy).await.refused(1, &["config.json"]);
    coel(["generate", "--model", "/nowhere", "Hello"]).await.refused(1, &["/nowhere"]);
}

#[tokio::test]
async fn a_prompt_longer_than_the_context_is_refused_with_both_numbers() {
    let _turn = turn().await;
    let prompt = "word ".repeat(3000);
    let refused = coel(["generate", "--model", fixture().to_str().unwrap(), &prompt]).await;
    refused.refused(1, &["2048", "shorten the prompt"]);
    let empty = coel(["eval", "--model", fixture().to_str().unwrap()]).await;
    empty.refused(2, &["--reference", "--text", "--qa"]);
}

#[tokio::test]
async fn budgets_that_cannot_cover_the_model_are_refused_with_the_missing_bytes() {
    let _turn = turn().await;
    let refused = testnet(["--once", "--budget", "30", "--precision", "exact"]).await;
    refused.refused(1, &["bytes are missing", "--memory"]);
}

#[tokio::test]
async fn a_flipped_bit_is_found_and_named() {
    let _turn = turn().await;
    testnet(["--once", "--fault", "flip-bit"]).await.refused(1, &["expert 5.23"]);
}

#[tokio::test]
async fn a_missing_expert_is_named() {
    let _turn = turn().await;
    testnet(["--once", "--fault", "missing-expert"]).await.refused(1, &["expert 5.23"]);
}

/// Over HTTP, on a serving mesh: each fault has its status, its code and the field at fault.
pub async fn http_is_refused(api: &str) {
    let chat = format!("{api}/v1/chat/completions");
    let message = json!([{"role": "user", "content": "Hello"}]);
    let long = "word ".repeat(3000);
    let cases = [
        (json!({"model": "gpt-9", "messages": message}), 404, "model", MODEL),
        (json!({"model": MODEL, "messages": []}), 400, "messages", "at least one"),
        (json!({"model": MODEL, "messages": message, "temperature": 7}), 400, "temperature", "from 0 to 2"),
        (json!({"model": MODEL, "messages": message, "top_p": -1}), 400, "top_p", "from 0 to 1"),
        (json!({"model": MODEL, "messages": message, "max_tokens": 0}), 400, "max_tokens", "from 1"),
        (json!({"model": MODEL, "messages": message, "temprature": 1}), 400, "temprature", "spelling"),
        (json!({"model": MODEL, "messages": [{"role": "user", "content": long}]}), 400, "messages", "2048"),
    ];
    for (body, status, param, named) in cases {
        let (found, reply) = post(&chat, body.to_string()).await;
        let message = reply["error"]["message"].as_str().unwrap_or_default();
        assert!(found == status && message.contains(named), "{body:.200}: {found} {reply}");
        assert_eq!(reply["error"]["param"], param, "{reply}");
    }
    let (status, reply) = post(&chat, "{\"model\": ").await;
    assert!(status == 400 && reply["error"]["message"].as_str().unwrap().contains("not valid JSON"), "{reply}");
    // The node still serves.
    let body = json!({"model": MODEL, "messages": message, "temperature": 0, "max_tokens": 4});
    assert_eq!(post(&chat, body.to_string()).await.0, 200);
}
