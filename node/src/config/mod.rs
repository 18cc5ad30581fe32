//! A node's configuration: defaults, then `coel.toml` in the data folder, then `COEL_*`, then flags; checked once, trusted
//! from then on.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use coel_gossip::Multiaddr;
use coel_model::serve::device::Device;
use coel_store::Bounds;
use serde::Deserialize;

use crate::{http, system};

mod size;

pub use size::{BadSize, Size};

/// Name of the configuration file in the data folder.
pub const FILE_NAME: &str = "coel.toml";
/// Share of the machine's memory that a node takes by default.
const MEMORY_SHARE: f64 = 0.75;
/// Default KV cache of a node in tokens: enough for a few chats, small beside the experts.
pub const KV_TOKENS: usize = 4096;
/// Longest name of a node, in bytes. Admission refuses a longer one.
pub const NAME_BYTES_MAX: usize = 64;

/// `--data DIR`, which every command takes that runs or talks to a node.
#[derive(Debug, Clone, Args)]
pub struct DataArgs {
    /// Data folder of the node.
    #[arg(long, env = "COEL_DATA", value_name = "DIR", default_value_os_t = default_data())]
    pub data: PathBuf,
}

fn default_data() -> PathBuf {
    let under_home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/share"));
    let base = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from).or_else(under_home);
    base.unwrap_or_else(|| PathBuf::from(".")).join("coel")
}

/// What `coel up` and `coel join` take. The same names, with `_` for `-`, are the keys of `coel.toml`.
#[derive(Debug, Clone, Default, Args, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case", default)]
pub struct NodeArgs {
    /// Where to listen for peers [default: TCP and QUIC on port 4600 of every interface].
    #[arg(long, env = "COEL_LISTEN", value_name = "MULTIADDR", value_delimiter = ',')]
    pub listen: Vec<Multiaddr>,
    /// Where to serve HTTP; an address other than loopback requires an API key [default: 127.0.0.1:4680].
    #[arg(long, env = "COEL_API", value_name = "ADDR")]
    pub api: Option<SocketAddr>,
    /// Key that HTTP clients must send as `Authorization: Bearer KEY`.
    #[arg(long, env = "COEL_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// A peer to connect to, besides those found on the LAN and in the log.
    #[arg(long = "peer", env = "COEL_PEER", value_name = "MULTIADDR", value_delimiter = ',')]
    pub peer: Vec<Multiaddr>,
    /// Memory for models: trunk, experts, KV cache and buffers [default: three quarters of the machine's].
    #[arg(long, env = "COEL_MEMORY", value_name = "SIZE")]
    #[serde(deserialize_with = "size")]
    pub memory: Option<Size>,
    /// Memory of the GPU for models, where `--device` is one. With `--memory` as well, experts that do not fit the GPU are kept in that
    /// much of the machine's memory, and computed there or moved to the GPU [default: as --memory, without offload].
    #[arg(long, env = "COEL_VRAM", value_name = "SIZE")]
    #[serde(deserialize_with = "size")]
    pub vram: Option<Size>,
    /// Disk for weights. Only with it may this node be assigned more experts than its memory holds; those are read from disk when
    /// they are needed. The checkpoint of a model that was imported here does not count [default: no bound, and no paging].
    #[arg(long, env = "COEL_DISK", value_name = "SIZE")]
    #[serde(deserialize_with = "size")]
    pub disk: Option<Size>,
    /// Tokens of KV cache this node keeps for the requests it takes [default: 4096; where the model's context
    /// is short, at most as many contexts as requests run at once].
    #[arg(long, env = "COEL_KV_TOKENS", value_name = "N")]
    pub kv_tokens: Option<usize>,
    /// The precision at which this node accepts experts: `auto`, `q4`, `q8`, `exact`, or bounds such as `q8..` or `..q8` [default: auto].
    #[arg(long, env = "COEL_PRECISION", value_name = "PRECISION")]
    pub precision: Option<Bounds>,
    /// The precision at which this node holds the trunk, likewise; of several, the most exact that leaves room for its share of the
    /// experts [default: auto].
    #[arg(long, env = "COEL_TRUNK", value_name = "PRECISION")]
    pub trunk: Option<Bounds>,
    /// `auto`, `cpu`, `cuda:N` or `vulkan:N`.
    #[arg(long, env = "COEL_DEVICE", value_name = "DEVICE")]
    pub device: Option<String>,
    /// Name of the node, for people [default: the host's name].
    #[arg(long, env = "COEL_NAME", value_name = "NAME")]
    pub name: Option<String>,
    /// Find peers on the LAN by mDNS [default: true].
    #[arg(long, env = "COEL_MDNS", value_name = "BOOL")]
    pub mdns: Option<bool>,
}

