//! The daemon as a process: its limits, and waiting for its end.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::{debug, warn};

use super::DaemonError;
use crate::fuse;

/// How long a daemon may take to end once its mount is gone.
const END_WITHIN: Duration = Duration::from_secs(30);

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

/// Unmounts what is mounted at `mountpoint` and returns when its daemon has ended.
///
/// `lazily` also works where files are in use: the mount vanishes from its path now, and its daemon serves the last user
/// to the end; that end is not waited for. A mount whose daemon died is cleared in either case.
pub fn umount(mountpoint: &Path, lazily: bool) -> Result<(), DaemonError> {
    let is_dead = fuse::is_dead(mountpoint);
    let not_mounted = || DaemonError::NotMounted { mountpoint: mountpoint.to_owned() };
    let path = resolve(mountpoint).map_err(|_| not_mounted())?;
    if !fuse::mount_at(&path).is_some_and(|entry| entry.is_ours()) {
        return Err(not_mounted());
    }
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

/// The process that serves the mount, as it says itself.
fn daemon_of(mountpoint: &Path) -> Option<u32> {
    let path = std::ffi::CString::new(mountpoint.as_os_str().as_bytes()).ok()?;
    let mut value = [0_u8; 16];
    // SAFETY: both names are C strings and `value` has the length stated.
    let length = unsafe {
        libc::getxattr(path.as_ptr(), c"user.mcwc.daemon_pid".as_ptr(), value.as_mut_ptr().cast(), value.len())
    };
    let value = value.get(..usize::try_from(length).ok()?)?;
    let pid = std::str::from_utf8(value).ok()?.parse().ok()?;
    // In another process namespace the number means another process, or none.
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    if name.trim_end() == "mcwcfs" {
        return Some(pid);
    }
    debug!("process {pid} is {}, not the daemon", name.trim_end());
    None
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
