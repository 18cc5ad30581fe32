//! Experts in host memory beneath a device's own, and what computes them there.
//!
//! Owns [`Beneath`]: the weights in host memory of the experts that are not on the device, the host's kernels, and the
//! measured costs. It carries out what [`DeviceRoom`] decides. The invariant: an expert that is held for good is on the
//! device or has its weights here, so it can be computed at once; and not both take memory. Weights in a mapped file stay
//! mapped, and their pages are let go of while the expert is on the device; other weights are given up meanwhile, and read
//! back from the device when it goes down; those of the shelf are the shelf's. Nothing here knows flights.

use std::{collections::HashMap, time::Instant};

use crate::{
    kernels::{ExpertWork, Gated, Kernels, download, isa::Isa, packed::Packed},
    layout::ExpertId,
    machine::Experts,
    slices::{Precision, Weight},
    tiers::{
        costs::Costs,
        device::{DeviceRoom, Move, Need},
    },
};

/// Where weights in host memory come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Home {
    /// A mapped file.
    File,
    /// Memory of this process's own.
    Memory,
    /// Disk, by way of the shelf's buffers.
    Shelf,
}

struct Host {
    home: Home,
    precision: Precision,
    /// If they are in host memory.
    weights: Option<Gated<Weight>>,
}

pub(crate) struct Beneath {
    room: DeviceRoom,
    hosts: HashMap<ExpertId, Host>,
    costs: Costs,
    /// Started when they are first needed.
    kernels: Option<Packed>,
    threads: usize,
    raised_bytes: u64,
    /// On the device, of experts that are on the shelf.
    shelved_bytes: u64,
}

impl Beneath {
    /// With `budget` bytes for experts on the device, and so many threads that compute beneath.
    pub(crate) fn new(budget: u64, threads: usize) -> Self {
        Self {
            room: DeviceRoom::new(budget),
            hosts: HashMap::new(),
            costs: Costs::default(),
            kernels: None,
            threads,
            raised_bytes: 0,
            shelved_bytes: 0,
        }
    }

    /// The kernel class that computes here.
    pub(crate) fn class() -> String {
        format!("cpu-{}", Isa::best().name())
    }

    pub(crate) fn room(&self) -> &DeviceRoom {
        &self.room
    }

    /// Bytes brought to the device so far.
    pub(crate) fn raised_bytes(&self) -> u64 {
        self.raised_bytes
    }

    /// Bytes on the device of experts that are on the shelf.
    pub(crate) fn shelved_bytes(&self) -> u64 {
        self.shelved_bytes
    }

    /// Whatever is held of the expert goes, or comes to be held otherwise.
    fn leave(&mut self, id: ExpertId) -> bool {
        let Some(host) = self.hosts.remove(&id) else { return false };
        if host.home == Home::Shelf && self.room.is_up(id) {
            self.shelved_bytes -= self.room.bytes(id);
        }
        true
    }

    pub(crate) fn precision(&self, id: ExpertId) -> Option<Precision> {
        self.hosts.get(&id).map(|host| host.precision)
    }

    /// Whether an expert is here and not on the device.
    pub(crate) fn holds_any(&self) -> bool {
        self.hosts.len() > self.room.up_count()
    }

    /// Its weights, if they are in host memory.
    pub(crate) fn weights(&self, id: ExpertId) -> Option<&Gated<Weight>> {
        self.hosts.get(&id)?.weights.as_ref()
    }

    /// Holds an expert for good, on the device if there is a free place; one of this id is gone from there.
    pub(crate) fn hold<K: Kernels>(
        &mut self,
        id: ExpertId,
        weights: Gated<Weight>,
        precision: Precision,
        (kernels, experts): (&K, &mut Experts<K>),
    ) {
        let home = if weights.each().into_iter().all(Weight::is_mapped) { Home::File } else { Home::Memory };
        self.leave(id);
        self.room.add(id, device_bytes(kernels, &weights));
        self.hosts.insert(id, Host { home, precision, weights: Some(weights) });
        if self.room.settle(id) {
            self.carry_out(vec![Move::Up(id)], kernels, experts);
        }
    }

    /// Fills places that have become free.
    pub(crate) fn fill<K: Kernels>(&mut self, kernels: &K, experts: &mut Experts<K>) {
        let hosts = &self.hosts;
        let for_good = |id| hosts.get(&id).is_some_and(|host: &Host| host.home != Home::Shelf);
        let moves = self.room.fill(for_good);
        self.carry_out(moves, kernels, experts);
    }

