//! The tree that is shown: what a [`Scan`] found, with every conflict decided.
//!
//! - An archived file wins over a sidecar, link or directory of its name: the archive is what the mount is for.
//! - An archive is shown whole or not at all. Where two archives of a directory hold files of one name, the archive that
//!   comes first in byte order is shown and the other is refused: shards of two checkpoints must never be mixed.
//! - A shard index (`*.safetensors.index.json`) is shown only if all its shards are: servers have booted on
//!   uninitialised weights because an index promised what was not there (contract line 15).
//!
//! Each decision that hides something is one log line.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::checkpoint::{BoxError, Checkpoint, Keeper};
use super::log_once::LogOnce;
use super::opened::{Opened, OpenedArchive};
use super::scan::{Listing, Scan};
use super::source::{Source, SourceFile};
use super::{Attributes, DirectoryEntry, Inode, Kind, Totals, VfsError};
use crate::archive::ArchivedFile;
use crate::safetensors::ShardIndex;

/// Every inode shown, by number. Immutable once built.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: HashMap<Inode, Arc<Node>>,
    /// By path.
    archives: Vec<Arc<OpenedArchive>>,
    totals: Totals,
}

/// One inode.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) attributes: Attributes,
    /// From the root of the tree.
    pub(super) path: PathBuf,
    pub(super) content: Content,
}

/// Where an inode's content comes from.
#[derive(Debug)]
pub(super) enum Content {
    Directory(Directory),
    Link(PathBuf),
    Sidecar(SourceFile),
    Archived(Archived),
}

#[derive(Debug)]
pub(super) struct Directory {
    pub(super) parent: Inode,
    /// Sorted by name.
    pub(super) entries: Arc<[DirectoryEntry]>,
}

/// A file decoded from an archive.
#[derive(Clone, Debug)]
pub(super) struct Archived {
    pub(super) archive: Arc<OpenedArchive>,
    /// Which of the checkpoint's files.
    pub(super) index: usize,
}

/// What one name of a directory stands for, once decided.
enum Shown {
    Subdirectory,
    Link(PathBuf),
    Sidecar(SourceFile),
    Archived(Archived),
}

impl Archived {
    pub(super) fn checkpoint(&self) -> &Arc<dyn Checkpoint> {
        &self.archive.checkpoint
    }

    pub(super) fn file(&self) -> &ArchivedFile {
        &self.checkpoint().files()[self.index]
    }

    /// Who keeps what a reader of this file is given: see [`Activity::keeper`](super::activity::Activity::keeper).
    pub(super) fn keeper(&self, of_reader: Keeper) -> Keeper {
        self.archive.activity.keeper(self.index, of_reader)
    }

    /// Notes that a reader got these bytes.
    pub(super) fn count_read(&self, offset_bytes: u64, length_bytes: u64) {
        self.archive.activity.count_read(self.index, offset_bytes, length_bytes);
    }

    /// Fills `out`, which must lie inside the file, from `offset_bytes` on; `path` is the file's, for the error.
    pub(super) fn read_exact_at(
        &self,
        path: &Path,
        offset_bytes: u64,
        keeper: Keeper,
        out: &mut [u8],
    ) -> Result<(), VfsError> {
        let result = self.checkpoint().read(self.index, offset_bytes, keeper, out);
        let source: BoxError = match result {
            Ok(found) if found == out.len() => {
                self.count_read(offset_bytes, out.len() as u64);
                return Ok(());
            }
            // The kernel would take it for the end of the file and show zeros.
            Ok(found) => format!("{found} bytes decoded at byte {offset_bytes}, expected {}", out.len()).into(),
            Err(error) => error,
        };
        Err(VfsError::Decode { path: path.to_owned(), source })
    }
}

impl Tree {
    /// Decides what is shown of `scan`, whose archives are `opened`; `source` is read for the shard indexes only.
    pub(super) fn build(source: &Source, scan: &Scan, opened: &Opened, log: &LogOnce) -> Self {
        let mut refused_archives = opened.refused();
        let mut archives = Vec::new();
        let mut shown: BTreeMap<PathBuf, BTreeMap<OsString, Shown>> = BTreeMap::new();
        let mut modified = HashMap::new();
        for (path, listing) in &scan.directories {
            modified.insert(path.clone(), listing.modified);
            let decided = decide(path, listing, opened, log);
            let mut entries = decided.entries;
            hide_broken_indexes(source, path, &mut entries, log);
            archives.extend(decided.archives);
            refused_archives += decided.refused;
            shown.insert(path.clone(), entries);
        }
        let mut builder = Builder { nodes: HashMap::new(), shown, modified };
        builder.directory(Path::new(""), Inode::ROOT, Inode::ROOT);
        let nodes: HashMap<_, _> = builder.nodes.into_iter().map(|(inode, node)| (inode, Arc::new(node))).collect();
        let files = nodes.values().filter(|node| node.attributes.kind == Kind::File);
        let bytes = files.fold(0_u64, |sum, node| sum.saturating_add(node.attributes.length_bytes));
        let totals = Totals { inodes: nodes.len() as u64, bytes, archives: archives.len() as u64, refused_archives };
        Self { nodes, archives, totals }
    }

