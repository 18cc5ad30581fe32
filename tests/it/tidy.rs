//! Rules for the whole code base, checked on its sources: which crates and modules may import which, that nothing is
//! half built, and that every module says what it is for.
//!
//! The tests build nothing and only read files, so they are fast.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use toml::Table;

const LEAVES: [&str; 3] = ["gossip", "model", "store"];
const CRATES: [&str; 6] = ["gossip", "model", "store", "node", "testnet", "tests"];
/// The crates inside `model`, each with those it may depend on.
const INNER: [(&str, &[&str]); 4] = [
    ("model/weights", &[]),
    ("model/kernels", &["weights"]),
    ("model/gpu", &["kernels", "weights"]),
    ("model", &["gpu", "kernels", "weights"]),
];
/// The crate without code that gives every dependency one set of features.
const UNIFY: &str = ".cargo/unify";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Rust files of a crate, with their text.
fn sources(name: &str) -> Vec<(PathBuf, String)> {
    let mut folders = vec![root().join(name)];
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                sources.push((path, text));
            }
        }
    }
    assert!(!sources.is_empty(), "{name} has no sources");
    sources
}

/// The `coel-*` crates that a crate depends on in any way, including for builds and tests.
fn dependencies(name: &str) -> Vec<String> {
    fn collect(table: &Table, found: &mut Vec<String>) {
        for (key, value) in table {
            let Some(inner) = value.as_table() else { continue };
            if key.ends_with("dependencies") {
                found.extend(inner.keys().filter_map(|name| name.strip_prefix("coel-")).map(str::to_owned));
            } else {
                collect(inner, found);
            }
        }
    }
    let manifest = std::fs::read_to_string(root().join(name).join("Cargo.toml")).unwrap();
    let mut found = Vec::new();
    collect(&manifest.parse().unwrap(), &mut found);
    found.sort();
    found.dedup();
    assert_eq!(found.iter().position(|name| name == "unify").map(|index| found.remove(index)), Some("unify".into()));
    found
}

#[test]
fn leaves_never_import_one_another() {
    for leaf in LEAVES {
        if leaf != "model" {
            assert_eq!(dependencies(leaf), Vec::<String>::new(), "{leaf}");
        }
        for (path, text) in sources(leaf) {
            for other in CRATES.into_iter().filter(|&other| other != leaf) {
                assert!(!text.contains(&format!("coel_{other}")), "{} names coel_{other}", path.display());
            }
        }
    }
}

#[test]
fn the_crates_inside_model_import_one_another_one_way() {
    for (name, below) in INNER {
        assert_eq!(dependencies(name), below, "{name}");
    }
}

#[test]
fn everything_else_points_downwards() {
    assert_eq!(dependencies("node"), LEAVES);
    let testnet = dependencies("testnet");
    assert!(testnet.contains(&"node".to_owned()) && !testnet.contains(&"tests".to_owned()), "{testnet:?}");
    for name in CRATES {
        assert!(!dependencies(name).contains(&"tests".to_owned()), "{name} imports the tests");
        let upward = name != "tests" && name != "testnet" && dependencies(name).contains(&"testnet".to_owned());
        assert!(!upward, "{name} imports the testnet");
    }
}

/// The rooms of a crate: its top-level modules, each with the others that it names through `crate::` outside its tests.
fn rooms(name: &str) -> BTreeMap<String, BTreeSet<String>> {
    let root = root().join(name).join("src");
    let mut rooms = BTreeMap::<String, BTreeSet<String>>::new();
    for (path, text) in sources(name) {
        let Ok(inner) = path.strip_prefix(&root) else { continue };
        let room = inner.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned();
        let is_test = inner.components().any(|part| part.as_os_str().to_string_lossy().contains("tests"));
        if is_test || room == "lib" {
            continue;
        }
        let text = text.split("#[cfg(test)]").next().unwrap_or_default();
        let code: String = text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect();
        let named = rooms.entry(room.clone()).or_default();
        for path in code.split("crate::").skip(1) {
            named.extend(heads(path).into_iter().filter(|other| *other != room));
        }
    }
    rooms
}

