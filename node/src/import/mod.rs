//! Registers a checkpoint directory with the mesh: cuts it into blobs, measures its experts, and tells the log.
//!
//! Nothing is registered before everything is checked and kept, so a bad checkpoint or a full disk leaves no trace in the mesh. The next
//! import finds what an interrupted one had kept ([`cut`]). The exact weights are not copied: they stay in the checkpoint's files,
//! which must stay where they are.

mod cut;
mod running;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use coel_model::text::model::TextModel;
use coel_model::tools::popularity::{CALIBRATION_NAME, CALIBRATION_TEXT};
use coel_model::tools::survey;
use coel_model::tools::survey::{Survey, SurveyError, SurveySource, survey};
use coel_model::weights::checkpoint::Checkpoint;
use coel_model::weights::error::LoadError;
use coel_model::weights::layout::ExpertId;
use coel_model::weights::memory::Buffer;
use coel_model::weights::memory::WeightBytes;
use coel_model::weights::parts::PartKind;
use coel_model::weights::slices::PartBlobs;
use coel_model::weights::slices::Precision;
use coel_model::weights::tensors::Tensors;
use coel_store::manifest::FORMAT;
use coel_store::{BlobId, Blobs, Command, FileEntry, Loss, Manifest, Model, ModelId, PartEntry};
use tracing::{info, instrument, warn};

pub use running::{ImportProgress, Imports};

use crate::config::Limits;
use crate::ids;
use crate::lifecycle::Lifecycle;
use crate::mesh::{MeshView, OwnOffer, ProposalError};
use crate::placement::model_to_serve;
use crate::registry::{ModelMeta, ModelRegistry, RegistryError};
use crate::service::ModelInfo;
use crate::system::{run_blocking, trim_heap};
use crate::weights::fetch::Fetcher;
use cut::{Cut, CutError};

/// A step of the import, for progress: what is counted, how many are done, of how many.
pub type Progress<'a> = &'a mut (dyn FnMut(&str, u64, u64) + Send);

/// What an import needs of the node.
#[derive(Clone)]
pub struct Importer {
    /// The data folder.
    pub data: PathBuf,
    /// What the node may take.
    pub limits: Limits,
    /// The mesh.
    pub view: MeshView,
    /// Models without tensors.
    pub registry: ModelRegistry,
    /// Weights on disk.
    pub blobs: Arc<Blobs>,
    /// Weights from peers.
    pub fetcher: Fetcher,
    /// What this node offers the mesh.
    pub offer: OwnOffer,
    /// The import that runs.
    pub imports: Imports,
    /// How the node ends.
    pub lifecycle: Lifecycle,
}

