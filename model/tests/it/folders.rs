//! Model folders: slices on disk, resumed and damaged; random checkpoints; what fits where.

use std::{fs, io, path::Path};

use coel_model::{
    budget::inventory::Inventory,
    nn::batch::Want,
    serve::{device::Device, engine::block_on},
    tools::{
        generate::{LocalError, LocalModel, LocalOptions},
        synth::{SynthError, SynthSpec},
    },
    weights::{
        checkpoint::Checkpoint,
        error::LoadError,
        folder::ModelFolder,
        layout,
        matrix::DType,
        parts::parts,
        slices::Precision,
        slicing::{Material, ReadAt, SlicingError, slice_checkpoint, sliced_folder::SlicedFolder, write_slices},
        tensors::Tensors,
    },
};
use half::bf16;
use serde_json::{Value, json};

use crate::{
    synth,
    whole::{checkpoint, fixture},
};

const SLICED: [Precision; 2] = [Precision::Q4, Precision::Q8];

/// A small checkpoint whose matrices have column counts that can be sliced.
fn small(seed: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let changes = json!({
        "hidden_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96, "head_dim": 16
    });
    synth::write_checkpoint(dir.path(), &synth::config(changes), DType::BF16, seed);
    dir
}

fn check_names(error: impl std::error::Error, words: &[&str]) {
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "{message:?} does not name {word:?}");
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[track_caller]
fn assert_same(left: &Tensors, right: &Tensors) {
    assert_eq!(left.len(), right.len());
    for ((name, left), (other, right)) in left.iter().zip(right.iter()) {
        assert_eq!((name, left.element, &left.shape), (other, right.element, &right.shape));
        assert!(left.bytes.as_slice() == right.bytes.as_slice(), "{name}");
        let refine =
            |view: &coel_model::weights::tensors::TensorView| view.refine.as_ref().map(|r| r.as_slice().to_vec());
        assert!(refine(left) == refine(right), "{name}");
    }
}

#[test]
fn a_sliced_folder_gives_what_slicing_while_loading_gives() {
    let (from, out) = (small(5), tempfile::tempdir().unwrap());
    let mut seen = Vec::new();
    slice_checkpoint(from.path(), out.path(), |done, total| seen.push((done, total))).unwrap();
    let total =
        ModelFolder::open(from.path()).unwrap().trunk(Precision::Exact).unwrap().data_bytes() + 10 * 3 * 2 * 64 * 32;
    assert!(seen.is_sorted() && seen.last() == Some(&(total, total)), "{seen:?}");
    let (checkpoint, sliced) = (ModelFolder::open(from.path()).unwrap(), ModelFolder::open(out.path()).unwrap());
    assert!(matches!((&checkpoint, &sliced), (ModelFolder::Checkpoint(_), ModelFolder::Sliced(_))));
    for precision in SLICED {
        assert_same(&sliced.trunk(precision).unwrap(), &checkpoint.trunk(precision).unwrap());
        for id in layout::experts(checkpoint.config()) {
            let expert = sliced.expert(id, precision).unwrap();
            assert_same(&expert, &checkpoint.expert(id, precision).unwrap());
            assert_eq!((expert.len(), expert.precision()), (3, precision));
            assert!(expert.iter().all(|(_, view)| view.bytes.is_mapped() && view.offset.is_multiple_of(64)));
        }
    }
    check_names(sliced.trunk(Precision::Exact).unwrap_err(), &["slices", "--precision q8", "checkpoint"]);
    assert_eq!(names(out.path()).len(), 2 * (1 + 2 + 1 + 10) + 2);
}

