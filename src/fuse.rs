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
mod device;
mod errno;
mod kernel_mount;
mod mount_table;
mod open_files;
mod opening;
mod passthrough;
mod readahead;
mod replies;
mod workers;

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::{debug, warn};

use crate::vfs::{Changes, Inode, Vfs};
use adapter::Adapter;
use passthrough::Passthrough;
use workers::Workers;

pub use device::Device;
pub use kernel_mount::unmount;
pub use mount_table::{MountEntry, is_dead, mount_at};
pub use open_files::{HandleChange, NotAChange, OpenFile, OpenFiles};
pub use passthrough::Registry;
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
    /// Whether a read that another process took and did not answer gets an I/O error: it may be what killed that one.
    pub refuse_resent: bool,
    /// Memory for replies being made; readers wait for one another where it does not suffice.
    pub reply_bytes: u64,
    /// Whether the kernel may read decoded files by itself, where it can and we have the privilege.
    pub passthrough: bool,
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
            refuse_resent: false,
            reply_bytes: 64 << 20,
            passthrough: false,
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

/// Extended attributes of the root beyond its own, made when they are asked for: how a mount tells about itself to whoever
/// can look at it, also from another container. They are not listed: they are no property of data.
pub type RootAttributes = dyn Fn(&OsStr) -> Option<String> + Send + Sync;

/// What a process that serves a mount is given by those before it, and leaves to those after it.
pub struct Succession {
    /// Attributes of the root.
    pub root_attributes: Arc<RootAttributes>,
    /// What those before have left open, where files may be passed through.
    pub inherited: OpenFiles,
    /// Who keeps account of that for those after, if there can be any.
    pub registry: Option<Arc<dyn Registry>>,
}

impl Default for Succession {
    /// Nobody before, nobody after, and nothing to say.
    fn default() -> Self {
        Self { root_attributes: Arc::new(|_| None), inherited: OpenFiles::default(), registry: None }
    }
}

/// A mounted tree that this process serves. It stays mounted until somebody unmounts it: see [`unmount`].
pub struct Mounted {
    mountpoint: PathBuf,
    session: Mutex<Option<JoinHandle<io::Result<()>>>>,
    kernel: Kernel,
    workers: Arc<Workers>,
    passthrough: Arc<Passthrough>,
}

/// A way to tell the kernel what to forget, for a thread that answers no requests: the kernel may have to wait for an
/// answer to do it.
#[derive(Clone, Debug)]
pub struct Kernel {
    device: Arc<File>,
}

impl Kernel {
    /// Makes the kernel forget what a rescan changed. The pages of files stay: a changed file has another inode.
    pub fn forget(&self, changes: &Changes) {
        for (directory, name) in &changes.names {
            self.forget_name(*directory, name, 0);
        }
        for inode in &changes.directories {
            report(self.forget_inode(*inode, 0)); // what it listed is kept as pages
        }
        for inode in &changes.attributes {
            report(self.forget_inode(*inode, NO_PAGES));
        }
    }

    /// Has the kernel ask again for `changes.names` when somebody uses them next, and forget what the directories list:
    /// gentler than [`Self::forget`], where what is known may well be true.
    pub fn expire(&self, changes: &Changes) {
        const EXPIRE_ONLY: u32 = 1;
        for (directory, name) in &changes.names {
            self.forget_name(*directory, name, EXPIRE_ONLY);
        }
        for inode in &changes.directories {
            report(self.forget_inode(*inode, 0));
        }
    }

    /// Whether the kernel still knows `inode`: somebody may have it open. What it caches of its attributes is dropped.
    pub fn knows(&self, inode: Inode) -> bool {
        self.forget_inode(inode, NO_PAGES).unwrap_or(true)
    }

    fn forget_name(&self, directory: Inode, name: &OsStr, flags: u32) {
        const NOTIFY_INVALIDATE_ENTRY: i32 = 3;
        let length = u32::try_from(name.len()).expect("a name has 255 bytes at most");
        let (length, flags) = (length.to_ne_bytes(), flags.to_ne_bytes());
        let body = [&directory.0.to_ne_bytes()[..], &length, &flags, name.as_bytes(), &[0]].concat();
        report(device::notify(&self.device, NOTIFY_INVALIDATE_ENTRY, &body));
    }

    fn forget_inode(&self, inode: Inode, first_byte: i64) -> io::Result<bool> {
        const NOTIFY_INVALIDATE_INODE: i32 = 2;
        const TO_THE_END: i64 = 0;
        let body = [inode.0.to_ne_bytes(), first_byte.to_ne_bytes(), TO_THE_END.to_ne_bytes()].concat();
        device::notify(&self.device, NOTIFY_INVALIDATE_INODE, &body)
    }
}

