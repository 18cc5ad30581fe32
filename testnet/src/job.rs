//! The main job: a mesh from nothing to an answered question.
//!
//! Owns the order of the steps and the patience with each. The invariant: a step begins only when the one before it has
//! truly ended, by the nodes' own word; a step that does not end becomes an error that carries what every node last said.
//! Nothing in it reaches into a node: it uses what a person with three terminals would use.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use coel_node::control::Request;
use coel_node::service::ModelInfo;
use coel_node::status::Status;
use coel_store::Bounds;

use crate::ask::{self, Answer};
use crate::assigned::Assigned;
use crate::budget::Budget;
use crate::checks::{self, Expected};
use crate::fault::{self, Fault};
use crate::mesh::Mesh;
use crate::node::{NodeSpec, Start};
use crate::progress::Progress;
use crate::report::{OutsideFacts, Report};
use crate::settle::{Decision, Patience, Wanted, judge};

/// A step of which nothing has been heard for this long is stuck; three loaded nodes on two slow cores need a tenth of it.
const STEP_LIMIT: Duration = Duration::from_secs(240);
const POLL: Duration = Duration::from_millis(250);
/// The log may still carry an entry to the last node when the answer ends.
const AGREE_ROUNDS: u32 = 120;

/// What the job is to do.
#[derive(Debug, Clone)]
pub struct Job {
    /// Nodes.
    pub nodes: usize,
    /// Share of the expert bytes each node has room for.
    pub percent: u64,
    /// At which precisions each node accepts experts and the trunk.
    pub precision: Bounds,
    /// Checkpoint folder.
    pub model: PathBuf,
    /// Name to register it under.
    pub model_name: String,
    /// What to ask; asked of the last node.
    pub question: String,
    /// What to damage.
    pub fault: Option<Fault>,
}

impl Job {
    /// What a node of this job is given.
    pub fn spec(&self, budget: &Budget, number: usize) -> NodeSpec {
        let bounds = self.precision.to_string();
        NodeSpec {
            name: format!("node-{number}"),
            memory_bytes: budget.bytes(self.percent),
            kv_tokens: budget.kv_tokens,
            flags: ["--precision", "--trunk"]
                .into_iter()
                .flat_map(|flag| [flag.into(), bounds.clone().into()])
                .collect(),
            env: Vec::new(),
        }
    }

    /// What the mesh shall come to.
    pub fn wanted(&self, budget: &Budget) -> Wanted {
        Wanted {
            nodes: self.nodes,
            experts: budget.experts,
            // Where even one replica each does not fit, waiting for it brings out the planner's refusal.
            replicas: budget.replicas_wanted(self.nodes, self.percent).max(1),
        }
    }

    /// Everything up to a mesh that is ready to be asked.
    ///
    /// # Errors
    /// The step that failed, with what the nodes said.
    pub async fn assemble(&self, mesh: &mut Mesh, progress: &mut Progress) -> Result<Budget> {
        let budget = Budget::of(&self.model)?;
        let outcome = self.steps(mesh, progress, &budget).await;
        match outcome {
            Ok(()) => Ok(budget),
            Err(error) => {
                progress.clear();
                Err(error)
            }
        }
    }

    async fn steps(&self, mesh: &mut Mesh, progress: &mut Progress, budget: &Budget) -> Result<()> {
        let percent = self.percent;
        progress.step("starting node-1, which creates the mesh");
        mesh.create(self.spec(budget, 1)).await?;
        progress.done(&format!("node-1 is up, with room for {percent} % of the experts"));
        self.import(mesh, progress).await?;
        if let Some(fault) = self.fault {
            self.damage(mesh, progress, fault).await?;
        }
        if self.nodes > 1 {
            progress.step(format!("{} more nodes join by its invite", self.nodes - 1));
            let invite = mesh.invite(self.nodes as u32 - 1).await?;
            let specs = (2..=self.nodes).map(|number| self.spec(budget, number)).collect();
            mesh.join(specs, &invite).await?;
            progress.done(&format!("{} nodes are up", self.nodes));
        }
        progress.step("agreeing on who holds which expert, and fetching them");
        let statuses = settle(mesh, self.wanted(budget), progress).await?;
        let (first, fewest) = (&statuses[0], statuses.iter().map(|s| s.replicas_min).min().unwrap_or(0));
        let leader = first.nodes.iter().find(|node| Some(node.node_id) == first.leader);
        let leader = leader.map_or("nobody", |node| node.name.as_str());
        progress.done(&format!(
            "every expert is on {fewest} node(s) by epoch {} of the placement; {leader} leads",
            first.epoch
        ));
        Ok(())
    }

