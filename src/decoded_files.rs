//! Decoded files on disk: what was decoded once need not be decoded again, not even after a restart.
//!
//! A directory holds whole files under their SHA-256, up to a number of bytes; the one used least recently makes room. Any
//! number of daemons may share it:
//!
//! - `DIGEST.safetensors` is a file. It got that name when all its bytes were on disk and had that digest.
//! - `DIGEST.seen` says by inode, length and times which file that was, so that one that was touched since is not believed
//!   before it has been read through again. Its own modification time says when the file was used last.
//! - `.partial-*` is being written, by whoever holds a lock on it; one that nobody holds is what a crash left.
//! - `.lock` is held while room is made.
//!
//! A file that is removed while somebody reads it lives on until that reader closes it.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use log::{info, warn};
use lru::LruCache;
use sha2::{Digest, Sha256};

use crate::hexadecimal::hex;

/// SHA-256 of a file's bytes.
pub type FileDigest = [u8; 32];

const FILE_SUFFIX: &str = ".safetensors";
const SEEN_SUFFIX: &str = ".seen";
const PARTIAL_PREFIX: &str = ".partial-";
/// Files kept open, so that each read of one need not open it.
const OPEN_FILES: NonZeroUsize = NonZeroUsize::new(64).expect("it is not zero");
/// What is written and hashed at once.
const PIECE_BYTES: usize = 4 << 20;

/// Why a decoded file is not kept.
#[derive(Debug, thiserror::Error)]
pub enum DecodedFilesError {
    /// The system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others could change what is in the directory.
    #[error(
        "{path}: owner {owner}, mode {mode:o}: expected a directory of user {ours} that nobody else may write to",
        path = path.display()
    )]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permissions.
        mode: u32,
        /// The user that this process acts as.
        ours: u32,
    },
    /// The file has no place here, whatever else goes.
    #[error("no room for {length_bytes} bytes: decoded files may take {budget_bytes}, those being written included")]
    NoRoom {
        /// Length of the file.
        length_bytes: u64,
        /// What all files together may take.
        budget_bytes: u64,
    },
    /// Its bytes could not be produced.
    #[error("{0}")]
    Source(Box<dyn std::error::Error + Send + Sync>),
    /// The bytes are not those of this digest.
    #[error("SHA-256 is {found}, expected {expected}")]
    Digest {
        /// Digest of the bytes.
        found: String,
        /// Digest that was promised.
        expected: String,
    },
}

/// A directory of decoded files.
#[derive(Debug)]
pub struct DecodedFiles {
    directory: PathBuf,
    budget_bytes: u64,
    /// Files that are what their names say.
    open: Mutex<LruCache<FileDigest, Arc<File>>>,
}

/// What tells a file from one that was put in its place, or changed.
#[derive(Debug, PartialEq, Eq)]
struct Identity(String);

impl Identity {
    fn of(file: &File) -> io::Result<Self> {
        let now = file.metadata()?;
        let (modified, changed) = ((now.mtime(), now.mtime_nsec()), (now.ctime(), now.ctime_nsec()));
        Ok(Self(format!("{} {} {} {modified:?} {changed:?}\n", now.dev(), now.ino(), now.len())))
    }
}

impl DecodedFiles {
    /// Uses `directory`, which is made if it is missing, for at most `budget_bytes`; by default for what is there and
    /// three quarters of what its file system has left. Removes what a crash left.
    ///
    /// # Errors
    /// When the directory cannot be made, listed or written to, or others may write to it.
    pub fn open(directory: &Path, budget_bytes: Option<u64>) -> Result<Self, DecodedFilesError> {
        let wrap = |source| DecodedFilesError::Io { path: directory.to_owned(), source };
        // Nobody else's business: what the archives' owner may not read must not be readable here.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(wrap)?;
        let directory = directory.canonicalize().map_err(wrap)?;
        // Whoever else could write here could put files in the place of ours: what says that one was seen is believed.
        let metadata = directory.metadata().map_err(wrap)?;
        // SAFETY: the call has no preconditions and cannot fail.
        let ours = unsafe { libc::geteuid() };
        if metadata.uid() != ours || metadata.mode() & 0o022 != 0 {
            let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
            return Err(DecodedFilesError::NotOurs { path: directory, owner, mode, ours });
        }
        let open = Mutex::new(LruCache::new(OPEN_FILES));
        let mut files = Self { directory, budget_bytes: 0, open };
        let _lock = files.lock().map_err(wrap)?;
        files.remove_abandoned().map_err(wrap)?;
        let held: u64 = files.list().map_err(wrap)?.iter().map(|held| held.length_bytes).sum();
        files.budget_bytes = match budget_bytes {
            Some(bytes) => bytes,
            None => held + free_bytes(&files.directory).map_err(wrap)? / 4 * 3,
        };
        info!("decoded files: {}, {held} bytes of {}", files.directory.display(), files.budget_bytes);
        Ok(files)
    }

