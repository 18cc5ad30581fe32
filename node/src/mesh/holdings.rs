//! Which blobs of the experts lie on whose disk, and what can be had of them. Pure.
//!
//! Owns [`Holdings`], what a node tells the others, and [`had`], at which precisions experts can be had from those who are there. The
//! invariant: who holds an expert exactly counts as a source of its slices, since they can be made of it. A blob that was found damaged
//! counts as held: nobody gave it up, so it is a fault to be told by name, and no reason to plan without it. What a node serves is
//! not known here.

use std::collections::BTreeMap;

use coel_store::{BlobId, ExpertId, Manifest, ModelId, Precision, Slice, Slices};
use serde::{Deserialize, Serialize};

use crate::placement::{Choices, Experts};

/// Longest list that is told: a model of so many experts that it is not is taken to be had everywhere.
const BITS_BYTES_MAX: usize = 8 << 10;
const SLICES: [Slice; 3] = [Slice::Exact, Slice::Base, Slice::Refine];

/// What a node has of a model's experts on its disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holdings {
    model: ModelId,
    /// Three bits for each expert in the order of the manifest: exact, base, refine.
    #[serde(with = "serde_bytes")]
    bits: Vec<u8>,
}

impl Holdings {
    /// Those of a node that `has` these blobs; `None` where the list would be too long to tell.
    pub fn of(model: ModelId, manifest: &Manifest, has: impl Fn(&BlobId) -> bool) -> Option<Self> {
        let mut bits = vec![0u8; (SLICES.len() * manifest.experts.len()).div_ceil(8)];
        if bits.len() > BITS_BYTES_MAX {
            return None;
        }
        for (index, slices) in manifest.experts.values().enumerate() {
            for (slice, blob) in
                [Some(&slices.exact), slices.base.as_ref(), slices.refine.as_ref()].into_iter().enumerate()
            {
                let at = SLICES.len() * index + slice;
                bits[at / 8] |= u8::from(blob.is_some_and(|blob| has(&blob.id))) << (at % 8);
            }
        }
        Some(Self { model, bits })
    }

    fn has(&self, index: usize, slice: Slice) -> bool {
        let at = SLICES.len() * index + SLICES.iter().position(|one| *one == slice).unwrap_or(0);
        self.bits.get(at / 8).is_some_and(|byte| byte >> (at % 8) & 1 == 1)
    }
}

/// The experts of a model, at the precisions at which they can be had from `holders`, and from what `serves` them. Where somebody has
/// not told what it holds, everything can be had as far as is known; so can an expert that nobody has at all, which then has to
/// come back with whoever does.
pub fn had(
    model: ModelId,
    manifest: &Manifest,
    holders: &[Option<&Holdings>],
    serves: impl Fn(ExpertId) -> Option<Precision>,
) -> Experts {
    let told: Option<Vec<_>> = holders.iter().map(|holds| holds.filter(|holds| holds.model == model)).collect();
    let each = manifest.experts.iter().enumerate().map(|(index, (&expert, slices))| {
        let all = Choices::of(slices);
        let Some(told) = &told else { return (expert, all) };
        let served = serves(expert);
        let lies = |slice: Slice| {
            told.iter().any(|holds| holds.has(index, slice)) || served.is_some_and(|served| slice.is_part_of(served))
        };
        let some = all.only(|precision| {
            let blobs = slices.at(precision).into_iter().flatten();
            lies(Slice::Exact) || blobs.into_iter().all(|(slice, _)| lies(slice))
        });
        (expert, if some == Choices::default() { all } else { some })
    });
    each.collect()
}

/// Why some experts cannot be held at all within what is `accepted`, however much room there is, and what to do; `None` where all can.
pub fn out_of_reach(
    manifest: &Manifest,
    had: &Experts,
    accepted: impl Fn(Precision) -> bool,
    lowest: Precision,
) -> Option<String> {
    let can = |choices: &Choices| Precision::ALL.into_iter().any(|p| accepted(p) && choices.bytes(p).is_some());
    let lost: BTreeMap<_, _> = had.iter().filter(|(_, choices)| !can(choices)).collect();
    let unsliced = |slices: &Slices| !can(&Choices::of(slices));
    let without = manifest.experts.iter().filter(|(_, slices)| unsliced(slices));
    let (first, all) = (without.clone().next(), manifest.experts.len());
    if let Some((expert, _)) = first {
        return Some(format!(
            "{} of the model's {all} experts (the first is {expert}) have no slices and can only be held exactly: their matrices' \
             columns are no multiple of 32, or their weights are beyond what a slice can express. Accept exact weights too, with \
             `coel model precision {lowest}..` and on nodes that were given --precision",
            without.count(),
        ));
    }
    let (expert, _) = lost.first_key_value()?;
    Some(format!(
        "nobody who is here has the weights that {} of the model's {all} experts (the first is {expert}) take at that precision, nor \
         exact ones to make them of. Import the checkpoint again on a node, or bring back a node that has them",
        lost.len(),
    ))
}

