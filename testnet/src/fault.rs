//! The first node's private copy of a checkpoint, and the damage done to it on request.
//!
//! Owns copying and two faults, each on one named expert: a flipped bit in its bytes, or its bytes gone. Both strike after
//! the import, as a bad disk would: the mesh has agreed on hashes which these bytes no longer have. The invariant: only the
//! copy is ever written to, and only the named expert's bytes change.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use coel_model::weights::checkpoint::Checkpoint;
use coel_model::weights::layout;
use coel_model::weights::layout::ExpertId;
use coel_model::weights::parts::{Part, PartKind, TensorRange, parts};
use serde_json::{Map, json};

/// What is done to the importer's copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Fault {
    /// Flips one bit of one expert.
    FlipBit,
    /// Removes the file with one expert's bytes.
    MissingExpert,
}

/// The file of an expert that is to go missing.
const LONE_SHARD: &str = "model-00002-of-00002.safetensors";
const REST_SHARD: &str = "model-00001-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const COPY_BYTES: usize = 1 << 20;

/// Copies the checkpoint `from` to the new folder `to`. Where an expert is to go missing, the copy is cut into two shards,
/// one of them that expert's; the tensors are the same.
///
/// # Errors
/// Those of the checkpoint and of the file system.
pub fn copy(from: &Path, to: &Path, fault: Option<Fault>) -> Result<()> {
    fs::create_dir(to).with_context(|| format!("cannot create {}", to.display()))?;
    let checkpoint = Checkpoint::open(from).with_context(|| format!("the model in {}", from.display()))?;
    if fault == Some(Fault::MissingExpert) {
        return copy_sharded(&checkpoint, to);
    }
    let weights = checkpoint.weight_files().iter().filter_map(|path| Some((path.file_name()?.into(), path.clone())));
    let files = checkpoint.files().into_iter().map(|(name, path)| (PathBuf::from(name), path));
    for (name, path) in weights.chain(files).chain([(INDEX.into(), from.join(INDEX))]) {
        if path.exists() {
            fs::copy(&path, to.join(name)).with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    Ok(())
}

/// The expert that faults strike: the last one, as good as any.
pub fn victim(dir: &Path) -> Result<ExpertId> {
    let checkpoint = Checkpoint::open(dir).with_context(|| format!("the model in {}", dir.display()))?;
    let last = layout::experts(checkpoint.config()).last();
    last.with_context(|| format!("the model in {} has no experts", dir.display()))
}

/// Does the damage to the copy in `dir`.
///
/// # Errors
/// Those of the file system.
pub fn strike(fault: Fault, dir: &Path, victim: ExpertId) -> Result<()> {
    match fault {
        Fault::MissingExpert => {
            let path = dir.join(LONE_SHARD);
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
        }
        Fault::FlipBit => {
            let checkpoint = Checkpoint::open(dir)?;
            let part = parts(&checkpoint).into_iter().find(|part| part.expert() == Some(victim));
            let part = part.with_context(|| format!("the model has no {victim}"))?;
            let tensor = &part.tensors[0];
            let path = &checkpoint.weight_files()[tensor.file];
            let file = File::options().read(true).write(true).open(path)?;
            let middle = tensor.offset + tensor.bytes / 2;
            let mut byte = [0];
            file.read_exact_at(&mut byte, middle)?;
            file.write_all_at(&[byte[0] ^ 1], middle)?;
            file.sync_all().with_context(|| format!("cannot damage {}", path.display()))
        }
    }
}

fn copy_sharded(checkpoint: &Checkpoint, to: &Path) -> Result<()> {
    for (name, path) in checkpoint.files() {
        fs::copy(&path, to.join(name)).with_context(|| format!("cannot copy {}", path.display()))?;
    }
    let victim = victim(checkpoint.dir())?;
    let (lone, rest): (Vec<_>, Vec<_>) = parts(checkpoint).into_iter().partition(|part| part.expert() == Some(victim));
    let mut map = Map::new();
    for (file, parts) in [(LONE_SHARD, lone), (REST_SHARD, rest)] {
        let tensors: Vec<_> = parts.into_iter().flat_map(|part| part.tensors).collect();
        map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), json!(file))));
        write_shard(checkpoint, tensors, &to.join(file))?;
    }
    let index = json!({"metadata": {}, "weight_map": map});
    fs::write(to.join(INDEX), index.to_string()).with_context(|| format!("cannot write {INDEX}"))
}

/// A blob's form is that of a safetensors file, so a shard is a part of some tensors.
fn write_shard(checkpoint: &Checkpoint, tensors: Vec<TensorRange>, path: &Path) -> Result<()> {
    let part = Part { kind: PartKind::Trunk { name: "shard".into() }, tensors };
    let mut out = File::create_new(path).with_context(|| format!("cannot create {}", path.display()))?;
    out.write_all(&part.header())?;
    let mut buffer = vec![0; COPY_BYTES];
    for tensor in &part.tensors {
        let mut source = File::open(&checkpoint.weight_files()[tensor.file])?;
        source.seek(SeekFrom::Start(tensor.offset))?;
        let mut left = tensor.bytes as usize;
        while left > 0 {
            let piece = left.min(COPY_BYTES);
            source.read_exact(&mut buffer[..piece])?;
            out.write_all(&buffer[..piece])?;
            left -= piece;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture() -> PathBuf {
        crate::bundled_model()
    }

    fn bytes_of(dir: &Path, part: &Part) -> Vec<u8> {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let view = |tensor: &TensorRange| checkpoint.tensors().get(&tensor.name).unwrap().bytes.as_slice().to_vec();
        part.tensors.iter().flat_map(view).collect()
    }

    #[test]
    fn a_flipped_bit_changes_one_expert_of_the_copy() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("model");
        copy(&fixture(), &dir, Some(Fault::FlipBit)).unwrap();
        let victim = victim(&dir).unwrap();
        strike(Fault::FlipBit, &dir, victim).unwrap();
        let bits = |a: &[u8], b: &[u8]| a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones()).sum::<u32>();
        for part in parts(&Checkpoint::open(&fixture()).unwrap()) {
            let changed = bits(&bytes_of(&fixture(), &part), &bytes_of(&dir, &part));
            assert_eq!(changed, u32::from(part.expert() == Some(victim)), "{:?}", part.kind);
        }
    }

    #[test]
    fn shards_hold_the_same_blobs_until_one_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("model");
        copy(&fixture(), &dir, Some(Fault::MissingExpert)).unwrap();
        let (whole, cut) = (Checkpoint::open(&fixture()).unwrap(), Checkpoint::open(&dir).unwrap());
        for (a, b) in parts(&whole).iter().zip(parts(&cut)) {
            assert_eq!((&a.kind, a.header()), (&b.kind, b.header()));
            assert!(bytes_of(&fixture(), a) == bytes_of(&dir, &b), "{:?}", a.kind);
        }
        strike(Fault::MissingExpert, &dir, victim(&dir).unwrap()).unwrap();
        assert!(Checkpoint::open(&dir).is_err());
    }
}
