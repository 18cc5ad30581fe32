//! A database in a [`Simulation`]: what is on the disk, what is on its way there, and what a power cut leaves of it.
//!
//! Invariants of a disk that keeps its word: those of every database. [`SimulatedDisk::unsynced`] breaks them on purpose.

use super::room::{FullDisk, WhenFull};
use super::{Ack, Database, Disk, DiskError, Keys, Write, WriteBatch};
use crate::runtime::simulation::Simulation;
use crate::sync::lock;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;

type Values = BTreeMap<Vec<u8>, Vec<u8>>;

/// One disk; cloning the handle is cheap. It outlives the processes that use it.
#[derive(Clone)]
pub struct SimulatedDisk(Arc<Platter>);

struct Platter {
    simulation: Simulation,
    /// How long a sync takes.
    latency: Range<Duration>,
    contents: Mutex<Contents>,
    open: watch::Sender<()>,
    waits_for: watch::Sender<Option<FullDisk>>,
}

#[derive(Default)]
struct Contents {
    durable: Values,
    /// With the pending batches.
    readable: Values,
    pending: VecDeque<(WriteBatch, Option<Ack>)>,
    syncing: bool,
    full: bool,
    when_full: WhenFull,
    /// Writes that wait for room.
    held: Vec<Held>,
    unsynced: Option<Vec<u8>>,
    /// Writes that are acknowledged and never synced: a power cut takes them.
    volatile: Vec<WriteBatch>,
}

struct Held {
    batch: WriteBatch,
    applied: Option<Ack>,
    durable: Ack,
}

/// What a disk held at some moment.
#[derive(Clone)]
pub struct DiskImage(Values);

impl WriteBatch {
    fn apply(&self, values: &mut Values) {
        for write in &self.0 {
            match write {
                Write::Put { key, value } => drop(values.insert(key.clone(), value.clone())),
                Write::RemoveRange { from, until } => {
                    values.retain(|key, _| !(from..until).contains(&key));
                }
            }
        }
    }

    fn is_below(&self, prefix: &[u8]) -> bool {
        self.0.iter().all(|write| matches!(write, Write::Put { key, .. } if key.starts_with(prefix)))
    }
}

impl SimulatedDisk {
    /// An empty disk, each of whose syncs takes a time in `latency`.
    pub fn new(simulation: &Simulation, latency: Range<Duration>) -> Self {
        Self(Arc::new(Platter {
            simulation: simulation.clone(),
            latency,
            contents: Mutex::default(),
            open: watch::Sender::new(()),
            waits_for: watch::Sender::default(),
        }))
    }

    /// For another process.
    pub(crate) fn disk(&self) -> Disk {
        lock(&self.0.contents).when_full = WhenFull::default();
        Disk(Arc::new(self.clone()))
    }

    /// Cuts the power: of the writes that were on their way, the first `kept` reached the disk; all of them
    /// (`usize::MAX`) where only the process was killed.
    pub fn cut_power(&self, kept: usize) {
        let mut contents = lock(&self.0.contents);
        let volatile = std::mem::take(&mut contents.volatile);
        if kept == usize::MAX {
            volatile.iter().for_each(|batch| batch.apply(&mut contents.durable));
        }
        let kept = kept.min(contents.pending.len());
        let reached: Vec<_> = contents.pending.drain(..kept).collect();
        reached.iter().for_each(|(batch, _)| batch.apply(&mut contents.durable));
        let lost = (std::mem::take(&mut contents.pending), std::mem::take(&mut contents.held));
        contents.readable = contents.durable.clone();
        contents.syncing = false;
        drop(contents);
        self.0.waits_for.send_replace(None);
        // Destructors wake those who waited.
        drop((reached, lost));
    }

    /// How many writes are on their way.
    pub fn pending(&self) -> usize {
        lock(&self.0.contents).pending.len()
    }

    /// What a power cut would leave at least.
    pub fn image(&self) -> DiskImage {
        DiskImage(lock(&self.0.contents).durable.clone())
    }

    /// Puts back an earlier state, or that of another disk. No process may be using the disk.
    pub fn restore(&self, DiskImage(values): &DiskImage) {
        let mut contents = lock(&self.0.contents);
        (contents.durable, contents.readable) = (values.clone(), values.clone());
        contents.pending.clear();
        contents.held.clear();
        contents.syncing = false;
        drop(contents);
        self.0.waits_for.send_replace(None);
    }

