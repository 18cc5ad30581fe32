//! Registers a checkpoint directory with the mesh: cuts it into blobs, references them in place, counts popularity, and
//! tells the log.
//!
//! Nothing is registered before everything is checked, so a bad checkpoint leaves no trace in the mesh. The weights are not
//! copied: they stay in the checkpoint's files, which must stay where they are.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use coel_model::checkpoint::Checkpoint;
use coel_model::device::Device;
use coel_model::engine::block_on;
use coel_model::generate::LocalModel;
use coel_model::parts::{Part, PartKind, parts};
use coel_model::popularity::{CALIBRATION_NAME, CALIBRATION_TEXT, Popularity, route_popularity};
use coel_store::manifest::FORMAT;
use coel_store::{
    BlobEntry, BlobHasher, Blobs, Command, FileEntry, Manifest, Model, NewPart, Outcome, PartEntry, Segment,
};
use tracing::{info, instrument};

use crate::hosting::check_budget;
use crate::ids;
use crate::library::{Known, run_blocking};
use crate::mesh::PROPOSE_DEADLINE;
use crate::service::ModelInfo;
use crate::shared::Shared;

/// A step of the import, for progress: what is counted, how many are done, of how many.
pub type Progress<'a> = &'a mut (dyn FnMut(&str, u64, u64) + Send);

/// Imports `dir` under `name`, or under the directory's name.
///
/// # Errors
/// In words: what is wrong with the checkpoint, the budget or the mesh, and what to do.
#[instrument(skip(shared, progress))]
pub async fn import(
    shared: &Arc<Shared>,
    dir: &Path,
    name: Option<String>,
    mut progress: impl FnMut(&str, u64, u64) + Send + 'static,
) -> Result<ModelInfo, String> {
    let dir = std::fs::canonicalize(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let name =
        name.or_else(|| Some(dir.file_name()?.to_string_lossy().into_owned())).ok_or("give the model a --name")?;
    let blobs = shared.blobs.clone();
    let named = name.clone();
    let (known, counts) = run_blocking(move || {
        let known = cut(&dir, named, &blobs, &mut progress)?;
        let counts = count(&dir, &mut progress)?;
        Ok::<_, String>((known, counts))
    })
    .await?;
    check_budget(&known, shared.config.memory_bytes, shared.config.kv_tokens, shared.config.trunk)?;

    let state = shared.state();
    if let Some((id, model)) = shared.model_to_place(&state).filter(|(id, _)| *id != known.id) {
        return Err(format!(
            "this mesh serves the model '{}' ({id}) and serves one model only; start another mesh for '{name}' \
             with `coel up --new --data DIR`",
            model.name
        ));
    }
    let id = known.id;
    let model = Model {
        name: name.clone(),
        manifest_bytes: known.manifest_bytes,
        popularity: counts.counts.iter().map(|layer| layer.iter().map(|&rows| saturate(rows)).collect()).collect(),
        popularity_text: counts.text,
        sensitivity: Vec::new(),
    };
    let known = shared.library.insert(known);
    let (looking, seen) = (shared.clone(), known.clone());
    run_blocking(move || looking.look_for_all_of(&seen)).await;
    match shared.log.propose(Command::RegisterModel { id, model }, PROPOSE_DEADLINE).await {
        Ok(Outcome::Refused(refusal)) => Err(format!("{refusal}; {}", refusal.remedy())),
        Ok(_) => {
            info!(%id, name, "registered");
            Ok(ModelInfo { id: id.to_string(), name })
        }
        Err(error) => Err(format!("the model could not be registered: {error}")),
    }
}

/// Cuts the checkpoint into blobs, by reference, and writes its manifest.
fn cut(dir: &Path, name: String, blobs: &Blobs, progress: Progress<'_>) -> Result<Known, String> {
    let checkpoint = Checkpoint::open(dir).map_err(|error| error.to_string())?;
    let mut files = BTreeMap::new();
    for (name, path) in checkpoint.files() {
        let bytes = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        files.insert(name, bytes);
    }
    let put = |bytes: &[u8]| blobs.put(bytes).map_err(|error| error.to_string());
    let listed = files.iter().map(|(name, bytes)| Ok(FileEntry { name: name.clone(), blob: put(bytes)? }));
    let mut manifest = Manifest {
        format: FORMAT,
        name,
        architecture: checkpoint.config().architecture.name().to_owned(),
        files: listed.collect::<Result<_, String>>()?,
        trunk: Vec::new(),
        experts: BTreeMap::new(),
    };
    let weights = checkpoint.weight_files();
    let parts = parts(&checkpoint);
    let total: u64 = parts.iter().map(Part::data_bytes).sum();
    let mut done = 0;
    let mut references = Vec::new();
    for part in &parts {
        progress("hashing weights, bytes", done, total);
        let mut segments = vec![Segment::Inline(part.header())];
        segments.extend(part.tensors.iter().map(|tensor| Segment::File {
            path: weights[tensor.file].clone(),
            offset: tensor.offset,
            bytes: tensor.bytes,
        }));
        let blob = hash(&segments)?;
        references.push(NewPart { key: blob.id.0, exact: (blob, segments), slices: None });
        done += part.data_bytes();
    }
    progress("hashing weights, bytes", total, total);
    let kept = blobs.keep(references).map_err(|error| error.to_string())?;
    for (part, slices) in parts.iter().zip(kept) {
        match &part.kind {
            PartKind::Trunk { name } => manifest.trunk.push(PartEntry { name: name.clone(), slices }),
            PartKind::Expert(expert) => {
                manifest.experts.insert(ids::to_store(*expert), slices);
            }
        }
    }
    let (encoded, id) = manifest.encode().map_err(|error| error.to_string())?;
    put(&encoded)?;
    Known::new(id, manifest, encoded.len() as u64, &files).map_err(|why| format!("{}: {why}", dir.display()))
}

/// Counts how often each expert is chosen on the built-in text, with the weights where they are.
fn count(dir: &Path, progress: Progress<'_>) -> Result<Popularity, String> {
    progress("counting expert popularity", 0, 1);
    let model = LocalModel::open(dir, Device::Cpu).map_err(|error| error.to_string())?;
    let tokens = model.text.tokenizer.encode(CALIBRATION_TEXT, true).map_err(|error| error.to_string())?;
    let counts = block_on(route_popularity(&model.engine, CALIBRATION_NAME, &tokens));
    progress("counting expert popularity", 1, 1);
    counts.map_err(|error| error.to_string())
}

fn saturate(rows: u64) -> u32 {
    u32::try_from(rows).unwrap_or(u32::MAX)
}

/// The blob that the segments make, read once.
fn hash(segments: &[Segment]) -> Result<BlobEntry, String> {
    let mut hasher = BlobHasher::default();
    let mut buffer = vec![0; 1 << 20];
    for segment in segments {
        match segment {
            Segment::Inline(bytes) => hasher.update(bytes),
            Segment::File { path, offset, bytes } => {
                let named = |error: std::io::Error| format!("{}: {error}", path.display());
                let mut file = File::open(path).map_err(named)?;
                file.seek(SeekFrom::Start(*offset)).map_err(named)?;
                let mut left = *bytes as usize;
                while left > 0 {
                    let part = left.min(buffer.len());
                    file.read_exact(&mut buffer[..part]).map_err(named)?;
                    hasher.update(&buffer[..part]);
                    left -= part;
                }
            }
        }
    }
    Ok(hasher.finish())
}
