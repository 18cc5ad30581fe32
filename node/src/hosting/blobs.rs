//! Gets the blobs of a part: from this node's disk, sliced from exact weights that lie there, or from peers.
//!
//! Invariants: holding blobs takes no memory, only reading them does; blobs are verified as they are read, and damaged ones are
//! replaced. Slices are made wherever exact weights lie, even if peers have them: reading the part once costs less than sending it
//! over a network. Where no peer has a slice any more, the exact weights are fetched and sliced.

use coel_model::weights::memory::Buffer;
use coel_model::weights::memory::WeightBytes;
use coel_model::weights::parts::PartKind;
use coel_model::weights::slices::PartBlobs;
use coel_store::{BlobEntry, BlobError, Blobs, ExpertId, PartEntry, Precision, Slice, Slices, State};
use tracing::{debug, info, warn};

use super::slicing::make;
use super::{Hosting, HostingError};
use crate::ids;
use crate::registry::ModelMeta;
use crate::system::run_blocking;
use crate::weights::fetch::FetchError;

/// A part of the model at a precision.
pub(super) struct WantedPart<'a> {
    /// For messages.
    pub what: String,
    /// The expert, if it is one.
    pub expert: Option<ExpertId>,
    kind: PartKind,
    slices: &'a Slices,
    pub precision: Precision,
}

impl<'a> WantedPart<'a> {
    /// An expert.
    ///
    /// # Errors
    /// The model does not have it.
    pub fn expert(meta: &'a ModelMeta, expert: ExpertId, precision: Precision) -> Result<Self, HostingError> {
        let what = format!("expert {expert}");
        let Some(slices) = meta.manifest.experts.get(&expert) else {
            return Err(HostingError::load(what, "the manifest does not list it"));
        };
        Ok(Self { what, expert: Some(expert), kind: PartKind::Expert(ids::to_model(expert)), slices, precision })
    }

    /// A part of the trunk, at `precision` or exactly where it has no slices.
    pub fn trunk(part: &'a PartEntry, precision: Precision) -> Self {
        let (what, kind) = (format!("the trunk part {}", part.name), PartKind::Trunk { name: part.name.clone() });
        let precision = part.slices.nearest(precision).0;
        Self { what, expert: None, kind, slices: &part.slices, precision }
    }

    /// Its blobs, the base before its refine slice.
    pub fn blobs(&self) -> Result<Vec<(Slice, &'a BlobEntry)>, HostingError> {
        let why = || format!("the model has no slices for {}", self.precision);
        self.slices.at(self.precision).ok_or_else(|| HostingError::load(&self.what, why()))
    }
}

impl Hosting {
    /// The part's blobs, verified.
    pub(super) async fn get(
        &self,
        wanted: &WantedPart<'_>,
        state: &State,
        meta: &ModelMeta,
    ) -> Result<PartBlobs, HostingError> {
        // Not on the heap: what is dropped later, by another thread, has to go back to the system for --memory to be hard.
        let read = |blobs: &Blobs, entry: &BlobEntry| blobs.read_verified_into(entry, Buffer::new);
        let mut read = self.checked(wanted, state, meta, read).await?.into_iter().map(WeightBytes::from);
        let none = || HostingError::load(&wanted.what, "it has no blobs");
        Ok(PartBlobs { main: read.next().ok_or_else(none)?, refine: read.next() })
    }

    /// What `read` makes of each of the part's blobs. A blob that turns out to be damaged is replaced, once.
    pub(super) async fn checked<T: Send + 'static>(
        &self,
        wanted: &WantedPart<'_>,
        state: &State,
        meta: &ModelMeta,
        read: fn(&Blobs, &BlobEntry) -> Result<T, BlobError>,
    ) -> Result<Vec<T>, HostingError> {
        let blobs = wanted.blobs()?;
        let mut found: Vec<Option<T>> = blobs.iter().map(|_| None).collect();
        for _ in 0..2 {
            self.hold(wanted, state, meta).await?;
            for ((_, entry), found) in blobs.iter().zip(&mut found).filter(|(_, found)| found.is_none()) {
                *found = self.node.fetcher.held(&wanted.what, entry, read).await?;
            }
            if found.iter().all(Option::is_some) {
                break;
            }
        }
        let why = "the copy that replaced its damaged weights is damaged too; check this node's disk";
        let damaged = || HostingError::load(&wanted.what, why);
        found.into_iter().collect::<Option<_>>().ok_or_else(damaged)
    }

    /// Gets to the disk what is missing of the part.
    pub(super) async fn hold(
        &self,
        wanted: &WantedPart<'_>,
        state: &State,
        meta: &ModelMeta,
    ) -> Result<(), HostingError> {
        let (mut missing, mut bytes) = (Vec::new(), 0);
        for (slice, entry) in wanted.blobs()? {
            if !self.has(entry).await {
                missing.push((slice, entry));
                bytes += entry.bytes;
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        if self.disk_is_tight(bytes) {
            self.make_disk_room(meta, bytes).await;
        }
        if self.has(&wanted.slices.exact).await && self.make(wanted, &missing).await {
            return Ok(());
        }
        for (slice, entry) in missing {
            match self.fetch(wanted, slice, entry, state, meta).await {
                // No peer has the slice. A peer with exact weights has what it takes.
                Err(FetchError::NoSource { .. } | FetchError::Lost { .. })
                    if slice != Slice::Exact
                        && self.fetch(wanted, Slice::Exact, &wanted.slices.exact, state, meta).await.is_ok()
                        && self.make(wanted, &[(slice, entry)]).await => {}
                fetched => fetched?,
            }
        }
        Ok(())
    }

    async fn has(&self, entry: &BlobEntry) -> bool {
        let (fetcher, entry) = (self.node.fetcher.clone(), entry.clone());
        run_blocking(move || fetcher.has(&entry)).await
    }

    async fn fetch(
        &self,
        wanted: &WantedPart<'_>,
        slice: Slice,
        entry: &BlobEntry,
        state: &State,
        meta: &ModelMeta,
    ) -> Result<(), FetchError> {
        let sources = self.node.view.sources(state, meta.id, wanted.expert.map(|expert| (expert, slice)));
        self.node.fetcher.replace(&wanted.what, entry, &sources).await
    }

    /// Makes slices from the exact weights that lie here. Returns whether that worked.
    async fn make(&self, wanted: &WantedPart<'_>, missing: &[(Slice, &BlobEntry)]) -> bool {
        let which: Vec<_> = missing.iter().map(|(slice, _)| *slice).filter(|slice| *slice != Slice::Exact).collect();
        if which.len() < missing.len() {
            return false;
        }
        // One at a time: requests are computed on the same cores.
        let _slicing = self.slicing.lock().await;
        let (blobs, kind, slices) = (self.node.blobs.clone(), wanted.kind.clone(), wanted.slices.clone());
        let made = run_blocking(move || make(&blobs, kind, &slices, &which)).await;
        match made {
            Ok(()) => {
                let repaired = missing.iter().filter(|(_, entry)| self.node.fetcher.note_repaired(entry)).count();
                if repaired > 0 {
                    info!(part = wanted.what, slices = repaired, "damaged slices were made again from exact weights");
                } else {
                    debug!(part = wanted.what, slices = missing.len(), "sliced here");
                }
                true
            }
            Err(error) => {
                warn!(part = wanted.what, %error, "its slices cannot be made from the exact weights here; asking peers");
                false
            }
        }
    }
}
