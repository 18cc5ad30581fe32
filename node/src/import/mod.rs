//! Registers a checkpoint directory with the mesh: cuts it into blobs, measures its experts, and tells the log.
//!
//! Nothing is registered before everything is checked and kept, so a bad checkpoint or a full disk leaves no trace in the mesh;
//! and what an import that was interrupted had kept, the next one finds ([`cut`]). The exact weights are not copied: they
//! stay in the checkpoint's files, which must stay where they are.

mod cut;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use coel_model::bytes::WeightBytes;
use coel_model::checkpoint::Checkpoint;
use coel_model::layout::ExpertId;
use coel_model::parts::PartKind;
use coel_model::popularity::{CALIBRATION_NAME, CALIBRATION_TEXT};
use coel_model::slices::Precision;
use coel_model::slices::blob::PartBlobs;
use coel_model::survey::{self, Source, Survey, SurveyError, survey};
use coel_model::tensors::{LoadError, Tensors};
use coel_model::text::TextModel;
use coel_model::tiers::buffer::Buffer;
use coel_store::manifest::FORMAT;
use coel_store::{BlobId, Command, FileEntry, Loss, Manifest, Model, ModelId, Outcome, PartEntry};
use tokio::sync::MutexGuard;
use tracing::{info, instrument, warn};

use crate::hosting::{check_budget, trim_heap};
use crate::ids;
use crate::library::{Known, LibraryError, run_blocking};
use crate::mesh::PROPOSE_DEADLINE;
use crate::placement::Popularity;
use crate::policies::Measured;
use crate::service::ModelInfo;
use crate::shared::Shared;
use crate::status::Importing;
use cut::{Cut, CutError};

/// A step of the import, for progress: what is counted, how many are done, of how many.
pub type Progress<'a> = &'a mut (dyn FnMut(&str, u64, u64) + Send);

/// Imports `dir` under `name`; without one, under the name that the mesh knows the model by, or under the directory's.
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
    let folder = dir.file_name().map(|folder| folder.to_string_lossy().into_owned());
    let called = name.clone().or(folder).filter(|name| !name.is_empty()).ok_or("give the model a --name")?;
    let _importing = turn(shared, &dir, &mut progress).await?;
    let _told = Told::begin(shared, &dir);
    let served = served(shared).await?;
    let importing = shared.clone();
    let mut progress = move |what: &str, done, total| {
        importing.import.send_if_modified(|import| {
            let Some(import) = import else { return false };
            (import.what, import.done, import.total) = (what.to_owned(), done, total);
            true
        });
        progress(what, done, total);
    };
    let importing = shared.clone();
    let (known, found) = run_blocking(move || {
        let checkpoint = Checkpoint::open(&dir).map_err(|error| error.to_string())?;
        let known = cut(&importing, &checkpoint, &called, served.as_ref(), &mut progress)?;
        let registered = importing.state().models.get(&known.id).cloned();
        let model = match registered {
            Some(model) => model,
            None => registration(called, &known, &measure(&importing, &checkpoint, &known, &mut progress)?),
        };
        Ok::<_, String>((known, model))
    })
    .await?;
    run_blocking(trim_heap).await;
    let (id, model) = (known.id, Model { name: name.unwrap_or(found.name.clone()), ..found });
    let name = model.name.clone();
    check_budget(&known, &name, &shared.config)?;
    // Another one may have been registered meanwhile.
    let state = shared.state();
    if let Some((other, model)) = shared.model_to_place(&state).filter(|(other, _)| *other != id) {
        return Err(another_model(other, &model.name, &name));
    }
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

