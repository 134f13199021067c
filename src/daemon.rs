//! The mounted process: readiness, signals, restarts, upgrades, shutdown.
//!
//! [`run`] is the whole life of a mount in the foreground; [`launch`](launch::launch) puts the same into the background
//! by starting this program again: a fork would have to happen before any thread exists, which nobody could keep true.
//! Where the kernel allows, the process that runs is a supervisor, and a worker that it starts ([`run_worker`]) serves the
//! mount. [`umount`], [`status`] and [`upgrade`] are the other side: they find the daemon of a mount and ask it.

mod handover;
pub mod launch;
mod memory;
mod paths;
mod process;
mod restarts;
mod service;
mod service_manager;
mod status;
mod supervisor;
mod worker;

use std::ffi::{OsString, c_int};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use log::{info, warn};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};
use signal_hook::iterator::Signals;

use crate::decoded_files::DecodedFilesError;
use crate::fuse::{self, Device, FuseError, MountOptions, Mounted};
use crate::materialize::MaterializeOptions;
use crate::vfs::{DecodeAhead, Inode, VfsError};
use handover::Facts;
use service::{Before, Prepared, Service};
use supervisor::{News, Recipe};

pub use memory::{LEAST_LIMIT_BYTES, MemoryPlan, default_limit_bytes};
pub use process::{status, umount, upgrade};
pub use status::{ArchiveReport, Report};
pub use worker::run as run_worker;

/// Exit code of a worker's failure where it could not say one: mount(8) calls it an internal error.
const CRASHED: u8 = 4;

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
    /// Where whole decoded files are kept, if anywhere.
    pub decoded_cache: Option<DecodedCache>,
    /// Where bases of variants are looked for beside the source.
    pub base_paths: Vec<PathBuf>,
    /// How far decoding goes ahead of readers.
    pub decode_ahead: DecodeAhead,
    /// How far the kernel reads ahead, in KiB.
    pub readahead_kib: u32,
    /// How often the source is listed again to see what changed; without it, on SIGHUP only.
    pub rescan_interval: Option<Duration>,
    /// Where metrics are served, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// Whether a supervisor keeps the mount alive when the process that serves it dies.
    pub supervise: bool,
}

