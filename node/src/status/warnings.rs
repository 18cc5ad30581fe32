//! What is wrong with the mesh or could go wrong next with its quorum, and what a person can do about it. Pure.

use std::collections::BTreeSet;

use coel_store::{FullDisk, NodeId, State};

use crate::mesh::Quorum;

/// Warnings about a mesh in `state`, the most urgent first. `copied`: members of which two processes run; `parted`: members whose log is
/// another one than this node's.
pub(super) fn warnings(
    state: &State,
    quorum: &Quorum,
    copied: BTreeSet<NodeId>,
    parted: BTreeSet<NodeId>,
) -> Vec<String> {
    let name = |node: &NodeId| state.members.get(node).map_or_else(|| node.to_string(), |member| member.name.clone());
    let names = |nodes: BTreeSet<NodeId>| nodes.iter().map(name).collect::<Vec<_>>().join(", ");
    let (voters, members) = (quorum.voters.len(), state.members.len());
    let mut warnings: Vec<_> =
        quorum.missing().map(|missing| format!("nothing can be agreed: {missing}")).into_iter().collect();
    if !copied.is_empty() {
        warnings.push(format!(
            "two processes run as {}: the data folder was copied or restored while the original runs. The one that started later stops \
             by itself; start only one of them from now on. To make the copy a node of its own, give it an empty data folder and \
             `coel join INVITE`",
            names(copied)
        ));
    }
    if !parted.is_empty() {
        warnings.push(format!(
            "the log of {} has parted from this node's: they have agreed on different things under the same number. A backup was restored, or a              copied data folder was in use. Those that differ from a majority come back under new ids by themselves; what only they had agreed              on is kept beside their data, in log-of-*",
            names(parted)
        ));
    }
    match (voters, members) {
        (1, 2) => warnings.push(format!(
            "only {} votes: if it is lost for good, its last decisions are lost with it, and the other node goes on by `coel recover`. \
             With a third node, any one may be lost",
            names(quorum.voters.clone())
        )),
        (1, 3..) => warnings.push(format!(
            "only {} votes: others are given a vote once they have been up for a few seconds",
            names(quorum.voters.clone())
        )),
        _ if voters > 1 && quorum.spare() == Some(0) => warnings.push(format!(
            "no more voters may be lost: {} of {voters} are up, and {} must be. Bring back {}; or if it is lost for good, `coel forget` it",
            quorum.up.len(),
            quorum.needed(),
            names(quorum.voters.difference(&quorum.up).copied().collect())
        )),
        _ => {}
    }
    let behind: Vec<_> = state.former.iter().flat_map(|former| former.members.values()).collect();
    if !behind.is_empty() {
        let names: Vec<_> = behind.iter().map(|member| member.name.as_str()).collect();
        warnings.push(format!(
            "this mesh was recovered without {}: join from there with `coel join INVITE`, on the same data folder",
            names.join(", ")
        ));
    }
    warnings
}

/// The warning of a node whose log waits for room, or that has no room for more weights.
pub(super) fn full_disk(log: Option<FullDisk>, weights: Option<FullDisk>) -> Option<String> {
    match (log, weights) {
        (Some(full), _) => Some(format!(
            "{full}. Until there is, this node's log takes nothing, so it neither votes nor leads, and it takes no weights. What it holds is \
             safe and served, and it goes on by itself"
        )),
        (None, Some(full)) => Some(format!(
            "{full}. Until there is, this node takes no more weights; if less is left, its log takes nothing either"
        )),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use coel_store::{FormerMesh, Member, MemberInfo, MeshId, Peer};

    use super::*;

    fn mesh(members: u64) -> State {
        let member = |id: u64| Member {
            peer: Peer(vec![id as u8]),
            name: format!("node-{id}"),
            addresses: Vec::new(),
            leaving: false,
        };
        State { members: (1..=members).map(|id| (NodeId(id), member(id))).collect(), ..State::default() }
    }

    fn quorum(voters: u64, up: &[u64]) -> Quorum {
        let (voters, up) =
            ((1..=voters).map(NodeId).collect::<BTreeSet<_>>(), up.iter().copied().map(NodeId).collect());
        Quorum { down: voters.difference(&up).copied().collect(), voters, up }
    }

    #[track_caller]
    fn check(state: &State, quorum: &Quorum, expected: &[&str]) {
        let found = warnings(state, quorum, BTreeSet::new(), BTreeSet::new());
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for (warning, part) in found.iter().zip(expected) {
            assert!(warning.contains(part), "{warning:?} does not say {part:?}");
        }
    }

    #[test]
    fn a_mesh_that_may_lose_a_voter_gives_no_warning() {
        check(&mesh(1), &quorum(1, &[1]), &[]);
        check(&mesh(3), &quorum(3, &[1, 2, 3]), &[]);
        check(&mesh(5), &quorum(5, &[1, 2, 3, 5]), &[]);
    }

    #[test]
    fn what_hangs_on_one_voter_is_said() {
        check(&mesh(2), &quorum(1, &[1]), &["only node-1 votes"]);
        check(&mesh(3), &quorum(1, &[1]), &["others are given a vote"]);
        check(&mesh(3), &quorum(3, &[1, 3]), &["Bring back node-2"]);
        check(&mesh(2), &quorum(1, &[]), &["coel recover", "only node-1 votes"]);
        check(&mesh(5), &quorum(5, &[1, 2]), &["2 of 5 voters can be reached, and 3 must be"]);
    }

    #[test]
    fn a_full_disk_is_named_with_what_it_stops() {
        let full = |needed_bytes| FullDisk { path: "/data".into(), free_bytes: 7, needed_bytes };
        let weights = full_disk(None, Some(full(64))).unwrap();
        assert!(
            weights.contains("/data") && weights.contains("7 bytes") && weights.contains("no more weights"),
            "{weights}"
        );
        let log = full_disk(Some(full(16)), Some(full(64))).unwrap();
        assert!(log.contains("16 are needed") && log.contains("log takes nothing"), "{log}");
        assert_eq!(full_disk(None, None), None);
    }

    #[test]
    fn members_with_two_processes_and_with_another_log_are_named() {
        let found =
            warnings(&mesh(3), &quorum(3, &[1, 2, 3]), BTreeSet::from([NodeId(2)]), BTreeSet::from([NodeId(3)]));
        let [copied, parted] = &found[..] else { panic!("{found:?}") };
        assert!(copied.contains("two processes run as node-2") && parted.contains("the log of node-3"), "{found:?}");
    }

    #[test]
    fn members_that_have_not_followed_are_named() {
        let info = MemberInfo { peer: Peer(vec![9]), name: "cellar".into(), addresses: Vec::new() };
        let former = FormerMesh { mesh: MeshId([1; 16]), members: BTreeMap::from([(NodeId(2), info)]) };
        check(&State { former: vec![former], ..mesh(1) }, &quorum(1, &[1]), &["recovered without cellar"]);
    }
}
