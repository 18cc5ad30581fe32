//! Which blobs may be discarded when the disk budget needs room. Pure.
//!
//! Owns [`to_discard`]. Invariants: no blob goes that this node serves or was assigned, that another node is to fetch (or to slice) while
//! nobody else serves it, or that every member needs; blobs that others have go before last copies. It sees ids and lengths and does not
//! delete anything.

use std::collections::{BTreeMap, BTreeSet};

use coel_store::{BlobEntry, BlobId, ExpertId, Manifest, ModelId, NodeId, Placement, Precision, Slice, Slices};

use super::HeldExperts;

/// What has to be known of a node and of the others to judge its blobs.
pub struct DiskView<'a> {
    /// The model that is served.
    pub model: ModelId,
    /// Its blobs.
    pub manifest: &'a Manifest,
    /// Who holds what.
    pub placement: Option<&'a Placement>,
    /// The node that needs room.
    pub node: NodeId,
    /// At which precision it holds the trunk.
    pub trunk: Precision,
    /// What it serves.
    pub held: &'a HeldExperts,
    /// The other members that are there.
    pub there: BTreeSet<NodeId>,
    /// Whether one of these has every blob.
    pub complete: bool,
    /// Whether blobs of another model are being made.
    pub importing: bool,
}

/// Why a blob may go; the first go first. A blob that must stay has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    /// It belongs to no served model.
    Foreign,
    /// Others have it.
    Elsewhere,
    /// No node holds the expert at a precision that it is part of. It is the last copy; the checkpoint still has it.
    Unused,
}

/// Blobs of `files` that may go, enough to free `wanted_bytes`; as many as may where that is not enough.
pub fn to_discard(view: &DiskView<'_>, files: &[(BlobId, u64)], wanted_bytes: u64) -> Vec<BlobId> {
    let reasons = view.reasons();
    let reason = |id: &BlobId| match reasons.get(id) {
        Some(reason) => *reason,
        None => (!view.importing).then_some(Reason::Foreign),
    };
    let mut may_go: Vec<_> = files.iter().filter_map(|(id, bytes)| Some((reason(id)?, *bytes, *id))).collect();
    // The largest first: fewer of them.
    may_go.sort_by_key(|&(reason, bytes, id)| (reason, std::cmp::Reverse(bytes), id));
    let mut freed = 0;
    let enough = may_go.into_iter().take_while(|(_, bytes, _)| {
        let before = freed;
        freed += bytes;
        before < wanted_bytes
    });
    enough.map(|(_, _, id)| id).collect()
}

impl DiskView<'_> {
    /// Of every blob of the model why it may go, if it may.
    fn reasons(&self) -> BTreeMap<BlobId, Option<Reason>> {
        let mut reasons = BTreeMap::new();
        let mut judge = |id: BlobId, reason: Option<Reason>| {
            // One content may be several blobs' of the model: the best reason to stay counts.
            let found = reasons.entry(id).or_insert(reason);
            *found = found.zip(reason).map(|(a, b)| a.max(b));
        };
        judge(BlobId(self.model.0), None);
        for file in &self.manifest.files {
            judge(file.blob.id, None);
        }
        for part in &self.manifest.trunk {
            let held = part.slices.nearest(self.trunk).0;
            for (slice, blob) in slices_of(&part.slices) {
                // At which precision others hold the trunk is not in the log.
                let given_up = !slice.is_part_of(held) && self.complete;
                judge(blob.id, given_up.then_some(Reason::Elsewhere));
            }
        }
        for (expert, slices) in &self.manifest.experts {
            for (slice, blob) in slices_of(slices) {
                judge(blob.id, self.of_expert(*expert, slice));
            }
        }
        reasons
    }

    fn of_expert(&self, expert: ExpertId, slice: Slice) -> Option<Reason> {
        let nodes = self.placement?.replicas.get(&expert)?;
        let served = self.held.get(&expert).copied();
        let given = nodes.get(&self.node).map(|replica| replica.precision);
        if served.into_iter().chain(given).any(|precision| slice.is_part_of(precision)) {
            return None;
        }
        let others = || nodes.iter().filter(|(node, _)| **node != self.node);
        let serves = |node: &NodeId, ready: Option<Precision>| {
            self.there.contains(node) && ready.is_some_and(|ready| slice.is_part_of(ready))
        };
        if others().any(|(node, replica)| serves(node, replica.ready)) {
            return Some(Reason::Elsewhere);
        }
        if others().any(|(_, replica)| slice.is_part_of(replica.precision)) {
            return None;
        }
        // Slices that are still to come may have to be made of this.
        let to_come = || nodes.values().any(|replica| replica.ready != Some(replica.precision));
        if slice == Slice::Exact && !self.complete && to_come() {
            return None;
        }
        Some(if self.complete { Reason::Elsewhere } else { Reason::Unused })
    }
}

fn slices_of(slices: &Slices) -> impl Iterator<Item = (Slice, &BlobEntry)> {
    let all = [
        (Slice::Exact, Some(&slices.exact)),
        (Slice::Base, slices.base.as_ref()),
        (Slice::Refine, slices.refine.as_ref()),
    ];
    all.into_iter().filter_map(|(slice, blob)| Some((slice, blob?)))
}

#[cfg(test)]
mod tests {
    use coel_store::manifest::FORMAT;
    use coel_store::{Epoch, PartEntry, Replica};

    use super::*;

    fn blob(name: &str, bytes: u64) -> BlobEntry {
        BlobEntry { id: BlobId::of(name.as_bytes()), bytes, chunks: Vec::new() }
    }

