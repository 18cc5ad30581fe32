//! System calls: priority of a thread, memory of the machine and of this process.

/// Added to the nice value of a thread that is to yield to others.
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// Puts the calling thread below the priority of everything that answers in time.
#[cfg(target_os = "linux")]
pub(crate) fn lower_priority() {
    // On Linux, no process means the calling thread.
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!("the thread keeps its priority: {error}");
    }
}

/// Puts the calling thread below the priority of everything that answers in time.
#[cfg(not(target_os = "linux"))]
pub(crate) fn lower_priority() {
    tracing::debug!("thread priorities are lowered on Linux only");
}

/// Memory of this machine, bytes.
pub fn machine_bytes() -> u64 {
    // SAFETY: sysconf has no preconditions.
    let (pages, page) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    u64::try_from(pages).unwrap_or(0) * u64::try_from(page).unwrap_or(0)
}

/// Memory this process has resident, bytes; 0 where the system does not say.
pub fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
