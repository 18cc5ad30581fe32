//! This node's identity: an ed25519 key pair, kept in one file.
//!
//! Owns: the key and its file. Invariant: the file is either absent or whole, and readable by its owner alone.
//! Deliberately does not know: what the peer id is used for.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use libp2p::PeerId;
use libp2p::identity::Keypair;

/// The key pair behind a [`PeerId`].
#[derive(Clone)]
pub struct Identity {
    keypair: Keypair,
}

/// Shows the public half only.
impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Identity").field(&self.peer_id()).finish()
    }
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("cannot read the identity file {}: {cause}", path.display())]
    Read { path: PathBuf, cause: io::Error },
    #[error("cannot write the identity file {}: {cause}", path.display())]
    Write { path: PathBuf, cause: io::Error },
    #[error(
        "the identity file {} is damaged; restore it from a backup, or remove it to start as a new node",
        path.display()
    )]
    Damaged { path: PathBuf },
}

impl Identity {
    /// A new identity, in memory only.
    pub fn generate() -> Identity {
        Identity { keypair: Keypair::generate_ed25519() }
    }

    /// Reads the identity in `path`, or generates one and writes it there (mode 0600: temporary file, fsync, rename). The
    /// folder must exist.
    ///
    /// # Errors
    /// [`IdentityError`], each naming the path. A damaged file is never replaced: its owner may have a backup.
    pub fn load_or_create(path: &Path) -> Result<Identity, IdentityError> {
        match fs::read(path) {
            Ok(bytes) => {
                let keypair = Keypair::from_protobuf_encoding(&bytes);
                let ed25519 = keypair.ok().filter(|keypair| keypair.clone().try_into_ed25519().is_ok());
                let keypair = ed25519.ok_or_else(|| IdentityError::Damaged { path: path.to_owned() })?;
                Ok(Identity { keypair })
            }
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                let identity = Identity::generate();
                identity.write(path).map_err(|cause| IdentityError::Write { path: path.to_owned(), cause })?;
                Ok(identity)
            }
            Err(cause) => Err(IdentityError::Read { path: path.to_owned(), cause }),
        }
    }

    pub fn peer_id(&self) -> PeerId {
        self.keypair.public().to_peer_id()
    }

    pub(crate) fn keypair(&self) -> &Keypair {
        &self.keypair
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let bytes = self.keypair.to_protobuf_encoding().map_err(io::Error::other)?;
        let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(&temporary)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        // The name must survive a power cut too, or the node comes back as a stranger.
        match path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            Some(folder) => fs::File::open(folder)?.sync_all(),
            None => fs::File::open(".")?.sync_all(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_kept_in_its_file_and_readable_by_its_owner_only() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("identity");
        let first = Identity::load_or_create(&path).expect("created");
        let again = Identity::load_or_create(&path).expect("loaded");
        assert_eq!(first.peer_id(), again.peer_id());
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(fs::metadata(&path).expect("exists").permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(fs::read_dir(folder.path()).expect("listable").count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_damaged_identity_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("identity");
        fs::write(&path, b"not a key").expect("written");
        let error = Identity::load_or_create(&path).expect_err("damaged");
        assert!(matches!(error, IdentityError::Damaged { .. }));
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        assert_eq!(fs::read(&path).expect("still there"), b"not a key");
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = Identity::load_or_create(Path::new("/nonexistent/identity")).expect_err("no folder");
        assert!(error.to_string().contains("/nonexistent/identity"), "{error}");
    }

    #[test]
    fn the_secret_is_not_shown() {
        let identity = Identity::generate();
        assert_eq!(format!("{identity:?}"), format!("Identity(PeerId(\"{}\"))", identity.peer_id()));
    }
}