    /// Takes no more writes, or takes them again, those that waited first.
    pub fn fill(&self, full: bool) {
        let mut contents = lock(&self.0.contents);
        contents.full = full;
        if !full {
            let held = std::mem::take(&mut contents.held);
            drop(contents);
            self.0.waits_for.send_replace(None);
            held.into_iter().for_each(|held| self.submit(held.batch, held.applied, held.durable));
        }
    }

    fn no_room(&self) -> FullDisk {
        FullDisk { path: self.path().into(), free_bytes: 0, needed_bytes: 1 }
    }

    /// From now on acknowledges writes to keys that begin with `prefix` and never syncs them: a fault that tests put in.
    pub fn unsynced(&self, prefix: &[u8]) {
        lock(&self.0.contents).unsynced = Some(prefix.into());
    }
}

impl Held {
    fn refuse(self, full: FullDisk) {
        if let Some(applied) = self.applied {
            applied(Err(full.clone().into()));
        }
        (self.durable)(Err(full.into()));
    }
}

impl Platter {
    fn sync(self: Arc<Self>) {
        let width = (self.latency.end - self.latency.start).as_nanos() as u64;
        let latency = self.latency.start + Duration::from_nanos(self.simulation.random() % width.max(1));
        let count = lock(&self.contents).pending.len();
        let simulation = self.simulation.clone();
        simulation.clone().spawn(async move {
            simulation.sleep(latency).await;
            let mut contents = lock(&self.contents);
            let synced: Vec<_> = contents.pending.drain(..count).collect();
            synced.iter().for_each(|(batch, _)| batch.apply(&mut contents.durable));
            contents.syncing = !contents.pending.is_empty();
            let again = contents.syncing;
            drop(contents);
            synced.into_iter().filter_map(|(_, durable)| durable).for_each(|durable| durable(Ok(())));
            if again {
                self.sync();
            }
        });
    }
}

impl Database for SimulatedDisk {
    fn path(&self) -> &Path {
        Path::new("a simulated disk")
    }

    fn submit(&self, batch: WriteBatch, applied: Option<Ack>, durable: Ack) {
        let mut contents = lock(&self.0.contents);
        if contents.full && contents.when_full == WhenFull::Wait {
            contents.held.push(Held { batch, applied, durable });
            drop(contents);
            self.0.waits_for.send_replace(Some(self.no_room()));
            return;
        }
        if contents.full {
            drop(contents);
            return Held { batch, applied, durable }.refuse(self.no_room());
        }
        batch.apply(&mut contents.readable);
        let lied = contents.unsynced.as_ref().is_some_and(|prefix| batch.is_below(prefix));
        let idle = if lied {
            contents.volatile.push(batch);
            drop(contents);
            durable(Ok(()));
            false
        } else {
            contents.pending.push_back((batch, Some(durable)));
            let idle = !std::mem::replace(&mut contents.syncing, true);
            drop(contents);
            idle
        };
        if let Some(applied) = applied {
            applied(Ok(()));
        }
        if idle {
            Arc::clone(&self.0).sync();
        }
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(lock(&self.0.contents).readable.get(key).cloned())
    }

    fn keys(&self, from: &[u8], until: &[u8]) -> Keys<'_> {
        let contents = lock(&self.0.contents);
        let keys: Vec<_> =
            contents.readable.range(from.to_vec()..until.to_vec()).map(|(key, _)| Ok(key.clone())).collect();
        Box::new(keys.into_iter())
    }

    fn open(&self) -> watch::Receiver<()> {
        self.0.open.subscribe()
    }

    fn when_full(&self, when_full: WhenFull) {
        let mut contents = lock(&self.0.contents);
        contents.when_full = when_full;
        if when_full == WhenFull::Refuse {
            let held = std::mem::take(&mut contents.held);
            drop(contents);
            self.0.waits_for.send_replace(None);
            held.into_iter().for_each(|held| held.refuse(self.no_room()));
        }
    }

    fn full(&self) -> watch::Receiver<Option<FullDisk>> {
        self.0.waits_for.subscribe()
    }
}
