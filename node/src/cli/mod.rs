//! The commands of `coel`. Data goes to stdout; progress, logs and errors to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.

mod bench;
mod chat;
mod client;
mod folders;
mod local;
mod policies;
mod print;
mod recover;
mod telemetry;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use coel_store::Bounds;

use crate::config::{DataArgs, NodeArgs};
use crate::mesh::admission::invite::Invite;
use crate::runtime::{self, Origin};
use crate::system::end_on_closed_pipe;
use telemetry::LogFormat;

/// One Mixture-of-Experts language model, served by the machines you already have.
#[derive(Debug, Parser)]
#[command(name = "coel", version, arg_required_else_help = true)]
struct Cli {
    /// How log lines on stderr look; RUST_LOG says which are shown.
    #[arg(long, global = true, env = "COEL_LOG_FORMAT", value_enum, default_value_t)]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a node.
    Up {
        /// Create a mesh, with this node as its first member.
        #[arg(long)]
        new: bool,
        #[command(flatten)]
        data: DataArgs,
        #[command(flatten)]
        node: NodeArgs,
    },
    /// Join a mesh by its invite, and serve.
    Join {
        /// The line that `coel invite` printed.
        invite: String,
        #[command(flatten)]
        data: DataArgs,
        #[command(flatten)]
        node: NodeArgs,
    },
    /// Print an invite to this node's mesh. Anyone who has the line can join.
    Invite {
        #[command(flatten)]
        data: DataArgs,
        /// How many nodes may join with it.
        #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
        uses: u32,
        /// How long it is valid: seconds, or with a unit: 90s, 30m, 24h, 7d.
        #[arg(long, default_value = "24h", value_parser = duration)]
        ttl: Duration,
        #[command(flatten)]
        output: Output,
    },
    /// Hand over this node's experts, then leave the mesh. Answers that are being written here may continue for a minute.
    Leave {
        #[command(flatten)]
        data: DataArgs,
    },
    /// Remove a member that is down for good.
    Forget {
        /// Its id or its name, as `coel status` shows them.
        node: String,
        #[command(flatten)]
        data: DataArgs,
    },
    /// Go on with this node alone after the mesh has lost most of its voters for good. The node must be stopped.
    Recover {
        #[command(flatten)]
        data: DataArgs,
        /// Do it, instead of saying what would be done.
        #[arg(long)]
        yes: bool,
    },
    /// Nodes, placement, readiness.
    Status {
        #[command(flatten)]
        data: DataArgs,
        #[command(flatten)]
        output: Output,
    },
    /// Talk to the mesh from the terminal; without a prompt, line by line from stdin.
    Chat {
        /// What to say.
        prompt: Option<String>,
        #[command(flatten)]
        data: DataArgs,
        /// 0 always picks the likeliest token.
        #[arg(long, default_value_t = 0.0)]
        temperature: f32,
        /// Longest answer, in tokens.
        #[arg(long)]
        max_tokens: Option<usize>,
        /// Key, where the node's HTTP wants one.
        #[arg(long, env = "COEL_API_KEY", value_name = "KEY", hide_env_values = true)]
        api_key: Option<String>,
    },
    /// Register and inspect models.
    #[command(subcommand)]
    Model(Model),
    /// Continue a prompt on this machine alone; no node is needed.
    Generate(local::Generate),
    /// Compare a model on this machine with a reference, a text or questions; no node is needed.
    Eval(local::Eval),
    /// Measure prefill and decode on this machine, beside llama.cpp where its programs are given; no node is needed.
    Bench(bench::BenchArgs),
}