/// Waits for an import of the same directory that runs already, showing how far it is: what it has done is found then.
///
/// # Errors
/// Another directory's import runs.
async fn turn<'a>(
    shared: &'a Shared,
    dir: &Path,
    progress: &mut impl FnMut(&str, u64, u64),
) -> Result<MutexGuard<'a, ()>, String> {
    let mut running = shared.import.subscribe();
    loop {
        match running.borrow_and_update().as_ref() {
            Some(other) if other.dir != dir => {
                return Err(format!("this node imports another model ({other}); wait until it is done"));
            }
            Some(same) => progress(&same.what, same.done, same.total),
            None => {}
        }
        tokio::select! {
            turn = shared.importing.lock() => return Ok(turn),
            changed = running.changed() => changed.map_err(|error| error.to_string())?,
        }
    }
}

/// The import that runs, for everybody to see while it does.
struct Told<'a>(&'a Shared);

impl<'a> Told<'a> {
    fn begin(shared: &'a Shared, dir: &Path) -> Self {
        let (dir, what) = (dir.to_owned(), "reading the checkpoint's headers".to_owned());
        shared.import.send_replace(Some(Importing { dir, what, done: 0, total: 0 }));
        Self(shared)
    }
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        self.0.import.send_replace(None);
    }
}

/// What the mesh serves already.
struct Served {
    known: Arc<Known>,
    name: String,
}

/// `None` where it serves nothing, or nobody can say any more what that consists of: then an import may bring it back.
async fn served(shared: &Shared) -> Result<Option<Served>, String> {
    let state = shared.state();
    let Some((id, model)) = shared.model_to_place(&state) else { return Ok(None) };
    let sources = shared.sources(&state, id, None);
    match shared.library.get(id, model, &shared.fetcher, &shared.blobs, &sources).await {
        Ok(known) => Ok(Some(Served { known, name: model.name.clone() })),
        Err(LibraryError::Unusable(why)) => Err(format!(
            "this mesh serves the model '{}', which this coel cannot run: {why}; use the version that imported it, or start another mesh \
             with `coel up --new --data DIR`",
            model.name
        )),
        Err(error) => {
            warn!(%error, "it cannot be said beforehand whether this is the model that the mesh serves");
            Ok(None)
        }
    }
}

fn another_model(id: ModelId, name: &str, wanted: &str) -> String {
    format!(
        "this mesh serves the model '{name}' ({id}) and serves one model only; start another mesh for '{wanted}' with \
         `coel up --new --data DIR`"
    )
}

fn registration(name: String, known: &Known, found: &Survey) -> Model {
    Model {
        name,
        manifest_bytes: known.manifest_bytes,
        popularity: counts(found),
        popularity_text: CALIBRATION_NAME.into(),
        sensitivity: losses(found),
    }
}

/// Cuts the checkpoint into blobs and writes its manifest. Refuses at once what cannot be the model that is `served`.
fn cut(
    shared: &Shared,
    checkpoint: &Checkpoint,
    name: &str,
    served: Option<&Served>,
    progress: Progress<'_>,
) -> Result<Known, String> {
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let mut files = BTreeMap::new();
    for (name, path) in checkpoint.files() {
        let bytes = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        files.insert(name, bytes);
    }
    // What is wrong with these is said before hours of cutting.
    TextModel::from_files(checkpoint.config(), &files).map_err(|error| words(&error))?;
    let blobs = &shared.blobs;
    let cut = Cut::new(checkpoint, blobs, &shared.config.data).map_err(|error| words(&error))?;
    if let Some(served) = served {
        let manifest = &served.known.manifest;
        let same_files = files.len() == manifest.files.len()
            && files.iter().all(|(name, bytes)| manifest.file(name).is_some_and(|blob| blob.id == BlobId::of(bytes)));
        if !same_files || !cut.could_be(manifest).map_err(|error| words(&error))? {
            return Err(another_model(served.known.id, &served.name, name));
        }
    }
    let stopped = || shared.stopping.is_cancelled();
    let before = served.map(|served| &served.known.manifest);
    let slices = cut.run(before, progress, &stopped).map_err(|error| words(&error))?;
    let put = |bytes: &[u8]| blobs.put(bytes).map_err(|error| words(&error));
    let listed = files.iter().map(|(name, bytes)| Ok(FileEntry { name: name.clone(), blob: put(bytes)? }));
    let mut manifest = Manifest {
        format: FORMAT,
        architecture: checkpoint.config().architecture.name().to_owned(),
        files: listed.collect::<Result<_, String>>()?,
        trunk: Vec::new(),
        experts: BTreeMap::new(),
    };
    for (part, slices) in cut.parts().iter().zip(slices) {
        match &part.kind {
            PartKind::Trunk { name } => manifest.trunk.push(PartEntry { name: name.clone(), slices }),
            PartKind::Expert(expert) => {
                manifest.experts.insert(ids::to_store(*expert), slices);
            }
        }
    }
    let (encoded, id) = manifest.encode().map_err(|error| words(&error))?;
    put(&encoded)?;
    Known::new(id, manifest, encoded.len() as u64, &files)
        .map_err(|why| format!("{}: {why}", checkpoint.dir().display()))
}

