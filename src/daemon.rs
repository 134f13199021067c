//! The mounted process: readiness, signals, shutdown.
//!
//! [`serve`] is the whole life of a mount in the foreground; [`launch`](launch::launch) puts the same into the background
//! by starting this program again: a fork would have to happen before any thread exists, which nobody could keep true.
//! [`umount`] is the other side: it unmounts, and returns when the daemon is gone.

pub mod launch;
mod memory;
mod paths;
mod process;

use std::ffi::c_int;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use log::{info, warn};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::archive::Archive;
use crate::fuse::{self, FuseError, MountOptions, Mounted};
use crate::materialize::{MaterializeOptions, Materializer};
use crate::vfs::{DecodeAhead, DecodedArchive, Inode, Vfs, VfsError};

pub use memory::MemoryPlan;
pub use process::umount;

/// What is mounted where, and how.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Directory with archives.
    pub source: PathBuf,
    /// Directory that shows what is in them.
    pub mountpoint: PathBuf,
    /// How archives are decoded.
    pub materialize: MaterializeOptions,
    /// How the tree is presented.
    pub mount: MountOptions,
    /// How far decoding goes ahead of readers.
    pub decode_ahead: DecodeAhead,
    /// How far the kernel reads ahead, in KiB.
    pub readahead_kib: u32,
}