    /// An expert with such weights is on the shelf from now on; one of this id is gone from the device.
    pub(crate) fn shelve<K: Kernels>(
        &mut self,
        id: ExpertId,
        precision: Precision,
        weights: &Gated<Weight>,
        kernels: &K,
    ) {
        self.leave(id);
        self.room.add(id, device_bytes(kernels, weights));
        self.hosts.insert(id, Host { home: Home::Shelf, precision, weights: None });
    }

    /// An expert of the shelf has come to host memory, or has gone.
    pub(crate) fn came(&mut self, id: ExpertId, weights: Option<Gated<Weight>>) {
        if let Some(host) = self.hosts.get_mut(&id).filter(|host| host.home == Home::Shelf) {
            host.weights = weights;
        }
    }

    /// The expert is not held any more; whether it was.
    pub(crate) fn forget(&mut self, id: ExpertId) -> bool {
        let held = self.leave(id);
        self.room.forget(id);
        held
    }

    pub(crate) fn tick(&mut self) {
        self.room.tick();
    }

    /// A layer needs these, which are on the device or here: brings up what is worth it. Whether anything was.
    pub(crate) fn need<K: Kernels>(&mut self, needs: &[Need], kernels: &K, experts: &mut Experts<K>) -> bool {
        let moves = self.room.need(needs, &self.costs);
        self.carry_out(moves, kernels, experts)
    }

    /// The same of these, as far as they are here, which will be needed next, it seems.
    pub(crate) fn foresee<K: Kernels>(&mut self, ids: &[ExpertId], kernels: &K, experts: &mut Experts<K>) -> bool {
        let here: Vec<ExpertId> = ids.iter().copied().filter(|id| self.weights(*id).is_some()).collect();
        let moves = self.room.foresee(&here);
        self.carry_out(moves, kernels, experts)
    }

    fn carry_out<K: Kernels>(&mut self, moves: Vec<Move>, kernels: &K, experts: &mut Experts<K>) -> bool {
        let any = !moves.is_empty();
        for step in moves {
            let (Move::Down(id) | Move::Up(id)) = step;
            let Some(host) = self.hosts.get_mut(&id) else { continue };
            match step {
                Move::Down(_) => {
                    let Some((copy, _)) = experts.remove(&id) else { continue };
                    match host.home {
                        Home::File => {}
                        Home::Memory => host.weights = Some(copy.map(|matrix| kernels.weight(matrix))),
                        Home::Shelf => self.shelved_bytes -= self.room.bytes(id),
                    }
                }
                Move::Up(_) => {
                    let Some(weights) = &host.weights else { continue };
                    let bytes = weights.each().map(|weight| weight.bytes() as u64).iter().sum();
                    let since = self.costs.measures().then(|| {
                        kernels.wait();
                        Instant::now()
                    });
                    let copy = weights.map(|weight| kernels.matrix(weight.clone()));
                    if let Some(since) = since {
                        kernels.wait();
                        self.costs.moved(bytes, since.elapsed().as_secs_f64());
                    }
                    experts.insert(id, (copy, host.precision));
                    self.raised_bytes += bytes;
                    match host.home {
                        Home::File => weights.each().into_iter().for_each(Weight::release),
                        Home::Memory => host.weights = None,
                        Home::Shelf => self.shelved_bytes += self.room.bytes(id),
                    }
                }
            }
        }
        any
    }

    /// Experts that are here over `rows [n, hidden]`, each over some of them, in this order.
    pub(crate) fn compute(&mut self, rows: Vec<f32>, hidden: usize, calls: &[(ExpertId, Vec<u32>)]) -> Vec<f32> {
        let Self { hosts, kernels, threads, costs, .. } = self;
        let kernels = kernels.get_or_insert_with(|| Packed::new(Isa::best(), *threads));
        let work = calls.iter().filter_map(|(id, rows)| {
            let expert = hosts.get(id)?.weights.as_ref()?;
            Some(ExpertWork { expert, rows })
        });
        let work: Vec<_> = work.filter(|work| !work.rows.is_empty()).collect();
        if work.is_empty() {
            return Vec::new();
        }
        let since = Instant::now();
        let input = kernels.upload(rows, hidden);
        let outputs = download(kernels.experts(&input, &work));
        let (mut bytes, mut weighed) = (0, 0);
        for ExpertWork { expert, rows } in &work {
            let each: u64 = expert.each().map(|weight| weight.bytes() as u64).iter().sum();
            (bytes, weighed) = (bytes + each, weighed + each * rows.len() as u64);
        }
        costs.computed(bytes, weighed as f64 / bytes.max(1) as f64, since.elapsed().as_secs_f64());
        outputs
    }
}

fn device_bytes<K: Kernels>(kernels: &K, weights: &Gated<Weight>) -> u64 {
    weights.each().map(|weight| kernels.bytes(weight)).iter().sum()
}
