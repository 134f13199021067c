//! Into the background: the daemon is this program, started again.
//!
//! The parent starts itself anew with `MCWCFS_ROLE` in the environment, in a session of its own, and waits for one line on the
//! child's standard output: `ready`, or an exit code and a message. So `mcwcfs mount` returns when the mount answers, and
//! what went wrong is said on the caller's terminal. The child's standard error is its log file from the start.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::SIGINT;
use signal_hook::flag::register_conditional_shutdown;

/// Environment variable that tells the child what it is.
pub(super) const ROLE: &str = "MCWCFS_ROLE";
const DAEMON: &str = "daemon";
pub(super) const WORKER: &str = "worker";
const READY: &str = "ready";

/// What became of the daemon.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is mounted and answers.
    Ready,
    /// It could not start, and has ended: its exit code, and its message for the user.
    Failed(u8, String),
}

/// Whether this process is the child of [`launch`].
pub fn is_daemon() -> bool {
    std::env::var_os(ROLE).is_some_and(|role| role == DAEMON)
}

/// Whether this process serves a mount that its supervisor owns: see [`super::run_worker`].
pub fn is_worker() -> bool {
    std::env::var_os(ROLE).is_some_and(|role| role == WORKER)
}

/// Starts this program again with the same `arguments` (without its name) as a daemon, and waits until it has said what
/// became of it. SIGINT meanwhile ends this process with the exit code `interrupted`, and the daemon, finding nobody to
/// report to, takes its mount back.
///
/// # Errors
/// When no process can be started.
pub fn launch(
    arguments: impl IntoIterator<Item = OsString>,
    log: Option<File>,
    interrupted: u8,
) -> io::Result<Outcome> {
    register_conditional_shutdown(SIGINT, interrupted.into(), Arc::new(AtomicBool::new(true)))?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments).env(ROLE, DAEMON).stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(log.map_or_else(Stdio::null, Stdio::from));
    // SAFETY: between fork and exec only `setsid` and `close_range` are called, which are async-signal-safe.
    unsafe { command.pre_exec(leave_caller) };
    let mut child = command.spawn()?;
    let output = child.stdout.take().expect("it was piped");
    let outcome = read_outcome(BufReader::new(output))?;
    match outcome {
        Some(outcome) => Ok(outcome),
        None => {
            let status = child.wait()?;
            let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(2); // 2: a signal, say
            Ok(Outcome::Failed(code, format!("the daemon ended before it was ready: {status}")))
        }
    }
}

/// Leaves the caller's session, and whatever files it let us inherit: who waits for the end of a pipe must not wait for
/// the daemon's.
fn leave_caller() -> io::Result<()> {
    // SAFETY: the calls touch no memory of ours. Descriptors are closed by exec, so that those needed until then stay;
    // that a kernel before 5.11 cannot do this is no failure.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    // SAFETY: the call has no preconditions; it fails only for a group leader, which a new child is not.
    if unsafe { libc::setsid() } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// In the child: tells the parent that the mount answers, and lets go of what ties it to where it was started.
///
/// # Errors
/// When nobody waits any more: whoever asked for the mount was killed, and will not know that it is there.
pub fn report_ready() -> io::Result<()> {
    report(READY)?;
    std::env::set_current_dir("/")
}

/// In the child: tells the parent why there is no mount.
pub fn report_failure(exit_code: u8, message: &str) {
    let _ = report(&format!("{exit_code} {message}")); // without a reader there is nobody to tell
}

/// Writes one line to standard output and closes it, so that no one waits for more.
fn report(line: &str) -> io::Result<()> {
    let line = line.replace('\n', " ");
    let mut output = io::stdout().lock();
    writeln!(output, "{line}")?;
    output.flush()?;
    let null = File::options().write(true).open("/dev/null")?;
    // SAFETY: both descriptors are open; standard output is replaced, never left closed for another file to become.
    if unsafe { libc::dup2(null.as_raw_fd(), libc::STDOUT_FILENO) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The child's line, or `None` if it ended without one.
fn read_outcome(mut output: impl BufRead) -> io::Result<Option<Outcome>> {
    let mut line = String::new();
    output.read_line(&mut line)?;
    let line = line.trim_end();
    if line == READY {
        return Ok(Some(Outcome::Ready));
    }
    let failure = line.split_once(' ').and_then(|(code, message)| Some((code.parse().ok()?, message.to_owned())));
    Ok(failure.map(|(code, message)| Outcome::Failed(code, message)))
}

/// Where a daemon's log goes when nobody says: `/var/log/mcwcfs/` for root, else `$XDG_STATE_HOME/mcwcfs/` (by default
/// `~/.local/state`); the name is the mount point's, with dashes for slashes. `None` without a home.
pub fn default_log_path(mountpoint: &Path) -> Option<PathBuf> {
    // SAFETY: the call has no preconditions and cannot fail.
    let is_root = unsafe { libc::geteuid() } == 0;
    let directory = if is_root {
        PathBuf::from("/var/log")
    } else {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")))?
    };
    let name = mountpoint.to_string_lossy().trim_matches('/').replace('/', "-");
    Some(directory.join("mcwcfs").join(format!("{name}.log")))
}

/// Opens a log file for appending, making its directory.
pub fn open_log(path: &Path) -> io::Result<File> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    File::options().append(true).create(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_childs_line_is_understood_and_silence_is_not_readiness() {
        let outcome = |line: &str| read_outcome(line.as_bytes()).unwrap();
        assert_eq!(outcome("ready\n"), Some(Outcome::Ready));
        assert_eq!(outcome("32 mount point /x: busy\n"), Some(Outcome::Failed(32, "mount point /x: busy".into())));
        for line in ["", "\n", "x y\n", "300 too large\n"] {
            assert_eq!(outcome(line), None, "{line:?}");
        }
    }

    #[test]
    fn log_files_are_named_after_their_mount_point() {
        let path = default_log_path(Path::new("/mnt/models")).unwrap();
        assert!(path.ends_with("mcwcfs/mnt-models.log"), "{}", path.display());
    }

    #[test]
    fn a_log_file_is_appended_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/log");
        for line in ["one\n", "two\n"] {
            open_log(&path).unwrap().write_all(line.as_bytes()).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
    }
}
