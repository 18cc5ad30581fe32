//! At which precisions the members that are there can provide each expert.
//!
//! Owns [`obtainable`]. Invariant: a holder of an expert's exact weights counts as a source of its slices, since they can be made from
//! them. It does not know who is there; the caller leaves the others out.

use std::collections::BTreeMap;

use coel_store::{ExpertId, Manifest, ModelId, Precision, Slice, Slices};

use crate::budget::{ExpertSizes, Holdings, SizeByPrecision};

/// The experts of a model at the precisions that can be obtained from `holders` and from what `serves` them.
///
/// Where a holder has not said what it holds, everything counts as obtainable. So does an expert that no node has at all: it has to
/// come back with the node that does.
pub fn obtainable(
    model: ModelId,
    manifest: &Manifest,
    holders: &[Option<&Holdings>],
    serves: impl Fn(ExpertId) -> Option<Precision>,
) -> ExpertSizes {
    let told: Option<Vec<_>> = holders.iter().map(|holds| holds.filter(|holds| holds.model() == model)).collect();
    let each = manifest.experts.iter().enumerate().map(|(index, (&expert, slices))| {
        let all = SizeByPrecision::of(slices);
        let Some(told) = &told else { return (expert, all) };
        let served = serves(expert);
        let held = |slice: Slice| {
            told.iter().any(|holds| holds.has(index, slice)) || served.is_some_and(|served| slice.is_part_of(served))
        };
        let some = all.only(|precision| {
            let mut blobs = slices.at(precision).into_iter().flatten();
            held(Slice::Exact) || blobs.all(|(slice, _)| held(slice))
        });
        (expert, if some == SizeByPrecision::default() { all } else { some })
    });
    each.collect()
}

/// Why some experts cannot be held within what is `accepted`, however much room there is, and what to do; `None` where all can.
/// `lowest` is the least exact precision that is accepted.
pub fn explain_unobtainable(
    manifest: &Manifest,
    obtainable: &ExpertSizes,
    accepted: impl Fn(Precision) -> bool,
    lowest: Precision,
) -> Option<String> {
    let can = |bytes: &SizeByPrecision| Precision::ALL.into_iter().any(|p| accepted(p) && bytes.bytes(p).is_some());
    let all = manifest.experts.len();
    let unsliced = |slices: &Slices| !can(&SizeByPrecision::of(slices));
    let without: Vec<_> = manifest.experts.iter().filter(|(_, slices)| unsliced(slices)).collect();
    if let Some((expert, _)) = without.first() {
        return Some(format!(
            "{} of the model's {all} experts (the first is {expert}) have no slices and can only be held exactly: the number of \
             columns of their matrices is not a multiple of 32, or a slice cannot express their weights. Accept exact weights too, \
             with `coel model precision {lowest}..`, and on nodes that were started with --precision",
            without.len(),
        ));
    }
    let lost: BTreeMap<_, _> = obtainable.iter().filter(|(_, bytes)| !can(bytes)).collect();
    let (expert, _) = lost.first_key_value()?;
    Some(format!(
        "no reachable node has the weights of {} of the model's {all} experts (the first is {expert}) at an accepted precision, nor \
         exact weights to make them from. Import the checkpoint again on a node, or bring back a node that has them",
        lost.len(),
    ))
}

#[cfg(test)]
mod tests {
    use coel_store::manifest::FORMAT;
    use coel_store::{BlobEntry, BlobId};

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

    /// Checks at which precisions each expert can be obtained.
    fn check(holders: &[Option<&Holdings>], served: &[(u16, Precision)], expected: [&[Precision]; 3]) {
        let serves = |expert: ExpertId| served.iter().find(|(index, _)| *index == expert.index).map(|(_, p)| *p);
        let found = obtainable(MODEL, &manifest(), holders, serves);
        let found: Vec<Vec<_>> = found
            .values()
            .map(|choices| Precision::ALL.into_iter().filter(|p| choices.bytes(*p).is_some()).collect())
            .collect();
        assert_eq!(found, expected);
    }

    const Q4: Precision = Precision::Q4;
    const Q8: Precision = Precision::Q8;
    const EXACT: Precision = Precision::Exact;

    #[test]
    fn a_holder_of_the_exact_expert_is_a_source_of_its_slices() {
        let exact = holds(&["0 exact", "1 exact", "2 exact"]);
        check(&[exact.as_ref()], &[], [&[Q4, Q8, EXACT], &[Q4, Q8, EXACT], &[EXACT]]);
        check(&[holds(&[]).as_ref()], &[(0, EXACT), (1, Q8), (2, EXACT)], [&[Q4, Q8, EXACT], &[Q4, Q8], &[EXACT]]);
    }

    #[test]
    fn what_left_with_its_last_holder_cannot_be_obtained() {
        let (one, other) = (holds(&["0 base", "1 base"]), holds(&["0 refine", "2 exact"]));
        check(&[one.as_ref(), other.as_ref()], &[], [&[Q4, Q8], &[Q4], &[EXACT]]);
        // No node holds the second expert; and one node has not said what it holds.
        check(&[other.as_ref()], &[(0, Q4)], [&[Q4, Q8], &[Q4, Q8, EXACT], &[EXACT]]);
        check(&[one.as_ref(), None], &[], [&[Q4, Q8, EXACT], &[Q4, Q8, EXACT], &[EXACT]]);
        let foreign = Holdings::of(ModelId([2; 32]), &manifest(), |_| true).unwrap();
        check(&[one.as_ref(), Some(&foreign)], &[], [&[Q4, Q8, EXACT], &[Q4, Q8, EXACT], &[EXACT]]);
    }

    #[test]
    fn what_no_room_would_mend_is_explained_with_its_remedy() {
        let words = |experts: &ExpertSizes, accepted: &[Precision]| {
            explain_unobtainable(&manifest(), experts, |precision| accepted.contains(&precision), accepted[0])
        };
        let all = obtainable(MODEL, &manifest(), &[None], |_| None);
        let unsliced = words(&all, &[Q4]).unwrap();
        for part in ["1 of the model's 3 experts", "0.2", "multiple of 32", "coel model precision q4.."] {
            assert!(unsliced.contains(part), "{unsliced}");
        }
        assert_eq!(words(&all, &[Q4, EXACT]), None);
        let one = holds(&["0 base", "1 base", "2 exact"]);
        let low = obtainable(MODEL, &manifest(), &[one.as_ref()], |_| None);
        let lost = words(&low, &[Q8, EXACT]).unwrap();
        for part in ["2 of the model's 3 experts", "0.0", "Import the checkpoint again"] {
            assert!(lost.contains(part), "{lost}");
        }
        assert_eq!(words(&low, &[Q4, Q8, EXACT]), None);
    }
}