/// Where whole decoded files are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodedCache {
    /// The directory, which any number of daemons may share.
    pub directory: PathBuf,
    /// What they may take; by default three quarters of what the file system has left.
    pub bytes: Option<u64>,
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
    /// The daemon would read decoded files through its own mount, or show them as models.
    #[error("--decoded-cache {}: expected a directory outside the source and the mount point", .0.display())]
    CacheInside(PathBuf),
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
    /// The directory for decoded files cannot be used.
    #[error("directory for decoded files: {0}")]
    DecodedFiles(#[from] DecodedFilesError),
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
    /// The mount has no new worker.
    #[error("{mountpoint}: not upgraded: {problem}", mountpoint = mountpoint.display())]
    NotUpgraded {
        /// The mount point.
        mountpoint: PathBuf,
        /// What stands in the way.
        problem: String,
    },
    /// The first worker did not start.
    #[error("{message}")]
    Worker {
        /// The exit code that its failure deserves.
        exit_code: u8,
        /// What it said.
        message: String,
    },
    /// Workers died one after the other.
    #[error("{mountpoint}: given up, the workers keep dying: {reason}", mountpoint = mountpoint.display())]
    KeepsDying {
        /// The mount point.
        mountpoint: PathBuf,
        /// How the last one died.
        reason: String,
    },
    /// A worker was not started by a supervisor that it understands.
    #[error("started as a worker: {problem}")]
    Handover {
        /// What is missing or wrong.
        problem: String,
    },
    /// The address for metrics cannot be listened on.
    #[error("metrics on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
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
#[derive(Debug)]
enum Event {
    Signal(c_int),
    /// The mount that this process serves has ended.
    Ended(io::Result<()>),
    /// A worker of a mount that another process serves, by its number.
    Worker(u64, News),
}

/// Mounts, calls `ready` once the mount answers, and keeps it served until it is unmounted, by whomever, or a signal says
/// to end. `arguments` are those of the command line, for workers.
///
/// The first SIGTERM or SIGINT unmounts. If something below the mount point is in use, the mount vanishes from its path
/// and the last user is served to the end; a second signal ends the process at once. SIGHUP lists the source again.
/// SIGUSR2 replaces the worker by one from the program as it is on disk now.
///
/// # Errors
/// When the mount does not come to be, the conversation with the kernel breaks, workers keep dying, or `ready` fails. No
/// mount is left then. A broken archive is no error.
pub fn run(
    options: &ServeOptions,
    arguments: Vec<OsString>,
    ready: impl FnOnce() -> io::Result<()>,
) -> Result<(), DaemonError> {
    let (source, mountpoint) = paths::check(&options.source, &options.mountpoint)?;
    let options = ServeOptions { source, mountpoint, ..options.clone() };
    if let Some(DecodedCache { directory, .. }) = &options.decoded_cache {
        paths::check_outside(directory, &options.source, &options.mountpoint)?;
    }
    let system = |what| move |source| DaemonError::System { what, source };
    // Found now: after an upgrade of the package, the system knows this process's file as deleted.
    let program = std::env::current_exe().map_err(system("finding this program"))?;
    let bind = |address| TcpListener::bind(address).map_err(|source| DaemonError::Listen { address, source });
    let listener = options.metrics.map(bind).transpose()?;
    if let Some(listener) = &listener {
        let address = listener.local_addr().map_err(system("listening for metrics"))?;
        info!("metrics: http://{address}/metrics, status page: http://{address}/");
    }
    let (events, arrived) = mpsc::channel();
    // Before there is a mount that a signal could leave behind.
    forward_signals(events.clone()).map_err(system("catching signals"))?;
    let device = Device::mount(&options.mountpoint, &options.mount)?;
    fuse::set_readahead(device.mountpoint(), options.readahead_kib);
    if options.supervise && device.can_resend() {
        let source = options.source;
        return supervisor::supervise(device, Recipe { program, arguments, source, listener }, events, &arrived, ready);
    }
    if options.supervise {
        info!("no supervisor: it needs Linux 6.9, whose kernel can repeat unanswered requests");
    }
    serve_alone(&options, device, listener, events, &arrived, ready).inspect_err(|_| {
        if fuse::mount_at(&options.mountpoint).is_some_and(|entry| entry.is_ours()) {
            let _ = fuse::unmount(&options.mountpoint, true); // the error says more
        }
    })
}

/// Serves the mount in this process, which nobody watches over.
fn serve_alone(
    options: &ServeOptions,
    device: Device,
    listener: Option<TcpListener>,
    events: Sender<Event>,
    arrived: &Receiver<Event>,
    ready: impl FnOnce() -> io::Result<()>,
) -> Result<(), DaemonError> {
    process::raise_descriptor_limit();
    let before = Before { facts: Facts { daemon: std::process::id(), ..Facts::default() }, ..Before::default() };
    let Service { mounted, rescans, status } =
        Prepared::new(options)?.serve(options, device, listener, before, None)?;
    let mountpoint = options.mountpoint.clone();
    if let Err(problem) = answers(&mountpoint) {
        return Err(DaemonError::NotAnswering { mountpoint, problem });
    }
    info!("mounted: {}", mountpoint.display());
    service_manager::ready(&status.summary());
    ready().map_err(|source| DaemonError::System { what: "reporting readiness", source })?;
    announce_end(mounted, events).map_err(|source| DaemonError::System { what: "starting a thread", source })?;
    let mut is_ending = false;
    loop {
        match arrived.recv().expect("the signals' thread holds a sender") {
            Event::Worker(..) => unreachable!("there is none"),
            Event::Ended(result) => {
                info!("unmounted: {}", mountpoint.display());
                return result.map_err(|source| DaemonError::Ended { mountpoint, source });
            }
            Event::Signal(SIGHUP) => rescans.request(),
            Event::Signal(SIGUSR2) => warn!("not upgraded: there is no supervisor"),
            Event::Signal(signal) if is_ending => {
                warn!("signal {signal} again: ending with files in use");
                return Ok(());
            }
            Event::Signal(signal) => {
                info!("signal {signal}: unmounting {}", mountpoint.display());
                service_manager::stopping("unmounting; files that are open are served until they are closed");
                is_ending = true;
                end(&mountpoint);
            }
        }
    }
}

/// Whether a look at the root of the mount, through the kernel, is answered by us.
fn answers(mountpoint: &Path) -> Result<(), String> {
    let root = std::fs::metadata(mountpoint).map_err(|error| error.to_string())?;
    if root.ino() == Inode::ROOT.0 { Ok(()) } else { Err(format!("inode {}, expected that of our root", root.ino())) }
}

fn forward_signals(events: Sender<Event>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR2])?;
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
    let announce = move || drop(events.send(Event::Ended(mounted.wait())));
    thread::Builder::new().name("session-end".to_owned()).spawn(announce).map(drop)
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
