//! Finding the archives that an archive starts from, by their content ids, among the archives of some directories.

use std::collections::{HashMap, HashSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::{Archive, ArchiveError, is_archive_name};
use crate::format::index::BaseReference;
use crate::format::limits::BASE_CHAIN;
use crate::hexadecimal::hex;

/// Which file it was: device, inode, length, time of the last change of any kind.
type Identity = (u64, u64, u64, i64, i64);

/// Opens archives together with the bases they need. Whoever opens the same file twice gets the same [`Archive`], so that
/// all variants of a base share what is decoded of it.
#[derive(Debug, Default)]
pub struct Bases {
    places: Vec<Place>,
    known: Mutex<HashMap<Identity, Known>>,
    /// Where content was found last.
    found: Mutex<HashMap<[u8; 32], PathBuf>>,
    /// Content that was in none of the places when it was last looked for.
    missing: Mutex<HashSet<[u8; 32]>>,
}

/// Where bases are looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// A directory, or an archive.
    pub path: PathBuf,
    /// How many levels of directories below it are looked into.
    pub levels: usize,
}

impl Place {
    /// A directory and all below it.
    pub fn tree(path: &Path) -> Self {
        Self { path: path.to_owned(), levels: usize::MAX }
    }
}

/// Whether an archive needs no other.
#[derive(Clone, Copy, PartialEq, Eq)]
struct StandsAlone(bool);

/// What is known of a file.
#[derive(Debug)]
enum Known {
    /// An archive that stands alone: its content id, and itself while anybody holds it.
    Archive([u8; 32], Weak<Archive>),
    /// An archive that starts from others, likewise.
    Variant([u8; 32], Weak<Archive>),
    /// None, or a damaged one.
    Nothing,
}

impl Known {
    fn of(archive: &Archive, held: Weak<Archive>) -> Self {
        match archive.index().bases.is_empty() {
            true => Self::Archive(archive.content_id(), held),
            false => Self::Variant(archive.content_id(), held),
        }
    }
}

impl Bases {
    /// Bases are looked for in these places, in the order given; of two in one directory that are equally good the first in
    /// byte order is taken.
    pub fn new(places: Vec<Place>) -> Self {
        Self { places, ..Self::default() }
    }

    /// Looks again for what was missing. Until it is told to, a base that is missing is looked for once, however many
    /// variants need it.
    pub fn look_again(&self) {
        held(&self.missing).clear();
    }

    /// Opens the archive at `path`, and what it starts from.
    ///
    /// # Errors
    /// When an archive cannot be opened, or a base is in none of the places.
    pub fn open(&self, path: &Path) -> Result<Arc<Archive>, ArchiveError> {
        self.open_below(path, 0)
    }

    fn open_below(&self, path: &Path, depth: usize) -> Result<Arc<Archive>, ArchiveError> {
        let io = |source| ArchiveError::Io { path: path.to_owned(), source };
        let identity = identity_of(&fs::metadata(path).map_err(io)?);
        if let Some(Known::Archive(_, known) | Known::Variant(_, known)) = self.lock().get(&identity)
            && let Some(archive) = known.upgrade()
            && archive.bases().iter().all(|base| base.is_still_there())
        {
            return Ok(archive);
        }
        let mut archive = Archive::open(path)?;
        let wanted = archive.index().bases.clone();
        if !wanted.is_empty() && depth + 1 > BASE_CHAIN {
            return Err(ArchiveError::Inconsistent {
                path: path.to_owned(),
                field: "bases",
                found: format!("a chain of more than {BASE_CHAIN} bases"),
                expected: "a base that stands alone".into(),
            });
        }
        let bases = wanted.iter().map(|base| self.find(path, base, depth + 1)).collect::<Result<Vec<_>, _>>()?;
        archive.attach_bases(bases)?;
        let archive = Arc::new(archive);
        self.lock().insert(identity, Known::of(&archive, Arc::downgrade(&archive)));
        Ok(archive)
    }

