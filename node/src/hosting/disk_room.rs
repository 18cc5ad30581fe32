//! Keeps the disk within its budget: discards blobs that this node was not assigned, where it is to keep others.

use tracing::{info, warn};

use super::Hosting;
use super::discard::{DiskView, to_discard};
use crate::budget::LOADS_MAX;
use crate::config::Size;
use crate::registry::ModelMeta;
use crate::system::run_blocking;

impl Hosting {
    /// Whether the disk has so little room that experts are to be fetched one by one, each making room for the next.
    pub(super) fn disk_is_tight(&self, bytes: u64) -> bool {
        self.node.blobs.usage().room_bytes().is_some_and(|room| room < bytes * LOADS_MAX as u64)
    }

    /// Makes room for `bytes` more, as far as something may be discarded. With 0 bytes, it makes room only where the blobs that lie here
    /// exceed the budget, because a smaller one was given.
    pub(super) async fn make_disk_room(&self, meta: &ModelMeta, bytes: u64) {
        let usage = self.node.blobs.usage();
        let Some(budget) = usage.budget_bytes.filter(|&budget| usage.used_bytes + bytes > budget) else {
            return;
        };
        let (model, manifest) = (meta.id, meta.manifest.clone());
        let (view, blobs, imports) = (self.node.view.clone(), self.node.blobs.clone(), self.node.imports.clone());
        let (held, trunk) = (self.node.loaded.held(), self.node.offer.trunk());
        let freed = run_blocking(move || {
            let state = view.state();
            let (there, complete) = view.others(model);
            let disk = DiskView {
                model,
                manifest: &manifest,
                placement: state.placement.as_ref().filter(|placement| placement.model == model),
                node: view.node(),
                trunk: trunk.unwrap_or(coel_store::Precision::Exact),
                held: &held,
                there,
                complete,
                importing: imports.is_running(),
            };
            let files = blobs.files()?;
            let going = to_discard(&disk, &files, usage.used_bytes + bytes - budget);
            for id in &going {
                blobs.discard(id)?;
            }
            Ok::<_, coel_store::BlobError>(going.len())
        });
        match freed.await {
            Ok(0) => {}
            Ok(blobs) => {
                info!(blobs, budget = %Size(budget), "discarded weights that this node was not assigned, to keep within --disk")
            }
            Err(error) => warn!(%error, "no room could be made on the disk"),
        }
    }
}
