//! The bundled model, cut: whole, interrupted, spoilt.

use std::collections::BTreeSet;
use std::fs;

use coel_model::weights::memory::WeightBytes;
use coel_model::weights::slices::PartBlobs;
use coel_model::weights::tensors::Tensors;
use coel_store::{PartEntry, Precision};
use serde_json::Value;

use super::*;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/fixture")
}

/// The bundled model, its weights changed by `change`: header and data of the safetensors file.
fn spoilt(change: impl FnOnce(&mut serde_json::Map<String, Value>, &mut Vec<u8>)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        fs::copy(fixture().join(file), dir.path().join(file)).unwrap();
    }
    let bytes = fs::read(fixture().join("model.safetensors")).unwrap();
    let (length, rest) = bytes.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let (mut header, mut data) = (serde_json::from_slice(header).unwrap(), data.to_vec());
    change(&mut header, &mut data);
    let header = serde_json::to_vec(&header).unwrap();
    let whole = [(header.len() as u64).to_le_bytes().as_slice(), &header, &data].concat();
    fs::write(dir.path().join("model.safetensors"), whole).unwrap();
    dir
}

/// Where a tensor's data begins.
fn start(header: &serde_json::Map<String, Value>, tensor: &str) -> usize {
    header[tensor]["data_offsets"][0].as_u64().unwrap() as usize
}

fn run(dir: &Path, data: &Path, stop_after: Option<usize>) -> Result<(Vec<Part>, Vec<Slices>), CutError> {
    let blobs = Blobs::open(data).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let cut = Cut::new(&checkpoint, &blobs, data)?;
    let asked = std::cell::Cell::new(0);
    let stopped = || {
        asked.set(asked.get() + 1);
        stop_after.is_some_and(|after| asked.get() > after)
    };
    let slices = cut.run(None, &mut |_, done, total| assert!(done <= total), &stopped)?;
    // A blob's entry is what its content hashes to, whether it was kept as a file or by reference.
    for entry in slices.iter().take(2).chain(slices.last()).flat_map(Slices::blobs) {
        let content = blobs.read_verified(entry).unwrap();
        assert_eq!(BlobEntry::of(&content), *entry);
    }
    Ok((cut.parts.clone(), slices))
}

#[test]
fn every_part_has_three_blobs_that_hold_the_same_weights() {
    let data = tempfile::tempdir().unwrap();
    let (parts, slices) = run(&fixture(), data.path(), None).unwrap();
    assert_eq!((parts.len(), slices.len()), (1 + 6 + 1 + 144, 152));
    let blobs = Blobs::open(data.path()).unwrap();
    for (part, slices) in parts.iter().zip(&slices).step_by(29) {
        let read = |precision| {
            let entries = slices.at(precision).unwrap().into_iter();
            let mut read = entries.map(|(_, entry)| WeightBytes::from(blobs.read_verified(entry).unwrap()));
            let blobs = PartBlobs { main: read.next().unwrap(), refine: read.next() };
            Tensors::parse_part(blobs, &part.kind.to_string()).unwrap()
        };
        let names = |tensors: &Tensors| tensors.iter().map(|(name, _)| name.to_owned()).collect::<BTreeSet<_>>();
        let [q4, q8, exact] = Precision::ALL.map(read);
        assert_eq!((names(&q4), names(&q8)), (names(&exact), names(&exact)), "{}", part.kind);
        assert_eq!(exact.data_bytes(), part.data_bytes());
        assert!(q4.data_bytes() < q8.data_bytes() && q8.data_bytes() < exact.data_bytes(), "{}", part.kind);
    }
}

