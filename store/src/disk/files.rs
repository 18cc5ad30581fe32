//! Files that appear whole or not at all, and survive a power cut.
//!
//! The procedure is the same everywhere: write beside the target, fsync the file, rename it, fsync the folder. Renames of
//! several files share the last step. What the files mean is not known here.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Renames that become durable together, in [`Renames::sync`].
#[derive(Default)]
#[must_use = "a rename is durable only after sync()"]
pub(crate) struct Renames(BTreeSet<PathBuf>);

impl Renames {
    /// Puts `from`, whose content is on the disk already, in the place of `to`.
    pub fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)?;
        if let Some(folder) = to.parent() {
            self.0.insert(folder.to_owned());
        }
        Ok(())
    }

    /// Makes every rename durable.
    pub fn sync(self) -> io::Result<()> {
        self.0.iter().try_for_each(|folder| sync_folder(folder))
    }
}

/// Replaces the content of `path` by `bytes`: after a crash at any point the file is the old one or the new one.
///
/// # Errors
/// Whatever the system refuses. The temporary file beside `path` may remain then; the next call overwrites it.
pub fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace(path, bytes, File::options().write(true).create(true).truncate(true))
}

/// Like [`replace_file`], and only the file's owner may read it.
///
/// # Errors
/// Those of [`replace_file`].
pub fn replace_secret_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    replace(path, bytes, File::options().write(true).create(true).truncate(true).mode(0o600))
}

fn replace(path: &Path, bytes: &[u8], options: &OpenOptions) -> io::Result<()> {
    let mut name = path.file_name().map_or_else(OsString::new, ToOwned::to_owned);
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let mut file = options.open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    let mut renames = Renames::default();
    renames.rename(&temporary, path)?;
    renames.sync()
}

/// Makes the entries of a folder durable.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_is_whole_and_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("member");
        replace_file(&path, b"first").unwrap();
        replace_file(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
        assert!(replace_file(&folder.path().join("nowhere/member"), b"x").is_err());
    }

    #[test]
    fn a_secret_file_is_readable_by_its_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        replace_secret_file(&path, b"secret").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