    async fn import(&self, mesh: &mut Mesh, progress: &mut Progress) -> Result<()> {
        progress.step(format!("importing {} into node-1", self.model_name));
        let copy = mesh.nodes()[0].folder().join("model");
        fault::copy(&self.model, &copy, self.fault)?;
        let request = Request::Import { dir: copy, name: Some(self.model_name.clone()) };
        let answer = mesh.nodes()[0].ask::<ModelInfo>(&request, |what, done, total| {
            progress.detail(&format!("{what} {done} of {total}"));
        });
        let imported = tokio::time::timeout(STEP_LIMIT, answer).await;
        let model = imported.map_err(|_| anyhow!("the import did not end within {} s", STEP_LIMIT.as_secs()))??;
        progress.done(&format!("{} is registered as {}", model.name, model.id.get(..12).unwrap_or(&model.id)));
        Ok(())
    }

    /// Damages the importer's copy while the node is down: mapped bytes are not pulled from under a running process.
    async fn damage(&self, mesh: &mut Mesh, progress: &mut Progress, fault: Fault) -> Result<()> {
        let first = mesh.node(0);
        let dir = first.folder().join("model");
        let victim = fault::victim(&dir)?;
        progress.step(format!("damaging {victim} in node-1's copy of the model"));
        first.stop().await;
        fault::strike(fault, &dir, victim)?;
        first.start(&Start::Again).await?;
        progress.done(&match fault {
            Fault::FlipBit => format!("one bit of {victim} is flipped in node-1's copy"),
            Fault::MissingExpert => format!("{victim} is gone from node-1's copy"),
        });
        Ok(())
    }

    /// Asks the last node, and reads what came of it.
    ///
    /// # Errors
    /// No answer, or a node that has gone meanwhile.
    pub async fn ask(&self, mesh: &mut Mesh, on_text: impl FnMut(&str)) -> Result<Report> {
        let home = self.nodes - 1;
        let api = mesh.nodes()[home].api()?;
        let answer = ask::chat(&api, &self.model_name, &self.question, on_text).await;
        let answer = answer.with_context(|| format!("asking {}", mesh.nodes()[home].name()))?;
        self.report(mesh, home, &answer).await
    }

    async fn report(&self, mesh: &mut Mesh, home: usize, answer: &Answer) -> Result<Report> {
        let mut rounds = 0;
        let statuses = loop {
            let statuses: Vec<Status> = mesh.statuses().await.into_iter().collect::<Result<_>>()?;
            rounds += 1;
            let applied = statuses[0].applied;
            if rounds == AGREE_ROUNDS || statuses.iter().all(|status| status.applied == applied) {
                break statuses;
            }
            tokio::time::sleep(POLL).await;
        };
        let model = statuses[0].model.as_ref().ok_or_else(|| anyhow!("no model is placed"))?;
        let assigned = Assigned::read(&mesh.nodes()[0].data(), &model.id)?;
        let facts = mesh.nodes().iter().zip(statuses).map(|(node, status)| {
            let gone = || anyhow!("{} has gone", node.name());
            let pid = node.pid().ok_or_else(gone)?;
            let rss_bytes = node.rss_bytes().ok_or_else(gone)?;
            let bytes_assigned = assigned.bytes(&status, status.node_id);
            let data = node.data().display().to_string();
            Ok((status, OutsideFacts { pid, data, rss_bytes, bytes_assigned }))
        });
        let facts: Vec<_> = facts.collect::<Result<_>>()?;
        Ok(Report::new(&self.question, answer, home, &facts))
    }

    /// # Errors
    /// Every step that did not truly happen.
    pub fn verify(&self, report: &Report, budget: &Budget) -> Result<()> {
        let expected = Expected { budget: *budget, replicas: self.wanted(budget).replicas };
        let failures = checks::failures(report, &expected);
        if failures.is_empty() { Ok(()) } else { bail!("the run is not what it should be: {}", failures.join("; ")) }
    }
}

/// Waits until the mesh is as `wanted`.
///
/// # Errors
/// A node that ended; a fault that lasts; nothing new for [`STEP_LIMIT`].
pub async fn settle(mesh: &mut Mesh, wanted: Wanted, progress: &mut Progress) -> Result<Vec<Status>> {
    let mut patience = Patience::new(wanted);
    let mut last = (String::new(), Instant::now());
    loop {
        for index in 0..mesh.nodes().len() {
            mesh.node(index).check_alive()?;
        }
        let statuses: Vec<Status> = mesh.statuses().await.into_iter().flatten().collect();
        match patience.round(judge(&statuses, wanted)) {
            Decision::Go => return Ok(statuses),
            Decision::GiveUp(fault) => bail!("the mesh cannot serve: {fault}"),
            Decision::Wait(how_far) => {
                progress.detail(&how_far);
                if last.0 != how_far {
                    last = (how_far, Instant::now());
                }
            }
        }
        if last.1.elapsed() > STEP_LIMIT {
            let words = mesh.last_words().await;
            bail!("nothing has moved for {} s: {}\n{words}", STEP_LIMIT.as_secs(), last.0);
        }
        tokio::time::sleep(POLL).await;
    }
}