    /// The file of this digest, if it was found or written before: see [`find`](Self::find).
    pub fn get(&self, digest: &FileDigest) -> Option<Arc<File>> {
        self.open_files().get(digest).cloned()
    }

    /// Looks for the file of this digest on disk. `None` also where it is there, but may have been changed since it was
    /// written: [`keep`](Self::keep) finds out.
    pub fn find(&self, digest: &FileDigest) -> Option<Arc<File>> {
        let seen_path = self.path(digest, SEEN_SUFFIX);
        let file = match self.get(digest) {
            Some(file) => file,
            None => {
                let file = File::open(self.path(digest, FILE_SUFFIX)).ok()?;
                let seen = fs::read_to_string(&seen_path).ok()?;
                if Identity::of(&file).ok()? != Identity(seen) {
                    return None;
                }
                self.remember(digest, file)
            }
        };
        // When it was used last; where that cannot be said it is removed a little too early.
        let _ = File::options().write(true).open(seen_path).and_then(|seen| seen.set_modified(SystemTime::now()));
        Some(file)
    }

    /// Makes sure that the file of this digest is here: one that may have been changed is read through, and one that is
    /// missing or wrong is written anew, its bytes given by `produce`, which fills a buffer from an offset on.
    ///
    /// # Errors
    /// When there is no room, the bytes cannot be produced or written, or they have another digest. Nothing is left then.
    pub fn keep<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        &self,
        digest: &FileDigest,
        length_bytes: u64,
        produce: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<Arc<File>, DecodedFilesError> {
        if let Some(file) = self.find(digest) {
            return Ok(file);
        }
        let path = self.path(digest, FILE_SUFFIX);
        let wrap = |source| DecodedFilesError::Io { path: path.clone(), source };
        if let Ok(file) = File::open(&path) {
            if digest_of(&file).map_err(wrap)? == *digest {
                self.mark_seen(digest, &file).map_err(wrap)?;
                return Ok(self.remember(digest, file));
            }
            warn!("{}: not the bytes that its name says, written anew", path.display());
        }
        self.write(digest, length_bytes, produce)
    }

    fn write<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        &self,
        digest: &FileDigest,
        length_bytes: u64,
        mut produce: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<Arc<File>, DecodedFilesError> {
        let path = self.path(digest, FILE_SUFFIX);
        let wrap = |source| DecodedFilesError::Io { path: path.clone(), source };
        let mut partial = {
            let _lock = self.lock().map_err(wrap)?;
            self.make_room(length_bytes)?;
            let partial = tempfile::Builder::new().prefix(PARTIAL_PREFIX).tempfile_in(&self.directory).map_err(wrap)?;
            partial.as_file().lock().map_err(wrap)?;
            // Takes its room at once: the next who makes room sees it.
            partial.as_file().set_len(length_bytes).map_err(wrap)?;
            partial
        };
        let mut hash = Sha256::new();
        let mut buffer = vec![0; PIECE_BYTES];
        let mut offset = 0;
        while offset < length_bytes {
            let piece = &mut buffer[..usize::try_from(length_bytes - offset).unwrap_or(PIECE_BYTES).min(PIECE_BYTES)];
            produce(offset, piece).map_err(|error| DecodedFilesError::Source(error.into()))?;
            hash.update(&*piece);
            partial.write_all(piece).map_err(wrap)?;
            offset += piece.len() as u64;
        }
        let found: FileDigest = hash.finalize().into();
        if found != *digest {
            return Err(DecodedFilesError::Digest { found: hex(&found), expected: hex(digest) });
        }
        // Before it has its name: after a crash, what has one is complete.
        partial.as_file().sync_all().map_err(wrap)?;
        partial.persist(&path).map_err(|error| wrap(error.error))?;
        let file = File::open(&path).map_err(wrap)?;
        self.mark_seen(digest, &file).map_err(wrap)?;
        Ok(self.remember(digest, file))
    }

