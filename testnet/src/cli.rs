//! The command `coel-testnet`.
//!
//! Owns the flags, the signals and what is printed where: the answer, the table and the JSON document on stdout, progress
//! and faults on stderr. The invariant: whichever way it ends (done, failed, Ctrl-C), the nodes are stopped in order and the
//! temporary folder is removed before the exit code is returned.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use coel_store::Bounds;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::fault::Fault;
use crate::job::Job;
use crate::mesh::Mesh;
use crate::process::{Launcher, NODE_ARGUMENT};
use crate::progress::Progress;
use crate::report::Report;

/// Name under which the bundled model is registered.
const BUNDLED_NAME: &str = "coel-tiny";
/// How often nodes that were left running are looked at.
const WATCH: Duration = Duration::from_millis(500);

/// Starts a mesh of real nodes on this machine, none of which can hold the model alone, and has it answer a question.
#[derive(Debug, Parser)]
#[command(name = "coel-testnet", version)]
struct Args {
    /// Exit after the answer; 0 only if every step truly happened.
    #[arg(long)]
    once: bool,
    /// Print one JSON document on stdout.
    #[arg(long)]
    json: bool,
    /// Number of nodes.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=16))]
    nodes: u8,
    /// Share of the expert bytes that each node has room for.
    #[arg(long, value_name = "PERCENT", default_value_t = 70, value_parser = clap::value_parser!(u64).range(0..=1000))]
    budget: u64,
    /// At which precisions each node accepts experts and the trunk: `auto`, `q4`, `q8`, `exact`, or bounds such as `..q8`.
    #[arg(long, value_name = "PRECISION", default_value_t)]
    precision: Bounds,
    /// What to ask.
    #[arg(long, value_name = "TEXT", default_value = "What is the capital of France?")]
    question: String,
    /// Checkpoint folder to serve [default: the bundled model].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Keep the temporary folder, and say where it is.
    #[arg(long)]
    keep: bool,
    /// After the import, damage the importer's copy of one expert.
    #[arg(long, value_enum)]
    fault: Option<Fault>,
}

impl Args {
    fn job(&self) -> Job {
        let name = |dir: &Path| {
            let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
            dir.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
        };
        Job {
            nodes: usize::from(self.nodes),
            percent: self.budget,
            precision: self.precision,
            model: self.model.clone().unwrap_or_else(crate::bundled_model),
            model_name: self.model.as_deref().map_or_else(|| BUNDLED_NAME.into(), name),
            question: self.question.clone(),
            fault: self.fault,
        }
    }
}

