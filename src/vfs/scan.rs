//! Lists a source directory: what is there, before anything is decided about what is shown.
//!
//! Symbolic links are resolved inside the tree and never leave it. A link to a file is listed as that file, under the
//! link's name (Hugging Face caches are made of such links); a link `X.mcwc` as that archive; a link to a directory stays a
//! link, rewritten to a relative path inside the tree, so that links that form a cycle cost nothing here. A link to the
//! outside, a link to nothing, and what is neither file nor directory is left out with one log line.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::SystemTime;

use log::{error, warn};

use super::VfsError;
use super::checkpoint::{BoxError, Checkpoint};
use super::source::{Source, SourceFile};
use crate::archive::UNFINISHED_PREFIX;

/// Everything found, by directory, each path from the root of the source.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) directories: BTreeMap<PathBuf, Listing>,
    pub(super) refused_archives: u64,
}

/// One directory.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) modified: SystemTime,
    pub(super) subdirectories: Vec<OsString>,
    /// Links to directories, with where they lead, from the root of the source.
    pub(super) links: BTreeMap<OsString, PathBuf>,
    pub(super) sidecars: BTreeMap<OsString, SourceFile>,
    /// By the name of the `.mcwc` file: where two contradict each other, the order decides.
    pub(super) archives: BTreeMap<OsString, FoundArchive>,
}

/// An archive whose index is sound.
#[derive(Debug)]
pub(super) struct FoundArchive {
    pub(super) modified: SystemTime,
    pub(super) checkpoint: Arc<dyn Checkpoint>,
}

/// An archive that has yet to be opened: opening reads, so several are opened at once.
struct Candidate {
    directory: PathBuf,
    name: OsString,
    file: SourceFile,
}

impl Scan {
    /// Lists the tree under `source` and opens its archives.
    pub(super) fn new<C: Checkpoint + 'static>(
        source: &Source,
        open_archive: impl Fn(&Path) -> Result<C, BoxError> + Sync,
    ) -> Result<Self, VfsError> {
        let mut directories = BTreeMap::new();
        let mut candidates = Vec::new();
        let mut waiting = vec![PathBuf::new()];
        while let Some(path) = waiting.pop() {
            match list(source, &path, &mut candidates) {
                Ok(listing) => {
                    waiting.extend(listing.subdirectories.iter().map(|name| path.join(name)));
                    directories.insert(path, listing);
                }
                Err(error) if path.as_os_str().is_empty() => {
                    return Err(VfsError::Source { path: source.root().to_owned(), source: error });
                }
                Err(error) => {
                    warn!("directory shown empty: {}: {error}", path.display());
                    let modified = SystemTime::UNIX_EPOCH;
                    directories.insert(path, Listing { modified, ..Listing::empty() });
                }
            }
        }
        let mut scan = Self { directories, refused_archives: 0 };
        scan.open_archives(source, candidates, open_archive);
        Ok(scan)
    }

    fn open_archives<C: Checkpoint + 'static>(
        &mut self,
        source: &Source,
        candidates: Vec<Candidate>,
        open_archive: impl Fn(&Path) -> Result<C, BoxError> + Sync,
    ) {
        let opened = in_parallel(&candidates, |candidate| {
            // A panic is our mistake, and still no reason to take the other archives away.
            catch_unwind(AssertUnwindSafe(|| open_archive(&source.root().join(&candidate.file.path))))
                .unwrap_or_else(|_| Err("internal error while opening: please report it with the archive".into()))
        });
        for (Candidate { directory, name, file }, result) in candidates.into_iter().zip(opened) {
            match result {
                Ok(checkpoint) => {
                    let found = FoundArchive { modified: file.modified, checkpoint: Arc::new(checkpoint) };
                    let listing = self.directories.get_mut(&directory).expect("its directory was listed");
                    listing.archives.insert(name, found);
                }
                Err(error) => {
                    error!("archive refused: {}: {error}", directory.join(name).display());
                    self.refused_archives += 1;
                }
            }
        }
    }
}

impl Listing {
    fn empty() -> Self {
        Self {
            modified: SystemTime::UNIX_EPOCH,
            subdirectories: Vec::new(),
            links: BTreeMap::new(),
            sidecars: BTreeMap::new(),
            archives: BTreeMap::new(),
        }
    }
}

/// Whether a file of this name is one that `mcwc-pack` is still writing, or that it left behind when it was killed.
fn is_unfinished_name(name: &OsStr) -> bool {
    name.as_bytes().starts_with(UNFINISHED_PREFIX.as_bytes())
}

/// Whether a file of this name is an archive.
fn is_archive_name(name: &OsStr) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "mcwc")
}

fn list(source: &Source, path: &Path, candidates: &mut Vec<Candidate>) -> io::Result<Listing> {
    let absolute = source.root().join(path);
    let mut listing = Listing { modified: fs::metadata(&absolute)?.modified()?, ..Listing::empty() };
    for entry in fs::read_dir(&absolute)? {
        let name = entry?.file_name();
        if is_unfinished_name(&name) {
            continue;
        }
        let shown = path.join(&name);
        // A file that vanished meanwhile, a link to nothing: one name is left out, not its directory.
        if let Err(reason) = classify(source, path, name, &mut listing, candidates) {
            warn!("left out: {}: {reason}", shown.display());
        }
    }
    Ok(listing)
}

fn classify(
    source: &Source,
    directory: &Path,
    name: OsString,
    listing: &mut Listing,
    candidates: &mut Vec<Candidate>,
) -> Result<(), BoxError> {
    let path = directory.join(&name);
    let is_link = fs::symlink_metadata(source.root().join(&path))?.is_symlink();
    let real =
        if is_link { source.resolve(&path)?.ok_or("a symbolic link that leaves the source directory")? } else { path };
    let metadata = fs::symlink_metadata(source.root().join(&real))?;
    if metadata.is_dir() && is_link {
        listing.links.insert(name, real);
    } else if metadata.is_dir() {
        listing.subdirectories.push(name);
    } else if !metadata.is_file() {
        return Err("neither a file nor a directory".into());
    } else if is_archive_name(&name) {
        candidates.push(Candidate { directory: directory.to_owned(), name, file: source_file(real, &metadata)? });
    } else {
        listing.sidecars.insert(name, source_file(real, &metadata)?);
    }
    Ok(())
}

fn source_file(path: PathBuf, metadata: &Metadata) -> io::Result<SourceFile> {
    Ok(SourceFile { path, length_bytes: metadata.len(), modified: metadata.modified()? })
}

/// `work` on every item by a few threads, results in order. Enough to hide a disk's or network's latency.
fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    const THREADS: usize = 8;
    let next = AtomicUsize::new(0);
    let mut results: Vec<(usize, R)> = thread::scope(|scope| {
        let worker = || {
            let take = || {
                let index = next.fetch_add(1, Ordering::Relaxed);
                items.get(index).map(|item| (index, item))
            };
            std::iter::from_fn(take).map(|(index, item)| (index, work(item))).collect::<Vec<_>>()
        };
        let threads: Vec<_> = (0..THREADS.min(items.len())).map(|_| scope.spawn(worker)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("the work does not panic")).collect()
    });
    results.sort_unstable_by_key(|&(index, _)| index);
    results.into_iter().map(|(_, result)| result).collect()
}
