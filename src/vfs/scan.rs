//! Lists a source directory: what is there, before any archive is opened and before anything is decided about what is
//! shown.
//!
//! Symbolic links are resolved inside the tree and never leave it. A link to a file is listed as that file, under the
//! link's name (Hugging Face caches are made of such links); a link `X.mcwc` as that archive; a link to a directory stays a
//! link, rewritten to a relative path inside the tree, so that links that form a cycle cost nothing here. A link to the
//! outside, a link to nothing, and what is neither file nor directory is left out with one log line.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::VfsError;
use super::checkpoint::BoxError;
use super::log_once::LogOnce;
use super::source::{Source, SourceFile};
use crate::archive::{is_archive_name, is_unfinished_name};

/// Everything found, by directory, each path from the root of the source. Two scans of an unchanged source are equal.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Scan {
    pub(super) directories: BTreeMap<PathBuf, Listing>,
}

/// One directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listing {
    pub(super) modified: SystemTime,
    pub(super) subdirectories: Vec<OsString>,
    /// Links to directories, with where they lead, from the root of the source.
    pub(super) links: BTreeMap<OsString, PathBuf>,
    pub(super) sidecars: BTreeMap<OsString, SourceFile>,
    /// By the name of the `.mcwc` file: where two contradict each other, the order decides.
    pub(super) archives: BTreeMap<OsString, SourceFile>,
}

impl Scan {
    /// Lists the tree under `source`. A directory that cannot be listed is taken to be as in `previous`: a network file
    /// system that hiccups must not make models vanish. One that was never listed is empty.
    ///
    /// # Errors
    /// When the source directory itself cannot be listed.
    pub(super) fn new(source: &Source, previous: &Self, log: &LogOnce) -> Result<Self, VfsError> {
        let mut directories = BTreeMap::new();
        let mut waiting = vec![PathBuf::new()];
        while let Some(path) = waiting.pop() {
            let listing = match list(source, &path, log) {
                Ok(listing) => listing,
                Err(error) if path.as_os_str().is_empty() => {
                    return Err(VfsError::Source { path: source.root().to_owned(), source: error });
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => Listing::empty(), // gone since its parent was listed
                Err(error) => {
                    let known = previous.directories.get(&path);
                    let shown = if known.is_some() { "as it was" } else { "empty" };
                    log.warn(&format!("directory shown {shown}: {}: {error}", path.display()));
                    known.cloned().unwrap_or_else(Listing::empty)
                }
            };
            waiting.extend(listing.subdirectories.iter().map(|name| path.join(name)));
            directories.insert(path, listing);
        }
        Ok(Self { directories })
    }

    /// Every archive: the path under which it lies, from the root of the source, and its file.
    pub(super) fn archives(&self) -> impl Iterator<Item = (PathBuf, &SourceFile)> {
        self.directories.iter().flat_map(|(directory, listing)| {
            listing.archives.iter().map(move |(name, file)| (directory.join(name), file))
        })
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

fn list(source: &Source, path: &Path, log: &LogOnce) -> io::Result<Listing> {
    let absolute = source.root().join(path);
    let mut listing = Listing { modified: fs::metadata(&absolute)?.modified()?, ..Listing::empty() };
    for entry in fs::read_dir(&absolute)? {
        let name = entry?.file_name();
        if is_unfinished_name(&name) {
            continue;
        }
        let shown = path.join(&name);
        // A file that vanished meanwhile, a link to nothing: one name is left out, not its directory.
        if let Err(reason) = classify(source, path, name, &mut listing) {
            log.warn(&format!("left out: {}: {reason}", shown.display()));
        }
    }
    listing.subdirectories.sort_unstable(); // the system's order may change from one listing to the next
    Ok(listing)
}

fn classify(source: &Source, directory: &Path, name: OsString, listing: &mut Listing) -> Result<(), BoxError> {
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
        listing.archives.insert(name, SourceFile::new(real, &metadata)?);
    } else {
        listing.sidecars.insert(name, SourceFile::new(real, &metadata)?);
    }
    Ok(())
}
