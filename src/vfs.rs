//! The file system without FUSE: which files there are, their attributes, and their bytes.
//!
//! A [`Vfs`] shows a source directory as readers of checkpoints expect it. Each directory is shown as it is; each archive
//! `X.mcwc` shows its `.safetensors` files under their original names in the directory where it lies; every other file is
//! passed through byte for byte. Nothing here depends on a mount, so everything here is tested without one.
//!
//! The tree is a snapshot: [`Vfs::open`] lists the source, opens the archives' indexes and decodes nothing. After that no
//! request changes it, and a request needs nothing but an [`Inode`]: there are no handles, and a successor process can
//! answer for files that its predecessor opened. A source file that changed after the snapshot is refused
//! ([`VfsError::Changed`]), never served mixed.
//!
//! [`Vfs::rescan`] lists the source again and puts another snapshot in the old one's place, which takes a pointer. What
//! did not change stays open as it is. A file that is gone or was replaced is *retired*: no name leads to it, and who has
//! it open reads its old bytes on (an inode's number is made of its content, so they cannot be taken for the new ones)
//! until [`Vfs::release`] says that nobody has.
//!
//! What decides between two files of one name in one directory: see `vfs/tree.rs`. What a symbolic link becomes: see
//! `vfs/scan.rs`.

mod activity;
mod changes;
mod checkpoint;
mod decode_ahead;
mod error;
mod extended_attributes;
mod file_keeper;
mod inode;
mod loads;
mod log_once;
mod opened;
mod reading;
mod scan;
mod source;
mod tree;

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::SystemTime;

use log::info;

use crate::decoded_files::DecodedFiles;

pub use changes::Changes;
pub use checkpoint::{BoxError, Checkpoint, Decoded, DecodedArchive, Keeper};
pub use decode_ahead::DecodeAhead;
use decode_ahead::Follower;
pub use error::VfsError;
use file_keeper::FileKeeper;
pub use inode::Inode;
use loads::Loads;
use log_once::LogOnce;
use opened::{OpenArchive, Opened, OpenedArchive};
pub use reading::{Bytes, Resident};
use scan::Scan;
use source::Source;
use tree::{Content, Node, Tree};

/// What an [`Inode`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory of the source.
    Directory,
    /// A sidecar, or a file decoded from an archive.
    File,
    /// A symbolic link to a directory inside the tree.
    Link,
}

/// What `stat` says. Owner and mode are the mount's business, not the tree's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// The same after every mount of the same content under the same path.
    pub inode: Inode,
    /// Directory, file or link.
    pub kind: Kind,
    /// Length in bytes, exact without decoding; of a link, the length of its target.
    pub length_bytes: u64,
    /// Modification time: the archive's own for what is decoded from it.
    pub modified: SystemTime,
    /// 1 for files; directories count their subdirectories as usual.
    pub links: u32,
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Name without directories.
    pub name: OsString,
    /// What it names.
    pub inode: Inode,
    /// Directory, file or link.
    pub kind: Kind,
}

/// Totals over the tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Files, directories and links shown.
    pub inodes: u64,
    /// Sum of the lengths of all files, decoded.
    pub bytes: u64,
    /// Archives shown.
    pub archives: u64,
    /// Archives that could not be shown.
    pub refused_archives: u64,
}

/// One archive that is shown, and what has been asked of it since it was opened.
#[derive(Clone, Debug, PartialEq)]
pub struct ArchiveStatus {
    /// The `.mcwc` file, from the root of the source.
    pub path: PathBuf,
    /// Length of its files together, decoded.
    pub length_bytes: u64,
    /// Length of the `.mcwc` file.
    pub stored_bytes: u64,
    /// How often one of its files was opened.
    pub opens: u64,
    /// Bytes that readers got; what the kernel's page cache answers is not among them.
    pub read_bytes: u64,
    /// How much of it has been read, from 0 to 1, to the mebibyte.
    pub read_share: f64,
}

/// A source directory as the mount shows it. Every method takes `&self`; those that answer requests do not block, but
/// for [`read`](Self::read).
pub struct Vfs {
    source: Source,
    open_archive: Box<OpenArchive>,
    /// Told that archives are about to be opened again.
    before_rescan: Box<dyn Fn() + Send + Sync>,
    /// What is shown. The lock covers taking or replacing the pointer.
    tree: RwLock<Arc<Tree>>,
    /// Files that are shown no more, for who has them open.
    retired: RwLock<HashMap<Inode, Arc<Node>>>,
    /// What the tree was made of; whoever rescans holds it.
    scanned: Mutex<Scanned>,
    /// Decodes ahead of readers, where that was asked for.
    follower: Option<Follower>,
    /// Keeps decoded files, where that was asked for.
    file_keeper: Option<FileKeeper>,
    /// Who loads which file now, for the log.
    loads: Loads,
    log: LogOnce,
}

#[derive(Default)]
struct Scanned {
    scan: Scan,
    opened: Opened,
}

impl fmt::Debug for Vfs {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Vfs")
            .field("source", &self.source)
            .field("totals", &self.totals())
            .finish_non_exhaustive()
    }
}

