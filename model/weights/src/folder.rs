//! A model folder, whichever form its weights have.
//!
//! Owns [`ModelFolder`]: a checkpoint or a folder of slices, which gives tensors at a precision. A checkpoint gives exact
//! tensors in place and slices them while loading otherwise; a folder of slices gives what it has. The invariant: both
//! give the same bits at Q4 and at Q8. Nothing is loaded before it is asked for.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    checkpoint::Checkpoint, config::ModelConfig, error::LoadError, layout::ExpertId, slices::Precision,
    slicing::sliced_folder::SlicedFolder, tensors::Tensors,
};

/// An open model folder.
#[derive(Clone, Debug)]
pub enum ModelFolder {
    Checkpoint(Checkpoint),
    Sliced(SlicedFolder),
}

impl ModelFolder {
    /// Opens `dir`: a folder of slices if it has a `slices.json`, otherwise a checkpoint.
    pub fn open(dir: &Path) -> Result<Self, LoadError> {
        match SlicedFolder::is_one(dir) {
            true => SlicedFolder::open(dir).map(Self::Sliced),
            false => Checkpoint::open(dir).map(Self::Checkpoint),
        }
    }

    pub fn config(&self) -> &Arc<ModelConfig> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.config(),
            Self::Sliced(folder) => folder.config(),
        }
    }

    /// The files other than weights, as (name, path).
    pub fn files(&self) -> Vec<(String, PathBuf)> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.files(),
            Self::Sliced(folder) => folder.files(),
        }
    }

    /// Checks that slices have the content that was written: nothing else would show a flipped bit. A checkpoint's weights
    /// come without checksums and are not checked.
    pub fn verify(&self, trunk: Precision, experts: Precision) -> Result<(), LoadError> {
        match self {
            Self::Checkpoint(_) => Ok(()),
            Self::Sliced(folder) => folder.verify(trunk, experts),
        }
    }

    /// The trunk's tensors at `precision`.
    pub fn trunk(&self, precision: Precision) -> Result<Tensors, LoadError> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.trunk().sliced(precision),
            Self::Sliced(folder) => folder.trunk(precision),
        }
    }

    /// One expert's tensors at `precision`; none for an expert the model does not have.
    pub fn expert(&self, id: ExpertId, precision: Precision) -> Result<Tensors, LoadError> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.expert(id).sliced(precision),
            Self::Sliced(folder) => folder.expert(id, precision),
        }
    }

    /// One expert's tensors as they lie on disk, for disk offload; `None` if the folder does not have them at this precision
    /// but makes them while loading.
    pub fn expert_on_disk(&self, id: ExpertId, precision: Precision) -> Result<Option<Tensors>, LoadError> {
        match self {
            Self::Checkpoint(checkpoint) => Ok((precision == Precision::Exact).then(|| checkpoint.expert(id))),
            Self::Sliced(folder) => folder.expert_on_disk(id, precision).map(Some),
        }
    }
}
