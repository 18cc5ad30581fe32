//! What this crate asks of the operating system: memory, processor time, disk space, signals, files, threads for blocking work.
//!
//! Every `unsafe` block of the crate is here. It decides nothing and knows nothing of models or meshes.

use std::io;
use std::path::Path;
use std::time::Duration;

pub use coel_model::system::{machine_bytes as physical_memory_bytes, resident_bytes};

/// Returns free heap memory to the system. The allocator keeps an arena per thread, and an arena keeps what finished work freed.
pub fn trim_heap() {
    // SAFETY: malloc_trim has no preconditions; it takes the locks it needs.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Processor time of this process so far. The compute thread uses nearly all of it.
pub fn cpu_time() -> Duration {
    // SAFETY: getrusage fills the struct it is given, and all zeroes are a valid rusage, whose fields are plain integers.
    let usage = unsafe {
        let mut usage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let time = |t: libc::timeval| Duration::new(t.tv_sec.max(0) as u64, t.tv_usec.max(0) as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Bytes that this process may still write in `folder`.
///
/// # Errors
/// Those of the file system.
pub fn free_disk_bytes(folder: &Path) -> io::Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(folder.as_os_str().as_bytes())?;
    // SAFETY: `path` is a C string that outlives the call; statvfs fills the struct it is given, and all zeroes are a valid
    // statvfs, whose fields are plain integers.
    let (done, found) = unsafe {
        let mut found: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &mut found), found)
    };
    match done {
        0 => Ok(found.f_bavail * found.f_frsize),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets a closed pipe end this process quietly, as it ends other commands: `coel generate ... | head`. Call it before any other
/// thread starts.
pub fn end_on_closed_pipe() {
    // SAFETY: no other thread runs yet, and the default action needs no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// This machine's name, cut to 32 characters; `node` where it has none.
pub fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().take(32).collect();
    if name.is_empty() { "node".into() } else { name }
}

/// Replaces the file at `path`: a reader sees the old content or the new one, never a part. The content is not synced to the disk.
///
/// # Errors
/// Those of the file system.
pub fn replace_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    std::fs::write(&temporary, content)?;
    std::fs::rename(&temporary, path)
}

/// Runs blocking work, such as reading files, on a thread of its own. A panic of the work goes on here.
pub async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_has_the_new_content_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.json");
        for content in ["a longer first one", "second"] {
            replace_file(&path, content.as_bytes()).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(replace_file(&dir.path().join("missing/node.json"), b"x").is_err());
    }
}