/// Why a mount did not come to be, or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Source and mount point overlap: the daemon would read through its own mount.
    #[error(
        "mount point {mountpoint}: expected a directory neither inside nor around the source {source_path}",
        mountpoint = mountpoint.display(),
        source_path = source_path.display()
    )]
    Overlap {
        /// The source, absolute.
        source_path: PathBuf,
        /// The mount point, absolute.
        mountpoint: PathBuf,
    },
    /// One of our mounts is at the mount point already.
    #[error(
        "mount point {mountpoint}: {what} is mounted there already: unmount it with `mcwcfs umount {mountpoint}`",
        mountpoint = mountpoint.display()
    )]
    AlreadyMounted {
        /// The mount point, absolute.
        mountpoint: PathBuf,
        /// The mount's name.
        what: String,
    },
    /// Nothing of ours is mounted there.
    #[error("{mountpoint}: not a mount of mcwcfs", mountpoint = mountpoint.display())]
    NotMounted {
        /// The path, as given.
        mountpoint: PathBuf,
    },
    /// The source cannot be listed.
    #[error(transparent)]
    Source(#[from] VfsError),
    /// The kernel refused.
    #[error(transparent)]
    Fuse(#[from] FuseError),
    /// The mount is there, and does not answer as it should.
    #[error("{mountpoint}: mounted, and then it did not answer: {problem}", mountpoint = mountpoint.display())]
    NotAnswering {
        /// The mount point.
        mountpoint: PathBuf,
        /// What a look at it said.
        problem: String,
    },
    /// The conversation with the kernel broke.
    #[error("{mountpoint}: the mount ended: {source}", mountpoint = mountpoint.display())]
    Ended {
        /// The mount point.
        mountpoint: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The daemon is still there after its mount is gone.
    #[error("{mountpoint}: unmounted, and its daemon (process {pid}) still runs", mountpoint = mountpoint.display())]
    StillRunning {
        /// The mount point.
        mountpoint: PathBuf,
        /// The daemon's process.
        pid: u32,
    },
    /// The system lacks something else.
    #[error("{what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// What the daemon waits for.
enum Event {
    Signal(c_int),
    Ended(io::Result<()>),
}

/// Mounts, calls `ready` once the mount answers, and serves until it is unmounted, by whomever, or a signal says to end.
///
/// The first SIGTERM, SIGINT or SIGHUP unmounts. If something below the mount point is in use, the mount vanishes from
/// its path and the last user is served to the end; a second signal ends the process at once.
///
/// # Errors
/// When the mount does not come to be, the conversation with the kernel breaks, or `ready` fails, which takes the mount
/// back. A broken archive is no error.
pub fn serve(options: &ServeOptions, ready: impl FnOnce() -> io::Result<()>) -> Result<(), DaemonError> {
    paths::check(&options.source, &options.mountpoint)?;
    process::raise_descriptor_limit();
    memory::share_heaps();
    let (events, arrived) = mpsc::channel();
    // Before there is a mount that a signal could leave behind.
    forward_signals(events.clone()).map_err(|source| DaemonError::System { what: "catching signals", source })?;
    let materializer = Arc::new(Materializer::new(options.materialize));
    let mut vfs = Vfs::open(&options.source, |path| {
        Ok(DecodedArchive::new(Arc::new(Archive::open(path)?), Arc::clone(&materializer)))
    })?;
    vfs.decode_ahead(options.decode_ahead, options.materialize.threads, options.materialize.cache_bytes)
        .map_err(|source| DaemonError::System { what: "starting a thread", source })?;
    let mounted = fuse::mount(vfs, &options.mountpoint, &options.mount)?;
    let mountpoint = mounted.mountpoint().to_owned();
    fuse::set_readahead(&mountpoint, options.readahead_kib);
    if let Err(problem) = answers(&mountpoint) {
        let _ = fuse::unmount(&mountpoint, true); // the error below says more
        return Err(DaemonError::NotAnswering { mountpoint, problem });
    }
    if let Err(source) = ready() {
        let _ = fuse::unmount(&mountpoint, true);
        return Err(DaemonError::System { what: "reporting readiness", source });
    }
    announce_end(mounted, events).map_err(|source| DaemonError::System { what: "starting a thread", source })?;
    let result = wait(&mountpoint, &arrived).map_err(|source| DaemonError::Ended { mountpoint, source });
    let stats = materializer.cache_stats();
    info!("cache: {} hits, {} misses, {} duplicate makes", stats.hits, stats.misses, stats.duplicate_makes);
    result
}

/// Whether a look at the root of the mount, through the kernel, is answered by us.
fn answers(mountpoint: &Path) -> Result<(), String> {
    let root = std::fs::metadata(mountpoint).map_err(|error| error.to_string())?;
    if root.ino() == Inode::ROOT.0 { Ok(()) } else { Err(format!("inode {}, expected that of our root", root.ino())) }
}

fn forward_signals(events: Sender<Event>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for signal in signals.forever() {
            if events.send(Event::Signal(signal)).is_err() {
                return; // nobody waits any more: the process is about to end
            }
        }
    })?;
    Ok(())
}

fn announce_end(mounted: Mounted, events: Sender<Event>) -> io::Result<()> {
    let announce = move || drop(events.send(Event::Ended(mounted.join())));
    thread::Builder::new().name("session-end".to_owned()).spawn(announce).map(drop)
}

/// Waits for the end of the mount, bringing it about when a signal says so.
fn wait(mountpoint: &Path, arrived: &Receiver<Event>) -> io::Result<()> {
    let mut is_ending = false;
    while let Ok(event) = arrived.recv() {
        match event {
            Event::Ended(result) => {
                info!("unmounted: {}", mountpoint.display());
                return result;
            }
            Event::Signal(signal) if is_ending => {
                warn!("signal {signal} again: ending with files in use");
                return Ok(());
            }
            Event::Signal(signal) => {
                info!("signal {signal}: unmounting {}", mountpoint.display());
                is_ending = true;
                end(mountpoint);
            }
        }
    }
    Ok(())
}

/// Takes the mount away from its path; who has files open is served on.
fn end(mountpoint: &Path) {
    let Err(error) = fuse::unmount(mountpoint, false) else { return };
    if matches!(error, FuseError::Unmount { is_busy: true, .. }) {
        info!("{}: in use, serving until it is closed; a second signal ends at once", mountpoint.display());
    } else {
        warn!("{error}");
    }
    if let Err(error) = fuse::unmount(mountpoint, true) {
        warn!("{error}");
    }
}
