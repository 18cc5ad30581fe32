//! `coel recover`: a mesh goes on from one member's word, when its voters are lost.

use std::io::Write;
use std::path::Path;

use coel_store::{NodeId, Recovery, State};

use super::Failure;
use crate::runtime;

/// Says what recovering the mesh from the data folder `data` would do; does it if `yes`.
pub async fn recover(data: &Path, yes: bool) -> Result<(), Failure> {
    // A running node has the folder.
    let _lock = runtime::lock(data)?;
    let recovery = Recovery::open(data).await?;
    let (node, mut out) = (recovery.node(), std::io::stdout());
    writeln!(out, "{}", description(recovery.state(), node))?;
    if !yes {
        writeln!(out, "Nothing was changed. Run it again with --yes to do this.")?;
        return Ok(());
    }
    let mesh = recovery.commit().await?;
    writeln!(out, "This node is the only voter of mesh {mesh} now. Start it with `coel up`.")?;
    Ok(())
}

/// What would be done with the mesh in `state`.
fn description(state: &State, node: NodeId) -> String {
    let others = state.members.iter().filter(|(other, _)| **other != node);
    let others: Vec<_> = others.map(|(id, member)| format!("{} (node {id})", member.name)).collect();
    let models: Vec<_> = state.models.values().map(|model| model.name.as_str()).collect();
    let list = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    format!(
        "Mesh {} goes on as a new mesh, with this node (node {node}) as its only member.\n\
         Models that stay registered: {}.\n\
         Members that have to join anew, each with `coel join INVITE` on its data folder: {}.\n\
         Do this only if the voters of the mesh are lost for good: what this node has not heard of their last decisions is lost, \n\
         and if they come back, two meshes go on side by side.",
        state.mesh,
        list(&models.iter().map(ToString::to_string).collect::<Vec<_>>()),
        list(&others),
    )
}
