//! How far a database is known to be on the disk: a number in a file beside it, which only grows.
//!
//! sled takes a file that ends too early, or a page whose checksum is wrong, for writes that a power cut interrupted: it drops them
//! and all that came later, and says nothing. So each write carries a number, and the last one that is on the disk is noted here,
//! where damage to the database does not reach. A database that ends before the mark has lost what was acknowledged.
//!
//! Invariant: the mark never names a write that is not on the disk. It is not synced itself, so a power cut may set it back.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The name of the file. sled has none like it.
const NAME: &str = "durable";
/// The number and its checksum, 8 bytes each.
const BYTES: usize = 16;

fn encode(number: u64) -> [u8; BYTES] {
    let number = number.to_be_bytes();
    let mut bytes = [0; BYTES];
    bytes[..8].copy_from_slice(&number);
    bytes[8..].copy_from_slice(&blake3::hash(&number).as_bytes()[..8]);
    bytes
}

/// The mark of one database.
pub(super) struct Mark(File);

impl Mark {
    /// Opens or creates the mark in the folder of a database, and reads it: zero where there is none that is whole.
    pub fn open(folder: &Path) -> io::Result<(Self, u64)> {
        let options = File::options().read(true).write(true).create(true).truncate(false).clone();
        let file = options.open(folder.join(NAME))?;
        let mut bytes = [0; BYTES];
        let number = match file.read_exact_at(&mut bytes, 0) {
            Ok(()) => bytes.first_chunk().map_or(0, |number| u64::from_be_bytes(*number)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
            Err(error) => return Err(error),
        };
        Ok((Self(file), if bytes == encode(number) { number } else { 0 }))
    }

    /// Notes that every write up to `number` is on the disk.
    pub fn set(&self, number: u64) -> io::Result<()> {
        self.0.write_all_at(&encode(number), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_set_and_ignored_where_it_is_not_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (mark, number) = Mark::open(folder.path()).unwrap();
        assert_eq!(number, 0);
        mark.set(1 << 40).unwrap();
        assert_eq!(Mark::open(folder.path()).unwrap().1, 1 << 40);
        let path = folder.path().join(NAME);
        let whole = std::fs::read(&path).unwrap();
        for damaged in [whole[..BYTES - 1].to_vec(), vec![], [&[7], &whole[1..]].concat(), vec![0; BYTES]] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(Mark::open(folder.path()).unwrap().1, 0);
        }
    }
}
