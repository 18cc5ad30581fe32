//! How a command on this machine talks to the running node: JSON lines over a Unix socket beside the data.
//!
//! One request per connection; the node answers with any number of [`Reply::Progress`] lines and one last [`Reply::Done`] or
//! [`Reply::Failed`]. The socket's file permissions (owner only) are its access control. [`commands`] carries requests out.

pub mod commands;

use std::path::{Path, PathBuf};

use coel_store::{Bounds, replace_file};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// Longest request line.
const REQUEST_BYTES_MAX: u64 = 64 << 10;

/// What a command asks of the node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// The [`crate::status::Status`] document.
    Status,
    /// A new invite; answers with the line.
    Invite { uses: u32, ttl_s: u64 },
    /// Registers a checkpoint directory (absolute path); answers with a [`crate::service::ModelInfo`].
    Import { dir: PathBuf, name: Option<String> },
    /// Removes a member that is down, by its id or its name; answers with nothing.
    Forget { node: String },
    /// Says at which precisions the mesh is to hold experts; answers with nothing.
    Precision { bounds: Bounds },
    /// Hands over what this node holds, leaves the mesh and stops.
    Leave,
    /// Stops the node.
    Stop,
}

/// One line of the node's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// How far it is: `done` of `total` units of `what`.
    Progress { what: String, done: u64, total: u64 },
    /// The result.
    Done(serde_json::Value),
    /// Why there is none.
    Failed(String),
}

/// What a running node leaves in its data folder for commands to find it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFile {
    /// Process id.
    pub pid: u32,
    /// libp2p identity.
    pub peer_id: String,
    /// Its name.
    pub name: String,
    /// `http://ADDRESS:PORT`.
    pub api: String,
    /// The Unix socket.
    pub socket: PathBuf,
}

/// Why a command got no answer from a node.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No node runs there.
    #[error("no node runs on the data folder {}; start one with `coel up --data {}` or name another folder with --data", .0.display(), .0.display())]
    NotRunning(PathBuf),
    /// The node said no.
    #[error("{0}")]
    Refused(String),
    /// The conversation broke off.
    #[error("the node stopped answering: {0}")]
    Broken(String),
}

impl NodeFile {
    fn path(data: &Path) -> PathBuf {
        data.join("node.json")
    }

    /// Reads the file of the node that runs on `data`.
    pub fn read(data: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(Self::path(data)).ok()?).ok()
    }

    /// Writes the file so that a reader sees the whole of it or nothing.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, data: &Path) -> std::io::Result<()> {
        replace_file(&Self::path(data), &serde_json::to_vec_pretty(self)?)
    }

    /// Removes the file; a node that has stopped leaves no trace of running.
    pub fn remove(data: &Path) {
        let _ = std::fs::remove_file(Self::path(data));
    }
}

/// Asks the node on `data` and waits for its last word; `progress` sees what comes before.
///
/// # Errors
/// [`ControlError`].
pub async fn ask<T: DeserializeOwned>(
    data: &Path,
    request: &Request,
    mut progress: impl FnMut(&str, u64, u64),
) -> Result<T, ControlError> {
    let not_running = || ControlError::NotRunning(data.to_owned());
    let broken = |error: &dyn std::fmt::Display| ControlError::Broken(error.to_string());
    let node = NodeFile::read(data).ok_or_else(not_running)?;
    let mut stream = UnixStream::connect(&node.socket).await.map_err(|_| not_running())?;
    let mut line = serde_json::to_vec(request).map_err(|error| broken(&error))?;
    line.push(b'\n');
    stream.write_all(&line).await.map_err(|error| broken(&error))?;
    let mut lines = BufReader::new(stream).lines();
    while let Some(line) = lines.next_line().await.map_err(|error| broken(&error))? {
        match serde_json::from_str(&line).map_err(|error| broken(&error))? {
            Reply::Progress { what, done, total } => progress(&what, done, total),
            Reply::Done(value) => return serde_json::from_value(value).map_err(|error| broken(&error)),
            Reply::Failed(reason) => return Err(ControlError::Refused(reason)),
        }
    }
    Err(broken(&"it closed the connection before it had answered"))
}

