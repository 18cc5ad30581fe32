//! Gets whole blobs: from this node's disk, or from peers. A fetch verifies every chunk, resumes where an earlier one ended, and goes on
//! to the next source when one fails. A copy that was damaged on disk is replaced.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use coel_gossip::{FrameStream, Handle, PeerId};
use coel_store::manifest::MANIFEST_BYTES_MAX;
use coel_store::{BlobEntry, BlobError, BlobId, Blobs, CHUNK_BYTES, Manifest, ModelId};
use tokio::time::timeout;
use tracing::{debug, instrument, warn};

use super::sources::BlobSource;
use super::wire::{CHUNKS_MAX, ChunkReply, ChunkRequest, PROTOCOL, VERSION, decode, encode};
use crate::budget::Holdings;
use crate::metrics::Metrics;
use crate::system::run_blocking;

/// Longest wait for one chunk: 1 MiB over the slowest link worth having (about 300 kbit/s).
const CHUNK_DEADLINE: Duration = Duration::from_secs(30);

/// Gets blobs from peers into the store.
#[derive(Clone)]
pub struct Fetcher {
    gossip: Handle,
    blobs: Arc<Blobs>,
    metrics: Arc<Metrics>,
    /// Blobs that were found damaged here and have not been replaced yet, with what was wrong: the damaged copy is removed to make
    /// room for a good one, and the reason must outlive it.
    damaged: Arc<Mutex<BTreeMap<BlobId, String>>>,
}

/// Why a blob could not be obtained. Retryable, unless [`is_lasting`](Self::is_lasting) says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// None of the sources could deliver it.
    #[error("{what} could not be fetched: {}", list_tried(.tried))]
    NoSource { what: String, tried: Vec<(String, SourceFault)> },
    /// The copy here is damaged, and no source could deliver a good one.
    #[error("{what} on this node's disk cannot be used ({fault}), and no peer could replace it: {}", list_tried(.tried))]
    Lost { what: String, fault: String, tried: Vec<(String, SourceFault)> },
    /// It could not be stored or read.
    #[error("{what} could not be stored: {source}")]
    Store { what: String, source: BlobError },
}

/// What was wrong with one source.
#[derive(Debug)]
pub enum SourceFault {
    /// It does not have it.
    NotHeld,
    /// What it sent does not match the manifest.
    Corrupt(String),
    /// It did not answer, or broke off.
    Unreachable(String),
}

impl fmt::Display for SourceFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotHeld => f.write_str("does not hold it"),
            Self::Corrupt(what) => write!(f, "sent wrong bytes ({what})"),
            Self::Unreachable(why) => write!(f, "did not deliver ({why})"),
        }
    }
}

fn list_tried(tried: &[(String, SourceFault)]) -> String {
    let each: Vec<_> = tried.iter().map(|(name, fault)| format!("{name} {fault}")).collect();
    if each.is_empty() { "no connected peer could have it".into() } else { each.join("; ") }
}

impl FetchError {
    /// Whether waiting is unlikely to mend it: a source or this node's disk is damaged.
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::NoSource { tried, .. } => tried.iter().any(|(_, fault)| matches!(fault, SourceFault::Corrupt(_))),
            Self::Lost { .. } | Self::Store { .. } => true,
        }
    }
}

impl Fetcher {
    /// A fetcher into `blobs`.
    pub fn new(gossip: Handle, blobs: Arc<Blobs>, metrics: Arc<Metrics>) -> Self {
        Self { gossip, blobs, metrics, damaged: Arc::default() }
    }

    /// The blob's verified bytes: from this node's disk, or else from `sources`. `what` names it in errors.
    ///
    /// # Errors
    /// [`FetchError`]; verified chunks are kept for the next try.
    pub async fn obtain(&self, what: &str, entry: &BlobEntry, sources: &[BlobSource]) -> Result<Vec<u8>, FetchError> {
        if let Some(bytes) = self.held(what, entry, Blobs::read_verified).await? {
            return Ok(bytes);
        }
        self.replace(what, entry, sources).await?;
        let read = self.held(what, entry, Blobs::read_verified).await?;
        read.ok_or_else(|| self.lost(what, entry, Vec::new()))
    }

