//! The bundled checkpoint, and a decoder driven without an engine.

use std::{collections::BTreeMap, path::PathBuf};

use coel_model::{
    checkpoint::Checkpoint,
    decoder::{Core, Decoder, Step, Want},
    experts::{Assembly, ExpertCall},
    kernels::{ExpertWork, Gated, Kernels, download},
    layout::{self, ExpertId},
    tensors::Tensors,
    trunk::{Trunk, load_expert},
};

pub fn fixture() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fixture"))
}

pub fn checkpoint() -> Checkpoint {
    Checkpoint::open(&fixture()).expect("the bundled checkpoint opens")
}

/// A whole model on one kernel class, its experts served in place.
pub struct Whole<K: Kernels> {
    pub kernels: K,
    pub trunk: Trunk<K>,
    experts: BTreeMap<ExpertId, Gated<K::Matrix>>,
}

impl<K: Kernels> Whole<K> {
    pub fn new(kernels: K, checkpoint: &Checkpoint) -> Self {
        Self::from_tensors(kernels, checkpoint, checkpoint.trunk(), |id| checkpoint.expert(id))
    }

    pub fn from_tensors(
        kernels: K,
        checkpoint: &Checkpoint,
        trunk: Tensors,
        expert: impl Fn(ExpertId) -> Tensors,
    ) -> Self {
        let config = checkpoint.config();
        let trunk = Trunk::load(&kernels, config.clone(), &trunk).expect("the trunk loads");
        let experts = layout::experts(config)
            .map(|id| (id, load_expert(&kernels, config, id, &expert(id)).expect("the expert loads")));
        Self { experts: experts.collect(), kernels, trunk }
    }

    pub fn decoder(&self, capacity: usize) -> Decoder<K> {
        Decoder::new(&self.kernels, &self.trunk, capacity)
    }

    pub fn core(&mut self) -> Core<'_, K> {
        Core { kernels: &mut self.kernels, trunk: &self.trunk }
    }

    pub fn serve(&mut self, call: &ExpertCall) -> Vec<f32> {
        let mut assembly = Assembly::new(call);
        let input = self.kernels.upload(call.rows.clone(), call.hidden);
        for (index, rows) in call.by_expert() {
            let expert = &self.experts[&ExpertId { layer: call.layer, index }];
            let output = download(self.kernels.experts(&input, &[ExpertWork { expert, rows: &rows }]));
            assembly.put(index, &rows, &output).expect("the call's own rows");
        }
        assembly.finish().expect("every slot was served")
    }

    /// Advances to the logits, collecting each call.
    pub fn advance(
        &mut self,
        decoder: &mut Decoder<K>,
        tokens: &[u32],
        want: Want,
        mut seen: impl FnMut(&ExpertCall),
    ) -> Vec<f32> {
        let mut step = decoder.advance(&mut self.core(), tokens, want).expect("valid tokens");
        loop {
            match step {
                Step::Logits(logits) => return logits,
                Step::NeedExperts(call) => {
                    seen(&call);
                    let outputs = self.serve(&call);
                    step = decoder.resume(&mut self.core(), &outputs).expect("outputs of the right length");
                }
            }
        }
    }
}
