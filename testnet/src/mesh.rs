//! Some nodes on one machine, and the folder they live in.
//!
//! Owns the temporary folder and the nodes. The invariant: when a [`Mesh`] is gone, so are its processes, and its folder
//! unless it was to be kept; [`Mesh::shut_down`] does it gently, dropping does it at once.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use coel_node::control::Request;
use coel_node::status::Status;
use tempfile::TempDir;

use crate::node::{Node, NodeSpec, Start};
use crate::process::Launcher;

/// Time to live of the invites a testnet makes for itself.
const INVITE_TTL_S: u64 = 3600;

/// A mesh in the making, or made.
#[derive(Debug)]
pub struct Mesh {
    // Before the folder: nodes end before the ground is taken from under them.
    nodes: Vec<Node>,
    launcher: Launcher,
    folder: TempDir,
}

impl Mesh {
    /// An empty mesh. The folder's path is short: Unix sockets in it have about 100 bytes for their names.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn new(launcher: Launcher) -> Result<Self> {
        let short = std::env::temp_dir();
        let base = if short.as_os_str().len() <= 40 { short } else { PathBuf::from("/tmp") };
        let folder = tempfile::Builder::new().prefix("coel-").rand_bytes(6).tempdir_in(&base);
        let folder = folder.with_context(|| format!("cannot create a folder in {}", base.display()))?;
        Ok(Self { nodes: Vec::new(), launcher, folder })
    }

    /// The folder of all nodes' folders.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Leaves the folder behind when the mesh ends.
    pub fn keep(&mut self) {
        self.folder.disable_cleanup(true);
    }

    /// A node that is not started yet.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn add(&mut self, spec: NodeSpec) -> Result<&mut Node> {
        let node = Node::new(self.folder.path(), self.launcher.clone(), spec)?;
        self.nodes.push(node);
        Ok(self.nodes.last_mut().expect("one was added"))
    }

    /// Adds a node that creates the mesh, and waits until it answers.
    ///
    /// # Errors
    /// A node that does not come up.
    pub async fn create(&mut self, spec: NodeSpec) -> Result<&mut Node> {
        let node = self.add(spec)?;
        node.start(&Start::New).await?;
        Ok(node)
    }

    /// Adds nodes that join by `invite`, all at the same time, and waits until each answers.
    ///
    /// # Errors
    /// A node that does not come up.
    pub async fn join(&mut self, specs: Vec<NodeSpec>, invite: &str) -> Result<()> {
        let from = self.nodes.len();
        for spec in specs {
            self.add(spec)?.spawn(&Start::Join(invite.to_owned()))?;
        }
        for node in &mut self.nodes[from..] {
            node.wait_up().await?;
        }
        Ok(())
    }

    /// An invite from the first node.
    ///
    /// # Errors
    /// A refusal.
    pub async fn invite(&self, uses: u32) -> Result<String> {
        let request = Request::Invite { uses, ttl_s: INVITE_TTL_S };
        self.nodes[0].ask(&request, |_, _, _| ()).await
    }

    /// The nodes, in the order in which they were added.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// One node.
    pub fn node(&mut self, index: usize) -> &mut Node {
        &mut self.nodes[index]
    }

    /// What every running node says; the reason in place of an answer.
    pub async fn statuses(&mut self) -> Vec<Result<Status>> {
        let mut statuses = Vec::new();
        for node in &mut self.nodes {
            statuses.push(match node.check_alive() {
                Ok(()) => node.status().await,
                Err(error) => Err(error),
            });
        }
        statuses
    }

    /// The last words of every node, for a fault.
    pub async fn last_words(&mut self) -> String {
        let statuses = self.statuses().await;
        let mut words = String::new();
        for (node, status) in self.nodes.iter().zip(statuses) {
            let said = status.map_or_else(|error| format!("{error:#}"), |status| status.readiness.to_string());
            words.push_str(&format!("{}: {said}\n{}\n", node.name(), node.tail()));
        }
        words
    }

    /// Stops the nodes one after the other and removes the folder. Returns the names of those that had to be killed.
    pub async fn shut_down(mut self) -> Vec<String> {
        let mut killed = Vec::new();
        for node in &mut self.nodes {
            if !node.stop().await {
                killed.push(node.name().to_owned());
            }
        }
        killed
    }
}
