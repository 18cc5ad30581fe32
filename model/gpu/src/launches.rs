//! Many matrices over rows, in as few launches as there are kinds of them.
//!
//! Owns [`Job`] (one matrix over some rows) and [`Launches`], the tables that a list of jobs becomes: one launch for each
//! form, slab and slab of biases, of units of a few rows each, as `device::sliced` says. In a layer all matrices of a kind
//! mostly lie in one slab, so the experts of a layer are one launch. Which units a launch has changes no result. Pure, but
//! for what it is told about places.

use std::collections::BTreeMap;

use crate::{
    device::{NO_BIAS, TILE, UNIT},
    matrix::{Form, GpuMatrix, GpuVector},
};
use coel_weights::slices::BLOCK_ROWS;

/// A matrix over rows.
pub(crate) struct Job<'a> {
    pub(crate) matrix: &'a GpuMatrix,
    pub(crate) bias: Option<&'a GpuVector>,
    /// Where each row begins, in groups (sliced) or floats (exact).
    pub(crate) places: Vec<u32>,
    /// Where the output `[places.len(), rows of the matrix]` begins, in floats.
    pub(crate) out: usize,
}

/// What units of one launch have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Kind {
    pub(crate) form: Form,
    pub(crate) slab: usize,
    /// The slab itself where there is no bias.
    pub(crate) biases: usize,
}

/// One launch.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Launch {
    /// Units, then places.
    pub(crate) plan: Vec<u32>,
    pub(crate) units: usize,
    /// Blocks of the largest matrix.
    pub(crate) blocks: usize,
    /// Rows of a tile: one, or [`TILE`].
    pub(crate) tile: usize,
}

/// The launches of a list of jobs.
pub(crate) fn launches(jobs: &[Job<'_>]) -> BTreeMap<Kind, Launch> {
    let mut kinds = BTreeMap::<Kind, (Vec<[u32; UNIT]>, Vec<u32>)>::new();
    for job in jobs {
        for part in &job.matrix.parts {
            let slab = part.place.slab();
            let biases = job.bias.map_or(slab, |bias| bias.place.slab());
            let (units, places) = kinds.entry(Kind { form: job.matrix.form, slab, biases }).or_default();
            for (tile, rows) in job.places.chunks(TILE).enumerate() {
                let out = job.out + tile * TILE * job.matrix.rows + part.first;
                units.push([
                    part.place.at(),
                    part.second,
                    part.stride,
                    part.rows as u32,
                    places.len() as u32,
                    rows.len() as u32,
                    u32::try_from(out).expect("an output of less than 2^32 floats"),
                    job.bias.map_or(NO_BIAS, |bias| bias.place.at() + part.first as u32),
                    job.matrix.rows as u32,
                ]);
                places.extend(rows);
            }
        }
    }
    let launch = |(kind, (mut units, places)): (Kind, (Vec<[u32; UNIT]>, Vec<u32>))| {
        let first = (units.len() * UNIT) as u32;
        units.iter_mut().for_each(|unit| unit[4] += first);
        let blocks = units.iter().map(|unit| (unit[3] as usize).div_ceil(BLOCK_ROWS)).max().unwrap_or(0);
        let tile = if units.iter().all(|unit| unit[5] <= 1) { 1 } else { TILE };
        let plan = units.as_flattened().iter().chain(&places).copied().collect();
        (kind, Launch { plan, units: units.len(), blocks, tile })
    };
    kinds.into_iter().map(launch).collect()
}
