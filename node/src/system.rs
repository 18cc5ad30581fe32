//! What this crate asks of the operating system: memory, processor time, disk space, signals, threads for blocking work.
//!
//! Every `unsafe` block of the crate is here. It decides nothing and knows nothing of models or meshes.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

pub use coel_model::system::{machine_bytes as physical_memory_bytes, resident_bytes};
pub use coel_store::free_disk_bytes;

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
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec.max(0) as u32)
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

/// Runs blocking work, such as reading files, on a thread of its own. A panic of the work goes on here.
pub async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
