//! How many bytes a node had to fetch: from the manifest and the placement, not from the node.
//!
//! Owns [`Assigned`], read from the manifest that an import leaves in the importer's data folder under the model's id. Every
//! member gets the manifest, the files and the trunk; its share of the experts is what the placement says.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use coel_node::status::Status;
use coel_store::{ExpertId, Manifest, ModelId, NodeId, Precision};

/// A registered model, by its blobs.
#[derive(Debug)]
pub struct Assigned {
    manifest: Manifest,
    manifest_bytes: u64,
}

impl Assigned {
    /// Reads the manifest of `model` (an id in hex) from a data folder that holds it.
    ///
    /// # Errors
    /// A manifest that is not there, or is not the one of that id.
    pub fn read(data: &Path, model: &str) -> Result<Self> {
        let path = manifest_path(data, model);
        let bytes = std::fs::read(&path).with_context(|| format!("the manifest {}", path.display()))?;
        let id: ModelId = model.parse()?;
        let manifest = Manifest::decode_as(&bytes, id).with_context(|| format!("the manifest {}", path.display()))?;
        Ok(Self { manifest, manifest_bytes: bytes.len() as u64 })
    }

    /// Bytes of everything that a node gets by the placement in `status`.
    pub fn bytes(&self, status: &Status, node: NodeId) -> u64 {
        let held = status.placement.iter().filter_map(|(expert, replicas)| {
            let replica = replicas.iter().find(|replica| replica.node == node)?;
            Some((expert.parse::<ExpertId>().ok()?, replica.precision))
        });
        let experts = held.filter_map(|(expert, at)| self.manifest.experts.get(&expert)?.bytes(at));
        let files = self.manifest.files.iter().map(|file| file.blob.bytes);
        let trunk = status.nodes.iter().find(|status| status.node_id == node).and_then(|status| status.trunk);
        let trunk = self.manifest.trunk_bytes(trunk.unwrap_or(Precision::Exact));
        self.manifest_bytes + trunk + files.chain(experts).sum::<u64>()
    }
}

/// Where a data folder keeps the manifest of a model: with the blobs, since it is one.
fn manifest_path(data: &Path, model: &str) -> PathBuf {
    data.join("blobs").join(model.get(..2).unwrap_or_default()).join(model)
}

#[cfg(test)]
mod tests {
    use coel_store::manifest::FORMAT;
    use coel_store::{BlobEntry, PartEntry, Precision, Slices};
    use serde_json::json;

    use super::*;
    use crate::settle::tests::status;

    #[test]
    fn a_node_gets_the_trunk_and_its_own_experts() {
        let data = tempfile::tempdir().unwrap();
        let blob = |bytes: usize| BlobEntry::of(&vec![bytes as u8; bytes]);
        let expert = |index, bytes| {
            let (base, refine) = (Some(blob(bytes - 4)), Some(blob(1)));
            (ExpertId { layer: 0, index }, Slices { exact: blob(bytes), base, refine })
        };
        let manifest = Manifest {
            format: FORMAT,
            architecture: "Test".into(),
            files: Vec::new(),
            trunk: vec![PartEntry { name: "head".into(), slices: Slices::exact_only(blob(100)) }],
            experts: [expert(0, 10), expert(1, 7)].into(),
        };
        let (encoded, id) = manifest.encode().unwrap();
        let path = manifest_path(data.path(), &id.to_string());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &encoded).unwrap();
        let assigned = Assigned::read(data.path(), &id.to_string()).unwrap();

        let on = |node: u64, at: Precision| json!([{"node": node, "precision": at, "serves": at, "ready": true}]);
        let mut status = status("node-1", &json!({}));
        let placement = json!({"0.0": on(1, Precision::Exact), "0.1": on(2, Precision::Q8)});
        status.placement = serde_json::from_value(placement).unwrap();
        let fixed = encoded.len() as u64 + 100;
        let found: Vec<_> = [1, 2, 3].map(|node| assigned.bytes(&status, NodeId(node))).into();
        assert_eq!(found, [fixed + 10, fixed + 3 + 1, fixed]);
        std::fs::write(&path, &encoded[1..]).unwrap();
        assert!(Assigned::read(data.path(), &id.to_string()).is_err());
    }
}