/// Imports `dir` under `name`; without one, under the name that the mesh knows the model by, or under the directory's.
///
/// # Errors
/// In words: what is wrong with the checkpoint, the budget or the mesh, and what to do.
#[instrument(skip(importer, progress))]
pub async fn import(
    importer: &Importer,
    dir: &Path,
    name: Option<String>,
    mut progress: impl FnMut(&str, u64, u64) + Send + 'static,
) -> Result<ModelInfo, String> {
    let dir = std::fs::canonicalize(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let folder = dir.file_name().map(|folder| folder.to_string_lossy().into_owned());
    let called = name.clone().or(folder).filter(|name| !name.is_empty()).ok_or("give the model a --name")?;
    // Before hours of cutting what could not be registered.
    importer.view.quorum_lost().map_or(Ok(()), Err)?;
    let _guard = importer.imports.begin(&dir, |same| progress(&same.what, same.done, same.total)).await?;
    let served = served(importer).await?;
    let imports = importer.imports.clone();
    let mut progress = move |what: &str, done, total| {
        imports.set(what, done, total);
        progress(what, done, total);
    };
    let importing = importer.clone();
    let (meta, found) = run_blocking(move || {
        let checkpoint = Checkpoint::open(&dir).map_err(|error| error.to_string())?;
        let meta = cut(&importing, &checkpoint, &called, served.as_ref(), &mut progress)?;
        let registered = importing.view.state().models.get(&meta.id).cloned();
        let model = match registered {
            Some(model) => model,
            None => registration(called, &meta, &measure(&importing, &checkpoint, &meta, &mut progress)?),
        };
        Ok::<_, String>((meta, model))
    })
    .await?;
    run_blocking(trim_heap).await;
    let (id, model) = (meta.id, Model { name: name.unwrap_or(found.name.clone()), ..found });
    let name = model.name.clone();
    meta.sizes.check_memory(&name, &importer.limits).map_err(|short| short.to_string())?;
    // Another one may have been registered meanwhile.
    let state = importer.view.state();
    if let Some((other, model)) = model_to_serve(&state).filter(|(other, _)| *other != id) {
        return Err(another_model(other, &model.name, &name));
    }
    let meta = importer.registry.insert(meta);
    let (fetcher, seen) = (importer.fetcher.clone(), meta.clone());
    let (complete, holds) = run_blocking(move || fetcher.inventory(seen.id, &seen.manifest)).await;
    importer.offer.set_inventory(id, complete, holds);
    match importer.view.propose(Command::RegisterModel { id, model }).await {
        Ok(_) => {
            info!(%id, name, "registered");
            Ok(ModelInfo { id: id.to_string(), name })
        }
        Err(error @ ProposalError::Refused { .. }) => Err(error.to_string()),
        Err(error) => Err(format!("the model could not be registered: {error}")),
    }
}

/// What the mesh serves already.
struct Served {
    meta: Arc<ModelMeta>,
    name: String,
}

/// The model that the mesh serves. `None` where it serves nothing, or where no member has the manifest any more: then an import may
/// bring the model back.
async fn served(importer: &Importer) -> Result<Option<Served>, String> {
    let state = importer.view.state();
    let Some((id, model)) = model_to_serve(&state) else { return Ok(None) };
    let sources = importer.view.sources(&state, id, None);
    match importer.registry.obtain(id, model, &sources).await {
        Ok(meta) => Ok(Some(Served { meta, name: model.name.clone() })),
        Err(RegistryError::Unusable(why)) => Err(format!(
            "this mesh serves the model '{}', which this coel cannot run: {why}; use the version that imported it, or start another mesh \
             with `coel up --new --data DIR`",
            model.name
        )),
        Err(error) => {
            warn!(%error, "whether this is the model that the mesh serves is only known once it is cut");
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

fn registration(name: String, meta: &ModelMeta, found: &Survey) -> Model {
    Model {
        name,
        manifest_bytes: meta.manifest_bytes,
        popularity: counts(found),
        popularity_text: CALIBRATION_NAME.into(),
        sensitivity: losses(found),
    }
}

/// Cuts the checkpoint into blobs and writes its manifest. Refuses at once what cannot be the model that is `served`.
fn cut(
    importer: &Importer,
    checkpoint: &Checkpoint,
    name: &str,
    served: Option<&Served>,
    progress: Progress<'_>,
) -> Result<ModelMeta, String> {
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let mut files = BTreeMap::new();
    for (name, path) in checkpoint.files() {
        let bytes = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        files.insert(name, bytes);
    }
    // Faults of these are reported before hours of cutting.
    TextModel::from_files(checkpoint.config(), &files).map_err(|error| words(&error))?;
    let blobs = &importer.blobs;
    let cut = Cut::new(checkpoint, blobs, &importer.data).map_err(|error| words(&error))?;
    if let Some(served) = served {
        let manifest = &served.meta.manifest;
        let same_files = files.len() == manifest.files.len()
            && files.iter().all(|(name, bytes)| manifest.file(name).is_some_and(|blob| blob.id == BlobId::of(bytes)));
        if !same_files || !cut.could_be(manifest).map_err(|error| words(&error))? {
            return Err(another_model(served.meta.id, &served.name, name));
        }
    }
    let stopped = || importer.lifecycle.stopping().is_cancelled();
    let before = served.map(|served| &*served.meta.manifest);
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
    ModelMeta::new(id, manifest, encoded.len() as u64, &files)
        .map_err(|why| format!("{}: {why}", checkpoint.dir().display()))
}

/// Counts and measures the experts on the built-in text, layer by layer, each read once more.
fn measure(
    importer: &Importer,
    checkpoint: &Checkpoint,
    meta: &ModelMeta,
    progress: Progress<'_>,
) -> Result<Survey, String> {
    let tokens = meta.text.tokenizer.encode(CALIBRATION_TEXT, true).map_err(|error| error.to_string())?;
    let mut experts = CutExperts { importer, checkpoint, manifest: &meta.manifest, progress };
    experts.go_on(0, meta.config.num_hidden_layers);
    let found = survey(&meta.config, &checkpoint.trunk(), &tokens, 0, &mut experts);
    found.map_err(|error| match error {
        SurveyError::Stopped => CutError::Stopped.to_string(),
        error => error.to_string(),
    })
}

/// The experts of a checkpoint that was just cut.
struct CutExperts<'a> {
    importer: &'a Importer,
    checkpoint: &'a Checkpoint,
    manifest: &'a Manifest,
    progress: Progress<'a>,
}

impl SurveySource for CutExperts<'_> {
    fn expert(&mut self, id: ExpertId, precision: Precision) -> Result<Option<Tensors>, LoadError> {
        if precision == Precision::Exact {
            return Ok(Some(self.checkpoint.expert(id)));
        }
        let slices = self.manifest.experts.get(&ids::to_store(id));
        let Some(entries) = slices.and_then(|slices| slices.at(ids::to_store_precision(precision))) else {
            return Ok(None);
        };
        let file = || format!("{precision} of {id}");
        let read = |entry| match self.importer.blobs.read_verified_into(entry, Buffer::new) {
            Ok(buffer) => Ok(WeightBytes::from(buffer)),
            Err(error) => Err(LoadError::Io { file: file(), source: std::io::Error::other(error) }),
        };
        let mut blobs = entries.into_iter().map(|(_, entry)| read(entry)).collect::<Result<Vec<_>, _>>()?.into_iter();
        let Some(main) = blobs.next() else { return Ok(None) };
        Tensors::parse_part(PartBlobs { main, refine: blobs.next() }, &file()).map(Some)
    }

    fn go_on(&mut self, done: usize, total: usize) -> bool {
        (self.progress)("measuring experts, layers", done as u64, total as u64);
        !self.importer.lifecycle.stopping().is_cancelled()
    }
}

/// Routed rows and losses of a survey, both `[layers][experts]`, as the log keeps them and the planner reads them.
pub fn measurements(found: &Survey) -> (Vec<Vec<u32>>, Vec<Vec<Loss>>) {
    (counts(found), losses(found))
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