    fn slices(name: &str) -> Slices {
        let of = |slice: &str, bytes| blob(&format!("{name} {slice}"), bytes);
        Slices { exact: of("exact", 16), base: Some(of("base", 5)), refine: Some(of("refine", 4)) }
    }

    fn manifest() -> Manifest {
        let names = ["0.0", "0.1", "0.2", "0.3"];
        Manifest {
            format: FORMAT,
            architecture: "Test".into(),
            files: Vec::new(),
            trunk: vec![PartEntry { name: "head".into(), slices: slices("head") }],
            experts: names.map(|name| (name.parse().unwrap(), slices(name))).into(),
        }
    }

    const NAMES: [&str; 5] = ["head", "0.0", "0.1", "0.2", "0.3"];

    /// Every blob of the manifest, as files, and one that is not of it.
    fn files() -> Vec<(BlobId, u64)> {
        let all = NAMES.map(slices).into_iter().flat_map(|slices| slices.blobs().cloned().collect::<Vec<_>>());
        let model = [(BlobId([9; 32]), 3), (BlobId::of(b"another model's"), 7)];
        all.map(|blob| (blob.id, blob.bytes)).chain(model).collect()
    }

    fn names(ids: &[BlobId]) -> Vec<String> {
        let all = NAMES.iter().flat_map(|name| ["exact", "base", "refine"].map(|slice| format!("{name} {slice}")));
        let all: Vec<_> = all.chain(["another model's".to_owned()]).collect();
        ids.iter().map(|id| all.iter().find(|name| BlobId::of(name.as_bytes()) == *id).unwrap().clone()).collect()
    }

    /// Node 1 was given 0.0 at Q8 and serves it at Q4, and serves 0.1 exactly though that was taken from it. Node 2 serves 0.1 and
    /// is to get 0.2 at Q4; nobody else has that. 0.3 was given to nobody that is there.
    fn placement() -> Placement {
        let replica = |precision, ready| Replica { precision, ready };
        let (q4, q8, exact) = (Precision::Q4, Precision::Q8, Precision::Exact);
        let replicas = [
            ("0.0", vec![(1, replica(q8, Some(q4)))]),
            ("0.1", vec![(2, replica(q8, Some(q8)))]),
            ("0.2", vec![(2, replica(q4, None))]),
            ("0.3", vec![(3, replica(exact, Some(exact)))]),
        ];
        let nodes =
            |nodes: Vec<(u64, Replica)>| nodes.into_iter().map(|(node, replica)| (NodeId(node), replica)).collect();
        Placement {
            epoch: Epoch(1),
            model: ModelId([9; 32]),
            replicas: replicas.into_iter().map(|(name, held)| (name.parse().unwrap(), nodes(held))).collect(),
            trunk_ready: BTreeSet::new(),
        }
    }

    fn check(change: impl FnOnce(&mut DiskView<'_>), wanted_bytes: u64) -> Vec<String> {
        let (manifest, placement) = (manifest(), placement());
        let held =
            HeldExperts::from([("0.0".parse().unwrap(), Precision::Q4), ("0.1".parse().unwrap(), Precision::Exact)]);
        let mut view = DiskView {
            model: ModelId([9; 32]),
            manifest: &manifest,
            placement: Some(&placement),
            node: NodeId(1),
            trunk: Precision::Q4,
            held: &held,
            there: BTreeSet::from([NodeId(2)]),
            complete: false,
            importing: false,
        };
        change(&mut view);
        names(&to_discard(&view, &files(), wanted_bytes))
    }

    #[test]
    fn what_is_needed_here_or_awaited_elsewhere_stays() {
        // So do exact weights of which slices are still to be made.
        // Of the trunk the other slices stay too: who else needs them is not known.
        let may_go = ["another model's", "0.1 base", "0.1 refine", "0.3 base", "0.2 refine", "0.3 refine"];
        let found = check(|_| (), u64::MAX);
        assert_eq!(found[..3], may_go[..3], "others have them");
        assert!(
            may_go.iter().all(|name| found.contains(&(*name).to_owned())) && found.len() == may_go.len(),
            "{found:?}"
        );
        let with_complete = check(|view| view.complete = true, u64::MAX);
        for name in ["head exact", "head refine", "0.0 exact", "0.2 exact"] {
            assert!(with_complete.contains(&name.to_owned()), "{with_complete:?}");
        }
        for name in ["head base", "0.0 base", "0.0 refine", "0.1 exact", "0.2 base", "0.3 exact"] {
            assert!(!with_complete.contains(&name.to_owned()), "{name}: {with_complete:?}");
        }
    }

    #[test]
    fn no_more_goes_than_is_wanted_and_what_others_have_goes_first() {
        assert_eq!(check(|_| (), 0), Vec::<String>::new());
        assert_eq!(check(|_| (), 7), ["another model's"]);
        assert_eq!(check(|_| (), 8), ["another model's", "0.1 base"]);
        let unused = check(|_| (), 7 + 5 + 4 + 1).split_off(3);
        assert_eq!(unused, ["0.3 base"], "the largest of the last copies");
    }

    #[test]
    fn an_import_keeps_what_is_not_registered_yet_and_nothing_goes_before_there_is_a_placement() {
        assert!(!check(|view| view.importing = true, u64::MAX).contains(&"another model's".into()));
        assert_eq!(check(|view| view.placement = None, u64::MAX), ["another model's"]);
        let gone = check(|view| view.there.clear(), u64::MAX);
        assert!(!gone.contains(&"0.1 refine".into()), "its holder is down: {gone:?}");
    }
}
