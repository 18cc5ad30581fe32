//! `coel chat`: the mesh's OpenAI endpoint from the terminal, streaming.

use std::io::{BufRead, IsTerminal, Write};

use futures::StreamExt;
use serde_json::{Value, json};

use super::Failure;
use crate::config::DataArgs;
use crate::control::{ControlError, NodeFile, Request, ask};
use crate::status::Status;

/// How to answer.
pub struct Options {
    /// 0: always the likeliest token.
    pub temperature: f32,
    /// Longest answer, in tokens.
    pub max_tokens: Option<usize>,
    /// The node's API key.
    pub api_key: Option<String>,
}

/// Answers `prompt`, or each line of stdin with the conversation so far.
pub async fn chat(data: DataArgs, prompt: Option<String>, options: Options) -> Result<(), Failure> {
    let node = NodeFile::read(&data.data).ok_or_else(|| ControlError::NotRunning(data.data.clone()))?;
    let status: Status = ask(&data.data, &Request::Status, |_, _, _| ()).await?;
    let model = status.model.or_else(|| status.models.first().cloned());
    let model = model.ok_or_else(|| Failure {
        message: "no model is registered in this mesh; import one with `coel model import DIR`".into(),
        code: 1,
    })?;
    let model = model.id;
    let mut turns = Vec::new();
    if let Some(prompt) = prompt {
        say(&node.api, &model, &mut turns, prompt, &options).await?;
        return Ok(());
    }
    let stdin = std::io::stdin();
    let asks = stdin.is_terminal();
    loop {
        if asks {
            eprint!("> ");
        }
        let mut line = String::new();
        if stdin.lock().read_line(&mut line)? == 0 {
            return Ok(());
        }
        let line = line.trim();
        if !line.is_empty() {
            say(&node.api, &model, &mut turns, line.to_owned(), &options).await?;
        }
    }
}

async fn say(api: &str, model: &str, turns: &mut Vec<Value>, line: String, options: &Options) -> Result<(), Failure> {
    turns.push(json!({ "role": "user", "content": line }));
    let mut body = json!({ "model": model, "messages": turns, "stream": true, "temperature": options.temperature });
    if let Some(max_tokens) = options.max_tokens {
        body["max_tokens"] = max_tokens.into();
    }
    let mut request = reqwest::Client::new().post(format!("{api}/v1/chat/completions")).json(&body);
    if let Some(key) = &options.api_key {
        request = request.bearer_auth(key);
    }
    let response = request.send().await?;
    if !response.status().is_success() {
        let fault: Value = response.json().await?;
        return Err(failure(&fault));
    }
    let mut answer = String::new();
    let mut pending = Vec::new();
    let mut chunks = response.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        pending.extend_from_slice(&chunk?);
        while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            let Some(data) = std::str::from_utf8(&line).ok().and_then(|line| line.trim().strip_prefix("data: ")) else {
                continue;
            };
            if data == "[DONE]" {
                writeln!(std::io::stdout())?;
                turns.push(json!({ "role": "assistant", "content": answer }));
                return Ok(());
            }
            let event: Value = serde_json::from_str(data)?;
            if event.get("error").is_some() {
                writeln!(std::io::stdout())?;
                return Err(failure(&event));
            }
            if let Some(text) = event["choices"][0]["delta"]["content"].as_str() {
                write!(std::io::stdout(), "{text}")?;
                std::io::stdout().flush()?;
                answer.push_str(text);
            }
        }
    }
    Err(Failure { message: "the answer broke off; is the node still running?".into(), code: 1 })
}

fn failure(body: &Value) -> Failure {
    let message = body["error"]["message"].as_str().unwrap_or("the node answered with an error that has no message");
    Failure { message: message.to_owned(), code: 1 }
}
