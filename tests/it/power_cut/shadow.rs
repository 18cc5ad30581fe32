//! Power cuts of a real process: the data folder as a disk may have it afterwards.
//!
//! `shadow.c`, loaded into the process, keeps what the disk is bound to have: each file as it was when it was last synced, each
//! folder's names as they were when that was. The files as they are now are what a disk has at most. A cut leaves something
//! in between, chosen by a seed: of a file written since, some pages and perhaps the length; of a folder's names, the old ones or the
//! new ones, since a file system keeps the order of its changes.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use rand::Rng;
use rand::rngs::StdRng;

/// The unit in which a disk writes a page or loses it.
const PAGE: usize = 4096;

/// Compiles the library that is loaded into the process, into `folder`.
pub fn compile(folder: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("it/power_cut/shadow.c");
    let library = folder.join("shadow.so");
    let mut compiler = std::process::Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o"]).arg(&library).arg(source).arg("-ldl");
    assert!(compiler.status().expect("a C compiler").success());
    library
}

/// A file, whatever its name: its inode and its time of birth.
type Key = String;

fn key(metadata: &fs::Metadata) -> Key {
    let born = metadata.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    format!("{}-{}.{:09}", metadata.ino(), born.as_secs(), born.subsec_nanos())
}

struct Entry {
    is_folder: bool,
    key: Key,
    name: OsString,
}

/// Files and folders with their content.
#[derive(Default)]
struct Content {
    files: BTreeMap<Key, Vec<u8>>,
    folders: BTreeMap<Key, Vec<Entry>>,
}

impl Content {
    /// Of a folder as it is now, with all below it.
    fn of(folder: &Path) -> Self {
        let mut content = Self::default();
        content.add(folder);
        content
    }

    fn add(&mut self, folder: &Path) {
        let mut entries = Vec::new();
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let (path, metadata) = (entry.path(), entry.metadata().unwrap());
            let (is_folder, key) = (metadata.is_dir(), key(&metadata));
            if is_folder {
                self.add(&path);
            } else if metadata.is_file() {
                self.files.insert(key.clone(), fs::read(&path).unwrap());
            } else {
                // A socket is nothing on the disk.
                continue;
            }
            entries.push(Entry { is_folder, key, name: entry.file_name() });
        }
        self.folders.insert(key(&fs::metadata(folder).unwrap()), entries);
    }

    /// What a shadow folder says.
    fn read(shadow: &Path) -> Self {
        let all = |kind: &str| {
            let entries = fs::read_dir(shadow.join(kind)).unwrap().map(|entry| entry.unwrap());
            entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        };
        let entry = |line: &[u8]| {
            let mut parts = line.splitn(3, |byte| *byte == b' ').map(<[u8]>::to_vec);
            let mut part = || parts.next().unwrap();
            let (kind, key) = (part(), String::from_utf8(part()).unwrap());
            Entry { is_folder: kind == b"d", key, name: OsString::from_vec(part()) }
        };
        let entries =
            |text: Vec<u8>| text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(entry).collect();
        Self { files: all("files").collect(), folders: all("names").map(|(key, text)| (key, entries(text))).collect() }
    }

    /// The opposite of [`Self::read`], into an empty folder.
    fn write(&self, shadow: &Path) {
        for kind in ["files", "names"] {
            fs::create_dir_all(shadow.join(kind)).unwrap();
        }
        for (key, bytes) in &self.files {
            fs::write(shadow.join("files").join(key), bytes).unwrap();
        }
        for (key, entries) in &self.folders {
            let mut text = Vec::new();
            for Entry { is_folder, key, name } in entries {
                let kind = if *is_folder { 'd' } else { 'f' };
                text.extend(format!("{kind} {key} ").into_bytes());
                text.extend(name.as_bytes());
                text.push(b'\n');
            }
            fs::write(shadow.join("names").join(key), text).unwrap();
        }
    }
}

/// The disk under one process's data folder.
#[derive(Debug)]
pub struct Disk {
    data: PathBuf,
    shadow: PathBuf,
}

impl Disk {
    /// The disk of the data folder `data` in `folder`, which need not exist yet; its parent must.
    pub fn of(folder: &Path) -> Self {
        let parent = folder.parent().unwrap().canonicalize().unwrap();
        let folder = parent.join(folder.file_name().unwrap());
        Self { data: folder.join("data"), shadow: folder.join("shadow") }
    }

    /// Begins with an empty data folder.
    pub fn create(&self) {
        fs::create_dir_all(&self.data).unwrap();
        self.settle();
    }

