//! This node's identity on disk.
//!
//! Invariant: the file is absent or whole, and only its owner can read it. A damaged file is never replaced: its owner may have
//! a backup.

use std::io;
use std::path::{Path, PathBuf};

use coel_gossip::Identity;
use coel_store::replace_secret_file;

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file cannot be read.
    #[error("cannot read the identity file {}: {cause}", path.display())]
    Read { path: PathBuf, cause: io::Error },
    /// The file cannot be written.
    #[error("cannot write the identity file {}: {cause}", path.display())]
    Write { path: PathBuf, cause: io::Error },
    /// The file holds no key.
    #[error(
        "the identity file {} is damaged; restore it from a backup, or remove it to start as a new node",
        path.display()
    )]
    Damaged { path: PathBuf },
}

/// Reads the identity in `path`, or generates one and writes it there. The folder must exist.
///
/// # Errors
/// [`IdentityError`], each naming the path.
pub fn load_or_create(path: &Path) -> Result<Identity, IdentityError> {
    match std::fs::read(path) {
        Ok(bytes) => Identity::from_bytes(&bytes).ok_or_else(|| IdentityError::Damaged { path: path.to_owned() }),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            let identity = Identity::generate();
            let written = replace_secret_file(path, &identity.to_bytes());
            written.map_err(|cause| IdentityError::Write { path: path.to_owned(), cause })?;
            Ok(identity)
        }
        Err(cause) => Err(IdentityError::Read { path: path.to_owned(), cause }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_identity_is_kept_in_its_file_and_readable_by_its_owner_only() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("identity");
        let first = load_or_create(&path).expect("created");
        let again = load_or_create(&path).expect("loaded");
        assert_eq!(first.peer_id(), again.peer_id());
        assert_eq!(fs::metadata(&path).expect("exists").permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).expect("listable").count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_damaged_identity_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("identity");
        fs::write(&path, b"not a key").expect("written");
        let error = load_or_create(&path).expect_err("damaged");
        assert!(matches!(error, IdentityError::Damaged { .. }));
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        assert_eq!(fs::read(&path).expect("still there"), b"not a key");
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = load_or_create(Path::new("/nonexistent/identity")).expect_err("no folder");
        assert!(error.to_string().contains("/nonexistent/identity"), "{error}");
    }
}
