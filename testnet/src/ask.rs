//! Asking a node over its OpenAI endpoint, as any client would.
//!
//! Owns the streamed request and the reading of server-sent events. The invariant: an answer is returned only if the
//! stream ended as the protocol says (`[DONE]`), so a connection that broke off never passes for an answer. It knows no
//! node, only a URL.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Hang guard of a whole answer. Killing any node must end a request well before.
const ANSWER_LIMIT: Duration = Duration::from_secs(180);

/// A finished answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Why it ended, in OpenAI's words.
    pub finish_reason: Option<String>,
    /// The model's logged choices, where `logprobs` was asked for: one text per token.
    pub tokens: Vec<String>,
    /// The last `usage` of the stream.
    pub usage: Value,
    /// Tokens after the first, per second since the first; 0 for an answer of one token.
    pub tokens_per_s: f64,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The node refused the request.
    #[error("HTTP {status}: {message}")]
    Refused { status: u16, code: Option<String>, message: String },
    /// The node began and then reported a fault.
    #[error("the answer ended with an error: {message}")]
    Failed { code: Option<String>, message: String, so_far: String },
    /// The connection did not last.
    #[error("the connection to {url} failed: {reason}")]
    Broken { url: String, reason: String },
}

/// Asks a chat question of one turn at temperature 0; `on_text` sees the pieces as they arrive.
///
/// # Errors
/// [`AskError`].
pub async fn chat(api: &str, model: &str, question: &str, on_text: impl FnMut(&str)) -> Result<Answer, AskError> {
    let body = json!({"model": model, "temperature": 0, "messages": [{"role": "user", "content": question}]});
    stream(&format!("{api}/v1/chat/completions"), body, on_text).await
}

/// Sends `body` with streaming switched on to a completions endpoint.
///
/// # Errors
/// [`AskError`].
pub async fn stream(url: &str, body: Value, on_text: impl FnMut(&str)) -> Result<Answer, AskError> {
    let limit = tokio::time::timeout(ANSWER_LIMIT, stream_unguarded(url, body, on_text));
    let overdue = || broken(url, &format!("no end of the answer within {} s", ANSWER_LIMIT.as_secs()));
    limit.await.unwrap_or_else(|_| Err(overdue()))
}

fn broken(url: &str, reason: &dyn std::fmt::Display) -> AskError {
    AskError::Broken { url: url.to_owned(), reason: reason.to_string() }
}

async fn stream_unguarded(url: &str, mut body: Value, mut on_text: impl FnMut(&str)) -> Result<Answer, AskError> {
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    // The node is on this machine, whatever the environment says of proxies.
    let client = reqwest::Client::builder().no_proxy().build().map_err(|error| broken(url, &describe(&error)))?;
    let request = client.post(url).json(&body).send();
    let mut response = request.await.map_err(|error| broken(url, &describe(&error)))?;
    if !response.status().is_success() {
        let status = response.status().as_u16();
        let text = response.text().await.map_err(|error| broken(url, &describe(&error)))?;
        let (code, message) = fault(&serde_json::from_str(&text).unwrap_or_default());
        return Err(AskError::Refused { status, code, message: message.unwrap_or(text) });
    }
    let mut reading = Reading::default();
    while let Some(bytes) = response.chunk().await.map_err(|error| broken(url, &describe(&error)))? {
        reading.push(&bytes, &mut on_text)?;
    }
    if reading.done { Ok(reading.end()) } else { Err(broken(url, &"the stream ended before [DONE]")) }
}

