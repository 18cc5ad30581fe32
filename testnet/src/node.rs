//! One node of the testnet: a real `coel` process with a folder of its own.
//!
//! Owns the process, its folder (`data`, `log`) and the flags it is started with, so that it can be killed, stopped and
//! started again as the same node. The invariant: what is told about a node was read from the node itself (control
//! socket, `/proc`, its log), never remembered from an earlier answer.

use std::ffi::OsString;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use coel_node::control::{self, NodeFile, Request};
use coel_node::status::Status;
use serde::de::DeserializeOwned;

use crate::process::{Launcher, Process, describe};

/// How long a node may take until its control socket answers. It binds that before anything else; the rest is a hang guard.
const UP_LIMIT: Duration = Duration::from_secs(90);
const UP_POLL: Duration = Duration::from_millis(50);
/// A node answers for its status from memory; one that needs longer is stuck.
const STATUS_LIMIT: Duration = Duration::from_secs(20);
/// How long a node may take to end after it was asked to.
const STOP_LIMIT: Duration = Duration::from_secs(15);
/// Lines of a log shown with a fault.
const TAIL_LINES: usize = 12;

/// What a node is given.
#[derive(Debug, Clone, Default)]
pub struct NodeSpec {
    /// Its name, also that of its folder.
    pub name: String,
    /// `--memory`.
    pub memory_bytes: u64,
    /// `--kv-tokens`.
    pub kv_tokens: usize,
    /// More flags, as they are.
    pub flags: Vec<OsString>,
    /// Variables of its environment, beside its parent's.
    pub env: Vec<(OsString, OsString)>,
}

/// How a node comes into being.
#[derive(Debug, Clone)]
pub enum Start {
    /// `coel up --new`.
    New,
    /// `coel join INVITE`.
    Join(String),
    /// `coel up`: it is a member already.
    Again,
}

/// A node, running or not.
#[derive(Debug)]
pub struct Node {
    spec: NodeSpec,
    folder: PathBuf,
    port: u16,
    launcher: Launcher,
    process: Option<Process>,
}

