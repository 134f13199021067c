//! The file system without FUSE: which files there are, their attributes, and their bytes.
//!
//! A [`Vfs`] shows a source directory as readers of checkpoints expect it. Each directory is shown as it is; each archive
//! `X.mcwc` shows its `.safetensors` files under their original names in the directory where it lies; every other file is
//! passed through byte for byte. Nothing here depends on a mount, so everything here is tested without one.
//!
//! The tree is a snapshot: [`Vfs::open`] lists the source, opens the archives' indexes and decodes nothing. After that no
//! request changes it, so requests share it without a lock, and a request needs nothing but an [`Inode`]: there are no
//! handles, and a successor process can answer for files that its predecessor opened. A source file that changed after
//! the snapshot is refused ([`VfsError::Changed`]), never served mixed.
//!
//! What decides between two files of one name in one directory: see `vfs/tree.rs`. What a symbolic link becomes: see
//! `vfs/scan.rs`.

mod checkpoint;
mod decode_ahead;
mod error;
mod extended_attributes;
mod inode;
mod scan;
mod source;
mod tree;

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use log::{error, info};

pub use checkpoint::{BoxError, Checkpoint, DecodedArchive, Keeper};
pub use decode_ahead::DecodeAhead;
use decode_ahead::Follower;
pub use error::VfsError;
pub use inode::Inode;
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

/// A source directory as the mount shows it. Every method takes `&self` and none blocks but [`read`](Self::read).
#[derive(Debug)]
pub struct Vfs {
    source: Source,
    tree: Tree,
    /// Decodes ahead of readers, where that was asked for.
    follower: Option<Follower>,
    /// Hashes of the failures that have had their log line: a reader that retries must not flood the log.
    reported: Mutex<HashSet<u64>>,
    hasher: RandomState,
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
        open_archive: impl Fn(&Path) -> Result<C, BoxError> + Sync,
    ) -> Result<Self, VfsError> {
        let source = Source::open(source)?;
        let scan = Scan::new(&source, open_archive)?;
        let tree = Tree::build(&source, scan);
        let Totals { inodes, bytes, archives, refused_archives } = tree.totals();
        info!(
            "source listed: {}, {inodes} inodes, {archives} archives, {refused_archives} refused, {bytes} bytes decoded",
            source.root().display()
        );
        Ok(Self { source, tree, follower: None, reported: Mutex::default(), hasher: RandomState::new() })
    }

    /// Starts to decode ahead of readers, on `threads` threads, into a cache of `cache_bytes`.
    ///
    /// # Errors
    /// When the system grants no thread.
    pub fn decode_ahead(&mut self, mode: DecodeAhead, threads: usize, cache_bytes: u64) -> io::Result<()> {
        self.follower = Follower::start(mode, threads, cache_bytes)?;
        Ok(())
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
    pub fn directory(&self, inode: Inode) -> Result<&[DirectoryEntry], VfsError> {
        match &self.node(inode)?.content {
            Content::Directory(directory) => Ok(&directory.entries),
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
    pub fn link_target(&self, inode: Inode) -> Result<&Path, VfsError> {
        match &self.node(inode)?.content {
            Content::Link(target) => Ok(target),
            _ => Err(VfsError::NotALink),
        }
    }

    /// The path of `inode` from the root of the tree, for log lines.
    pub fn path(&self, inode: Inode) -> Result<&Path, VfsError> {
        Ok(&self.node(inode)?.path)
    }

    /// Fails where `inode` is no file: what `open` must know before it answers.
    pub fn check_file(&self, inode: Inode) -> Result<(), VfsError> {
        match &self.node(inode)?.content {
            Content::Sidecar(_) | Content::Archived(_) => Ok(()),
            Content::Directory(_) => Err(VfsError::IsADirectory),
            Content::Link(_) => Err(VfsError::NotAFile),
        }
    }

    /// The bytes `offset_bytes..offset_bytes + length_bytes` of a file where they are in memory already and the file has
    /// them all: an archived file's header. `None` means that [`read`](Self::read) must be asked.
    pub fn resident(&self, inode: Inode, offset_bytes: u64, length_bytes: u64) -> Option<&[u8]> {
        let Content::Archived(archived) = &self.node(inode).ok()?.content else { return None };
        let from = usize::try_from(offset_bytes).ok()?;
        let to = from.checked_add(usize::try_from(length_bytes).ok()?)?;
        archived.file().header.get(from..to)
    }

    /// Fills `out` with the bytes of a file from `offset_bytes` on; returns how many that was, less than `out.len()` only
    /// where the file ends. Blocks while reading the source or decoding, and holds no lock meanwhile.
    ///
    /// A failure has one log line, with the path, the tensor and what was wrong, however often it is met.
    pub fn read(&self, inode: Inode, offset_bytes: u64, keeper: Keeper, out: &mut [u8]) -> Result<usize, VfsError> {
        let node = self.node(inode)?;
        let left = node.attributes.length_bytes.saturating_sub(offset_bytes);
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(out.len());
        if length == 0 {
            return Ok(0);
        }
        if let (Some(follower), Content::Archived(archived)) = (&self.follower, &node.content) {
            follower.follow(inode, &archived.checkpoint, archived.index, offset_bytes, length as u64);
        }
        let result = self.read_content(node, offset_bytes, keeper, &mut out[..length]);
        if let Err(error) = &result {
            self.report(inode, error);
        }
        result.map(|()| length)
    }

    fn read_content(&self, node: &Node, offset_bytes: u64, keeper: Keeper, out: &mut [u8]) -> Result<(), VfsError> {
        match &node.content {
            Content::Sidecar(file) => self.source.read_exact_at(file, offset_bytes, out),
            Content::Archived(archived) => archived.read_exact_at(&node.path, offset_bytes, keeper, out),
            Content::Directory(_) => Err(VfsError::IsADirectory),
            Content::Link(_) => Err(VfsError::NotAFile),
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
        self.tree.totals()
    }

    /// The source directory, absolute and without symbolic links.
    pub fn source_path(&self) -> &Path {
        self.source.root()
    }

    fn node(&self, inode: Inode) -> Result<&Node, VfsError> {
        self.tree.node(inode).ok_or(VfsError::NoSuchInode(inode))
    }

    fn report(&self, inode: Inode, failure: &VfsError) {
        const MAX_REMEMBERED: usize = 65_536; // a bound on memory: past it a message may come again
        let message = failure.to_string();
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if reported.len() >= MAX_REMEMBERED {
            reported.clear();
        }
        let is_new = reported.insert(self.hasher.hash_one((inode, &message)));
        drop(reported);
        if is_new {
            error!("read failed: {message}");
        }
    }
}

#[cfg(test)]
mod tests;