/// reqwest names the request in its message and hides the cause; this is the innermost cause.
fn describe(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// `(code, message)` of an error in OpenAI's shape.
fn fault(body: &Value) -> (Option<String>, Option<String>) {
    let text = |name: &str| body["error"][name].as_str().map(str::to_owned);
    (text("code"), text("message"))
}

/// A stream of server-sent events, read so far.
#[derive(Debug, Default)]
struct Reading {
    partial: Vec<u8>,
    answer: Answer,
    first: Option<Instant>,
    last: Option<Instant>,
    done: bool,
}

impl Reading {
    fn push(&mut self, bytes: &[u8], on_text: &mut impl FnMut(&str)) -> Result<(), AskError> {
        self.partial.extend_from_slice(bytes);
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            match line.trim_end().strip_prefix("data:").map(str::trim) {
                None => {}
                Some("[DONE]") => self.done = true,
                Some(data) => self.event(&serde_json::from_str(data).unwrap_or_default(), on_text)?,
            }
        }
        Ok(())
    }

    fn event(&mut self, event: &Value, on_text: &mut impl FnMut(&str)) -> Result<(), AskError> {
        if let (code, Some(message)) = fault(event) {
            return Err(AskError::Failed { code, message, so_far: self.answer.text.clone() });
        }
        if event["usage"].is_object() {
            self.answer.usage = event["usage"].clone();
        }
        let choice = &event["choices"][0];
        let text = choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.answer.finish_reason = Some(reason.to_owned());
        }
        let logged = choice["logprobs"]["content"].as_array().into_iter().flatten();
        self.answer.tokens.extend(logged.filter_map(|token| token["token"].as_str().map(str::to_owned)));
        let logged = choice["logprobs"]["tokens"].as_array().into_iter().flatten();
        self.answer.tokens.extend(logged.filter_map(|token| token.as_str().map(str::to_owned)));
        if !text.is_empty() || choice["finish_reason"].is_string() {
            let now = Instant::now();
            self.first.get_or_insert(now);
            self.last = Some(now);
        }
        if !text.is_empty() {
            self.answer.text.push_str(text);
            on_text(text);
        }
        Ok(())
    }

    fn end(mut self) -> Answer {
        if let (Some(first), Some(last), Some(tokens)) =
            (self.first, self.last, self.answer.usage["completion_tokens"].as_u64())
            && tokens > 1
            && last > first
        {
            self.answer.tokens_per_s = (tokens - 1) as f64 / (last - first).as_secs_f64();
        }
        self.answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: &[&str]) -> Result<(Answer, bool), AskError> {
        let mut reading = Reading::default();
        for piece in pieces {
            reading.push(piece.as_bytes(), &mut |_| ())?;
        }
        let done = reading.done;
        Ok((reading.end(), done))
    }

    #[test]
    fn events_may_be_cut_anywhere() {
        let whole = concat!(
            "data: {\"choices\": [{\"delta\": {\"role\": \"assistant\", \"content\": \"\"}, \"finish_reason\": null}]}\n\n",
            ": a comment\n\n",
            "data: {\"choices\": [{\"delta\": {\"content\": \"Par\"}}]}\n\n",
            "data: {\"choices\": [{\"delta\": {\"content\": \"is\"}}]}\n\n",
            "data: {\"choices\": [{\"delta\": {}, \"finish_reason\": \"stop\"}]}\n\n",
            "data: {\"choices\": [], \"usage\": {\"completion_tokens\": 3}}\n\n",
            "data: [DONE]\n\n",
        );
        for cut in (0..=whole.len()).filter(|&cut| whole.is_char_boundary(cut)) {
            let (answer, done) = read(&[&whole[..cut], &whole[cut..]]).unwrap();
            assert_eq!((answer.text.as_str(), answer.finish_reason.as_deref(), done), ("Paris", Some("stop"), true));
            assert_eq!(answer.usage["completion_tokens"], 3);
        }
    }

    #[test]
    fn a_fault_in_the_stream_is_an_error_with_what_came_before() {
        let error = read(&[
            "data: {\"choices\": [{\"text\": \"Par\"}]}\n\n",
            "data: {\"error\": {\"message\": \"no replica\", \"code\": \"missing_experts\"}}\n\n",
        ]);
        match error.unwrap_err() {
            AskError::Failed { code, message, so_far } => {
                assert_eq!(
                    (code.as_deref(), message.as_str(), so_far.as_str()),
                    (Some("missing_experts"), "no replica", "Par")
                );
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_stream_without_its_end_is_not_done() {
        assert!(!read(&["data: {\"choices\": [{\"text\": \"Par\"}]}\n\n"]).unwrap().1);
    }
}
