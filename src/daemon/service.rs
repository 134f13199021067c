//! A mount being served: the tree, the conversation with the kernel, and the thread that looks for changes of the source.

use std::ffi::OsStr;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use log::{debug, info, warn};

use super::handover::Facts;
use super::status::Status;
use super::{DaemonError, DecodedCache, ServeOptions, memory, process};
use crate::archive::{ArchiveError, Bases, Place};
use crate::decoded_files::DecodedFiles;
use crate::fuse::{self, Device, Kernel, MountOptions, Mounted, OpenFiles, Registry, Succession};
use crate::materialize::Materializer;
use crate::metrics::METRICS;
use crate::telemetry;
use crate::vfs::{DecodedArchive, Vfs};

/// What a process that serves a mount is told of those before it.
#[derive(Default)]
pub(super) struct Before {
    /// What they have left open, where files may be passed through.
    pub(super) open_files: OpenFiles,
    pub(super) facts: Facts,
}

/// A source that is ready to be served.
pub(super) struct Prepared {
    vfs: Arc<Vfs>,
    materializer: Arc<Materializer>,
}

impl Prepared {
    /// Lists the source and opens its archives.
    pub(super) fn new(options: &ServeOptions) -> Result<Self, DaemonError> {
        memory::share_heaps(options.materialize.cache_bytes);
        let materializer = Arc::new(Materializer::new(options.materialize));
        let decoder = Arc::clone(&materializer);
        let places = std::iter::once(&options.source).chain(&options.base_paths).map(|path| Place::tree(path));
        let bases = Arc::new(Bases::new(places.collect()));
        let looked_for = Arc::clone(&bases);
        let mut vfs = Vfs::open(&options.source, move |path| {
            process::leave_descriptors_for_readers()
                .map_err(|source| ArchiveError::Io { path: path.to_owned(), source })?;
            let archive = bases.open(path)?;
            decoder.check_fits(&archive)?; // a map of its file would end its reader
            Ok(DecodedArchive::new(archive, Arc::clone(&decoder)))
        })?;
        vfs.before_rescans(move || looked_for.look_again());
        vfs.decode_ahead(options.decode_ahead, options.materialize.threads, options.materialize.cache_bytes)
            .map_err(|source| DaemonError::System { what: "starting a thread", source })?;
        if let Some(DecodedCache { directory, bytes }) = &options.decoded_cache {
            let files = Arc::new(DecodedFiles::open(directory, *bytes)?);
            vfs.keep_decoded_files(files)
                .map_err(|source| DaemonError::System { what: "starting a thread", source })?;
        }
        Ok(Self { vfs: Arc::new(vfs), materializer })
    }

    /// Starts to answer on `device`, and on `listener` with metrics.
    pub(super) fn serve(
        self,
        options: &ServeOptions,
        device: Device,
        listener: Option<TcpListener>,
        before: Before,
        registry: Option<Arc<dyn Registry>>,
    ) -> Result<Service, DaemonError> {
        let Self { vfs, materializer } = self;
        let Before { open_files, facts } = before;
        let (is_successor, is_suspicious) = (facts.is_successor(), facts.is_suspicious);
        let status = Arc::new(Status::new(Arc::clone(&vfs), materializer, device.mountpoint(), facts));
        let attributes = Arc::clone(&status);
        let mount = MountOptions { refuse_resent: is_suspicious, ..options.mount.clone() };
        let succession = Succession {
            root_attributes: Arc::new(move |name: &OsStr| attributes.root_attribute(name)),
            inherited: open_files,
            registry,
        };
        let mounted = fuse::serve(Arc::clone(&vfs), device, &mount, succession)?;
        let start = || {
            if let Some(listener) = listener {
                let status = Arc::clone(&status);
                telemetry::serve_metrics(listener, move || status.json())?;
            }
            look_for_changes(vfs, mounted.kernel(), options.rescan_interval, is_successor)
        };
        let rescans = start().map_err(|source| DaemonError::System { what: "starting a thread", source })?;
        Ok(Service { mounted, rescans, status })
    }
}

/// A mount that this process serves.
pub(super) struct Service {
    pub(super) mounted: Mounted,
    pub(super) rescans: Rescans,
    pub(super) status: Arc<Status>,
}

/// Asks for the source to be listed again, now.
#[derive(Clone, Debug)]
pub(super) struct Rescans(Sender<()>);

impl Rescans {
    pub(super) fn request(&self) {
        let _ = self.0.send(()); // the thread ends with the process
    }
}

/// Starts the thread that lists the source again when it is asked to, and every `interval` if there is one.
///
/// Listing works on every file system. The system's own notices of changes do not come from network file systems, where
/// checkpoints often are, and they overflow. So that a large or slow source is not listed all the time, the thread waits
/// a hundred times as long as the last listing took, if that is longer.
fn look_for_changes(
    vfs: Arc<Vfs>,
    kernel: Kernel,
    interval: Option<Duration>,
    is_successor: bool,
) -> io::Result<Rescans> {
    let (sender, requests) = mpsc::channel();
    let look = move || {
        if is_successor {
            kernel.expire(&vfs.everything()); // the source may have changed since the predecessor told of it
        }
        let mut wait = interval;
        loop {
            let request = match wait {
                Some(wait) => requests.recv_timeout(wait),
                None => requests.recv().map_err(RecvTimeoutError::from),
            };
            let is_asked = match request {
                Ok(()) => true,
                Err(RecvTimeoutError::Timeout) => false,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let started = Instant::now();
            rescan(&vfs, &kernel, is_asked);
            wait = interval.map(|interval| interval.max(started.elapsed() * 100));
        }
    };
    thread::Builder::new().name("rescan".to_owned()).spawn(look)?;
    Ok(Rescans(sender))
}

fn rescan(vfs: &Vfs, kernel: &Kernel, is_asked: bool) {
    METRICS.rescans.add(1);
    match vfs.rescan() {
        Ok(changes) if changes.is_empty() && is_asked => info!("source listed again: nothing changed"),
        Ok(changes) if changes.is_empty() => debug!("source listed again: nothing changed"),
        Ok(changes) => kernel.forget(&changes),
        Err(error) => {
            METRICS.rescan_failures.add(1);
            warn!("source not listed again, shown as it was: {error}");
        }
    }
    // What nobody has open any more is let go of: its archive is closed, and its space on disk is free.
    for inode in vfs.retired() {
        if !kernel.knows(inode) {
            vfs.release(inode);
        }
    }
}