    pub(super) fn node(&self, inode: Inode) -> Option<&Arc<Node>> {
        self.nodes.get(&inode)
    }

    pub(super) fn archives(&self) -> &[Arc<OpenedArchive>] {
        &self.archives
    }

    pub(super) fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    pub(super) fn totals(&self) -> Totals {
        self.totals
    }
}

/// What each name of a directory stands for.
struct Decided {
    entries: BTreeMap<OsString, Shown>,
    /// Those shown.
    archives: Vec<Arc<OpenedArchive>>,
    /// Archives that contradict one that is shown.
    refused: u64,
}

fn decide(path: &Path, listing: &Listing, opened: &Opened, log: &LogOnce) -> Decided {
    let Listing { subdirectories, links, sidecars, archives, .. } = listing;
    let mut entries = BTreeMap::new();
    entries.extend(subdirectories.iter().map(|name| (name.clone(), Shown::Subdirectory)));
    entries.extend(links.iter().map(|(name, target)| (name.clone(), Shown::Link(relative(path, target)))));
    entries.extend(sidecars.iter().map(|(name, file)| (name.clone(), Shown::Sidecar(file.clone()))));
    let mut decided = Decided { entries, archives: Vec::new(), refused: 0 };
    for archive in archives.keys().filter_map(|name| opened.get(&path.join(name))) {
        let archive_path = archive.path.display();
        if let Err(reason) = check_names(&decided.entries, archive.checkpoint.files()) {
            log.error(&format!("archive refused: {archive_path}: {reason}"));
            decided.refused += 1;
            continue;
        }
        decided.archives.push(Arc::clone(archive));
        for (index, file) in archive.checkpoint.files().iter().enumerate() {
            let archived = Archived { archive: Arc::clone(archive), index };
            if decided.entries.insert(file.name.clone().into(), Shown::Archived(archived)).is_some() {
                let hidden = path.join(&file.name);
                log.warn(&format!("hidden: {}: archive {archive_path} holds a file of this name", hidden.display()));
            }
        }
    }
    decided
}

/// Whether all files of an archive can be shown beside what is shown already.
fn check_names(shown: &BTreeMap<OsString, Shown>, files: &[ArchivedFile]) -> Result<(), String> {
    const MAX_NAME_BYTES: usize = 255; // NAME_MAX: the kernel asks for no longer one
    let mut own = BTreeSet::new();
    for file in files {
        let name = file.name.as_str();
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) || name.len() > MAX_NAME_BYTES {
            return Err(format!("file name: {name:?}, expected 1 to {MAX_NAME_BYTES} bytes without directories"));
        }
        if !own.insert(name) {
            return Err(format!("file name: {name:?} twice, expected different names"));
        }
        if let Some(Shown::Archived(other)) = shown.get(OsStr::new(name)) {
            return Err(format!("file name: {name:?} is shown from {} already", other.archive.path.display()));
        }
    }
    Ok(())
}

/// Takes out each shard index of which a shard is missing, or that cannot be read and so promises who knows what.
fn hide_broken_indexes(source: &Source, path: &Path, entries: &mut BTreeMap<OsString, Shown>, log: &LogOnce) {
    const MAX_INDEX_BYTES: u64 = 100 << 20; // the limit of a safetensors header, which lists the same names
    let mut hidden = Vec::new();
    for (name, entry) in entries.iter() {
        let Shown::Sidecar(file) = entry else { continue };
        if !name.as_bytes().ends_with(b".safetensors.index.json") {
            continue;
        }
        let read = source.read_whole(file, MAX_INDEX_BYTES).map_err(|error| error.to_string());
        let index = read.and_then(|bytes| ShardIndex::parse(&bytes).map_err(|error| error.to_string()));
        let reason = match &index {
            Ok(index) => index
                .shards()
                .into_iter()
                .find(|shard| !matches!(entries.get(OsStr::new(shard)), Some(Shown::Sidecar(_) | Shown::Archived(_))))
                .map(|missing| format!("its shard {missing} is missing")),
            Err(error) => Some(error.clone()),
        };
        if let Some(reason) = reason {
            log.error(&format!("hidden: {}: {reason}", path.join(name).display()));
            hidden.push(name.clone());
        }
    }
    for name in hidden {
        entries.remove(&name);
    }
}