/// The node's end of one conversation.
#[derive(Debug)]
pub struct Conversation {
    stream: UnixStream,
}

impl Conversation {
    /// Reads the request, if it is one.
    pub async fn request(&mut self) -> Option<Request> {
        let mut line = String::new();
        let read = BufReader::new((&mut self.stream).take(REQUEST_BYTES_MAX)).read_line(&mut line).await;
        match (read, serde_json::from_str(&line)) {
            (Ok(_), Ok(request)) => Some(request),
            (_, Err(error)) => {
                self.say(&Reply::Failed(format!("not a request: {error}"))).await;
                None
            }
            (Err(_), _) => None,
        }
    }

    /// Says one line. A listener that has gone is not an error: the work it asked for goes on.
    pub async fn say(&mut self, reply: &Reply) {
        let mut line = serde_json::to_vec(reply).expect("replies are plain data");
        line.push(b'\n');
        let _ = self.stream.write_all(&line).await;
    }
}

/// The node's socket; removed when dropped.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`, which must be no longer than a socket address allows (about 100 bytes), replacing a dead node's socket.
    /// The caller holds the lock of the data folder, so a socket found there is nobody's.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn bind(path: &Path) -> std::io::Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// The next conversation.
    ///
    /// # Errors
    /// Those of the operating system.
    pub async fn next(&mut self) -> std::io::Result<Conversation> {
        let (stream, _) = self.listener.accept().await?;
        Ok(Conversation { stream })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn node(data: &Path, replies: Vec<Reply>) -> tokio::task::JoinHandle<Option<Request>> {
        let socket = data.join("node.sock");
        let mut listener = Listener::bind(&socket).unwrap();
        let file = NodeFile { pid: 1, peer_id: "p".into(), name: "n".into(), api: "http://x".into(), socket };
        file.write(data).unwrap();
        tokio::spawn(async move {
            let mut conversation = listener.next().await.unwrap();
            let request = conversation.request().await;
            for reply in replies {
                conversation.say(&reply).await;
            }
            request
        })
    }

    #[tokio::test]
    async fn progress_comes_before_the_result() {
        let data = tempfile::tempdir().unwrap();
        let progress = Reply::Progress { what: "experts".into(), done: 3, total: 9 };
        let node = node(data.path(), vec![progress, Reply::Done("coel1abc".into())]).await;
        let mut seen = Vec::new();
        let request = Request::Invite { uses: 2, ttl_s: 60 };
        let line: String =
            ask(data.path(), &request, |what, done, total| seen.push((what.to_owned(), done, total))).await.unwrap();
        assert_eq!((line.as_str(), seen), ("coel1abc", vec![("experts".to_owned(), 3, 9)]));
        assert_eq!(node.await.unwrap(), Some(request));
    }

    #[tokio::test]
    async fn a_refusal_and_a_silence_are_told_apart() {
        let data = tempfile::tempdir().unwrap();
        let refused = node(data.path(), vec![Reply::Failed("no quorum".into())]).await;
        let error = ask::<String>(data.path(), &Request::Leave, |_, _, _| ()).await.unwrap_err();
        assert!(matches!(error, ControlError::Refused(reason) if reason == "no quorum"));
        refused.await.unwrap();
        let silent = node(data.path(), vec![]).await;
        let error = ask::<String>(data.path(), &Request::Leave, |_, _, _| ()).await.unwrap_err();
        assert!(matches!(error, ControlError::Broken(_)), "{error}");
        silent.await.unwrap();
    }

    #[tokio::test]
    async fn no_node_is_said_with_the_remedy() {
        let data = tempfile::tempdir().unwrap();
        let error = ask::<String>(data.path(), &Request::Status, |_, _, _| ()).await.unwrap_err();
        assert!(error.to_string().contains("coel up --data"), "{error}");
    }
}
