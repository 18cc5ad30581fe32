//! A whole model on one machine.
//!
//! Owns [`LocalModel`]: a model folder, its text side and an engine that holds all of it. Without a memory budget, or
//! where everything fits it, weights are used in place. Otherwise the trunk is read into memory of this process's own,
//! and experts stay on disk and take what is left of the budget by turns. With a budget of a device's memory, experts that do
//! not fit it stay in host memory, and on disk if that is too small. The invariant: what is loaded and reserved,
//! with what the process had before, is no more than the budgets. It answers nothing by itself.

use std::path::Path;

use crate::{
    budget::{
        fit::{DeviceTooSmall, Fit, HostFit, Needs, TooSmall},
        footprint::Footprint,
        inventory::Inventory,
    },
    serve::{
        device::Device,
        engine::{Engine, EngineError, EngineOptions, block_on},
        pages::PAGE_TOKENS,
    },
    system::{machine_bytes, resident_bytes},
    text::{
        model::{TextError, TextModel},
        sequence::SequenceError,
    },
};
use coel_weights::{
    config::ModelConfig,
    error::LoadError,
    folder::ModelFolder,
    layout::{self, ExpertId},
    memory::PAGE,
    slices::Precision,
    tensors::Tensors,
};

/// Why a local model cannot be opened or cannot answer.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Sequence(#[from] SequenceError),
    #[error(transparent)]
    TooSmall(#[from] TooSmall),
    #[error(transparent)]
    DeviceTooSmall(#[from] DeviceTooSmall),
    #[error(
        "memory of a GPU was bounded (--vram), but the model is computed on the CPU; name a GPU with --device, or leave it out"
    )]
    NoDevice,
    #[error("a KV cache of {tokens} tokens takes {bytes} bytes, and this machine has {machine}; ask for fewer tokens")]
    Pool { tokens: usize, bytes: u64, machine: u64 },
    #[error(
        "not all experts fit into {budget} bytes of memory, and those of a checkpoint can be read from disk only as they \
         are there; slice it first (coel model slice), or compute with --precision exact"
    )]
    NotSliced { budget: u64 },
    #[error(
        "{budget} bytes of memory are too few to slice this checkpoint on the way, which takes {least}, and what is made on the way cannot \
         stay on disk; give more (--memory), slice it first (coel model slice), or compute with --precision exact"
    )]
    Slicing { budget: u64, least: u64 },
}

/// A whole model on this machine.
#[derive(Clone)]
pub struct LocalModel {
    pub engine: Engine,
    pub text: TextModel,
}

/// How a local model is opened.
#[derive(Clone, Debug)]
pub struct LocalOptions {
    pub device: Device,
    pub trunk: Precision,
    pub experts: Precision,
    /// Threads that compute; 0 takes all cores.
    pub threads: usize,
    /// Tokens of KV cache; one full context if not given.
    pub kv_tokens: Option<usize>,
    /// Bytes of memory the process may take; experts that do not fit stay on disk.
    pub memory: Option<u64>,
    /// Bytes of a GPU's memory to take; experts that do not fit lie in host memory. Then `memory` bounds that alone.
    pub vram: Option<u64>,
    /// Threads that read experts from disk; 0 takes the engine's default.
    pub readers: usize,
    /// Count for all rows how well the next layer's experts are predicted, also where none is on disk.
    pub measure_recall: bool,
}

impl Default for LocalOptions {
    fn default() -> Self {
        let exact = Precision::Exact;
        Self {
            device: Device::Auto,
            trunk: exact,
            experts: exact,
            threads: 0,
            kv_tokens: None,
            memory: None,
            vram: None,
            readers: 0,
            measure_recall: false,
        }
    }
}

impl LocalModel {
    /// Opens a checkpoint folder and loads all of it as it is, with all cores. See [`open_with`](Self::open_with).
    pub fn open(dir: &Path, device: Device) -> Result<Self, LocalError> {
        Self::open_with(dir, &LocalOptions { device, ..LocalOptions::default() })
    }

