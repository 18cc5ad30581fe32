//! Child processes that cannot outlive this one.
//!
//! Owns how a node process is started, signalled, measured and reaped. The invariant: a child dies with this process,
//! however that ends. The kernel sees to it (`PR_SET_PDEATHSIG`), so it holds for `kill -9` too. Because that signal is
//! sent when the *thread* that forked ends, all children are forked by one thread that never does.
//!
//! Each child leads a process group of its own: Ctrl-C in the terminal reaches this process only, which then ends its
//! children in order. It does not know what a node is, or when one is well.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// First argument that makes this crate's program the `coel` program.
pub const NODE_ARGUMENT: &str = "__node";
/// How often a child that is expected to end is looked at.
const REAP_POLL: Duration = Duration::from_millis(20);

/// The program that children run: one that is all of `coel` behind [`NODE_ARGUMENT`].
#[derive(Debug, Clone)]
pub struct Launcher {
    program: PathBuf,
}

impl Launcher {
    /// This very program, executed again.
    ///
    /// # Errors
    /// Where the system does not say which file that is.
    pub fn this_program() -> io::Result<Self> {
        Ok(Self { program: std::env::current_exe()? })
    }

    /// Another program whose main function is [`crate::main`].
    pub fn of(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into() }
    }

    /// `coel ARGS`, with none of the caller's `COEL_*` settings and nothing to read.
    pub fn coel<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(NODE_ARGUMENT).args(args).stdin(Stdio::null());
        let ours = |name: &OsString| name.to_string_lossy().starts_with("COEL_");
        for (name, _) in std::env::vars_os().filter(|(name, _)| ours(name)) {
            command.env_remove(name);
        }
        command
    }

    /// The program itself.
    pub fn program(&self) -> &Path {
        &self.program
    }
}

/// A running child. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` in a process group of its own, with both outputs appended to `log`.
    ///
    /// # Errors
    /// Those of opening the log and of the start.
    pub fn start(mut command: Command, log: &Path) -> io::Result<Self> {
        let log = std::fs::File::options().create(true).append(true).open(log)?;
        command.stdout(log.try_clone()?).stderr(log).process_group(0);
        let parent = std::process::id();
        // SAFETY: between fork and exec only async-signal-safe calls are made: prctl, getppid.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                // The parent may have gone before the request was made.
                if libc::getppid().cast_unsigned() == parent {
                    Ok(())
                } else {
                    Err(io::Error::from(io::ErrorKind::Interrupted))
                }
            });
        }
        Ok(Self { child: fork(command)?, ended: None })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().unwrap_or_default();
        }
        self.ended
    }

    /// Sends a signal to it and whatever it started.
    pub fn signal(&mut self, signal: libc::c_int) {
        if self.ended().is_none() {
            // SAFETY: kill has no memory preconditions; the child is not reaped yet, so the group id is still its own.
            unsafe { libc::kill(-self.child.id().cast_signed(), signal) };
        }
    }

    /// Waits for its end, at most `limit`.
    pub async fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        while self.ended().is_none() && Instant::now() < deadline {
            tokio::time::sleep(REAP_POLL).await;
        }
        self.ended()
    }

    /// SIGKILL, and reaps it.
    pub fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        if self.ended.is_none() {
            self.ended = self.child.wait().ok();
        }
    }

    /// Resident memory in bytes (`VmRSS`); `None` once it has ended.
    pub fn rss_bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// An exit status in words.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

struct Fork {
    command: Command,
    child: mpsc::Sender<io::Result<Child>>,
}

/// Has the thread that never ends start the child.
fn fork(command: Command) -> io::Result<Child> {
    static FORKS: OnceLock<mpsc::Sender<Fork>> = OnceLock::new();
    let gone = || io::Error::other("the thread that starts processes has gone");
    let forks = FORKS.get_or_init(|| {
        let (sender, receiver) = mpsc::channel::<Fork>();
        thread::spawn(move || {
            for mut fork in receiver {
                let _ = fork.child.send(fork.command.spawn());
            }
        });
        sender
    });
    let (child, reply) = mpsc::channel();
    forks.send(Fork { command, child }).map_err(|_| gone())?;
    reply.recv().map_err(|_| gone())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper() -> (tempfile::TempDir, Process) {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sleep");
        command.arg("600");
        let process = Process::start(command, &folder.path().join("log")).unwrap();
        (folder, process)
    }

    fn exists(pid: u32) -> bool {
        Path::new(&format!("/proc/{pid}")).exists()
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let (_folder, process) = sleeper();
        let pid = process.pid();
        assert!(exists(pid) && process.rss_bytes().is_some());
        drop(process);
        assert!(!exists(pid));
    }

    #[tokio::test]
    async fn a_signal_is_told_from_an_exit_code() {
        let (_folder, mut process) = sleeper();
        assert_eq!(process.ended(), None);
        process.signal(libc::SIGTERM);
        let ended = process.wait(Duration::from_secs(60)).await.unwrap();
        assert_eq!(describe(ended), "was ended by signal 15");
    }

    #[test]
    fn children_outlive_the_thread_that_asked_for_them() {
        let (_folder, mut process) = thread::spawn(sleeper).join().unwrap();
        thread::sleep(Duration::from_millis(50));
        assert_eq!(process.ended(), None);
    }

    #[test]
    fn settings_of_the_caller_do_not_reach_a_node() {
        let command = Launcher::of("/bin/true").coel(["status"]);
        let args: Vec<_> = command.get_args().collect();
        assert_eq!(args, [NODE_ARGUMENT, "status"]);
        assert!(command.get_envs().all(|(_, value)| value.is_none()));
    }
}
