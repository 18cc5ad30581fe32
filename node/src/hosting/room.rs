//! Keeps the disk within its budget: gives up blobs that this node was not given, where it is to keep others.

use std::collections::BTreeSet;

use coel_gossip::Liveness;
use tracing::{info, warn};

use super::disk::{View, to_discard};
use super::{FETCHES, Hosting};
use crate::config::Config;
use crate::library::{Known, run_blocking};
use crate::size::Size;

impl Hosting {
    /// Whether the disk has so little room that experts are to be fetched one by one, each making room for the next.
    pub(super) fn disk_is_tight(&self, bytes: u64) -> bool {
        self.shared.blobs.usage().room_bytes().is_some_and(|room| room < bytes * FETCHES as u64)
    }

    /// Makes room for `bytes` more than there are, as far as something may go; for none, where a smaller budget was given than
    /// the blobs that lie here take.
    pub(super) async fn make_disk_room(&self, known: &Known, bytes: u64) {
        let shared = self.shared.clone();
        let usage = shared.blobs.usage();
        let Some(budget) = usage.budget_bytes.filter(|&budget| usage.used_bytes + bytes > budget) else {
            return;
        };
        let (model, manifest) = (known.id, known.manifest.clone());
        let freed = run_blocking(move || {
            let (state, node) = (shared.state(), shared.log.node_id());
            let facts = shared.facts_of_members(&state);
            let there = facts.iter().filter(|(other, (liveness, _))| **other != node && *liveness != Liveness::Down);
            let complete = there
                .clone()
                .any(|(_, (_, facts))| facts.as_ref().is_some_and(|facts| facts.complete_models.contains(&model)));
            let view = View {
                model,
                manifest: &manifest,
                placement: state.placement.as_ref().filter(|placement| placement.model == model),
                node,
                trunk: shared.trunk.borrow().unwrap_or(coel_store::Precision::Exact),
                held: &shared.held.borrow().clone(),
                there: there.map(|(other, _)| *other).collect::<BTreeSet<_>>(),
                complete,
                importing: shared.importing.try_lock().is_err(),
            };
            let files = shared.blobs.files()?;
            let going = to_discard(&view, &files, usage.used_bytes + bytes - budget);
            for id in &going {
                shared.blobs.discard(id)?;
            }
            Ok::<_, coel_store::BlobError>(going.len())
        });
        match freed.await {
            Ok(0) => {}
            Ok(blobs) => {
                info!(blobs, budget = %Size(budget), "gave up weights that are not this node's, to keep within --disk")
            }
            Err(error) => warn!(%error, "no room could be made on the disk"),
        }
    }
}

/// Whether host memory beneath a GPU has room for the experts that a disk budget would have it read.
///
/// # Errors
/// Both numbers and the remedy, in words.
pub fn check_beneath(known: &Known, config: &Config, trunk: coel_store::Precision) -> Result<(), String> {
    let (Some(beneath), Some(_)) = (config.beneath_bytes, config.disk_bytes) else { return Ok(()) };
    let needed = known.host_bytes(trunk) + known.least_to_page(config.precision.lowest());
    if beneath >= needed {
        return Ok(());
    }
    Err(format!(
        "--memory {} ({beneath} bytes) beneath a GPU is too small to read experts from disk into, which --disk asks for: that needs \
         {} ({needed} bytes); raise --memory or leave --disk out",
        Size(beneath),
        Size(needed),
    ))
}

/// Whether the disk budget holds what every node keeps of the model called `name`, its trunk at this precision among it.
///
/// # Errors
/// Both numbers and the remedy, in words.
pub fn check_disk(known: &Known, name: &str, disk_bytes: u64, trunk: coel_store::Precision) -> Result<(), String> {
    let needed = known.disk_fixed_bytes(trunk);
    if disk_bytes >= needed {
        return Ok(());
    }
    Err(format!(
        "the disk budget of {} ({disk_bytes} bytes) is too small for the trunk of model '{name}': its weights at {trunk} and its files \
         need {} ({needed} bytes); raise --disk, leave it out, or accept a lower precision with --trunk",
        Size(disk_bytes),
        Size(needed),
    ))
}