    /// Opens a model folder and loads all of it. Weights are used in place where the device computes in this memory and
    /// the folder has them in that form; those of a checkpoint are sliced on the way.
    pub fn open_with(dir: &Path, options: &LocalOptions) -> Result<Self, LocalError> {
        let folder = ModelFolder::open(dir)?;
        folder.verify(options.trunk, options.experts)?;
        let config = folder.config().clone();
        let text = TextModel::from_paths(&config, folder.files())?;
        let process = resident_bytes();
        if let Some(budget) = options.memory {
            check_slicing(&folder, process, options, budget)?;
        }
        let trunk = folder.trunk(options.trunk)?;
        let mut engine_options = EngineOptions {
            kv_tokens: options.kv_tokens.unwrap_or(config.max_position_embeddings),
            threads: options.threads,
            measure_recall: options.measure_recall,
            ..EngineOptions::default()
        };
        check_pool(&config, engine_options.kv_tokens)?;
        if options.readers > 0 {
            engine_options.readers = options.readers;
        }
        let needs = || needs(&folder, &trunk, process, options.experts, engine_options.kv_tokens);
        if let Some(vram) = options.vram {
            return Self::open_on_device(&folder, text, options, vram, &trunk, needs(), engine_options);
        }
        let fit = match options.memory {
            None => Fit::All,
            Some(budget) => needs().fit(budget)?,
        };
        if let Fit::DiskOffload { experts, .. } = fit {
            engine_options.disk_cache_bytes = experts;
        }
        let engine = Engine::start(options.device, config.clone(), engine_options)?;
        match fit {
            Fit::All => {
                block_on(engine.load_trunk_tensors(trunk))?;
                for id in layout::experts(&config) {
                    block_on(engine.load_expert_tensors(id, folder.expert(id, options.experts)?))?;
                }
            }
            Fit::DiskOffload { embedding_on_disk, .. } => {
                load_trunk(&engine, owned(&trunk, embedding_on_disk)?, embedding_on_disk)?;
                load_all_on_disk(&engine, &folder, options)?;
            }
        }
        Ok(Self { engine, text })
    }

    /// The same on a device that may take `vram` bytes of its own memory.
    fn open_on_device(
        folder: &ModelFolder,
        text: TextModel,
        options: &LocalOptions,
        vram: u64,
        trunk: &Tensors,
        needs: Needs,
        mut engine_options: EngineOptions,
    ) -> Result<Self, LocalError> {
        if options.device.resolve().map_err(EngineError::from)? == Device::Cpu {
            return Err(LocalError::NoDevice);
        }
        let device_experts = needs.fit_device(vram)?;
        // Where everything fits the GPU, nothing is offloaded.
        engine_options.device_expert_bytes = (device_experts < needs.experts).then_some(device_experts);
        let engine = Engine::start(options.device, folder.config().clone(), engine_options)?;
        if engine.device() == Device::Cpu {
            return Err(LocalError::NoDevice);
        }
        // Drivers take memory of the process too.
        let needs = Needs { process: resident_bytes(), ..needs };
        let HostFit { disk_cache, embedding_on_disk } = match options.memory {
            None => HostFit { disk_cache: None, embedding_on_disk: false },
            Some(budget) => needs.fit_host(budget, device_experts)?,
        };
        load_trunk(&engine, trunk.clone(), embedding_on_disk)?;
        let rest = trunk.iter().filter(|(name, _)| *name != layout::EMBED || embedding_on_disk);
        rest.for_each(|(_, view)| view.release());
        match disk_cache {
            None => {
                for id in layout::experts(folder.config()) {
                    let tensors = folder.expert(id, options.experts)?;
                    block_on(engine.load_expert_tensors(id, tensors.clone()))?;
                    if device_experts >= needs.experts {
                        tensors.release();
                    }
                }
            }
            Some(bytes) => {
                block_on(engine.set_disk_cache_bytes(bytes))?;
                load_all_on_disk(&engine, folder, options)?;
            }
        }
        Ok(Self { engine, text })
    }

    /// Holds one expert at another precision from now on, as `folder` has it.
    pub fn hold(&self, folder: &ModelFolder, id: ExpertId, precision: Precision) -> Result<(), LocalError> {
        Ok(block_on(self.engine.load_expert_tensors(id, folder.expert(id, precision)?))?)
    }
}

fn load_trunk(engine: &Engine, trunk: Tensors, embedding_on_disk: bool) -> Result<(), EngineError> {
    match embedding_on_disk {
        true => block_on(engine.load_trunk_without_embedding(trunk)),
        false => block_on(engine.load_trunk_tensors(trunk)),
    }
}

fn load_all_on_disk(engine: &Engine, folder: &ModelFolder, options: &LocalOptions) -> Result<(), LocalError> {
    let budget = options.memory.unwrap_or_default();
    for id in layout::experts(folder.config()) {
        let tensors = folder.expert_on_disk(id, options.experts)?.ok_or(LocalError::NotSliced { budget })?;
        block_on(engine.load_expert_tensors_on_disk(id, tensors))?;
    }
    Ok(())
}

/// Refuses a KV cache that this machine cannot hold, before it is allocated.
fn check_pool(config: &ModelConfig, tokens: usize) -> Result<(), LocalError> {
    let each = Footprint::of(config, config.dtype).kv_bytes_per_token;
    let (bytes, machine) = (each.saturating_mul(tokens as u64), machine_bytes());
    if bytes > machine { Err(LocalError::Pool { tokens, bytes, machine }) } else { Ok(()) }
}