/// The first segments of the paths after a `crate::`: one, or several in braces.
fn heads(path: &str) -> Vec<String> {
    let word = |text: &str| text.trim().split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap().to_owned();
    let Some(list) = path.strip_prefix('{') else { return vec![word(path)] };
    let (mut heads, mut depth, mut head) = (Vec::new(), 0, String::new());
    for c in list.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => heads.push(word(&std::mem::take(&mut head))),
            _ => {
                depth += i32::from(c == '{') - i32::from(c == '}');
                head.push(c);
            }
        }
    }
    heads.push(word(&head));
    heads
}

/// Crates whose rooms import one another in one direction only.
const ONE_WAY: [&str; 6] = ["gossip", "store", "model", "model/weights", "model/kernels", "model/gpu"];

#[test]
fn rooms_import_one_another_one_way() {
    assert_eq!(heads("a::{b, c}, d"), ["a"]);
    assert_eq!(heads("{a, b::{c, d}, e::f};"), ["a", "b", "e"]);
    for name in ONE_WAY {
        let mut rooms = rooms(name);
        assert!(rooms.len() > 3 && rooms.values().any(|named| !named.is_empty()), "{rooms:?}");
        // A room that imports none of the remaining ones is not part of a cycle.
        while let Some(leaf) = rooms
            .iter()
            .find(|(_, named)| named.iter().all(|other| !rooms.contains_key(other)))
            .map(|(room, _)| room.clone())
        {
            rooms.remove(&leaf);
        }
        assert!(rooms.is_empty(), "{name} has a circle among {rooms:#?}");
    }
}

#[test]
fn the_workspace_is_these_crates() {
    let manifest: Table = std::fs::read_to_string(root().join("Cargo.toml")).unwrap().parse().unwrap();
    let members = manifest["workspace"]["members"].as_array().unwrap();
    let members: BTreeSet<_> = members.iter().filter_map(|member| member.as_str()).collect();
    let inner = INNER.map(|(name, _)| name);
    assert_eq!(members, CRATES.into_iter().chain(inner).chain([UNIFY]).collect());
    assert!(!manifest.contains_key("package"), "the root is virtual");
}

#[test]
fn nothing_is_left_half_built() {
    // This file names the marks, so it is left out below.
    let marks = ["todo!", "unimplemented!", "FIXME", "TODO", "XXX"].map(|mark| (mark, mark.ends_with('!')));
    for name in CRATES {
        for (path, text) in sources(name).into_iter().filter(|(path, _)| !path.ends_with("it/tidy.rs")) {
            for (number, line) in (1..).zip(text.lines()) {
                let found = marks.iter().find(|(mark, is_macro)| {
                    if *is_macro {
                        line.contains(&format!("{mark}("))
                    } else {
                        line.split(|c: char| !c.is_alphanumeric()).any(|word| word == *mark)
                    }
                });
                assert!(found.is_none(), "{}:{number}: {line}", path.display());
            }
        }
    }
}

#[test]
fn every_module_says_what_it_is_for() {
    for name in CRATES {
        for (path, text) in sources(name) {
            // The module's own doc comment covers a test file beside it.
            let is_tests =
                path.file_stem().is_some_and(|stem| stem == "tests" || stem.to_string_lossy().ends_with("_tests"));
            let below_tests = path.parent().is_some_and(|parent| parent.ends_with("tests") && name != "tests");
            assert!(text.starts_with("//!") || is_tests || below_tests, "{} does not open with //!", path.display());
        }
    }
}