/// How to get from the directory `from` to `to`, both from the root and free of links: `../../b/c`.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let common = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(common).map(|_| OsStr::new(".."));
    let down = to.components().skip(common).map(Component::as_os_str);
    let path: PathBuf = up.chain(down).collect();
    if path.as_os_str().is_empty() { PathBuf::from(".") } else { path }
}

/// Numbers the inodes and ties entries to them.
struct Builder {
    nodes: HashMap<Inode, Node>,
    shown: BTreeMap<PathBuf, BTreeMap<OsString, Shown>>,
    modified: HashMap<PathBuf, SystemTime>,
}

impl Builder {
    /// Adds the directory `path` and all below it under the number `inode`.
    ///
    /// Recursive: the depth is that of the source's paths, which the system limits to 4096 bytes.
    fn directory(&mut self, path: &Path, inode: Inode, parent: Inode) {
        let modified = self.modified.get(path).copied().unwrap_or(SystemTime::UNIX_EPOCH);
        let shown = self.shown.remove(path).unwrap_or_default();
        // Reserves the number before the children take theirs.
        self.add(inode, path.to_owned(), Kind::Directory, 0, modified, Content::Directory(Directory::empty(parent)));
        let entries: Vec<_> = shown.into_iter().map(|(name, entry)| self.entry(path, inode, name, entry)).collect();
        let subdirectories = entries.iter().filter(|entry| entry.kind == Kind::Directory).count();
        let node = self.nodes.get_mut(&inode).expect("added above");
        node.attributes.links = u32::try_from(2 + subdirectories).unwrap_or(u32::MAX);
        node.content = Content::Directory(Directory { parent, entries: entries.into() });
    }

    fn entry(&mut self, directory: &Path, parent: Inode, name: OsString, shown: Shown) -> DirectoryEntry {
        let path = directory.join(&name);
        let (inode, kind) = match shown {
            Shown::Subdirectory => {
                let inode = self.free(Inode::of_directory(&path));
                self.directory(&path, inode, parent);
                (inode, Kind::Directory)
            }
            Shown::Link(target) => {
                let inode = self.free(Inode::of_link(&path));
                let length_bytes = target.as_os_str().len() as u64;
                self.add(inode, path, Kind::Link, length_bytes, SystemTime::UNIX_EPOCH, Content::Link(target));
                (inode, Kind::Link)
            }
            Shown::Sidecar(file) => {
                let inode = self.free(Inode::of_sidecar(&path, file.length_bytes, file.modified));
                self.add(inode, path, Kind::File, file.length_bytes, file.modified, Content::Sidecar(file));
                (inode, Kind::File)
            }
            Shown::Archived(archived) => {
                let inode = self.free(Inode::of_archived(&path, &archived.checkpoint().content_id()));
                let (length_bytes, modified) = (archived.file().length_bytes, archived.archive.file.modified);
                self.add(inode, path, Kind::File, length_bytes, modified, Content::Archived(archived));
                (inode, Kind::File)
            }
        };
        DirectoryEntry { name, inode, kind }
    }

    /// `wanted`, or the next number that is not taken. Paths are visited in order, so a collision ends the same way
    /// after every mount.
    fn free(&self, mut wanted: Inode) -> Inode {
        while self.nodes.contains_key(&wanted) {
            wanted = wanted.next();
        }
        wanted
    }

    fn add(
        &mut self,
        inode: Inode,
        path: PathBuf,
        kind: Kind,
        length_bytes: u64,
        modified: SystemTime,
        content: Content,
    ) {
        let attributes = Attributes { inode, kind, length_bytes, modified, links: 1 };
        self.nodes.insert(inode, Node { attributes, path, content });
    }
}

impl Directory {
    fn empty(parent: Inode) -> Self {
        Self { parent, entries: Arc::new([]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_rewritten_relative_to_its_own_directory() {
        for (from, to, expected) in [
            ("", "a", "a"),
            ("a", "a", "."),
            ("a/b", "a/c/d", "../c/d"),
            ("snapshots/main", "blobs", "../../blobs"),
            ("a", "", ".."),
        ] {
            assert_eq!(relative(Path::new(from), Path::new(to)), Path::new(expected), "{from} to {to}");
        }
    }
}
