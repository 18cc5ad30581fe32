//! Gets the blobs of a part: from this node's disk, made of exact weights that lie there, or from peers.
//!
//! The invariants: to hold blobs takes no memory, only to read them does; what is read was verified as it was read, and what is
//! damaged is replaced. Slices are made where exact weights lie, whoever else has them: reading the part once is less than
//! its way over a network. Where nobody has a slice any more, the exact weights are fetched for it.

use coel_model::bytes::WeightBytes;
use coel_model::parts::PartKind;
use coel_model::slices::blob::PartBlobs;
use coel_model::tiers::buffer::Buffer;
use coel_store::{BlobEntry, BlobError, Blobs, ExpertId, ModelId, PartEntry, Precision, Slice, Slices, State};
use tracing::{debug, info, warn};

use super::slicing::make;
use super::{Hosting, Setback};
use crate::ids;
use crate::library::{Known, run_blocking};
use crate::weights::fetch::FetchError;

/// A part of the model at a precision.
pub(super) struct Wanted<'a> {
    /// For messages.
    pub what: String,
    /// The expert, if it is one.
    pub expert: Option<ExpertId>,
    kind: PartKind,
    slices: &'a Slices,
    pub precision: Precision,
}

impl<'a> Wanted<'a> {
    pub fn expert(known: &'a Known, expert: ExpertId, precision: Precision) -> Result<Self, Setback> {
        let what = format!("expert {expert}");
        let Some(slices) = known.manifest.experts.get(&expert) else {
            return Err(Setback::Load { what, why: "the manifest does not have it".into() });
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
    pub fn blobs(&self) -> Result<Vec<(Slice, &'a BlobEntry)>, Setback> {
        let why = || format!("the model has no slices for {}", self.precision);
        self.slices.at(self.precision).ok_or_else(|| Setback::Load { what: self.what.clone(), why: why() })
    }
}

impl Hosting {
    /// The part's blobs, verified.
    pub(super) async fn get(&self, wanted: &Wanted<'_>, state: &State, model: ModelId) -> Result<PartBlobs, Setback> {
        // Not on the heap: what is dropped later, by another thread, has to go back to the system for --memory to be hard.
        let read = |blobs: &Blobs, entry: &BlobEntry| blobs.read_verified_into(entry, Buffer::new);
        let mut read = self.checked(wanted, state, model, read).await?.into_iter().map(WeightBytes::from);
        let why = || Setback::Load { what: wanted.what.clone(), why: "it has no blobs".into() };
        Ok(PartBlobs { main: read.next().ok_or_else(why)?, refine: read.next() })
    }

    /// What `read` makes of each of the part's blobs. One that turns out to be damaged is replaced, once.
    pub(super) async fn checked<T: Send + 'static>(
        &self,
        wanted: &Wanted<'_>,
        state: &State,
        model: ModelId,
        read: fn(&Blobs, &BlobEntry) -> Result<T, BlobError>,
    ) -> Result<Vec<T>, Setback> {
        let blobs = wanted.blobs()?;
        let mut found: Vec<Option<T>> = blobs.iter().map(|_| None).collect();
        for _ in 0..2 {
            self.hold(wanted, state, model).await?;
            for ((_, entry), found) in blobs.iter().zip(&mut found).filter(|(_, found)| found.is_none()) {
                *found = self.shared.fetcher.held(&wanted.what, entry, read).await?;
            }
            if found.iter().all(Option::is_some) {
                break;
            }
        }
        let why = "what replaced its damaged weights is damaged too; is this node's disk?";
        let damaged = || Setback::Load { what: wanted.what.clone(), why: why.into() };
        found.into_iter().collect::<Option<_>>().ok_or_else(damaged)
    }

    /// Gets to the disk what is missing of the part.
    pub(super) async fn hold(&self, wanted: &Wanted<'_>, state: &State, model: ModelId) -> Result<(), Setback> {
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
        if let Some(known) = self.shared.library.cached(model).filter(|_| self.disk_is_tight(bytes)) {
            self.make_disk_room(&known, bytes).await;
        }
        if self.has(&wanted.slices.exact).await && self.make(wanted, &missing).await {
            return Ok(());
        }
        for (slice, entry) in missing {
            match self.fetch(wanted, slice, entry, state, model).await {
                // Nobody has the slice. Who has exact weights has what it takes.
                Err(FetchError::NoSource { .. } | FetchError::Lost { .. })
                    if slice != Slice::Exact
                        && self.fetch(wanted, Slice::Exact, &wanted.slices.exact, state, model).await.is_ok()
                        && self.make(wanted, &[(slice, entry)]).await => {}
                fetched => fetched?,
            }
        }
        Ok(())
    }

    async fn has(&self, entry: &BlobEntry) -> bool {
        let (fetcher, entry) = (self.shared.fetcher.clone(), entry.clone());
        run_blocking(move || fetcher.has(&entry)).await
    }

    async fn fetch(
        &self,
        wanted: &Wanted<'_>,
        slice: Slice,
        entry: &BlobEntry,
        state: &State,
        model: ModelId,
    ) -> Result<(), FetchError> {
        let sources = self.shared.sources(state, model, wanted.expert.map(|expert| (expert, slice)));
        self.shared.fetcher.replace(&wanted.what, entry, &sources).await
    }

    /// Makes slices of the exact weights that lie here; whether that worked.
    async fn make(&self, wanted: &Wanted<'_>, missing: &[(Slice, &BlobEntry)]) -> bool {
        let which: Vec<_> = missing.iter().map(|(slice, _)| *slice).filter(|slice| *slice != Slice::Exact).collect();
        if which.len() < missing.len() {
            return false;
        }
        // One at a time: requests are computed on the same cores.
        let _slicing = self.slicing.lock().await;
        let (blobs, kind, slices) = (self.shared.blobs.clone(), wanted.kind.clone(), wanted.slices.clone());
        let made = run_blocking(move || make(&blobs, kind, &slices, &which)).await;
        match made {
            Ok(()) => {
                let mended = missing.iter().filter(|(_, entry)| self.shared.fetcher.mended(entry)).count();
                if mended > 0 {
                    info!(part = wanted.what, slices = mended, "damaged slices were made anew of exact weights");
                } else {
                    debug!(part = wanted.what, slices = missing.len(), "sliced here");
                }
                true
            }
            Err(error) => {
                warn!(part = wanted.what, %error, "its slices cannot be made of the exact weights here; asking peers");
                false
            }
        }
    }
}