/// The program: `coel` itself behind the hidden first argument, else the testnet.
pub fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let program = args.next().unwrap_or_else(|| "coel-testnet".into());
    let rest: Vec<OsString> = args.collect();
    if rest.first().is_some_and(|first| first == NODE_ARGUMENT) {
        return coel_node::cli::run(std::iter::once("coel".into()).chain(rest.into_iter().skip(1)));
    }
    let args = match Args::try_parse_from(std::iter::once(program).chain(rest)) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let outcome = runtime.context("cannot start the runtime").and_then(|runtime| runtime.block_on(run(&args)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coel-testnet: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<()> {
    let mut interrupt = Interrupt::new()?;
    let launcher = Launcher::this_program().context("cannot tell which program this is")?;
    let mut mesh = Mesh::new(launcher)?;
    if args.keep {
        mesh.keep();
    }
    let folder = mesh.folder().to_owned();
    let outcome = tokio::select! {
        outcome = work(args, &mut mesh) => outcome,
        () = interrupt.next() => Err(anyhow::anyhow!("interrupted before the mesh had answered")),
    };
    let outcome = match outcome {
        Ok(()) if !args.once => stay(&mut mesh, &mut interrupt).await,
        outcome => outcome,
    };
    let killed = mesh.shut_down().await;
    if args.keep {
        eprintln!("kept: {}", folder.display());
    }
    outcome?;
    if killed.is_empty() {
        Ok(())
    } else {
        bail!("{} did not stop when asked to and had to be killed", killed.join(", "))
    }
}

/// Up to the printed answer.
async fn work(args: &Args, mesh: &mut Mesh) -> Result<()> {
    let job = args.job();
    let mut progress = Progress::new();
    let budget = job.assemble(mesh, &mut progress).await?;
    eprintln!("\nnode-{}: {}", job.nodes, job.question);
    let report = job.ask(mesh, |text| show(text, args.json)).await?;
    show("\n\n", args.json);
    job.verify(&report, &budget)?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("{}\n{}", report.table(), report.summary());
    }
    if !args.once {
        eprintln!("{}", how_to_go_on(&job, &report));
    }
    Ok(())
}

/// A piece of the answer, at once.
fn show(text: &str, json: bool) {
    if json {
        eprint!("{text}");
    } else {
        print!("{text}");
        let _ = std::io::stdout().flush();
    }
}

fn how_to_go_on(job: &Job, report: &Report) -> String {
    let Some(first) = report.nodes.first() else {
        return String::new();
    };
    let built = std::env::current_exe().ok().map(|exe| exe.with_file_name("coel")).filter(|coel| coel.exists());
    let coel = built.map_or_else(|| "cargo run --release -p coel-node --".into(), |coel| coel.display().to_string());
    let body = serde_json::json!({
        "model": job.model_name,
        "messages": [{"role": "user", "content": "What is 12 times 11?"}],
    });
    format!(
        "\nThe mesh stays up until Ctrl-C. Any node answers:\n  \
         curl {api}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n\
         and tells what it knows:\n  {coel} status --data {data}\n\
         End one with `kill -9 {pid}` and ask again: the others hold its experts.",
        api = first.api,
        data = first.data,
        pid = first.pid,
    )
}

/// Until Ctrl-C; tells of nodes that end meanwhile.
async fn stay(mesh: &mut Mesh, interrupt: &mut Interrupt) -> Result<()> {
    let mut gone = vec![false; mesh.nodes().len()];
    loop {
        tokio::select! {
            () = interrupt.next() => {
                eprintln!("\nstopping the nodes ...");
                return Ok(());
            }
            () = tokio::time::sleep(WATCH) => {}
        }
        for (index, gone) in gone.iter_mut().enumerate() {
            if !*gone && !mesh.node(index).is_running() {
                *gone = true;
                eprintln!("{} has ended; the others go on", mesh.nodes()[index].name());
            }
        }
        if gone.iter().all(|gone| *gone) {
            bail!("no node is left");
        }
    }
}

/// Ctrl-C, a request to terminate, or the terminal's end.
struct Interrupt([Signal; 3]);

impl Interrupt {
    fn new() -> Result<Self> {
        let on = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self([on(SignalKind::interrupt())?, on(SignalKind::terminate())?, on(SignalKind::hangup())?]))
    }

    async fn next(&mut self) {
        let [a, b, c] = &mut self.0;
        tokio::select! {
            _ = a.recv() => {}
            _ = b.recv() => {}
            _ = c.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_main_job() {
        let args = Args::try_parse_from(["coel-testnet"]).unwrap();
        let job = args.job();
        assert_eq!((job.nodes, job.percent, job.fault), (3, 70, None));
        assert_eq!(job.question, "What is the capital of France?");
        assert!(job.model.join("config.json").exists());
    }

    #[test]
    fn wrong_usage_is_told_from_help() {
        for wrong in [["--nodes", "0"], ["--budget", "much"], ["--fault", "gremlins"]] {
            let error = Args::try_parse_from(["coel-testnet"].into_iter().chain(wrong)).unwrap_err();
            assert!(error.use_stderr() && error.to_string().contains(wrong[1]), "{error}");
        }
        assert!(!Args::try_parse_from(["coel-testnet", "--help"]).unwrap_err().use_stderr());
    }
}
