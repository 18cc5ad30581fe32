//! A model without tensors: sizes to place by, and experts whose output is a hash of their input.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use coel_model::weights::config::ModelConfig;
use coel_node::budget::{ModelSizes, Offer};
use coel_node::placement::ModelFacts;
use coel_store::manifest::FORMAT;
use coel_store::{
    BlobEntry, BlobId, Bounds, Command, ExpertId, Manifest, Model, ModelId, PartEntry, Precision, Slices,
};

/// Which model.
pub const MODEL: ModelId = ModelId([7; 32]);
/// Layers with experts.
pub const LAYERS: u16 = 2;
/// Experts in each.
pub const EXPERTS: u16 = 4;
const EXACT_BYTES: u64 = 160;

fn experts() -> impl Iterator<Item = ExpertId> {
    (0..LAYERS).flat_map(|layer| (0..EXPERTS).map(move |index| ExpertId::new(layer, index)))
}

/// What every node knows of the model.
pub fn facts() -> ModelFacts {
    static FACTS: OnceLock<ModelFacts> = OnceLock::new();
    FACTS.get_or_init(make_facts).clone()
}

fn make_facts() -> ModelFacts {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/fixture");
    let config = std::fs::read_to_string(dir.join("config.json")).expect("the bundled model's configuration");
    let config = ModelConfig::parse(&config).expect("a configuration");
    let blob = |name: String, bytes| BlobEntry { id: BlobId::of(name.as_bytes()), bytes, chunks: Vec::new() };
    let slices = |name: &str, [exact, base, refine]: [u64; 3]| Slices {
        exact: blob(format!("{name} exact"), exact),
        base: Some(blob(format!("{name} base"), base)),
        refine: Some(blob(format!("{name} refine"), refine)),
    };
    let manifest = Manifest {
        format: FORMAT,
        architecture: "simulated".into(),
        files: Vec::new(),
        trunk: vec![PartEntry { name: "head".into(), slices: slices("head", [1000, 300, 200]) }],
        experts: experts().map(|id| (id, slices(&id.to_string(), [EXACT_BYTES, 50, 40]))).collect(),
    };
    let sizes = ModelSizes::of_manifest(&manifest, 10, &config);
    ModelFacts { id: MODEL, manifest: Arc::new(manifest), sizes: Arc::new(sizes) }
}

/// What registers it.
pub fn registration() -> Command {
    let popularity = vec![vec![1; usize::from(EXPERTS)]; usize::from(LAYERS)];
    let model = Model { name: "simulated".into(), manifest_bytes: 10, popularity, ..Model::default() };
    Command::RegisterModel { id: MODEL, model }
}

/// What a node with room for so many exact experts offers.
pub fn offer(room: u64) -> Arc<Offer> {
    let sizes = &facts().sizes;
    Arc::new(Offer {
        memory_bytes: sizes.fixed_bytes(16, Precision::Exact) + room * EXACT_BYTES,
        kv_tokens: 16,
        accepts: Bounds::AUTO,
        trunk: Some(Precision::Exact),
        complete_models: vec![MODEL],
        ..Offer::default()
    })
}

/// What a node holds.
pub type Held = BTreeMap<ExpertId, Precision>;