/// Sizes are written as text with a unit, or as a number of bytes.
fn size<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Size>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Text(String),
        Bytes(u64),
    }
    match Option::<Written>::deserialize(deserializer)? {
        None => Ok(None),
        Some(Written::Bytes(bytes)) => Ok(Some(Size(bytes))),
        Some(Written::Text(text)) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Data folder, absolute.
    pub data: PathBuf,
    /// Where to listen for peers.
    pub listen: Vec<Multiaddr>,
    /// Where to serve HTTP.
    pub api: SocketAddr,
    /// Key for HTTP.
    pub api_key: Option<String>,
    /// Given peers.
    pub peers: Vec<Multiaddr>,
    /// What it may take, and how exactly it holds weights.
    pub limits: Limits,
    /// Where to compute.
    pub device: Device,
    /// Name of the node.
    pub name: String,
    /// Whether to look for peers on the LAN.
    pub mdns: bool,
}

/// What a node may take for models, and at which precisions it accepts weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Memory for models in bytes: of the machine, of a GPU, or of both together.
    pub memory_bytes: u64,
    /// Of these bytes, those on a GPU, where `--vram` was given.
    pub vram_bytes: Option<u64>,
    /// Of these bytes, those of the machine that hold what does not fit the GPU, where `--vram` and `--memory` were both given.
    pub offload_bytes: Option<u64>,
    /// Bytes of weights in the data folder; `None` for no bound.
    pub disk_bytes: Option<u64>,
    /// KV cache in tokens.
    pub kv_tokens: usize,
    /// At which precisions experts are accepted.
    pub experts: Bounds,
    /// At which precisions the trunk is accepted.
    pub trunk: Bounds,
}

impl Limits {
    /// Where trunk, KV cache and buffers must fit: the flag, and its bytes.
    pub fn fixed_budget(&self) -> (&'static str, u64) {
        match self.vram_bytes {
            Some(vram) if self.offload_bytes.is_some() || vram == self.memory_bytes => ("--vram", vram),
            _ => ("--memory", self.memory_bytes),
        }
    }
}

/// A configuration that cannot be run, with the values at fault.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// `coel.toml` is no such file.
    #[error("{}: {message}", .path.display())]
    File { path: PathBuf, message: String },
    /// A value that is not one.
    #[error("{0}")]
    Value(String),
    /// HTTP beyond this machine without a key.
    #[error(transparent)]
    Bind(#[from] http::BindRefused),
}

impl NodeArgs {
    /// These values where they are given, `below` where they are not.
    fn over(self, below: Self) -> Self {
        let or = |above: Vec<Multiaddr>, below: Vec<Multiaddr>| if above.is_empty() { below } else { above };
        Self {
            listen: or(self.listen, below.listen),
            api: self.api.or(below.api),
            api_key: self.api_key.or(below.api_key),
            peer: or(self.peer, below.peer),
            memory: self.memory.or(below.memory),
            vram: self.vram.or(below.vram),
            disk: self.disk.or(below.disk),
            kv_tokens: self.kv_tokens.or(below.kv_tokens),
            precision: self.precision.or(below.precision),
            trunk: self.trunk.or(below.trunk),
            device: self.device.or(below.device),
            name: self.name.or(below.name),
            mdns: self.mdns.or(below.mdns),
        }
    }

    fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let fault = |message: String| ConfigError::File { path: path.to_owned(), message };
        match std::fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text).map_err(|error| fault(error.to_string())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(fault(error.to_string())),
        }
    }

    /// The configuration on `data`: the file there, then these arguments (which clap has already put over `COEL_*`).
    ///
    /// # Errors
    /// [`ConfigError`] names the file or the value.
    pub fn resolve(self, data: &Path) -> Result<Config, ConfigError> {
        let data = std::path::absolute(data).map_err(|error| ConfigError::Value(format!("--data: {error}")))?;
        let args = self.over(Self::from_file(&data.join(FILE_NAME))?);
        let config = Config {
            listen: if args.listen.is_empty() { default_listen() } else { args.listen },
            api: args.api.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 4680))),
            api_key: args.api_key,
            peers: args.peer,
            limits: Limits {
                // With a GPU's memory alone, all that the engine holds lies there.
                memory_bytes: match (args.memory, args.vram) {
                    (Some(memory), Some(vram)) => memory.0.saturating_add(vram.0),
                    (Some(memory), None) => memory.0,
                    (None, Some(vram)) => default_memory().min(vram.0),
                    (None, None) => default_memory(),
                },
                vram_bytes: args.vram.map(|size| size.0),
                offload_bytes: args.memory.filter(|_| args.vram.is_some()).map(|size| size.0),
                disk_bytes: args.disk.map(|size| size.0),
                kv_tokens: args.kv_tokens.unwrap_or(KV_TOKENS),
                experts: args.precision.unwrap_or_default(),
                trunk: args.trunk.unwrap_or_default(),
            },
            device: args
                .device
                .as_deref()
                .unwrap_or("auto")
                .parse()
                .map_err(|error| ConfigError::Value(format!("--device: {error}")))?,
            name: args.name.unwrap_or_else(system::host_name),
            mdns: args.mdns.unwrap_or(true),
            data,
        };
        config.validate()?;
        Ok(config)
    }
}

impl Config {
    fn validate(&self) -> Result<(), ConfigError> {
        let fault = |message: String| Err(ConfigError::Value(message));
        http::check_bind(self.api, self.api_key.as_deref())?;
        if self.name.is_empty() || self.name.len() > NAME_BYTES_MAX || self.name.chars().any(char::is_control) {
            return fault(format!("--name {:?}: 1 to {NAME_BYTES_MAX} bytes, no control characters", self.name));
        }
        if self.limits.kv_tokens == 0 {
            return fault("--kv-tokens 0: a node that takes requests needs at least one token of KV cache".into());
        }
        if let (Some(vram), Device::Cpu) = (self.limits.vram_bytes, self.device) {
            return fault(format!(
                "--vram {} and --device cpu: a CPU has no memory of its own; leave --vram out, or name a GPU with --device",
                Size(vram)
            ));
        }
        if self.limits.disk_bytes == Some(0) {
            return fault("--disk 0: no weights could be kept; leave it out for no bound, or give a size".into());
        }
        if self.api_key.as_deref().is_some_and(str::is_empty) {
            return fault("--api-key: empty; leave it out or give a key".into());
        }
        Ok(())
    }
}

fn default_listen() -> Vec<Multiaddr> {
    let addresses = ["/ip4/0.0.0.0/tcp/4600", "/ip4/0.0.0.0/udp/4600/quic-v1"];
    addresses.iter().map(|address| address.parse().expect("constant addresses are well-formed")).collect()
}

