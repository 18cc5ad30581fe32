//! What could go wrong next with the mesh's quorum, and what a person can do about it. Pure.

use std::collections::BTreeSet;

use coel_store::{NodeId, State};

use crate::mesh::Quorum;

/// Warnings about a mesh in `state`, the most urgent first.
pub(super) fn warnings(state: &State, quorum: &Quorum) -> Vec<String> {
    let name = |node: &NodeId| state.members.get(node).map_or_else(|| node.to_string(), |member| member.name.clone());
    let names = |nodes: BTreeSet<NodeId>| nodes.iter().map(name).collect::<Vec<_>>().join(", ");
    let (voters, members) = (quorum.voters.len(), state.members.len());
    let mut warnings: Vec<_> =
        quorum.missing().map(|missing| format!("nothing can be agreed: {missing}")).into_iter().collect();
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
        Quorum { voters: (1..=voters).map(NodeId).collect(), up: up.iter().copied().map(NodeId).collect() }
    }

    #[track_caller]
    fn check(state: &State, quorum: &Quorum, expected: &[&str]) {
        let found = warnings(state, quorum);
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
    fn members_that_have_not_followed_are_named() {
        let info = MemberInfo { peer: Peer(vec![9]), name: "cellar".into(), addresses: Vec::new() };
        let former = FormerMesh { mesh: MeshId([1; 16]), members: BTreeMap::from([(NodeId(2), info)]) };
        check(&State { former: vec![former], ..mesh(1) }, &quorum(1, &[1]), &["recovered without cellar"]);
    }
}