/// Refuses what would not fit when a checkpoint is sliced on the way, before anything of it is read. Slices that are made so are
/// nowhere on disk, so they must all have room, and with them the weights that are being sliced.
fn check_slicing(folder: &ModelFolder, process: u64, options: &LocalOptions, budget: u64) -> Result<(), LocalError> {
    let are_made = |precision: Precision| precision != Precision::Exact && matches!(folder, ModelFolder::Checkpoint(_));
    let (config, inventory) = (folder.config(), Inventory::of(folder));
    let kv_tokens = options.kv_tokens.unwrap_or(config.max_position_embeddings);
    check_pool(config, kv_tokens)?;
    // What cannot be sliced is refused, by its name, when it is.
    let trunk = inventory.trunk.at(options.trunk).unwrap_or_default();
    let mut least = 0;
    if are_made(options.trunk) {
        let elements = |spec: &layout::TensorSpec| spec.shape.iter().map(|side| *side as u64).product::<u64>();
        let largest = layout::trunk(config).iter().map(elements).max().unwrap_or(0) * config.dtype.size() as u64;
        least = process + trunk + largest;
    }
    // Beside a GPU only what does not fit the GPU has to have room.
    if are_made(options.experts) && options.vram.is_none() {
        let whole = Needs { trunk, ..needs(folder, &Tensors::default(), process, options.experts, kv_tokens) };
        whole.fit(budget)?;
        least =
            least.max(whole.process + whole.trunk + whole.kv + whole.buffers + whole.experts + inventory.expert.exact);
    }
    if least > budget { Err(LocalError::Slicing { budget, least }) } else { Ok(()) }
}

/// What the model takes, where `trunk` is loaded.
fn needs(folder: &ModelFolder, trunk: &Tensors, process: u64, experts: Precision, kv_tokens: usize) -> Needs {
    let (config, inventory): (&ModelConfig, _) = (folder.config(), Inventory::of(folder));
    let table = trunk.get(layout::EMBED);
    let tied = config.tie_word_embeddings;
    let on_disk = table.filter(|table| table.bytes.is_mapped() && !tied).map_or(0, |table| table.data_bytes());
    let table = table.map_or(0, |table| table.data_bytes());
    // An expert is read in whole pages, and may lie in three places.
    let whole_pages = |bytes: u64| bytes + 3 * 2 * PAGE as u64;
    Needs {
        process,
        trunk: trunk.data_bytes(),
        embedding: on_disk,
        table,
        device_trunk: trunk.data_bytes() - if tied { 0 } else { table },
        kv: inventory.kv_bytes_per_token * kv_tokens.next_multiple_of(PAGE_TOKENS) as u64,
        buffers: inventory.buffer_bytes,
        // What cannot be held like that is refused when it is loaded.
        experts: inventory.experts.at(experts).unwrap_or_default(),
        expert: whole_pages(inventory.expert.at(experts).unwrap_or_default()),
        // While one row's experts are computed, those of another batch are read.
        experts_least: 2 * config.num_experts_per_tok,
    }
}

/// The same tensors in this process's own memory, but for the embedding table if it stays where it is.
fn owned(trunk: &Tensors, but_embedding: bool) -> Result<Tensors, LoadError> {
    trunk.moved(|name, bytes| {
        if but_embedding && name == layout::EMBED {
            return Ok(bytes.clone());
        }
        let file = || bytes.place().map_or(name.to_owned(), |place| place.file.display().to_string());
        bytes.owned().map_err(|source| LoadError::Io { file: file(), source })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sliced_on_the_way_is_refused_before_it_is_read() {
        let folder = ModelFolder::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixture")).unwrap();
        let options = |trunk, experts| LocalOptions { trunk, experts, kv_tokens: Some(512), ..LocalOptions::default() };
        let check = |options: &LocalOptions, budget| check_slicing(&folder, 1000, options, budget);
        let q4 = options(Precision::Q4, Precision::Q4);
        let short = check(&q4, 1).unwrap_err();
        let LocalError::TooSmall(TooSmall { least, .. }) = short else { panic!("{short}") };
        let message = short.to_string();
        assert!(message.contains("--memory") && !message.contains("q4") && !message.contains("context"), "{message}");

        // By turns they would fit, but what is made on the way is nowhere to be read from.
        let refused = check(&q4, least).unwrap_err();
        assert!(refused.to_string().contains("coel model slice"), "{refused}");
        let LocalError::Slicing { least: whole, .. } = refused else { panic!("{refused}") };
        assert!(check(&q4, whole - 1).is_err() && check(&q4, whole).is_ok());
        let inventory = Inventory::of(&folder);
        let held = [inventory.trunk, inventory.experts].map(|bytes| bytes.at(Precision::Q4).unwrap());
        assert!(whole > held.iter().sum::<u64>() + inventory.expert.exact);
        // Exact experts may stay on disk; then the trunk and its largest matrix have to fit.
        let mixed = options(Precision::Q4, Precision::Exact);
        let table = folder.trunk(Precision::Exact).unwrap().get(layout::EMBED).unwrap().data_bytes();
        assert!(check(&mixed, 1000 + held[0] + table).is_ok() && check(&mixed, 999 + held[0] + table).is_err());
        assert!(check(&options(Precision::Exact, Precision::Exact), 1).is_ok(), "nothing is made");
    }
}
