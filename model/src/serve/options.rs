//! How an engine is set up.

use crate::{nn::batch::CHUNK_ROWS, offload::predict::Predictor, serve::pages::PAGE_TOKENS};

/// How an engine is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Tokens of KV cache all sessions together may reserve; rounded up to whole pages.
    pub kv_tokens: usize,
    /// Tokens of a page. It changes no result.
    pub page_tokens: usize,
    /// Most rows of one expert call; a larger one is refused.
    pub rows_max: usize,
    /// Threads that compute, where the device is the CPU, or the CPU takes part; 0 means one for each core this process may use.
    pub threads: usize,
    /// Run the compute thread below the priority of everything that answers in time.
    pub low_priority: bool,
    /// Bytes of a GPU's memory that experts may take; the others stay in host memory, where the CPU computes them unless
    /// they are worth moving. `None` puts all on the GPU. It means nothing where the device is the CPU.
    pub device_expert_bytes: Option<u64>,
    /// Memory that experts on disk take by turns, bytes; at 0 none can be kept on disk. `Engine::set_disk_cache_bytes`
    /// changes it.
    pub disk_cache_bytes: u64,
    /// Threads that read experts from disk.
    pub readers: usize,
    /// How the experts of the next layer are predicted.
    pub predictor: Predictor,
    /// Predict for all rows and count how well, also where nothing is on disk.
    pub measure_recall: bool,
}

/// Reading threads by default. Disks that are at their best with more are given more by whoever knows them.
const READERS: usize = 2;

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            kv_tokens: 4096,
            page_tokens: PAGE_TOKENS,
            rows_max: CHUNK_ROWS,
            threads: 0,
            low_priority: false,
            device_expert_bytes: None,
            disk_cache_bytes: 0,
            readers: READERS,
            predictor: Predictor::default(),
            measure_recall: false,
        }
    }
}