#[test]
fn the_bundled_model_speaks_at_every_precision() {
    let out = tempfile::tempdir().unwrap();
    slice_checkpoint(&fixture(), out.path(), |_, _| {}).unwrap();
    let refused = LocalModel::open(out.path(), Device::Cpu).err().unwrap();
    assert!(matches!(refused, LocalError::Load(LoadError::NoExact { .. })), "{refused}");
    let logits = |dir: &Path, trunk, experts| {
        let model = LocalModel::open_with(
            dir,
            &LocalOptions { device: Device::Cpu, trunk, experts, ..LocalOptions::default() },
        )
        .unwrap();
        assert!(model.engine.held().values().all(|held| *held == experts));
        let mut session = model.engine.open_session(8).unwrap();
        block_on(session.advance(&[5, 17, 300, 4000, 9], Want::All)).unwrap().logits
    };
    let exact = logits(&fixture(), Precision::Exact, Precision::Exact);
    let distance = |found: &[f32]| exact.iter().zip(found).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    let mut last = f64::MAX;
    for (trunk, experts) in
        [(Precision::Q4, Precision::Q4), (Precision::Q8, Precision::Q4), (Precision::Q8, Precision::Q8)]
    {
        let found = logits(&fixture(), trunk, experts);
        assert!(found == logits(out.path(), trunk, experts), "{trunk} {experts}");
        assert!(distance(&found) < last, "{trunk} {experts}: {} after {last}", distance(&found));
        last = distance(&found);
    }
}

/// A source that fails after `left` reads.
struct Failing<'a> {
    files: &'a [fs::File],
    left: std::cell::Cell<usize>,
}

impl ReadAt for Failing<'_> {
    fn read_at(&self, file: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.left.set(self.left.get().checked_sub(1).ok_or(io::ErrorKind::ConnectionReset)?);
        self.files.read_at(file, offset, into)
    }
}

#[test]
fn slicing_goes_on_where_it_stopped() {
    let (from, whole, out) = (small(5), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    slice_checkpoint(from.path(), whole.path(), |_, _| {}).unwrap();
    let checkpoint = Checkpoint::open(from.path()).unwrap();
    let parts = parts(&checkpoint);
    let files = [fs::File::open(&checkpoint.weight_files()[0]).unwrap()];
    let config = fs::read(from.path().join("config.json")).unwrap();
    let run = |reads: usize, origin: Value| {
        let source = Failing { files: &files, left: reads.into() };
        let files = vec![("config.json".to_owned(), config.clone())];
        write_slices(&Material { parts: &parts, source: &source, files, origin }, out.path(), |_, _| {})
    };
    let mut runs = 0;
    let mut finished = Vec::new();
    while let Err(error) = run(40, json!("a")) {
        check_names(error, &["cannot be read: connection reset"]);
        let found = names(out.path());
        assert!(found.iter().all(|name| !name.ends_with(".partial") && name != "slices.json"), "{found:?}");
        assert!(!SlicedFolder::is_one(out.path()) && found.len() > finished.len(), "each run gets on");
        (runs, finished) = (runs + 1, found);
    }
    assert!(runs > 1);
    for name in names(whole.path()) {
        let read = |dir: &Path| fs::read(dir.join(&name)).unwrap();
        assert!(read(whole.path()) == read(out.path()), "{name}");
    }
    assert_eq!(names(whole.path()), names(out.path()));
    run(usize::MAX, json!("a")).unwrap();
    assert_eq!(names(whole.path()), names(out.path()), "it is complete");

    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("slicing.json"), "\"b\"").unwrap();
    check_names(slice_checkpoint(from.path(), other.path(), |_, _| {}).unwrap_err(), &["something else"]);
    check_names(slice_checkpoint(from.path(), from.path(), |_, _| {}).unwrap_err(), &["holds another model already"]);
}