    /// Everything is on the disk as it is.
    fn settle(&self) {
        let _ = fs::remove_dir_all(&self.shadow);
        Content::of(&self.data).write(&self.shadow);
    }

    /// What loads `library` into a process that works on this disk.
    pub fn env(&self, library: &Path) -> Vec<(OsString, OsString)> {
        let variables =
            [("LD_PRELOAD", library), ("COEL_POWER_CUT_DATA", &self.data), ("COEL_POWER_CUT_SHADOW", &self.shadow)];
        variables.map(|(name, path)| (name.into(), path.into())).into()
    }

    /// Leaves what is left after a power cut. The process has been killed.
    pub fn cut(&self, rng: &mut StdRng) {
        let (synced, later) = (Content::read(&self.shadow), Content::of(&self.data));
        // Once in a while nothing more had reached the disk than had to.
        let share = if rng.random_bool(0.3) { 0.0 } else { rng.random_range(0.0..1.0) };
        let root = key(&fs::metadata(&self.data).unwrap());
        fs::remove_dir_all(&self.data).unwrap();
        Torn { synced, later, share, rng }.write(&root, &self.data);
        self.settle();
    }
}

/// What a cut leaves between `synced` and `later`: each page, length and folder that differs is a later one with the
/// probability `share`.
struct Torn<'a> {
    synced: Content,
    later: Content,
    share: f64,
    rng: &'a mut StdRng,
}

impl Torn<'_> {
    fn is_later(&mut self) -> bool {
        self.rng.random_bool(self.share)
    }

    fn write(&mut self, folder: &Key, path: &Path) {
        fs::create_dir(path).unwrap();
        // A folder that is gone by now has no later names.
        let is_later = self.is_later() && self.later.folders.contains_key(folder);
        let names = if is_later { &mut self.later } else { &mut self.synced };
        for Entry { is_folder, key, name } in names.folders.remove(folder).unwrap_or_default() {
            let path = path.join(name);
            if is_folder {
                self.write(&key, &path);
            } else {
                fs::write(path, self.bytes(&key)).unwrap();
            }
        }
    }

    fn bytes(&mut self, file: &Key) -> Vec<u8> {
        let mut bytes = self.synced.files.get(file).cloned().unwrap_or_default();
        let Some(later) = self.later.files.get(file).cloned() else { return bytes };
        // The length is metadata of its own: it may be ahead of the content.
        if self.is_later() {
            bytes.resize(later.len(), 0);
        }
        let end = bytes.len().min(later.len());
        for start in (0..end).step_by(PAGE) {
            if self.is_later() {
                let stop = end.min(start + PAGE);
                bytes[start..stop].copy_from_slice(&later[start..stop]);
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    /// Runs a shell script on a disk, without a cut.
    fn run(disk: &Disk, library: &Path, script: &str) {
        let mut shell = std::process::Command::new("sh");
        shell.args(["-ec", script]).current_dir(&disk.data).envs(disk.env(library));
        assert!(shell.status().unwrap().success(), "{script}");
    }

    #[test]
    fn a_cut_leaves_what_was_synced_and_may_leave_what_was_not() {
        let folder = tempfile::tempdir().unwrap();
        let library = compile(folder.path());
        let (mut kept_old, mut kept_new) = (false, false);
        for seed in 0..24 {
            let root = folder.path().join(seed.to_string());
            let disk = Disk::of(&root);
            disk.create();
            let file = |name: &str| fs::read_to_string(disk.data.join(name)).ok();
            // `sync FILE` is fsync of it.
            run(&disk, &library, "printf old > a; printf old > b; mkdir c; printf in > c/d; sync a b c/d c .");
            run(&disk, &library, "printf new > a; mv b e; printf new > f; sync f");
            disk.cut(&mut StdRng::seed_from_u64(seed));
            assert_eq!(file("c/d").as_deref(), Some("in"));
            assert!(matches!(file("a").as_deref(), Some("old" | "new")), "seed {seed}: {:?}", file("a"));
            match [file("b"), file("e"), file("f")] {
                [Some(old), None, None] => kept_old |= old == "old",
                [None, Some(old), Some(new)] => kept_new |= old == "old" && new == "new",
                names => panic!("seed {seed}: half of the changes of a folder: {names:?}"),
            }
            run(&disk, &library, "printf last > a; printf last > c/g; sync a c/g c");
            disk.cut(&mut StdRng::seed_from_u64(seed));
            assert_eq!([file("a"), file("c/g")], [Some("last".into()), Some("last".into())]);
        }
        assert!(kept_old && kept_new, "some cuts keep a rename, and some do not");
    }
}
