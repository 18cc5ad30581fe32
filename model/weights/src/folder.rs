//! A model folder, whichever form its weights have.
//!
//! Owns [`ModelFolder`]: a checkpoint or a folder of slices, asked for tensors at a precision. A checkpoint gives them
//! in place when they are wanted exact and slices them while they are loaded otherwise; a folder of slices gives what
//! it has. The invariant: both give the same bits at Q4 and at Q8. It loads nothing by itself.

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
    /// Opens `dir`, which is of slices if it has a `slices.json` and a checkpoint otherwise.
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

    /// Checks that slices are those that were written, which a flipped bit would not show otherwise. The weights of a
    /// checkpoint have no sums to check them by.
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

    /// One expert's tensors as they lie on disk, for an engine's shelf; nothing where the folder does not have them at
    /// this precision but makes them when they are loaded.
    pub fn expert_on_disk(&self, id: ExpertId, precision: Precision) -> Result<Option<Tensors>, LoadError> {
        match self {
            Self::Checkpoint(checkpoint) => Ok((precision == Precision::Exact).then(|| checkpoint.expert(id))),
            Self::Sliced(folder) => folder.expert_on_disk(id, precision).map(Some),
        }
    }
}
