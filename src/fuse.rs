//! FUSE adapter: a request becomes a vfs call, its answer a reply.
//!
//! Thin on purpose: what is shown and what it reads as is [`crate::vfs`]'s, and is tested there without a mount. Here lie
//! the mount system call, the errno table, and who answers what: the event loops answer what is in memory and hand
//! everything that may read or decode to a pool of workers, which send the reply themselves. So no request waits behind
//! another's decode. The `fuser` crate is known to this room alone.
//!
//! The kernel is told to cache: long times to live, pages kept across opens, many requests in flight. Nothing is ever
//! written to the kernel's cache from a worker: that deadlocks under page faults.

mod adapter;
mod errno;
mod kernel_mount;
mod mount_table;
mod readahead;
mod replies;
mod workers;

use std::io;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use log::{info, warn};

use crate::vfs::Vfs;
use adapter::Adapter;

pub use kernel_mount::unmount;
pub use mount_table::{MountEntry, is_dead, mount_at};
pub use readahead::set_readahead;

/// The file system type as `/proc/mounts` shows it, and the name that `mount -t` takes after `fuse.`.
pub const SUBTYPE: &str = "mcwcfs";

/// How a tree is presented to the kernel.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// The first column of `/proc/mounts`.
    pub fsname: String,
    /// Whether users other than the mounting one may enter. Without privileges, `/etc/fuse.conf` must permit it.
    pub allow_other: bool,
    /// Whether the kernel refuses to execute what is shown.
    pub no_exec: bool,
    /// Owner of everything shown.
    pub uid: u32,
    /// Group of everything shown.
    pub gid: u32,
    /// Permission bits of files.
    pub file_mode: u16,
    /// Permission bits of directories.
    pub directory_mode: u16,
    /// Threads that take requests from the kernel; they only dispatch.
    pub event_loops: usize,
    /// Memory for replies being made; readers wait for one another where it does not suffice.
    pub reply_bytes: u64,
}

impl Default for MountOptions {
    /// Everybody may read, nobody may write, and the mounting user owns it all.
    fn default() -> Self {
        // SAFETY: these calls have no preconditions and cannot fail.
        let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
        let fsname = SUBTYPE.to_owned();
        Self {
            fsname,
            allow_other: false,
            no_exec: false,
            uid,
            gid,
            file_mode: 0o444,
            directory_mode: 0o555,
            event_loops: 2,
            reply_bytes: 64 << 20,
        }
    }
}

/// Why a tree cannot be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    /// The mount point is not a directory that can be used.
    #[error("mount point {path}: {source}", path = path.display())]
    MountPoint {
        /// The mount point, as given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The mount point is what a daemon that died left behind.
    #[error("mount point {path}: a dead mount is there, its daemon is gone: clear it with `mcwcfs umount {path}`", path = path.display())]
    DeadMount {
        /// The mount point.
        path: PathBuf,
    },
    /// The system refused to mount.
    #[error("mounting {path}: {problem}", path = path.display())]
    Mount {
        /// The mount point.
        path: PathBuf,
        /// What was refused, and by whom.
        problem: String,
    },
    /// The system refused to unmount.
    #[error("unmounting {path}: {problem}", path = path.display())]
    Unmount {
        /// The mount point.
        path: PathBuf,
        /// Whether trying again later can help: something is open below the mount point.
        is_busy: bool,
        /// What was refused, and by whom.
        problem: String,
    },
    /// The conversation with the kernel did not start.
    #[error("talking to the kernel about {path}: {source}", path = path.display())]
    Session {
        /// The mount point.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A mounted tree. It stays mounted until somebody unmounts it: see [`unmount`].
#[derive(Debug)]
pub struct Mounted {
    mountpoint: PathBuf,
    session: JoinHandle<io::Result<()>>,
}

impl Mounted {
    /// Where it is mounted, absolute.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Waits until the tree is unmounted and nobody has anything of it open.
    ///
    /// # Errors
    /// When the conversation with the kernel broke; what is left of the mount has been cleared then.
    pub fn join(self) -> io::Result<()> {
        let result = self.session.join().unwrap_or_else(|_| Err(io::Error::other("the session panicked")));
        // An aborted connection leaves the mount behind. Only a dead one is touched: after a clean end, a mount at this
        // path is somebody else's.
        if is_dead(&self.mountpoint) {
            warn!("dead mount cleared: {}", self.mountpoint.display());
            if let Err(error) = unmount(&self.mountpoint, true) {
                warn!("{error}");
            }
        }
        result
    }
}

/// Mounts `vfs` at `mountpoint` and starts to answer.
///
/// When this returns, the kernel knows the file system and requests are being taken.
pub fn mount(vfs: Vfs, mountpoint: &Path, options: &MountOptions) -> Result<Mounted, FuseError> {
    if is_dead(mountpoint) {
        return Err(FuseError::DeadMount { path: mountpoint.to_owned() });
    }
    let wrap = |source| FuseError::MountPoint { path: mountpoint.to_owned(), source };
    let mountpoint = mountpoint.canonicalize().map_err(wrap)?;
    if !mountpoint.is_dir() {
        return Err(FuseError::MountPoint { path: mountpoint, source: io::ErrorKind::NotADirectory.into() });
    }
    let wrap = |source| FuseError::Session { path: mountpoint.clone(), source };
    let adapter = Adapter::new(vfs, options).map_err(wrap)?;
    let device = kernel_mount::mount(&mountpoint, options)?;
    let session = start(adapter, device, options).map_err(|source| {
        // The device is closed by now, so the mount is dead; leaving it would make the next attempt fail.
        let _ = unmount(&mountpoint, true);
        wrap(source)
    })?;
    info!("mounted: {}", mountpoint.display());
    Ok(Mounted { mountpoint, session })
}

fn start(
    adapter: Adapter,
    device: std::os::fd::OwnedFd,
    options: &MountOptions,
) -> io::Result<JoinHandle<io::Result<()>>> {
    let mut config = fuser::Config::default();
    config.acl = if options.allow_other { fuser::SessionACL::All } else { fuser::SessionACL::Owner };
    config.n_threads = Some(options.event_loops.max(1));
    // One descriptor for all loops: unanswered requests can then be repeated to a successor process.
    config.clone_fd = false;
    let session = fuser::Session::from_fd(adapter, device, config.acl, config)?;
    thread::Builder::new().name("fuse-session".to_owned()).spawn(move || session.run())
}