fn default_memory() -> u64 {
    (system::physical_memory_bytes() as f64 * MEMORY_SHARE) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(file: &str, args: NodeArgs) -> Result<Config, ConfigError> {
        let data = tempfile::tempdir().unwrap();
        std::fs::write(data.path().join(FILE_NAME), file).unwrap();
        args.resolve(data.path())
    }

    #[test]
    fn flags_go_over_the_file_and_the_file_over_defaults() {
        let flags = NodeArgs { name: Some("flag".into()), ..NodeArgs::default() };
        let file = "name = 'file'\nmemory = '70MiB'\ndisk = '2GiB'\nkv_tokens = 128\ntrunk = '..q8'";
        let config = resolve(file, flags).unwrap();
        assert_eq!(
            (config.name.as_str(), config.limits.memory_bytes, config.limits.kv_tokens),
            ("flag", 70 << 20, 128)
        );
        assert_eq!((config.limits.disk_bytes, config.limits.vram_bytes), (Some(2 << 30), None));
        assert_eq!((config.limits.experts, config.limits.trunk.to_string().as_str()), (Bounds::AUTO, "..q8"));
        assert_eq!(config.api.to_string(), "127.0.0.1:4680");
    }

    #[test]
    fn the_file_is_checked_to_the_key_and_the_value() {
        let error = resolve("memmory = '70MiB'", NodeArgs::default()).unwrap_err().to_string();
        assert!(error.contains("coel.toml") && error.contains("memmory"), "{error}");
        let error = resolve("memory = 'much'", NodeArgs::default()).unwrap_err().to_string();
        assert!(error.contains("'much' is not a size"), "{error}");
        let error = resolve("precision = 'q5'", NodeArgs::default()).unwrap_err().to_string();
        assert!(error.contains("q5") && error.contains("q4, q8, exact"), "{error}");
    }

    #[test]
    fn http_beyond_this_machine_wants_a_key() {
        let open = NodeArgs { api: Some("0.0.0.0:4680".parse().unwrap()), ..NodeArgs::default() };
        let error = resolve("", open.clone()).unwrap_err().to_string();
        assert!(error.contains("0.0.0.0:4680") && error.contains("--api-key"), "{error}");
        assert!(resolve("", NodeArgs { api_key: Some("secret".into()), ..open }).is_ok());
    }

    #[test]
    fn values_out_of_range_are_named() {
        for (args, named) in [
            (NodeArgs { name: Some(String::new()), ..NodeArgs::default() }, "--name"),
            (NodeArgs { kv_tokens: Some(0), ..NodeArgs::default() }, "--kv-tokens"),
            (NodeArgs { device: Some("tpu".into()), ..NodeArgs::default() }, "--device"),
            (NodeArgs { api_key: Some(String::new()), ..NodeArgs::default() }, "--api-key"),
            (NodeArgs { disk: Some(Size(0)), ..NodeArgs::default() }, "--disk"),
        ] {
            let error = resolve("", args).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn values_that_conflict_are_both_named() {
        let vram =
            |device: &str| resolve("vram = '4GiB'", NodeArgs { device: Some(device.into()), ..NodeArgs::default() });
        let error = vram("cpu").unwrap_err().to_string();
        assert!(error.contains("--vram 4") && error.contains("--device cpu"), "{error}");
        assert_eq!(vram("cuda:0").unwrap().limits.vram_bytes, Some(4 << 30));
    }

    #[test]
    fn a_gpus_memory_is_all_there_is_unless_the_machines_is_given_too() {
        let config = resolve("vram = '1MiB'", NodeArgs::default()).unwrap();
        assert_eq!((config.limits.memory_bytes, config.limits.offload_bytes), (1 << 20, None));
        assert_eq!(config.limits.fixed_budget(), ("--vram", 1 << 20));
        let config = resolve("vram = '1MiB'\nmemory = '3MiB'", NodeArgs::default()).unwrap();
        assert_eq!((config.limits.memory_bytes, config.limits.offload_bytes), (4 << 20, Some(3 << 20)));
        assert_eq!(config.limits.fixed_budget(), ("--vram", 1 << 20));
        let config = resolve("memory = '3MiB'", NodeArgs::default()).unwrap();
        assert_eq!((config.limits.memory_bytes, config.limits.offload_bytes), (3 << 20, None));
    }
}