#[test]
fn what_is_damaged_of_a_complete_folder_is_made_again() {
    let (from, whole, out) = (small(5), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for out in [&whole, &out] {
        slice_checkpoint(from.path(), out.path(), |_, _| {}).unwrap();
    }
    let path = |name: &str| out.path().join(name);
    let [flipped, short] = ["layer.1.expert.2.refine.safetensors", "layer.0.base.safetensors"];
    flip(&path(flipped));
    fs::write(path(short), b"short").unwrap();
    let [gone, config] = ["layer.0.expert.3.base.safetensors", "config.json"];
    fs::remove_file(path(gone)).unwrap();
    // Another checkpoint of this shape repairs nothing and damages nothing.
    let before = fs::read(path(flipped)).unwrap();
    check_names(slice_checkpoint(small(6).path(), out.path(), |_, _| {}).unwrap_err(), &["another model"]);
    assert!(fs::read(path(flipped)).unwrap() == before && !path(gone).exists());

    fs::remove_file(path(config)).unwrap();
    slice_checkpoint(from.path(), out.path(), |_, _| {}).unwrap();
    assert_eq!(names(whole.path()), names(out.path()));
    for name in names(whole.path()) {
        assert!(fs::read(whole.path().join(&name)).unwrap() == fs::read(path(&name)).unwrap(), "{name}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_nothing_half_done() {
    let (from, out) = (small(5), tempfile::tempdir().unwrap());
    for name in ["layer.1.base.safetensors", "layer.1.expert.2.refine.safetensors", "config.json", "slices.json"] {
        // Every write to this path fails, as on a full disk.
        std::os::unix::fs::symlink("/dev/full", out.path().join(format!("{name}.partial"))).unwrap();
        let error = slice_checkpoint(from.path(), out.path(), |_, _| {}).unwrap_err();
        assert!(matches!(error, SlicingError::Full { .. }), "{error}");
        check_names(error, &["disk is full", name, "of 14 parts", "same command again"]);
        assert!(!out.path().join(name).exists() && names(out.path()).iter().all(|name| !name.ends_with(".partial")));
        assert!(!SlicedFolder::is_one(out.path()));
    }
    slice_checkpoint(from.path(), out.path(), |_, _| {}).unwrap();
    SlicedFolder::open(out.path()).unwrap();
}

/// Replaces a file with another one, in which one bit of the last byte is flipped.
fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 0x10;
    fs::write(path.with_extension("new"), bytes).unwrap();
    fs::rename(path.with_extension("new"), path).unwrap();
}

#[test]
fn a_flipped_bit_in_a_slice_is_found() {
    let (from, out) = (small(5), tempfile::tempdir().unwrap());
    slice_checkpoint(from.path(), out.path(), |_, _| {}).unwrap();
    let folder = SlicedFolder::open(out.path()).unwrap();
    let [q4, q8] = SLICED;
    folder.verify(q8, q8).unwrap();
    let name = "layer.1.expert.2.refine.safetensors";
    flip(&out.path().join(name));
    folder.verify(q8, q4).unwrap(); // does not read the refine slice
    check_names(folder.verify(q8, q8).unwrap_err(), &[name, "slice the checkpoint again into"]);
}

#[test]
fn a_file_damaged_while_slicing_was_interrupted_is_made_again() {
    let (from, whole, out) = (small(5), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    slice_checkpoint(from.path(), whole.path(), |_, _| {}).unwrap();
    // The head's file is the last one.
    std::os::unix::fs::symlink("/dev/full", out.path().join("head.base.safetensors.partial")).unwrap();
    slice_checkpoint(from.path(), out.path(), |_, _| {}).unwrap_err();
    let name = "layer.1.base.safetensors";
    flip(&out.path().join(name));
    slice_checkpoint(from.path(), out.path(), |_, _| {}).unwrap();
    assert!(fs::read(out.path().join(name)).unwrap() == fs::read(whole.path().join(name)).unwrap());
    assert_eq!(names(whole.path()), names(out.path()));
}

#[test]
fn damaged_folders_are_named() {
    let (from, out) = (small(5), tempfile::tempdir().unwrap());
    slice_checkpoint(from.path(), out.path(), |_, _| {}).unwrap();
    let path = |name: &str| out.path().join(name);
    let with = |name: &str, contents: &[u8], words: &[&str]| {
        let whole = fs::read(path(name)).unwrap();
        fs::write(path(name), contents).unwrap();
        check_names(SlicedFolder::open(out.path()).unwrap_err(), words);
        fs::write(path(name), whole).unwrap();
    };
    let listed = fs::read_to_string(path("slices.json")).unwrap();
    let change = |from: &str, to: &str| {
        assert!(listed.contains(from));
        listed.replacen(from, to, 1).into_bytes()
    };
    with("slices.json", b"{", &["slices.json", "slice the checkpoint again"]);
    with("slices.json", &change("\"format\": \"3\"", "\"format\": \"9\""), &["format \"9\""]);
    with("slices.json", &change("\"head\"", "\"tail\""), &["lacks the part head"]);
    with("slices.json", &change("head.base.safetensors", "../head.base.safetensors"), &["leads out"]);
    with("slices.json", &change("head.base.safetensors", "/etc/passwd"), &["leads out"]);
    with("slices.json", &change("head.base.safetensors", "not.there"), &["not.there"]);
    let expert = "layer.0.expert.3.refine.safetensors";
    let whole = fs::read(path(expert)).unwrap();
    with(expert, &whole[1..], &[expert, "bytes and should have", "coel model slice"]);
    fs::rename(path(expert), path("away")).unwrap();
    check_names(SlicedFolder::open(out.path()).unwrap_err(), &[expert, "missing", "coel model slice"]);
    fs::rename(path("away"), path(expert)).unwrap();

    // A file of the right length, but of another part.
    fs::copy(path("layer.0.expert.4.refine.safetensors"), path(expert)).unwrap();
    let folder = SlicedFolder::open(out.path()).unwrap();
    let id = layout::ExpertId { layer: 0, index: 3 };
    check_names(folder.expert(id, Precision::Q8).unwrap_err(), &["refine slice", "only the refine slice has tensor"]);
    assert!(folder.expert(id, Precision::Q4).is_ok());
}

#[test]
fn what_cannot_be_sliced_is_refused_when_loading_too() {
    let dir = tempfile::tempdir().unwrap();
    synth::write_checkpoint(dir.path(), &synth::config(json!({})), DType::BF16, 1);
    let folder = ModelFolder::open(dir.path()).unwrap();
    check_names(folder.trunk(Precision::Q8).unwrap_err(), &["model.safetensors", "52 columns", "exact"]);
    let out = tempfile::tempdir().unwrap();
    let error = slice_checkpoint(dir.path(), out.path(), |_, _| {}).unwrap_err();
    check_names(error, &["embeddings", "model.embed_tokens.weight", "52 columns"]);
    let inventory = Inventory::of(&folder);
    assert_eq!((inventory.experts.base, inventory.trunk.at(Precision::Q8)), (None, None));
    assert_eq!(inventory.fits(u64::MAX, 0).len(), 1, "only the exact trunk");
}

#[test]
fn random_checkpoints_are_the_same_for_the_same_seed() {
    let like = fixture().display().to_string();
    let make = |layers: Option<usize>, seed| {
        let dir = tempfile::tempdir().unwrap();
        let recipe = SynthSpec::new(&like, layers, seed).unwrap();
        recipe.write(dir.path(), |_, _| {}).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(recipe.weight_bytes(), checkpoint.tensors().data_bytes());
        (dir, checkpoint)
    };
    let ((dir, two), (again, _), (_one_dir, one)) = (make(Some(2), 7), make(Some(2), 7), make(Some(1), 7));
    for name in names(dir.path()) {
        assert!(fs::read(dir.path().join(&name)).unwrap() == fs::read(again.path().join(&name)).unwrap(), "{name}");
    }
    for (name, view) in one.tensors().iter() {
        let twin = two.tensors().get(name).unwrap();
        assert!(view.bytes.as_slice() == twin.bytes.as_slice(), "{name}");
        let values: Vec<f64> =
            view.bytes.as_slice().as_chunks::<2>().0.iter().map(|raw| bf16::from_le_bytes(*raw).to_f64()).collect();
        let n = values.len() as f64;
        let (mean, square) = (values.iter().sum::<f64>() / n, values.iter().map(|v| v * v).sum::<f64>() / n);
        match name.contains("norm") {
            true => assert!(values.iter().all(|value| *value == 1.0), "{name}"),
            false => {
                assert!(mean.abs() < 0.1 / n.sqrt(), "{name}: {mean}");
                assert!((square.sqrt() / 0.02 - 1.0).abs() < 4.0 / (2.0 * n).sqrt(), "{name}: {}", square.sqrt());
            }
        }
    }
    let tensor =
        |checkpoint: &Checkpoint, name: &str| checkpoint.tensors().get(name).unwrap().bytes.as_slice().to_vec();
    let (_other_dir, other) = make(Some(1), 8);
    let name = "model.layers.0.mlp.experts.3.up_proj.weight";
    assert!(tensor(&one, name) != tensor(&other, name));
    assert!(tensor(&one, name) != tensor(&one, "model.layers.0.mlp.experts.4.up_proj.weight"));
    check_names(SynthSpec::new(&like, None, 0).unwrap().write(dir.path(), |_, _| {}).unwrap_err(), &["holds a model"]);
    assert!(matches!(SynthSpec::new("gpt-5", None, 0), Err(SynthError::Unknown(_))));
}

#[test]
fn random_slices_are_the_slices_of_the_random_checkpoint() {
    let recipe = SynthSpec::new(&fixture().display().to_string(), Some(1), 3).unwrap();
    let [exact, sliced, direct] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
    recipe.write(exact.path(), |_, _| {}).unwrap();
    slice_checkpoint(exact.path(), sliced.path(), |_, _| {}).unwrap();
    recipe.write_sliced(direct.path(), |_, _| {}).unwrap();
    for name in names(sliced.path()) {
        let read = |dir: &Path| fs::read(dir.join(&name)).unwrap();
        assert!(read(sliced.path()) == read(direct.path()), "{name}");
    }
    let model = LocalModel::open_with(
        direct.path(),
        &LocalOptions { device: Device::Cpu, trunk: Precision::Q8, experts: Precision::Q4, ..LocalOptions::default() },
    )
    .unwrap();
    assert_eq!(model.engine.held().len(), 24);
}

#[test]
fn the_named_shape_is_the_published_one() {
    let recipe = SynthSpec::new("qwen1.5-moe-a2.7b", None, 0).unwrap();
    assert_eq!(recipe.weight_bytes(), 2 * 14_315_784_192, "parameters as published");
    let quarter = SynthSpec::new("qwen1.5-moe-a2.7b", Some(6), 0).unwrap();
    assert_eq!(quarter.config().experts_total(), 360);
    assert_eq!(quarter.config().vocab_size, 151_936);
}

#[test]
fn an_inventory_counts_what_an_engine_would() {
    let folder = ModelFolder::Checkpoint(checkpoint());
    let inventory = Inventory::of(&folder);
    assert_eq!((inventory.experts_total, inventory.expert.exact), (144, 3 * 96 * 256 * 2));
    let weights = 144 * 3 * 96 * 256u64;
    assert_eq!(inventory.experts.exact, 2 * weights);
    let headers = inventory.experts.base.unwrap() - weights * 9 / 16;
    assert!((144 * 64..144 * 1024).contains(&headers), "headers aside, 4.5 bits a weight: {headers}");

    let out = tempfile::tempdir().unwrap();
    slice_checkpoint(&fixture(), out.path(), |_, _| {}).unwrap();
    let sliced = Inventory::of(&ModelFolder::open(out.path()).unwrap());
    assert_eq!(sliced, Inventory { has_exact: false, ..inventory.clone() });

    // A budget for the Q8 trunk and ten experts at Q4.
    let fixed =
        inventory.trunk.at(Precision::Q8).unwrap() + 100 * inventory.kv_bytes_per_token + inventory.buffer_bytes;
    let fits = inventory.fits(fixed + 10 * inventory.expert.base.unwrap(), 100);
    assert_eq!((fits.len(), fits[1].fixed_bytes, fits[1].experts[0]), (3, fixed, Some(10)));
    assert_eq!(
        fits[1].experts[2],
        Some(10 * inventory.expert.base.unwrap() as usize / inventory.expert.exact as usize)
    );
    assert_eq!(fits[2].experts, [None; 3], "the exact trunk alone is too much");
    assert!(fits[0].experts[0].unwrap() > 10);
    assert_eq!(inventory.fits(1 << 40, 0)[0].experts, [Some(144); 3]);
}

#[test]
fn words_for_precisions() {
    for precision in Precision::ALL {
        assert_eq!(precision.name().parse(), Ok(precision));
    }
    check_names("q5".parse::<Precision>().unwrap_err(), &["q5", "q4, q8 or exact"]);
}