    /// What `read` makes of the blob as it lies here; `None` if it does not, or is damaged: then it is removed, to make room for a
    /// good one. What lies in a checkpoint stays in the index: the checkpoint may come back.
    ///
    /// # Errors
    /// [`FetchError::Store`].
    pub async fn held<T: Send + 'static>(
        &self,
        what: &str,
        entry: &BlobEntry,
        read: fn(&Blobs, &BlobEntry) -> Result<T, BlobError>,
    ) -> Result<Option<T>, FetchError> {
        let store = |source| FetchError::Store { what: what.into(), source };
        // Held by the index, whatever has become of the file.
        if self.blobs.bytes(&entry.id).is_err() {
            return Ok(None);
        }
        let (blobs, owned) = (self.blobs.clone(), entry.clone());
        match run_blocking(move || read(&blobs, &owned)).await {
            Ok(found) => Ok(Some(found)),
            Err(fault) if !fault.is_damage() => Err(store(fault)),
            Err(fault) if fault.is_source_changed() => {
                warn!(what, %fault, "asking peers");
                self.damaged().insert(entry.id, fault.to_string());
                Ok(None)
            }
            Err(fault) => {
                warn!(what, %fault, "a stored blob is damaged; it is replaced");
                self.damaged().insert(entry.id, fault.to_string());
                let (blobs, id) = (self.blobs.clone(), entry.id);
                run_blocking(move || blobs.remove(&id)).await.map_err(store)?;
                Ok(None)
            }
        }
    }

    /// Gets a blob that does not lie here from `sources` to the disk. It is not read again.
    ///
    /// # Errors
    /// [`FetchError`]; verified chunks are kept for the next try.
    pub async fn replace(&self, what: &str, entry: &BlobEntry, sources: &[BlobSource]) -> Result<(), FetchError> {
        match self.fetch(what, entry, sources).await {
            Ok(()) => {
                self.note_repaired(entry);
                Ok(())
            }
            Err(FetchError::NoSource { tried, .. }) => Err(self.lost(what, entry, tried)),
            Err(error) => Err(error),
        }
    }

    /// Whether the blob lies here, as far as is known of it. What lies in a checkpoint and was found changed is read again, to see
    /// whether it is what it was by now. Reads files: not from async threads.
    pub fn has(&self, entry: &BlobEntry) -> bool {
        match self.blobs.lies_in(entry) {
            Ok(_) if !self.damaged().contains_key(&entry.id) => true,
            Ok(_) => {
                let is_whole = self.blobs.verify(entry).is_ok();
                if is_whole {
                    self.note_repaired(entry);
                }
                is_whole
            }
            Err(fault) => {
                if fault.is_source_changed() {
                    self.damaged().insert(entry.id, fault.to_string());
                }
                false
            }
        }
    }

    /// Notes that the blob lies here undamaged, wherever it is from. Returns whether it had been damaged.
    pub fn note_repaired(&self, entry: &BlobEntry) -> bool {
        let repaired = self.damaged().remove(&entry.id).is_some();
        self.metrics.blobs_repaired.inc_by(u64::from(repaired));
        repaired
    }

    /// Whether the blob should lie here: it does, or did until it was found damaged. Looks at the index: not from async threads.
    pub fn is_expected(&self, id: &BlobId) -> bool {
        self.blobs.bytes(id).is_ok() || self.damaged().contains_key(id)
    }

    /// What lies here of a model: whether that is every blob, and which blobs of the experts. Looks at files: not from async threads.
    pub fn inventory(&self, model: ModelId, manifest: &Manifest) -> (bool, Option<Holdings>) {
        let all = manifest.blobs().all(|blob| self.blobs.has(&blob.id));
        (all, Holdings::of(model, manifest, |id| all || self.is_expected(id)))
    }

    fn lost(&self, what: &str, entry: &BlobEntry, tried: Vec<(String, SourceFault)>) -> FetchError {
        let what = what.to_owned();
        let damage = self.damaged().get(&entry.id).cloned();
        match damage {
            Some(fault) => FetchError::Lost { what, fault, tried },
            None => FetchError::NoSource { what, tried },
        }
    }

    fn damaged(&self) -> MutexGuard<'_, BTreeMap<BlobId, String>> {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gets the blob from the first of `sources` that has all that is missing of it. `what` names it in errors.
    ///
    /// # Errors
    /// [`FetchError`]; verified chunks are kept for the next try.
    #[instrument(skip(self, entry, sources), fields(blob = %entry.id))]
    async fn fetch(&self, what: &str, entry: &BlobEntry, sources: &[BlobSource]) -> Result<(), FetchError> {
        let mut faults = Vec::new();
        for source in sources {
            match self.fetch_from(source.peer, entry).await {
                Ok(()) => return Ok(()),
                Err(Stop::Store(error)) => {
                    return Err(FetchError::Store { what: what.into(), source: error });
                }
                Err(Stop::Source(fault)) => {
                    if matches!(fault, SourceFault::Corrupt(_)) {
                        warn!(source = source.name, %fault, "a peer's weights do not match the manifest");
                    } else {
                        debug!(source = source.name, %fault, "trying the next source");
                    }
                    faults.push((source.name.clone(), fault));
                }
            }
        }
        Err(FetchError::NoSource { what: what.into(), tried: faults })
    }

    async fn fetch_from(&self, peer: PeerId, entry: &BlobEntry) -> Result<(), Stop> {
        let (blobs, owned) = (self.blobs.clone(), entry.clone());
        let mut partial = blocking(move || blobs.receive(&owned)).await?;
        let mut stream = self.open(peer).await?;
        while let Some((first, count)) = next_run(&partial.missing()) {
            ask(&mut stream, entry.id, first, count).await?;
            for chunk in first..first + count {
                let bytes = next_chunk(&mut stream, chunk).await?;
                self.metrics.bytes_fetched.inc_by(bytes.len() as u64);
                partial = blocking(move || {
                    partial.write(chunk, &bytes)?;
                    Ok(partial)
                })
                .await?;
            }
        }
        blocking(move || partial.finish()).await
    }

    /// Gets a manifest, of which only hash and length are known, and keeps it. Returns its bytes.
    ///
    /// # Errors
    /// [`FetchError`], also for a length beyond [`MANIFEST_BYTES_MAX`].
    pub async fn fetch_manifest(&self, id: BlobId, bytes: u64, sources: &[BlobSource]) -> Result<Vec<u8>, FetchError> {
        let what = || format!("the manifest {id}");
        let mut faults = Vec::new();
        for source in sources {
            let received = match self.whole(source.peer, id, bytes).await {
                Ok(received) => received,
                Err(Stop::Source(fault)) => {
                    faults.push((source.name.clone(), fault));
                    continue;
                }
                Err(Stop::Store(error)) => {
                    return Err(FetchError::Store { what: what(), source: error });
                }
            };
            let (blobs, copy) = (self.blobs.clone(), received.clone());
            return match blocking(move || blobs.put(&copy)).await {
                Ok(_) => Ok(received),
                Err(Stop::Store(error)) => Err(FetchError::Store { what: what(), source: error }),
                Err(Stop::Source(fault)) => {
                    Err(FetchError::NoSource { what: what(), tried: vec![(source.name.clone(), fault)] })
                }
            };
        }
        Err(FetchError::NoSource { what: what(), tried: faults })
    }

    async fn whole(&self, peer: PeerId, id: BlobId, bytes: u64) -> Result<Vec<u8>, Stop> {
        if bytes > MANIFEST_BYTES_MAX as u64 {
            return Err(Stop::Source(SourceFault::Corrupt(format!("a manifest of {bytes} bytes"))));
        }
        let chunks = u32::try_from(bytes.div_ceil(CHUNK_BYTES as u64)).expect("at most 64 MiB");
        let mut stream = self.open(peer).await?;
        let mut received = Vec::with_capacity(bytes as usize);
        for first in (0..chunks).step_by(CHUNKS_MAX as usize) {
            let count = CHUNKS_MAX.min(chunks - first);
            ask(&mut stream, id, first, count).await?;
            for chunk in first..first + count {
                let payload = next_chunk(&mut stream, chunk).await?;
                self.metrics.bytes_fetched.inc_by(payload.len() as u64);
                received.extend_from_slice(&payload);
            }
        }
        if BlobId::of(&received) != id {
            return Err(Stop::Source(SourceFault::Corrupt("its hash is another one".into())));
        }
        Ok(received)
    }

    async fn open(&self, peer: PeerId) -> Result<FrameStream, Stop> {
        self.gossip.open(peer, PROTOCOL).await.map_err(|error| unreachable(&error))
    }
}