impl Vfs {
    /// Lists `source` and opens the index of every archive in it, `open_archive` given the archive's absolute path.
    ///
    /// An archive that cannot be opened is left out with one log line; the others are not affected. Archives are
    /// opened by several threads at once.
    ///
    /// # Errors
    /// When `source` itself is not a directory that can be listed.
    pub fn open<C: Checkpoint + 'static>(
        source: &Path,
        open_archive: impl Fn(&Path) -> Result<C, BoxError> + Send + Sync + 'static,
    ) -> Result<Self, VfsError> {
        let source = Source::open(source)?;
        let open_archive: Box<OpenArchive> = Box::new(move |path| Ok(Arc::new(open_archive(path)?)));
        let (log, nothing) = (LogOnce::default(), Scanned::default());
        let scan = Scan::new(&source, &nothing.scan, &log)?;
        let opened = Opened::new(&source, &scan, &nothing.opened, &*open_archive, &log);
        let tree = Arc::new(Tree::build(&source, &scan, &opened, &log));
        let Totals { inodes, bytes, archives, refused_archives } = tree.totals();
        info!(
            "source listed: {}, {inodes} inodes, {archives} archives, {refused_archives} refused, {bytes} bytes decoded",
            source.root().display()
        );
        let scanned = Mutex::new(Scanned { scan, opened });
        let (tree, retired) = (RwLock::new(tree), RwLock::default());
        Ok(Self {
            source,
            open_archive,
            before_rescan: Box::new(|| ()),
            tree,
            retired,
            scanned,
            follower: None,
            file_keeper: None,
            loads: Loads::default(),
            log,
        })
    }

    /// Calls `tell` before archives are opened again, because what they need may be there now.
    pub fn before_rescans(&mut self, tell: impl Fn() + Send + Sync + 'static) {
        self.before_rescan = Box::new(tell);
    }

    /// Starts to decode ahead of readers into a cache of `cache_bytes`, where `threads` threads may decode.
    ///
    /// # Errors
    /// When the system grants no thread.
    pub fn decode_ahead(&mut self, mode: DecodeAhead, threads: usize, cache_bytes: u64) -> io::Result<()> {
        self.follower = Follower::start(mode, threads, cache_bytes)?;
        Ok(())
    }

    /// Keeps whole decoded files in `files`, and serves them from there.
    ///
    /// # Errors
    /// When the system grants no thread.
    pub fn keep_decoded_files(&mut self, files: Arc<DecodedFiles>) -> io::Result<()> {
        self.file_keeper = Some(FileKeeper::start(files)?);
        Ok(())
    }

    /// A file on disk with the bytes of `inode`, if there is one.
    pub fn decoded_file(&self, inode: Inode) -> Option<Arc<File>> {
        match &self.node(inode).ok()?.content {
            Content::Archived(archived) => self.file_keeper.as_ref()?.find(archived.file()),
            _ => None,
        }
    }

    /// Lists the source again and shows what is there now; returns what that changed.
    ///
    /// Archives that did not change stay open; requests go on meanwhile. A directory that cannot be listed stays as it
    /// was.
    ///
    /// # Errors
    /// When the source itself cannot be listed. Everything stays as it was then.
    pub fn rescan(&self) -> Result<Changes, VfsError> {
        let mut scanned = self.scanned.lock().unwrap_or_else(PoisonError::into_inner);
        let scan = Scan::new(&self.source, &scanned.scan, &self.log)?;
        if scan == scanned.scan && !scanned.opened.is_worth_another_try() {
            return Ok(Changes::default());
        }
        (self.before_rescan)();
        let opened = Opened::new(&self.source, &scan, &scanned.opened, &*self.open_archive, &self.log);
        let new = Arc::new(Tree::build(&self.source, &scan, &opened, &self.log));
        *scanned = Scanned { scan, opened };
        let old = self.tree();
        let changes = Changes::between(&old, &new);
        let retired = || self.retired.write().unwrap_or_else(PoisonError::into_inner);
        // In this order, every request finds what it looks for in one of the two.
        retired().extend(changes::retired(&old, &new));
        *self.tree.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&new);
        retired().retain(|inode, _| new.node(*inode).is_none());
        let Totals { inodes, archives, refused_archives, .. } = new.totals();
        if !changes.is_empty() {
            info!(
                "source changed: {} names, now {inodes} inodes, {archives} archives, {refused_archives} refused",
                changes.names.len()
            );
        }
        Ok(changes)
    }

    /// Every name and every directory, as if all had changed: what the kernel must check where another process has answered
    /// before, and nobody knows what it said.
    pub fn everything(&self) -> Changes {
        Changes::everything(&self.tree())
    }

    /// Files that no name leads to any more and that somebody may still have open.
    pub fn retired(&self) -> Vec<Inode> {
        self.retired.read().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }

    /// Lets go of a retired file: nobody has it open.
    pub fn release(&self, inode: Inode) {
        let released = self.retired.write().unwrap_or_else(PoisonError::into_inner).remove(&inode);
        drop(released); // closes the archive, which may take its time, after the lock is free
    }

    /// Every archive shown, by path.
    pub fn archives(&self) -> Vec<ArchiveStatus> {
        let status = |archive: &Arc<OpenedArchive>| ArchiveStatus {
            path: archive.path.clone(),
            length_bytes: archive.checkpoint.files().iter().map(|file| file.length_bytes).sum(),
            stored_bytes: archive.checkpoint.stored_bytes(),
            opens: archive.activity.opens(),
            read_bytes: archive.activity.read_bytes(),
            read_share: archive.activity.read_share(),
        };
        self.tree().archives().iter().map(status).collect()
    }

    /// Finds `name` in the directory `parent`.
    pub fn lookup(&self, parent: Inode, name: &OsStr) -> Result<Attributes, VfsError> {
        let entries = self.directory(parent)?;
        let at =
            entries.binary_search_by(|entry| entry.name.as_os_str().cmp(name)).map_err(|_| VfsError::NoSuchName)?;
        Ok(self.node(entries[at].inode)?.attributes)
    }

    /// What `stat` says about `inode`.
    pub fn attributes(&self, inode: Inode) -> Result<Attributes, VfsError> {
        Ok(self.node(inode)?.attributes)
    }

    /// What a directory shows, sorted by name, without `.` and `..`.
    pub fn directory(&self, inode: Inode) -> Result<Arc<[DirectoryEntry]>, VfsError> {
        match &self.node(inode)?.content {
            Content::Directory(directory) => Ok(Arc::clone(&directory.entries)),
            _ => Err(VfsError::NotADirectory),
        }
    }

    /// The directory that holds the directory `inode`; the root's is the root.
    pub fn parent(&self, inode: Inode) -> Result<Inode, VfsError> {
        match &self.node(inode)?.content {
            Content::Directory(directory) => Ok(directory.parent),
            _ => Err(VfsError::NotADirectory),
        }
    }

    /// Where a link points: a relative path that stays inside the tree.
    pub fn link_target(&self, inode: Inode) -> Result<PathBuf, VfsError> {
        match &self.node(inode)?.content {
            Content::Link(target) => Ok(target.clone()),
            _ => Err(VfsError::NotALink),
        }
    }

    /// What `open` must know before it answers: fails where `inode` is no file. `keeper` is who keeps what is read this way.
    /// Returns its path from the root of the tree, for log lines.
    pub fn open_file(&self, inode: Inode, keeper: Keeper) -> Result<PathBuf, VfsError> {
        let node = self.node(inode)?;
        match &node.content {
            Content::Sidecar(_) => {}
            Content::Archived(archived) => {
                archived.archive.activity.count_open();
                archived.keeper(keeper);
                self.loads.opened(inode);
            }
            Content::Directory(_) => return Err(VfsError::IsADirectory),
            Content::Link(_) => return Err(VfsError::NotAFile),
        }
        Ok(node.path.clone())
    }

    /// Notes that a file was closed which [`open_file`](Self::open_file) had noted.
    pub fn close_file(&self, inode: Inode) {
        self.loads.closed(inode);
    }

    /// Notes that the kernel reads a file by itself from now on: no request for it will come here.
    pub fn note_passed(&self, inode: Inode) {
        if let Ok(node) = self.node(inode) {
            info!("open: {}, {} bytes, read by the kernel itself", node.path.display(), node.attributes.length_bytes);
        }
    }

    /// One extended attribute of a file (contract line 11).
    pub fn extended_attribute(&self, inode: Inode, name: &OsStr) -> Result<String, VfsError> {
        let Content::Archived(archived) = &self.node(inode)?.content else { return Err(VfsError::NoSuchAttribute) };
        extended_attributes::value(archived, name).ok_or(VfsError::NoSuchAttribute)
    }

    /// The names of the extended attributes that [`extended_attribute`](Self::extended_attribute) answers.
    pub fn extended_attribute_names(&self, inode: Inode) -> Result<Vec<&'static str>, VfsError> {
        let Content::Archived(archived) = &self.node(inode)?.content else { return Ok(Vec::new()) };
        let offered = extended_attributes::NAMES.into_iter();
        Ok(offered.filter(|name| extended_attributes::value(archived, OsStr::new(name)).is_some()).collect())
    }

    /// Totals over the tree.
    pub fn totals(&self) -> Totals {
        self.tree().totals()
    }

    /// The source directory, absolute and without symbolic links.
    pub fn source_path(&self) -> &Path {
        self.source.root()
    }

    fn tree(&self) -> Arc<Tree> {
        Arc::clone(&self.tree.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn node(&self, inode: Inode) -> Result<Arc<Node>, VfsError> {
        if let Some(node) = self.tree.read().unwrap_or_else(PoisonError::into_inner).node(inode) {
            return Ok(Arc::clone(node));
        }
        let retired = self.retired.read().unwrap_or_else(PoisonError::into_inner);
        retired.get(&inode).cloned().ok_or(VfsError::NoSuchInode(inode))
    }
}

#[cfg(test)]
mod tests;
