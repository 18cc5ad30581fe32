//! Parts as blobs: ordinary safetensors files that give back the model.

use std::{collections::BTreeSet, fs};

use coel_model::{
    bytes::WeightBytes,
    checkpoint::Checkpoint,
    decoder::Want,
    footprint::Footprint,
    kernels::packed::Packed,
    layout::{self, ExpertId},
    parts::{Part, PartKind, parts},
    tensors::Tensors,
};
use safetensors::SafeTensors;

use crate::whole::{Whole, checkpoint};

/// What another machine would store.
fn blob(part: &Part, checkpoint: &Checkpoint) -> Vec<u8> {
    let mut blob = part.header();
    for tensor in &part.tensors {
        let file = fs::read(&checkpoint.weight_files()[tensor.file]).unwrap();
        blob.extend_from_slice(&file[tensor.offset as usize..(tensor.offset + tensor.bytes) as usize]);
    }
    blob
}

#[test]
fn parts_cover_every_tensor_once() {
    let checkpoint = checkpoint();
    let parts = parts(&checkpoint);
    let names: Vec<&str> = parts.iter().flat_map(|part| &part.tensors).map(|tensor| tensor.name.as_str()).collect();
    let distinct: BTreeSet<&str> = names.iter().copied().collect();
    let all: BTreeSet<&str> = checkpoint.tensors().iter().map(|(name, _)| name).collect();
    assert_eq!((names.len(), &distinct), (all.len(), &all));
    // embeddings, 6 layers, head, 6 x 24 experts
    assert_eq!(parts.len(), 1 + 6 + 1 + 144);
    let experts: Vec<ExpertId> = parts.iter().filter_map(Part::expert).collect();
    assert!(experts.iter().copied().eq(layout::experts(checkpoint.config())));

    let footprint = Footprint::of(checkpoint.config(), checkpoint.config().dtype);
    let trunk = parts.iter().filter(|part| matches!(part.kind, PartKind::Trunk { .. }));
    assert_eq!(trunk.map(Part::data_bytes).sum::<u64>(), footprint.trunk_bytes);
    assert!(
        parts.iter().filter(|part| part.expert().is_some()).all(|part| part.data_bytes() == footprint.expert_bytes)
    );
    assert_eq!(footprint.kv_bytes_per_token, 2 * 6 * 256 * 4);
}

#[test]
fn blobs_are_safetensors_files_that_give_the_same_logits() {
    let checkpoint = checkpoint();
    let parts = parts(&checkpoint);
    let mut trunk = Vec::new();
    let mut experts = std::collections::BTreeMap::new();
    for part in parts.iter().filter(|part| part.expert().is_none_or(|id| id.layer < 2 || id.index % 3 == 0)) {
        let bytes = blob(part, &checkpoint);
        let header = part.header();
        assert_eq!(header.len() % 64, 0, "data is aligned");
        assert_eq!(header, part.clone().header(), "the same every time");
        let foreign = SafeTensors::deserialize(&bytes).expect("another reader reads it");
        assert_eq!(foreign.len(), part.tensors.len());
        let tensors = Tensors::parse(WeightBytes::from(bytes), "blob").unwrap();
        match part.expert() {
            Some(id) => drop(experts.insert(id, tensors)),
            None => trunk.push(tensors),
        }
    }
    let expert = |id: ExpertId| experts.get(&id).cloned().unwrap_or_else(|| checkpoint.expert(id));
    let trunk = Tensors::merge(trunk).unwrap();
    let mut from_blobs = Whole::from_tensors(Packed::default(), &checkpoint, trunk, expert);
    let mut in_place = Whole::new(Packed::default(), &checkpoint);
    let tokens = [5, 17, 300, 4000, 9];
    let mut solo = from_blobs.solo(8);
    let logits = from_blobs.advance(&mut solo, &tokens, Want::All, |_| {});
    let mut solo = in_place.solo(8);
    assert!(logits == in_place.advance(&mut solo, &tokens, Want::All, |_| {}));
}