/// Why one source was given up, or the whole fetch.
enum Stop {
    Source(SourceFault),
    Store(BlobError),
}

impl From<BlobError> for Stop {
    fn from(error: BlobError) -> Self {
        match error {
            BlobError::Corrupt { .. } => Self::Source(SourceFault::Corrupt(error.to_string())),
            other => Self::Store(other),
        }
    }
}

fn unreachable(why: &dyn fmt::Display) -> Stop {
    Stop::Source(SourceFault::Unreachable(why.to_string()))
}

/// File work off the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, BlobError> + Send + 'static) -> Result<T, Stop> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Stop::from),
        Err(error) => Err(unreachable(&error)),
    }
}

/// The first run of consecutive missing chunks, as (first, count) of one request.
fn next_run(missing: &[u32]) -> Option<(u32, u32)> {
    let &first = missing.first()?;
    let run = missing.iter().zip(first..).take(CHUNKS_MAX as usize).take_while(|&(&chunk, expected)| chunk == expected);
    Some((first, run.count() as u32))
}

async fn ask(stream: &mut FrameStream, blob: BlobId, first: u32, count: u32) -> Result<(), Stop> {
    let request = encode(&ChunkRequest { version: VERSION, blob, first, count }, Bytes::new());
    timeout(CHUNK_DEADLINE, stream.send(&request))
        .await
        .map_err(|_| unreachable(&"no answer in time"))?
        .map_err(|error| unreachable(&error))
}

