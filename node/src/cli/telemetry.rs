//! Logs: `tracing` to stderr, as text or JSON. Data goes to stdout and is printed by the commands, never from here.

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// What is logged where `RUST_LOG` says nothing: what coel does, and what goes wrong below it.
const DEFAULT_FILTER: &str =
    "warn,coel=info,coel_node=info,coel_gossip=info,coel_store=info,coel_model=info,openraft=off";

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, for collectors.
    Json,
}

/// Starts logging. A second call changes nothing, so tests may all ask for it.
pub fn init(format: LogFormat, default_filter: Option<&str>) {
    let filter = || match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => EnvFilter::new(text),
        _ => EnvFilter::new(default_filter.unwrap_or(DEFAULT_FILTER)),
    };
    let subscriber = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter());
    let _ = match format {
        LogFormat::Text => subscriber.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        LogFormat::Json => subscriber.json().try_init(),
    };
}