#[derive(Debug, Subcommand)]
enum Model {
    /// Register a Hugging Face checkpoint directory with the mesh. Its files are used in place and must stay there.
    Import {
        /// The directory: config.json, *.safetensors, tokenizer.json.
        dir: PathBuf,
        #[command(flatten)]
        data: DataArgs,
        /// Name for requests, any text of up to 128 bytes [default: the directory's name].
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// The mesh's models.
    Ls {
        #[command(flatten)]
        data: DataArgs,
        #[command(flatten)]
        output: Output,
    },
    /// Show or set the precision at which the mesh holds experts. Unless it is set, the mesh chooses the most exact that fits.
    Precision {
        /// `auto`, `q4`, `q8`, `exact`, or bounds such as `q8..` (at least) or `..q8` (at most).
        bounds: Option<Bounds>,
        #[command(flatten)]
        data: DataArgs,
    },
    /// Show what a model directory holds, in bytes per slice, and what of it fits a node.
    Inspect(folders::Inspect),
    /// Make slices of a checkpoint directory, at 4 and 8 bits a weight. Resumes where it was stopped, and replaces damaged slices.
    Slice(folders::Slice),
    /// Make a checkpoint of random weights, for measuring.
    Synth(folders::Synth),
}

/// `--json`, for commands that print data.
#[derive(Debug, Clone, Copy, clap::Args)]
struct Output {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A command that failed: the message, and the exit code.
#[derive(Debug)]
struct Failure {
    message: String,
    code: u8,
}

impl Failure {
    fn usage(message: impl ToString) -> Self {
        Self { message: message.to_string(), code: 2 }
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { message: error.to_string(), code: 1 }
    }
}

/// The whole program.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are not faults; clap knows which stream they belong to.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    match execute(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("coel: {}", failure.message);
            ExitCode::from(failure.code)
        }
    }
}

fn execute(cli: Cli) -> Result<(), Failure> {
    let serves = matches!(cli.command, Command::Up { .. } | Command::Join { .. });
    if !serves {
        end_on_closed_pipe();
    }
    telemetry::init(cli.log_format, if serves { None } else { Some("warn") });
    match cli.command {
        Command::Up { new, data, node } => up(data, node, if new { Origin::New } else { Origin::Existing }),
        Command::Join { invite, data, node } => {
            let invite: Invite = invite.parse().map_err(Failure::usage)?;
            up(data, node, Origin::Join(invite))
        }
        Command::Invite { data, uses, ttl, output } => block_on(client::invite(data, uses, ttl, output)),
        Command::Leave { data } => block_on(client::leave(data)),
        Command::Forget { node, data } => block_on(client::forget(node, data)),
        Command::Recover { data, yes } => block_on(recover::recover(&data.data, yes)),
        Command::Status { data, output } => block_on(client::status(data, output)),
        Command::Chat { prompt, data, temperature, max_tokens, api_key } => {
            block_on(chat::chat(data, prompt, chat::Options { temperature, max_tokens, api_key }))
        }
        Command::Model(Model::Import { dir, data, name, output }) => block_on(client::import(dir, data, name, output)),
        Command::Model(Model::Ls { data, output }) => block_on(client::models(data, output)),
        Command::Model(Model::Precision { bounds, data }) => block_on(client::precision(bounds, data)),
        Command::Model(Model::Inspect(inspect)) => inspect.run(),
        Command::Model(Model::Slice(slice)) => slice.run(),
        Command::Model(Model::Synth(synth)) => synth.run(),
        Command::Generate(generate) => generate.run(),
        Command::Eval(eval) => eval.run(),
        Command::Bench(bench) => bench.run(),
    }
}

fn up(data: DataArgs, node: NodeArgs, origin: Origin) -> Result<(), Failure> {
    let config = node.resolve(&data.data).map_err(Failure::usage)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // The compute thread does the work; these threads only move bytes.
        .worker_threads(2)
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(runtime::run(config, origin, |node| {
        eprintln!("{} is up: {} ({})", node.name, node.api, node.peer_id);
    }));
    // Blocking file work that is still running must not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(2));
    outcome.map_err(Failure::from)
}

fn block_on(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(command)
}

fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim() {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return Err(format!("'{unit}' is not a unit of time; write s, m, h or d")),
    };
    let number: u64 = number.parse().map_err(|_| "write a number and a unit, e.g. 24h".to_owned())?;
    number.checked_mul(factor).map(Duration::from_secs).ok_or_else(|| "too long".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn times_are_read_with_their_unit() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("30m", 1800), ("24h", 86400), ("7d", 604_800)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["", "h", "1y", "-1h", "99999999999999999999d"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