async fn next_chunk(stream: &mut FrameStream, wanted: u32) -> Result<Bytes, Stop> {
    let frame = timeout(CHUNK_DEADLINE, stream.recv()).await.map_err(|_| unreachable(&"no answer in time"))?;
    let frame = frame.map_err(|error| unreachable(&error))?.ok_or_else(|| unreachable(&"the stream ended"))?;
    match decode(&frame) {
        Ok(ChunkReply::Chunk(chunk)) if chunk == wanted => Ok(frame.payload),
        Ok(ChunkReply::Chunk(chunk)) => Err(unreachable(&format!("chunk {chunk} instead of {wanted}"))),
        Ok(ChunkReply::NotHeld) => Err(Stop::Source(SourceFault::NotHeld)),
        Ok(ChunkReply::Refused(reason)) => Err(unreachable(&reason)),
        Err(reason) => Err(unreachable(&reason)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_chunks_are_asked_for_in_runs() {
        assert_eq!(next_run(&[]), None);
        assert_eq!(next_run(&[3]), Some((3, 1)));
        assert_eq!(next_run(&[0, 1, 2, 7, 8]), Some((0, 3)));
        let many: Vec<u32> = (5..500).collect();
        assert_eq!(next_run(&many), Some((5, CHUNKS_MAX)));
    }

    #[test]
    fn an_error_names_each_source_and_its_fault() {
        let error = FetchError::NoSource {
            what: "expert 3.7".into(),
            tried: vec![
                ("tower".into(), SourceFault::Corrupt("chunk 0".into())),
                ("mini".into(), SourceFault::NotHeld),
            ],
        };
        assert!(error.is_lasting());
        let text = error.to_string();
        for part in ["expert 3.7", "tower sent wrong bytes (chunk 0)", "mini does not hold it"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
