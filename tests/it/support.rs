//! Shared by the tests: turns, programs run to their end, meshes, and copies of the bundled model to damage.
//!
//! The invariant: everything that a test started is gone when the test ends, even if it fails, since meshes and
//! commands are killed when dropped. The module asserts nothing about `coel` except that a mesh can be assembled.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use coel_node::status::Status;
use coel_store::Bounds;
use coel_testnet::budget::Budget;
use coel_testnet::job::Job;
use coel_testnet::mesh::Mesh;
use coel_testnet::process::Launcher;
use coel_testnet::progress::Progress;
use serde_json::Value;
use tokio::sync::{Mutex, MutexGuard};

/// No command takes longer unless it hangs.
const COMMAND_LIMIT: Duration = Duration::from_secs(300);
/// A mesh that has not reached a state by then never will.
const STATE_LIMIT: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(100);

/// The name under which meshes of these tests serve the bundled model.
pub const MODEL: &str = "coel-tiny";
pub const QUESTION: &str = "What is the capital of France?";

/// The right to start processes. One test at a time has it.
pub async fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::const_new(());
    TURN.lock().await
}

pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_coel-under-test"))
}

pub fn launcher() -> Launcher {
    Launcher::of(program())
}

pub fn fixture() -> PathBuf {
    coel_testnet::bundled_model()
}

/// A command that has ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// Asserts a failure with this exit code, and that the message has all these words.
    #[track_caller]
    pub fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in {self:#?}");
        }
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
    }

    /// Asserts success, and returns the output.
    #[track_caller]
    pub fn printed(&self) -> &str {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self.stdout.trim()
    }
}

pub async fn run(command: std::process::Command) -> Ended {
    let mut command = tokio::process::Command::from(command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = tokio::time::timeout(COMMAND_LIMIT, command.output()).await;
    let output = output.unwrap_or_else(|_| panic!("{command:?} hangs")).unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ended { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// `coel ARGS`.
pub async fn coel<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ended {
    run(launcher().coel(args)).await
}

/// `coel-testnet ARGS`.
pub async fn testnet<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ended {
    let mut command = std::process::Command::new(program());
    command.args(args);
    run(command).await
}

/// `coel COMMAND ARGS --data DIR`.
pub async fn coel_at<S: AsRef<OsStr>>(data: &Path, args: impl IntoIterator<Item = S>) -> Ended {
    let args = args.into_iter().map(|arg| arg.as_ref().to_owned());
    coel(args.chain(["--data".into(), data.into()])).await
}

/// The main job's mesh of `nodes` nodes with room for `percent` of the experts, ready to answer.
pub async fn mesh(nodes: usize, percent: u64) -> (Mesh, Job, Budget) {
    let job = Job {
        nodes,
        percent,
        precision: Bounds::AUTO,
        model: fixture(),
        model_name: MODEL.into(),
        question: QUESTION.into(),
        fault: None,
    };
    let mut mesh = Mesh::new(launcher()).unwrap();
    let budget = match job.assemble(&mut mesh, &mut Progress::new()).await {
        Ok(budget) => budget,
        Err(error) => panic!("{error:#}\n{}", mesh.last_words().await),
    };
    (mesh, job, budget)
}

/// A mesh of one node without a model, which is all that membership tests need.
pub async fn lone_node() -> Mesh {
    let mut mesh = Mesh::new(launcher()).unwrap();
    mesh.create(spec("a")).await.unwrap();
    mesh
}

/// A node with room for the whole bundled model.
pub fn spec(name: &str) -> coel_testnet::node::NodeSpec {
    let budget = Budget::of(&fixture()).unwrap();
    coel_testnet::node::NodeSpec {
        name: name.into(),
        memory_bytes: budget.bytes(100),
        kv_tokens: budget.kv_tokens,
        flags: Vec::new(),
        env: Vec::new(),
    }
}

/// Waits until the status of node `index` is as `wanted`.
pub async fn until(mesh: &mut Mesh, index: usize, what: &str, wanted: impl Fn(&Status) -> bool) -> Status {
    let waiting = async {
        loop {
            if let Ok(status) = mesh.nodes()[index].status().await
                && wanted(&status)
            {
                return status;
            }
            tokio::time::sleep(POLL).await;
        }
    };
    let found = tokio::time::timeout(STATE_LIMIT, waiting).await;
    match found {
        Ok(status) => status,
        Err(_) => {
            let status = mesh.nodes()[index].status().await;
            panic!("never: {what}\n{status:#?}\n{}", mesh.last_words().await)
        }
    }
}

/// Greedy continuation of token ids by the node at `api`.
pub async fn continue_tokens(
    api: &str,
    prompt: &[u32],
    max_tokens: usize,
    on_text: impl FnMut(&str),
) -> Result<coel_testnet::ask::Answer, coel_testnet::ask::AskError> {
    let body = serde_json::json!({
        "model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": 0,
    });
    coel_testnet::ask::stream(&format!("{api}/v1/completions"), body, on_text).await
}

/// Posts a body and reads the reply: status and JSON.
pub async fn post(url: &str, body: impl Into<reqwest::Body>) -> (u16, Value) {
    let request = reqwest::Client::builder()
        .no_proxy()
        .build()
        .unwrap()
        .post(url)
        .header("content-type", "application/json")
        .body(body);
    let response = tokio::time::timeout(STATE_LIMIT, request.send()).await.expect("no reply").unwrap();
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

/// Gets a page: status and text.
pub async fn get(url: &str) -> (u16, String) {
    let request = reqwest::Client::builder().no_proxy().build().unwrap().get(url).send();
    let response = guarded(request).await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

/// Waits for an event, and panics if it never comes.
pub async fn guarded<T>(event: impl Future<Output = T>) -> T {
    tokio::time::timeout(STATE_LIMIT, event).await.expect("it hangs")
}

/// A copy of the bundled model that a test may damage.
pub struct Copy {
    folder: tempfile::TempDir,
}

impl Copy {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        coel_testnet::fault::copy(&fixture(), &folder.path().join(MODEL), None).unwrap();
        Self { folder }
    }

    pub fn dir(&self) -> PathBuf {
        self.folder.path().join(MODEL)
    }

    pub fn weights(&self) -> PathBuf {
        self.dir().join("model.safetensors")
    }

    /// Changes a JSON file of the copy.
    pub fn edit(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let path = self.dir().join(file);
        let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        std::fs::write(path, json.to_string()).unwrap();
    }

    /// Changes the header and the data of the weights.
    pub fn edit_weights(&self, change: impl FnOnce(&mut serde_json::Map<String, Value>, &mut Vec<u8>)) {
        let bytes = std::fs::read(self.weights()).unwrap();
        let (length, rest) = bytes.split_first_chunk().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        let (mut header, mut data) = (serde_json::from_slice(header).unwrap(), data.to_vec());
        change(&mut header, &mut data);
        let header = serde_json::to_vec(&header).unwrap();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.extend(data);
        std::fs::write(self.weights(), bytes).unwrap();
    }
}

/// Copies the files of a folder, and its folders. Sockets stay behind.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (kind, to) = (entry.file_type().unwrap(), to.join(entry.file_name()));
        if kind.is_dir() {
            copy_folder(&entry.path(), &to);
        } else if kind.is_file() {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}
