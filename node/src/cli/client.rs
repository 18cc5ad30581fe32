//! Commands that ask the node which runs on a data folder.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use coel_store::Bounds;

use super::{Failure, Output, print};
use crate::config::DataArgs;
use crate::control::{Request, ask};
use crate::service::ModelInfo;
use crate::status::Status;

/// `coel invite`.
pub async fn invite(data: DataArgs, uses: u32, ttl: Duration, output: Output) -> Result<(), Failure> {
    let line: String = ask(&data.data, &Request::Invite { uses, ttl_s: ttl.as_secs() }, |_, _, _| ()).await?;
    if output.json {
        print::json(&serde_json::json!({ "invite": line, "uses": uses, "ttl_s": ttl.as_secs() }))
    } else {
        writeln!(std::io::stdout(), "{line}")?;
        Ok(())
    }
}

/// `coel leave`.
pub async fn leave(data: DataArgs) -> Result<(), Failure> {
    ask::<()>(&data.data, &Request::Leave, |_, _, _| ()).await?;
    eprintln!("left the mesh");
    Ok(())
}

/// `coel forget`.
pub async fn forget(node: String, data: DataArgs) -> Result<(), Failure> {
    ask::<()>(&data.data, &Request::Forget { node: node.clone() }, |_, _, _| ()).await?;
    eprintln!("node {node} is no member any more");
    Ok(())
}

/// `coel status`.
pub async fn status(data: DataArgs, output: Output) -> Result<(), Failure> {
    let status: Status = ask(&data.data, &Request::Status, |_, _, _| ()).await?;
    if output.json {
        return print::json(&status);
    }
    print::status(&status)
}

/// `coel model import`.
pub async fn import(dir: PathBuf, data: DataArgs, name: Option<String>, output: Output) -> Result<(), Failure> {
    let dir = std::path::absolute(dir)?;
    let mut progress = print::Progress::new();
    let request = Request::Import { dir, name };
    let model: ModelInfo = ask(&data.data, &request, |what, done, total| progress.set(what, done, total)).await?;
    drop(progress);
    if output.json {
        return print::json(&model);
    }
    writeln!(std::io::stdout(), "{}  {}", model.name, model.id)?;
    Ok(())
}

/// `coel model precision`.
pub async fn precision(bounds: Option<Bounds>, data: DataArgs) -> Result<(), Failure> {
    match bounds {
        Some(bounds) => Ok(ask::<()>(&data.data, &Request::Precision { bounds }, |_, _, _| ()).await?),
        None => {
            let status: Status = ask(&data.data, &Request::Status, |_, _, _| ()).await?;
            writeln!(std::io::stdout(), "{}", status.precisions)?;
            Ok(())
        }
    }
}

/// `coel model ls`.
pub async fn models(data: DataArgs, output: Output) -> Result<(), Failure> {
    let status: Status = ask(&data.data, &Request::Status, |_, _, _| ()).await?;
    if output.json {
        return print::json(&status.models);
    }
    let placed = |model: &ModelInfo| {
        if status.model.as_ref() == Some(model) { "placed" } else { "registered" }
    };
    let rows = status.models.iter().map(|model| vec![model.name.clone(), placed(model).into(), model.id.clone()]);
    writeln!(std::io::stdout(), "{}", print::table(&["model", "is", "id"], 3, rows))?;
    Ok(())
}