    /// Writes down that this file has been read through, or written.
    fn mark_seen(&self, digest: &FileDigest, file: &File) -> io::Result<()> {
        let mut seen = tempfile::Builder::new().prefix(PARTIAL_PREFIX).tempfile_in(&self.directory)?;
        seen.as_file().lock()?;
        seen.write_all(Identity::of(file)?.0.as_bytes())?;
        seen.persist(self.path(digest, SEEN_SUFFIX))?;
        Ok(())
    }

    /// Removes files until there is room for one of `length_bytes`. The caller holds the lock.
    fn make_room(&self, length_bytes: u64) -> Result<(), DecodedFilesError> {
        let wrap = |source| DecodedFilesError::Io { path: self.directory.clone(), source };
        let mut held = self.list().map_err(wrap)?;
        held.sort_by_key(|held| held.last_used);
        let being_written: u64 = held.iter().filter(|held| held.is_partial).map(|held| held.length_bytes).sum();
        let budget_bytes = self.budget_bytes;
        if being_written + length_bytes > budget_bytes {
            return Err(DecodedFilesError::NoRoom { length_bytes, budget_bytes });
        }
        let mut total: u64 = held.iter().map(|held| held.length_bytes).sum();
        for Held { path, length_bytes: freed, .. } in held.into_iter().filter(|held| !held.is_partial) {
            if total + length_bytes <= budget_bytes {
                break;
            }
            info!("decoded file removed to make room: {}", path.display());
            // What says that it was seen goes first: without it the file is not believed.
            let _ = fs::remove_file(path.with_extension(&SEEN_SUFFIX[1..]));
            fs::remove_file(&path).map_err(wrap)?;
            total -= freed;
        }
        // Those of our own that are open hold their room until they are closed.
        self.open_files().clear();
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<Held>> {
        let mut held = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            let is_partial = name.starts_with(PARTIAL_PREFIX);
            if !is_partial && !name.ends_with(FILE_SUFFIX) {
                continue;
            }
            let Ok(metadata) = entry.metadata() else { continue }; // another daemon has just removed it
            let seen = fs::metadata(path.with_extension(&SEEN_SUFFIX[1..])).and_then(|seen| seen.modified());
            let last_used = seen.or_else(|_| metadata.modified())?;
            held.push(Held { path, length_bytes: metadata.len(), last_used, is_partial });
        }
        Ok(held)
    }

    /// Removes what a crash left: partial files that nobody holds. The caller holds the lock.
    fn remove_abandoned(&self) -> io::Result<()> {
        for held in self.list()?.into_iter().filter(|held| held.is_partial) {
            let is_held = |file: File| matches!(file.try_lock(), Err(TryLockError::WouldBlock));
            if File::open(&held.path).is_ok_and(|file| !is_held(file)) {
                let _ = fs::remove_file(&held.path); // another daemon may have been faster
            }
        }
        Ok(())
    }

    fn lock(&self) -> io::Result<File> {
        let path = self.directory.join(".lock");
        let lock = File::options().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        lock.lock()?;
        Ok(lock)
    }

    fn remember(&self, digest: &FileDigest, file: File) -> Arc<File> {
        let file = Arc::new(file);
        self.open_files().put(*digest, Arc::clone(&file));
        file
    }

    fn open_files(&self) -> std::sync::MutexGuard<'_, LruCache<FileDigest, Arc<File>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, digest: &FileDigest, suffix: &str) -> PathBuf {
        self.directory.join(hex(digest) + suffix)
    }
}

/// One file in the directory.
struct Held {
    path: PathBuf,
    length_bytes: u64,
    last_used: SystemTime,
    is_partial: bool,
}

fn digest_of(mut file: &File) -> io::Result<FileDigest> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; PIECE_BYTES];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().into()),
            length => hash.update(&buffer[..length]),
        }
    }
}

/// What the file system of `directory` has left for us.
fn free_bytes(directory: &Path) -> io::Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(directory.as_os_str().as_bytes())?;
    let mut totals = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` is a C string, and the call fills `totals` where it succeeds.
    let totals = unsafe {
        if libc::statvfs(path.as_ptr(), totals.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        totals.assume_init()
    };
    Ok(totals.f_bavail.saturating_mul(totals.f_frsize))
}

#[cfg(test)]
mod tests;