#[test]
fn an_interrupted_import_goes_on_where_it_stopped() {
    let data = tempfile::tempdir().unwrap();
    let stopped = run(&fixture(), data.path(), Some(70));
    assert!(matches!(stopped, Err(CutError::Stopped)), "{:?}", stopped.err());
    // Batches of 32 parts are kept; those after them were not.
    let kept: BTreeSet<_> = files(data.path());
    assert_eq!(kept.len(), 2 * 64);
    assert_eq!(fs::read_dir(data.path().join("partial")).unwrap().count(), 0, "nothing half-finished is left");
    let times = |names: &BTreeSet<PathBuf>| {
        names.iter().map(|name| fs::metadata(name).unwrap().modified().unwrap()).collect::<Vec<_>>()
    };
    let before = times(&kept);
    let (_, resumed) = run(&fixture(), data.path(), None).unwrap();
    assert_eq!(times(&kept), before, "what was kept is not written again");
    let fresh = tempfile::tempdir().unwrap();
    assert_eq!(run(&fixture(), fresh.path(), None).unwrap().1, resumed);
}

/// Files of blobs.
fn files(data: &Path) -> BTreeSet<PathBuf> {
    let folders = fs::read_dir(data.join("blobs")).unwrap().map(|folder| folder.unwrap().path());
    folders.flat_map(|folder| fs::read_dir(folder).unwrap().map(|file| file.unwrap().path())).collect()
}

#[test]
fn a_changed_checkpoint_is_cut_anew() {
    let dir = spoilt(|_, _| ());
    let data = tempfile::tempdir().unwrap();
    let (_, before) = run(dir.path(), data.path(), None).unwrap();
    let weights = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - 2] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let (_, after) = run(dir.path(), data.path(), None).unwrap();
    assert_eq!(before.iter().zip(&after).filter(|(before, after)| before != after).count(), 1);
}

#[test]
fn weights_that_are_no_numbers_are_refused_by_name() {
    const EXPERT: &str = "model.layers.3.mlp.experts.7.up_proj.weight";
    const NORM: &str = "model.layers.2.input_layernorm.weight";
    for tensor in [EXPERT, NORM] {
        let dir = spoilt(|header, data| data[start(header, tensor)..][..2].copy_from_slice(&[0x80, 0x7f]));
        let data = tempfile::tempdir().unwrap();
        let error = run(dir.path(), data.path(), None).unwrap_err().to_string();
        assert!(error.contains(tensor) && error.contains("not a finite number"), "{error}");
    }
}

#[test]
fn weights_beyond_the_slices_are_kept_exactly_only() {
    const EXPERT: &str = "model.layers.5.mlp.experts.23.down_proj.weight";
    // 2^100 in BF16.
    let dir = spoilt(|header, data| data[start(header, EXPERT)..][..2].copy_from_slice(&[0x80, 0x71]));
    let data = tempfile::tempdir().unwrap();
    let (_, slices) = run(dir.path(), data.path(), None).unwrap();
    let without = slices.iter().filter(|slices| slices.base.is_none()).count();
    assert_eq!((without, slices.last().unwrap().base.is_none()), (1, true));

    // An infinity in the next group of the same row, which slicing does not come to any more.
    let dir = spoilt(|header, data| {
        let at = start(header, EXPERT);
        data[at..][..2].copy_from_slice(&[0x80, 0x71]);
        data[at + 2 * 40..][..2].copy_from_slice(&[0x80, 0x7f]);
    });
    let data = tempfile::tempdir().unwrap();
    let error = run(dir.path(), data.path(), None).unwrap_err().to_string();
    assert!(error.contains(EXPERT) && error.contains("row 0, column 40: not a finite number"), "{error}");
}