impl Node {
    /// A node with a folder below `root`, not started yet.
    ///
    /// # Errors
    /// Those of the file system; no free port.
    pub(crate) fn new(root: &Path, launcher: Launcher, spec: NodeSpec) -> Result<Self> {
        let folder = root.join(&spec.name);
        std::fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self { spec, folder, port: free_port()?, launcher, process: None })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Its private folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its data folder.
    pub fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// Where everything it logs goes.
    pub fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    /// The port it listens on for peers, TCP and QUIC.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What it was given.
    pub fn spec(&self) -> &NodeSpec {
        &self.spec
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// Resident memory of its process.
    pub fn rss_bytes(&self) -> Option<u64> {
        self.process.as_ref()?.rss_bytes()
    }

    /// `http://127.0.0.1:PORT`.
    ///
    /// # Errors
    /// A node that is not up.
    pub fn api(&self) -> Result<String> {
        Ok(self.file()?.api)
    }

    /// Its libp2p identity.
    ///
    /// # Errors
    /// A node that is not up.
    pub fn peer_id(&self) -> Result<String> {
        Ok(self.file()?.peer_id)
    }

    fn file(&self) -> Result<NodeFile> {
        NodeFile::read(&self.data()).ok_or_else(|| anyhow!("{} is not up", self.name()))
    }

    /// The arguments of the node's command.
    fn args(&self, start: &Start) -> Vec<OsString> {
        let mut args: Vec<OsString> = match start {
            Start::New => vec!["up".into(), "--new".into()],
            Start::Join(invite) => vec!["join".into(), invite.into()],
            Start::Again => vec!["up".into()],
        };
        let mut flag = |name: &str, value: OsString| args.extend([name.into(), value]);
        flag("--data", self.data().into());
        flag("--listen", format!("/ip4/127.0.0.1/udp/{}/quic-v1", self.port).into());
        flag("--listen", format!("/ip4/127.0.0.1/tcp/{}", self.port).into());
        flag("--api", "127.0.0.1:0".into());
        flag("--memory", self.spec.memory_bytes.to_string().into());
        flag("--kv-tokens", self.spec.kv_tokens.to_string().into());
        flag("--name", self.name().into());
        flag("--mdns", "false".into());
        flag("--device", "cpu".into());
        args.extend(self.spec.flags.iter().cloned());
        args
    }

    /// Starts the process and waits until it answers on its control socket.
    ///
    /// # Errors
    /// A process that ended or does not answer, with the end of its log.
    pub async fn start(&mut self, start: &Start) -> Result<()> {
        self.spawn(start)?;
        self.wait_up().await
    }

    pub(crate) fn spawn(&mut self, start: &Start) -> Result<()> {
        let mut command = self.launcher.coel(self.args(start));
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "info,openraft=warn");
        }
        command.envs(self.spec.env.iter().cloned());
        let process = Process::start(command, &self.log());
        self.process = Some(process.with_context(|| format!("cannot start {}", self.name()))?);
        Ok(())
    }

    pub(crate) async fn wait_up(&mut self) -> Result<()> {
        let deadline = Instant::now() + UP_LIMIT;
        loop {
            // A file left behind by a killed process names another process.
            if self.file().is_ok_and(|file| Some(file.pid) == self.pid()) && self.status().await.is_ok() {
                return Ok(());
            }
            self.check_alive()?;
            if Instant::now() > deadline {
                bail!("{} did not come up within {} s\n{}", self.name(), UP_LIMIT.as_secs(), self.tail());
            }
            tokio::time::sleep(UP_POLL).await;
        }
    }

    /// Whether the process runs.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.ended().is_none())
    }

    /// # Errors
    /// A process that has ended, with how, and the end of its log.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.process.as_mut().map(Process::ended) {
            Some(None) => Ok(()),
            Some(Some(ended)) => bail!("{} {}\n{}", self.name(), describe(ended), self.tail()),
            None => bail!("{} was not started", self.name()),
        }
    }

    /// Asks it over its control socket.
    ///
    /// # Errors
    /// A refusal, or a node that is not there.
    pub async fn ask<T: DeserializeOwned>(&self, request: &Request, progress: impl FnMut(&str, u64, u64)) -> Result<T> {
        control::ask(&self.data(), request, progress).await.with_context(|| format!("asking {}", self.name()))
    }

    /// What it says of itself and the mesh.
    ///
    /// # Errors
    /// A node that does not answer.
    pub async fn status(&self) -> Result<Status> {
        let answer = tokio::time::timeout(STATUS_LIMIT, self.ask(&Request::Status, |_, _, _| ())).await;
        answer.map_err(|_| anyhow!("{} did not tell its status within {} s", self.name(), STATUS_LIMIT.as_secs()))?
    }

    /// SIGSTOP: it falls silent, and its connections stay.
    pub fn suspend(&mut self) {
        self.signal(libc::SIGSTOP);
    }

    /// SIGCONT: it goes on where it was suspended.
    pub fn resume(&mut self) {
        self.signal(libc::SIGCONT);
    }

    fn signal(&mut self, signal: libc::c_int) {
        if let Some(process) = &mut self.process {
            process.signal(signal);
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(process) = &mut self.process {
            process.kill();
        }
    }

    /// Asks it to stop, then signals, then kills; returns whether it ended by itself.
    pub async fn stop(&mut self) -> bool {
        if !self.is_running() {
            return true;
        }
        let asked = self.ask::<serde_json::Value>(&Request::Stop, |_, _, _| ());
        let asked = matches!(tokio::time::timeout(STATUS_LIMIT, asked).await, Ok(Ok(_)));
        let Some(process) = &mut self.process else {
            return true;
        };
        if !asked {
            process.signal(libc::SIGTERM);
        }
        let ended = process.wait(STOP_LIMIT).await.is_some();
        process.kill();
        ended
    }

    /// Waits for a process that was told to end.
    pub async fn wait_end(&mut self) -> Option<std::process::ExitStatus> {
        self.process.as_mut()?.wait(UP_LIMIT).await
    }

    /// The last lines of its log.
    pub fn tail(&self) -> String {
        let log = std::fs::read(self.log()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        let from = lines.len().saturating_sub(TAIL_LINES);
        let mut tail = format!("the end of {}:", self.log().display());
        for line in &lines[from..] {
            tail.push_str("\n  ");
            tail.push_str(line);
        }
        tail
    }
}

/// A port that is free for TCP and UDP on loopback. It must stay the node's over restarts, so it is below the range from
/// which the system gives ports to others; processes start looking at different ports.
fn free_port() -> Result<u16> {
    const PORTS: std::ops::Range<u16> = 20_000..32_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let span = u32::from(PORTS.end - PORTS.start);
    let start = std::process::id().wrapping_mul(97) % span;
    for _ in 0..PORTS.len() {
        let step = u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = PORTS.start + ((start + step) % span) as u16;
        let address = (Ipv4Addr::LOCALHOST, port);
        if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
            return Ok(port);
        }
    }
    bail!("no port between {} and {} is free on 127.0.0.1", PORTS.start, PORTS.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(root: &Path) -> Node {
        let flags = vec!["--peer".into(), "x".into()];
        let spec = NodeSpec { name: "a".into(), memory_bytes: 7, kv_tokens: 9, flags, env: Vec::new() };
        Node::new(root, Launcher::of("/bin/false"), spec).unwrap()
    }

    #[test]
    fn a_node_is_started_again_with_the_same_address() {
        let root = tempfile::tempdir().unwrap();
        let node = node(root.path());
        let (first, again) = (node.args(&Start::New), node.args(&Start::Again));
        assert_eq!(first[2..], again[1..]);
        assert!(again.contains(&"--memory".into()) && again.contains(&"7".into()) && again.ends_with(&["x".into()]));
    }

    #[tokio::test]
    async fn a_process_that_ends_at_once_is_told_with_its_log() {
        let root = tempfile::tempdir().unwrap();
        let mut node = node(root.path());
        std::fs::write(node.log(), "first\nlast words\n").unwrap();
        let error = node.start(&Start::New).await.unwrap_err().to_string();
        assert!(error.contains("a ended with exit code 1") && error.contains("last words"), "{error}");
        assert!(node.stop().await);
    }

    #[test]
    fn ports_are_not_given_twice() {
        assert_ne!(free_port().unwrap(), free_port().unwrap());
    }
}
