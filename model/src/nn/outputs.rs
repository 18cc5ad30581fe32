//! Outputs of the experts of a layer, as they come.
//!
//! Owns [`LayerOutputs`], rows of output and which slot each belongs to, and [`PendingOutputs`], those that a device was
//! told to compute. Slots count (row, expert) pairs as [`expert_call`](super::expert_call) says. The invariant: the order
//! in which outputs come changes nothing.

use coel_kernels::{DeviceRows, DynKernels};

/// A slot whose output has not come.
const MISSING: u32 = u32::MAX;

/// Outputs of the experts of a layer, as they come.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerOutputs {
    /// `[rows of output, d]`
    pub(super) values: Vec<f32>,
    /// Of each slot, its row in `values`; [`MISSING`] until there is one.
    places: Vec<u32>,
    /// Where the shared expert's rows begin, if they are among them.
    pub(super) shared: Option<u32>,
}

impl LayerOutputs {
    /// Outputs of all slots, `[slots, d]`.
    pub fn whole(values: Vec<f32>, d: usize) -> Self {
        let places = (0..(values.len() / d) as u32).collect();
        Self { values, places, shared: None }
    }

    /// The same without any routed expert's: at most the shared one's.
    pub(crate) fn shared_alone(&self) -> Self {
        Self { places: vec![MISSING; self.places.len()], ..self.clone() }
    }

    /// Adds outputs that `other` has.
    pub(crate) fn join(&mut self, other: Self, d: usize) {
        let first = (self.values.len() / d) as u32;
        self.values.extend(other.values);
        for (place, other) in self.places.iter_mut().zip(other.places).filter(|(_, other)| *other != MISSING) {
            *place = first + other;
        }
    }

    /// Adds `values [slots.len(), d]`.
    pub fn add(&mut self, slots: &[u32], values: &[f32]) {
        let d = values.len() / slots.len().max(1);
        let first = (self.values.len() / d.max(1)) as u32;
        self.values.extend_from_slice(values);
        for (slot, place) in slots.iter().zip(first..) {
            self.places[*slot as usize] = place;
        }
    }

    /// Number of slots.
    pub(super) fn slots(&self) -> usize {
        self.places.len()
    }

    /// Slots whose output is there.
    pub(super) fn found(&self, d: usize) -> usize {
        let rows = self.values.len() / d;
        self.places.iter().filter(|place| (**place as usize) < rows).count()
    }

    /// For each slot its output `[d]`, if it is there.
    pub(super) fn rows(&self, d: usize) -> impl Iterator<Item = Option<&[f32]>> {
        let row = move |place: &u32| (*place != MISSING).then(|| &self.values[*place as usize * d..][..d]);
        self.places.iter().map(row)
    }
}

/// Outputs that a device was told to compute.
pub(crate) struct PendingOutputs {
    pub(super) values: Option<DeviceRows>,
    places: Vec<u32>,
    shared: Option<u32>,
}

impl PendingOutputs {
    /// `values` has a row for each of `slots`, of `slots_total` in all, then perhaps the shared expert's.
    pub(super) fn new(values: Option<DeviceRows>, slots: &[u32], slots_total: usize, shared: bool) -> Self {
        let mut places = vec![MISSING; slots_total];
        for (slot, place) in slots.iter().zip(0..) {
            places[*slot as usize] = place;
        }
        Self { values, places, shared: shared.then_some(slots.len() as u32) }
    }

    /// Waits for them.
    pub(crate) fn outputs(self, kernels: &dyn DynKernels) -> LayerOutputs {
        let Self { values, places, shared } = self;
        LayerOutputs { values: values.map_or_else(Vec::new, |rows| kernels.download(rows)), places, shared }
    }
}
