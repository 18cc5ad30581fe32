//! The unmodified `openai` client from PyPI against a mesh: the API's contract as client code sees it.
//!
//! The client is installed into a virtual environment of its own below the build folder, once. On a machine without
//! Python or without access to the package index this test fails, unless `COEL_SKIP_PYTHON=1` acknowledges that.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::support::{MODEL, mesh, turn};

/// A hang guard; an install over a slow connection takes a minute.
const LIMIT: Duration = Duration::from_secs(420);

/// Runs a command to its end and returns its output.
async fn run(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(LIMIT, output).await.map_err(|_| format!("{command:?} hangs"))?;
    let output = output.map_err(|error| format!("{command:?}: {error}"))?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(said) } else { Err(format!("{command:?}: {}\n{said}", output.status)) }
}

/// The path of a Python interpreter that has the client installed.
async fn client() -> Result<PathBuf, String> {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("openai-client");
    let python = venv.join("bin/python");
    let has_client = |python: &Path| {
        let mut command = Command::new(python);
        command.args(["-c", "import openai; print(openai.__version__)"]);
        command
    };
    if run(&mut has_client(&python)).await.is_ok() {
        return Ok(python);
    }
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv)).await?;
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "openai"];
    run(Command::new(&python).args(pip)).await?;
    run(&mut has_client(&python)).await?;
    Ok(python)
}

#[tokio::test]
async fn the_unmodified_openai_client_works() {
    let python = match client().await {
        Ok(python) => python,
        Err(reason) => {
            eprintln!("THE OPENAI CLIENT WAS NOT TESTED: it could not be installed\n{reason}");
            let known = std::env::var("COEL_SKIP_PYTHON").is_ok_and(|value| value == "1");
            assert!(known, "install python3 with venv and allow PyPI, or set COEL_SKIP_PYTHON=1\n{reason}");
            return;
        }
    };
    let _turn = turn().await;
    let (mesh, _, _) = mesh(1, 100).await;
    let api = mesh.nodes()[0].api().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/openai_client.py");
    let mut client = Command::new(python);
    // The node is on this machine, so no proxy applies, even if PyPI is reached through one.
    client.arg(script).args([&api, MODEL, "Paris"]).env("NO_PROXY", "127.0.0.1").env("no_proxy", "127.0.0.1");
    if let Err(reason) = run(&mut client).await {
        panic!("{reason}\n{}", mesh.nodes()[0].tail());
    }
}