/// Counts and measures the experts on the built-in text, layer by layer, each read once more.
fn measure(shared: &Shared, checkpoint: &Checkpoint, known: &Known, progress: Progress<'_>) -> Result<Survey, String> {
    let tokens = known.text.tokenizer.encode(CALIBRATION_TEXT, true).map_err(|error| error.to_string())?;
    let mut experts = Experts { shared, checkpoint, manifest: &known.manifest, progress };
    experts.go_on(0, known.config.num_hidden_layers);
    let found = survey(&known.config, &checkpoint.trunk(), &tokens, 0, &mut experts);
    found.map_err(|error| match error {
        SurveyError::Stopped => CutError::Stopped.to_string(),
        error => error.to_string(),
    })
}

/// The experts of a checkpoint that was just cut.
struct Experts<'a> {
    shared: &'a Shared,
    checkpoint: &'a Checkpoint,
    manifest: &'a Manifest,
    progress: Progress<'a>,
}

impl Source for Experts<'_> {
    fn expert(&mut self, id: ExpertId, precision: Precision) -> Result<Option<Tensors>, LoadError> {
        if precision == Precision::Exact {
            return Ok(Some(self.checkpoint.expert(id)));
        }
        let slices = self.manifest.experts.get(&ids::to_store(id));
        let Some(entries) = slices.and_then(|slices| slices.at(ids::to_store_precision(precision))) else {
            return Ok(None);
        };
        let file = || format!("{precision} of {id}");
        let read = |entry| match self.shared.blobs.read_verified_into(entry, Buffer::new) {
            Ok(buffer) => Ok(WeightBytes::from(buffer)),
            Err(error) => Err(LoadError::Io { file: file(), source: std::io::Error::other(error) }),
        };
        let mut blobs = entries.into_iter().map(|(_, entry)| read(entry)).collect::<Result<Vec<_>, _>>()?.into_iter();
        let Some(main) = blobs.next() else { return Ok(None) };
        Tensors::parse_part(PartBlobs { main, refine: blobs.next() }, &file()).map(Some)
    }

    fn go_on(&mut self, done: usize, total: usize) -> bool {
        (self.progress)("measuring experts, layers", done as u64, total as u64);
        !self.shared.stopping.is_cancelled()
    }
}

/// What a survey found, as the planner reads it.
pub fn measured(found: &Survey) -> Measured {
    Measured { popularity: Popularity::new(counts(found)), sensitivity: losses(found) }
}

fn counts(found: &Survey) -> Vec<Vec<u32>> {
    found.counts.iter().map(|layer| layer.iter().map(|&rows| saturate(rows)).collect()).collect()
}

fn losses(found: &Survey) -> Vec<Vec<Loss>> {
    found.losses.iter().map(|layer| layer.iter().copied().map(loss).collect()).collect()
}

fn loss(measured: Option<survey::Loss>) -> Loss {
    // Where nothing was measured the planner takes the layer's mean.
    measured.map_or(Loss::default(), |loss| Loss { q4: loss.q4, q8: loss.q8 })
}

fn saturate(rows: u64) -> u32 {
    u32::try_from(rows).unwrap_or(u32::MAX)
}
