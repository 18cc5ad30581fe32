//! A disk that fills while its node runs, and one that is full when a node starts: nothing is lost, and no answer is cut.
//!
//! The disk is a small tmpfs, which only the root of a mount namespace may mount. So the test runs itself again in a user namespace of its
//! own; where the system allows none it says so and tests nothing.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use coel_node::control::Request;
use coel_node::service::ModelInfo;
use coel_node::status::Status;
use coel_testnet::mesh::Mesh;
use coel_testnet::node::Start;

use crate::support::{MODEL, continue_tokens, fixture, guarded, launcher, run, spec, turn, until};

/// In the environment of a test that may mount.
const MAY_MOUNT: &str = "COEL_TEST_MAY_MOUNT";
const SIZE: &str = "size=256m";

fn namespace() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount"]).env(MAY_MOUNT, "1");
    command
}

/// Whether this process may mount. If not, the test of this name has been run in one that may, if there can be one.
async fn may_mount(test: &str) -> bool {
    if std::env::var_os(MAY_MOUNT).is_some() {
        return true;
    }
    let probe = namespace().arg("true").stderr(Stdio::null()).status();
    if !probe.is_ok_and(|ended| ended.success()) {
        eprintln!("skipped: this system lets nobody but root mount a small disk");
        return false;
    }
    let mut command = namespace();
    command.arg(std::env::current_exe().unwrap()).args(["--exact", &format!("full_disk::{test}"), "--nocapture"]);
    let ended = run(command).await;
    assert!(ended.printed().contains("1 passed"), "{ended:#?}");
    false
}

fn mount(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", SIZE, "tmpfs"]).arg(folder).status();
    assert!(mounted.unwrap().success());
}

/// Fills the disk to the last byte; returns the file that does.
fn fill(folder: &Path) -> PathBuf {
    let path = folder.join("filler");
    let mut file = File::create(&path).unwrap();
    for bytes in [1 << 20, 4096] {
        loop {
            match file.write_all(&vec![1; bytes]) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
    path
}

#[tokio::test]
async fn a_full_disk_stops_writes_and_nothing_else() {
    let _turn = turn().await;
    if !may_mount("a_full_disk_stops_writes_and_nothing_else").await {
        return;
    }
    let mut mesh = Mesh::new(launcher()).unwrap();
    let data = mesh.add(spec("a")).unwrap().data();
    mount(&data);
    mesh.node(0).start(&Start::New).await.unwrap();
    let import = Request::Import { dir: fixture(), name: Some(MODEL.into()) };
    guarded(mesh.nodes()[0].ask::<ModelInfo>(&import, |_, _, _| ())).await.unwrap();
    until(&mut mesh, 0, "it answers", |status| status.readiness.ready).await;
    let (api, prompt) = (mesh.nodes()[0].api().unwrap(), [5, 6, 7, 8]);
    let before = continue_tokens(&api, &prompt, 64, |_| ()).await.unwrap();

    // The log is written in the middle of an answer.
    let filler = fill(&data);
    let (answer, refused) = tokio::join!(continue_tokens(&api, &prompt, 64, |_| ()), guarded(mesh.invite(1)));
    assert_eq!(answer.unwrap().text, before.text);
    let refused = format!("{:#}", refused.unwrap_err());
    let name = data.display().to_string();
    for part in [&*name, "is full", "bytes are free", "make room"] {
        assert!(refused.contains(part), "no {part:?} in {refused}");
    }
    let warned = |warning: &String| warning.contains(&name) && warning.contains("log takes nothing");
    until(&mut mesh, 0, "it warns", |status| status.warnings.iter().any(warned)).await;
    assert_eq!(continue_tokens(&api, &prompt, 64, |_| ()).await.unwrap().text, before.text);

    // It goes on by itself.
    fs::remove_file(&filler).unwrap();
    until(&mut mesh, 0, "it leads", |status| status.leader.is_some() && !status.warnings.iter().any(warned)).await;
    mesh.invite(1).await.unwrap();
    assert!(mesh.node(0).is_running());

    // Nothing on the disk is called damaged, and nothing is lost.
    mesh.node(0).kill();
    let filler = fill(&data);
    mesh.node(0).start(&Start::Again).await.unwrap_err();
    assert_eq!(mesh.node(0).wait_end().await.and_then(|ended| ended.code()), Some(1));
    let said = mesh.node(0).tail();
    assert!(said.contains(&name) && said.contains("is full") && !said.contains("damaged"), "{said}");
    fs::remove_file(&filler).unwrap();
    mesh.node(0).start(&Start::Again).await.unwrap();
    until(&mut mesh, 0, "it answers again", |status| status.readiness.ready).await;
    let api = mesh.nodes()[0].api().unwrap();
    assert_eq!(continue_tokens(&api, &prompt, 64, |_| ()).await.unwrap().text, before.text);
    mesh.shut_down().await;
}

#[tokio::test]
async fn a_leader_with_a_full_disk_is_replaced_and_comes_back() {
    let _turn = turn().await;
    if !may_mount("a_leader_with_a_full_disk_is_replaced_and_comes_back").await {
        return;
    }
    let mut mesh = Mesh::new(launcher()).unwrap();
    let data = mesh.add(spec("a")).unwrap().data();
    mount(&data);
    mesh.node(0).start(&Start::New).await.unwrap();
    let invite = mesh.invite(2).await.unwrap();
    mesh.join(vec![spec("b"), spec("c")], &invite).await.unwrap();
    let all_vote = |status: &Status| status.nodes.len() == 3 && status.nodes.iter().all(|node| node.voter);
    let leads = until(&mut mesh, 0, "three voters", all_vote).await.leader;
    let own = mesh.nodes()[0].status().await.unwrap().node_id;
    assert_eq!(leads, Some(own), "the first of them leads");

    let filler = fill(&data);
    guarded(mesh.invite(1)).await.unwrap_err();
    let is_other = |status: &Status| status.leader.is_some_and(|leader| leader != own);
    until(&mut mesh, 1, "another leads", is_other).await;
    let ask = Request::Invite { uses: 1, ttl_s: 600 };
    guarded(mesh.nodes()[1].ask::<String>(&ask, |_, _, _| ())).await.unwrap();

    fs::remove_file(&filler).unwrap();
    until(&mut mesh, 0, "it follows", is_other).await;
    guarded(mesh.invite(1)).await.unwrap();
    let applied = mesh.nodes()[0].status().await.unwrap().applied;
    let same = until(&mut mesh, 1, "they agree", |status| status.applied >= applied).await;
    until(&mut mesh, 0, "they agree", |status| status.applied >= same.applied).await;
    mesh.shut_down().await;
}
