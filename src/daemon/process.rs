//! The daemon as a process among others: its limits, asking it, and waiting for its end.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use log::{debug, warn};

use super::DaemonError;
use super::status::{self, Report};
use crate::fuse;

/// How long a daemon may take to end once its mount is gone.
const END_WITHIN: Duration = Duration::from_secs(30);
/// How long a new worker may take to open every archive of a large source.
const UPGRADE_WITHIN: Duration = Duration::from_secs(120);
/// The metric that tells of a failed one.
const FAILED_UPGRADES: &str = "mcwcfs_failed_upgrades";

/// Raises the soft limit of open files to the hard one: each archive keeps one open, and trees have thousands.
pub(super) fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid `rlimit` during both calls.
    let is_raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    if !is_raised {
        warn!("limit of open files not raised: {}", io::Error::last_os_error());
    }
}

/// Fails where so few descriptors are left that readers need them all: archives must not have them.
pub(super) fn leave_descriptors_for_readers() -> io::Result<()> {
    const FOR_READERS: u64 = 64;
    let lowest_free = fs::File::open("/dev/null")?.as_raw_fd();
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid `rlimit` during the call.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if u64::try_from(lowest_free).unwrap_or(0) + FOR_READERS > limit.rlim_cur {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok(())
}

/// Unmounts what is mounted at `mountpoint` and returns when its daemon has ended.
///
/// `lazily` also works where files are in use: the mount vanishes from its path now, and its daemon serves the last user
/// to the end; that end is not waited for. A mount whose daemon died is cleared in either case.
pub fn umount(mountpoint: &Path, lazily: bool) -> Result<(), DaemonError> {
    let is_dead = fuse::is_dead(mountpoint);
    let path = our_mount(mountpoint)?;
    let daemon = if is_dead { None } else { daemon_of(&path).and_then(|pid| Some((pid, open_process(pid)?))) };
    fuse::unmount(&path, lazily || is_dead)?;
    match daemon {
        Some((pid, process)) if !lazily => {
            if ends_within(&process, END_WITHIN) {
                return Ok(());
            }
            Err(DaemonError::StillRunning { mountpoint: path, pid })
        }
        _ => Ok(()),
    }
}

/// The path as the table of mounts has it. A mount point that is dead, or whose owner lets nobody else in, cannot be looked
/// at; then only what leads to it is resolved.
fn resolve(mountpoint: &Path) -> io::Result<PathBuf> {
    mountpoint.canonicalize().or_else(|error| {
        let absolute = std::path::absolute(mountpoint)?;
        match (absolute.parent(), absolute.file_name()) {
            (Some(parent), Some(name)) => Ok(parent.canonicalize()?.join(name)),
            _ => Err(error),
        }
    })
}

/// The process that owns the mount, as it says itself.
pub(super) fn daemon_of(mountpoint: &Path) -> Option<u32> {
    let pid = root_attribute(mountpoint, status::DAEMON_PID).ok()?.parse().ok()?;
    // In another process namespace the number means another process, or none.
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    if name.trim_end() == "mcwcfs" {
        return Some(pid);
    }
    debug!("process {pid} is {}, not the daemon", name.trim_end());
    None
}

/// An attribute of the root of a mount, which its daemon answers.
fn root_attribute(mountpoint: &Path, name: &str) -> io::Result<String> {
    let (path, name) = (CString::new(mountpoint.as_os_str().as_bytes())?, CString::new(name)?);
    let mut value = vec![0_u8; status::MAX_ATTRIBUTE_BYTES];
    // SAFETY: both names are C strings and `value` has the length stated.
    let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(usize::try_from(length).map_err(|_| io::Error::last_os_error())?);
    String::from_utf8(value).map_err(io::Error::other)
}

/// What the mount at `mountpoint` says of itself.
///
/// # Errors
/// When nothing of ours is mounted there, or its daemon does not say.
pub fn status(mountpoint: &Path) -> Result<Report, DaemonError> {
    let path = our_mount(mountpoint)?;
    let problem = |problem: String| DaemonError::NotAnswering { mountpoint: path.clone(), problem };
    let text = root_attribute(&path, status::STATUS).map_err(|error| problem(format!("status: {error}")))?;
    serde_json::from_str(&text).map_err(|error| problem(format!("status: {error}")))
}

/// Replaces the worker of the mount at `mountpoint` by a new one, from the program as it is on disk now, and returns when
/// that one serves. Readers notice nothing.
///
/// # Errors
/// When nothing of ours is mounted there, it has no supervisor, or the new worker does not start; the old one stays then.
pub fn upgrade(mountpoint: &Path) -> Result<Report, DaemonError> {
    const EVERY: Duration = Duration::from_millis(50);
    let path = our_mount(mountpoint)?;
    let before = status(&path)?;
    let fail = |problem: &str| DaemonError::NotUpgraded { mountpoint: path.clone(), problem: problem.to_owned() };
    if before.daemon_pid == before.worker_pid {
        return Err(fail("it has no supervisor, so unmount it and mount it again"));
    }
    let daemon = daemon_of(&path).ok_or_else(|| fail("its daemon runs in another process namespace"))?;
    let process = open_process(daemon).ok_or_else(|| fail("its daemon has ended"))?;
    // SAFETY: the call takes integers and an open descriptor of a process; no information comes with the signal.
    let sent = unsafe {
        let (descriptor, nothing) = (process.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
        libc::syscall(libc::SYS_pidfd_send_signal, descriptor, libc::SIGUSR2, nothing, 0)
    };
    if sent < 0 {
        return Err(fail(&format!("process {daemon}: {}", io::Error::last_os_error())));
    }
    let failures = |report: &Report| report.metrics.get(FAILED_UPGRADES).cloned();
    let started = Instant::now();
    while started.elapsed() < UPGRADE_WITHIN {
        thread::sleep(EVERY);
        let now = status(&path)?;
        if now.worker_pid != before.worker_pid {
            return Ok(now);
        }
        if failures(&now) != failures(&before) {
            return Err(fail("the new worker did not start, so the old one stays: see the log"));
        }
    }
    Err(fail("the new worker takes too long: see the log"))
}

/// The mount point as the table of mounts has it, if something of ours is mounted there.
fn our_mount(mountpoint: &Path) -> Result<PathBuf, DaemonError> {
    let not_mounted = || DaemonError::NotMounted { mountpoint: mountpoint.to_owned() };
    let path = resolve(mountpoint).map_err(|_| not_mounted())?;
    if fuse::mount_at(&path).is_some_and(|entry| entry.is_ours()) { Ok(path) } else { Err(not_mounted()) }
}

/// A handle on a process that a later process of the same number cannot take over.
fn open_process(pid: u32) -> Option<OwnedFd> {
    // SAFETY: the call takes two integers.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
    let descriptor = i32::try_from(descriptor).ok().filter(|&descriptor| descriptor >= 0)?;
    // SAFETY: the descriptor is new and nobody else's.
    Some(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn ends_within(process: &OwnedFd, limit: Duration) -> bool {
    let mut ended = libc::pollfd { fd: process.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let milliseconds = limit.as_millis().try_into().unwrap_or(i32::MAX);
    // SAFETY: `ended` is one valid `pollfd` during the call.
    unsafe { libc::poll(&raw mut ended, 1, milliseconds) == 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_process_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = open_process(child.id()).unwrap();
        assert!(!ends_within(&process, Duration::ZERO));
        child.kill().unwrap();
        assert!(ends_within(&process, Duration::from_secs(30)));
        child.wait().unwrap();
    }

    #[test]
    fn what_is_not_ours_is_not_unmounted() {
        let directory = tempfile::tempdir().unwrap();
        for path in [directory.path(), Path::new("/proc"), Path::new("/no/such/path")] {
            assert!(matches!(umount(path, false), Err(DaemonError::NotMounted { .. })), "{}", path.display());
        }
    }
}
