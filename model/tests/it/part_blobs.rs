//! Parts as blobs: ordinary safetensors files that together give back the model.

use std::{collections::BTreeSet, fs};

use coel_model::{
    budget::footprint::Footprint,
    kernels::cpu::CpuKernels,
    nn::batch::Want,
    weights::{
        checkpoint::Checkpoint,
        layout::{self, ExpertId},
        memory::WeightBytes,
        parts::{Part, PartKind, parts},
        slicing::{ReadAt, part_slices::write_part},
        tensors::Tensors,
    },
};
use safetensors::SafeTensors;

use crate::whole::{Whole, checkpoint};

/// The blob that another machine would store.
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
    let mut from_blobs = Whole::from_tensors(CpuKernels::default(), &checkpoint, trunk, expert);
    let mut in_place = Whole::new(CpuKernels::default(), &checkpoint);
    let tokens = [5, 17, 300, 4000, 9];
    let mut solo = from_blobs.solo(8);
    let logits = from_blobs.advance(&mut solo, &tokens, Want::All, |_| {});
    let mut solo = in_place.solo(8);
    assert!(logits == in_place.advance(&mut solo, &tokens, Want::All, |_| {}));
}

/// The part's base and refine blobs.
fn sliced(part: &Part, source: &(impl ReadAt + ?Sized)) -> (Vec<u8>, Vec<u8>) {
    let (mut base, mut refine) = (Vec::new(), Vec::new());
    write_part(part, source, &mut base, &mut refine).unwrap();
    (base, refine)
}

#[test]
fn an_exact_blob_gives_its_part_and_its_slices_again() {
    let checkpoint = checkpoint();
    let files: Vec<_> = checkpoint.weight_files().iter().map(|path| fs::File::open(path).unwrap()).collect();
    for part in parts(&checkpoint).iter().step_by(13) {
        let bytes = blob(part, &checkpoint);
        let read = |bytes: &[u8], offset: u64, into: &mut [u8]| {
            let from = bytes.get(offset as usize..).and_then(|bytes| bytes.get(..into.len()));
            from.map(|from| into.copy_from_slice(from)).ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
        };
        let of = |bytes: &[u8]| Part::of_blob(part.kind.clone(), bytes.len() as u64, |at, into| read(bytes, at, into));
        let found = of(&bytes).unwrap();
        let shapes =
            |part: &Part| part.tensors.iter().map(|t| (t.name.clone(), t.dtype, t.shape.clone())).collect::<Vec<_>>();
        assert_eq!((shapes(&found), found.header()), (shapes(part), part.header()));
        let of_blob = sliced(&found, &[WeightBytes::from(bytes.clone())][..]);
        assert!(of_blob == sliced(part, &files[..]));

        // Anything else is refused: shorter, longer, another header, a slice.
        assert!(
            of(&bytes[..bytes.len() - 1]).is_err()
                && of(&bytes[..7]).is_err()
                && of(&[&bytes[..], &[0]].concat()).is_err()
        );
        assert!(of(&of_blob.0).is_err(), "a base slice");
        let mut endless = bytes.clone();
        endless[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(of(&endless).is_err());
        let mut respelled = bytes;
        let space = respelled.iter().position(|byte| *byte == b'}').unwrap();
        respelled[space - 1] ^= 1;
        assert!(of(&respelled).is_err());
    }
}