/// The rooms of `node`, from bottom to top: each imports only itself and rooms before it.
const ROOMS: [&str; 20] = [
    "ids",
    "system",
    "metrics",
    "lifecycle",
    "service",
    "http",
    "config",
    "budget",
    "placement",
    "weights",
    "registry",
    "mesh",
    "import",
    "hosting",
    "experts",
    "status",
    "generation",
    "control",
    "runtime",
    "cli",
];

/// The first segment of every `crate::` path in the code of `text`, without its tests.
fn rooms_named_in(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let code: String = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let mut named = Vec::new();
    for path in code.split("crate::").skip(1) {
        let group = path.strip_prefix('{').map(|group| group.split("};").next().unwrap_or_default());
        let mut depth = 0;
        // In a group, the names at its own level; otherwise the one name that follows.
        let names = group.unwrap_or(path).split(|c: char| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            (c == ',' && depth == 0) || (group.is_none() && !c.is_alphanumeric() && c != '_')
        });
        let first =
            |name: &str| name.trim().split(|c: char| !c.is_alphanumeric() && c != '_').next().map(str::to_owned);
        let names = names.filter_map(first).filter(|name| !name.is_empty());
        named.extend(names.take(if group.is_some() { usize::MAX } else { 1 }));
    }
    named
}

#[test]
fn the_rooms_of_a_node_import_one_another_in_one_direction() {
    assert_eq!(
        rooms_named_in("use crate::{ids, mesh::{self, MeshView}, system};\nlet x = crate::http::serve();"),
        ["ids", "mesh", "system", "http"]
    );
    let source = root().join("node/src");
    let rank = |room: &str| ROOMS.iter().position(|one| *one == room);
    let files = sources("node").into_iter().filter_map(|(path, text)| {
        let inside = path.strip_prefix(&source).ok()?;
        let room = inside.components().next()?.as_os_str().to_str()?.trim_end_matches(".rs").to_owned();
        (!["lib", "main"].contains(&room.as_str())).then_some((path, room, text))
    });
    for (path, room, text) in files {
        let own = rank(&room).unwrap_or_else(|| panic!("{}: not among the rooms listed here", path.display()));
        for named in rooms_named_in(&text) {
            let other = rank(&named).unwrap_or_else(|| panic!("{}: crate::{named} is no room", path.display()));
            assert!(other <= own, "{} imports crate::{named}, which is above it", path.display());
        }
    }
}

/// The features of every dependency of the selected packages on this platform, along these edges, as `cargo tree`
/// resolves them.
fn features(selection: &[&str], edges: &str) -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let tree = std::process::Command::new(cargo)
        .args(["tree", "--locked", "--offline", "--prefix", "none", "--edges", edges])
        .args(["--format", "{p}|{f}"])
        .args(selection)
        .current_dir(root())
        .output()
        .unwrap();
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let mut features = BTreeMap::<String, BTreeSet<String>>::new();
    for line in String::from_utf8(tree.stdout).unwrap().lines() {
        let Some((package, of)) = line.rsplit_once('|') else { continue };
        let package = package.split(" (").next().unwrap().to_owned();
        features.entry(package).or_default().insert(of.trim_end_matches(" (*)").to_owned());
    }
    features
}

#[test]
fn a_dependency_has_the_same_features_whichever_packages_are_built() {
    // First the dependencies that run on this machine's target; then everything that is built, including what runs
    // inside the build.
    for edges in ["normal,dev,no-proc-macro", "normal,build,dev"] {
        let whole = features(&["--workspace"], edges);
        assert!(whole.len() > 100, "{whole:?}");
        for name in CRATES.into_iter().chain(INNER.map(|(name, _)| name)) {
            let package = format!("coel-{}", name.rsplit('/').next().unwrap());
            for (dependency, of) in features(&["--package", &package], edges) {
                let with = &whole[&dependency];
                let what = format!("{package} alone builds {dependency} with {of:?}, the workspace with {with:?}");
                assert!(of.is_subset(with), "{what}: list it in {UNIFY}/Cargo.toml");
            }
        }
    }
}