fn report(result: io::Result<bool>) {
    if let Err(error) = result {
        debug!("the kernel was not told of a change: {error}"); // it will ask again within a day
    }
}

/// In place of an offset: attributes only.
const NO_PAGES: i64 = -1;

impl Mounted {
    /// Where it is mounted, absolute.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// How to tell the kernel what changed.
    pub fn kernel(&self) -> Kernel {
        self.kernel.clone()
    }

    /// Before a successor is told what the registry knows: from now on that does not change. Opens and closes wait where
    /// files may be passed through.
    pub fn hold_passthrough(&self) {
        self.passthrough.hold();
    }

    /// Takes that back: the process that was to succeed this one did not come.
    pub fn release_passthrough(&self) {
        self.passthrough.release();
    }

    /// Answers what has been taken from the device, at most for `limit`, and takes as little more as it can; returns
    /// whether everything was answered. For a process that another one succeeds: what is left is resent to that one.
    pub fn drain(&self, limit: Duration) -> bool {
        self.workers.drain(limit)
    }

    /// Waits until the tree is unmounted and nobody has anything of it open.
    ///
    /// # Errors
    /// When the conversation with the kernel broke. Where the kernel ended it, what is left of the mount has been cleared;
    /// otherwise the mount is still there, and waits for somebody to serve it or to take it down.
    ///
    /// # Panics
    /// Where it has been waited for before.
    pub fn wait(&self) -> io::Result<()> {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner).take();
        let session = session.expect("one end is waited for once");
        let result = session.join().unwrap_or_else(|_| Err(io::Error::other("the session panicked")));
        if device::is_connected(&self.kernel.device) {
            return Err(result.err().unwrap_or_else(|| io::Error::other("the session ended before the mount did")));
        }
        // An aborted connection leaves the mount behind. Only a dead one is touched: after a clean end, a mount at this
        // path is somebody else's.
        clear_if_dead(&self.mountpoint);
        result
    }
}

/// Unmounts what a daemon that is gone left at `mountpoint`; returns whether there was such a mount of ours, or of
/// anybody whose file system type cannot be told any more.
pub fn clear_if_dead(mountpoint: &Path) -> bool {
    if !is_dead(mountpoint) || mount_at(mountpoint).is_some_and(|entry| !entry.is_ours()) {
        return false;
    }
    warn!("dead mount cleared: {}", mountpoint.display());
    unmount(mountpoint, true).inspect_err(|error| warn!("{error}")).is_ok()
}

/// Mounts `vfs` at `mountpoint` and starts to answer.
///
/// When this returns, the kernel knows the file system and requests are being taken.
pub fn mount(vfs: Vfs, mountpoint: &Path, options: &MountOptions) -> Result<Mounted, FuseError> {
    let device = Device::mount(mountpoint, options)?;
    let mountpoint = device.mountpoint().to_owned();
    serve(Arc::new(vfs), device, options, Succession::default()).inspect_err(|_| {
        // The device is closed by now, so the mount is dead; leaving it would make the next attempt fail.
        let _ = unmount(&mountpoint, true);
    })
}

/// Starts to answer on the device of a mount with what `vfs` shows.
///
/// # Errors
/// When threads cannot be started. The mount is left as it is.
pub fn serve(
    vfs: Arc<Vfs>,
    device: Device,
    options: &MountOptions,
    succession: Succession,
) -> Result<Mounted, FuseError> {
    let (device, mountpoint, greeting) = device.into_parts();
    let Succession { root_attributes, inherited, registry } = succession;
    let device = Arc::new(device);
    let backings = Box::new(Arc::clone(&device));
    let passthrough = Arc::new(Passthrough::new(options.passthrough, inherited, registry, backings));
    let adapters = Arc::clone(&passthrough);
    let start = || {
        let workers = Arc::new(Workers::new()?);
        let adapter = Adapter::new(vfs, Arc::clone(&workers), adapters, options, root_attributes);
        let (session, _) = device::start_session(adapter, &greeting, options)?;
        device::connect(&session, &device)?;
        let session = thread::Builder::new().name("fuse-session".to_owned()).spawn(move || session.run())?;
        Ok((workers, session))
    };
    let (workers, session) = start().map_err(|source| FuseError::Session { path: mountpoint.clone(), source })?;
    let (session, kernel) = (Mutex::new(Some(session)), Kernel { device });
    Ok(Mounted { mountpoint, session, kernel, workers, passthrough })
}