    /// The archive with the content that `path` starts from: one that stands alone if there is any, for a variant may decode
    /// to the same content as its base, and never `path` itself.
    fn find(&self, path: &Path, base: &BaseReference, depth: usize) -> Result<Arc<Archive>, ArchiveError> {
        let wanted = base.content_id;
        let is_base = |candidate: &Path| self.has_content(candidate, wanted) == Some(StandsAlone(true));
        let missing = || ArchiveError::BaseMissing {
            path: path.to_owned(),
            name: base.name.clone(),
            content_id: hex(&wanted),
            places: self.places.iter().map(|place| place.path.clone()).collect(),
        };
        if held(&self.missing).contains(&wanted) {
            return Err(missing());
        }
        let last = held(&self.found).get(&wanted).cloned();
        if let Some(last) = last.filter(|last| is_base(last))
            && let Ok(archive) = self.open_below(&last, depth)
        {
            return Ok(archive);
        }
        let mut variants = Vec::new();
        for candidate in self.places.iter().flat_map(candidates) {
            match self.has_content(&candidate, wanted) {
                Some(StandsAlone(true)) => {
                    if let Ok(archive) = self.open_below(&candidate, depth) {
                        held(&self.found).insert(wanted, candidate);
                        return Ok(archive);
                    }
                }
                Some(StandsAlone(false)) => variants.push(candidate),
                None => (),
            }
        }
        if variants.is_empty() {
            held(&self.missing).insert(wanted);
        }
        let own = path.canonicalize().ok();
        let mut variants = variants.into_iter().filter(|variant| variant.canonicalize().ok() != own);
        let found = variants.find_map(|variant| self.open_below(&variant, depth).ok());
        found.ok_or_else(missing)
    }

    /// Whether the file is an archive that decodes to this content, and if so which kind. Each file is looked at once.
    fn has_content(&self, path: &Path, content_id: [u8; 32]) -> Option<StandsAlone> {
        let metadata = fs::metadata(path).ok().filter(Metadata::is_file)?; // opening a pipe would wait for its writer
        let identity = identity_of(&metadata);
        let kind = |known: &Known| match known {
            Known::Archive(found, _) if *found == content_id => Some(StandsAlone(true)),
            Known::Variant(found, _) if *found == content_id => Some(StandsAlone(false)),
            _ => None,
        };
        if let Some(known) = self.lock().get(&identity) {
            return kind(known);
        }
        let known = match Archive::open(path) {
            Ok(archive) => Known::of(&archive, Weak::new()),
            Err(ArchiveError::Io { .. }) => return None, // which may pass
            Err(_) => Known::Nothing,
        };
        let found = kind(&known);
        self.lock().insert(identity, known);
        found
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Identity, Known>> {
        held(&self.known)
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Archive {
    /// Whether the archive, and every base it starts from, is still the file that was opened.
    pub fn is_still_there(&self) -> bool {
        let is_it = || -> io::Result<bool> {
            let Some(opened) = self.opened_file() else { return Ok(true) };
            Ok(identity_of(&opened.metadata()?) == identity_of(&fs::metadata(self.path())?))
        };
        is_it().unwrap_or(false) && self.bases().iter().all(|base| base.is_still_there())
    }
}

fn identity_of(metadata: &Metadata) -> Identity {
    (metadata.dev(), metadata.ino(), metadata.len(), metadata.ctime(), metadata.ctime_nsec())
}

/// The archives of a place, in byte order of their names within a directory.
fn candidates(place: &Place) -> Vec<PathBuf> {
    let Ok(root) = place.path.canonicalize() else { return Vec::new() };
    if root.is_file() {
        return vec![root];
    }
    let (mut found, mut waiting) = (Vec::new(), vec![(root.clone(), 0)]);
    while let Some((directory, level)) = waiting.pop() {
        // What cannot be listed has no base; the error at the end says which one is missing.
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
        names.sort_unstable();
        for name in names {
            let candidate = directory.join(&name);
            let Ok(link) = fs::symlink_metadata(&candidate) else { continue };
            if link.is_dir() {
                if level < place.levels {
                    waiting.push((candidate, level + 1));
                }
            } else if is_archive_name(&name)
                && (link.is_file() || candidate.canonicalize().is_ok_and(|real| real.starts_with(&root)))
            {
                found.push(candidate);
            }
        }
    }
    found
}