#[test]
fn a_full_disk_is_told_in_bytes() {
    let full = CutError::Full {
        folder: "/data".into(),
        needed_bytes: 5 << 20,
        free_bytes: 2 << 20,
        missing_bytes: 3 << 20,
        done: 3,
        total: 9,
    };
    let text = full.to_string();
    for part in ["5.0 MiB", "2.0 MiB", "3145728 bytes are missing", "import again", "/data", "3 of 9"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(free_disk_bytes(Path::new("/tmp")).unwrap() > 0);
    assert!(free_disk_bytes(Path::new("/nowhere")).is_err());
}

/// What the mesh would know of these parts.
fn manifest(parts: &[Part], slices: &[Slices]) -> Manifest {
    let trunk = |(part, slices): (&Part, &Slices)| match &part.kind {
        PartKind::Trunk { name } => Some(PartEntry { name: name.clone(), slices: slices.clone() }),
        PartKind::Expert(_) => None,
    };
    let expert = |(part, slices): (&Part, &Slices)| Some((ids::to_store(part.expert()?), slices.clone()));
    Manifest {
        format: coel_store::manifest::FORMAT,
        architecture: "Test".into(),
        files: Vec::new(),
        trunk: parts.iter().zip(slices).filter_map(trunk).collect(),
        experts: parts.iter().zip(slices).filter_map(expert).collect(),
    }
}

#[test]
fn another_model_is_told_by_its_first_bytes() {
    let data = tempfile::tempdir().unwrap();
    let (parts, slices) = run(&fixture(), data.path(), None).unwrap();
    let manifest = manifest(&parts, &slices);
    let empty = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(empty.path()).unwrap();
    let could_be = |dir: &Path, manifest: &Manifest| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        Cut::new(&checkpoint, &blobs, empty.path()).unwrap().could_be(manifest).unwrap()
    };
    assert!(could_be(&fixture(), &manifest));
    const NORM: &str = "model.layers.2.input_layernorm.weight";
    let other = spoilt(|header, data| data[start(header, NORM)] ^= 1);
    assert!(!could_be(other.path(), &manifest));
    let mut fewer = manifest.clone();
    fewer.experts.pop_last();
    assert!(!could_be(&fixture(), &fewer));
    let mut longer = manifest;
    longer.experts.first_entry().unwrap().get_mut().exact.bytes += 1;
    assert!(!could_be(&fixture(), &longer));
    assert_eq!(files(empty.path()).len(), 0);
}

#[test]
fn slices_that_were_fetched_are_not_made_again() {
    let data = tempfile::tempdir().unwrap();
    let (parts, slices) = run(&fixture(), data.path(), None).unwrap();
    let (manifest, from) = (manifest(&parts, &slices), Blobs::open(data.path()).unwrap());
    // All slices but those of the last part came from peers, and the disk has just room for these.
    let node = tempfile::tempdir().unwrap();
    let sliced = |slices: &Slices| [slices.base.clone().unwrap(), slices.refine.clone().unwrap()];
    let bytes = slices.iter().flat_map(sliced).map(|entry| entry.bytes).sum::<u64>();
    let blobs = Blobs::open_within(node.path(), Some(bytes)).unwrap();
    for entry in slices[..parts.len() - 1].iter().flat_map(sliced) {
        blobs.put(&from.read_verified(&entry).unwrap()).unwrap();
    }
    let checkpoint = Checkpoint::open(&fixture()).unwrap();
    let cut = Cut::new(&checkpoint, &blobs, node.path()).unwrap();
    let full = cut.run(None, &mut |_, _, _| (), &|| false).unwrap_err();
    assert!(matches!(full, CutError::OverBudget { .. }), "{full}");
    assert_eq!(cut.run(Some(&manifest), &mut |_, _, _| (), &|| false).unwrap(), slices);
    assert_eq!(blobs.usage().used_bytes, bytes);

    // Slices of other weights are not taken for these.
    let mut other = manifest;
    for slices in other.experts.values_mut() {
        slices.exact = BlobEntry::of(b"other weights");
    }
    let node = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(node.path()).unwrap();
    blobs.put(&from.read_verified(slices.last().unwrap().base.as_ref().unwrap()).unwrap()).unwrap();
    let cut = Cut::new(&checkpoint, &blobs, node.path()).unwrap();
    assert_eq!(cut.run(Some(&other), &mut |_, _, _| (), &|| false).unwrap(), slices);
}
