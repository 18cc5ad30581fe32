//! What a model folder holds, in bytes per slice, and what of it fits a budget.
//!
//! Owns [`Inventory`]. Pure arithmetic over the lengths of parts, the invariant being that it counts what an engine would
//! account for. It reads no weights.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{budget::footprint::Footprint, nn::batch::CHUNK_ROWS};
use coel_weights::{
    config::ModelConfig,
    folder::ModelFolder,
    layout::TensorSpec,
    parts::{Part, PartKind, kinds, parts},
    slices::Precision,
    slicing::part_slices::{PartBytes, part_bytes},
};

/// Bytes of some weights in each form; slices are absent where the weights cannot be sliced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FormBytes {
    pub base: Option<u64>,
    pub refine: Option<u64>,
    pub exact: u64,
}

impl FormBytes {
    /// What holding them at `precision` takes.
    pub fn at(&self, precision: Precision) -> Option<u64> {
        match precision {
            Precision::Q4 => self.base,
            Precision::Q8 => Some(self.base? + self.refine?),
            Precision::Exact => Some(self.exact),
        }
    }

    fn add(&mut self, other: Self) {
        self.base = self.base.zip(other.base).map(|(a, b)| a + b);
        self.refine = self.refine.zip(other.refine).map(|(a, b)| a + b);
        self.exact += other.exact;
    }

    const NOTHING: Self = Self { base: Some(0), refine: Some(0), exact: 0 };
}

/// A model by its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inventory {
    /// Whether the exact weights are in the folder.
    pub has_exact: bool,
    /// Everything but routed experts.
    pub trunk: FormBytes,
    /// All routed experts together.
    pub experts: FormBytes,
    pub experts_total: usize,
    /// The largest routed expert.
    pub expert: FormBytes,
    pub kv_bytes_per_token: u64,
    /// Scratch memory of an engine.
    pub buffer_bytes: u64,
}

/// What fits a budget with the trunk at one precision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fit {
    #[serde(serialize_with = "by_name")]
    pub trunk: Precision,
    /// Trunk, KV cache and buffers.
    pub fixed_bytes: u64,
    /// Experts that fit beside them at Q4, Q8 and exact; none where that form does not exist or is not here, nor anything
    /// if the trunk alone is too much.
    pub experts: [Option<usize>; 3],
}

fn by_name<S: serde::Serializer>(precision: &Precision, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(precision.name())
}

impl Inventory {
    pub fn of(folder: &ModelFolder) -> Self {
        let config = folder.config();
        let (has_exact, lengths) = match folder {
            ModelFolder::Checkpoint(checkpoint) => (true, parts(checkpoint).iter().map(of_part).collect::<Vec<_>>()),
            ModelFolder::Sliced(sliced) => {
                let exact = exact_bytes(config);
                let part = |(kind, bytes): (&PartKind, PartBytes)| {
                    (kind.clone(), FormBytes { base: Some(bytes.base), refine: Some(bytes.refine), exact: exact[kind] })
                };
                (false, sliced.parts().map(part).collect())
            }
        };
        let footprint = Footprint::of(config, config.dtype);
        let mut inventory = Self {
            has_exact,
            trunk: FormBytes::NOTHING,
            experts: FormBytes::NOTHING,
            experts_total: 0,
            expert: FormBytes::default(),
            kv_bytes_per_token: footprint.kv_bytes_per_token,
            buffer_bytes: footprint.buffer_bytes(CHUNK_ROWS),
        };
        for (kind, bytes) in lengths {
            match kind {
                PartKind::Trunk { .. } => inventory.trunk.add(bytes),
                PartKind::Expert(_) => {
                    inventory.experts.add(bytes);
                    inventory.experts_total += 1;
                    if bytes.exact >= inventory.expert.exact {
                        inventory.expert = bytes;
                    }
                }
            }
        }
        inventory
    }

    /// What fits `budget_bytes` beside a KV cache of `kv_tokens`, for each precision the trunk may have.
    pub fn fits(&self, budget_bytes: u64, kv_tokens: usize) -> Vec<Fit> {
        let here = |precision: &Precision| self.has_exact || *precision != Precision::Exact;
        let fit = |trunk| {
            let cache = self.kv_bytes_per_token.saturating_mul(kv_tokens as u64);
            let fixed = self.trunk.at(trunk)?.saturating_add(cache).saturating_add(self.buffer_bytes);
            let experts = Precision::ALL.map(|precision| {
                let (room, each) =
                    (budget_bytes.checked_sub(fixed)?, self.expert.at(precision).filter(|_| here(&precision))?);
                Some(usize::try_from(room / each.max(1)).unwrap_or(usize::MAX).min(self.experts_total))
            });
            Some(Fit { trunk, fixed_bytes: fixed, experts })
        };
        Precision::ALL.into_iter().filter(here).filter_map(fit).collect()
    }
}

fn of_part(part: &Part) -> (PartKind, FormBytes) {
    let sliced = part_bytes(part).ok();
    let bytes = FormBytes {
        base: sliced.map(|bytes| bytes.base),
        refine: sliced.map(|bytes| bytes.refine),
        exact: part.data_bytes(),
    };
    (part.kind.clone(), bytes)
}

/// What each part takes exact, in the type the configuration names.
fn exact_bytes(config: &ModelConfig) -> BTreeMap<PartKind, u64> {
    let bytes = |shape: &[usize]| shape.iter().map(|side| *side as u64).product::<u64>() * config.dtype.size() as u64;
    let part = |(kind, specs): (PartKind, Vec<TensorSpec>)| (kind, specs.iter().map(|spec| bytes(&spec.shape)).sum());
    kinds(config).into_iter().map(part).collect()
}