#[cfg(test)]
mod tests {
    use coel_store::BlobEntry;
    use coel_store::manifest::FORMAT;

    use super::*;

    const MODEL: ModelId = ModelId([1; 32]);

    fn blob(name: &str, bytes: u64) -> BlobEntry {
        BlobEntry { id: BlobId::of(name.as_bytes()), bytes, chunks: Vec::new() }
    }

    /// Three experts, the last without slices.
    fn manifest() -> Manifest {
        let sliced = |name: &str| Slices {
            exact: blob(&format!("{name} exact"), 16),
            base: Some(blob(&format!("{name} base"), 5)),
            refine: Some(blob(&format!("{name} refine"), 4)),
        };
        let experts = [sliced("0"), sliced("1"), Slices::exact_only(blob("2 exact", 16))];
        Manifest {
            format: FORMAT,
            architecture: "Test".into(),
            files: Vec::new(),
            trunk: Vec::new(),
            experts: (0..).zip(experts).map(|(index, slices)| (ExpertId::new(0, index), slices)).collect(),
        }
    }

    fn holds(names: &[&str]) -> Option<Holdings> {
        Holdings::of(MODEL, &manifest(), |id| names.iter().any(|name| BlobId::of(name.as_bytes()) == *id))
    }

    /// At which precisions each expert can be had.
    fn check(holders: &[Option<&Holdings>], served: &[(u16, Precision)], expected: [&[Precision]; 3]) {
        let serves = |expert: ExpertId| served.iter().find(|(index, _)| *index == expert.index).map(|(_, p)| *p);
        let had = had(MODEL, &manifest(), holders, serves);
        let found: Vec<Vec<_>> = had
            .values()
            .map(|choices| Precision::ALL.into_iter().filter(|p| choices.bytes(*p).is_some()).collect())
            .collect();
        assert_eq!(found, expected);
    }

    const Q4: Precision = Precision::Q4;
    const Q8: Precision = Precision::Q8;
    const EXACT: Precision = Precision::Exact;

    #[test]
    fn whoever_holds_an_expert_exactly_is_a_source_of_its_slices() {
        let exact = holds(&["0 exact", "1 exact", "2 exact"]);
        check(&[exact.as_ref()], &[], [&[Q4, Q8, EXACT], &[Q4, Q8, EXACT], &[EXACT]]);
        check(&[holds(&[]).as_ref()], &[(0, EXACT), (1, Q8), (2, EXACT)], [&[Q4, Q8, EXACT], &[Q4, Q8], &[EXACT]]);
    }

    #[test]
    fn what_left_with_the_last_who_had_it_cannot_be_had() {
        let (one, other) = (holds(&["0 base", "1 base"]), holds(&["0 refine", "2 exact"]));
        check(&[one.as_ref(), other.as_ref()], &[], [&[Q4, Q8], &[Q4], &[EXACT]]);
        // Nobody knows where the second is; and somebody has not said what it has.
        check(&[other.as_ref()], &[(0, Q4)], [&[Q4, Q8], &[Q4, Q8, EXACT], &[EXACT]]);
        check(&[one.as_ref(), None], &[], [&[Q4, Q8, EXACT], &[Q4, Q8, EXACT], &[EXACT]]);
        let foreign = Holdings { model: ModelId([2; 32]), ..one.clone().unwrap() };
        check(&[one.as_ref(), Some(&foreign)], &[], [&[Q4, Q8, EXACT], &[Q4, Q8, EXACT], &[EXACT]]);
    }

    #[test]
    fn what_no_room_would_mend_is_said_with_its_remedy() {
        let words = |had: &Experts, accepted: &[Precision]| {
            out_of_reach(&manifest(), had, |precision| accepted.contains(&precision), accepted[0])
        };
        let all = had(MODEL, &manifest(), &[None], |_| None);
        let unsliced = words(&all, &[Q4]).unwrap();
        for part in ["1 of the model's 3 experts", "0.2", "multiple of 32", "coel model precision q4.."] {
            assert!(unsliced.contains(part), "{unsliced}");
        }
        assert_eq!(words(&all, &[Q4, EXACT]), None);
        let one = holds(&["0 base", "1 base", "2 exact"]);
        let low = had(MODEL, &manifest(), &[one.as_ref()], |_| None);
        let lost = words(&low, &[Q8, EXACT]).unwrap();
        for part in ["2 of the model's 3 experts", "0.0", "Import the checkpoint again"] {
            assert!(lost.contains(part), "{lost}");
        }
        assert_eq!(words(&low, &[Q4, Q8, EXACT]), None);
    }
}
