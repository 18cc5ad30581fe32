//! The bundled checkpoint, and batches driven without an engine.

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
};

use coel_model::{
    kernels::{DeviceExpert, DeviceWork, DynKernels},
    nn::{
        batch::{CHUNK_ROWS, SequenceChunk, Step, Want},
        expert_call::{ExpertCall, by_expert},
        forward::{ForwardContext, KvCache},
        outputs::LayerOutputs,
        trunk::{Trunk, expert_weights},
    },
    weights::{
        checkpoint::Checkpoint,
        layout::{self, ExpertId},
        tensors::Tensors,
    },
};

pub fn fixture() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fixture"))
}

pub fn checkpoint() -> Checkpoint {
    Checkpoint::open(&fixture()).expect("the bundled checkpoint opens")
}

/// A whole model on one kernel class, its experts served in place.
pub struct Whole {
    pub kernels: Box<dyn DynKernels>,
    pub trunk: Trunk,
    pub cache: KvCache,
    page_tokens: usize,
    /// Pages that no sequence has had yet. They are dealt from both ends, so that consecutive pages of a sequence are
    /// rarely adjacent.
    pages: VecDeque<u32>,
    experts: BTreeMap<ExpertId, DeviceExpert>,
}

/// A sequence with pages of its own.
#[derive(Clone, Debug)]
pub struct Solo {
    pub used: usize,
    pub pages: Vec<u32>,
}

impl Solo {
    /// A chunk of the sequence's next tokens.
    pub fn chunk(&self, tokens: &[u32], want: Want) -> SequenceChunk {
        SequenceChunk { tokens: tokens.to_vec(), past: self.used, pages: self.pages.clone(), want }
    }
}

impl Whole {
    pub fn new(kernels: impl DynKernels + 'static, checkpoint: &Checkpoint) -> Self {
        Self::with_pages(kernels, checkpoint, 32)
    }

    /// With a cache of 4096 tokens on pages of this size.
    pub fn with_pages(kernels: impl DynKernels + 'static, checkpoint: &Checkpoint, page_tokens: usize) -> Self {
        Self::build(kernels, checkpoint, page_tokens, checkpoint.trunk(), |id| checkpoint.expert(id))
    }

    pub fn from_tensors(
        kernels: impl DynKernels + 'static,
        checkpoint: &Checkpoint,
        trunk: Tensors,
        expert: impl Fn(ExpertId) -> Tensors,
    ) -> Self {
        Self::build(kernels, checkpoint, 32, trunk, expert)
    }

    fn build(
        kernels: impl DynKernels + 'static,
        checkpoint: &Checkpoint,
        page_tokens: usize,
        trunk: Tensors,
        expert: impl Fn(ExpertId) -> Tensors,
    ) -> Self {
        let config = checkpoint.config();
        let kernels: Box<dyn DynKernels> = Box::new(kernels);
        let trunk = Trunk::load(&*kernels, config.clone(), &trunk).expect("the trunk loads");
        let experts = layout::experts(config)
            .map(|id| (id, kernels.expert(expert_weights(config, id, &expert(id)).expect("the expert loads"))));
        let experts = experts.collect();
        let pages = 4096 / page_tokens;
        let cache = KvCache::new(&*kernels, config, pages, page_tokens);
        Self { experts, cache, page_tokens, pages: (0..pages as u32).collect(), kernels, trunk }
    }

    /// A sequence with room for `capacity` tokens and perhaps a few more.
    pub fn solo(&mut self, capacity: usize) -> Solo {
        let take = |index| if index % 2 == 0 { self.pages.pop_back() } else { self.pages.pop_front() };
        let pages = (0..capacity.div_ceil(self.page_tokens)).map(take);
        Solo { used: 0, pages: pages.collect::<Option<_>>().expect("pages are left") }
    }

    pub fn context(&mut self) -> ForwardContext<'_> {
        ForwardContext { kernels: &mut *self.kernels, trunk: &self.trunk, cache: &mut self.cache }
    }

    pub fn serve(&mut self, call: &ExpertCall) -> Vec<f32> {
        let mut outputs = vec![f32::NAN; call.slots() * call.hidden];
        let input = self.kernels.upload(call.rows.clone(), call.hidden);
        for (index, pairs) in by_expert(&call.routes) {
            let expert = &self.experts[&ExpertId { layer: call.layer, index }];
            let rows: Vec<u32> = pairs.iter().map(|pair| pair.row).collect();
            let output = self.kernels.experts(&input, &[DeviceWork { expert, rows: &rows }]);
            let output = self.kernels.download(output);
            for (pair, row) in pairs.iter().zip(output.chunks_exact(call.hidden)) {
                outputs[pair.slot as usize * call.hidden..][..call.hidden].copy_from_slice(row);
            }
        }
        outputs
    }

    /// Computes the logits of several chunks together, and shows each call to `seen`.
    pub fn compute(&mut self, chunks: Vec<SequenceChunk>, mut seen: impl FnMut(&ExpertCall)) -> Vec<Vec<f32>> {
        let (mut batch, mut step) = self.context().begin(chunks).expect("valid chunks");
        loop {
            match step {
                Step::Logits(logits) => return logits,
                Step::NeedExperts => {
                    let call = self.context().call(&batch);
                    seen(&call);
                    let outputs = LayerOutputs::whole(self.serve(&call), call.hidden);
                    step = self.context().resume(&mut batch, outputs).expect("outputs of the right length");
                }
            }
        }
    }

    /// Advances one sequence alone, in batches as large as allowed.
    pub fn advance(
        &mut self,
        solo: &mut Solo,
        tokens: &[u32],
        want: Want,
        mut seen: impl FnMut(&ExpertCall),
    ) -> Vec<f32> {
        let mut logits = Vec::new();
        for chunk in tokens.chunks(CHUNK_ROWS) {
            let mut computed = self.compute(vec![solo.chunk(chunk, want)], &mut seen);
            solo.used += chunk.len();
            match want {
                Want::All => logits.append(&mut computed[0]),
                _ => logits = computed.remove(0),
            }
        }
        logits
    }
}
